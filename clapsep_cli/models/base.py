"""Defines what all separators, text encoders and audio encoders have in common.

What a separator is asked for, `wanted`, is made by its family (`families.base.Family.ask`) and opaque to the pipeline.
For CLAPSep and mini these are `Conditions`, in an embedding space that separator, text encoder and audio encoder share.
The three are loaded apart, so that a text query never reads the audio encoder and the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.audio.samples import PEAK

# Targets of a window that are masked together: more make tensors so large that the system maps their memory anew for
# every operation (40 targets of mini on one core: 4.3 s, 2.9 s by fours).
TARGETS_AT_ONCE = 4
TEXTS_AT_ONCE = 32

Wanted = TypeVar("Wanted")


def go_on() -> None:
    """Never stop: the default of a `check`, which raises where the user wants to stop."""


class Conditions(NamedTuple):
    """Conditions of the targets of a `MaskSeparator`, and which of the targets become stems."""

    targets: Tensor  # float32 [targets, 2 · dim]
    kept: tuple[int, ...]  # positions among the targets


class Separator(nn.Module, ABC, Generic[Wanted]):
    """Separates windows of `window` samples at `rate` Hz; `Wanted` is the type of what it is asked for."""

    rate: int
    window: int

    @abstractmethod
    def lower(self, dtype: torch.dtype) -> None:
        """Compute from now on in `dtype` wherever that makes inference faster; what comes in and out is float32."""

    def fuse(self) -> None:
        """Fuse layers, for inference alone: it then computes the same faster, and can no longer be trained or saved.

        Here: fuse none.
        """

    @abstractmethod
    def infer(self, windows: Tensor, wanted: Wanted, check: Callable[[], None] = go_on) -> Tensor:
        """Separate windows.

        Args:
            windows: float32 `[batch, samples]`, `window` samples unless the family's stream makes shorter ones.
            wanted: what to separate, from the family's `ask`.
            check: called between parts of the work, where these are many; what it raises ends it.

        Returns:
            Masks or stems, `[batch, …]`, of which the family's stream makes stems of a recording.
        """


class ConditionedSeparator(Separator[Wanted]):
    """Extracts one target at a time from whole mixtures, given a condition: what evaluation and training need."""

    @abstractmethod
    def estimate(self, mixtures: Tensor, conditions: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the targets in mixtures under each of several conditions.

        Args:
            mixtures: float32 `[batch, samples]`, at `rate` Hz; of `window` samples, unless a separator takes others.
            conditions: float32 `[batch or 1, dim]` each, from the family's `embedder`.

        Yields:
            The targets, float32 `[batch, samples]`.
        """


