"""What all commands share: their common options, and what they say on stderr while they work."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

    from clapsep_cli.tasks import Job

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|PATH", help="A model by name or folder; by default the best there is."),
]
DeviceOption = Annotated[str, typer.Option("--device", "-d", help="auto, cpu, cuda, cuda:N or mps.")]


def use_home(folder: Path | None) -> Path | None:
    """Keep models in `folder` from now on."""
    if folder is not None:
        os.environ["CLAPSEP_HOME"] = str(folder)
    return folder


ModelDirOption = Annotated[
    Path | None,
    typer.Option(
        "--model-dir",
        metavar="DIR",
        callback=use_home,
        expose_value=False,
        help="Where models are kept; the environment variable CLAPSEP_HOME says the same.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def note(line: str) -> None:
    typer.echo(f"clapsep: {line}", err=True)


def progress(quiet: bool, *, transfer: bool = False) -> Progress | _NoProgress:
    """Progress bars on stderr, if somebody is there to see them; of a `transfer` in bytes and their rate."""
    if quiet or not sys.stderr.isatty():
        return _NoProgress()
    from rich import progress as bars
    from rich.console import Console
    from rich.progress import Progress

    measure = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if transfer else ()
    described = bars.TextColumn("{task.description}", markup=False)
    columns = (described, bars.BarColumn(), *measure, bars.TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _NoProgress:
    """Stands in for rich's bars where there is no terminal, and saves their import."""

    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, *, total: float | None) -> TaskID:
        return cast("TaskID", 0)

    def update(
        self, task: TaskID, *, completed: float, total: float | None = None, description: str | None = None
    ) -> None:
        pass

    def remove_task(self, task: TaskID) -> None:
        pass

    def advance(self, task: TaskID, advance: float = 1) -> None:
        pass


@contextmanager
def downloads(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for each file that is downloaded while it lasts."""
    tasks: dict[str, TaskID] = {}
    with progress(quiet, transfer=True) as bars:

        def update(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done)

        yield update


class Reporter:
    """Shows how a run goes on, on stderr: bars for the recordings at work and for all, or lines of JSON.

    `how`: "auto" for bars where there is a terminal, "json", or "none".
    """

    def __init__(self, how: str, quiet: bool, count: int) -> None:
        if how not in ("auto", "json", "none"):
            raise typer.BadParameter(f"{how!r} is not auto, json or none", param_hint="--progress")
        self.json, self.count, self.finished = how == "json" and not quiet, count, 0
        self.seconds: dict[Path, float] = {}  # done of each recording
        self.began = time.monotonic()
        self.bars = progress(quiet or how != "auto")
        self.tasks: dict[Path, TaskID] = {}
        self.all: TaskID | None = None

    def __enter__(self) -> Reporter:
        self.bars.__enter__()
        if self.count > 1:
            self.all = self.bars.add_task(f"0 of {self.count}", total=self.count)
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.__exit__(None, None, None)

    def update(self, job: Job, done: float, total: float) -> None:
        """Of a recording `done` seconds are separated, of `total` (0 if that is not known)."""
        path = job.input.path
        self.seconds[path] = done
        if self.json:
            self._say(event="progress", input=str(path), seconds=round(done, 3), total=round(total, 3))
        if path not in self.tasks:
            self.tasks[path] = self.bars.add_task(path.name, total=total or None)
        self.bars.update(self.tasks[path], completed=done, total=total or None)
        if self.all is not None:
            self.bars.update(self.all, completed=self.finished, description=self._overall())

    def finish(self, path: Path) -> None:
        """A recording is done, or has failed."""
        self.finished += 1
        if self.json:
            self._say(event="done", input=str(path), finished=self.finished, count=self.count)
        if path in self.tasks:
            self.bars.remove_task(self.tasks.pop(path))
        if self.all is not None:
            self.bars.update(self.all, completed=self.finished, description=self._overall())

    def _overall(self) -> str:
        speed = sum(self.seconds.values()) / max(1e-6, time.monotonic() - self.began)
        return f"{self.finished} of {self.count}, {speed:.0f} × real time"

    def _say(self, **facts: object) -> None:
        typer.echo(json.dumps(facts, ensure_ascii=False), err=True)
