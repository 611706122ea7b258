"""Mixtures for the training of a TUSS, made on the fly from clips whose labels are the names of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from clapsep_cli.audio.samples import Audio, to_rate
from clapsep_cli.errors import ManifestError
from clapsep_cli.models.prompts import COUNTS, PROMPTS, STEMS, draw, drawable, indices
from clapsep_cli.training.loop.pool import Pool
from clapsep_cli.training.loop.settings import Share, Shares, settings

RATE_HZ = 48_000
TRIES = 10  # stretches of a clip that are tried before the loudest of it is looked for
AUDIBLE = 1e-3  # root mean square from which on a stretch is not silent (−60 dB)
SCANNED = 2**18  # samples of a clip that are looked through at a time
# Which prompts' clips a background may be summed from, where it is not a recording of its own.
INGREDIENTS = {"sfxbg": ("sfx",), "musicbg": STEMS}
QUIETEST_DB = {prompt: -20.0 if prompt in ("sfx", "sfxbg", "musicbg") else -10.0 for prompt in PROMPTS}


@settings
class PromptMixing:
    """How mixtures are made, by default as for the released models."""

    counts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = COUNTS  # of prompts, equally often
    recorded: Share = 0.75  # share of backgrounds that are recordings; the others are summed …
    summed: Shares = (0.1, 0.4, 0.4, 0.1)  # … from one clip, from two, and so on, in these shares


class PromptMixer:
    """Draws mixtures of `samples` at 48 kHz from those clips of a pool, each at its own rate, that are `among`.

    What it draws depends only on the seed, the step and the row. `vocabulary`: the prompts that there are, some of
    `PROMPTS`. Raises `ManifestError` where there are too few clips that may be mixed with each other.
    """

    def __init__(
        self,
        pool: Pool,
        among: Sequence[int],
        samples: int,
        seed: int,
        mixing: PromptMixing,
        vocabulary: Sequence[str] = PROMPTS,
    ) -> None:
        self.pool, self.samples, self.seed, self.mixing, self.vocabulary = pool, samples, seed, mixing, vocabulary
        self.by_prompt: dict[str, list[int]] = {prompt: [] for prompt in vocabulary}
        for index in among:
            self.by_prompt[pool.clips[index].label].append(index)
        self.supply = {prompt: len(members) or bool(self._pools(prompt)) for prompt, members in self.by_prompt.items()}
        self.counts = [count for count in mixing.counts if drawable(count, self.supply)]
        if not self.counts:
            present = ", ".join(prompt for prompt, number in self.supply.items() if number) or "none"
            raise ManifestError(f"no {min(mixing.counts)} of the clips may be mixed with each other ({present})")

    def batch(self, step: int, rows: range) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The given rows of a step's batch: sources, float32 `[rows, prompts, samples]`, to be added up; and their
        prompts, indices into the vocabulary, `[rows, prompts]`. All mixtures of a step have equally many prompts."""
        count = int(np.random.default_rng((self.seed, step, 0)).choice(self.counts))
        sources, prompts = [], []
        for row in rows:
            rng = np.random.default_rng((self.seed, step, 1 + row))
            names = draw(rng, count, self.supply)
            sources.append(self._sources(rng, names))
            prompts.append(indices(names, self.vocabulary))
        return np.stack(sources), np.array(prompts)

    def _sources(self, rng: np.random.Generator, names: Sequence[str]) -> Audio:
        chosen: list[list[int]] = []
        for name in names:
            chosen.append(self._choose(rng, name, {index for others in chosen for index in others}))
        rate = min(self.pool.rates[index] for members in chosen for index in members)
        sources = []
        for name, members in zip(names, chosen, strict=True):
            source = _levelled(np.sum([_levelled(self._stretch(rng, index, rate)) for index in members], axis=0))
            sources.append(source * 10 ** (rng.uniform(QUIETEST_DB[name], 0) / 20))
        return np.stack(sources).astype(np.float32)

    def _choose(self, rng: np.random.Generator, name: str, used: set[int]) -> list[int]:
        """The clips of a source: a recording not yet in the mixture, or several to be summed."""
        recordings = [index for index in self.by_prompt[name] if index not in used]
        pools = self._pools(name)
        if recordings and (not pools or rng.random() < self.mixing.recorded):
            return [recordings[rng.integers(len(recordings))]]
        many = 1 + int(rng.choice(len(self.mixing.summed), p=self.mixing.summed))
        if len(INGREDIENTS[name]) == 1:
            return [int(i) for i in rng.choice(pools[0], min(many, len(pools[0])), replace=False)]
        different = rng.choice(len(pools), min(many, len(pools)), replace=False)
        return [pools[i][rng.integers(len(pools[i]))] for i in different]

    def _pools(self, name: str) -> list[list[int]]:
        pools = (self.by_prompt.get(prompt, []) for prompt in INGREDIENTS.get(name, ()))
        return [members for members in pools if members]

    def _stretch(self, rng: np.random.Generator, index: int, rate: int) -> Audio:
        """A random stretch of a clip that is not silent, or all of a short one somewhere; band-limited to `rate`."""
        own = self.pool.rates[index]
        length = math.ceil(self.samples * own / RATE_HZ)
        stretch = _audible(rng, self.pool, index, length)
        at = int(rng.integers(0, length - len(stretch) + 1))
        stretch = np.pad(stretch, (at, length - len(stretch) - at))
        limited = to_rate(to_rate(stretch, own, rate), rate, RATE_HZ)[: self.samples]
        return np.pad(limited, (0, self.samples - len(limited)))


def check_audible(pool: Pool) -> None:
    """Raise `ManifestError` that names the clips, if there are any, that are silent throughout."""
    with ThreadPoolExecutor(8) as threads:
        audible = threads.map(lambda index: any(peak > 0 for _, peak in _peaks(pool, index)), range(len(pool.clips)))
        silent = [str(clip.path) for clip, heard in zip(pool.clips, audible, strict=True) if not heard]
    if silent:
        raise ManifestError("silent throughout: " + ", ".join(silent))


def _audible(rng: np.random.Generator, pool: Pool, index: int, length: int) -> Audio:
    """A random stretch of up to `length` that is not silent; around the peak of a clip that is so nearly throughout."""
    last = max(0, pool.samples(index) - length)
    for start in rng.integers(0, last + 1, TRIES).tolist():
        stretch = pool.read(index, start, start + length)
        if np.sqrt(np.square(stretch).mean()) >= AUDIBLE:
            return stretch
    peak, _ = max(_peaks(pool, index), key=lambda found: found[1])
    start = min(max(0, peak - length // 2), last)
    return pool.read(index, start, start + length)


def _peaks(pool: Pool, index: int) -> Iterator[tuple[int, float]]:
    """Where the peak of each piece of a clip lies, and how high it is, piece by piece."""
    for start in range(0, pool.samples(index), SCANNED):
        piece = np.abs(pool.read(index, start, start + SCANNED))
        at = int(piece.argmax())
        yield start + at, float(piece[at])


def _levelled(audio: Audio) -> Audio:
    """At a root mean square of 1; silence stays silence."""
    return np.asarray(audio / (np.sqrt(np.square(audio, dtype=np.float64).mean()) or 1.0), np.float32)
