"""HTSAT, the audio transformer of LAION-CLAP: a Swin transformer over a folded log-mel spectrogram.

It serves twice (arXiv 2402.17455, III): as CLAP's audio tower, and, tuned by LoRA, as the separator's encoder.
Layers keep Swin's names. Maps are laid out `[batch, rows, columns, channels]`; see `through` for tokens in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.dsp import mel_filters, power, spectrum
from clapsep_cli.models.layers import Linear, attend

RATE_HZ = 48_000
HOP = 480  # samples, at RATE_HZ
MEL_BAND_HZ = (50.0, 14_000.0)
PATCH = 4  # mel bins and frames to a patch
MLP_RATIO = 4
# Added to the attention between tokens that only the shift has made neighbours. Swin's own is -100, which also leaves
# nothing of them beside the others, but of which the exponential is denormal and takes a CPU three times as long.
SHIFT_MASK = -10_000.0


class BinNorm(nn.BatchNorm1d):
    """Batch normalisation of each frequency bin, `[batch, frames, bins]`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        # With running statistics it is one multiply-add along the last axis: no transposed copies.
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias - mean * scale, x, scale)


class WindowAttention(nn.Module):
    """Multi-head attention within square windows, with a relative position bias and, where shifted, Swin's mask."""

    relative_position_index: Tensor
    shift_mask: Tensor | None
    bias: Tensor | None

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        # Constants are made on the CPU by name, so that a module built on the meta device has them all the same.
        self.register_buffer("relative_position_index", _relative_position_index(window), persistent=False)
        self.register_buffer("shift_mask", _shift_mask(side, window, shift) if shift else None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.register_load_state_dict_post_hook(WindowAttention._forget_bias)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """`[batch · windows, tokens, width]`, windows of one image in row-major order, to the same shape."""
        return cast(Tensor, self.proj(attend(self.qkv(x), self.heads, self._attention_bias())))

    def train(self, mode: bool = True) -> WindowAttention:
        self._forget_bias()
        return super().train(mode)

    def _forget_bias(self, _incompatible_keys: object = None) -> None:
        self.bias = None

    def _attention_bias(self) -> Tensor:
        """Compute position bias plus shift mask, `[1 or windows, heads, tokens, tokens]`.

        In evaluation without gradients it is computed once and kept until `train`, `eval` or `load_state_dict`.
        """
        if self.training or torch.is_grad_enabled():
            return self._compute_bias()
        if self.bias is None:
            self.bias = self._compute_bias()
        return self.bias

    def _compute_bias(self) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        return (bias if self.shift_mask is None else bias + self.shift_mask[:, None]).contiguous()


class SwinBlock(nn.Module):
    """Pre-norm Swin block on a `side` × `side` map: windowed attention, then an MLP, each added to its input.

    Its tokens are those of each window in turn; `through` moves them there.
    """

    order: Tensor
    raster: Tensor

    def __init__(self, width: int, heads: int, side: int, window: int, shifted: bool) -> None:
        super().__init__()
        # A map of a single window has nothing to shift.
        self.side, self.window = side, min(window, side)
        shift = window // 2 if shifted and side > window else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, side, self.window, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, MLP_RATIO * width)
        order = _window_order(side, self.window, shift)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("raster", order.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, side², width]`, token `order[i]` of the map in place i, to the same shape."""
        windows = self.norm1(x).view(-1, self.window**2, x.shape[-1])
        x = x + self.attn(windows).view_as(x)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


def through(blocks: Iterable[SwinBlock], x: Tensor) -> Tensor:
    """Run `x`, `[batch, side, side, width]`, through `blocks` in turn.

    All but attention treats each token alone, so tokens move only from the windows of one block to those of the next.
    """
    tokens, raster = x.flatten(1, 2), None  # as yet in the map's own order
    for block in blocks:
        tokens = block(tokens.index_select(1, block.order if raster is None else raster[block.order]))
        raster = block.raster
    return x if raster is None else tokens.index_select(1, raster).view_as(x)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, for each token alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class PatchEmbedding(nn.Module):
    """Image `[batch, side, side]` to patches `[batch, side / 4, side / 4, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        # No patch overlaps another, so the convolution is one product, of which each row is a patch.
        count = image.shape[1] // PATCH
        patches = image.view(-1, count, PATCH, count, PATCH).transpose(2, 3).flatten(3)
        return cast(Tensor, self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)))


