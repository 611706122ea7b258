"""Labelled clips and the mixtures made of them, for training and evaluation."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from numpy.typing import NDArray

from clapsep_cli.audio import PEAK, Audio, to_rate
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import ManifestError

MAX_FAULTS_SHOWN = 10

Made = TypeVar("Made")


@dataclass(frozen=True)
class Clip:
    """One labelled recording. `captions` describe its sound; any of them is a good text query for it."""

    path: Path
    label: str
    captions: tuple[str, ...]
    split: str = "train"


def read_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV, values as text. Raises `ManifestError` unless it is readable and has the columns `needed`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise ManifestError(f"{path}: no column {', '.join(missing)}; needed: {','.join(needed)}")
            return [{name: value or "" for name, value in row.items() if name} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read as a CSV ({error})") from error


def _captions(listed: str) -> tuple[str, ...]:
    return tuple(caption.strip() for caption in listed.split(";") if caption.strip())


def read_manifest(path: Path) -> list[Clip]:
    """Read a CSV with the columns `file` (relative to the CSV), `label`, and optionally `captions`
    (separated by ";"; the label itself where empty) and `split`.

    Raises `ManifestError` that lists what is wrong, line by line.
    """
    clips, faults = [], []
    for line, row in enumerate(read_rows(path, ("file", "label")), 2):
        recording, label = path.parent / row["file"], row["label"].strip()
        if not label:
            faults.append(f"line {line}: no label")
        elif not recording.is_file():
            faults.append(f"line {line}: no file {recording}")
        captions = _captions(row.get("captions", "")) or (label.replace("_", " "),)
        clips.append(Clip(recording, label, captions, row.get("split") or "train"))
    if faults or not clips:
        shown = "; ".join(faults[:MAX_FAULTS_SHOWN]) + (" …" if len(faults) > MAX_FAULTS_SHOWN else "")
        raise ManifestError(f"{path}: {shown or 'no rows'}")
    return clips


def read_paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Read further captions by label from a CSV with the columns `label` and `captions` (separated by ";")."""
    return {row["label"]: _captions(row["captions"]) for row in read_rows(path, ("label", "captions"))}


def read_clip(path: Path) -> Audio:
    """Decode a clip to mono at 32 kHz, float32 `[samples]`."""
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ManifestError(f"{path}: cannot be decoded ({error})") from error
    return to_rate(audio.mean(1), rate, RATE_HZ)


def fit(audio: Audio, samples: int) -> Audio:
    """The first `samples` of `audio`, zero-padded at the end where it is shorter (paper IV-A)."""
    return np.asarray(np.pad(audio[:samples], (0, max(0, samples - len(audio)))), np.float32)


def mix(target: Audio, interferer: Audio, snr_db: float = 0.0) -> tuple[Audio, Audio]:
    """Mix two signals of one length at `snr_db`; returns (mixture, target), scaled together if the peak exceeds 1."""
    ratio = (np.square(target, dtype=np.float64).sum() + 1e-12) / (
        np.square(interferer, dtype=np.float64).sum() + 1e-12
    )
    mixture = target + interferer * np.float32(np.sqrt(ratio / 10 ** (snr_db / 10)))
    peak = np.abs(mixture).max()
    scale = np.float32(PEAK / peak if peak > 1 else 1)
    return np.asarray(mixture * scale, np.float32), np.asarray(target * scale, np.float32)


@dataclass
class Pool:
    """Clips held in memory as int16 at 32 kHz, and which of them share a label."""

    clips: Sequence[Clip]
    pcm: list[NDArray[np.int16]] = field(default_factory=list)
    by_label: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def load(cls, clips: Sequence[Clip], max_seconds: float = 30, workers: int = 2) -> Pool:
        def decode(clip: Clip) -> NDArray[np.int16]:
            audio = read_clip(clip.path)[: int(max_seconds * RATE_HZ)]
            return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)

        with ThreadPoolExecutor(workers) as pool:
            loaded = cls(clips, list(pool.map(decode, clips)))
        for index, clip in enumerate(clips):
            loaded.by_label[clip.label].append(index)
        return loaded


