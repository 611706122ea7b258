"""Separates in two passes: what the first one leaves becomes part of the negative query of the second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.models import base

SILENT = 1e-6  # energy of what a pass left, relative to the mixture, below which there is nothing to embed
# Level of the first pass's target relative to the mixture, in dB: below the first number there is nothing to refine,
# and a second pass would only bring up what is not there; from the second on both masks count alike.
ABSENT_DB, PRESENT_DB = -12.0, -6.0


class Refined(base.MaskSeparator):
    """Masks each window twice and takes the mean of both masks, where the first pass found something.

    In the second pass, what the first one left is embedded as a recording and joined to the negative query. This helps
    most where a query is poor, or only one side is named.
    """

    def __init__(self, separator: base.MaskSeparator, audio: base.AudioEncoder) -> None:
        super().__init__()
        self.separator, self.audio = separator, audio
        self.rate, self.window, self.turns = separator.rate, separator.window, separator.turns
        self.resample = dsp.Resampler(separator.rate, audio.rate) if separator.rate != audio.rate else None

    @property
    def spread(self) -> Tensor | None:
        return self.separator.spread

    def lower(self, dtype: torch.dtype) -> None:
        self.separator.lower(dtype)

    def encode(self, mixture: Tensor) -> tuple[Tensor, Any]:
        return mixture, self.separator.encode(mixture)

    def mask(self, features: tuple[Tensor, Any], condition: Tensor) -> Tensor:
        mixture, encoded = features
        first = self.separator.mask(encoded, condition)
        left = dsp.masked(dsp.spectrum(mixture), 1 - self.spectral(first), mixture.shape[1])
        energy, found = mixture.square().sum(1), (mixture - left).square().sum(1)
        level = 10 * torch.log10((found / energy.clamp(min=1e-12)).clamp(min=1e-12))
        share = ((level - ABSENT_DB) / (PRESENT_DB - ABSENT_DB)).clamp(0, 1) / 2
        if not share.any():
            return first
        second = self.separator.mask(encoded, leaving(condition, self._embed(left, energy)))
        return torch.lerp(first, second, share[:, None, None].to(first.dtype))

    def _embed(self, left: Tensor, energy: Tensor) -> Tensor:
        """Embed what was left, float32 `[batch, samples]`: `[batch, dim]`; zeros for silence."""
        audible = left.square().sum(1) > SILENT * energy
        heard = left if self.resample is None else self.resample(left)
        embedded = torch.stack([self.audio.embed(one) for one in heard])
        return embedded * audible[:, None]


def leaving(condition: Tensor, left: Tensor) -> Tensor:
    """Add what was left to the negative side of conditions.

    Args:
        condition: float32 `[batch or 1, 2 · dim]`.
        left: embeddings of what was left, `[batch, dim]`; rows of zeros add nothing.

    Returns:
        float32 `[batch, 2 · dim]`.
    """
    positive, negative = condition.expand(len(left), -1).chunk(2, 1)
    size = negative.norm(dim=1, keepdim=True)
    named = size > 0
    joined = F.normalize(F.normalize(negative, dim=1) + left, dim=1)
    joined = joined * torch.where(named, size, positive.norm(dim=1, keepdim=True))
    return base.condition(positive, torch.where(left.any(1, keepdim=True), joined, negative))
