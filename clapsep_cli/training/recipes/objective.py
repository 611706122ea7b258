"""Computes the losses of separators: CLAPSep's on waveforms (Eq. 14), the same on bands, and TUSS's on sources.

A mask that is linear between bands can be scored from statistics of the bands, without spectra. `metrics` has the same
ratios for evaluation: in float64 on NumPy arrays, without gradients, and limited to ±100 dB.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import dsp

FLOOR = 1e-8  # energy added to signal and noise: keeps gradients finite for silence and perfect estimates
# Of TUSS's loss:
SOFT_LIMIT = 10 ** (-30 / 10)  # of the error's energy relative to the source's: above 30 dB the loss hardly falls
INACTIVE_WEIGHT = 0.1  # of a source that is silent
EPSILON = 1e-7

AT_ONCE = 4  # examples whose spectra are computed together: they fit into a processor's cache


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return 10 * torch.log10((signal + FLOOR) / (noise + FLOOR))


def snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Compute the signal-to-noise ratio in dB (Eq. 15), `[batch]`, of float32 `[batch, samples]`."""
    return _decibel(target.square().sum(1), (estimate - target).square().sum(1))


def si_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Compute the scale-invariant SNR in dB (Eq. 16), as `snr`; the target is first scaled to fit the estimate best."""
    fit = (estimate * target).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + FLOOR)
    return snr(estimate, fit * target)


def waveform_loss(estimate: Tensor, target: Tensor, snr_weight: float = 0.9) -> Tensor:
    """Compute −λ · SNR − (1 − λ) · SI-SNR (Eq. 14), in dB, mean over the batch.

    Args:
        estimate: float32 `[batch, samples]`.
        target: float32 `[batch, samples]`.
        snr_weight: λ, from 0 to 1.
    """
    return -(snr_weight * snr(estimate, target) + (1 - snr_weight) * si_snr(estimate, target)).mean()


@dataclass(frozen=True)
class BandStatistics:
    """Statistics of mixtures X and targets S from which masks that are linear between bands are scored.

    Sums are over bins; s_i is the share of band i in a bin (`spread`, `[bands, 513]`).

    Attributes:
        bands: mean |X|² as the network hears it, `[batch, frames, bands]`.
        squares: Σ s_i²·|X|², `[batch, frames, bands]`.
        products: Σ s_i·s_(i+1)·|X|², `[batch, frames, bands − 1]`.
        shared: Σ s_i·Re(X·S*), `[batch, frames, bands]`.
        mixture: energy of X, `[batch]`.
        target: energy of S, `[batch]`.
        other: energy of X − S, `[batch]`.
    """

    bands: Tensor
    squares: Tensor
    products: Tensor
    shared: Tensor
    mixture: Tensor
    target: Tensor
    other: Tensor

    def by_two(self) -> BandStatistics:
        """Join every two frames, for masks of half the frames; `bands` stay."""

        def joined(each: Tensor) -> Tensor:
            return F.avg_pool1d(F.pad(each.transpose(1, 2), (0, each.shape[1] % 2)), 2).transpose(1, 2) * 2

        return replace(self, squares=joined(self.squares), products=joined(self.products), shared=joined(self.shared))

    def ask(self, mixtures: Tensor, interferer: Tensor) -> BandStatistics:
        """Choose a target for each of several queries of these mixtures.

        Args:
            mixtures: index of the mixture that each query is for, int64 `[queries]`.
            interferer: True if the query's target is X − S, bool `[queries]`.

        Returns:
            Statistics of as many rows as there are queries.
        """
        of = BandStatistics(*(getattr(self, field.name)[mixtures] for field in fields(self)))
        # Re(X·(X − S)*) = |X|² − Re(X·S*). The shares of a bin add up to 1: s_i = s_i² + s_i·s_(i−1) + s_i·s_(i+1).
        around = F.pad(of.products, (1, 1))
        rest = of.squares + around[..., 1:] + around[..., :-1] - of.shared
        shared = torch.where(interferer[:, None, None], rest, of.shared)
        target, other = (torch.where(interferer, *pair) for pair in ((of.other, of.target), (of.target, of.other)))
        return BandStatistics(of.bands, of.squares, of.products, shared, of.mixture, target, other)


def statistics(targets: Tensor, others: Tensor, heard: Tensor, spread: Tensor) -> BandStatistics:
    """Compute the statistics of mixtures of targets and interferers.

    Args:
        targets: float32 `[batch, samples]`.
        others: the interferers, float32 `[batch, samples]`.
        heard: weights of the bins in each band as the network hears it, `[bands, 513]`.
        spread: share of each band in the bins of its mask, `[bands, 513]`.
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
    energies = (each.sum((1, 2)) for each in (power, wanted, dsp.power(other)))
    return bands, squares, products, shared @ spread.T, *energies


def separation_loss(mask: Tensor, of: BandStatistics, present: Tensor, quiet: float) -> Tensor:
    """Compute −0.9 · SNR − 0.1 · SI-SNR (Eq. 14) of masked mixtures, in dB, mean over the batch.

    If the target is absent, the loss is the level of the output relative to the mixture. The floors limit the weight of
    examples that are already separated by 30 dB.

    Args:
        mask: float32 `[batch, frames, bands]`.
        of: statistics of the mixtures.
        present: True if the target is in the mixture, bool `[batch]`.
        quiet: weight of a dB of output if the target is absent.
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
    loud = -quiet * ratio(of.mixture, output + 1e-2 * of.mixture)
    return torch.where(present, loss, loud).mean()


def source_losses(estimates: Tensor, references: Tensor, prompts: Tensor) -> Tensor:
    """Compute the negative SNR of each source; training minimises its mean.

    Estimates of equal prompts are assigned to their references in the order with the lowest loss. Where a reference is
    silent, the loss is the estimate's level relative to all references of its prompt.

    Args:
        estimates: `[batch, prompts, samples]`.
        references: `[batch, prompts, samples]`.
        prompts: int64 `[prompts]` or `[batch, prompts]`.

    Returns:
        Losses in dB, float32 `[batch, prompts]`.
    """
    estimates, references = estimates.float(), references.float()
    rows = []
    for e, r, ids in zip(estimates, references, prompts.expand(estimates.shape[:2]).tolist(), strict=True):
        losses: list[Tensor] = [e.new_zeros(())] * len(ids)
        for prompt in dict.fromkeys(ids):
            members = [i for i, other in enumerate(ids) if other == prompt]
            for i, loss in zip(members, _group_losses(e[members], r[members]), strict=True):
                losses[i] = loss
        rows.append(torch.stack(losses))
    return torch.stack(rows)


def _group_losses(estimates: Tensor, references: Tensor) -> Tensor:
    """Compute the losses of one prompt's references, `[sources, samples]`, under the best order of the estimates."""
    power = references.square().sum(1)
    active = power > 0
    scale = torch.where(active, power, references.sum(0).square().sum())
    errors = torch.stack([(estimates - reference).square().sum(1) for reference in references])
    level = 10 * torch.log10(errors + SOFT_LIMIT * scale[:, None] + EPSILON)
    weight = torch.where(active, 1.0, INACTIVE_WEIGHT)
    losses = weight[:, None] * (level - torch.where(active, 10 * torch.log10(scale + EPSILON), 0)[:, None])
    orders = torch.tensor(list(permutations(range(len(losses)))), device=losses.device)
    totals = losses.detach()[torch.arange(len(losses)), orders].sum(1)
    return losses[torch.arange(len(losses)), orders[totals.argmin()]]
