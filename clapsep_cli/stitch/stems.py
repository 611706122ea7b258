"""Joins stems of windows, separated at the model's own rate and channel by channel, to stems of a recording.

Which of several equal prompts gets which source is arbitrary, in every window and, where channels are separated
apart, in every channel. So equal prompts, and only they, are put into one order before anything is joined: first the
channels of a window, which hear the same sources, then the window after what came before, on what both have heard.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.stitch.windows import Stream, Windower

OVERLAP = 48_000  # samples by which regular windows overlap: 1 s, a sixth of the released models' window
MAX_LAG = 96  # samples by which a source may come later in one channel than in another: 2 ms, 70 cm of air
MARGIN = 0.1  # sum of correlations by which an order must be better than another to be believed
INAUDIBLE = 1e-6  # of the loudest stem's energy (−60 dB): what is far below it correlates with nothing


class StemStream(Stream):
    """Joins the stems of windows to those of a recording.

    Each window fades in, by a raised cosine, over its overlap with those before; equal samples stay bit for bit as they
    are. Stems of equal prompts may change places between windows and channels, which is undone; stems of other prompts
    never do. A recording shorter than a window is processed without padding.

    Args:
        window: length of the separator's window, in samples at `rate_heard`.
        prompts: the stems' prompts, names or numbers.
        rate: sample rate of the recording in Hz.
        rate_heard: sample rate of the separator in Hz.
        channels: number of channels of the recording.
        device: where windows are separated.
        overlap: samples, at `rate_heard`, by which regular windows overlap.
    """

    def __init__(
        self,
        window: int,
        prompts: Sequence[Hashable],
        rate: int,
        rate_heard: int,
        channels: int,
        device: torch.device,
        overlap: int = OVERLAP,
    ) -> None:
        super().__init__(Windower(window, channels, overlap, step=1), device)
        self.stems, self.channels = len(prompts), channels
        alike = ([i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts))
        self.alike = [members for members in alike if len(members) > 1]
        self.results: list[Tensor] = []  # of channels of the window that comes next
        self.start = 0  # the first sample held, at the rate heard
        self.held: Tensor | None = None  # the last window, [stems, channels, samples]
        self.final: list[Tensor] = []  # stems [stems, channels, samples] that are not pulled yet
        self.pulled = 0
        columns = self.stems * channels
        self.back = soxr.ResampleStream(rate_heard, rate, columns, "float32", "HQ") if rate != rate_heard else None

    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        windows = self._cut(block, heard, last)
        rows = [torch.from_numpy(channel).to(self.device) for window in windows for channel in window]
        return [row[: max(2, self.heard)] for row in rows]  # two samples are the least that has a level

    def accept(self, result: Tensor) -> None:
        """`result`: the stems of the next channel of a window, float32 `[stems, samples]`."""
        self.results.append(result)
        if len(self.results) == self.channels:
            self.final.append(self._add(self.starts.pop(0), torch.stack(self.results, 1)))
            self.results = []

    def _add(self, start: int, stems: Tensor) -> Tensor:
        """Cross-fade into the window at sample `start`; return what lies before it, now final."""
        held = stems[..., :0] if self.held is None else self.held
        final, before = held.tensor_split([start - self.start], dim=-1)
        self._order(before, stems)
        shared = before.shape[-1]
        fade = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(shared, device=stems.device) + 0.5) / max(1, shared))
        joined = torch.lerp(before, stems[..., :shared], fade.to(stems.dtype))
        self.held, self.start = torch.cat([joined, stems[..., shared:]], -1), start
        return final

    def _order(self, before: Tensor, stems: Tensor) -> None:
        """Bring stems of equal prompts into the order that best continues `before`, in place."""
        for members in self.alike:
            group, continued = stems[members], before[members]
            for channels in align_channels(group):
                order = continuing(continued[:, channels], group[:, channels, : before.shape[-1]])
                group[:, channels] = group[order][:, channels]
            stems[members] = group

    def pull(self) -> Tensor:
        done = self.complete
        if done:
            assert self.held is not None, "a recording has at least one window"
            self.final.append(self.held[..., : self.heard - self.start])  # without a short window's padding
        stems = torch.cat([torch.zeros(self.stems, self.channels, 0), *(part.cpu() for part in self.final)], 2)
        self.final = []
        stems = self._at_rate(stems, done)
        if done:  # a resampler may be off by a sample at the end
            missing = self.samples - self.pulled
            stems = torch.nn.functional.pad(stems[..., :missing], (0, max(0, missing - stems.shape[2])))
        self.pulled += stems.shape[2]
        return stems

    def _at_rate(self, stems: Tensor, last: bool) -> Tensor:
        """Resample the next stretch of the stems to the recording's rate."""
        if self.back is None:
            return stems
        flat = np.ascontiguousarray(stems.flatten(0, 1).T.numpy())
        back = self.back.resample_chunk(flat, last=last).reshape(-1, flat.shape[1])
        return torch.from_numpy(np.ascontiguousarray(back.T)).view(self.stems, self.channels, -1)


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
