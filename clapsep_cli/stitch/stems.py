"""Stems of overlapping segments, separated one by one, joined into whole ones: as `windows.MaskTrack` does with masks.

Which of several equal prompts gets which source is arbitrary, in every segment and, where channels are separated
apart, in every channel. So equal prompts, and only they, are put into one order before anything is joined: first the
channels of a segment, which hear the same sources, then the segment after what came before, on what both have heard.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

OVERLAP = 48_000  # samples by which regular segments should overlap: 1 s, a sixth of the released models' segment
MAX_LAG = 96  # samples by which a source may come later in one channel than in another: 2 ms, 70 cm of air
MARGIN = 0.1  # sum of correlations by which an order must be better than another to be believed
INAUDIBLE = 1e-6  # of the loudest stem's energy (−60 dB): what is far below it correlates with nothing


class StemTrack:
    """Cross-fades the stems of overlapping segments into whole ones; holds no more than one segment.

    `prompts` are the stems' prompts, names or numbers; stems of equal prompts are matched, others never change places.
    Segments are of one length, in order; each fades in, by a raised cosine, over all that it shares with those before.
    What agrees is left bit for bit as it is.
    """

    def __init__(self, prompts: Sequence[Hashable]) -> None:
        alike = ([i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts))
        self.alike = [members for members in alike if len(members) > 1]
        self.start = 0  # the first sample held
        self.held: Tensor | None = None

    def add(self, start: int, stems: Tensor) -> Tensor:
        """Add the segment at sample `start`, float32 `[stems, channels, window]`; return what is before it, now final,
        `[stems, channels, start − the last start]`."""
        held = stems[..., :0] if self.held is None else self.held
        final, before = held.tensor_split([start - self.start], dim=-1)
        shared = before.shape[-1]
        stems = self._in_order(before, stems)
        fade = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(shared, device=stems.device) + 0.5) / max(1, shared))
        joined = torch.lerp(before, stems[..., :shared], fade.to(stems.dtype))
        self.held, self.start = torch.cat([joined, stems[..., shared:]], -1), start
        return final

    def finish(self, samples: int) -> Tensor:
        """The rest of a recording of `samples` in all, `[stems, channels, …]`; a shorter segment's padding is cut."""
        assert self.held is not None, "a recording has at least one segment"
        return self.held[..., : samples - self.start]

    def _in_order(self, before: Tensor, stems: Tensor) -> Tensor:
        stems = stems.clone()
        for members in self.alike:
            group, continued = stems[members], before[members]
            for channels in align_channels(group):
                order = continuing(continued[:, channels], group[:, channels, : before.shape[-1]])
                group[:, channels] = group[order][:, channels]
            stems[members] = group
        return stems


def align_channels(stems: Tensor) -> list[list[int]]:
    """Bring `stems` (`[stems, channels, samples]`, in place) into one order in all channels that hear the same.

    Returns the channels in sets; those of different sets have nothing in common by which to tell.
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
    """The order of `after` in which it best continues `before`, both `[stems, channels, samples]` of the same moments;
    the given order unless another is clearly better."""
    likeness = _correlations(before.flatten(1), after.flatten(1))
    best, order = best_order(likeness.tolist())
    return order if best - float(likeness.trace()) > MARGIN else list(range(len(after)))


def best_order(likeness: list[list[float]]) -> tuple[float, list[int]]:
    """The column for each row, each column once, of which the likenesses have the greatest sum; that sum, and they.

    The Hungarian method with shortest augmenting paths: n³ steps, where trying all orders takes n!.
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
    """The same, with one pair made worse than any order without it."""
    changed = [list(values) for values in likeness]
    changed[row][column] = -2.0 * len(likeness) - 1  # a sum of correlations lies within ± their number
    return changed


def _correlations(a: Tensor, b: Tensor, max_lag: int = 0) -> Tensor:
    """Correlation of every row of `a` with every row of `b`: `[rows, rows]`, within ±1; 0 where either is silent.

    With a lag, it is the greatest within ± `max_lag` samples, whatever its sign.
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
