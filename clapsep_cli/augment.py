"""Augmentation of spectra in training. All that is random comes from generators that the caller seeds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import dsp

EQ_POINTS = 6  # control points of a random equaliser curve over the bins


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on the numbers of `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def equaliser(count: int, std_db: float, generator: torch.Generator) -> Tensor:
    """Random smooth frequency responses around 0 dB, flat for half of them: amplitudes `[count, 1, 513 bins]`."""
    points = torch.randn(count, 1, EQ_POINTS, generator=generator) * std_db
    points *= (torch.rand(count, 1, 1, generator=generator) < 0.5).float()
    points -= points.mean(-1, keepdim=True)
    return torch.pow(10, F.interpolate(points, size=dsp.N_FFT // 2 + 1, mode="linear", align_corners=True) / 20)


def stripes(count: int, size: int, widest: int, generator: torch.Generator) -> Tensor:
    """SpecAugment along one axis (paper IV-B): 1 `[count, size]`, and 0 in two random stripes of up to `widest`."""
    at, kept = torch.arange(size), torch.ones(count, size)
    for _ in range(2):
        width = torch.randint(0, widest, (count, 1), generator=generator)
        start = (torch.rand(count, 1, generator=generator) * (size - width)).long()
        kept *= ((at < start) | (at >= start + width)).float()
    return kept


def disguise(power: Tensor, std_db: float, generator: torch.Generator) -> Tensor:
    """Augment what an audio encoder hears, power `[batch, frames, 513]`: an equaliser, stripes of time and bins."""
    count, frames, bins = power.shape
    over_bins = equaliser(count, std_db, generator).square()[:, 0] * stripes(count, bins, bins // 10, generator)
    return power * (stripes(count, frames, frames // 8, generator)[:, :, None] * over_bins[:, None])