class MaskSeparator(ConditionedSeparator[Conditions]):
    """Masks the STFT of a mixture (1024-point periodic Hann, hop 320, at 32 kHz), given a condition.

    `window` is a multiple of the hop. `encode` is separate from `mask` because several targets of one mixture share it.
    `turns`: masks are complex, and turn phases.
    """

    turns = False

    @property
    def spread(self) -> Tensor | None:
        """The share of each band of a mask in each bin, float32 `[bands, 513]`; None where masks are of bins."""
        return None

    def spectral(self, mask: Tensor) -> Tensor:
        """Spread a mask over the 513 bins."""
        return mask if self.spread is None else mask @ self.spread

    @abstractmethod
    def encode(self, mixture: Tensor) -> Any:
        """Compute the features of mixtures, float32 `[batch, window]` at `rate` Hz, that no query changes."""

    @abstractmethod
    def mask(self, features: Any, condition: Tensor) -> Tensor:
        """Compute a mask for each item.

        Args:
            features: from `encode`.
            condition: float32 `[batch, 2 · dim]`, from `condition()`. Where `features` or `condition` is of one item,
                it serves all of the other.

        Returns:
            Masks in [0, 1], float32 `[batch, window // 320 + 1 frames, 513 bins]`, or fewer bands where there is a
            `spread`; or complex64, of such moduli.
        """

    def estimate(self, mixtures: Tensor, conditions: Iterable[Tensor]) -> Iterator[Tensor]:
        """Mask `mixtures`, which are encoded once, under each of `conditions`."""
        features, spectrum = self.encode(mixtures), dsp.spectrum(mixtures)
        for wanted in conditions:
            yield dsp.masked(spectrum, self.spectral(self.mask(features, wanted)), mixtures.shape[1])

    def infer(self, windows: Tensor, wanted: Conditions, check: Callable[[], None] = go_on) -> Tensor:
        """Return masks of the targets that are kept, `[batch, stems, frames, 513 bins]`, or of bands as of `mask`.

        The encoder runs once a window; a window that is too short is heard with silence behind it.

        Targets share the mixture: where the masks of all of them, kept or not, add up to more than 1, they are scaled
        to 1, so that what they leave is never negative; neither is it in bins, which are weighted means of bands.
        """
        frames = windows.shape[1] // dsp.HOP + 1
        if windows.shape[1] < self.window:
            windows = F.pad(windows, (0, self.window - windows.shape[1]))
        if len(wanted.targets) == 1:
            return self.mask(self.encode(windows), wanted.targets)[:, None, :frames]
        shared = (self._share(self.encode(window[None]), wanted, check)[:, :frames] for window in windows)
        return torch.stack(list(shared))

    def _share(self, features: Any, wanted: Conditions, check: Callable[[], None]) -> Tensor:
        kept: dict[int, Tensor] = {}
        total: Tensor | None = None
        for first in range(0, len(wanted.targets), TARGETS_AT_ONCE):
            check()
            masks = self.mask(features, wanted.targets[first : first + TARGETS_AT_ONCE])
            sizes = (masks.abs() if self.turns else masks).sum(0)
            total = sizes if total is None else total.add_(sizes)
            kept |= {at: mask for at, mask in enumerate(masks, first) if at in wanted.kept}
        assert total is not None, "there is a target"
        return torch.stack([kept[at] for at in wanted.kept]).div_(total.clamp_(min=1))


class TextEncoder(nn.Module, ABC):
    """Embeds texts, in the space in which an `AudioEncoder` embeds recordings."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text: float32 `[len(texts), dim]`, rows of length 1."""

    def embed_many(self, texts: Sequence[str]) -> Tensor:
        """Embed one or more texts as `embed` does, some at a time, so that memory does not grow with their number."""
        batches = (texts[first : first + TEXTS_AT_ONCE] for first in range(0, len(texts), TEXTS_AT_ONCE))
        return torch.cat([self.embed(batch) for batch in batches])

    def unknown(self, text: str) -> dict[str, str | None]:
        """Return the words of a text that are ignored, each with a known one of similar spelling. Here: none."""
        return {}


class AudioEncoder(nn.Module, ABC):
    """Embeds recordings, in the space in which a `TextEncoder` embeds texts; `rate` is their sample rate in Hz."""

    rate: int

    @abstractmethod
    def embed(self, audio: Tensor) -> Tensor:
        """Embed one mono recording, float32 `[samples]` of any length ≥ 1: float32 `[dim]`, of length 1.

        All of a long recording counts: the result never depends on a random crop.
        """

    def moments(self, audio: Tensor) -> Tensor:
        """Embed the moments of a recording, as fine as the encoder hears: float32 `[moments, dim]`. Here: the whole."""
        return self.embed(audio)[None]


def full_scale_gain(peak: Tensor) -> Tensor:
    """Return the gain by which a signal of that peak is scaled before a model hears it: 0.9/peak above 1, else 1.

    The released code does so, the paper does not mention it.
    """
    return torch.where(peak > 1, PEAK / peak.clamp(min=1), 1.0)


def condition(positive: Tensor | None, negative: Tensor | None, *, unit: bool = True) -> Tensor:
    """Join both sides of a query into the condition of the FiLM layers (paper III-B).

    The paper concatenates them and says nothing of their length. The released inference scales the result to length 1;
    the released test step does not.

    Args:
        positive: float32 `[batch, dim]`, or None for a query without this side, which counts as zeros.
        negative: likewise.
        unit: scale the result to length 1.

    Returns:
        Both, concatenated: float32 `[batch, 2 · dim]`.

    Raises:
        ValueError: where both are missing.
    """
    if positive is None and negative is None:
        raise ValueError("a condition needs a positive or a negative embedding")
    present = positive if positive is not None else negative
    assert present is not None
    sides = [side if side is not None else torch.zeros_like(present) for side in (positive, negative)]
    joined = torch.cat(sides, dim=-1)
    return F.normalize(joined, dim=-1) if unit else joined
