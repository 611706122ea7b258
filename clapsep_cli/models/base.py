"""The contract between the pipeline and a query-conditioned mask separator.

A model is three networks that share one embedding space of `dim` numbers: a separator, a text encoder and an audio
encoder. They are loaded apart, so that a text query never reads the audio encoder and the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Separator(nn.Module, ABC):
    """Masks the magnitude STFT of a mixture (1024-point periodic Hann, hop 320, at 32 kHz), given a condition.

    `window` is the length in samples that the network was made for; it is a multiple of the hop.
    `encode` is separate from `mask` because several targets of one mixture share it.
    """

    rate: int
    window: int

    @abstractmethod
    def encode(self, mixture: Tensor) -> Any:
        """Features of `mixture` (float32 `[batch, window]`, at `rate` Hz), whatever the queries."""

    @abstractmethod
    def mask(self, features: Any, condition: Tensor) -> Tensor:
        """Mask in [0, 1], float32 `[batch, window // 320 + 1 frames, 513 bins]`.

        `condition`: float32 `[batch or 1, 2 · dim]`, from `condition()`.
        """


class TextEncoder(nn.Module, ABC):
    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text: float32 `[len(texts), dim]`, rows of length 1."""


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
