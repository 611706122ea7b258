"""How the learning rate goes: functions of the step and of the validation figures so far, without a state of their own,
so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Sets the learning rate of each step."""

    def rate(self, step: int, figures: Sequence[float]) -> float:
        """The learning rate of `step`, where validation gave `figures` so far (the higher, the better)."""


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
    """Multiplied by `factor`, down to `floor`, each time the figure has not improved `patience` times (paper IV-B).

    It may be warmed up linearly over the first `warmup` steps, and the first `ignored` figures left out of account.
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
