"""What is drawn for each step of training. It depends on the seed, the step and the row alone, so that a resumed run,
and one on another number of machines, draws the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from clapsep_cli.audio.samples import Audio
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import ManifestError
from clapsep_cli.training.loop.pool import Pool
from clapsep_cli.training.loop.settings import Share, settings

TRIES = 50  # at drawing a label, before all of them are looked through

Made = TypeVar("Made")


@settings
class Draw:
    """How training examples are drawn. Lengths in seconds, gains in dB."""

    seconds: Annotated[float, Field(ge=0.05, le=60)] = 5.0
    label_power: NonNegativeFloat = 0.7  # a label of n clips is drawn as often as min(n, cap) ** power
    label_cap: PositiveInt = 80
    hard: Share = 0.0  # share of the interferers that are drawn among the labels nearest to the target's …
    hard_labels: PositiveInt = 8  # … which are so many
    snr_std: NonNegativeFloat = 3.0
    snr_limit: NonNegativeFloat = 8.0
    speed: Annotated[float, Field(ge=0, le=0.5)] = 0.15  # speed is perturbed by up to this fraction …
    speed_share: Share = 0.4  # … in this share of the clips


class Pairs(NamedTuple):
    """Targets and interferers, float32 `[rows, samples]`, to be mixed at `snr_db` (`[rows]`), and their clips' indices,
    int64 `[rows, 2]`."""

    targets: Tensor
    interferers: Tensor
    snr_db: Tensor
    clips: Tensor


class Sampler:
    """Draws pairs of clips of different sounds, cut or laid out to one length.

    `near`: for a label, others from the most to the least alike; needed where `draw.hard` is not 0.
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
        """The index of a clip whose label sounds like none of `avoid` (labels that share a caption are one sound), or
        None where there is no other."""
        for _ in range(TRIES):
            label = self.labels[rng.choice(len(self.labels), p=self.weight)]
            if self.differs(label, avoid):
                return int(rng.choice(self.groups[label]))
        rest = [label for label in self.labels if self.differs(label, avoid)]
        return int(rng.choice(self.groups[rest[rng.integers(len(rest))]])) if rest else None

    def differs(self, label: str, others: Sequence[str]) -> bool:
        """Whether no caption of `label` could mean one of `others`, too."""
        return all(label != other and not self.sounds[label] & self.sounds[other] for other in others)

    def interferer(self, rng: np.random.Generator, label: str) -> int:
        """The index of a clip to go with one of `label`: of any other sound, or of one that is easily taken for it."""
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
        """A clip as it might occur in a recording: a stretch of a long one, a short one once or several times."""
        available, n, speed = self.pool.samples(index), self.length, 1.0
        if rng.random() < self.draw.speed_share:
            speed += rng.uniform(-self.draw.speed, self.draw.speed)
        stretch = math.ceil(n * speed) + 1  # samples of the clip that fill the window
        if available > stretch:
            starts = rng.integers(0, available - stretch + 1, 2).tolist()
            audio = max((self.pool.read(index, s, s + stretch) for s in starts), key=_energy)
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
        """The given rows of a step's batch."""
        audio = np.empty((2, len(rows), self.length), np.float32)
        drawn = []
        for at, row in enumerate(rows):
            rng = np.random.default_rng((self.seed, step, row))
            a = self.clip(rng)
            assert a is not None  # nothing was to be avoided
            b = self.interferer(rng, self.pool.clips[a].label)
            snr = float(np.clip(rng.normal(0, self.draw.snr_std), -self.draw.snr_limit, self.draw.snr_limit))
            audio[0, at], audio[1, at] = self.place(a, rng), self.place(b, rng)
            drawn.append((snr, a, b))
        snr_db, *clips = zip(*drawn, strict=True)
        targets, interferers = torch.from_numpy(audio)
        return Pairs(targets, interferers, torch.tensor(snr_db), torch.tensor(clips).T)


def _energy(audio: Audio) -> float:
    return float(np.square(audio[::8]).sum())


def ahead(make: Callable[[int], Made], steps: range, workers: int = 1) -> Iterator[Made]:
    """Yield `make(step)` for each step in order, while `workers` threads make the next ones.

    At most `workers` + 1 are kept. Decoding and resampling leave the interpreter free, so threads do for workers.
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
