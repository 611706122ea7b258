"""Joins manifests of labelled clips into one to train on, and keeps whole sources out of it to measure by.

    python weights/make_manifest.py ../shared/audio/manifest.csv ../shared/audio2/manifest.csv -o runs/manifest.csv \
        --hold-out ESC-10 FSDKaggle2018 mod-sounds rse/soundfx doggy-daycare --list weights/unseen-mixtures.csv

Every manifest has the columns file, split, label, captions and source. Clips of a source that begins with one of the
--hold-out names get the split `unseen`; the splits `dev` and `dev_source` stay as they are. --list writes mixtures
whose two clips are both `unseen` or `dev_source`, and beside it the shots to ask by: `clapsep evaluate` takes both with
--audio the folder that holds all the manifests' folders.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np

from clapsep_cli.data import Clip, read_manifest
from clapsep_cli.evaluation.mixtures import file_name, make_mixtures, write_mixtures, write_shots
from clapsep_cli.tables import read_table

HELD_OUT = ("unseen", "dev_source")  # splits of sources that are never trained on
COLUMNS = ("file", "split", "label", "captions", "source")
PER_LABEL = 4  # mixtures of a label of a source
SEED = 0


def join(manifests: list[Path], hold_out: list[str], out: Path) -> dict[Path, str]:
    """Write the joined manifest; return the source of each clip by its path."""
    rows, sources = [], {}
    for manifest in manifests:
        for _, row in read_table(manifest, COLUMNS):
            path = manifest.resolve().parent / row["file"]
            if any(row["source"].startswith(name) for name in hold_out):
                row["split"] = HELD_OUT[0]
            sources[path] = row["source"]
            rows.append({name: row[name] for name in COLUMNS} | {"file": os.path.relpath(path, out.resolve().parent)})
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return sources


def write_list(out: Path, clips: list[Clip], sources: dict[Path, str], root: Path) -> None:
    """Write mixtures of held-out clips, at most `PER_LABEL` of a label of a source, and all other clips as shots."""
    source = {file_name(clip, root): sources[clip.path.resolve()] for clip in clips}
    rows = make_mixtures(clips, root, SEED)
    kept, count = [], dict[tuple[str, str], int]()
    for index in sorted(np.random.default_rng(SEED).permutation(len(rows)).tolist(), key=lambda i: rows[i].label):
        key = (source[rows[index].source_file], rows[index].label)
        count[key] = count.get(key, 0) + 1
        if count[key] <= PER_LABEL:
            kept.append(rows[index])
    write_mixtures(out, kept)
    shots: dict[str, list[Clip]] = {}
    for clip in clips:
        shots.setdefault(clip.label, []).append(clip)
    write_shots(out.with_name(out.name.replace("mixtures", "shots")), shots, clips, root)
    print(f"{out}: {len(kept)} mixtures of {len(shots)} labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", nargs="*", default=[], metavar="SOURCE")
    parser.add_argument("--list", type=Path, metavar="CSV")
    options = parser.parse_args()
    sources = join(options.manifests, options.hold_out, options.out)
    if options.list:
        held_out = [clip for clip in read_manifest(options.out) if clip.split in HELD_OUT]
        clips = [Clip(clip.path.resolve(), clip.label, clip.captions, clip.split) for clip in held_out]
        root = Path(os.path.commonpath([manifest.resolve().parent for manifest in options.manifests]))
        write_list(options.list, clips, sources, root)


if __name__ == "__main__":
    main()
