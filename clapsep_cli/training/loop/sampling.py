"""Draws the examples of each training step: clips, from memory or from disk, and pairs of them.

The draws depend only on the seed, the step and the row. So a resumed run, and a run on another number of machines,
draws the same examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from clapsep_cli.audio.samples import Audio, to_rate
from clapsep_cli.data import Corpus, fit, read_clip
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import ManifestError
from clapsep_cli.store.tensors import read_notes, read_tensors, save_tensors
from clapsep_cli.training.loop.settings import Share, settings

Store = Literal["auto", "memory", "disk"]
MEMORY_LIMIT_BYTES = 4 * 2**30  # "auto" keeps a corpus of up to this size in memory, as int16: 18 hours
MAX_SECONDS = 30.0  # of a clip that is kept in memory
MARGIN = 64  # samples beyond a stretch that are read, for the resampler to start and end in the signal
TRIES = 50  # at drawing a label, before all of them are looked through
UNLIKE_TRIES = 1000  # at drawing a clip that sounds unlike another

Made = TypeVar("Made")


class Pool(ABC):
    """Reads the clips of a corpus as mono, and groups them by label. Safe to use from several threads.

    Args:
        corpus: the clips.
        rate: sample rate in Hz to read them at; None for each clip's own.
    """

    def __init__(self, corpus: Corpus, rate: int | None = RATE_HZ) -> None:
        self.clips = corpus.clips
        self.rates = corpus.rates if rate is None else (rate,) * len(corpus.clips)
        self.by_label: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(corpus.clips):
            self.by_label[clip.label].append(index)

    @abstractmethod
    def samples(self, index: int) -> int:
        """Return the length of a clip, in samples at its rate."""

    @abstractmethod
    def read(self, index: int, start: int, stop: int) -> Audio:
        """Read samples `start` to `stop`, or to the clip's end, float32 `[samples]`. Raises `ManifestError`."""

    def stretch(self, index: int, samples: int, rng: np.random.Generator) -> Audio:
        """Read a random stretch of a clip, or all of a short one with zeros after it, float32 `[samples]`."""
        start = int(rng.integers(max(0, self.samples(index) - samples) + 1))
        return fit(self.read(index, start, start + samples), samples)

    def unlike(self, index: int, among: Sequence[int], rng: np.random.Generator) -> int:
        """Draw one of the clips `among` with another label and other captions. Raises `ManifestError` for none."""
        clip = self.clips[index]
        for _ in range(UNLIKE_TRIES):
            drawn = int(rng.choice(among))
            other = self.clips[drawn]
            if other.label != clip.label and not set(other.captions) & set(clip.captions):
                return drawn
        raise ManifestError(f"{clip.path}: too few clips in the manifest have another label and other captions")


class MemoryPool(Pool):
    """Holds clips in memory as int16, the first `seconds` of each; with a file `cache`, decoded only once."""

    def __init__(
        self,
        corpus: Corpus,
        workers: int = 2,
        rate: int | None = RATE_HZ,
        seconds: float = MAX_SECONDS,
        cache: Path | None = None,
    ) -> None:
        super().__init__(corpus, rate)
        of = {"clips": corpus.digest, "rate": str(rate), "seconds": str(seconds)}
        kept = read_kept(cache, of) if cache else None
        if kept is not None:
            self.pcm = kept
            return

        def decode(index: int) -> NDArray[np.int16]:
            whole = read_clip(corpus.clips[index].path, self.rates[index])
            audio = whole[: int(min(seconds * self.rates[index], len(whole)))]
            return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)

        with ThreadPoolExecutor(workers) as pool:
            self.pcm = list(pool.map(decode, range(len(corpus.clips))))
        if cache:
            keep(self.pcm, cache, of)

    def samples(self, index: int) -> int:
        return len(self.pcm[index])

    def read(self, index: int, start: int, stop: int) -> Audio:
        return np.asarray(self.pcm[index][start:stop].astype(np.float32) / 32768, np.float32)


def keep(clips: Sequence[NDArray[np.int16]], path: Path, of: Mapping[str, str]) -> None:
    """Write decoded clips to a file for `read_kept`. `of` names their source and the settings of decoding."""
    ends = np.cumsum([len(clip) for clip in clips])
    tensors = {"pcm": torch.from_numpy(np.concatenate(clips)), "ends": torch.from_numpy(ends)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, of)


