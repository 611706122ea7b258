"""Defines the errors that users see. `cli` catches their base class and prints one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ClapsepError(Exception):
    """An error in one clear line: what is wrong, where, what to do. The command ends with `exit_code`."""

    exit_code = 1


class AudioError(ClapsepError):
    """A recording cannot be read, or is not usable as audio."""


class UsageError(ClapsepError):
    """Options contradict each other or have an unknown value."""

    exit_code = 2


class QueryError(ClapsepError):
    """A query is missing, empty or contradictory."""

    exit_code = 2


class OutputError(ClapsepError):
    """An output cannot be written, or exists already."""


class TakenError(OutputError):
    """An output exists already."""


class DeviceError(ClapsepError):
    """The requested device is missing."""

    exit_code = 3


class ExtraError(ClapsepError):
    """A package of an optional extra is not installed."""

    exit_code = 3


class ModelError(ClapsepError):
    """A model is unknown or its files are missing."""

    exit_code = 3


class DownloadError(ModelError):
    """A model's file cannot be downloaded, or is not the pinned one."""


class CheckpointError(ModelError):
    """A model's file is damaged, or does not fit."""


class RecipeError(ClapsepError):
    """A setting of training is unknown, or does not fit the others."""

    exit_code = 2


class ManifestError(ClapsepError):
    """A manifest has errors."""


class ClapsepWarning(UserWarning):
    """A result may differ from what the user expects. The command prints it as a note."""


@contextmanager
def forwarded_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Call `say` with each different `ClapsepWarning` inside this context, instead of showing it."""
    with warnings.catch_warnings():
        others, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, ClapsepWarning):
                others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                say(str(message))

        warnings.showwarning = show
        warnings.simplefilter("always", ClapsepWarning)
        yield


class StoppedError(ClapsepError):
    """The user stopped the work; nothing that was finished is lost."""

    exit_code = 130
