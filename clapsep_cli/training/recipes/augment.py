"""Mixing and augmentation in training, on the device. What is random comes from generators that the caller seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.audio.samples import PEAK

EQ_POINTS = 6  # control points of a random equaliser curve over the bins


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on the numbers of `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def levelled(targets: Tensor, interferers: Tensor, snr_db: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and interferers, float32 `[batch, samples]`, such that their sum is a mixture at `snr_db` (`[batch]`),
    scaled to a peak of 0.9 where it would exceed 1 (paper IV-A)."""
    wanted, others = torch.empty_like(targets), torch.empty_like(interferers)
    for row, snr in enumerate(snr_db):  # one by one, they stay in a processor's cache
        target, interferer = targets[row], interferers[row]
        ratio = (target.norm() + 1e-6) / (interferer.norm() + 1e-6)
        torch.mul(interferer, ratio * torch.pow(10, -snr / 20), out=others[row])
        peak = torch.add(target, others[row]).abs_().max()
        scale = torch.where(peak > 1, PEAK / peak.clamp(min=1), 1.0)
        torch.mul(target, scale, out=wanted[row])
        others[row] *= scale
    return wanted, others


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


def disguise(power: Tensor, std_db: float, generator: torch.Generator, batch: int, rows: range) -> Tensor:
    """Augment what an audio encoder hears, power `[rows, frames, 513]`: an equaliser, stripes of time and bins.

    They are drawn for the whole `batch`, of which `power` holds the given rows.
    """
    _, frames, bins = power.shape
    own = slice(rows.start, rows.stop)
    over_bins = equaliser(batch, std_db, generator).square()[:, 0] * stripes(batch, bins, bins // 10, generator)
    over_time = stripes(batch, frames, frames // 8, generator)
    return power * (over_time[own, :, None] * over_bins[own, None]).to(power.device)


@contextmanager
def masked(layer: nn.Module, kept: Tensor) -> Iterator[None]:
    """While it lasts, what `layer` returns is multiplied by `kept`: SpecAugment inside an encoder."""
    hook = layer.register_forward_hook(lambda module, arguments, output: output * kept)
    try:
        yield
    finally:
        hook.remove()
