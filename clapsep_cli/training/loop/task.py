"""Defines a training task: its network, its examples and loss, and the plan of its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from clapsep_cli.training.loop.optimisation import Schedule

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """Length and optimisation of a task. A step takes `batch` examples, in `accumulate` parts on each device."""

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
    keep_best: int = 0  # number of the best weights in validation whose mean is written; 0 for the last weights
    workers: int = 1

    @staticmethod
    def of(recipe: object, **own: Any) -> Plan:
        """Make a plan from the settings of a recipe with the same names; `own` are the others."""
        shared = {field.name: getattr(recipe, field.name) for field in fields(Plan) if hasattr(recipe, field.name)}
        return Plan(**shared | own)


class Task(ABC):
    """Trains a network: draws the examples of a step and computes the loss.

    Attributes:
        name: in messages and logs.
        state: name of the file that resumes the task.
        measure: the figure that `validate` returns, and its unit.
        plan: length and optimisation.
        net: the network; its parameters that require gradients are trained.
    """

    name: str
    state: str
    measure: str = "SI-SDRi in dB"
    plan: Plan
    net: nn.Module

    @abstractmethod
    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        """Draw the given rows of a step's batch, on the CPU.

        It is called from several threads, so the result may depend only on the arguments.
        """

    @abstractmethod
    def prepare(self, drawn: Any, step: int, rows: range) -> Any:
        """Make the inputs of `loss` from the result of `draw`, on the device, in float32 and without gradients."""

    @abstractmethod
    def loss(self, prepared: Any) -> dict[str, Tensor]:
        """Compute the "loss" and other figures, each a mean over the rows, in the run's precision."""

    def hidden(self, name: str) -> bool:
        """Return True if Muon trains the parameter `name`, False for AdamW."""
        return False

    def ready(self) -> None:
        """Set the network to training mode."""
        self.net.train()

    def validate(self, weights: Weights) -> Mapping[str, float]:
        """Return figures of the network with `weights`, the higher the better; the first one ranks the weights."""
        return {}

    @abstractmethod
    def write(self, weights: Weights) -> None:
        """Write `weights` as part of a model."""
