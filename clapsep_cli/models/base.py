"""The contract between the pipeline and the separators, and between a query-conditioned separator and its encoders.

What a separator is asked for, `wanted`, is made by its family (see `registry.Family.ask`) and opaque to the pipeline.
For CLAPSep and mini these are `Conditions`, in an embedding space that separator, text encoder and audio encoder share.
The three are loaded apart, so that a text query never reads the audio encoder and the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp

# Targets of a window that are masked together: more make tensors so large that the system maps their memory anew for
# every operation (40 targets of mini on one core: 4.3 s, 2.9 s by fours).
TARGETS_AT_ONCE = 4


def go_on() -> None:
    """Never stop: the default of a `check`, which raises where the user wants to stop."""


class Conditions(NamedTuple):
    """What a `MaskSeparator` is asked for: a condition for each target, and which of the targets become stems."""

    targets: Tensor  # float32 [targets, 2 · dim]
    kept: tuple[int, ...]  # positions among the targets


class Separator(nn.Module, ABC):
    """Separates windows of `window` samples at `rate` Hz."""

    rate: int
    window: int

    @abstractmethod
    def lower(self, dtype: torch.dtype) -> None:
        """Compute from now on in `dtype` wherever that makes inference faster; what comes in and out is float32."""

    @abstractmethod
    def infer(self, windows: Tensor, wanted: Any, check: Callable[[], None] = go_on) -> Tensor:
        """What is `wanted` in `windows` (float32 `[batch, window]`): float32 `[batch, …]`, of which the family's stream
        makes stems.

        `check` is called between parts of the work, where these are many; what it raises ends it.
        """


class MaskSeparator(Separator):
    """Masks the magnitude STFT of a mixture (1024-point periodic Hann, hop 320, at 32 kHz), given a condition.

    `window` is a multiple of the hop. `encode` is separate from `mask` because several targets of one mixture share it.
    """

    @abstractmethod
    def encode(self, mixture: Tensor) -> Any:
        """Features of `mixture` (float32 `[batch, window]`, at `rate` Hz), whatever the queries."""

    @abstractmethod
    def mask(self, features: Any, condition: Tensor) -> Tensor:
        """Mask in [0, 1], float32 `[batch, window // 320 + 1 frames, 513 bins]`.

        `condition`: float32 `[batch, 2 · dim]`, from `condition()`. Where `features` or `condition` is of one item, it
        serves all of the other.
        """

    def estimate(self, mixtures: Tensor, conditions: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the targets in whole windows under each of several conditions. Mixtures are encoded once.

        Args:
            mixtures: float32 `[batch, window]`, at `rate` Hz.
            conditions: float32 `[batch or 1, 2 · dim]` each.

        Yields:
            The masked mixtures, float32 `[batch, window]`.
        """
        features, spectrum = self.encode(mixtures), dsp.spectrum(mixtures)
        for wanted in conditions:
            yield dsp.waveform(spectrum * self.mask(features, wanted), mixtures.shape[1])

    def infer(self, windows: Tensor, wanted: Conditions, check: Callable[[], None] = go_on) -> Tensor:
        """Masks of the targets that are kept, float32 `[batch, stems, frames, 513]`; the encoder runs once a window.

        Targets share the mixture: where the masks of all of them, kept or not, add up to more than 1, they are scaled
        to 1, so that what they leave is never negative.
        """
        if len(wanted.targets) == 1:
            return self.mask(self.encode(windows), wanted.targets)[:, None]
        return torch.stack([self._share(self.encode(window[None]), wanted, check) for window in windows])

    def _share(self, features: Any, wanted: Conditions, check: Callable[[], None]) -> Tensor:
        kept: dict[int, Tensor] = {}
        total: Tensor | None = None
        for first in range(0, len(wanted.targets), TARGETS_AT_ONCE):
            check()
            masks = self.mask(features, wanted.targets[first : first + TARGETS_AT_ONCE])
            total = masks.sum(0) if total is None else total.add_(masks.sum(0))
            kept |= {at: mask for at, mask in enumerate(masks, first) if at in wanted.kept}
        assert total is not None, "there is a target"
        return torch.stack([kept[at] for at in wanted.kept]).div_(total.clamp_(min=1))


class TextEncoder(nn.Module, ABC):
    """Embeds texts, in the space in which an `AudioEncoder` embeds recordings."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text: float32 `[len(texts), dim]`, rows of length 1."""

    def unknown(self, text: str) -> dict[str, str | None]:
        """The words of a text that count for nothing, each with a known one of similar spelling. Here: none."""
        return {}


class AudioEncoder(nn.Module, ABC):
    """`rate` is the sample rate, in Hz, of the audio it hears."""

    rate: int

    @abstractmethod
    def embed(self, audio: Tensor) -> Tensor:
        """Embed one mono recording, float32 `[samples]` of any length ≥ 1: float32 `[dim]`, of length 1.

        All of a long recording counts: the result never depends on a random crop.
        """


def condition(positive: Tensor | None, negative: Tensor | None) -> Tensor:
    """Join both sides into the condition of the FiLM layers (paper III-B): concatenated, then scaled to length 1.

    Each side is float32 `[batch, dim]`; a missing side is the zero vector. Returns float32 `[batch, 2 · dim]`.
    Raises `ValueError` where both are missing.
    """
    if positive is None and negative is None:
        raise ValueError("a condition needs a positive or a negative embedding")
    present = positive if positive is not None else negative
    assert present is not None
    sides = [side if side is not None else torch.zeros_like(present) for side in (positive, negative)]
    return F.normalize(torch.cat(sides, dim=-1), dim=-1)
