"""A recording on its way through a separator that makes stems, at a rate of its own and each channel for itself."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.stitch.stems import OVERLAP, StemTrack
from clapsep_cli.stitch.windows import Stream, Windower


class StemStream(Stream):
    """Stems of a recording of `channels` at `rate` Hz, from a separator of `window` samples at `rate_heard` Hz.

    `prompts` are the stems' prompts: what is separated for equal ones may change places between windows and channels,
    which is undone. A recording shorter than a window is heard as it is, without silence behind it.
    """

    def __init__(
        self,
        window: int,
        prompts: Sequence[Hashable],
        rate: int,
        rate_heard: int,
        channels: int,
        device: torch.device,
    ) -> None:
        self.stems, self.channels, self.device = len(prompts), channels, device
        self.windower = Windower(window, channels, OVERLAP, step=1)
        self.track = StemTrack(prompts)
        self.starts: list[int] = []  # of the windows that still lack results, at the rate heard
        self.results: list[Tensor] = []  # of channels of the window that comes next
        self.final: list[Tensor] = []  # stems [stems, channels, samples] that are not pulled yet
        self.heard, self.samples, self.pulled, self.ended = 0, 0, 0, False
        columns = self.stems * channels
        self.back = soxr.ResampleStream(rate_heard, rate, columns, "float32", "HQ") if rate != rate_heard else None

    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        self.samples += block.shape[1]
        self.heard += heard.shape[1]
        self.ended = last
        windows = [*self.windower.push(heard), *(self.windower.finish() if last else ())]
        self.starts += [start for start, _ in windows]
        rows = [torch.from_numpy(channel).to(self.device) for _, window in windows for channel in window]
        return [row[: max(2, self.heard)] for row in rows]  # two samples are the least that has a level

    def accept(self, result: Tensor) -> None:
        """`result`: the stems of the next channel of a window, float32 `[stems, samples]`."""
        self.results.append(result)
        if len(self.results) == self.channels:
            self.final.append(self.track.add(self.starts.pop(0), torch.stack(self.results, 1)))
            self.results = []

    def pull(self) -> Tensor:
        done = self.ended and not self.starts
        if done:
            self.final.append(self.track.finish(self.heard))
        stems = torch.cat([torch.zeros(self.stems, self.channels, 0), *(part.cpu() for part in self.final)], 2)
        self.final = []
        stems = self._at_rate(stems, done)
        if done:  # a resampler may be off by a sample at the end
            missing = self.samples - self.pulled
            stems = torch.nn.functional.pad(stems[..., :missing], (0, max(0, missing - stems.shape[2])))
        self.pulled += stems.shape[2]
        return stems

    def _at_rate(self, stems: Tensor, last: bool) -> Tensor:
        """The stems at the recording's own rate."""
        if self.back is None:
            return stems
        flat = np.ascontiguousarray(stems.flatten(0, 1).T.numpy())
        back = self.back.resample_chunk(flat, last=last).reshape(-1, flat.shape[1])
        return torch.from_numpy(np.ascontiguousarray(back.T)).view(self.stems, self.channels, -1)