class PatchMerging(nn.Module):
    """Halves the map and doubles the width: four neighbours side by side, then LayerNorm and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, side, _, width = x.shape
        pairs = x.view(batch, side // 2, 2, side // 2, 2, width)
        # Swin's order of the neighbours runs down the column first: (0, 0), (1, 0), (0, 1), (1, 1).
        neighbours = pairs.permute(0, 1, 3, 4, 2, 5).reshape(batch, side // 2, side // 2, 4 * width)
        return cast(Tensor, self.reduction(self.norm(neighbours)))


class SwinStage(nn.Module):
    """Swin blocks, shifted by turns, then, but in the last stage, patch merging.

    `[batch, side, side, width]` to half the side and twice the width, or to the same shape.
    """

    def __init__(self, width: int, depth: int, heads: int, side: int, window: int, merging: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(width, heads, side, window, shifted=i % 2 == 1) for i in range(depth))
        self.downsample = PatchMerging(width) if merging else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.downsample(through(cast(Iterable[SwinBlock], self.blocks), x)))


class HTSAT(nn.Module):
    """Hierarchical token-semantic audio transformer, without its classifier.

    The log-mel spectrogram, `frames × mels`, is cut in time into `image / mels` chunks that are stacked along
    frequency to a square image. Sound shorter than the image is `stretch`ed to its length by bicubic interpolation,
    as CLAP does, or else silence follows it, as in the separator.
    """

    mel: Tensor

    def __init__(
        self,
        *,
        mels: int,
        image: int,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        attention_window: int,
        stretch: bool,
    ) -> None:
        super().__init__()
        self.mels, self.image, self.stretch = mels, image, stretch
        self.register_buffer("mel", mel_filters(RATE_HZ, mels, *MEL_BAND_HZ))
        self.bn0 = BinNorm(mels)
        self.patch_embed = PatchEmbedding(width)
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            SwinStage(width << i, depth, head, image // PATCH >> i, attention_window, merging=i < last)
            for i, (depth, head) in enumerate(zip(depths, heads, strict=True))
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the stages compute."""
        return next(self.layers.parameters()).dtype

    @property
    def frames(self) -> int:
        """The number of frames that fill the image."""
        return self.image * self.image // self.mels

    def forward(self, audio: Tensor) -> list[Tensor]:
        """Compute the features of `audio`, float32 `[batch, samples]` at 48 kHz, `samples // 480 + 1` at most `frames`.

        Returns the patch embedding and the output of each stage, after its merging, from shallow to deep:
        `[batch, rows, columns, channels]`.
        """
        features = [self.patch_embed(self._fold(self.log_mel(audio))).to(self.dtype)]
        for layer in self.layers:
            features.append(layer(features[-1]))
        return features

    def log_mel(self, audio: Tensor) -> Tensor:
        """Compute log-mel features, normalised per band: `[batch, samples]` at 48 kHz to `[batch, frames, mels]`."""
        mel = power(spectrum(audio, HOP)) @ self.mel
        if not self.stretch:
            mel = F.pad(mel, (0, 0, 0, self.frames - mel.shape[1]))
        x: Tensor = self.bn0(10 * mel.clamp(min=1e-10).log10())
        if self.stretch:
            x = F.interpolate(x[:, None], (self.frames, self.mels), mode="bicubic", align_corners=True)[:, 0]
        return x

    def _fold(self, x: Tensor) -> Tensor:
        # Image row = chunk · mels + mel, column = frame within the chunk.
        return x.view(len(x), -1, self.image, self.mels).transpose(2, 3).reshape(len(x), self.image, self.image)


def _relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens of a window: int64 `[window², window²]`."""
    position = torch.arange(window, device="cpu")
    row, column = position.repeat_interleave(window), position.repeat(window)
    offset = window - 1
    return (row[:, None] - row + offset) * (2 * window - 1) + column[:, None] - column + offset


def _window_order(side: int, window: int, shift: int) -> Tensor:
    """Return the tokens of a map, in row-major order of its windows after a cyclic shift: int64 `[side²]`."""
    shifted = torch.arange(side * side, device="cpu").view(side, side).roll((-shift, -shift), (0, 1))
    count = side // window
    return shifted.view(count, window, count, window).transpose(1, 2).flatten()


def _shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return `SHIFT_MASK` between tokens that a cyclic shift has brought into one window from opposite edges, else 0.

    Float32 `[windows, window², window²]`.
    """
    wrapped = torch.arange(side, device="cpu") >= side - shift
    zone = 2 * wrapped[:, None].long() + wrapped
    count = side // window
    zones = zone.view(count, window, count, window).transpose(1, 2).reshape(count**2, window**2)
    return (zones[:, :, None] != zones[:, None]) * SHIFT_MASK
