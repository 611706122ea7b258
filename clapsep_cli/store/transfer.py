"""What the clients of all kinds of remote files share: attempts, and words for what went wrong and for the way out."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, Remote

Progress = Callable[[int, int], None]  # bytes done, bytes in all; must not raise

BACKOFF_S = (1.0, 2.0, 4.0)  # pauses before further attempts, in seconds; after the last one, the error is the user's
_PASSING_STATUS = (408, 429)  # besides all 5xx
_T = TypeVar("_T")


@dataclass(frozen=True)
class Arrived:
    """A file in a client's cache: whether it was `transferred` there by us; its hash in hex, if it is known by now."""

    path: Path
    transferred: bool
    sha256: str | None = None


def attempts(call: Callable[[], _T], passes: Callable[[Exception], bool], explain: Callable[[Exception], str]) -> _T:
    """Call until it succeeds or fails with what does not pass; then raise `DownloadError` with what `explain` says."""
    pauses = iter(BACKOFF_S)
    while True:
        try:
            return call()
        except DownloadError:
            raise
        except Exception as error:
            pause = next(pauses, None)
            if pause is None or not passes(error):
                raise DownloadError(explain(error)) from error
        time.sleep(pause)


def passing_status(status: int) -> bool:
    """Whether an HTTP status may be another one at the next attempt."""
    return status in _PASSING_STATUS or status >= 500


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set; it holds for all hosts."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def offline_words(remote: Remote) -> str:
    """That nothing may be downloaded."""
    return f"HF_HUB_OFFLINE is set, and {remote.where} was not downloaded before: unset it, {way_out(remote)}"


def way_out(remote: Remote) -> str:
    """What to do where its host cannot be reached: the files can be carried."""
    entry = next((e for e in MODELS.values() if remote in e.remotes), None)
    name = entry.name if entry else "NAME"
    files = " ".join(r.name for r in (entry.remotes if entry else (remote,)))
    return f"or fetch {remote.address} elsewhere, carry it here and run: clapsep models convert {name} --from {files}"


def changed(remote: Remote, expected: str, states: object) -> DownloadError:
    """That the host announces another file than the one that was pinned or accepted."""
    return DownloadError(
        f"{remote.where} is not what it was: expected {expected}, its host states {states}; "
        "nothing was downloaded: look for a newer clapsep"
    )


def amount(size: int) -> str:
    """A number of bytes, in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_room(remote: Remote, folder: Path, needed: int, variable: str) -> None:
    """Raise `DownloadError` if there is no room in `folder` for `needed` bytes; `variable` names another folder."""
    existing = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
    if existing and shutil.disk_usage(existing).free < needed:
        raise DownloadError(_no_space(remote, folder, variable))


def disk_error(error: Exception) -> OSError | None:
    """The error, if the disk is to blame. Connections fail with an `OSError` too."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return error
    return None


def disk_words(remote: Remote, error: OSError, folder: Path, variable: str) -> str:
    """What is wrong with `folder`, in which the file is to be kept, and that `variable` names another one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(remote, folder, variable)
    return (
        f"cannot keep {remote.where} in {folder} ({error.strerror}): "
        f"make that folder writable, or set {variable} to another one"
    )


def first_line(error: Exception) -> str:
    """An error in one line."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{type(error).__name__}: {reason}"


def _no_space(remote: Remote, folder: Path, variable: str) -> str:
    return (
        f"no space for {remote.where} ({amount(remote.size)}) in {folder}: "
        f"free some, or set {variable} to a folder on another disk"
    )
