"""Applies masks made at 32 kHz to recordings of any rate and channel count, as a stream.

A mask is taken as a function of time (a value every 10 ms) and frequency (every 31.25 Hz). The recording is analysed
at its own rate with the same 32 ms window and 10 ms hop, so nothing is resampled, every channel keeps its phase, and
at 32 kHz this is exactly the STFT that the mask was made for. Above 16 kHz, where the model hears nothing, each frame
carries on the mean of the mask's top band (14–16 kHz).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.audio.samples import PEAK
from clapsep_cli.dsp import HOP, N_FFT, RATE_HZ
from clapsep_cli.stitch.windows import OVERLAP_FRAMES, Stream, Windower

TOP_BINS = 64  # of the mask, 14–16 kHz
VALUES_AT_ONCE = 2**19  # spectral values handled in one go: they stay in a processor's cache
FRAMES_AT_ONCE = 100  # likewise: nothing is held back for long


class MaskedRecording(Stream):
    """Masks a recording at its own rate. A separator hears windows of its downmix at 32 kHz and returns their masks.

    The masks of the windows are cross-faded into one mask a stem. `audio`, `mask` and `sums` all begin at the next
    frame to be computed; only what is unfinished is held.

    Args:
        window: length of the separator's window, in samples at 32 kHz.
        stems: number of stems; each has a mask of its own.
        rate: sample rate of the recording in Hz.
        channels: number of channels of the recording.
        device: where masks are applied.
        spread: where the separator returns masks of fewer bands: the share of each band in each of the 513 bins,
            float32 `[bands, 513]`.
    """

    mono = True

    def __init__(
        self, window: int, stems: int, rate: int, channels: int, device: torch.device, spread: Tensor | None = None
    ) -> None:
        super().__init__(Windower(window, 1), device)
        self.stems, self.channels, self.rate = stems, channels, rate
        spread = torch.eye(N_FFT // 2 + 1, device=device) if spread is None else spread
        self.track = MaskTrack(stems, len(spread), device)
        self.hop = max(1, round(rate * HOP / RATE_HZ))
        self.half = max(1, round(rate * N_FFT / RATE_HZ / 2))  # of the analysis window, in samples
        self.size = 2 * self.half
        self.n_fft = _smooth(self.size)
        self.step = max(1, min(FRAMES_AT_ONCE, VALUES_AT_ONCE // (channels * (self.n_fft // 2 + 1))))
        self._make_windows()
        self.audio = torch.zeros(channels, 0, device=device)
        self.arrived: list[Tensor] = []  # audio behind that, to be joined when it is needed
        self.mask = torch.zeros(stems, 0, len(spread), device=device)
        self.sums = torch.zeros(stems, channels, len(self.rising), device=device)  # overlap-add, to be added to
        self.frame = 0  # the next one to be computed; the first begins with the reflection before the recording
        self.frames_per_hop = self.hop / rate * RATE_HZ / HOP  # of the mask: 1 at rates that are a multiple of 100
        self.mask_frame = 0  # the first one held
        bins = torch.arange(self.n_fft // 2 + 1, dtype=torch.float64) * (rate / self.n_fft / (RATE_HZ / N_FFT))
        inside = bins[bins <= N_FFT // 2].to(device)
        # The share of each band, or bin, of the mask in each bin of the spectrum.
        top = spread[:, -TOP_BINS:].mean(1, keepdim=True).expand(-1, len(bins) - len(inside))
        self.spread = torch.cat([_interpolate(spread, inside, 1), top], 1)

    def _make_windows(self) -> None:
        """Compute the windows of analysis and synthesis, and the gains that complete both ends of the recording."""
        hann = torch.hann_window(self.size, dtype=torch.float64, device="cpu")
        # Frames that are windowed twice and added up have to be divided by the sum of the squared windows. It repeats
        # every hop, so the second window is divided instead. Cut into rows of a hop, the windows' squares sum to:
        sums = F.pad(hann.square(), (0, -self.size % self.hop)).view(-1, self.hop).cumsum(0)
        whole = sums[-1]
        synthesis = hann / whole.repeat(len(sums))[: self.size]
        # No frames come before the first: its row i lies only in the rows 0 to i of windows. None come after the last:
        # its row i + 1 lies only in those after i.
        rising, falling = (whole / part.clamp(min=1e-8) for part in (sums[:-1], whole - sums[:-1]))
        self.analysis = F.pad(hann, (0, self.n_fft - self.size)).float().to(self.device)
        self.synthesis = synthesis.float().to(self.device)
        self.rising, self.falling = (gain.flatten().float().to(self.device) for gain in (rising, falling))

    def push(self, block: NDArray[np.float32], heard: NDArray[np.float32], last: bool = False) -> list[Tensor]:
        self.arrived.append(torch.from_numpy(block).to(self.device))
        windows = [window for (window,) in self._cut(block, heard, last)]
        for window in windows:
            if (peak := float(np.abs(window).max())) > 1:
                window *= np.float32(PEAK / peak)
        return [torch.from_numpy(window).to(self.device) for window in windows]

    def accept(self, result: Tensor) -> None:
        """`result`: the masks of a window, float32 `[stems, frames, bins or bands]`."""
        self.mask = torch.cat([self.mask, self.track.add(self.starts.pop(0) // HOP, result)], 1)

    def pull(self) -> Tensor:
        nothing = self.audio.new_zeros(self.stems, self.channels, 0)
        if self.complete:
            rest = self.track.finish()
            self.mask = torch.cat([self.mask, rest], 1)
            return self._rest() if rest.shape[1] else nothing
        held = self.audio.shape[1] + sum(audio.shape[1] for audio in self.arrived)
        begin = self.half if self.frame == 0 else 0  # still to be reflected
        if held <= begin:
            return nothing
        audible = (begin + held - self.n_fft) // self.hop + 1
        masked = math.ceil((self.mask_frame + self.mask.shape[1] - 1) / self.frames_per_hop) - self.frame
        # In steps that begin at fixed frames: the last bits of an FFT or a product depend on how many go in at once.
        count = min(audible, masked) // self.step * self.step
        return self._compute(count) if count > 0 else nothing

    def _rest(self) -> Tensor:
        """Compute what is left of the recording, once all masks are there."""
        # A recording shorter than a window is heard with silence behind it, not with its end reflected.
        padding = max(0, -(-self.windower.window * self.rate // RATE_HZ) - self.samples)
        padded = self.samples + padding
        # The last frame is centred at or after the end, and hears the end reflected, as a centred STFT does.
        last = math.ceil(padded / self.hop)
        audio = torch.cat([self.audio, *self.arrived, self.audio.new_zeros(self.channels, padding)], 1)
        self.audio, self.arrived = _reflect(audio, 0, last * self.hop + self.half - padded), []
        self.audio = F.pad(self.audio, (0, self.n_fft - self.size))
        before = max(0, self.frame * self.hop - self.half)
        rest = torch.cat([self._compute(last + 1 - self.frame), self.sums * self.falling], 2)
        return rest[..., : self.samples - before]

    def _compute(self, count: int) -> Tensor:
        """Compute the samples that the next `count` frames complete, `[stems, channels, samples]`."""
        if count > 0 and self.frame == 0:
            self._join(self.half + 1)
            self.audio = _reflect(self.audio, self.half, 0)
        begin, done = self.frame * self.hop, count * self.hop
        masks, sums = self._masks(count), F.pad(self.sums, (0, done))
        for at in range(0, count, self.step):
            self._add(masks[:, at : at + self.step], sums[..., at * self.hop :])
        rising = self.rising[begin : begin + done]
        sums[..., : len(rising)] *= rising
        self.frame += count
        self.sums = sums[..., done:]
        return sums[..., min(max(0, self.half - begin), done) : done]

    def _join(self, samples: int) -> None:
        """Join the next of the blocks that arrived, until `audio` holds so many samples."""
        while self.arrived and self.audio.shape[1] < samples:
            self.audio = torch.cat([self.audio, self.arrived.pop(0)], 1)

    def _add(self, masks: Tensor, sums: Tensor) -> None:
        """Mask the next frames, as many as `masks` has, and add them to the first of `sums`."""
        count, hops = masks.shape[1], -(-self.size // self.hop)
        self._join(span := (count - 1) * self.hop + self.n_fft)
        spectra = torch.fft.rfft(self.audio[:, :span].unfold(1, self.n_fft, self.hop) * self.analysis)
        self.audio = self.audio[:, count * self.hop :]
        # Stem by stem: one product for all would round by their number.
        for mask, stem in zip(masks, sums[..., : (count + hops - 1) * self.hop], strict=True):
            pieces = torch.fft.irfft(spectra * (mask @ self.spread), self.n_fft)
            rows = stem.unflatten(1, (-1, self.hop))  # frame i lasts from row i on, `hops` rows long
            for row, window in enumerate(torch.split(self.synthesis, self.hop)):
                part = pieces[..., row * self.hop :][..., : len(window)]
                rows[:, row : row + count, : len(window)].addcmul_(part, window)

    def _masks(self, count: int) -> Tensor:
        """Interpolate the masks at the next `count` frames, `[stems, count, bins or bands]`; drop those before."""
        at = (self.frame + torch.arange(count + 1, dtype=torch.float64)) * self.frames_per_hop - self.mask_frame
        held = self.mask.shape[1]
        masks = _interpolate(self.mask, at[:count].clamp(max=held - 1).to(self.mask.device), 1)
        past = min(int(at[count]), held - 1)
        self.mask, self.mask_frame = self.mask[:, past:], self.mask_frame + past
        return masks


class MaskTrack:
    """Cross-fades the masks of overlapping windows into one. Weights rise and fall linearly over the overlap.

    Masks are `[stems, frames, bins or bands]`. Only frames that a later window can still change are held.
    """

    def __init__(self, stems: int, bins: int, device: torch.device) -> None:
        self.start = 0  # the first frame held
        self.sum = torch.zeros(stems, 0, bins, device=device)  # weighted masks
        self.weight = torch.zeros(0, device=device)

    def add(self, start: int, mask: Tensor) -> Tensor:
        """Add the mask of the window at frame `start`; return the frames before it, now final."""
        final, frames = self._take(start - self.start), mask.shape[1]
        ramp = torch.arange(1, frames + 1, device=mask.device)
        weight = torch.minimum(ramp, ramp.flip(0)).clamp(max=OVERLAP_FRAMES).float() / OVERLAP_FRAMES
        at = start - self.start
        extra = at + frames - self.sum.shape[1]
        self.sum, self.weight = F.pad(self.sum, (0, 0, 0, extra)), F.pad(self.weight, (0, extra))
        self.sum[:, at:] += mask * weight[:, None]
        self.weight[at:] += weight
        return final

    def finish(self) -> Tensor:
        """Return the frames still held."""
        return self._take(self.sum.shape[1])

    def _take(self, count: int) -> Tensor:
        final = self.sum[:, :count] / self.weight[:count, None]
        self.sum, self.weight, self.start = self.sum[:, count:], self.weight[count:], self.start + count
        return final


def _smooth(size: int) -> int:
    """Return the next length without a prime factor over 5, fast for FFTs. (SciPy takes 0.3 s to import for this.)"""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _reflect(audio: Tensor, before: int, after: int) -> Tensor:
    return F.pad(audio[None], (before, after), mode="reflect")[0]


def _interpolate(values: Tensor, at: Tensor, axis: int) -> Tensor:
    """Interpolate `values` linearly at fractional indices `at` along `axis`; exact where `at` is whole."""
    lower, fraction = at.floor().long(), (at - at.floor()).float()
    if not fraction.any():
        return values.index_select(axis, lower)
    upper = (lower + 1).clamp(max=values.shape[axis] - 1)
    fraction = fraction.view(*(-1 if i == axis else 1 for i in range(values.dim())))
    return torch.lerp(values.index_select(axis, lower), values.index_select(axis, upper), fraction)
