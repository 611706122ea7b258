"""Mixtures for the training of a TUSS, made on the fly from clips that carry the name of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.audio import Audio, to_rate
from clapsep_cli.errors import ManifestError
from clapsep_cli.prompts import COUNTS, PROMPTS, STEMS, draw, drawable, indices

RATE_HZ = 48_000
TRIES = 10  # stretches of a clip that are tried before the loudest of them is taken
AUDIBLE = 1e-3  # root mean square from which on a stretch is not silent (−60 dB)
# Which prompts' clips a background may be summed from, where it is not a recording of its own.
INGREDIENTS = {"sfxbg": ("sfx",), "musicbg": STEMS}
QUIETEST_DB = {prompt: -20.0 if prompt in ("sfx", "sfxbg", "musicbg") else -10.0 for prompt in PROMPTS}


@dataclass(frozen=True)
class PromptClip:
    """One mono recording of what `prompt` names: float32 or int16 (full scale ±1 or ±32768) at `rate` Hz."""

    prompt: str
    audio: NDArray[np.float32] | NDArray[np.int16]
    rate: int


@dataclass(frozen=True)
class PromptMixing:
    """How mixtures are made, by default as for the released models."""

    counts: tuple[int, ...] = COUNTS  # of prompts, equally often
    recorded: float = 0.75  # share of backgrounds that are recordings, the others being sums of …
    summed: Mapping[int, float] = field(default_factory=lambda: {1: 0.1, 2: 0.4, 3: 0.4, 4: 0.1})  # … so many clips


class PromptMixer:
    """Draws batches of mixtures of `samples` at 48 kHz; what it draws for a step depends only on the seed and the step.

    Raises `ManifestError` for clips that are silent or of an unknown prompt, and where there are too few that may be
    mixed with each other.
    """

    def __init__(
        self, clips: Sequence[PromptClip], samples: int, seed: int, mixing: PromptMixing | None = None
    ) -> None:
        self.clips, self.samples, self.seed, self.mixing = clips, samples, seed, mixing or PromptMixing()
        self.by_prompt: dict[str, list[int]] = {prompt: [] for prompt in PROMPTS}
        for index, clip in enumerate(clips):
            if clip.prompt not in self.by_prompt:
                raise ManifestError(f"clip {index + 1}: no prompt {clip.prompt!r}; there are: {', '.join(PROMPTS)}")
            if not np.any(clip.audio):
                raise ManifestError(f"clip {index + 1}, of {clip.prompt}: is silent")
            self.by_prompt[clip.prompt].append(index)
        self.supply = {prompt: len(members) or bool(self._pools(prompt)) for prompt, members in self.by_prompt.items()}
        self.counts = [count for count in self.mixing.counts if drawable(count, self.supply)]
        if not self.counts:
            present = ", ".join(prompt for prompt, number in self.supply.items() if number) or "none"
            raise ManifestError(f"no {min(self.mixing.counts)} of the clips may be mixed with each other ({present})")

    def batch(self, step: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Sources, float32 `[size, prompts, samples]`, to be added up; and their prompts, indices into `PROMPTS`,
        `[size, prompts]`. All mixtures of a batch have the same number of prompts."""
        rng = np.random.default_rng((self.seed, step))
        count = int(rng.choice(self.counts))
        names = [draw(rng, count, self.supply) for _ in range(size)]
        return np.stack([self._sources(rng, row) for row in names]), np.array([indices(row) for row in names])

    def _sources(self, rng: np.random.Generator, names: Sequence[str]) -> NDArray[np.float32]:
        chosen: list[list[int]] = []
        for name in names:
            chosen.append(self._choose(rng, name, {index for others in chosen for index in others}))
        rate = min(self.clips[index].rate for members in chosen for index in members)
        sources = []
        for name, members in zip(names, chosen, strict=True):
            source = _levelled(np.sum([_levelled(self._stretch(rng, self.clips[i], rate)) for i in members], axis=0))
            sources.append(source * 10 ** (rng.uniform(QUIETEST_DB[name], 0) / 20))
        return np.stack(sources).astype(np.float32)

    def _choose(self, rng: np.random.Generator, name: str, used: set[int]) -> list[int]:
        """The clips of a source: a recording not yet in the mixture, or several to be summed."""
        recordings = [index for index in self.by_prompt[name] if index not in used]
        pools = self._pools(name)
        if recordings and (not pools or rng.random() < self.mixing.recorded):
            return [int(rng.choice(recordings))]
        many = int(rng.choice(list(self.mixing.summed), p=list(self.mixing.summed.values())))
        if len(INGREDIENTS[name]) == 1:
            return [int(i) for i in rng.choice(pools[0], min(many, len(pools[0])), replace=False)]
        different = rng.choice(len(pools), min(many, len(pools)), replace=False)
        return [int(rng.choice(pools[i])) for i in different]

    def _pools(self, name: str) -> list[list[int]]:
        return [self.by_prompt[prompt] for prompt in INGREDIENTS.get(name, ()) if self.by_prompt[prompt]]

    def _stretch(self, rng: np.random.Generator, clip: PromptClip, rate: int) -> Audio:
        """A random stretch of a clip that is not silent, or all of a short one somewhere; band-limited to `rate`."""
        length = math.ceil(self.samples * clip.rate / RATE_HZ)
        start = _audible(rng, clip.audio, length)
        stretch = _full_scale(clip.audio[start : start + length])
        at = int(rng.integers(0, length - len(stretch) + 1))
        stretch = np.pad(stretch, (at, length - len(stretch) - at))
        limited = to_rate(to_rate(stretch, clip.rate, rate), rate, RATE_HZ)[: self.samples]
        return np.pad(limited, (0, self.samples - len(limited)))


def _audible(rng: np.random.Generator, audio: NDArray[np.float32] | NDArray[np.int16], length: int) -> int:
    """Where a random stretch of `length` begins that is not silent; at the peak of what is silent nearly throughout."""
    last = max(0, len(audio) - length)
    for start in rng.integers(0, last + 1, TRIES):
        if np.sqrt(np.square(_full_scale(audio[start : start + length])).mean()) >= AUDIBLE:
            return int(start)
    return min(int(np.abs(_full_scale(audio)).argmax()), last)


def _full_scale(audio: NDArray[np.float32] | NDArray[np.int16]) -> Audio:
    return np.asarray(audio, np.float32) / np.float32(32_768 if audio.dtype == np.int16 else 1)


def _levelled(audio: Audio) -> Audio:
    """At a root mean square of 1."""
    return np.asarray(audio / np.sqrt(np.square(audio, dtype=np.float64).mean()), np.float32)
