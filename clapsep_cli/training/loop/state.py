"""Runs the steps of a task, and saves its state to disk, completely or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clapsep_cli.errors import CheckpointError, RecipeError
from clapsep_cli.store.tensors import read_notes, read_tensors, save_tensors
from clapsep_cli.training.loop.optimisation import Muon
from clapsep_cli.training.loop.task import Task, Weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Means:
    """Means of figures over the steps since the last `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0

    def add(self, figures: Mapping[str, Sequence[float]]) -> None:
        """Add the values of some steps, by name. They are added one by one, so the sums do not depend on the calls."""
        self.steps += max(map(len, figures.values()), default=0)
        for name, values in figures.items():
            for value in values:
                self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Return the means since the last call, by name."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


class _Through(nn.Module):
    """Computes a loss inside Fabric's wrapper, which sets the precision and averages gradients over devices."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return compute()


def mean_of(several: Sequence[Weights]) -> Weights:
    """Average the weights of several networks; integer tensors are taken from the first."""
    return {
        name: torch.stack([weights[name] for weights in several]).mean(0) if first.is_floating_point() else first
        for name, first in several[0].items()
    }


class Training:
    """A task with its optimiser, its averaged weights, and all that a resumed run needs."""

    def __init__(self, task: Task, fabric: Fabric, path: Path) -> None:
        self.task, self.fabric, self.path = task, fabric, path
        self.step = 0
        self.history: list[float] = []  # the validation figure that counts
        self.means = {"report": Means(), "validate": Means()}  # of figures, since either was last done
        self._figures: dict[str, list[Tensor]] = {}  # of each step, on the device, since they were last collected
        parameters = dict(task.net.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        buffers = [name for name in task.net.state_dict() if name not in parameters]
        self.kept = {*trained, *buffers}
        self.module, *self.optimisers = fabric.setup(_Through(task.net), *self._optimisers(trained))
        plan = task.plan
        self.average = {n: t.detach().clone() for n, t in task.net.state_dict().items()} if plan.ema else {}

    def _optimisers(self, trained: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Make Muon for the task's hidden layers, and AdamW for the other parameters."""
        plan, made = self.task.plan, list[torch.optim.Optimizer]()
        hidden = [name for name in trained if self.task.hidden(name)]
        others = [name for name in trained if name not in set(hidden)]
        rate = plan.schedule.rate(0, [])
        if hidden:
            made.append(Muon([trained[name] for name in hidden], rate, plan.weight_decay))
        if others:
            rest = [trained[name] for name in others]
            adamw = partial(torch.optim.AdamW, eps=plan.epsilon, weight_decay=plan.weight_decay, amsgrad=plan.amsgrad)
            made.append(adamw(rest, rate, fused=True))
        self.names = [names for names in (hidden, others) if names]  # by optimiser
        return made

    def weights(self) -> Weights:
        """Return all weights of the network, averaged over steps if the plan has `ema`."""
        return self.average or self.task.net.state_dict()

    def advance(self, parts: Sequence[tuple[range, Any]], rate: float) -> None:
        """Run one step of the optimiser on this device's rows of the batch, at the learning rate `rate`."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = rate
        sums: dict[str, Tensor] = {}
        for at, (rows, drawn) in enumerate(parts, 1):
            with torch.no_grad():
                prepared = self.task.prepare(self.fabric.to_device(drawn), self.step, rows)
            with self.fabric.no_backward_sync(self.module, enabled=at < len(parts)):
                figures = self.module(partial(self.task.loss, prepared))
                self.fabric.backward(figures["loss"] / len(parts))
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / len(parts)
        for name, value in sums.items():
            self._figures.setdefault(name, []).append(value)
        for optimiser in self.optimisers:
            self.fabric.clip_gradients(self.module, optimiser, max_norm=self.task.plan.clip, error_if_nonfinite=False)
            optimiser.step()
        self.step += 1
        keep = min(self.task.plan.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.task.net.state_dict().items() if self.average else ():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)
            else:
                self.average[name].copy_(value)

    def collect(self) -> None:
        """Add the figures of the last steps, means over devices, to `means`. Waits for the device.

        Raises `RecipeError` if the loss is not finite.
        """
        figures: dict[str, list[float]] = {
            name: cast(Tensor, self.fabric.all_reduce(torch.stack(values), reduce_op="mean")).tolist()
            for name, values in self._figures.items()
        }
        if not all(math.isfinite(value) for values in figures.values() for value in values):
            raise RecipeError(
                f"the loss is not finite after step {self.step} of the {self.task.name}; the state saved before is "
                "kept; try a lower learning rate, under another --out"
            )
        for kept in self.means.values():
            kept.add(figures)
        self._figures = {}

    def best(self) -> Weights | None:
        """Return the mean of the best weights in validation if the current ones are among them, else None.

        The plan sets how many are averaged; if several, they are kept beside the state.
        """
        count, latest = self.task.plan.keep_best, len(self.history) - 1
        order = sorted(range(len(self.history)), key=lambda at: (-self.history[at], at))[:count]
        if latest not in order or count == 1:
            return self.weights() if latest in order else None
        kept = {at: self.path.with_name(f"best-{at + 1}.safetensors") for at in order}
        save_tensors(self.weights(), kept[latest], {})
        for path in set(self.path.parent.glob("best-*.safetensors")) - {*kept.values()}:
            path.unlink()
        return mean_of([read_tensors(path) for path in kept.values() if path.exists()])

    def save(self) -> None:
        """Write the state to continue from: weights, moments, means and the step."""
        tensors = {f"net.{k}": v for k, v in self.task.net.state_dict().items() if k in self.kept}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for optimiser, names in zip(self.optimisers, self.names, strict=True):
            moments = optimiser.state_dict()["state"]
            for index, name in enumerate(names):
                tensors |= {f"optimiser.{name}.{k}": v for k, v in moments.get(index, {}).items()}
        means = {name: [kept.sums, kept.steps] for name, kept in self.means.items()}
        notes = {"step": str(self.step), "history": json.dumps(self.history), "means": json.dumps(means)}
        save_tensors(tensors, self.path, notes)

    def resume(self) -> None:
        """Continue from the state on disk, if there is one. Raises `CheckpointError` for the state of another task."""
        if not self.path.exists():
            return
        tensors, notes = read_tensors(self.path), read_notes(self.path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            weights = part("net.")
            if weights.keys() != self.kept:
                raise KeyError(next(iter(weights.keys() ^ self.kept)))
            self.task.net.load_state_dict(weights, strict=False)
            for name, value in part("average.").items():
                self.average[name].copy_(value)
            parameters = dict(self.task.net.named_parameters())
            for optimiser, names in zip(self.optimisers, self.names, strict=True):
                # The fused optimiser needs weights and moments with the same memory layout.
                state = {
                    index: {
                        k: torch.empty_like(parameters[name]).copy_(v) if v.dim() else v
                        for k, v in part(f"optimiser.{name}.").items()
                    }
                    for index, name in enumerate(names)
                }
                optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
            self.step, self.history = int(notes["step"]), json.loads(notes.get("history", "[]"))
            for name, (sums, steps) in json.loads(notes.get("means", "{}")).items():
                self.means[name].sums, self.means[name].steps = sums, steps
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: was written by a run of another configuration; use another --out"
            ) from error
