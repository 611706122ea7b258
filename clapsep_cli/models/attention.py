"""Computes multi-head attention, in the way that is fastest for the precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LONG = 256  # tokens, beyond which the weights of all heads together do not stay in a processor's cache


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
    apart = qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
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
