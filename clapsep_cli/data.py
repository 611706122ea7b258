"""Reads and checks manifests of labelled clips, decodes clips and mixes them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from clapsep_cli.audio.samples import PEAK, Audio
from clapsep_cli.audio.sources import read_mono
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import AudioError, ManifestError
from clapsep_cli.files import path_in
from clapsep_cli.tables import check_faults, read_table

TRAIN, VALIDATION = "train", "validation"  # splits: the one to train on, and that of a manifest to validate on
SINGLE_CAPTION = re.compile(r"caption(_\d+)?")  # columns of one caption each, as in AudioCaps
STREAMED = ("OGG", "MP3")  # without a length in the header: a cut file only looks shorter
EDGE = 1024  # samples to decode at either end of a clip, to check that it is complete


@dataclass(frozen=True)
class Clip:
    """A labelled recording. Each of its `captions` is a text query for its sound."""

    path: Path
    label: str
    captions: tuple[str, ...]
    split: str = TRAIN


@dataclass(frozen=True)
class Labelling:
    """Rules for the labels of a manifest.

    Attributes:
        columns: names of the column with labels; the first that the manifest has is read.
        known: labels that are allowed; any if empty.
        captions: read captions, too.
        alone: one label is enough to train on.
        optional: captions may stand without a label, as in AudioCaps: any other clip sounds unlike such a clip.
    """

    columns: tuple[str, ...] = ("label",)
    known: tuple[str, ...] = ()
    captions: bool = True
    alone: bool = False
    optional: bool = False


LABELS, CAPTIONS = Labelling(), Labelling(optional=True)


def _captions(listed: str) -> tuple[str, ...]:
    return tuple(caption.strip() for caption in listed.split(";") if caption.strip())


def _captions_in(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return the captions of a row: those of `captions`, separated by ";", and `caption`, `caption_2` … as they are."""
    single = (text for name, text in row.items() if SINGLE_CAPTION.fullmatch(name) and text)
    return (*_captions(row.get("captions", "")), *single)


def _read_clips(
    path: Path, labelling: Labelling, folder: Path | None = None, split: str = TRAIN
) -> tuple[list[tuple[int, Clip, bool]], list[tuple[int, str]]]:
    """Read each row's line, clip, and True if its caption is empty; and the faults, with their lines.

    Files are relative to `folder`, by default that of the CSV; `split` is that of rows without one.
    """
    rows, faults = [], []
    label_columns = " or ".join((*labelling.columns, *(("caption", "captions") if labelling.optional else ())))
    for line, row in read_table(path, ("file or file_name", label_columns)):
        column = next((name for name in labelling.columns if name in row), "")
        file = row["file"] if "file" in row else row["file_name"]
        recording, label = path_in(folder or path.parent, file), row[column] if column else file
        if not label:
            faults.append((line, f"no {column}"))
        elif not recording.is_file():
            faults.append((line, f"no file {recording}"))
        captions = _captions_in(row) if labelling.captions else ()
        captioned = any(name == "captions" or SINGLE_CAPTION.fullmatch(name) for name in row)
        clip = Clip(recording, label, captions or (label.replace("_", " "),), row.get("split") or split)
        rows.append((line, clip, labelling.captions and captioned and not captions))
    return rows, faults


def read_manifest(path: Path) -> list[Clip]:
    """Read a CSV of labelled clips.

    Its columns are `file` (relative to the CSV) and `label`, and optionally `captions` (separated by ";"; the label
    where empty) or `caption`, `caption_2` … (one each, never split), and `split` ("train" where empty). Raises
    `ManifestError` that lists all faults by line. As in AudioCaps, `file` may be called `file_name`, and where there
    are captions but no labels, each clip's label is its name.
    """
    rows, faults = _read_clips(path, CAPTIONS)
    check_faults(path, [f"line {line}: {fault}" for line, fault in faults] or ([] if rows else ["no rows"]))
    return [clip for _, clip, _ in rows]


@dataclass(frozen=True)
class Corpus:
    """Clips of a manifest that was checked for training.

    Attributes:
        manifest: the CSV.
        clips: its clips.
        seconds: length of each clip, by its header.
        rates: sample rate of each clip in Hz.
        digest: hash of everything that training depends on; the folder of the files does not count.
    """

    manifest: Path
    clips: tuple[Clip, ...]
    seconds: tuple[float, ...]
    rates: tuple[int, ...]
    digest: str

    @property
    def train(self) -> list[int]:
        """Indices of the clips to train on."""
        return [index for index, clip in enumerate(self.clips) if clip.split == TRAIN]

    @property
    def hours(self) -> float:
        """Length of all clips together."""
        return sum(self.seconds) / 3600

    @property
    def held_out(self) -> list[int]:
        """Indices of the clips to validate on: of every split other than `train`."""
        return [index for index, clip in enumerate(self.clips) if clip.split != TRAIN]


