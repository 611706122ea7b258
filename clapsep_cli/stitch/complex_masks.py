"""Applies complex masks, which turn phases, to recordings of any rate and channel count, as a stream.

A mask that turns phases is rough: between its bins and frames there is nothing to read. So it is applied at 32 kHz, to
every channel as the model hears it, and the result is brought back to the recording's rate. What was never heard, for
it lies above 16 kHz, is added at the recording's own rate, times the mean modulus of the mask's top band (14–16 kHz).
"""

from __future__ import annotations

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.audio.samples import downmix
from clapsep_cli.dsp import HOP, RATE_HZ
from clapsep_cli.stitch.windows import Stream, Windower

OVERLAP = 3 * RATE_HZ  # samples by which windows overlap at least: half of it on either side leaves an error of 1e-4
FADE = 50  # frames in the middle of an overlap over which windows cross-fade
TOP = 8  # the top band is this part of all bins
VALUES_AT_ONCE = 2**19  # spectral values handled in one go: they stay in a processor's cache


class ComplexMaskStream(Stream):
    """A recording of `channels` at `rate` Hz, whose downmix a separator of `window` samples hears at 32 kHz.

    Windows start on multiples of `grid` samples, are heard as loud as they are, and end where the recording does.
    `n_fft` is of the STFT that masks are made for; its hop is 10 ms.
    """

    def __init__(
        self, window: int, grid: int, n_fft: int, stems: int, rate: int, channels: int, device: torch.device
    ) -> None:
        self.stems, self.channels, self.rate, self.device = stems, channels, rate, device
        self.windower = Windower(window, channels, window - (window - OVERLAP) // grid * grid, grid)
        self.track = _Joined()
        self.masked = _Masked(n_fft, stems, channels, device)
        self.starts: list[int] = []  # of the windows whose masks are still to come, in samples
        self.samples, self.heard, self.pulled, self.ended = 0, 0, 0, False
        self.ready = torch.zeros(stems + 1, channels, 0, device=device)  # stems, and what was heard, not yet pulled
        self.back = soxr.ResampleStream(RATE_HZ, rate, (stems + 1) * channels, "float32", "HQ")
        self.waiting = np.zeros((channels, 0), np.float32)  # the recording, from what was pulled on
        self.gains = torch.zeros(stems, 0, device=device)  # of what was not heard, by frames
        self.gain_frame = 0  # the first one held

    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        self.samples += block.shape[1]
        self.heard += heard.shape[1]
        self.ended = last
        self.masked.push(torch.from_numpy(heard).to(self.device))
        if self.rate != RATE_HZ:
            self.waiting = np.concatenate([self.waiting, block], 1)
        windows = [*self.windower.push(heard), *(self.windower.finish() if last else ())]
        self.starts += [start for start, _ in windows]
        return [torch.from_numpy(downmix(cut[:, : max(1, self.heard - at)])).to(self.device) for at, cut in windows]

    def accept(self, result: Tensor) -> None:
        """`result`: the masks of a window, complex64 `[stems, frames, bins]`."""
        self._take(self.track.add(self.starts.pop(0) // HOP, result))

    def _take(self, masks: Tensor | None, last: bool = False) -> None:
        if masks is not None:
            self.ready = torch.cat([self.ready, self.masked.apply(masks, last)], 2)
            top = masks[..., -(masks.shape[2] // TOP) - 1 : -1]  # the last bin is a hole of the mask
            self.gains = torch.cat([self.gains, top.abs().mean(2)], 1)

    def pull(self) -> Tensor:
        done = self.ended and not self.starts
        if done:
            self._take(self.track.finish(), last=True)
        ready, self.ready = self.ready, self.ready[..., :0]
        if self.rate == RATE_HZ:
            return ready[:-1]
        flat = np.ascontiguousarray(ready.flatten(0, 1).T.cpu().numpy())
        back = torch.from_numpy(self.back.resample_chunk(flat, last=done).reshape(-1, flat.shape[1]).T.copy())
        if done:  # a resampler may be off by a sample at the end
            missing = self.samples - self.pulled
            back = F.pad(back[:, :missing], (0, max(0, missing - back.shape[1])))
        stems = back.to(self.device).view(self.stems + 1, self.channels, -1)
        count = stems.shape[2]
        unheard = torch.from_numpy(self.waiting[:, :count]).to(self.device) - stems[-1]
        self.waiting = self.waiting[:, count:]
        return torch.addcmul(stems[:-1], self._gain(count)[:, None], unheard)

    def _gain(self, count: int) -> Tensor:
        """Of the next `count` samples, float32 `[stems, count]`."""
        at = torch.arange(self.pulled, self.pulled + count, dtype=torch.float64, device=self.device)
        self.pulled += count
        at = (at * (RATE_HZ / HOP / self.rate) - self.gain_frame).clamp(max=self.gains.shape[1] - 1)
        lower, upper = at.floor().long(), at.ceil().long()
        gain = torch.lerp(self.gains[:, lower], self.gains[:, upper], (at - lower).float())
        past = int(lower[-1]) if count else 0
        self.gains, self.gain_frame = self.gains[:, past:], self.gain_frame + past
        return gain


class _Joined:
    """Cross-fades the masks of overlapping windows, `[stems, frames, bins]`, in the middle of what they share."""

    def __init__(self) -> None:
        self.start = 0  # the first frame held
        self.held: Tensor | None = None

    def add(self, start: int, masks: Tensor) -> Tensor | None:
        """Add the masks of the window at frame `start`; return the frames before it, now final."""
        if self.held is None:
            self.held = masks
            return None
        final, before = self.held.tensor_split([start - self.start], dim=1)
        shared = before.shape[1]
        fade = min(FADE, shared)
        at = torch.arange(1, shared + 1, device=masks.device)
        weight = ((at - (shared - fade) // 2) / (fade + 1)).clamp(0, 1)[:, None]
        joined = (1 - weight) * before + weight * masks[:, :shared]
        self.held, self.start = torch.cat([joined, masks[:, shared:]], 1), start
        return final

    def finish(self) -> Tensor | None:
        """The frames still held."""
        return self.held


class _Masked:
    """A stream at 32 kHz, masked as by a centred STFT of the whole, reflected at its ends. One more is unmasked."""

    def __init__(self, n_fft: int, stems: int, channels: int, device: torch.device) -> None:
        self.n_fft, self.stems, self.channels = n_fft, stems, channels
        self.window = torch.hann_window(n_fft, device=device)
        self.audio = torch.zeros(channels, 0, device=device)  # begins where the next frame does
        self.as_it_was = torch.zeros(channels, 0, device=device)
        self.sums = torch.zeros(stems * channels, n_fft - HOP, device=device)  # overlap-add, to be added to
        self.envelope = torch.zeros(1, n_fft - HOP, device=device)  # sum of squared windows, likewise
        self.begun = False

    def push(self, audio: Tensor) -> None:
        self.audio = torch.cat([self.audio, audio], 1)
        self.as_it_was = torch.cat([self.as_it_was, audio], 1)

    def apply(self, masks: Tensor, last: bool) -> Tensor:
        """What the next frames complete, `[stems + 1, channels, samples]`; with the `last` of them, all the rest."""
        half, rest = self.n_fft // 2, self.as_it_was.shape[1]
        if not self.begun:
            self.audio = F.pad(self.audio, (0, max(0, half + 1 - self.audio.shape[1])))
            self.audio = F.pad(self.audio[None], (half, 0), mode="reflect")[0]
        if last:
            self.audio = F.pad(self.audio[None], (0, half), mode="reflect")[0]
        step = max(1, VALUES_AT_ONCE // (len(self.sums) * masks.shape[2]))
        parts = [self._frames(masks[:, at : at + step]) for at in range(0, masks.shape[1], step)]
        if last:
            parts.append(self.sums / self.envelope.clamp(min=1e-8))
        out = torch.cat(parts, 1)
        if not self.begun:
            out = out[:, half:]
        self.begun = True
        count = rest if last else out.shape[1]
        heard, self.as_it_was = self.as_it_was[:, :count], self.as_it_was[:, count:]
        return torch.cat([out[:, :count].reshape(self.stems, self.channels, -1), heard[None]])

    def _frames(self, masks: Tensor) -> Tensor:
        count = masks.shape[1]
        done = count * HOP
        frames = self.audio[:, : done - HOP + self.n_fft].unfold(1, self.n_fft, HOP) * self.window
        spectra = (torch.fft.rfft(frames) * masks[:, None]).flatten(0, 1)
        sums = self._added(torch.fft.irfft(spectra, self.n_fft) * self.window, self.sums)
        envelope = self._added(self.window.square().expand(1, count, -1), self.envelope)
        self.audio, self.sums, self.envelope = self.audio[:, done:], sums[:, done:], envelope[:, done:]
        return sums[:, :done] / envelope[:, :done]

    def _added(self, pieces: Tensor, before: Tensor) -> Tensor:
        """`[rows, frames, n_fft]`, overlapping, added to what came `before`: `[rows, (frames − 1) · hop + n_fft]`."""
        span = (pieces.shape[1] - 1) * HOP + self.n_fft
        sums = F.fold(pieces.transpose(1, 2), (1, span), (1, self.n_fft), stride=(1, HOP))[:, 0, 0]
        sums[:, : before.shape[1]] += before
        return sums
