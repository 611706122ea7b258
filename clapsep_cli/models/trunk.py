"""YAMNet's convolutions: a network that was trained to tell 521 kinds of sounds apart, here left as it is.

Its weights come from Google's YAMNet (Apache 2.0, trained on AudioSet; `weights/make_trunk.py`). Its layers are those
of MobileNet v1: a depthwise 3×3 convolution and a pointwise one each, batch norms folded in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp

MELS, LOWEST_HZ, HIGHEST_HZ = 64, 125.0, 7500.0
ANALYSIS = 800  # samples of a frame, 25 ms; frames are 10 ms apart, as those of `dsp.spectrum`
FLOOR = 1e-3  # added to the amplitude of a mel band before the logarithm
QUIETEST = 1e-4  # peak of a recording that is still brought to full scale
CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # of the separable layers
HALVING = frozenset((1, 3, 5, 11))  # of the separable layers; the first convolution halves, too
MAPS = {2: 128, 4: 256, 10: 512, 12: 1024}  # channels of the maps that are returned, after these separable layers
STRIDES = (4, 8, 16, 32)  # of these maps, in frames and in mel bands


def mel_bands() -> Tensor:
    """Return triangles between edges that are even on HTK's mel scale, peaks of 1: float32 `[bins, MELS]`, without the
    bins from `HIGHEST_HZ` on, which no band hears.
    """
    with torch.device("cpu"):

        def mel(hertz: Tensor) -> Tensor:
            return 2595 * torch.log10(1 + hertz / 700)

        ends = mel(torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64))
        edges = torch.linspace(ends[0].item(), ends[1].item(), MELS + 2, dtype=torch.float64)
        bins = mel(torch.arange(0, HIGHEST_HZ, dsp.RATE_HZ / dsp.N_FFT, dtype=torch.float64))[:, None]
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0).float()


def mel_centres(rows: int) -> Tensor:
    """Return the centre frequencies in Hz of the `rows` of a map, float64 `[rows]`."""
    with torch.device("cpu"):
        low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST_HZ, HIGHEST_HZ))
        at = (torch.arange(rows, dtype=torch.float64) + 0.5) * (MELS / rows) + 0.5
        return 700 * (10 ** ((low + (high - low) * at / (MELS + 1)) / 2595) - 1)


class Trunk(nn.Module):
    """From recordings at 32 kHz to maps of features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, stride=2)]
        before = 32
        for number, channels in enumerate(CHANNELS):
            stride, padding = (2, 0) if number in HALVING else (1, 1)
            layers.append(nn.Conv2d(before, before, 3, stride=stride, padding=padding, groups=before))
            layers.append(nn.Conv2d(before, channels, 1))
            before = channels
        self.layers = nn.ModuleList(layers)
        self.register_buffer("mel", mel_bands(), persistent=False)
        around = (dsp.N_FFT - ANALYSIS) // 2
        analysis = F.pad(torch.hann_window(ANALYSIS, device="cpu"), (around, around))
        self.register_buffer("analysis", analysis, persistent=False)
        self.mel: Tensor
        self.analysis: Tensor
        self.requires_grad_(False)

    def hear(self, audio: Tensor) -> Tensor:
        """Compute log mel bands of recordings at full scale.

        Args:
            audio: float32 `[batch, samples]`.

        Returns:
            float32 `[batch, 1, frames, MELS]`; a multiple of 32 frames.
        """
        peak = audio.abs().amax(1).clamp(min=QUIETEST)[:, None, None]
        heard = [dsp.power(each[..., : len(self.mel)]).sqrt_() @ self.mel for each in dsp.spectra(audio, self.analysis)]
        # At half the rate, as the network was trained, a frame has half the samples.
        bands = torch.log(torch.cat(heard, 1) / (2 * peak) + FLOOR)
        return one_channel(F.pad(bands, (0, 0, 0, -bands.shape[1] % STRIDES[-1]), value=math.log(FLOOR)))

    def forward(self, bands: Tensor) -> list[Tensor]:
        """Compute the maps, from fine to coarse.

        Args:
            bands: from `hear`.

        Returns:
            For each of `STRIDES`, float32 `[batch, channels, frames / stride, MELS / stride]`, not negative.
        """
        x, maps = bands, []
        for number, layer in enumerate(self.layers):
            if layer.stride == (2, 2):
                x = ended(x)
            x = F.relu_(pointwise(layer, x) if layer.kernel_size == (1, 1) else layer(x))
            if number % 2 == 0 and number // 2 - 1 in MAPS:
                maps.append(x)
        return maps


def one_channel(values: Tensor) -> Tensor:
    """Make a map of one channel, `[batch, 1, frames, bands]`, in a layout of which convolutions make channels last."""
    return values[..., None].permute(0, 3, 1, 2)


def ended(x: Tensor) -> Tensor:
    """Add a frame and a row of zeros at the end, as TensorFlow pads where it halves. (`F.pad` would first fill all.)"""
    batch, channels, frames, rows = x.shape
    padded = x.new_empty(batch, frames + 1, rows + 1, channels).permute(0, 3, 1, 2)
    padded[:, :, frames], padded[..., rows] = 0, 0
    padded[:, :, :frames, :rows] = x
    return padded


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1×1 convolution to a map with channels last, as a product. On one thread, its own way is slower."""
    assert isinstance(layer, nn.Conv2d)
    product = F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1))
    if layer.bias is not None:
        product += layer.bias  # a product that begins with it is slower, too
    return product.permute(0, 3, 1, 2)


def pooled(maps: list[Tensor], frames: int) -> Tensor:
    """Return what a recording sounds like on average, from its two coarsest maps.

    Args:
        maps: from `Trunk`.
        frames: how many frames of 10 ms count, from the start.

    Returns:
        Square roots of the channels' means, as they are more even: float32 `[batch, 1536]`.
    """
    ends = ((maps[-2], STRIDES[-2]), (maps[-1], STRIDES[-1]))
    means = [each[:, :, : max(1, round(frames / stride))].mean((2, 3)) for each, stride in ends]
    return torch.cat(means, 1).sqrt()
