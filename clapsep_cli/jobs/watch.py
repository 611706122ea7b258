"""Finds recordings as they arrive in a folder, once they are complete."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from clapsep_cli.errors import AudioError, ClapsepWarning
from clapsep_cli.jobs.inputs import Input, expand

LOOK_SECONDS = 1.0  # between two looks; polling also works on network shares, which send no change events
STILL_LOOKS = 2  # without a change, after which a file counts as complete

State = tuple[int, int]  # of a file: its size, and when it was changed, in ns


def arrivals(
    folder: Path,
    stop: threading.Event,
    recursive: bool = False,
    out: Path | None = None,
    written: Callable[[Path], bool] = lambda path: False,
) -> Iterator[list[Input]]:
    """Yield the complete recordings of a folder, then those that arrive or change, until `stop` is set.

    A recording is complete when its size and time of change stay the same for two looks, a second apart. The other
    arguments are those of `expand`. Raises `AudioError` if there is no such folder.
    """
    if not folder.is_dir():
        raise AudioError(f"{folder}: --watch needs a folder")
    still: dict[Path, tuple[State, int]] = {}  # state of a file, and the number of looks since it changed
    taken: dict[Path, State] = {}
    while not stop.is_set():
        found = {item: _state(item.path) for item in _present(folder, recursive, out, written)}
        states = {item.path: state for item, state in found.items() if state is not None}
        still = {
            path: (state, still[path][1] + 1 if path in still and still[path][0] == state else 0)
            for path, state in states.items()
        }
        complete = {path for path, (_, looks) in still.items() if looks >= STILL_LOOKS}
        new = [item for item in found if item.path in complete and taken.get(item.path) != found[item]]
        taken = {path: state for path, state in taken.items() if path in states}
        taken |= {item.path: states[item.path] for item in new}
        if new:
            yield new
        stop.wait(LOOK_SECONDS)


def _present(folder: Path, recursive: bool, out: Path | None, written: Callable[[Path], bool]) -> list[Input]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClapsepWarning)  # of outputs that are left out, at every look
        try:
            return expand([str(folder)], recursive, out, written)
        except AudioError:  # there are none yet
            return []


def _state(path: Path) -> State | None:
    try:
        status = path.stat()
    except OSError:  # the file was removed since it was listed
        return None
    return (status.st_size, status.st_mtime_ns) if status.st_size else None
