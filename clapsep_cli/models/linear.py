"""Linear layers: with the activation that follows, and packed as a CPU's matrix kernels want them, in bfloat16."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": torch.relu_, "gelu": F.gelu}


class ActivatedLinear(nn.Linear):
    """A linear layer and its activation, which matrix kernels can apply before they write."""

    def __init__(self, inputs: int, outputs: int, activation: Literal["relu", "gelu"]) -> None:
        super().__init__(inputs, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))


class PackedLinear(nn.Module):
    """A linear layer for inference. oneDNN would reorder plain weights at every call: 6 % of a whole window's time."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Opaque, so neither a parameter nor a buffer: nothing could convert or save it.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias
        self.activation = linear.activation if isinstance(linear, ActivatedLinear) else "none"

    def forward(self, x: Tensor) -> Tensor:
        # The activation's arguments: no numbers, and, for GELU, no approximation.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")
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
