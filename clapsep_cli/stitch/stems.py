"""Brings stems of equal prompts into one order, over channels and over overlapping windows.

Which of several equal prompts gets which source is arbitrary, in every window and, where channels are separated
apart, in every channel. So equal prompts, and only they, are put into one order before anything is joined: first the
channels of a window, which hear the same sources, then the window after what came before, on what both have heard.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LAG = 96  # samples by which a source may come later in one channel than in another: 2 ms, 70 cm of air
MARGIN = 0.1  # sum of correlations by which an order must be better than another to be believed
INAUDIBLE = 1e-6  # of the loudest stem's energy (−60 dB): what is far below it correlates with nothing


def align_channels(stems: Tensor) -> list[list[int]]:
    """Bring stems into one order in all channels that hear the same sources.

    Args:
        stems: `[stems, channels, samples]`, changed in place.

    Returns:
        The channels in sets; those of different sets have too little in common to be compared.
    """
    sets: list[list[int]] = []
    for channel in range(stems.shape[1]):
        for known in sets:
            likeness = _correlations(stems[:, known[0]], stems[:, channel], MAX_LAG).tolist()
            best, order = best_order(likeness)
            # The second best differs in one pair at least, so it is the best without one of these pairs.
            second = max(best_order(_without(likeness, row, column))[0] for row, column in enumerate(order))
            if best - second > MARGIN:
                stems[:, channel] = stems[order, channel]
                known.append(channel)
                break
        else:
            sets.append([channel])
    return sets


def continuing(before: Tensor, after: Tensor) -> list[int]:
    """Find the order of stems in which they best continue others.

    Args:
        before: `[stems, channels, samples]`.
        after: stems of the same moments, likewise.

    Returns:
        Positions in `after`; as they are unless another order is clearly better.
    """
    likeness = _correlations(before.flatten(1), after.flatten(1))
    best, order = best_order(likeness.tolist())
    return order if best - float(likeness.trace()) > MARGIN else list(range(len(after)))


def best_order(likeness: list[list[float]]) -> tuple[float, list[int]]:
    """Assign columns to rows, each once, so that the sum of the likenesses is greatest.

    This is the Hungarian method with shortest augmenting paths: n³ steps, where trying all orders takes n!.

    Args:
        likeness: a square matrix, row by row.

    Returns:
        The sum, and the column of each row.
    """
    count = len(likeness)
    row_price, column_price = [0.0] * count, [0.0] * (count + 1)
    row_of = [-1] * (count + 1)  # by column; the last column stands for the row that is being placed
    for row in range(count):
        row_of[count], column = row, count
        least, before, done = [math.inf] * count, [count] * count, [False] * (count + 1)
        while row_of[column] >= 0:
            done[column], at = True, row_of[column]
            for other in range(count):
                cost = -likeness[at][other] - row_price[at] - column_price[other]
                if not done[other] and cost < least[other]:
                    least[other], before[other] = cost, column
            nearest = min((j for j in range(count) if not done[j]), key=least.__getitem__)
            step = least[nearest]
            for other in range(count + 1):
                if done[other]:
                    row_price[row_of[other]] += step
                    column_price[other] -= step
                else:
                    least[other] -= step
            column = nearest
        while column != count:
            row_of[column], column = row_of[before[column]], before[column]
    order = sorted(range(count), key=row_of.__getitem__)
    return sum(likeness[row][column] for row, column in enumerate(order)), order


def _without(likeness: list[list[float]], row: int, column: int) -> list[list[float]]:
    """Return `likeness` with one pair made worse than any order without it."""
    changed = [list(values) for values in likeness]
    changed[row][column] = -2.0 * len(likeness) - 1  # a sum of correlations lies within ± their number
    return changed


def _correlations(a: Tensor, b: Tensor, max_lag: int = 0) -> Tensor:
    """Correlate every row of `a` with every row of `b`: `[rows, rows]`, within ±1; 0 where either is silent.

    With `max_lag`, each value is the greatest magnitude within ± that many samples.
    """
    energies = a.square().sum(1), b.square().sum(1)
    floor = INAUDIBLE * torch.cat(energies).max() + 1e-30
    scale = ((energies[0] + floor)[:, None] * (energies[1] + floor)).sqrt()
    if not max_lag:
        return (a @ b.T) / scale
    length = a.shape[-1] + max_lag
    spectra = torch.fft.rfft(a, length), torch.fft.rfft(b, length)
    lags = torch.fft.irfft(spectra[0][:, None] * spectra[1].conj(), length)
    return torch.cat([lags[..., : max_lag + 1], lags[..., -max_lag:]], -1).abs().amax(-1) / scale
