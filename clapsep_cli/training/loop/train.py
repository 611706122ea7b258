"""Runs the training loop on Lightning Fabric, which provides devices, machines and precisions.

A `Recipe` holds the settings and fits one `Task` after another.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor

from clapsep_cli.data import LABELS, Corpus, Labelling, read_corpus
from clapsep_cli.errors import DeviceError, ExtraError, RecipeError, StoppedError
from clapsep_cli.store.checkpoint import Model, choose_precision
from clapsep_cli.store.library import load_model
from clapsep_cli.store.tensors import read_notes
from clapsep_cli.training.loop import record
from clapsep_cli.training.loop.sampling import Store, ahead
from clapsep_cli.training.loop.settings import Seed, Workers, settings
from clapsep_cli.training.loop.state import Training
from clapsep_cli.training.loop.task import Plan, Task, Weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"32-true": "32-true", "bf16-mixed": "bf16-mixed"}
SILENT_SECONDS = 10.0  # without a report, after which a run reports its step
AGREED_EVERY = 10  # steps after which several processes agree on whether to stop
ESTIMATE = "estimate"


@dataclass(frozen=True)
class Report:
    """Progress of a run.

    Attributes:
        stage: name of the task, "validation", or "estimate".
        step: the current step, of `steps`.
        steps: number of steps of the stage.
        figures: means since the last report, such as the loss in dB; in a validation, means of `measure` by kind of
            query or by set; in an estimate, the seconds of each stage. Empty if only the step is reported.
        seconds_left: to the end of the stage; in an estimate, of all stages.
        measure: name and unit of a validation's figures.
        text: a remark.
    """

    stage: str
    step: int
    steps: int
    figures: Mapping[str, float]
    seconds_left: float = math.nan
    measure: str = ""
    text: str = ""


Listener = Callable[[Report], None]


@dataclass(frozen=True)
class Hardware:
    """Devices to train on, as Lightning Fabric names them. A recipe's `batch` is that of all devices together."""

    accelerator: str = "auto"
    devices: str = "1"
    nodes: int = 1
    precision: str = ""  # the recipe's if empty


@settings
class Recipe(ABC):
    """Settings that all recipes share.

    Attributes:
        free: names of settings that a resumed run may change.
        use: the command that uses the model in a `{folder}`.
    """

    free: ClassVar[frozenset[str]] = frozenset({"precision", "report_every", "save_every", "workers"})
    use: ClassVar[str] = 'clapsep extract --model {folder} MIX --pos "…"'

    seed: Seed = 0
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"  # bfloat16 where the device has it natively
    min_clips: PositiveInt = 1  # of a label; fewer are an error
    store: Store = "auto"  # where clips are held
    workers: Workers = 1  # threads that decode, on each device
    report_every: PositiveInt = 50  # steps
    save_every: PositiveInt = 250  # steps

    @property
    def needs(self) -> str:
        """Name or folder of the model to start from; empty for none."""
        return ""

    def model(self, config: type, kind: str, device: torch.device = torch.device("cpu")) -> Model:
        """Load the model to start from, in float32. Raises `RecipeError` if its configuration is no `config`.

        `kind`: name of models with a `config`, for messages.
        """
        found = load_model(self.needs, "cpu")
        if not isinstance(found.config, config):
            raise RecipeError(f"{found.name} is of the family {found.family!r}; this preset trains {kind} models")
        return Model(found.name, found.folder, device, precision="high")

    @property
    def labelling(self) -> Labelling:
        """Rules for the labels of a manifest."""
        return LABELS

    def suited(self, corpus: Corpus) -> Recipe:
        """Return the recipe with the settings that depend on the size of `corpus`."""
        return self

    @abstractmethod
    def check(self, corpus: Corpus) -> None:
        """Raise `ClapsepError` if `corpus` cannot be trained on by this recipe, before anything is written."""

    @abstractmethod
    def train(self, run: Run) -> None:
        """Train on the run's corpus and leave a model in the run's folder."""


