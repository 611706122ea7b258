"""What the training loop knows of the things it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clapsep_cli.training.loop.schedules import Schedule

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how a task is trained. `batch` examples make a step, in `accumulate` parts on each device."""

    steps: int
    batch: int
    schedule: Schedule
    accumulate: int = 1
    weight_decay: float = 0.01
    epsilon: float = 1e-8  # of AdamW
    amsgrad: bool = False  # of AdamW
    clip: float = 5.0  # norm of the gradient
    ema: float = 0.0  # of the averaged weights; 0 for none
    report_every: int = 50
    validate_every: int = 1000
    save_every: int = 250
    keep_best: int = 0  # of how many of the best in validation the mean is written, rather than the last
    workers: int = 1

    @property
    def every(self) -> tuple[int, int, int]:
        """After how many steps to report, to validate and to save."""
        return self.report_every, self.validate_every, self.save_every


class Task(ABC):
    """A network in training: what a step draws, and what is minimised.

    `net`: those of its parameters that require gradients are trained. `state`: the file that resumes the task.
    `measure`: what `validate` gives, and its unit.
    """

    name: str
    state: str
    measure: str = "SI-SDRi in dB"
    plan: Plan
    net: nn.Module

    @abstractmethod
    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        """The given rows of a step's batch, on the CPU. Called from several threads; may depend on nothing else."""

    @abstractmethod
    def prepare(self, drawn: Any, step: int, rows: range) -> Any:
        """What the loss needs of it, made on the device, in float32 and without gradients."""

    @abstractmethod
    def loss(self, prepared: Any) -> dict[str, Tensor]:
        """What is minimised, under "loss", and other figures, each a mean over the rows; in the run's precision."""

    def hidden(self, name: str) -> bool:
        """Whether the parameter of this `name` is trained by Muon rather than AdamW."""
        return False

    def ready(self) -> None:
        """Bring the network into the mode that it is trained in."""
        self.net.train()

    def validate(self, weights: Weights) -> Mapping[str, float]:
        """Figures of the network with `weights`, the higher the better; the one that counts comes first."""
        return {}

    @abstractmethod
    def write(self, weights: Weights) -> None:
        """Write what was trained as part of a model."""
