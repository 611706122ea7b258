"""Prints lines, notes and progress."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

    from clapsep_cli.jobs.job import Job
    from clapsep_cli.store.checkpoint import Model

LINE_LETTERS = 1000  # longest line of a note
NAME_LETTERS = 40  # of a recording's name beside its bar


_naming: list[Callable[[str], str]] = []  # holds the last one given


def name_by(shown: Callable[[str], str]) -> None:
    """Print what `shown` makes of each line from now on: URLs for paths that stand for them."""
    _naming[:] = [shown]


def plain(text: str) -> str:
    """Escape control characters and the like in `text`, which harm a terminal; file names may contain them."""
    letters = (c if c.isprintable() or c in "\n\u200c\u200d" else ascii(c)[1:-1] for c in text)
    return "".join(letters)


def echo(line: str, stream: TextIO) -> None:
    """Print a line on any stream; characters that its encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    try:
        line = plain(_naming[0](line) if _naming else line)
        typer.echo(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    except OSError:  # the pipe or terminal was closed; a lost note is no failure
        if stream is not sys.stderr:
            raise


def note(line: str) -> None:
    """Print on stderr; of a very long line, the beginning and the end."""
    half = LINE_LETTERS // 2
    lines = (one if len(one) <= LINE_LETTERS else f"{one[:half]} … {one[-half:]}" for one in line.split("\n"))
    echo("clapsep: " + "\n".join(lines), sys.stderr)


def notes(quiet: bool) -> Callable[[str], None]:
    """Return `note`, or a function that prints nothing if `quiet`: for everything except errors."""
    return (lambda line: None) if quiet else note


def progress_bars(quiet: bool, *, transfer: bool = False) -> Progress:
    """Make progress bars on stderr; none if `quiet` or without a terminal. For a `transfer`, show bytes and rate."""
    from rich import progress
    from rich.console import Console

    measure = (progress.DownloadColumn(), progress.TransferSpeedColumn()) if transfer else ()
    described = progress.TextColumn("{task.description}", markup=False)
    return progress.Progress(
        *(described, progress.BarColumn(), *measure, progress.TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
        # Printed lines go above the bars on a terminal; a file or a pipe gets them unchanged.
        redirect_stdout=sys.stdout.isatty(),
        disable=quiet or not sys.stderr.isatty(),
    )


@contextmanager
def downloads(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that shows a progress bar on stderr for each downloaded file."""
    tasks: dict[str, TaskID] = {}
    with progress_bars(quiet, transfer=True) as bars:

        def update(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done)

        yield update


def load_model(name: str | Path | None, device: str, precision: str, quiet: bool) -> Model:
    """Load a model, and show notes and progress of a download."""
    from clapsep_cli.store import library

    with downloads(quiet) as shown:
        return library.load_model(name, device, precision, say=notes(quiet), progress=shown)


class Reporter:
    """Shows the progress of a run on stderr: bars for each recording and for all, or lines of JSON.

    Args:
        how: "auto" for bars on a terminal, "json" or "none".
        quiet: show nothing.
        count: number of recordings.
    """

    def __init__(self, how: str, quiet: bool, count: int) -> None:
        self.json, self.count, self.finished = how == "json" and not quiet, count, 0
        self.open: dict[Path, TaskID] = {}
        self.done: dict[Path, float] = {}  # seconds separated so far of each open recording
        self.seconds = 0.0  # separated so far of all recordings
        self.bars = progress_bars(quiet or how != "auto")
        self.all: TaskID | None = None

    def __enter__(self) -> Reporter:
        self.bars.__enter__()
        self.began = time.monotonic()
        if self.count > 1:
            self.all = self.bars.add_task(f"0 of {self.count}", total=self.count)
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.__exit__(None, None, None)

    def update(self, job: Job, done: float, total: float) -> None:
        """Show the progress of a job: `done` of `total` seconds (0 if unknown) are separated."""
        path = job.input.path
        if self.json:
            self._say("progress", path, seconds=round(done, 3), total=round(total, 3) or None)
        if path not in self.open:
            self.open[path] = self.bars.add_task(_short(path), total=total or None)
        self.seconds += done - self.done.get(path, 0.0)
        self.done[path] = done
        description = _short(path) if self.all is not None else f"{_short(path)}, {self._speed()}"
        self.bars.update(self.open[path], completed=done, total=total or None, description=description)
        self._update_all()

    def finish(self, path: Path, failed: bool) -> None:
        """Show that a recording is done or has failed."""
        self.finished += 1
        if self.json:
            self._say("failed" if failed else "done", path, finished=self.finished, count=self.count)
        if path in self.open:
            self.bars.remove_task(self.open.pop(path))
            del self.done[path]
        self._update_all()

    def _update_all(self) -> None:
        if self.all is not None:
            completed = self.finished + sum(one.percentage for one in self.bars.tasks if one.id != self.all) / 100
            description = f"{self.finished} of {self.count}, {self._speed()}"
            self.bars.update(self.all, completed=completed, description=description)

    def _speed(self) -> str:
        return f"{self.seconds / max(1e-6, time.monotonic() - self.began):.0f} × real time"

    def _say(self, event: str, path: Path, **facts: object) -> None:
        echo(json.dumps({"event": event, "input": str(path), **facts}), sys.stderr)


def _short(path: Path) -> str:
    name = plain(path.name)
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
