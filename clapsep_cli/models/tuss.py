"""TUSS (arXiv 2410.23987): separates a mixture into the sounds that a list of learned prompts names, one stem each.

The spectrum is split into 61 bands. A first stack processes it jointly with all prompts, so that the prompts share the
sounds among them; a second one computes the mask of each prompt's stem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.models.base import Separator, go_on
from clapsep_cli.models.locoformer import Stack
from clapsep_cli.models.prompts import PROMPTS

RATE_HZ = 48_000
N_FFT = 2048  # samples, window and transform alike
HOP = 512
BANDS = ((22, 2), (11, 4), (8, 12), (8, 24), (8, 48), (3, 66), (1, 67))  # how many bands, of how many bins each
QUIETEST = 1e-8  # added to a mixture's standard deviation before dividing by it
EPSILON = 1e-5  # of the bands' normalisation, under the root
HELD_BYTES = 33_000_000  # just below the 32 MiB above which glibc gives every block back at once


@dataclass(frozen=True)
class TussConfig:
    """Size of a TUSS; the defaults are those of the released medium model.

    Raises `ValueError` where the numbers do not fit together.
    """

    window: int = 6 * RATE_HZ  # samples that it was trained on; statistics run over all that is heard at once
    prompts: tuple[str, ...] = PROMPTS
    width: int = 64  # of the embedding of a band in a frame
    groups: int = 8  # of channels that are normalised together
    heads: int = 4
    cross_blocks: int = 4
    cross_attention: int = 128  # width of all heads
    cross_feed_forward: int = 384
    cross_kernels: tuple[int, int] = (4, 1)  # of the feed-forward layers, over bands and over frames
    conditional_blocks: int = 2
    conditional_attention: int = 96
    conditional_feed_forward: int = 256
    conditional_kernels: tuple[int, int] = (4, 4)
    positions: Literal["exact", "bf16"] = "exact"  # bf16: rounded, as when the released weights were trained

    def __post_init__(self) -> None:
        attention = (self.cross_attention, self.conditional_attention)
        checks = {
            "all sizes are positive": min(
                *(self.window, self.width, self.groups, self.heads, self.cross_blocks, self.conditional_blocks),
                *(self.cross_feed_forward, self.conditional_feed_forward, *attention),
                *(*self.cross_kernels, *self.conditional_kernels),
            )
            > 0,
            "prompts are named, each once": 0 < len(self.prompts) == len(set(self.prompts)) and all(self.prompts),
            "groups divide the width": self.groups > 0 and self.width % self.groups == 0,
            "a head has an even number of channels": self.heads > 0
            and all(a % (2 * self.heads) == 0 for a in attention),
            "positions are exact or bf16": self.positions in ("exact", "bf16"),
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"not a TUSS size, it must hold that {', '.join(broken)}: {self}")


MEDIUM = TussConfig()
LARGE = TussConfig(
    width=128, heads=8, cross_blocks=6, cross_attention=256, conditional_blocks=3, conditional_attention=192
)


def _window(like: Tensor) -> Tensor:
    return torch.hann_window(N_FFT, periodic=True, device=like.device).sqrt()


def spectrum(x: Tensor) -> Tensor:
    """Compute the STFT of float32 `[batch, samples]`: 2048-point root of a periodic Hann, centred, zeros at the ends.

    Returns complex64 `[batch, ceil(samples / 512) + 1 frames, 1025 bins]`.
    """
    padded = F.pad(x, (N_FFT // 2, N_FFT // 2 + -x.shape[-1] % HOP))
    return torch.stft(padded, N_FFT, HOP, window=_window(x), center=False, return_complex=True).transpose(1, 2)


def waveform(spec: Tensor, samples: int) -> Tensor:
    """Invert `spectrum`: float32 `[batch, samples]`."""
    return torch.istft(spec.transpose(1, 2), N_FFT, HOP, window=_window(spec), length=samples)


class BandNorm(nn.Module):
    """Layer normalisation of each band over its channels and all frames; scale and shift by band and channel."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, channels))
        self.bias = nn.Parameter(torch.zeros(count, channels))

    def forward(self, x: Tensor) -> Tensor:
        """`x`: `[batch, frames, count, channels]`."""
        variance, mean = torch.var_mean(x, (1, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + EPSILON) * self.weight + self.bias


class BandLinear(nn.Module):
    """A linear layer of its own for each of `count` bands: one batched product instead of many small ones."""

    def __init__(self, count: int, width_in: int, width_out: int) -> None:
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(count, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, width_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """`[count, positions, width_in]` to `[count, positions, width_out]`."""
        return torch.baddbmm(self.bias, x, self.weight)


class BandEncoder(nn.Module):
    """Embeds `count` neighbouring bands of `bins` bins each."""

    def __init__(self, count: int, bins: int, width: int) -> None:
        super().__init__()
        self.norm = BandNorm(count, 2 * bins)
        self.linear = BandLinear(count, 2 * bins, width)

    def forward(self, parts: Tensor) -> Tensor:
        """Real and imaginary parts of each bin in turn, `[batch, frames, count · bins · 2]`, to
        `[batch, frames, count, width]`."""
        x = self.norm(parts.reshape(*parts.shape[:2], len(self.norm.weight), -1))
        return cast(Tensor, self.linear(x.flatten(0, 1).transpose(0, 1)).transpose(0, 1).reshape(*x.shape[:3], -1))


class BandDecoder(nn.Module):
    """Makes complex masks of the embeddings of `count` neighbouring bands."""

    def __init__(self, count: int, bins: int, width: int) -> None:
        super().__init__()
        self.norm = BandNorm(count, width)
        self.linear1 = BandLinear(count, width, 4 * width)
        self.linear2 = BandLinear(count, 4 * width, 4 * width)
        self.linear3 = BandLinear(count, 4 * width, 4 * bins)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frames, count, width]` to complex64 `[batch, frames, count · bins]`."""
        h = self.norm(x).flatten(0, 1).transpose(0, 1)
        h = self.linear3(self.linear2(self.linear1(h).tanh()).tanh())
        real, imaginary = F.glu(h).float().transpose(0, 1).reshape(*x.shape[:3], -1).chunk(2, -1)
        return torch.complex(real, imaginary).flatten(2)


class Prompted(NamedTuple):
    """A set of prompts (int64 `[prompts]`), and the positions in it that become stems."""

    prompts: Tensor
    kept: tuple[int, ...]


class Tuss(Separator[Prompted]):
    """Separates by a set of prompts. `rate` is in Hz; `window` is the length in samples that it was trained on."""

    rate = RATE_HZ

    def __init__(self, config: TussConfig) -> None:
        super().__init__()
        self.config = config
        self.window = config.window
        self.dtype = torch.float32  # of the stacks' products
        self.prompts = nn.Parameter(torch.randn(len(config.prompts), config.width))
        self.start = nn.Parameter(torch.randn(config.width))
        self.encoder = nn.ModuleList(BandEncoder(count, bins, config.width) for count, bins in BANDS)
        self.cross = Stack(
            config.cross_blocks,
            config.width,
            config.cross_attention,
            config.heads,
            config.cross_feed_forward,
            config.cross_kernels,
            config.groups,
            config.positions,
        )
        self.conditional = Stack(
            config.conditional_blocks,
            config.width,
            config.conditional_attention,
            config.heads,
            config.conditional_feed_forward,
            config.conditional_kernels,
            config.groups,
            config.positions,
        )
        self.decoder = nn.ModuleList(BandDecoder(count, bins, config.width) for count, bins in BANDS)

    def lower(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def infer(self, windows: Tensor, wanted: Prompted, check: Callable[[], None] = go_on) -> Tensor:
        """Return stems, float32 `[batch, stems, samples]`; all windows of a batch have one length."""
        with torch.autocast(windows.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.separate(windows, wanted.prompts, wanted.kept)

    def separate(self, audio: Tensor, prompts: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """Separate mixtures by prompts. The stems need not sum to the mixture; silence gives silence.

        Args:
            audio: float32 `[batch, samples]` at 48 kHz, two samples or more, of any level.
            prompts: int64, indices into `config.prompts`, `[prompts]` for all rows alike or `[batch, prompts]`;
                together they should name all that is in the mixture, and one may occur several times.
            kept: positions in that list that become stems; None for all. Time and, with gradients off, memory depend
                on how many there are.

        Returns:
            A stem for each prompt that is kept, in that order: float32 `[batch, stems, samples]`.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if audio.dim() != 2 or audio.shape[1] < 2:
            raise ValueError(f"audio is [batch, samples], two samples or more, not {list(audio.shape)}")
        if prompts.dim() not in (1, 2) or not prompts.numel() or prompts.shape[:-1] not in ((), audio.shape[:1]):
            raise ValueError(f"prompts are [prompts] or [batch, prompts], one or more, not {list(prompts.shape)}")
        wanted = range(prompts.shape[-1]) if kept is None else kept
        prompts, sounding = prompts.expand(len(audio), -1), audio.any(1)
        if torch.is_grad_enabled() or sounding.all():
            return self._separate(audio, prompts, wanted)
        stems = audio.new_zeros(len(audio), len(wanted), audio.shape[1])
        if sounding.any():
            stems[sounding] = self._separate(audio[sounding], prompts[sounding], wanted)
        return stems

    def _separate(self, audio: Tensor, prompts: Tensor, wanted: Sequence[int]) -> Tensor:
        # Once a block of this size was freed, glibc keeps what is freed later; a sixth of the time went into having
        # the same pages mapped again and again.
        torch.empty(HELD_BYTES, dtype=torch.uint8, device="cpu")
        scale = audio.std(1, keepdim=True) + QUIETEST
        spec = spectrum(audio / scale)
        frames, tokens = self.hear(spec, prompts)
        stems = [waveform(self.mask(frames * tokens[:, n, None]) * spec, audio.shape[1]) for n in wanted]
        return torch.stack(stems, 1) * scale[:, None]

    def hear(self, spec: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Process a mixture jointly with prompts.

        Args:
            spec: from `spectrum`, complex64 `[batch, frames, 1025]`.
            prompts: int64 `[batch, prompts]`.

        Returns:
            Embeddings of the frames, `[batch, frames, 61, width]`, and of the prompts, `[batch, prompts, 61, width]`.
        """
        frames = self.encode(spec)
        start = self.start.expand(len(spec), 1, -1)
        tokens = torch.cat([self.prompts[prompts], start], 1)[:, :, None].expand(-1, -1, frames.shape[2], -1)
        x = self.cross(torch.cat([tokens, frames], 1))
        count = prompts.shape[1]
        return x[:, count + 1 :], x[:, :count]

    def encode(self, spec: Tensor) -> Tensor:
        """Encode complex64 `[batch, frames, 1025]` to `[batch, frames, 61, width]`."""
        parts = torch.view_as_real(spec.contiguous()).flatten(2)
        pieces = torch.split(parts, [count * bins * 2 for count, bins in BANDS], 2)
        return torch.cat([encoder(piece) for encoder, piece in zip(self.encoder, pieces, strict=True)], 2)

    def mask(self, conditioned: Tensor) -> Tensor:
        """Compute the mask of one prompt's stem, complex64 `[batch, frames, 1025]`, unbounded."""
        pieces = torch.split(self.conditional(conditioned), [count for count, _ in BANDS], 2)
        return torch.cat([decoder(piece) for decoder, piece in zip(self.decoder, pieces, strict=True)], 2)