@dataclass(frozen=True)
class Draw:
    """How training examples are drawn. Lengths in seconds, gains in dB."""

    seconds: float = 5.0
    label_power: float = 0.7  # a label of n clips is drawn as often as min(n, cap) ** power
    label_cap: int = 80
    snr_std: float = 3.0
    snr_limit: float = 8.0
    speed: float = 0.15  # speed is perturbed by up to this fraction …
    speed_share: float = 0.4  # … in this share of the clips


class Sampler:
    """Draws pairs of clips of different sounds, cut or laid out to one length.

    Whatever is drawn for a step depends only on the seed and the step, so that a resumed run draws the same.
    """

    def __init__(self, pool: Pool, draw: Draw, seed: int, among: Sequence[int] | None = None) -> None:
        self.pool, self.draw, self.seed = pool, draw, seed
        self.samples = int(draw.seconds * RATE_HZ)
        allowed = set(range(len(pool.clips)) if among is None else among)
        groups = {label: [i for i in members if i in allowed] for label, members in pool.by_label.items()}
        self.groups = {label: members for label, members in groups.items() if members}
        self.labels = list(self.groups)
        weight = np.array([min(len(g), draw.label_cap) for g in self.groups.values()]) ** draw.label_power
        self.weight = weight / weight.sum()
        self.sounds = {label: set(pool.clips[members[0]].captions) for label, members in self.groups.items()}

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))

    def clip(self, rng: np.random.Generator, avoid: Sequence[str] = ()) -> int:
        """The index of a clip whose label sounds like none of `avoid` (labels that share a caption are one sound)."""
        while True:
            label = self.labels[rng.choice(len(self.labels), p=self.weight)]
            if all(label != other and not self.sounds[label] & self.sounds[other] for other in avoid):
                return int(rng.choice(self.groups[label]))

    def place(self, index: int, rng: np.random.Generator) -> Audio:
        """A clip as it might occur in a recording: a stretch of a long one, a short one once or several times."""
        pcm, n, speed = self.pool.pcm[index], self.samples, 1.0
        if rng.random() < self.draw.speed_share:
            speed += rng.uniform(-self.draw.speed, self.draw.speed)
        stretch = math.ceil(n * speed) + 1  # samples of the clip that fill the window
        if len(pcm) > stretch:
            starts = rng.integers(0, len(pcm) - stretch + 1, 2)
            pcm = max(
                (pcm[s : s + stretch] for s in starts), key=lambda x: float(np.square(x[::8], dtype=np.float32).sum())
            )
        audio = pcm.astype(np.float32) / 32768
        if speed != 1:
            audio = np.interp(np.arange(0, len(audio) - 1, speed), np.arange(len(audio)), audio).astype(np.float32)
        if len(audio) >= n:
            return np.asarray(audio[:n], np.float32)
        out = np.zeros(n, np.float32)
        layout = rng.random()
        at = 0 if layout < 0.4 else int(rng.integers(0, n - len(audio) + 1))
        if layout >= 0.7:
            at = int(rng.integers(0, max(1, min(n - len(audio), RATE_HZ))))
        while at < n:
            piece = audio[: n - at]
            out[at : at + len(piece)] = piece
            at += len(audio) + int(rng.integers(0, RATE_HZ)) if layout >= 0.7 else n
        return out

    def pairs(self, step: int, size: int) -> tuple[Audio, Audio, NDArray[np.int64]]:
        """Targets and interferers, float32 `[size, samples]` each, to be added up; and their clips, `[size, 2]`."""
        rng = self.rng(step)
        targets, interferers = np.empty((2, size, self.samples), np.float32)
        indices = np.empty((size, 2), np.int64)
        for row in range(size):
            a = self.clip(rng)
            b = self.clip(rng, avoid=[self.pool.clips[a].label])
            snr = float(np.clip(rng.normal(0, self.draw.snr_std), -self.draw.snr_limit, self.draw.snr_limit))
            mixture, target = mix(self.place(a, rng), self.place(b, rng), snr)
            targets[row], interferers[row], indices[row] = target, mixture - target, (a, b)
        return targets, interferers, indices


def ahead(make: Callable[[int], Made], steps: range) -> Iterator[Made]:
    """Yield `make(step)` for each step, making the next one in a thread while the last is being used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, steps.start) if steps else None
        for step in steps:
            assert coming is not None
            made = coming.result()
            if step + 1 < steps.stop:
                coming = pool.submit(make, step + 1)
            yield made
