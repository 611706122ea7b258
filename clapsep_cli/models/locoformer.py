"""TF-Locoformer blocks (arXiv 2408.03440), of which TUSS is made: attention and convolution, along either axis.

Everything is laid out `[sequences, positions, channels]`. A path treats its sequences one by one, so it is run on a
few of them at a time: what it needs in between then fits into a processor's cache.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS_AT_ONCE = 4096
ROWS = 16  # of a batch, from which on PyTorch hands a pointwise convolution to its faster library, on one thread
EPSILON = 1e-5  # added to the root mean square, not under the root
BASE = 10_000.0  # of the rotary frequencies


def rotations(length: int, dim: int, counter: Literal["exact", "bf16"], device: torch.device) -> Tensor:
    """Compute the rotary encoding of the positions 0 … `length` − 1: complex64 `[length, 1, 1, dim / 2]`, of modulus 1.

    With `counter` "bf16", positions above 256 are rounded, as they were when the released weights were trained.
    """
    at = torch.arange(length, device=device).float()
    if counter == "bf16":
        at = at.bfloat16().float()
    frequencies = BASE ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    angles = (at[:, None] * frequencies.float())[:, None, None]
    return torch.polar(torch.ones_like(angles), angles)


class GroupRMSNorm(nn.Module):
    """Divides each group of consecutive channels by its root mean square, then scales each channel."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        rms = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True) * grouped.shape[-1] ** -0.5
        return cast(Tensor, (grouped / (rms + EPSILON)).flatten(-2).mul_(self.gamma))


class Convolution(nn.Module):
    """Convolution along sequences. The weight is `[width_out, kernel, width_in]`, which is how processors want it."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, bias: bool = True) -> None:
        super().__init__()
        bound = (width_in * kernel) ** -0.5
        self.weight = nn.Parameter(torch.empty(width_out, kernel, width_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, padding: int = 0) -> Tensor:
        """`[sequences, positions, width_in]`, zero-padded at both ends, to `[sequences, …, width_out]`."""
        if self.weight.shape[1] > 1:
            return self._convolved(x, padding)
        if x.device.type != "cpu":
            return F.linear(x, self.weight[:, 0], self.bias)
        flat = x.flatten(0, 1)
        rows = F.pad(flat, (0, 0, 0, -len(flat) % ROWS)).view(ROWS, -1, x.shape[-1])
        return self._convolved(rows, 0).flatten(0, 1)[: len(flat)].view(*x.shape[:-1], -1)

    def _convolved(self, x: Tensor, padding: int) -> Tensor:
        # As an image one pixel wide, channels last: the weight is in place, and no copy is made of anything.
        image, kernel = x[:, :, None].permute(0, 3, 1, 2), self.weight[:, :, None].permute(0, 3, 1, 2)
        return F.conv2d(image, kernel, self.bias, padding=(padding, 0)).permute(0, 2, 3, 1).flatten(2)


class FeedForward(nn.Module):
    """Convolutional SwiGLU: each position sees `kernel` − 1 neighbours on either side."""

    def __init__(self, width: int, inner: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupRMSNorm(width, groups)
        self.expand = Convolution(width, 2 * inner, kernel)
        self.contract = Convolution(inner, width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(self.norm(x), padding=self.expand.weight.shape[1] - 1).chunk(2, -1)
        return cast(Tensor, self.contract(F.silu(gate).mul_(value)))


class Attention(nn.Module):
    """Multi-head attention with rotary positions; its norm comes first, the residual is added outside."""

    def __init__(self, width: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupRMSNorm(width, groups)
        self.qkv = Convolution(width, 3 * inner, bias=False)
        self.out = Convolution(inner, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        pairs = torch.view_as_complex(qkv[:, :, :2].float().unflatten(-1, (-1, 2)))
        q, k = torch.view_as_real(pairs * rotation).flatten(-2).to(qkv.dtype).transpose(1, 3).unbind(2)
        heads = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
        return cast(Tensor, self.out(heads.transpose(1, 2).flatten(2)))


class Path(nn.Module):
    """Feed-forward, attention, feed-forward along one axis, each beside a residual."""

    def __init__(self, width: int, inner: int, heads: int, feed_forward: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.first = FeedForward(width, feed_forward, kernel, groups)
        self.attention = Attention(width, inner, heads, groups)
        self.last = FeedForward(width, feed_forward, kernel, groups)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """`x`: `[sequences, positions, width]`; `rotation`: of its positions, from `rotations`."""
        few = max(1, POSITIONS_AT_ONCE // x.shape[1])
        return torch.cat([self._few(part, rotation) for part in torch.split(x, few)])

    def _few(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.attention(x, rotation)
        return cast(Tensor, x + self.last(x))


class Block(nn.Module):
    """A path over the bands of each frame, then one over the frames of each band."""

    def __init__(
        self, width: int, inner: int, heads: int, feed_forward: int, kernels: tuple[int, int], groups: int
    ) -> None:
        super().__init__()
        self.bands, self.frames = (Path(width, inner, heads, feed_forward, kernel, groups) for kernel in kernels)

    def forward(self, x: Tensor, over_bands: Tensor, over_frames: Tensor) -> Tensor:
        """`x`: `[batch, frames, bands, width]`; the others: rotations of its bands and of its frames."""
        x = self.bands(x.flatten(0, 1), over_bands).unflatten(0, x.shape[:2]).transpose(1, 2)
        return cast(Tensor, self.frames(x.flatten(0, 1), over_frames).unflatten(0, x.shape[:2]).transpose(1, 2))


class Stack(nn.Module):
    """Blocks one after another; all share their rotary encoding."""

    def __init__(
        self,
        blocks: int,
        width: int,
        inner: int,
        heads: int,
        feed_forward: int,
        kernels: tuple[int, int],
        groups: int,
        counter: Literal["exact", "bf16"],
    ) -> None:
        super().__init__()
        self.head_dim, self.counter = inner // heads, counter
        self.blocks = nn.ModuleList(Block(width, inner, heads, feed_forward, kernels, groups) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frames, bands, width]` to the same."""
        over_frames, over_bands = (rotations(length, self.head_dim, self.counter, x.device) for length in x.shape[1:3])
        for block in self.blocks:
            x = block(x, over_bands, over_frames)
        return x
