"""Provides schedules of the learning rate, and the optimiser Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# A quintic whose iteration brings all singular values near 1; its slope at 0 makes small ones grow fastest.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2  # of an entry's step, in units of the learning rate: so rates and decay serve both optimisers


class Schedule(Protocol):
    """Sets the learning rate of each step.

    It has no state but the validation figures, so a resumed run continues exactly.
    """

    def rate(self, step: int, figures: Sequence[float]) -> float:
        """Return the learning rate of `step`, after the validation `figures` so far (the higher, the better)."""


@dataclass(frozen=True)
class Trapezoid:
    """Linear warm-up, constant, then linear to zero over the last `decay` share (so a run can be made longer)."""

    lr: float
    steps: int
    warmup: int
    decay: float

    def rate(self, step: int, figures: Sequence[float]) -> float:
        return self.lr * min(
            1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1.0, self.decay * self.steps)
        )


@dataclass(frozen=True)
class Plateau:
    """Learning rate times `factor`, down to `floor`, after each `patience` figures without improvement (paper IV-B).

    It rises linearly over the first `warmup` steps. The first `ignored` figures do not count.
    """

    lr: float
    floor: float
    factor: float
    patience: int
    warmup: int = 0
    ignored: int = 0

    def rate(self, step: int, figures: Sequence[float]) -> float:
        lr, best, stale = self.lr, -float("inf"), 0
        for figure in figures[self.ignored :]:
            best, stale = (figure, 0) if figure > best else (best, stale + 1)
            if stale == self.patience:
                lr, stale = max(self.floor, lr * self.factor), 0
        return lr * min(1.0, (step + 1) / max(1, self.warmup))


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate the orthogonal matrix nearest to `matrix` (`[rows, columns]`) by Newton–Schulz iterations.

    This is U·Vᵀ of its singular value decomposition, with singular values of 0.7 to 1.2 in place of 1. It computes in
    bfloat16 on a GPU, and in float32 on a CPU, most of which have nothing faster.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x.bfloat16() if matrix.is_cuda else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan et al., 2024): steps along the orthogonal matrix nearest to the gradient's mean.

    All directions of a layer's input and output change at the same rate, even those with small gradients. It is for
    hidden layers of two or more dimensions (a kernel counts as a matrix, output channels by all others). AdamW trains
    vectors and the first and last layers.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["mean"], group["momentum"])  # Nesterov's
        # Channels last, the memory layout of convolutions: so this is a view. The order of columns has no effect.
        flat = ahead.movedim(1, -1).reshape(len(ahead), -1)
        moved = orthogonal(flat) * (ADAMW_RMS * math.sqrt(max(flat.shape)))
        back = moved.view(ahead.movedim(1, -1).shape).movedim(-1, 1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(back, alpha=group["lr"])
