"""CLAPSep (arXiv 2402.17455, III): extracts from a mixture what a positive and a negative query describe.

A tuned HTSAT hears the mixture at 48 kHz; an aggregator climbs back from its deepest features to its shallowest,
conditioned on the queries by FiLM; MaskNet turns the result and the 32 kHz spectrum into a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clapsep_cli.dsp import HOP, N_FFT, RATE_HZ, Resampler, power, spectrum
from clapsep_cli.models import htsat
from clapsep_cli.models.base import MaskSeparator, full_scale_gain
from clapsep_cli.models.htsat import HTSAT, PATCH, BinNorm, SwinBlock, through
from clapsep_cli.models.layers import Linear, attend

BINS = N_FFT // 2 + 1
QUIETEST = 1e-8  # added to the squared length of a turn before dividing by it


@dataclass(frozen=True)
class TextSize:
    """Size of CLAP's text tower; the defaults are the released size."""

    dim: int = 512  # of one query embedding; the condition of CLAPSep has twice as many numbers
    vocabulary: int = 50_265
    text_tokens: int = 77  # to which a text is cut, with its <s> and </s>
    text_positions: int = 514
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_feed_forward: int = 3072


@dataclass(frozen=True)
class CLAPSepConfig(TextSize):
    """Size of a separator and of the CLAP towers it was made with; the defaults are the released size.

    Raises `ValueError` where the numbers do not fit together.
    """

    window: int = 320_000  # samples at 32 kHz that the networks see at once

    mels: int = 64
    image: int = 256  # rows and columns of the folded log-mel spectrogram
    width: int = 128  # of the first Swin stage, doubled by each next one
    depths: tuple[int, ...] = (2, 2, 12, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    attention_window: int = 8

    mask_width: int = 640
    mask_layers: int = 3
    mask_heads: int = 8
    mask_feed_forward: int = 2560
    phase: bool = False  # also turn the mixture's phases; no released model does

    def __post_init__(self) -> None:
        frames = self.image * self.image // self.mels
        coarsest = self.image // PATCH >> len(self.depths) - 1
        checks = {
            "window is a multiple of the hop": self.window % (2 * HOP) == 0,
            "window fits the image": self.window // HOP + 1 <= frames,
            "image is a multiple of mels": self.image % self.mels == 0,
            "one number of heads for each stage": len(self.depths) == len(self.heads),
            "maps are halved evenly": coarsest > 0 and coarsest << len(self.depths) - 1 == self.image // PATCH,
            "maps are whole attention windows": all(
                side <= self.attention_window or side % self.attention_window == 0 for side in self.sides
            ),
            "heads divide the widths": all((self.width << i) % h == 0 for i, h in enumerate(self.heads))
            and self.mask_width % self.mask_heads == 0
            and self.text_width % self.text_heads == 0,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"not a CLAPSep size, it must hold that {', '.join(broken)}: {self}")

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows (and columns) of each Swin stage's map."""
        return tuple(self.image // PATCH >> i for i in range(len(self.depths)))

    @property
    def deepest(self) -> int:
        """Width of the last Swin stage."""
        return self.width << len(self.depths) - 1

    def build_htsat(self, *, stretch: bool) -> HTSAT:
        """Make an HTSAT of this size: with `stretch` as CLAP's audio tower, else as the separator's encoder."""
        return HTSAT(
            mels=self.mels,
            image=self.image,
            width=self.width,
            depths=self.depths,
            heads=self.heads,
            attention_window=self.attention_window,
            stretch=stretch,
        )


class TransformerLayer(nn.Module):
    """Post-norm Transformer encoder layer, as in MaskNet (ReLU) and RoBERTa (GELU)."""

    def __init__(self, width: int, heads: int, feed_forward: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.activation = activation
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = Linear(width, feed_forward)
        self.fc2 = Linear(feed_forward, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """`x`: `[batch, tokens, width]`; `attended`: bool, true where a token may be attended to."""
        x = self.norm1(x + self.out(attend(self.qkv(x), self.heads, attended)))
        return cast(Tensor, self.norm2(x + self.fc2(self.activation(self.fc1(x)))))


class FiLM(nn.Module):
    """Projects an encoder feature, then scales and shifts it by the condition: γ(c) · x + β(c)."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.feature_proj = Linear(width, width)
        self.gamma = nn.Linear(condition, width)
        self.beta = nn.Linear(condition, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, feature: Tensor, condition: Tensor, h: Tensor | None = None) -> Tensor:
        """Modulate `feature` (`[batch, rows, columns, width]`), plus `h` where there is one, normalised."""
        gamma, beta = self.gamma(condition)[:, None, None], self.beta(condition)[:, None, None]
        x = torch.addcmul(beta, gamma, self.feature_proj(feature))
        return cast(Tensor, self.norm(x if h is None else x + h))


class PatchExpanding(nn.Module):
    """Inverts patch merging: `[batch, side, side, 2 · width]` to `[batch, 2 · side, 2 · side, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = Linear(2 * width, 4 * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, side, _, twice = x.shape
        # As in merging, the four sub-positions run down the column first.
        groups = self.expand(x).view(batch, side, side, 2, 2, twice // 2)
        return cast(Tensor, self.norm(groups.permute(0, 1, 4, 2, 3, 5).reshape(batch, 2 * side, 2 * side, -1)))


class AggregatorLayer(nn.Module):
    """A Swin block, behind patch expanding in all but the deepest: to `[batch, side, side, width]`."""

    def __init__(self, width: int, heads: int, side: int, window: int, expanding: bool) -> None:
        super().__init__()
        self.expanding = PatchExpanding(width) if expanding else nn.Identity()
        self.block = SwinBlock(width, heads, side, window, shifted=False)

    def forward(self, x: Tensor) -> Tensor:
        return through([self.block], cast(Tensor, self.expanding(x)))


class InversePatchEmbedding(nn.Module):
    """Turns patches `[batch, side / 4, side / 4, width]` to an image `[batch, side, side]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.ConvTranspose2d(width, 1, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        # No patch overlaps another, so the convolution is one product, of which each row is a patch.
        weight = self.proj.weight.flatten(1)
        patches = (self.norm(x).to(weight.dtype) @ weight + self.proj.bias).unflatten(-1, (PATCH, PATCH))
        return cast(Tensor, patches.transpose(2, 3).flatten(3).flatten(1, 2))


class Aggregator(nn.Module):
    """Joins the encoder's features from deep to shallow, each modulated by the condition."""

    def __init__(self, config: CLAPSepConfig) -> None:
        super().__init__()
        self.mels = config.mels
        condition = 2 * config.dim
        sizes = [
            (config.width << stage, config.heads[stage], config.sides[stage])
            for stage in reversed(range(len(config.depths)))
        ]
        self.film = FiLM(config.deepest, condition)
        self.layers = nn.ModuleList(
            AggregatorLayer(width, heads, side, config.attention_window, expanding=i > 0)
            for i, (width, heads, side) in enumerate(sizes)
        )
        self.skip = nn.ModuleList(FiLM(width, condition) for width, _, _ in sizes)
        self.inverse_patch_embed = InversePatchEmbedding(config.width)

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        """`features` of the encoder, from shallow to deep, to `[batch, frames of the whole image, mels]`."""
        deepest, *others = reversed(features)
        h = self.film(deepest, condition)
        for layer, skip, feature in zip(self.layers, self.skip, others, strict=True):
            h = skip(feature, condition, layer(h))
        image = self.inverse_patch_embed(h)
        chunks = image.view(len(image), -1, self.mels, image.shape[-1])
        return cast(Tensor, chunks.transpose(2, 3).flatten(1, 2))


class MaskNet(nn.Module):
    """Makes a mask of magnitude spectrum and aggregated features; all frames of a window attend to each other."""

    def __init__(self, config: CLAPSepConfig) -> None:
        super().__init__()
        width = config.mask_width
        self.spec_norm = BinNorm(BINS)
        self.input = nn.Linear(BINS + config.mels, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            *(
                TransformerLayer(width, config.mask_heads, config.mask_feed_forward, torch.relu_)
                for _ in range(config.mask_layers)
            )
        )
        self.output = nn.Linear(width, BINS)
        self.turn = nn.Linear(width, 2 * BINS) if config.phase else None
        if self.turn is not None:  # phases stay until training turns them
            nn.init.zeros_(self.turn.weight)
            nn.init.zeros_(self.turn.bias)

    def forward(self, magnitude: Tensor, aggregated: Tensor) -> Tensor:
        """`[batch or 1, frames, 513]` and `[batch, at least as many frames, mels]` to `[batch, frames, 513]`.

        The result is complex where phases are turned.
        """
        spec = self.spec_norm(magnitude).expand(len(aggregated), -1, -1)
        joined = torch.cat([spec, aggregated[:, : spec.shape[1]]], dim=-1).to(self.norm.weight.dtype)
        h = self.layers(self.norm(self.input(joined)))
        mask = cast(Tensor, self.output(h).float().sigmoid())
        if self.turn is None:
            return mask
        across, along = self.turn(h).float().chunk(2, -1)
        size = mask * torch.rsqrt((1 + across).square() + along.square() + QUIETEST)
        return torch.complex(size * (1 + across), size * along)


class Features(NamedTuple):
    """Features of a mixture, the same for all queries."""

    magnitude: Tensor  # of the 32 kHz STFT, [batch, frames, 513 bins]
    encoder: list[Tensor]  # patch embedding and Swin stages, [batch, rows, columns, channels] each


class CLAPSep(MaskSeparator):
    """Separates by positive and negative conditions, with LoRA merged into the encoder.

    `mask` and `encode` are those of `MaskSeparator`. One mixture's features also serve a batch of conditions.
    """

    rate = RATE_HZ

    def __init__(self, config: CLAPSepConfig) -> None:
        super().__init__()
        self.config = config
        self.window = config.window
        self.turns = config.phase
        self.resample = Resampler(RATE_HZ, htsat.RATE_HZ)
        self.encoder = config.build_htsat(stretch=False)
        self.aggregator = Aggregator(config)
        self.mask_net = MaskNet(config)

    def encode(self, mixture: Tensor) -> Features:
        """Compute the features of `mixture`, float32 `[batch, window]` at 32 kHz, peaks within ±1.

        With complex masks, louder ones are scaled here.
        """
        if self.turns:
            mixture = mixture * full_scale_gain(mixture.abs().amax(1, keepdim=True))
        return Features(power(spectrum(mixture)).sqrt_(), self.encoder(self.resample(mixture)))

    def lower(self, dtype: torch.dtype) -> None:
        # Spectra, patches (convolutions of one channel) and what normalises them are cheap, and stay float32.
        stacks = (self.encoder.layers, self.aggregator.layers, self.aggregator.skip, self.mask_net.layers)
        ends = self.aggregator.inverse_patch_embed.norm, self.mask_net.norm
        for part in (*(layer for stack in stacks for layer in stack), self.aggregator.film, *ends):
            part.to(dtype)
        for part in filter(None, (self.mask_net.input, self.mask_net.output, self.mask_net.turn)):
            part.to(dtype)
        # As long as one tensor lies in a file that it was mapped from, all that was read of that stays in memory.
        self._apply(_unmapped)  # type: ignore[no-untyped-call]

    def mask(self, features: Features, condition: Tensor) -> Tensor:
        """Compute a mask of modulus 0 to 1, `[batch, frames, 513]`; `features` or `condition` may be of one item."""
        aggregated = self.aggregator(features.encoder, condition.to(self.encoder.dtype))
        return cast(Tensor, self.mask_net(features.magnitude, aggregated))


def _unmapped(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.dtype == torch.float32 else tensor