def read_kept(path: Path, of: Mapping[str, str]) -> list[NDArray[np.int16]] | None:
    """Map the clips that `keep` wrote; None if there is no such file, or one with another `of`."""
    if not path.exists() or read_notes(path) != dict(of):
        return None
    tensors = read_tensors(path)
    pcm, ends = tensors["pcm"].numpy(), tensors["ends"].tolist()
    return [pcm[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class DiskPool(Pool):
    """Decodes stretches of clips from disk each time they are read, for clips of any length and number."""

    def __init__(self, corpus: Corpus, rate: int | None = RATE_HZ) -> None:
        super().__init__(corpus, rate)
        self.seconds = corpus.seconds

    def samples(self, index: int) -> int:
        return max(1, int(round(self.seconds[index] * self.rates[index], 3)))

    def read(self, index: int, start: int, stop: int) -> Audio:
        path, wanted = self.clips[index].path, min(stop, self.samples(index)) - start
        rate_out = self.rates[index]
        try:
            with soundfile.SoundFile(path) as file:
                rate = file.samplerate
                # Begin where samples of both rates coincide, so that nothing is shifted.
                common = math.gcd(rate, rate_out)
                units = max(0, start - MARGIN) // (rate_out // common)
                first, skip = units * (rate // common), start - units * (rate_out // common)
                file.seek(first)
                count = -(-(start + wanted) * rate // rate_out) - first + MARGIN
                audio = file.read(count, dtype="float32", always_2d=True).mean(1)
        except (soundfile.LibsndfileError, OSError) as error:
            raise ManifestError(f"{path}: cannot be decoded ({error})") from error
        stretch = to_rate(audio, rate, rate_out)[skip : skip + wanted]
        return np.pad(stretch, (0, wanted - len(stretch)))


def open_pool(
    corpus: Corpus,
    store: Store = "auto",
    rate: int | None = RATE_HZ,
    seconds: float = MAX_SECONDS,
    cache: Path | None = None,
) -> Pool:
    """Open the clips of a corpus.

    Args:
        corpus: the clips.
        store: "memory", "disk", or "auto": memory if they fit into 4 GiB.
        rate: sample rate in Hz to read them at; None for each clip's own.
        seconds: length of a clip in memory; the rest is cut.
        cache: file of decoded clips, which saves the next run from decoding them.
    """
    disk = DiskPool(corpus, rate)
    held = sum(min(length, seconds) * rate for length, rate in zip(corpus.seconds, disk.rates, strict=True)) * 2
    fits = held <= MEMORY_LIMIT_BYTES
    return MemoryPool(corpus, 2, rate, seconds, cache) if store == "memory" or (store == "auto" and fits) else disk


@settings
class Draw:
    """Settings for drawing training examples. Lengths in seconds, gains in dB."""

    seconds: Annotated[float, Field(ge=0.05, le=60)] = 5.0
    label_power: NonNegativeFloat = 0.7  # a label of n clips is drawn as often as min(n, cap) ** power
    label_cap: PositiveInt = 80
    hard: Share = 0.0  # share of the interferers drawn from the labels nearest to the target's …
    hard_labels: PositiveInt = 8  # … and the number of these labels
    snr_std: NonNegativeFloat = 3.0
    snr_limit: NonNegativeFloat = 8.0
    speed: Annotated[float, Field(ge=0, le=0.5)] = 0.15  # speed is perturbed by up to this fraction …
    speed_share: Share = 0.4  # … in this share of the clips


class Pairs(NamedTuple):
    """Holds targets and interferers, float32 `[rows, samples]`, to be mixed at `snr_db` (`[rows]`).

    `clips` are their indices in the pool, int64 `[rows, 2]`.
    """

    targets: Tensor
    interferers: Tensor
    snr_db: Tensor
    clips: Tensor


class Sampler:
    """Draws pairs of clips of different sounds, cut or extended to one length.

    Args:
        pool: the clips.
        draw: how they are drawn.
        seed: of all that is drawn.
        among: indices of the clips to draw from; None for all.
        near: for each label, the others from the most to the least alike; needed if `draw.hard` is not 0.
    """

    def __init__(
        self,
        pool: Pool,
        draw: Draw,
        seed: int,
        among: Sequence[int] | None = None,
        near: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.pool, self.draw, self.seed, self.near = pool, draw, seed, near or {}
        self.length = int(draw.seconds * RATE_HZ)
        allowed = set(range(len(pool.clips)) if among is None else among)
        groups = {label: [i for i in members if i in allowed] for label, members in pool.by_label.items()}
        self.groups = {label: members for label, members in groups.items() if members}
        self.labels = list(self.groups)
        weight = np.array([min(len(g), draw.label_cap) for g in self.groups.values()]) ** draw.label_power
        self.weight = weight / weight.sum()
        self.sounds = {label: set(pool.clips[members[0]].captions) for label, members in self.groups.items()}

    def clip(self, rng: np.random.Generator, avoid: Sequence[str] = ()) -> int | None:
        """Draw the index of a clip whose label is none of `avoid`; None if there is none.

        Labels that share a caption count as one sound.
        """
        for _ in range(TRIES):
            label = self.labels[rng.choice(len(self.labels), p=self.weight)]
            if self.differs(label, avoid):
                return int(rng.choice(self.groups[label]))
        rest = [label for label in self.labels if self.differs(label, avoid)]
        return int(rng.choice(self.groups[rest[rng.integers(len(rest))]])) if rest else None

    def differs(self, label: str, others: Sequence[str]) -> bool:
        """Return True if `label` shares no caption with any of `others`."""
        return all(label != other and not self.sounds[label] & self.sounds[other] for other in others)

    def interferer(self, rng: np.random.Generator, label: str) -> int:
        """Draw the index of a clip of another sound, to mix with one of `label`; `draw.hard` of them are similar."""
        if self.draw.hard and rng.random() < self.draw.hard:
            alike = (other for other in self.near.get(label, ()) if other in self.groups)
            near = list(islice((other for other in alike if self.differs(other, [label])), self.draw.hard_labels))
            if near:
                return int(rng.choice(self.groups[near[rng.integers(len(near))]]))
        other = self.clip(rng, avoid=[label])
        if other is None:
            raise ManifestError(f"no clip sounds unlike {label!r}: every other label shares a caption with it")
        return other

    def place(self, index: int, rng: np.random.Generator) -> Audio:
        """Fill a window with a clip: with a stretch of a long one, or with a short one once or several times."""
        available, n, speed = self.pool.samples(index), self.length, 1.0
        if rng.random() < self.draw.speed_share:
            speed += rng.uniform(-self.draw.speed, self.draw.speed)
        stretch = math.ceil(n * speed) + 1  # samples of the clip that fill the window
        if available > stretch:
            starts = rng.integers(0, available - stretch + 1, 2).tolist()
            stretches = (self.pool.read(index, s, s + stretch) for s in starts)
            audio = max(stretches, key=lambda audio: float(np.square(audio[::8]).sum()))
        else:
            audio = self.pool.read(index, 0, available)
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

    def pairs(self, step: int, rows: range) -> Pairs:
        """Draw the given rows of a step's batch."""
        audio = np.empty((2, len(rows), self.length), np.float32)
        drawn = []
        for at, row in enumerate(rows):
            rng = np.random.default_rng((self.seed, step, row))
            a = self.clip(rng)
            assert a is not None, "no label is avoided"
            b = self.interferer(rng, self.pool.clips[a].label)
            snr = float(np.clip(rng.normal(0, self.draw.snr_std), -self.draw.snr_limit, self.draw.snr_limit))
            audio[0, at], audio[1, at] = self.place(a, rng), self.place(b, rng)
            drawn.append((snr, a, b))
        snr_db, *clips = zip(*drawn, strict=True)
        targets, interferers = torch.from_numpy(audio)
        return Pairs(targets, interferers, torch.tensor(snr_db), torch.tensor(clips).T)


def ahead(make: Callable[[int], Made], steps: range, workers: int = 1) -> Iterator[Made]:
    """Yield `make(step)` for each step in order, while `workers` threads make the next ones.

    At most `workers` + 1 results wait. Decoding and resampling release the GIL, so threads are enough.
    """
    with ThreadPoolExecutor(workers) as pool:
        coming: list[Future[Made]] = []
        try:
            for step in steps:
                while len(coming) <= workers and step + len(coming) < steps.stop:
                    coming.append(pool.submit(make, step + len(coming)))
                yield coming.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
