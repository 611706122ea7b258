"""Joins stems that a separator makes of windows, at its own rate and of each channel by itself, to whole stems."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.stitch.stems import align_channels, continuing
from clapsep_cli.stitch.windows import Stream, Windower

OVERLAP = 48_000  # samples by which regular windows overlap: 1 s, a sixth of the released models' window


class StemStream(Stream):
    """Stems of a recording, joined from those of its windows.

    Each window fades in, by a raised cosine, over all that it shares with those before; what agrees is left bit for
    bit as it is. What is separated for equal prompts may change places between windows and channels, which is undone;
    stems of other prompts never change places. A recording shorter than a window is heard without silence behind it.

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
