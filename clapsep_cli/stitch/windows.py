"""Cuts a stream into windows, and defines what joins the results of windows to a recording."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.dsp import HOP

OVERLAP_FRAMES = 100  # 1 s over which neighbouring windows cross-fade


class Stream(ABC):
    """Joins the separator's results for the windows of one recording; holds only the unfinished part.

    The pipeline pushes the recording's blocks twice, as they are and at the separator's rate; has the windows that come
    of it separated; hands the results back in their order; and pulls the stems as far as they are final.
    """

    mono = False  # True if it hears one channel, the recording's downmix

    def __init__(self, windower: Windower, device: torch.device) -> None:
        self.windower, self.device = windower, device
        self.starts: list[int] = []  # of the windows that still lack results, in samples at the separator's rate
        self.samples, self.heard = 0, 0  # pushed so far, at the recording's rate and at the separator's
        self.ended = False

    @abstractmethod
    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        """Take in the next block; return the windows that are complete.

        Args:
            block: the next stretch of the recording, float32 `[channels, samples]`.
            heard: the next stretch at the separator's rate, likewise, or `[1, samples]` if it is `mono`. As resamplers
                lag, the two may differ in length.
            last: whether the recording ends here.

        Returns:
            Windows to be separated, in their order, float32 `[samples]` each.
        """

    @abstractmethod
    def accept(self, result: Tensor) -> None:
        """Take in the separator's result for the oldest window that still lacks one."""

    @abstractmethod
    def pull(self) -> Tensor:
        """Return the stems that became final since the last call, float32 `[stems, channels, samples]`.

        After the last block and its results, what is pulled completes the recording's length exactly.
        """

    @property
    def complete(self) -> bool:
        """True once the recording has ended and every window has its result."""
        return self.ended and not self.starts

    def _cut(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool) -> list[NDArray[np.float32]]:
        """Count a block and what is heard of it; return the windows it completes, `[channels, window]` each."""
        self.samples += block.shape[1]
        self.heard += heard.shape[1]
        self.ended = last
        windows = [*self.windower.push(heard), *(self.windower.finish() if last else ())]
        self.starts += [start for start, _ in windows]
        return [window for _, window in windows]


class Windower:
    """Cuts a stream into windows of `window` samples that overlap by `overlap`, or by as much less as the step takes.

    Starts lie on multiples of `step`, as does the distance between them. The last window ends with the recording (to
    within a step, then zeros follow); a recording shorter than a window is one window, zero-padded. Where a stream is
    cut depends on its samples alone, not on the blocks in which they arrive.
    """

    def __init__(self, window: int, channels: int, overlap: int = OVERLAP_FRAMES * HOP, step: int = HOP) -> None:
        self.window, self.step = window, step
        self.hop = -(-(window - min(overlap, window // 2)) // step) * step
        self.start = 0  # of the next regular window
        self.blocks = [np.zeros((channels, 0), np.float32)]  # that a window still to come may need
        self.at, self.end = 0, 0  # their place in the stream

    def push(self, block: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Take in `block` (`[channels, samples]`); yield the windows it completes, each with its start."""
        self.blocks.append(block)
        self.end += block.shape[1]
        while self.end >= self.start + self.window:
            yield self._cut(self.start)
            self.start += self.hop

    def finish(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the window that ends with the stream, unless a regular one has."""
        if self.start == 0:
            yield self._cut(0)
        elif self.end > self.start - self.hop + self.window:
            yield self._cut(-(-(self.end - self.window) // self.step) * self.step)

    def _cut(self, start: int) -> tuple[int, NDArray[np.float32]]:
        """Copy a window out of the blocks. No later one starts before it, so blocks before it are dropped."""
        while self.at + self.blocks[0].shape[1] < start:
            self.at += self.blocks.pop(0).shape[1]
        parts, at = [], self.at - start  # of each block in the window
        for block in self.blocks:
            parts.append(block[:, max(0, -at) : max(0, self.window - at)])
            at += block.shape[1]
        silence = np.zeros((len(self.blocks[0]), max(0, self.window - at)), np.float32)
        return start, np.concatenate([*parts, silence], 1)