@dataclass
class Run:
    """Runs tasks on a corpus and saves to a folder.

    Attributes:
        fabric: the devices.
        folder: where the model and the state go.
        corpus: the clips.
        listen: called with each report.
        stop: once set, the state is saved after the current step, and `StoppedError` raised.
    """

    fabric: Fabric
    folder: Path
    corpus: Corpus
    listen: Listener
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    @property
    def leads(self) -> bool:
        """True in the one process that writes and reports."""
        return bool(self.fabric.is_global_zero)

    def tell(self, report: Report) -> None:
        """Pass a report to `listen`, in the process that leads."""
        if self.leads:
            self.listen(report)

    def fit(self, task: Task) -> Weights:
        """Train from the saved state, if any, to the plan's last step; return the final weights.

        Raises `StoppedError` if it was stopped; the state is saved.
        """
        plan, training = task.plan, Training(task, self.fabric, self.folder / task.state)
        training.resume()
        task.ready()
        clock = Clock(training.step)
        log = record.Log(self.folder, task.name, training.step) if self.leads else None
        try:
            for drawn in self._drawn(task, training.step):
                rate = plan.schedule.rate(training.step, training.history)
                training.advance(drawn, rate)
                every = (plan.report_every, plan.validate_every, plan.save_every)
                last = training.step == plan.steps
                report, validate, save = (last or training.step % steps == 0 for steps in every)
                report, stop = report or training.step == 1, self._stopped(training.step)
                if report or validate or save or stop:
                    training.collect()
                left = clock.seconds_left(training.step, plan.steps)
                if report:
                    speed = plan.batch / clock.seconds_a_step(training.step)
                    figures = {**training.means["report"].take(), "lr": rate, "examples/s": speed}
                    self._tell(Report(task.name, training.step, plan.steps, figures, left), log, clock)
                elif clock.silent > SILENT_SECONDS:
                    self._tell(Report(task.name, training.step, plan.steps, {}, left), None, clock)
                if validate:
                    with clock.stopped():
                        figures = dict(self._validate(training))
                    if figures:
                        told = Report("validation", training.step, plan.steps, figures, left, task.measure)
                        self._tell(told, log, clock)
                if (save or stop) and self.leads:
                    training.save()
                if stop:
                    raise StoppedError(
                        f"stopped after step {training.step} of {plan.steps} of the {task.name}; its state is saved in "
                        f"{self.folder}, and the same command continues from there"
                    )
        finally:
            if log:
                log.close()
        if self.leads and not (plan.keep_best and training.history):
            task.write(training.weights())
        self.fabric.barrier()
        return training.weights()

    def rehearse(self, task: Task) -> float:
        """Estimate the seconds that `task` will take from its saved state, by the second of two steps.

        The task cannot be trained afterwards.
        """
        training = Training(task, self.fabric, self.folder / task.state)
        done = int(read_notes(training.path)["step"]) if training.path.exists() else 0
        task.ready()
        began = time.monotonic()
        for drawn in islice(self._drawn(task, 0), 2):
            self.check_stop()
            clock = time.monotonic()
            training.advance(drawn, 0.0)
            training.collect()
            began = clock
        return (time.monotonic() - began) * max(0, task.plan.steps - done)

    def check_stop(self) -> None:
        """Raise `StoppedError` if `stop` is set while there is nothing to save, in a run of one process."""
        if self.stop.is_set() and self.fabric.world_size == 1:
            raise StoppedError(f"stopped; the same command continues from {self.folder}")

    def _stopped(self, step: int) -> bool:
        """Return True to stop after `step`; all processes return the same."""
        if self.fabric.world_size == 1:
            return self.stop.is_set()
        if step % AGREED_EVERY:
            return False
        asked = torch.tensor(float(self.stop.is_set()), device=self.device)
        return bool(cast(Tensor, self.fabric.all_reduce(asked, reduce_op="sum")) > 0)

    def _drawn(self, task: Task, first: int) -> Iterator[list[tuple[range, Any]]]:
        """Draw this process's rows of each step, in parts, from step `first` on."""
        parts, pin = self._rows(task.plan), self.device.type == "cuda"  # pinned memory is copied during computation

        def draw(step: int) -> list[tuple[range, Any]]:
            drawn = [(rows, task.draw(step, rows)) for rows in parts]
            return [(rows, tuple(t.pin_memory() for t in tensors) if pin else tensors) for rows, tensors in drawn]

        return ahead(draw, range(first, task.plan.steps), task.plan.workers)

    def _tell(self, report: Report, log: record.Log | None, clock: Clock) -> None:
        clock.told = time.monotonic()
        if log:
            log.add(report.step, report.figures)
        self.tell(report)

    def _validate(self, training: Training) -> Mapping[str, float]:
        """Validate in the leading process and share the figures; write the best weights if the plan keeps them."""
        task, history = training.task, training.history
        figures: dict[str, float] = {}
        if self.leads:
            figures = dict(task.validate(training.weights()))
            task.ready()
        figures = self.fabric.broadcast(figures)
        loss = training.means["validate"].take()["loss"]
        history.append(next(iter(figures.values()), -loss))  # without clips to validate on, the loss counts
        best = training.best() if task.plan.keep_best and self.leads else None
        if best:
            task.write(best)
        return figures

    def _rows(self, plan: Plan) -> list[range]:
        """Return this process's rows of each batch, in as many parts as are accumulated."""
        parts = self.fabric.world_size * plan.accumulate
        size, rest = divmod(plan.batch, parts)
        if rest or not size:
            raise RecipeError(f"a batch of {plan.batch} cannot be shared evenly by {parts} (devices times accumulate)")
        first = self.fabric.global_rank * plan.accumulate
        return [range(at * size, (at + 1) * size) for at in range(first, first + plan.accumulate)]


