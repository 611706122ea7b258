"""AudioSep (arXiv 2308.05037): extracts from a mixture what a text describes.

A U-Net of residual blocks processes the magnitude of the mixture's spectrum; the embedding of the text shifts the
channels of every block. It makes a complex mask, which also turns the phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.dsp import HOP, RATE_HZ
from clapsep_cli.models.base import ConditionedSeparator, go_on
from clapsep_cli.models.clapsep import TextSize
from clapsep_cli.models.htsat import BinNorm
from clapsep_cli.models.resunet import MOMENTUM, Decoder, Encoder, ResidualBlock, Rows

N_FFT = 2048  # samples, window and transform alike; its hop is CLAPSep's
FEWEST = N_FFT // 2 + 1  # samples that can be reflected
QUIETEST = 1e-10  # to which the power of a bin is raised
HELD_BYTES = 33_000_000  # just below the 32 MiB above which glibc gives every block back at once


@dataclass(frozen=True)
class AudioSepConfig(TextSize):
    """Size of an AudioSep and of the CLAP text tower it was made with; the defaults are the released size.

    Raises `ValueError` where the numbers do not fit together.
    """

    text_tokens: int = 512
    window: int = 1023 * HOP  # samples: of its frames, none is padding
    widths: tuple[int, ...] = (32, 64, 128, 256, 384, 384)  # channels of the encoder's blocks, from fine to coarse

    def __post_init__(self) -> None:
        checks = {
            "all sizes are positive": min(self.dim, *self.widths) > 0,
            "a window can be reflected": self.window >= FEWEST,
            "a window is a multiple of the hop": self.window % HOP == 0,
            "the bins can be halved at every level": 0 < len(self.widths) < N_FFT.bit_length() - 1,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"not an AudioSep size, it must hold that {', '.join(broken)}: {self}")

    @property
    def grid(self) -> int:
        """Windows have to start on multiples of this many samples, the length of the coarsest cell."""
        return HOP << len(self.widths) - 1


def spectrum(x: Tensor) -> Tensor:
    """Compute the STFT of float32 `[batch, samples]`, 1025 samples or more: 2048-point periodic Hann, reflected.

    Returns complex64 `[batch, samples // 320 + 1 frames, 1025 bins]`.
    """
    window = torch.hann_window(N_FFT, device=x.device)
    return torch.stft(x, N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True).transpose(1, 2)


def waveform(spec: Tensor, samples: int) -> Tensor:
    """Inverse of `spectrum`: float32 `[batch, samples]`."""
    return torch.istft(
        spec.transpose(1, 2), N_FFT, HOP, window=torch.hann_window(N_FFT, device=spec.device), length=samples
    )


class AudioSep(ConditionedSeparator[Tensor]):
    """Separates by conditions, one for each stem: float32 `[stems, dim]`, rows of length 1."""

    rate = RATE_HZ

    def __init__(self, config: AudioSepConfig) -> None:
        super().__init__()
        self.config = config
        self.window = config.window
        self.dtype = torch.float32  # in which it convolves
        widths, dim = config.widths, config.dim
        cells = [(2, 2)] * (len(widths) - 1) + [(1, 2)]
        self.norm = BinNorm(N_FFT // 2 + 1, momentum=MOMENTUM)
        self.stem = nn.Conv2d(1, widths[0], 1)
        self.encoders = nn.ModuleList(
            Encoder(into, out, cell, dim) for into, out, cell in zip((widths[0], *widths), widths, cells, strict=False)
        )
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], dim)
        self.decoders = nn.ModuleList(
            Decoder(into, out, cell, dim)
            for into, out, cell in zip((widths[-1], *widths[::-1]), widths[::-1], cells[::-1], strict=False)
        )
        self.head = nn.Conv2d(widths[0], 3, 1)
        self.prepared = False
        self.register_load_state_dict_post_hook(AudioSep._forget)  # type: ignore[no-untyped-call]

    def lower(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def infer(self, windows: Tensor, wanted: Tensor, check: Callable[[], None] = go_on) -> Tensor:
        """Return complex masks, complex64 `[batch, stems, frames, 1025]`; all windows of a batch have one length."""
        spec = spectrum(F.pad(windows, (0, max(0, FEWEST - windows.shape[1]))))
        image = self.hear(spec)
        masks = []
        for condition in wanted:
            check()  # a mask takes seconds
            masks.append(self.mask(image, condition.expand(len(windows), -1))[:, : spec.shape[1]])
        return torch.stack(masks, 1)

    def estimate(self, mixtures: Tensor, conditions: Iterable[Tensor]) -> Iterator[Tensor]:
        """Extract from `mixtures`, of any length, under each of `conditions`."""
        for condition in conditions:
            yield self(mixtures, condition.expand(len(mixtures), -1))

    def forward(self, audio: Tensor, condition: Tensor) -> Tensor:
        """Extract what `condition` (`[batch, dim]`) describes from `audio`, both float32 `[batch, samples]`."""
        samples = audio.shape[1]
        spec = spectrum(F.pad(audio, (0, max(0, FEWEST - samples))))
        return waveform(self.mask(self.hear(spec), condition)[:, : spec.shape[1]] * spec, samples)

    def hear(self, spec: Tensor) -> Tensor:
        """Normalise the magnitudes of a spectrum: `[batch, 1, frames, 1024]`, with frames of zeros behind them."""
        magnitude = (spec.real.square() + spec.imag.square()).clamp(min=QUIETEST).sqrt()
        image: Tensor = self.norm(magnitude)[:, None, :, :-1]
        return F.pad(image, (0, 0, 0, -image.shape[2] % (self.config.grid // HOP)))

    def mask(self, image: Tensor, condition: Tensor) -> Tensor:
        """Compute a mask: complex64 `[batch, frames, 1025]`, of modulus 0 to 1; zero in the last bin.

        `image`: from `hear`, with as many frames; `condition`: float32 `[batch, dim]`.
        """
        lowered = self.dtype != torch.float32
        with torch.autocast(image.device.type, self.dtype) if lowered else nullcontext():
            if image.device.type == "cpu" and not (lowered or self.training or torch.is_grad_enabled()):
                maps = torch.cat([self._quick(i[None], c) for i, c in zip(image, condition, strict=True)])
            else:
                maps = self.maps(image, condition)
        size, across, along = maps.float().unbind(1)
        turn = torch.complex(across.tanh(), along.tanh())
        return F.pad(size.sigmoid() * turn / turn.abs().clamp(min=QUIETEST), (0, 1))

    def maps(self, image: Tensor, condition: Tensor) -> Tensor:
        """Run the network: `[batch, 1, frames, bins]` to three maps, `[batch, 3, frames, bins]`."""
        x, kept = self.stem(image), []
        for encoder in self.encoders:
            keep, x = encoder(x, condition)
            kept.append(keep)
        x = self.bottleneck(x, condition)
        for decoder in self.decoders:
            x = decoder(x, kept.pop(), condition)
        maps: Tensor = self.head(x)
        return maps

    def _quick(self, image: Tensor, condition: Tensor) -> Tensor:
        """Compute `maps` of one image for one condition (`[dim]`), in inference on a processor."""
        self._prepare()
        # Once a block of this size was freed, glibc keeps what is freed later, instead of having it mapped again.
        torch.empty(HELD_BYTES, dtype=torch.uint8)
        _, _, frames, bins = image.shape
        weight, bias = self.stem.weight.flatten(), cast(Tensor, self.stem.bias)

        def stem(begin: int, end: int) -> Tensor:
            return torch.addcmul(bias, image[0, 0, begin:end, :, None], weight).permute(2, 0, 1)[None]

        source: Rows = stem
        kept = []
        for encoder in cast(Iterable[Encoder], self.encoders):
            keep, x = encoder.quick(source, (1, frames, bins), condition)
            kept.append(keep)
            frames, bins = x.shape[2:]
            source = _rows_of(x)
        x = torch.cat([piece for _, piece in self.bottleneck.pieces(source, frames, condition)], 2)
        *decoders, last = cast(Iterable[Decoder], self.decoders)
        for decoder in decoders:
            x = decoder.quick_image(x, kept.pop(), condition)
        pieces = last.quick(x, kept.pop(), condition)
        weight = self.head.weight.flatten(1)
        maps = [F.linear(piece.permute(0, 2, 3, 1), weight, self.head.bias) for _, piece in pieces]
        return torch.cat(maps, 1).permute(0, 3, 1, 2)

    def _prepare(self) -> None:
        if self.prepared:
            return
        bins = N_FFT // 2
        for encoder, decoder in zip(self.encoders, reversed(self.decoders), strict=True):
            for block in (encoder.block, decoder.block):
                cast(ResidualBlock, block).prepare(bins)
            bins //= cast(Encoder, encoder).cell[1]
        self.bottleneck.prepare(bins)
        self.prepared = True

    def _forget(self, *_: object) -> None:
        self.prepared = False

    def train(self, mode: bool = True) -> AudioSep:
        self.prepared = False  # weights may change from now on
        return super().train(mode)


def _rows_of(image: Tensor) -> Rows:
    return lambda begin, end: image[:, :, begin:end]
