"""What all commands share: their common options, and what they say on stderr while they work."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|PATH", help="A model by name or folder; by default the best there is."),
]
DeviceOption = Annotated[str, typer.Option("--device", "-d", help="auto, cpu, cuda, cuda:N or mps.")]


def _use_home(folder: Path | None) -> None:
    if folder is not None:
        os.environ["CLAPSEP_HOME"] = str(folder)


ModelDirOption = Annotated[
    Path | None,
    typer.Option(
        "--model-dir",
        metavar="DIR",
        callback=_use_home,
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

    def update(self, task: TaskID, *, completed: float, total: float | None = None) -> None:
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
