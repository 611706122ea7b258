"""Applies complex masks, which turn phases, to recordings of any rate and channel count, as a stream.

A mask that turns phases is rough: values between its bins and frames cannot be interpolated. So it is applied at
32 kHz, to every channel as the model hears it, and the result is resampled to the recording's rate. What the model
never hears, above 16 kHz, is added at the recording's own rate, times the mean modulus of the mask's top band
(14–16 kHz).
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
    """Masks a recording at 32 kHz as by a centred STFT of the whole, reflected at its ends; the hop is 10 ms.

    Windows are heard as loud as they are, and end where the recording does. `audio`, `sums` and `envelope` all begin
    at the next frame to be computed; only what is unfinished is held.

    Args:
        window: length of the separator's window, in samples at 32 kHz.
        grid: samples on whose multiples windows start.
        n_fft: length of the STFT that the masks are made for, window and transform alike.
        stems: number of stems; each has a mask of its own.
        rate: sample rate of the recording in Hz.
        channels: number of channels of the recording.
        device: where masks are applied.
    """

    def __init__(
        self, window: int, grid: int, n_fft: int, stems: int, rate: int, channels: int, device: torch.device
    ) -> None:
        super().__init__(Windower(window, channels, window - (window - OVERLAP) // grid * grid, grid), device)
        self.stems, self.channels, self.rate, self.n_fft = stems, channels, rate, n_fft
        self.masks: Tensor | None = None  # of the last window, cross-faded: a later one can still change them
        self.mask_frame = 0  # the first one held
        self.hann = torch.hann_window(n_fft, device=device)
        self.audio = torch.zeros(channels, 0, device=device)
        self.unmasked = torch.zeros(channels, 0, device=device)  # the same, from what is not yet masked on
        self.sums = torch.zeros(stems * channels, n_fft - HOP, device=device)  # overlap-add, to be added to
        self.envelope = torch.zeros(1, n_fft - HOP, device=device)  # sum of squared windows, likewise
        self.begun = False
        self.ready = torch.zeros(stems + 1, channels, 0, device=device)  # stems, and what was heard, not yet pulled
        self.back = soxr.ResampleStream(RATE_HZ, rate, (stems + 1) * channels, "float32", "HQ")
        self.waiting = np.zeros((channels, 0), np.float32)  # the recording, from what was pulled on
        self.pulled = 0
        self.gains = torch.zeros(stems, 0, device=device)  # of what was not heard, by frames
        self.gain_frame = 0  # the first one held

    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        piece = torch.from_numpy(heard).to(self.device)
        self.audio, self.unmasked = torch.cat([self.audio, piece], 1), torch.cat([self.unmasked, piece], 1)
        if self.rate != RATE_HZ:
            self.waiting = np.concatenate([self.waiting, block], 1)
        before = len(self.starts)
        windows = self._cut(block, heard, last)
        ends = (max(1, self.heard - start) for start in self.starts[before:])
        return [
            torch.from_numpy(downmix(window[:, :end])).to(self.device)
            for window, end in zip(windows, ends, strict=True)
        ]

    def accept(self, result: Tensor) -> None:
        """`result`: the masks of a window, complex64 `[stems, frames, bins]`."""
        final = self._cross_fade(self.starts.pop(0) // HOP, result)
        if final is not None:
            self._apply(final)

    def _cross_fade(self, start: int, masks: Tensor) -> Tensor | None:
        """Join the masks of the window at frame `start`, in the middle of what it shares with the one before.

        Returns the frames before `start`, now final; None before the first window.
        """
        if self.masks is None:
            self.masks = masks
            return None
        final, before = self.masks.tensor_split([start - self.mask_frame], dim=1)
        shared = before.shape[1]
        fade = min(FADE, shared)
        at = torch.arange(1, shared + 1, device=masks.device)
        weight = ((at - (shared - fade) // 2) / (fade + 1)).clamp(0, 1)[:, None]
        joined = (1 - weight) * before + weight * masks[:, :shared]
        self.masks, self.mask_frame = torch.cat([joined, masks[:, shared:]], 1), start
        return final

    def _apply(self, masks: Tensor, last: bool = False) -> None:
        """Mask the next frames and keep the samples they complete; with the `last` of them, all the rest."""
        half = self.n_fft // 2
        if not self.begun:
            self.audio = F.pad(self.audio, (0, max(0, half + 1 - self.audio.shape[1])))
            self.audio = F.pad(self.audio[None], (half, 0), mode="reflect")[0]
        if last:
            self.audio = F.pad(self.audio[None], (0, half), mode="reflect")[0]
        step = max(1, VALUES_AT_ONCE // (len(self.sums) * masks.shape[2]))
        parts = [self._frames(masks[:, at : at + step]) for at in range(0, masks.shape[1], step)]
        if last:
            parts.append(self.sums / self.envelope.clamp(min=1e-8))
        masked = torch.cat(parts, 1)
        if not self.begun:
            masked = masked[:, half:]
        self.begun = True
        count = self.unmasked.shape[1] if last else masked.shape[1]
        heard, self.unmasked = self.unmasked[:, :count], self.unmasked[:, count:]
        stems = masked[:, :count].reshape(self.stems, self.channels, -1)
        self.ready = torch.cat([self.ready, torch.cat([stems, heard[None]])], 2)
        top = masks[..., -(masks.shape[2] // TOP) - 1 : -1]  # the last bin is a hole of the mask
        self.gains = torch.cat([self.gains, top.abs().mean(2)], 1)

    def _frames(self, masks: Tensor) -> Tensor:
        count = masks.shape[1]
        done = count * HOP
        frames = self.audio[:, : done - HOP + self.n_fft].unfold(1, self.n_fft, HOP) * self.hann
        spectra = (torch.fft.rfft(frames) * masks[:, None]).flatten(0, 1)
        sums = self._added(torch.fft.irfft(spectra, self.n_fft) * self.hann, self.sums)
        envelope = self._added(self.hann.square().expand(1, count, -1), self.envelope)
        self.audio, self.sums, self.envelope = self.audio[:, done:], sums[:, done:], envelope[:, done:]
        return sums[:, :done] / envelope[:, :done]

    def _added(self, pieces: Tensor, before: Tensor) -> Tensor:
        """Overlap-add `[rows, frames, n_fft]` to what came `before`: `[rows, (frames − 1) · hop + n_fft]`."""
        span = (pieces.shape[1] - 1) * HOP + self.n_fft
        sums = F.fold(pieces.transpose(1, 2), (1, span), (1, self.n_fft), stride=(1, HOP))[:, 0, 0]
        sums[:, : before.shape[1]] += before
        return sums

    def pull(self) -> Tensor:
        done = self.complete
        if done and self.masks is not None:
            self._apply(self.masks, last=True)
            self.masks = None
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
        """Interpolate the gain of what was not heard at the next `count` samples: float32 `[stems, count]`."""
        at = torch.arange(self.pulled, self.pulled + count, dtype=torch.float64, device=self.device)
        self.pulled += count
        at = (at * (RATE_HZ / HOP / self.rate) - self.gain_frame).clamp(max=self.gains.shape[1] - 1)
        lower, upper = at.floor().long(), at.ceil().long()
        gain = torch.lerp(self.gains[:, lower], self.gains[:, upper], (at - lower).float())
        past = int(lower[-1]) if count else 0
        self.gains, self.gain_frame = self.gains[:, past:], self.gain_frame + past
        return gain
