"""Training, whatever is trained: one loop on Lightning Fabric, which brings the devices, machines and precisions.

A `Recipe` says what to do with a corpus; it has the loop fit one `Task` after another.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from clapsep_cli.data import LABELS, Corpus, Labelling, read_corpus
from clapsep_cli.errors import DeviceError, ModelError, RecipeError
from clapsep_cli.training import record
from clapsep_cli.training.pool import Store
from clapsep_cli.training.sampling import ahead
from clapsep_cli.training.settings import Seed, Workers, settings
from clapsep_cli.training.state import Training
from clapsep_cli.training.task import Plan, Task, Weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"32-true": "32-true", "bf16-mixed": "bf16-mixed"}


@dataclass(frozen=True)
class Report:
    """What a run says of itself while it goes on.

    `figures` are means since the last report: the loss in dB, and so on; of the stage "validation", means of `measure`
    by kind of query or by set. `seconds_left` counts to the end of the stage. What comes before the first step are
    stages, too: the clips that were read, and the like.
    """

    stage: str
    step: int
    steps: int
    figures: Mapping[str, float]
    seconds_left: float = math.nan
    measure: str = ""


Listener = Callable[[Report], None]


@dataclass(frozen=True)
class Hardware:
    """On what to train, as Lightning Fabric names it. `batch` is always that of all devices together."""

    accelerator: str = "auto"
    devices: str = "1"
    nodes: int = 1
    precision: str = ""  # the recipe's if empty


@settings
class Recipe(ABC):
    """What every recipe can be set to. `free`: names of settings that a resumed run may change. `use`: the command
    that uses the model in a `{folder}`."""

    free: ClassVar[frozenset[str]] = frozenset({"report_every", "save_every", "workers"})
    use: ClassVar[str] = 'clapsep extract --model {folder} MIX --pos "…"'

    seed: Seed = 0
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    min_clips: PositiveInt = 1  # of a label; fewer are taken for a mistake
    store: Store = "auto"  # where clips are held
    workers: Workers = 1  # threads that decode, on each device
    report_every: PositiveInt = 50  # steps
    save_every: PositiveInt = 250  # steps

    @property
    def needs(self) -> str:
        """The model that it starts from, by name or folder; none if empty."""
        return ""

    @property
    def labelling(self) -> Labelling:
        """How a manifest is to say what its clips are of."""
        return LABELS

    @abstractmethod
    def check(self, corpus: Corpus) -> None:
        """Raise `ClapsepError` for what is missing to train on `corpus` by this recipe, before anything is written."""

    @abstractmethod
    def train(self, run: Run) -> None:
        """Train on the run's corpus and leave a model in the run's folder."""


@dataclass
class Run:
    """A corpus, a folder, and the devices to train on. `leads`: in the one process that writes and reports."""

    fabric: Fabric
    folder: Path
    corpus: Corpus
    listen: Listener

    @property
    def device(self) -> torch.device:
        """On which this process computes."""
        return self.fabric.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.fabric.is_global_zero)

    def tell(self, report: Report) -> None:
        """Let whoever listens know, from the one process that reports."""
        if self.leads:
            self.listen(report)

    def fit(self, task: Task) -> Weights:
        """Train until the plan's steps, from wherever the state in the folder stands; the weights at the end."""
        plan, training = task.plan, Training(task, self.fabric, self.folder / task.state)
        training.resume()
        parts, clock = self._rows(plan), Clock(training.step)
        log = record.Log(self.folder, task.name, training.step) if self.leads else None

        def draw(step: int) -> list[tuple[range, Any]]:
            return [(rows, self._pinned(task.draw(step, rows))) for rows in parts]

        def tell(stage: str, figures: Mapping[str, float]) -> None:
            if log:
                log.add(training.step, figures)
                left = clock.seconds_left(training.step, plan.steps)
                measure = task.measure if stage == "validation" else ""
                self.tell(Report(stage, training.step, plan.steps, figures, left, measure))

        task.ready()
        for drawn in ahead(draw, range(training.step, plan.steps), plan.workers):
            rate = plan.schedule.rate(training.step, training.history)
            training.advance(drawn, rate)
            report, validate, save = map(partial(_due, training.step, plan.steps), plan.every)
            if report or validate or save:
                training.collect()
            if report:
                speed = plan.batch / clock.seconds_a_step(training.step)
                tell(task.name, {**training.means["report"].take(), "lr": rate, "examples/s": speed})
            if validate:
                with clock.stopped():
                    figures = self._validate(training)
                if figures:
                    tell("validation", figures)
            if save and self.leads:
                training.save()
        if self.leads and not (plan.keep_best and training.history):
            task.write(training.weights())
        if log:
            log.close()
        self.fabric.barrier()
        return training.weights()

    def _validate(self, training: Training) -> Mapping[str, float]:
        """Validate in the leading process, and let all of them know; keep the best weights where that is the plan."""
        task, history = training.task, training.history
        figures: dict[str, float] = {}
        if self.leads:
            figures = dict(task.validate(training.weights()))
            task.ready()
        figures = self.fabric.broadcast(figures)
        loss = training.means["validate"].take()["loss"]
        history.append(next(iter(figures.values()), -loss))  # without clips to validate on, the loss is watched
        best = training.best() if task.plan.keep_best and self.leads else None
        if best:
            task.write(best)
        return figures

    def _rows(self, plan: Plan) -> list[range]:
        """The rows of each batch that are this process's, in as many parts as are accumulated."""
        parts = self.fabric.world_size * plan.accumulate
        size, rest = divmod(plan.batch, parts)
        if rest or not size:
            raise RecipeError(f"a batch of {plan.batch} cannot be shared evenly by {parts} (devices times accumulate)")
        first = self.fabric.global_rank * plan.accumulate
        return [range(at * size, (at + 1) * size) for at in range(first, first + plan.accumulate)]

    def _pinned(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In memory that a GPU fetches from while it computes."""
        return tuple(tensor.pin_memory() for tensor in drawn) if self.device.type == "cuda" else drawn


def _due(step: int, steps: int, every: int) -> bool:
    return step % every == 0 or step == steps


class Clock:
    """Time per step since a run went on, without what it spent on other things. In seconds."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.began = step, time.monotonic()

    def seconds_a_step(self, step: int) -> float:
        """On average, at the end of `step`."""
        return (time.monotonic() - self.began) / max(1, step - self.step)

    def seconds_left(self, step: int, steps: int) -> float:
        """From the end of `step` to that of the last of `steps`, at the same pace."""
        return self.seconds_a_step(step) * (steps - step)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Not to count what is done meanwhile."""
        since = time.monotonic()
        yield
        self.began += time.monotonic() - since


def train(
    manifest: Path,
    out: Path,
    recipe: Recipe,
    listen: Listener = lambda report: None,
    hardware: Hardware | None = None,
) -> bool:
    """Train by `recipe` on the clips that `manifest` lists, and leave a model in the folder `out`.

    `manifest`: a CSV `file,label[,captions,split]`; clips whose split is not "train" are only validated on. `recipe`:
    from `recipes.build`, or one of the classes in `mini`, `clapsep` and `tuss`; it says what labels
    there may be. A run that was stopped goes on from `out`; what it would have drawn does not change. `listen` hears
    how it goes. With several devices, Fabric starts this program once for each; True is returned in the one process
    that writes.

    Raises `ManifestError` for what is wrong with the clips, all at once; `RecipeError` for settings that do not fit;
    `CheckpointError` where `out` holds another run; `ModelError` for a model or a package that is missing.
    """
    hardware = hardware or Hardware()
    precision = hardware.precision or recipe.precision
    if precision not in PRECISIONS:
        raise RecipeError(f"no precision {precision!r}: use {' or '.join(PRECISIONS)}")
    try:
        from lightning_fabric import Fabric

        import_module("tensorboard")  # which the logger needs later
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells of precisions and processes
    except ModuleNotFoundError as error:
        raise ModelError(f"training takes {error.name} too: pip install 'clapsep[train]'") from error
    corpus = read_corpus(manifest, recipe.min_clips, recipe.labelling)
    recipe.check(corpus)
    record.check(out, recipe, corpus)
    try:
        devices = hardware.devices if hardware.devices == "auto" else int(hardware.devices)
        fabric = Fabric(
            accelerator=hardware.accelerator, devices=devices, num_nodes=hardware.nodes, precision=PRECISIONS[precision]
        )
        fabric.launch()
    except (ValueError, RuntimeError) as error:  # Fabric's own words for what is not there
        raise DeviceError(f"cannot train there: {' '.join(str(error).split())}") from error
    run = Run(fabric, out, corpus, listen)
    if run.leads:
        out.mkdir(parents=True, exist_ok=True)
        on = {"accelerator": fabric.device.type, "devices": fabric.world_size, "precision": precision}
        record.write(out, recipe, corpus, {"nodes": hardware.nodes, **on})
    run.tell(Report("clips read", len(corpus.clips), len(corpus.clips), {"hours": corpus.hours}))
    fabric.barrier()
    recipe.train(run)
    return run.leads
