"""Reads lists of mixtures to evaluate on, also those released with the paper, and makes lists by its rule (IV-A2)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import numpy as np

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.data import Clip, read_manifest
from clapsep_cli.errors import ManifestError
from clapsep_cli.tables import MAX_FAULTS_SHOWN, check_faults, read_table, write_table

PREFIX = "The sound of"  # before labels, as in the paper (IV-A2)


@dataclass(frozen=True)
class Mixture:
    """A row of a list of mixtures. The first four columns are the paper's.

    Attributes:
        source_file: recording of the target, relative to the audio folder, as all files.
        positive_caption: text query for the target.
        noise_file: recording of the interferer.
        negative_caption: text query for the interferer.
        label: class of the target.
        shot_file: a recording of the same label that is not in the mixture.
        absent_caption: text query for a sound that is not in the mixture.
    """

    source_file: str
    positive_caption: str
    noise_file: str
    negative_caption: str
    label: str = ""
    shot_file: str = ""
    absent_caption: str = ""

    @property
    def files(self) -> list[str]:
        """The recordings that the row names."""
        return [file for file in (self.source_file, self.noise_file, self.shot_file) if file]


@dataclass(frozen=True)
class EvaluationSet:
    """Mixtures to evaluate on.

    Attributes:
        rows: the mixtures.
        folder: the folder of their files.
        shots: recordings in `folder` to query with, by class: a label or a caption, in lower case.
    """

    rows: Sequence[Mixture]
    folder: Path
    shots: Mapping[str, Sequence[str]] = field(default_factory=dict)


NEEDED = [f.name for f in fields(Mixture)][:4]


def read_mixtures(path: Path) -> list[Mixture]:
    """Read a list of mixtures; the first four columns are required. Raises `ManifestError`."""
    rows, faults = [], []
    for line, row in read_table(path, NEEDED):
        faults += [f"line {line}: no {name}" for name in NEEDED if not row[name]]
        rows.append(Mixture(**{f.name: row.get(f.name, "") for f in fields(Mixture)}))
    check_faults(path, faults or ([] if rows else ["no rows"]))
    return rows


def read_shots(path: Path) -> dict[str, tuple[str, ...]]:
    """Read recordings by class from a CSV with the columns `class` and `file`.

    A `file` is one name, or a list of names as Python or JSON write it (`['a.wav', 'b.wav']`, as released); a class
    may have several rows. Raises `ManifestError`.
    """
    shots: dict[str, tuple[str, ...]] = {}
    faults = []
    for line, row in read_table(path, ("class", "file")):
        name, cell = row["class"].lower(), row["file"]
        try:
            # Literals only: nothing in a cell is executed.
            files = ast.literal_eval(cell) if cell.startswith("[") else [cell]
            if not name or not files or not all(isinstance(file, str) and file for file in files):
                raise ValueError
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            faults.append(f"line {line}: needs a class and a file or a list of files")
        else:
            shots[name] = (*shots.get(name, ()), *files)
    check_faults(path, faults or ([] if shots else ["no rows"]))
    return shots


def located(shots: Mapping[str, Sequence[str]], folders: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Replace the names of shots that are in one of `folders` by their absolute paths."""

    def find(file: str) -> str:
        return next((str((folder / file).resolve()) for folder in folders if (folder / file).is_file()), file)

    return {name: tuple(map(find, files)) for name, files in shots.items()}


def check_files(data: EvaluationSet, skip: bool = False) -> EvaluationSet:
    """Check that all recordings are there.

    Args:
        data: the mixtures and shots to check.
        skip: drop mixtures and shots whose recordings are missing.

    Returns:
        The mixtures and shots whose recordings are all there.

    Raises:
        ManifestError: files are missing and `skip` is False, or no mixture is left.
    """
    named = dict.fromkeys(file for row in data.rows for file in row.files)
    named |= dict.fromkeys(file for files in data.shots.values() for file in files)
    missing = {file: None for file in named if not (data.folder / file).is_file()}
    whole = [row for row in data.rows if not missing.keys() & {*row.files}]
    if (missing and not skip) or not whole:
        shown = ", ".join(list(missing)[:MAX_FAULTS_SHOWN]) + (" …" if len(missing) > MAX_FAULTS_SHOWN else "")
        hint = "" if skip else "; --skip-missing skips the mixtures that need them"
        raise ManifestError(f"{data.folder}: {len(missing)} of {len(named)} files are missing: {shown}{hint}")
    shots = {name: [file for file in files if file not in missing] for name, files in data.shots.items()}
    return EvaluationSet(whole, data.folder, shots)


