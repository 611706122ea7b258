"""Fast layers for inference: multi-head attention, products of few rows, and 3×3 convolutions of wide layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 128  # rows, of which a product is at least as fast by columns
LONG = 256  # tokens, beyond which the weights of all heads together do not stay in a processor's cache
WIDE = 128  # channels in and out from which on it is faster, with AVX2 by a third, with AVX-512 as fast; twice at 512
FEWEST_COLUMNS = 64  # of smaller images the products take so little time that twice the weights are not worth it
TILE = 4  # rows of the output that are made together

# From three rows of a kernel to six, for the points 0, ±1, ±2 and infinity.
_KERNEL_ROWS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def attend(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q·kᵀ/√d + bias)·v of each head.

    Args:
        qkv: queries, keys and values, `[batch, tokens, 3 · width]`.
        heads: number of heads.
        bias: added to the attention of each head, `[few, heads, tokens, tokens]`; it recurs along the batch, of which
            `few` is a divisor. A bool one, `[few, heads or 1, tokens or 1, tokens]`, is true where a token may be
            attended to.

    Returns:
        `[batch, tokens, width]`.
    """
    batch, tokens, width = qkv.shape
    apart = qkv.contiguous().view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    masked = bias is not None and bias.dtype == torch.bool
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not masked:
        mixed = _plain(apart.contiguous(), bias)
    else:
        q, k, v = apart
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else _recurring(bias, batch))
    return mixed.transpose(1, 2).flatten(2)


def _plain(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `attend` by plain products of `[3, batch, heads, …]`: on a CPU in bfloat16 twice as fast as fused."""
    _, batch, heads, tokens, depth = qkv.shape
    q, k, v = qkv.flatten(1, 2)
    scale, nothing = 1 / math.sqrt(depth), q.new_zeros(())
    if bias is None and tokens > LONG:
        weights = (torch.addmm(nothing, one, key.T, beta=0, alpha=scale) for one, key in zip(q, k, strict=True))
        mixed = torch.stack([one.softmax(-1) @ value for one, value in zip(weights, v, strict=True)])
    else:
        added = nothing if bias is None else _recurring(bias, batch).flatten(0, 1)
        mixed = torch.baddbmm(added, q, k.mT, beta=bias is not None, alpha=scale).softmax(-1) @ v
    return mixed.view(batch, heads, tokens, depth)


def _recurring(bias: Tensor, batch: int) -> Tensor:
    return bias.expand(batch // len(bias), *bias.shape).flatten(0, 1)


class Linear(nn.Linear):
    """`nn.Linear`, on a CPU faster for few rows.

    Wide weights take longer to bring into the order in which a CPU multiplies than to multiply with few rows. As the
    left factor they need less of it: with 64 rows of 1024 numbers, AVX-512 makes 90 GFLOP/s instead of 60.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[…, in]` to `[…, out]`, of few rows laid out by columns."""
        rows = x.shape[:-1].numel()
        if rows > FEW or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        columns = x.reshape(rows, -1).T.contiguous()
        product = self.weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], self.weight, columns)
        return product.T.view(*x.shape[:-1], -1)


class Kernel:
    """A 3×3 convolution by `weight` (float32 `[out, in, 3, 3]`), laid out for inference.

    Its input has one row more at either end than its output, and as many columns; beyond these are zeros.

    With many channels it takes half the products (Winograd's F(4, 3) along the rows): six rows of the input, from which
    four of the output follow, are combined into six others, each is convolved by itself and along the columns alone,
    and the results are combined again: 18 products instead of 36. With few channels, combining takes longer than that
    saves.
    """

    def __init__(self, weight: Tensor, columns: int) -> None:
        """`columns`: those of the images to come."""
        rows = [weight]
        if min(weight.shape[:2]) >= WIDE and columns >= FEWEST_COLUMNS:
            combine = torch.tensor(_KERNEL_ROWS, dtype=torch.float64, device=weight.device)
            rows = [row[:, :, None] for row in torch.einsum("pr,oirc->poic", combine, weight.double()).float()]
        self.weights = [row.contiguous(memory_format=torch.channels_last) for row in rows]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x`: float32 `[batch, in, rows + 2, columns]`, channels last. Returns `[batch, out, rows, columns]`."""
        if len(self.weights) == 1:
            return F.conv2d(x, self.weights[0], bias, padding=(0, 1))
        rows = x.shape[2] - 2
        if rows % TILE:
            x = F.pad(x, (0, 0, 0, -rows % TILE))
        parts = _combined([x[:, :, at : x.shape[2] - 5 + at : TILE] for at in range(6)])
        # What is added to the second row counts once in each row of the output.
        biases = (None, bias, None, None, None, None)
        convolved = [
            F.conv2d(part, weight, b, padding=(0, 1))
            for part, weight, b in zip(parts, self.weights, biases, strict=True)
        ]
        return _output(convolved)[:, :, :rows]


def _combined(d: list[Tensor]) -> list[Tensor]:
    """Combine the six input rows `d` of each tile into the six rows to be convolved."""
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    even2, odd2 = d[4] - d[2], d[3] - d[1]
    first = torch.sub(even, d[2]).add_(d[0], alpha=4)
    last = torch.sub(d[5], d[3]).sub_(odd2, alpha=4)
    ones = even + odd, even.sub_(odd)
    twos = torch.add(even2, odd2, alpha=2), even2.sub_(odd2, alpha=2)
    return [first, *ones, *twos, last]


def _output(m: list[Tensor]) -> Tensor:
    """Combine six convolved rows into the rows of the output, in order."""
    sum1, difference1 = m[1] + m[2], m[1].sub_(m[2])
    sum2, difference2 = m[3] + m[4], m[3].sub_(m[4])
    batch, channels, tiles, columns = m[0].shape
    y = m[0].new_empty(batch, tiles * TILE, columns, channels).permute(0, 3, 1, 2)
    torch.add(sum1, sum2, out=y[:, :, 0::TILE]).add_(m[0])
    torch.add(difference1, difference2, alpha=2, out=y[:, :, 1::TILE])
    torch.add(sum1, sum2, alpha=4, out=y[:, :, 2::TILE])
    torch.add(difference1, difference2, alpha=8, out=y[:, :, 3::TILE]).add_(m[5])
    return y
