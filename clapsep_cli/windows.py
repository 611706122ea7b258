"""Windows of a stream, and one mask over the whole recording from the masks of its windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.dsp import HOP

OVERLAP_FRAMES = 100  # 1 s over which neighbouring windows cross-fade
CANCELLED = 0.02  # channels cancel if their mean has less than this share of their energy (−17 dB)


class Windower:
    """Cuts a stream at 32 kHz into windows that overlap by `OVERLAP_FRAMES`.

    Starts lie on STFT frames. The last window ends with the recording (to within a frame, then zeros follow); a
    recording shorter than a window is one window, zero-padded. Where a stream is cut depends on its samples alone, not
    on the blocks in which they arrive.
    """

    def __init__(self, window: int, channels: int) -> None:
        self.window = window
        self.hop = max(HOP, window - min(OVERLAP_FRAMES, window // HOP // 2) * HOP)
        self.start = 0  # of the next regular window
        self.buffer = np.zeros((channels, 0), np.float32)
        self.at = 0  # position of the buffer in the stream

    def push(self, block: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Take in `block` (`[channels, samples]`); yield the windows it completes, each with the frame it starts at."""
        self.buffer = np.concatenate([self.buffer, block], 1)
        while self.at + self.buffer.shape[1] >= self.start + self.window:
            yield self._cut(self.start)
            # The last window may reach back as far as the start of the one before.
            self.buffer = self.buffer[:, self.start - self.at :]
            self.at = self.start
            self.start += self.hop

    def finish(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the window that ends with the stream, unless a regular one has."""
        samples = self.at + self.buffer.shape[1]
        if self.start == 0:
            yield self._cut(0)
        elif samples > self.start - self.hop + self.window:
            yield self._cut(-(-(samples - self.window) // HOP) * HOP)

    def _cut(self, start: int) -> tuple[int, NDArray[np.float32]]:
        piece = self.buffer[:, start - self.at :][:, : self.window]
        return start // HOP, np.pad(piece, ((0, 0), (0, self.window - piece.shape[1])))


def downmix(window: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a model hears of a window (`[channels, samples]`): the mean of its channels, `[samples]`.

    Where they cancel (a channel with its polarity reversed, say), it is the loudest channel instead.
    """
    mean = window.mean(0)
    energies = np.square(window).sum(1)
    if np.square(mean).sum() >= CANCELLED * energies.mean():
        return np.asarray(mean, np.float32)
    return np.asarray(window[int(energies.argmax())], np.float32)


class MaskTrack:
    """Cross-fades the masks of overlapping windows into one. Weights rise and fall linearly over the overlap.

    `take` hands over frames that no later window can change; only the unfinished ones are held.
    """

    def __init__(self) -> None:
        self.start = 0  # the first frame held
        self.sum: Tensor | None = None  # weighted masks [frames, bins]
        self.weight = torch.zeros(0)

    def add(self, start: int, mask: Tensor) -> Tensor | None:
        """Add the mask (`[frames, bins]`) of the window at frame `start`; return the frames before it, now final."""
        final = self._take(start - self.start)
        frames = len(mask)
        ramp = torch.arange(1, frames + 1, device=mask.device)
        weight = torch.minimum(ramp, ramp.flip(0)).clamp(max=OVERLAP_FRAMES).float() / OVERLAP_FRAMES
        if self.sum is None:
            self.sum, self.weight = mask * weight[:, None], weight
            return final
        extra = start + frames - (self.start + len(self.sum))
        self.sum = torch.cat([self.sum, mask.new_zeros(extra, mask.shape[1])])
        self.weight = torch.cat([self.weight, weight.new_zeros(extra)])
        at = start - self.start
        self.sum[at : at + frames] += mask * weight[:, None]
        self.weight[at : at + frames] += weight
        return final

    def finish(self) -> Tensor | None:
        """The frames still held."""
        return None if self.sum is None else self._take(len(self.sum))

    def _take(self, count: int) -> Tensor | None:
        if self.sum is None or count <= 0:
            return None
        final = self.sum[:count] / self.weight[:count, None]
        self.sum, self.weight, self.start = self.sum[count:], self.weight[count:], self.start + count
        return final