def labels_of(label: str) -> list[str]:
    """Split the labels of a clip with several sounds: "dog;rain"."""
    return [part.strip() for part in label.split(";") if part.strip()]


def caption_of(label: str, prefix: str = PREFIX) -> str:
    """Make a caption of a label: "The sound of dog", or of several: "The sounds of dog, rain and bell"."""
    *others, last = (part.replace("_", " ") for part in labels_of(label))
    if not others:
        return f"{prefix} {last}".strip()
    prefix = re.sub(r"\bsound\b", "sounds", prefix)
    return f"{prefix} {', '.join(others)} and {last}".strip()


def labelled_clips(
    source: Path, split: str | None = None, prefix: str = PREFIX, excluded: Iterable[str] = ()
) -> tuple[list[Clip], Path]:
    """List labelled clips.

    Args:
        source: a manifest, or a folder with a sub-folder for each label.
        split: only clips of this split of the manifest; None for all.
        prefix: text before a label, which makes the caption of a clip that has none of its own.
        excluded: labels whose clips are skipped.

    Returns:
        The clips, and the folder their files are in.

    Raises:
        ManifestError: the manifest cannot be used, no clip has an excluded label, or there are no clips.
    """
    clips, root = _clips_in(source, split, prefix)
    left_out = set(excluded)
    if unknown := sorted(left_out - {label for clip in clips for label in labels_of(clip.label)}):
        raise ManifestError(f"{source}: no clip has the label {', '.join(unknown)}: --exclude-labels names others")
    chosen = [clip for clip in clips if not left_out & {*labels_of(clip.label)}]
    if not chosen:
        raise ManifestError(f"{source}: --exclude-labels leaves no clip")
    return chosen, root


