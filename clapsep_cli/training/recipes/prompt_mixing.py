"""Makes mixtures to train and validate a TUSS: drawn from clips, or read from lists with their stems."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from clapsep_cli.audio.samples import Audio, to_rate
from clapsep_cli.data import fit, read_clip
from clapsep_cli.errors import ManifestError, QueryError
from clapsep_cli.evaluation.prompted import read_parts
from clapsep_cli.models.prompts import COUNTS, PROMPTS, STEMS, draw, drawable, indices, odds_of
from clapsep_cli.training.loop.sampling import Pool
from clapsep_cli.training.loop.settings import Share, Shares, settings

RATE_HZ = 48_000
TRIES = 10  # random stretches of a clip that are tried before its loudest one is searched
AUDIBLE = 1e-3  # least root mean square of a stretch that is not silent (−60 dB)
SCANNED = 2**18  # samples of a clip that are searched at a time
# Prompts whose clips may be summed to a background that is not a recording.
INGREDIENTS = {"sfxbg": ("sfx",), "musicbg": STEMS}
QUIET, QUIETEST_DB, QUIETEST_OTHERS_DB = ("sfx", "sfxbg", "musicbg"), -20.0, -10.0  # of a source; the loudest is 0 dB


@settings
class PromptMixing:
    """Settings of mixtures, by default as for the released models.

    `never`: pairs of prompts that are never mixed, beside those of the released models. A new prompt is mixed with all.
    """

    counts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = COUNTS  # of prompts, equally often
    recorded: Share = 0.75  # share of backgrounds that are recordings; the others are summed …
    summed: Shares = (0.1, 0.4, 0.4, 0.1)  # … from one clip, from two, and so on, in these shares
    never: tuple[tuple[str, str], ...] = ()


class PromptMixer:
    """Draws mixtures of clips. What it draws depends only on the seed, the step and the row.

    Args:
        pool: the clips, each at its own rate.
        among: indices of the clips to draw from.
        samples: length of a mixture at 48 kHz.
        seed: of all that is drawn.
        mixing: how mixtures are made.
        vocabulary: the model's prompts.

    Raises:
        ManifestError: too few clips may be mixed with each other.
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
        self.odds = odds_of(vocabulary, mixing.never)
        self.counts = [count for count in mixing.counts if drawable(count, self.supply, odds=self.odds)]
        if not self.counts:
            present = ", ".join(prompt for prompt, number in self.supply.items() if number) or "none"
            raise ManifestError(f"no {min(mixing.counts)} of the clips may be mixed with each other ({present})")

    def batch(self, step: int, rows: range) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Draw the given rows of a step's batch. All mixtures of a step have equally many prompts.

        Returns:
            The sources to be summed, float32 `[rows, prompts, samples]`, and their prompts, indices into the
            vocabulary, int64 `[rows, prompts]`.
        """
        count = int(np.random.default_rng((self.seed, step, 0)).choice(self.counts))
        sources, prompts = [], []
        for row in rows:
            rng = np.random.default_rng((self.seed, step, 1 + row))
            names = draw(rng, count, self.supply, self.odds)
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
            several = [_levelled(self._stretch(rng, index, rate)) for index in members]
            if len(several) > 1:  # ingredients have levels of their own
                labels = [self.pool.clips[index].label for index in members]
                several = [one * _gain(rng, label) for one, label in zip(several, labels, strict=True)]
            source = _levelled(np.sum(several, axis=0))
            sources.append(source * _gain(rng, name))
        return np.stack(sources).astype(np.float32)

    def _choose(self, rng: np.random.Generator, name: str, used: set[int]) -> list[int]:
        """Choose the clips of a source: a recording not yet in the mixture, or several to be summed."""
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
        """Read an audible stretch of a clip, or all of a short one at a random place; band-limited to `rate`."""
        own = self.pool.rates[index]
        length = math.ceil(self.samples * own / RATE_HZ)
        stretch = _audible(rng, self.pool, index, length)
        at = int(rng.integers(0, length - len(stretch) + 1))
        stretch = np.pad(stretch, (at, length - len(stretch) - at))
        limited = to_rate(to_rate(stretch, own, rate), rate, RATE_HZ)[: self.samples]
        return np.pad(limited, (0, self.samples - len(limited)))


class ListedMixtures:
    """Reads mixtures and their stems from a list `mixture,prompt,reference`: the middle of each.

    Args:
        path: the list; files are relative to its folder.
        samples: length of a mixture at 48 kHz.
        vocabulary: the model's prompts.

    Raises:
        ManifestError: for a list that cannot be used, or names a prompt that is not in the vocabulary.
    """

    def __init__(self, path: Path, samples: int, vocabulary: Sequence[str]) -> None:
        self.samples, self.parts = samples, read_parts(path, path.parent)
        try:
            self.prompts = [np.array([indices(parts.prompts, vocabulary)]) for parts in self.parts]
        except QueryError as error:
            raise ManifestError(f"{path}: {error}") from error

    def batch(self, step: int, rows: range) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """Read the mixture of a step: sources and prompts as `PromptMixer.batch`, and the mixture `[1, samples]`."""
        parts = self.parts[step]
        mixture, *sources = (self._middle(path) for path in (parts.mixture, *parts.references))
        return np.stack(sources)[None], self.prompts[step], mixture[None]

    def _middle(self, path: Path) -> Audio:
        audio = read_clip(path, RATE_HZ)
        return fit(audio[max(0, (len(audio) - self.samples) // 2) :], self.samples)


def check_audible(pool: Pool) -> None:
    """Raise `ManifestError` that names all silent clips."""
    with ThreadPoolExecutor(8) as threads:
        audible = threads.map(lambda index: any(peak > 0 for _, peak in _peaks(pool, index)), range(len(pool.clips)))
        silent = [str(clip.path) for clip, heard in zip(pool.clips, audible, strict=True) if not heard]
    if silent:
        raise ManifestError("silent throughout: " + ", ".join(silent))


def _audible(rng: np.random.Generator, pool: Pool, index: int, length: int) -> Audio:
    """Read a random audible stretch of up to `length` samples; in a nearly silent clip, the one around its peak."""
    last = max(0, pool.samples(index) - length)
    for start in rng.integers(0, last + 1, TRIES).tolist():
        stretch = pool.read(index, start, start + length)
        if np.sqrt(np.square(stretch).mean()) >= AUDIBLE:
            return stretch
    peak, _ = max(_peaks(pool, index), key=lambda found: found[1])
    start = min(max(0, peak - length // 2), last)
    return pool.read(index, start, start + length)


def _peaks(pool: Pool, index: int) -> Iterator[tuple[int, float]]:
    """Yield the position and height of the peak of each piece of a clip."""
    for start in range(0, pool.samples(index), SCANNED):
        piece = np.abs(pool.read(index, start, start + SCANNED))
        at = int(piece.argmax())
        yield start + at, float(piece[at])


def _gain(rng: np.random.Generator, prompt: str) -> float:
    """Draw the gain of a source, evenly in dB."""
    return float(10 ** (rng.uniform(QUIETEST_DB if prompt in QUIET else QUIETEST_OTHERS_DB, 0) / 20))


def _levelled(audio: Audio) -> Audio:
    """Scale to a root mean square of 1; silence stays silence."""
    return np.asarray(audio / (np.sqrt(np.square(audio, dtype=np.float64).mean()) or 1.0), np.float32)
