"""What training minimises: the paper's loss on waveforms, and the same on bands, where a mask that is linear between
bands needs no spectrum to be scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clapsep_cli import dsp

FLOOR = 1e-8
AT_ONCE = 4  # examples whose spectra are handled together: they fit into a processor's cache


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return 10 * torch.log10((signal + FLOOR) / (noise + FLOOR))


def snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Signal-to-noise ratio in dB (Eq. 15) of float32 `[batch, samples]`: `[batch]`."""
    return _decibel(target.square().sum(1), (estimate - target).square().sum(1))


def si_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """The same after the target was scaled to fit the estimate best (Eq. 16): `[batch]`."""
    fit = (estimate * target).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + FLOOR)
    return snr(estimate, fit * target)


def waveform_loss(estimate: Tensor, target: Tensor, snr_weight: float = 0.9) -> Tensor:
    """−λ · SNR − (1 − λ) · SI-SNR (Eq. 14), mean over the batch, in dB."""
    return -(snr_weight * snr(estimate, target) + (1 - snr_weight) * si_snr(estimate, target)).mean()


@dataclass(frozen=True)
class BandStatistics:
    """All that a loss needs to know of mixtures X and targets S, for masks that are linear between neighbouring bands.

    With s_i the share of band i in a bin (`spread`, `[bands, 513]`), summed over bins: `bands` mean |X|² as the network
    hears it, `squares` Σ s_i²·|X|², `products` Σ s_i·s_(i+1)·|X|², `shared` Σ s_i·Re(X·S*), all `[batch, frames, …]`.
    `mixture` and `target` are energies, `[batch]`.
    """

    bands: Tensor
    squares: Tensor
    products: Tensor
    shared: Tensor
    mixture: Tensor
    target: Tensor


def statistics(targets: Tensor, others: Tensor, heard: Tensor, spread: Tensor) -> BandStatistics:
    """Statistics of the sums of targets and interferers, float32 `[batch, samples]` each. `heard` and `spread` are
    `[bands, 513]`.
    """
    weights = torch.cat([heard, spread.square(), spread[:-1] * spread[1:]]).T
    parts = []
    for at in range(0, len(targets), AT_ONCE):
        few = slice(at, at + AT_ONCE)
        target, other = dsp.spectrum(targets[few]), dsp.spectrum(others[few])
        parts.append(_statistics(target, other, weights, spread))
    return BandStatistics(*(torch.cat(list(columns)) for columns in zip(*parts, strict=True)))


def _statistics(target: Tensor, other: Tensor, weights: Tensor, spread: Tensor) -> tuple[Tensor, ...]:
    wanted = dsp.power(target)
    between = torch.addcmul(target.real * other.real, target.imag, other.imag)
    shared = wanted + between
    power = shared + between + dsp.power(other)
    count = len(spread)
    weighted = power @ weights
    bands, squares, products = weighted[..., :count], weighted[..., count : 2 * count], weighted[..., 2 * count :]
    return bands, squares, products, shared @ spread.T, power.sum((1, 2)), wanted.sum((1, 2))


def separation_loss(mask: Tensor, of: BandStatistics, present: Tensor) -> Tensor:
    """−0.9 · SNR − 0.1 · SI-SNR (paper, Eq. 14) of mixtures masked by `mask` (`[batch, frames, bands]`), mean, in dB.

    Where the query asks for something absent (`present` is false), the loss is the level of the output relative to the
    mixture instead. The floors keep an example that is separated to 30 dB from outweighing the rest.
    """

    def ratio(signal: Tensor, noise: Tensor) -> Tensor:
        return 10 * torch.log10((signal + FLOOR) / (noise + 1e-3 * signal + FLOOR))

    # |M·X − S|² = M²·|X|² − 2·M·Re(X·S*) + |S|², and M² has the product of two neighbouring bands in the middle.
    pairs = mask[..., :-1] * mask[..., 1:]
    output = (mask.square() * of.squares).sum((1, 2)) + 2 * (pairs * of.products).sum((1, 2))
    shared = (mask * of.shared).sum((1, 2))
    fitted = shared.square() / (of.target + FLOOR)
    error = (output - 2 * shared + of.target).clamp(min=0)
    loss = -0.9 * ratio(of.target, error) - 0.1 * ratio(fitted, (output - fitted).clamp(min=0))
    quiet = -0.3 * ratio(of.mixture, output + 1e-2 * of.mixture)
    return torch.where(present, loss, quiet).mean()
