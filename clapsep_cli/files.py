"""Hashes files, writes them completely or not at all, and removes unfinished files of killed processes."""

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

from clapsep_cli.errors import ClapsepError, OutputError

BLOCK_BYTES = 1 << 20  # hashed at a time
FOREIGN_SECONDS = 86_400.0  # age at which an unfinished file of another machine counts as abandoned
_NAME = re.compile(r"\.(.+)\.([0-9a-f]{6})-[0-9a-f]{8}\.partial")


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def unfinished(path: Path) -> Path:
    """Return a temporary name for a file until it is complete; open it exclusively.

    It contains a hash of the machine's name, and random digits, as process ids are not unique among containers.
    """
    return path.with_name(f".{path.name}.{_host()}-{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write. It is renamed to `path`, or removed after an error."""
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


@contextmanager
def writing(path: Path, error_type: type[ClapsepError] = OutputError) -> Iterator[Path]:
    """Make the folder of `path`, and yield a temporary name as `replacing` does. Raises `error_type`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise error_type(f"{path}: cannot be written ({error.strerror or error})") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read in blocks."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
    return sha256.hexdigest()


def claim(stream: BinaryIO) -> int | None:
    """Lock a file, so that no process takes it for an abandoned one. Return a handle to close later.

    Returns None if the system or the file system has no locks.
    """
    handle = os.dup(stream.fileno())
    if _lock(handle):
        return handle
    os.close(handle)
    return None


def clear_unfinished(paths: Iterable[Path]) -> None:
    """Remove unfinished files for `paths` that killed processes left.

    Locks may not work across machines, so files of other machines are kept for a day after their last change.
    """
    names: dict[Path, set[str]] = defaultdict(set)
    for path in paths:
        names[path.parent].add(path.name)
    for folder, wanted in names.items():
        with suppress(OSError):
            for found in list(folder.glob(".*.partial")):
                match = _NAME.fullmatch(found.name)
                if match is None or match[1] not in wanted:
                    continue
                if match[2] == _host() or time.time() - found.stat().st_mtime > FOREIGN_SECONDS:
                    with suppress(OSError), found.open("rb+") as stream:
                        if _lock(stream.fileno()):
                            found.unlink()


def is_claimed(path: Path) -> bool:
    """Return True if a process holds the lock of a file, or if that is unknown."""
    with path.open("rb+") as stream:
        return not _lock(stream.fileno())


def _lock(handle: int) -> bool:
    """Lock a file; return False if another process holds its lock."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def is_there(path: Path) -> bool:
    """Return True if the path exists; unlike `exists`, never raise."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def path_in(folder: Path, text: str) -> Path:
    """Return the path `text` relative to `folder`; a backslash is a separator unless such a file exists."""
    path = folder / text
    return path if "\\" not in text or is_there(path) else folder / text.replace("\\", "/")
