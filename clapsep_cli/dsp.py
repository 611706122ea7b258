"""Signal processing that the networks are defined by: STFT, its inverse, windowed-sinc resampling, mel filters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE_HZ = 32_000
N_FFT = 1024  # samples, window and transform alike
HOP = 320  # samples, at RATE_HZ
FRAMES_AT_ONCE = 128  # whose spectra stay in a processor's cache


@lru_cache(maxsize=8)
def _hann(device: torch.device, dtype: torch.dtype) -> Tensor:
    # Never an inference tensor: one made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        return torch.hann_window(N_FFT, periodic=True, device=device, dtype=dtype)


def spectrum(x: Tensor, hop: int = HOP) -> Tensor:
    """Compute the STFT with a 1024-point periodic Hann window, centred, reflected at the ends.

    Args:
        x: float32 `[samples]` or `[batch, samples]`, more than 512 samples.
        hop: samples between frames.

    Returns:
        complex64 `[(batch,) samples // hop + 1 frames, 513 bins]`.
    """
    bins_first = torch.stft(x, N_FFT, hop, window=_hann(x.device, x.dtype), pad_mode="reflect", return_complex=True)
    return bins_first.transpose(-1, -2)


def spectra(x: Tensor, window: Tensor | None = None) -> Iterator[Tensor]:
    """Compute the STFT, `FRAMES_AT_ONCE` frames at a time: faster where little is kept of each spectrum.

    Args:
        x: float32 `[batch, samples]`, more than 512 samples.
        window: float32 `[1024]`; the signal then has zeros around it. None for the window and ends of `spectrum`.

    Yields:
        complex64 `[batch, frames, 513]`.
    """
    half = N_FFT // 2
    if window is None:
        window = _hann(x.device, x.dtype)
        x = torch.cat([x[:, 1 : half + 1].flip(1), x, x[:, -half - 1 : -1].flip(1)], 1)
    else:
        x = F.pad(x, (half, half))
    for frames in torch.split(x.unfold(1, N_FFT, HOP), FRAMES_AT_ONCE, 1):
        yield torch.fft.rfft(frames * window)


def power(spec: Tensor) -> Tensor:
    """Compute |spec|², float32, without the square root of `abs`."""
    return torch.addcmul(spec.real.square(), spec.imag, spec.imag)


def waveform(spec: Tensor, length: int) -> Tensor:
    """Invert `spectrum`: complex64 `[(batch,) frames, 513]` to float32 `[(batch,) length samples]`."""
    window = _hann(spec.device, spec.real.dtype)
    return torch.istft(spec.transpose(-1, -2), N_FFT, HOP, window=window, length=length)


def masked(spec: Tensor, mask: Tensor, length: int) -> Tensor:
    """Apply a mask to a spectrum and return the waveform.

    Args:
        spec: from `spectrum`, complex64 `[(batch,) frames, 513]`.
        mask: of that shape, or one that broadcasts to it, float32.
        length: samples of the waveform.

    Returns:
        float32 `[(batch,) length]`.
    """
    return waveform(spec * mask, length)


class Resampler(nn.Module):
    """Windowed-sinc resampling between two fixed rates: Hann window, low-pass width 6, roll-off 0.99.

    These are torchaudio's defaults, which the released weights were trained with. All output samples of a block come
    of one product with the input around it: for 32 → 48 kHz, blocks of 16 samples in and 24 out.
    """

    LOWPASS_WIDTH = 6  # zero crossings of the sinc on either side
    ROLLOFF = 0.99  # cut-off over the lower Nyquist frequency
    BLOCK = 16  # samples in, about; more would be multiplied by zeros for the most part

    kernel: Tensor

    def __init__(self, rate_in: int, rate_out: int) -> None:
        super().__init__()
        common = math.gcd(rate_in, rate_out)
        step_in, step_out = rate_in // common, rate_out // common
        cutoff = min(step_in, step_out) * self.ROLLOFF
        self.ratio = Fraction(step_out, step_in)
        self.reach = math.ceil(self.LOWPASS_WIDTH * step_in / cutoff)
        self.block = max(1, self.BLOCK // step_in) * step_in
        # In units of one step; the Hann window is zero where its argument is clamped.
        heard = torch.arange(-self.reach, self.block + self.reach, dtype=torch.float64, device="cpu") / step_in
        told = torch.arange(int(self.block * self.ratio), dtype=torch.float64, device="cpu") / step_out
        t = ((heard[:, None] - told) * cutoff).clamp(-self.LOWPASS_WIDTH, self.LOWPASS_WIDTH)
        kernel = torch.sinc(t) * torch.cos(t * math.pi / self.LOWPASS_WIDTH / 2).square() * (cutoff / step_in)
        self.register_buffer("kernel", kernel.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resample float32 `[batch, samples]` to `[batch, ceil(samples · rate_out / rate_in)]`."""
        samples = x.shape[-1]
        rest = -samples % self.block
        blocks = F.pad(x, (self.reach, self.reach + rest)).unfold(-1, len(self.kernel), self.block)
        return (blocks @ self.kernel).flatten(1)[:, : math.ceil(samples * self.ratio)]


def mel_filters(rate: int, bands: int, low: float, high: float) -> Tensor:
    """Make triangles of equal area between `low` and `high` Hz, on Slaney's mel scale: float32 `[513, bands]`."""
    edges = _mel_to_hz(torch.linspace(hz_to_mel(low), hz_to_mel(high), bands + 2, dtype=torch.float64, device="cpu"))
    bins = torch.linspace(0, rate / 2, N_FFT // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return (triangles * (2 / (right - left))).float()


# Slaney's mel scale: linear up to 1000 Hz (mel 15), then 27 mels for each factor of 6.4.
_LINEAR_HZ_PER_MEL = 200 / 3
_LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: float) -> float:
    """Convert a frequency to mels, on Slaney's scale."""
    return hz / _LINEAR_HZ_PER_MEL if hz < 1000 else 15 + math.log(hz / 1000) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * _LINEAR_HZ_PER_MEL, 1000 * torch.exp((mel - 15) * _LOG_STEP))