class Clock:
    """Measures the seconds per step since a run began or resumed, without pauses."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.began = self.told = time.monotonic()

    @property
    def silent(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.told

    def seconds_a_step(self, step: int) -> float:
        """Return the mean seconds per step, at the end of `step`."""
        return (time.monotonic() - self.began) / max(1, step - self.step)

    def seconds_left(self, step: int, steps: int) -> float:
        """Estimate the seconds from the end of `step` to that of the last of `steps`."""
        return self.seconds_a_step(step) * (steps - step)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time spent inside this context."""
        since = time.monotonic()
        yield
        self.began += time.monotonic() - since


def train(
    manifest: Path,
    out: Path,
    recipe: Recipe,
    listen: Listener = lambda report: None,
    hardware: Hardware | None = None,
    stop: threading.Event | None = None,
    audio: Path | None = None,
    held_out: Path | None = None,
) -> bool:
    """Train by `recipe` on the clips that `manifest` lists, and write a model to the folder `out`.

    A stopped run continues from `out` with the same draws.

    Args:
        manifest: a CSV `file,label[,captions,split]`; clips whose split is not "train" are only validated on.
        out: the run's folder.
        recipe: from `presets.build`, or one of the classes in `mini`, `clapsep` and `tuss`.
        listen: is called with each report.
        hardware: the devices; with several, Fabric starts this program once for each.
        audio: folder of the clips; by default that of each manifest.
        held_out: a manifest of clips to validate on.
        stop: once set, the run stops after the current step; its state is saved.

    Returns:
        True in the one process that writes.

    Raises:
        ManifestError: lists all faults of the clips.
        RecipeError: settings that do not fit.
        CheckpointError: `out` holds another run.
        ModelError: a model is missing.
        ExtraError: a package is missing.
        StoppedError: `stop` was set.
    """
    hardware = hardware or Hardware()
    if hardware.precision and hardware.precision not in PRECISIONS:
        raise RecipeError(f"no precision {hardware.precision!r}: use {' or '.join(PRECISIONS)}")
    try:
        for package in ("lightning_fabric", "tensorboard"):  # the logger needs the latter
            import_module(package)
    except ModuleNotFoundError as error:
        raise ExtraError(f"training needs {error.name}: pip install 'clapsep[train]'") from error
    corpus = read_corpus(manifest, recipe.min_clips, recipe.labelling, audio, held_out)
    recipe = recipe.suited(corpus)
    recipe.check(corpus)
    record.check(out, recipe, corpus)
    asked = hardware.precision or recipe.precision
    before = record.precision(out) if asked == "auto" else ""
    fabric, precision = _fabric(hardware, before or asked)
    run = Run(fabric, out, corpus, listen, stop or threading.Event())
    if run.leads:
        out.mkdir(parents=True, exist_ok=True)
        on = {"accelerator": fabric.device.type, "devices": fabric.world_size, "precision": precision}
        record.write(out, recipe, corpus, {"nodes": hardware.nodes, **on})
    why = " (as it began)" if before else " (no native bfloat16)" if asked == "auto" and precision == "32-true" else ""
    text = f"on {fabric.device}, {precision}{why}"
    run.tell(Report("clips read", len(corpus.clips), len(corpus.clips), {"hours": corpus.hours}, text=text))
    fabric.barrier()
    recipe.train(run)
    return run.leads


def _fabric(hardware: Hardware, precision: str) -> tuple[Fabric, str]:
    """Launch Fabric; "auto" becomes bfloat16 where the device has it natively, and float32 where it would be slower.

    Raises `DeviceError` for missing devices.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it reports precisions and processes
    try:
        devices = hardware.devices if hardware.devices == "auto" else int(hardware.devices)
        build = partial(Fabric, accelerator=hardware.accelerator, devices=devices, num_nodes=hardware.nodes)
        if precision == "auto":
            native = choose_precision("auto", build().device) == torch.bfloat16
            precision = "bf16-mixed" if native else "32-true"
        fabric = build(precision=PRECISIONS[precision])
        fabric.launch()
    except (ValueError, RuntimeError) as error:  # Fabric reports missing devices so
        raise DeviceError(f"cannot train on these devices: {' '.join(str(error).split())}") from error
    return fabric, precision