def _clips_in(source: Path, split: str | None, prefix: str) -> tuple[list[Clip], Path]:
    if not source.is_dir():
        clips = [
            replace(clip, captions=(caption_of(clip.label, prefix),))
            if clip.captions == (clip.label.replace("_", " "),)  # it has no caption but its label
            else clip
            for clip in read_manifest(source)
        ]
        if chosen := [clip for clip in clips if split in (None, clip.split)]:
            return chosen, source.parent
        splits = ", ".join(sorted({clip.split for clip in clips}))
        raise ManifestError(f"{source}: no clips of the split {split!r}; there are: {splits}")
    if split is not None:
        raise ManifestError(f"{source}: a folder has no splits; use --split with a manifest")
    clips = []
    for file in sorted(p for p in source.glob("*/**/*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        label = file.relative_to(source).parts[0]
        clips.append(Clip(file, label, (caption_of(label, prefix),), ""))
    if not clips:
        raise ManifestError(f"{source}: no recordings in sub-folders; each is a label: {source}/dog/1.wav")
    return clips, source


def _by_label(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.label, []).append(clip)
    return groups


def set_aside(clips: Sequence[Clip], count: int, seed: int) -> tuple[list[Clip], dict[str, list[Clip]]]:
    """Draw `count` clips of each label as shots; a label keeps at least one clip.

    Args:
        clips: all clips.
        count: shots of a label.
        seed: of the draw.

    Returns:
        The other clips, and the shots by label.
    """
    rng = np.random.default_rng((seed, 1))
    groups = _by_label(clips)
    shots = {}
    for label in sorted(groups):
        members = groups[label]
        shots[label] = [members[i] for i in rng.permutation(len(members))[: min(count, len(members) - 1)]]
    taken = {id(clip) for chosen in shots.values() for clip in chosen}
    return [clip for clip in clips if id(clip) not in taken], shots


def make_mixtures(
    clips: Sequence[Clip],
    root: Path,
    seed: int,
    per_label: int | None = None,
    per_clip: int = 1,
    shots: Mapping[str, Sequence[Clip]] | None = None,
    interferers: int | None = None,
) -> list[Mixture]:
    """Mix each clip with interferers of other labels, drawn evenly.

    Labels that share a caption or a sound ("dog;rain" and "dog") are never mixed. Each mixture also has a shot and the
    caption of an absent sound, if there are any.

    Args:
        clips: the targets and interferers.
        root: folder that files are relative to.
        seed: of all draws.
        per_label: most targets of a label; by default all clips.
        per_clip: mixtures of each target, with different interferers.
        shots: clips for the shots, by label; by default another clip of the label.
        interferers: number of clips that all interferers are drawn from; by default all clips.

    Raises:
        ManifestError: a label has no clip to be mixed with.
    """
    rng = np.random.default_rng(seed)
    groups = _by_label(clips)
    sounds = {
        label: {*labels_of(label), *(caption for clip in members for caption in clip.captions)}
        for label, members in groups.items()
    }
    few = np.random.default_rng((seed, 2)).permutation(len(clips))[:interferers].tolist()
    pools = _by_label(clips[at] for at in sorted(few)) if interferers else groups

    @cache
    def apart(*labels: str) -> list[str]:
        taken = {caption for label in labels for caption in sounds[label]}
        return [label for label in groups if label not in labels and not taken & sounds[label]]

    def other(*labels: str, but: Sequence[Clip] = (), among: Mapping[str, Sequence[Clip]] = groups) -> Clip | None:
        free = [label for label in apart(*labels) if label in among]
        while free:
            index = rng.integers(len(free))
            members = [clip for clip in among[free.pop(index)] if clip not in but]
            if members:
                return members[rng.integers(len(members))]
        return None

    rows = []
    for label in sorted(groups):
        for index in sorted(rng.permutation(len(groups[label]))[:per_label].tolist()):
            clip, noises = groups[label][index], list[Clip]()
            while len(noises) < per_clip and (noise := other(label, but=noises, among=pools)):
                noises.append(noise)
                absent = other(label, noise.label)
                spare = shots.get(label, ()) if shots is not None else [c for c in groups[label] if c is not clip]
                files = (clip, noise, spare[int(rng.integers(len(spare)))] if spare else None)
                source, interferer, shot = (file_name(c, root) if c else "" for c in files)
                caption = absent.captions[0] if absent else ""
                rows.append(Mixture(source, clip.captions[0], interferer, noise.captions[0], label, shot, caption))
            if not noises:
                raise ManifestError(
                    f"{root}: nothing to mix {label!r} with: mixtures need two labels, of other sounds"
                    + (", and --interferers some of each" if interferers else "")
                )
    return rows


def file_name(clip: Clip, root: Path) -> str:
    """Return a clip's name in a list: relative to `root` if it is below it, with slashes on every system."""
    return (clip.path.relative_to(root) if clip.path.is_relative_to(root) else clip.path.absolute()).as_posix()


def write_mixtures(path: Path, rows: Sequence[Mixture]) -> None:
    """Write a list of mixtures. Raises `OutputError`."""
    write_table(path, [f.name for f in fields(Mixture)], (astuple(row) for row in rows))


def write_shots(path: Path, shots: Mapping[str, Sequence[Clip]], clips: Iterable[Clip], root: Path) -> None:
    """Write shots by caption, as in the released lists, as interferers have no label.

    Args:
        path: the CSV.
        shots: clips by label. Labels that share a caption share their shots.
        clips: all clips, for the captions of the labels.
        root: folder that files are relative to.

    Raises:
        OutputError: if the file cannot be written.
    """
    by_caption: dict[str, dict[str, None]] = {}
    for clip in clips:
        files = dict.fromkeys(file_name(shot, root) for shot in shots.get(clip.label, ()))
        by_caption.setdefault(clip.captions[0], {}).update(files)
    write_table(path, ["class", "file"], ([name, str(list(files))] for name, files in by_caption.items() if files))
