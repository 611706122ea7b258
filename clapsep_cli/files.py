"""Files on disk: their hashes, how they come to be there whole or not at all, and what killed processes leave."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 20  # hashed at a time
FOREIGN_SECONDS = 86_400.0  # without a change, until an unfinished file of another machine counts as left behind
_NAME = re.compile(r"\.(.+)\.([0-9a-f]{6})-[0-9a-f]{8}\.partial")


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def unfinished(path: Path) -> Path:
    """The name that a file has before it is whole: of this machine, and random, as containers share process ids.

    Open it exclusively.
    """
    return path.with_name(f".{path.name}.{_host()}-{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` if nothing fails; otherwise nothing is left of it."""
    temporary = unfinished(path)
    with temporary.open("xb") as stream:
        claimed = claim(stream)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
        if claimed is not None:
            os.close(claimed)


def digest(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
    return sha256.hexdigest()


def claim(stream: BinaryIO) -> int | None:
    """A handle that locks a file until it is closed, so that nobody takes it for one that was left behind.

    None where the system or the file's place knows no locks.
    """
    handle = os.dup(stream.fileno())
    if _lock(handle):
        return handle
    os.close(handle)
    return None


def clear_unfinished(paths: Iterable[Path]) -> None:
    """Remove what processes that were killed have left of files that were to become `paths`.

    Locks may not reach other machines, so what they wrote is left alone for a day after its last change.
    """
    names: dict[Path, set[str]] = defaultdict(set)
    for path in paths:
        names[path.parent].add(path.name)
    for folder, wanted in names.items():
        with suppress(OSError):
            for found in list(folder.glob(".*.partial")):
                match = _NAME.fullmatch(found.name)
                if match and match[1] in wanted and (match[2] == _host() or _is_old(found)):
                    _remove_unclaimed(found)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > FOREIGN_SECONDS


def is_claimed(path: Path) -> bool:
    """Whether a process claims a file, or that cannot be known."""
    with path.open("rb+") as stream:
        return not _lock(stream.fileno())


def _remove_unclaimed(path: Path) -> None:
    with suppress(OSError), path.open("rb+") as stream:
        if _lock(stream.fileno()):
            path.unlink()


def _lock(handle: int) -> bool:
    """Whether a file could be locked, as it cannot be while another process claims it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def is_there(path: Path) -> bool:
    """Whether there is something of that name; unlike `exists`, never an exception."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def path_in(folder: Path, text: str) -> Path:
    """The path `text` relative to `folder`; backslashes mean what they do on Windows, unless a file is called so."""
    path = folder / text
    return path if "\\" not in text or is_there(path) else folder / text.replace("\\", "/")