def read_corpus(
    path: Path,
    min_clips: int = 1,
    labelling: Labelling = LABELS,
    audio: Path | None = None,
    held_out: Path | None = None,
) -> Corpus:
    """Read a manifest as `read_manifest` does, and check every file for training.

    Args:
        path: the manifest.
        min_clips: clips that each label needs in the split `train`; captions without labels need no number.
        labelling: rules for the labels.
        audio: folder of the files; by default that of each manifest.
        held_out: a further manifest, of clips to validate on.

    Raises:
        ManifestError: lists all errors by line: files that are missing, empty, listed twice or cannot be decoded, empty
            or unknown labels, empty captions, and too few clips or labels to train on.
    """
    rows, faults = _read_clips(path, labelling, audio)
    if held_out:
        check_faults(held_out, [f"line {line}: {fault}" for line, fault in _read_clips(held_out, labelling, audio)[1]])
        last = max((line for line, *_ in rows), default=1)  # its lines count on from those of the first
        further, _ = _read_clips(held_out, labelling, audio, VALIDATION)
        rows += [(last + line, replace(clip, split=VALIDATION), uncaptioned) for line, clip, uncaptioned in further]
    labelled = any(name in row for _, row in read_table(path, ())[:1] for name in labelling.columns)
    missing = {line for line, _ in faults}
    with ThreadPoolExecutor(8) as pool:
        inspected = list(pool.map(lambda row: (0.0, 0) if row[0] in missing else _inspect(row[1].path), rows))
    first: dict[Path, int] = {}
    trained = Counter(clip.label for _, clip, _ in rows if clip.split == TRAIN and clip.label)
    for (line, clip, uncaptioned), found in zip(rows, inspected, strict=True):
        if isinstance(found, str):
            faults.append((line, f"{clip.path} {found}"))
        if clip.label and labelling.known and clip.label not in labelling.known:
            faults.append((line, f"{clip.label!r} is none of {', '.join(labelling.known)}"))
        if uncaptioned:
            faults.append((line, "the caption is empty"))
        if first.setdefault(clip.path, line) != line:
            faults.append((line, f"{clip.path} is on line {first[clip.path]} already"))
        if labelled and clip.split == TRAIN and 0 < trained[clip.label] < min_clips:
            few = f"the label {clip.label!r} has too few clips to train on, {trained[clip.label]}"
            faults.append((line, f"{few}; it takes {min_clips}, unless set min_clips={trained[clip.label]}"))
    if len(trained) < (1 if labelling.alone else 2):
        few = f"there are clips of {len(trained)} labels in the split {TRAIN!r}"
        faults.append((1, f"{few}; it takes {'one' if labelling.alone else 'two'}"))
    if faults:
        listed = "".join(f"\n  line {line}: {fault}" for line, fault in sorted(faults))
        raise ManifestError(f"{path}: {len(faults)} faults{listed}")
    clips = tuple(clip for _, clip, _ in rows)
    seconds, rates = zip(*((found[0], found[1]) for found in inspected if not isinstance(found, str)), strict=True)
    return Corpus(path, clips, seconds, rates, _digest(clips, audio or path.parent, seconds))


def _inspect(path: Path) -> tuple[float, int] | str:
    """Return seconds and rate of a recording, or its fault. Both ends are decoded, to find files that are cut short."""
    try:
        with soundfile.SoundFile(path) as file:
            if not file.frames:
                return "has no samples"
            starts = [0] if file.format in STREAMED else [0, max(0, file.frames - EDGE)]
            for start in starts:
                file.seek(start)
                edge = file.read(EDGE, dtype="float32")
                if len(edge) < min(EDGE, file.frames):
                    return "is cut short"
                if not np.isfinite(edge).all():
                    return "holds numbers that are not finite"
            return float(file.frames / file.samplerate), int(file.samplerate)
    except (soundfile.LibsndfileError, OSError) as error:
        return f"cannot be decoded ({error})"


def _digest(clips: Sequence[Clip], root: Path, seconds: Sequence[object]) -> str:
    rows = [
        (
            clip.path.relative_to(root).as_posix() if clip.path.is_relative_to(root) else clip.path.name,
            clip.label,
            clip.captions,
            clip.split,
            length,
        )
        for clip, length in zip(clips, seconds, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Read further captions by label from a CSV with the columns `label` and `captions` (separated by ";")."""
    return {row["label"]: _captions(row["captions"]) for _, row in read_table(path, ("label", "captions"))}


def read_clip(path: Path, rate_out: int = RATE_HZ) -> Audio:
    """Decode a clip to mono at `rate_out` Hz, float32 `[samples]`. Raises `ManifestError` if it cannot be read."""
    try:
        return read_mono(path, rate_out)
    except AudioError as error:
        raise ManifestError(str(error)) from error


def fit(audio: Audio, samples: int) -> Audio:
    """Cut `audio`, float32 `[any]`, to its first `samples`, or pad it with zeros at the end (paper IV-A)."""
    return np.asarray(np.pad(audio[:samples], (0, max(0, samples - len(audio)))), np.float32)


def mix(target: Audio, interferer: Audio, snr_db: float = 0.0) -> tuple[Audio, Audio]:
    """Mix two signals.

    Args:
        target: float32 `[samples]`.
        interferer: float32 `[samples]`, of the same length.
        snr_db: level of the target over the interferer, which is scaled, in dB.

    Returns:
        The mixture and the target, scaled together to a peak of 0.9 if the mixture's exceeds 1, as released.
    """
    ratio = (np.square(target, dtype=np.float64).sum() + 1e-12) / (
        np.square(interferer, dtype=np.float64).sum() + 1e-12
    )
    mixture = target + interferer * np.float32(np.sqrt(ratio / 10 ** (snr_db / 10)))
    peak = np.abs(mixture).max()
    scale = np.float32(PEAK / peak if peak > 1 else 1)
    return np.asarray(mixture * scale, np.float32), np.asarray(target * scale, np.float32)
