"""Linear layers whose weights lie in memory as a CPU's matrix kernels want them, in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for inference. oneDNN would reorder plain weights at every call: 6 % of a whole window's time."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Opaque, so neither a parameter nor a buffer: nothing could convert or save it.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the linear layers below `module` where `dtype` is bfloat16 and they lie on the CPU, if PyTorch can.

    The operators are those that PyTorch's own compiler packs weights with; they are not documented for direct use.
    """
    if dtype != torch.bfloat16 or not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.device.type == "cpu":
                # One after the other, so that there is never a second copy of all weights.
                setattr(parent, name, PackedLinear(child.to(dtype)))
