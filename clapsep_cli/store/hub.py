"""Downloads: one pinned file at a time, believed only after its size and SHA-256 were checked.

For each kind of remote file a client does the transfer and keeps a cache; for the Hub its own, so HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE and its tokens work as everywhere. What was accepted, and on whose word, is recorded as JSON in
`home()/accepted`; a file that fails is taken out of the cache, into `home()/quarantine`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from clapsep_cli import files
from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import HubFile, Remote, WebFile, home
from clapsep_cli.store import hub_client, web_client
from clapsep_cli.store.transfer import Arrived, Progress, changed, way_out

Say = Callable[[str], None]  # is told, in a line, why it takes longer

PINNED = "pinned by clapsep"  # whose word a hash is


class Client(Protocol):
    """What fetches one kind of remote file. All raise `DownloadError`."""

    def endpoint(self) -> str:
        """The host that is asked."""

    def cached(self, remote: Any) -> Path | None:
        """The file in the client's cache, whole or not."""

    def ask(self, remote: Any) -> str | None:
        """The SHA-256 that the host states, if it does; raises if the host cannot have the pinned file."""

    def download(self, remote: Any, progress: Progress | None) -> Arrived:
        """Bring the file into the client's cache."""

    def leftovers(self, remote: Any) -> list[Path]:
        """Files of downloads that did not come to their end."""


_CLIENTS: dict[type[Remote], Client] = {HubFile: hub_client, WebFile: web_client}


@dataclass(frozen=True)
class Fetched:
    """A file that was checked: where it lies in its client's cache, its `size` in bytes, `sha256` in hex.

    `source` says on whose word that hash was accepted. `downloaded` tells that `fetch` itself put the file there;
    otherwise its content was in the cache before.
    """

    path: Path
    size: int
    sha256: str
    source: str
    downloaded: bool = False


@contextmanager
def lock(name: str, say: Say | None = None) -> Iterator[None]:
    """Hold the lock `name` among all processes that share `home()`; wait for it if need be, and `say` so first.

    It is free again when its holder dies. Not re-entrant. Raises `DownloadError` if `home()` cannot be written.
    """
    from filelock import FileLock, Timeout

    path = home() / "locks" / f"{name}.lock"
    held = FileLock(path)
    with _writing_home():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            if say:
                say(f"waiting for another clapsep, which is at work on {name}")
            held.acquire()
    try:
        yield
    finally:
        held.release()


def fetch(remote: Remote, progress: Progress | None = None, say: Say | None = None) -> Fetched:
    """The pinned file, checked; downloaded if it is not in its client's cache.

    What was checked once is hashed again only after its size or time has changed, and then needs no network. Processes
    that want the same file wait for each other. Raises `DownloadError`: one line with what is wrong and what to do.
    """
    known = _believed(remote)
    if known:
        return known
    with lock(remote.key, say):
        # While this process waited, another one may have checked it.
        return _believed(remote) or _checked(remote, _client(remote).cached(remote), progress)


def to_download(remote: Remote) -> int:
    """Size of the file if `fetch` would download it; then its host was asked that it has it. Otherwise 0.

    Raises `DownloadError` as `fetch` would before the first byte.
    """
    client = _client(remote)
    if _believed(remote) or client.cached(remote) is not None:
        return 0
    _authority(remote, _record(remote), client.ask(remote))
    return remote.size


def verify(remote: Remote) -> Fetched | None:
    """Hash a file that was accepted again; None where it is not here any more, or never was.

    Needs no network, and nothing that can be written unless there is damage. Raises `DownloadError`.
    """
    record, path = _record(remote), _client(remote).cached(remote)
    if record is None or path is None:
        return None
    if digest(path) == record["sha256"]:
        return _fetched(remote, record, path)
    with lock(remote.key):
        return _checked(remote, path)


def clear(remote: Remote) -> list[Path]:
    """Delete what `fetch` has brought or left: the file, parts of it, a damaged one. Returns what there was.

    What was accepted stays on record. Raises `OSError`, `DownloadError`.
    """
    with lock(remote.key):
        known = _believed(remote)
        ours = _chain(known.path) if known and known.downloaded else []
        files = (*ours, *_client(remote).leftovers(remote), _quarantined(remote))
        found = [file for file in dict.fromkeys(files) if os.path.lexists(file)]
        for file in found:
            file.unlink()
    return found


def discard(fetched: Fetched) -> None:
    """Delete a file that `fetch` downloaded, as far as the cache can be written; one that was there before stays."""
    if fetched.downloaded:
        with suppress(OSError):
            for path in _chain(fetched.path):
                path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks. Raises `DownloadError` if it cannot be read."""
    with _reading(path):
        return files.digest(path)


def _client(remote: Remote) -> Client:
    return _CLIENTS[type(remote)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _writing_home() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot write to {home()} ({error.strerror or error}): set CLAPSEP_HOME to a folder that can be written"
        ) from error


def _recorded_in(remote: Remote) -> Path:
    return home() / "accepted" / f"{remote.key}.json"


def _quarantined(remote: Remote) -> Path:
    return home() / "quarantine" / remote.key


def _record(remote: Remote) -> dict[str, Any] | None:
    """What was accepted for the remote, if anything was. What is not a record of it counts as none."""
    try:
        record: dict[str, Any] = json.loads(_recorded_in(remote).read_text(encoding="utf-8"))
        whole = all(isinstance(record[key], str) for key in ("sha256", "source", "file"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    decided = {"sha256"} if remote.disputed else set()
    same = all(record.get(key) == value for key, value in asdict(remote).items() if key not in decided)
    return record if whole and same else None


def _believed(remote: Remote) -> Fetched | None:
    """The file, if it was checked before and is as it was then."""
    record = _record(remote)
    if record is None:
        return None
    path = Path(record["file"])
    try:
        now = path.stat()
    except OSError:
        return None
    if (now.st_size, now.st_mtime_ns) != (remote.size, record.get("mtime_ns")):
        return None
    return _fetched(remote, record, path)


def _fetched(remote: Remote, record: dict[str, Any], path: Path) -> Fetched:
    return Fetched(path, remote.size, record["sha256"], record["source"], bool(record.get("downloaded")))


def _authority(remote: Remote, record: dict[str, Any] | None, stated: str | None) -> tuple[str, str]:
    """The SHA-256 that decides, and whose word it is; `stated` is the host's, where it was asked.

    Of a disputed file, what was accepted once stays what is accepted.
    """
    sha256, source = remote.sha256, PINNED
    if remote.disputed and record:
        sha256, source = record["sha256"], record["source"]
    elif remote.disputed and stated:
        sha256, source = stated, f"stated by {_client(remote).endpoint()} for the pinned revision"
    elif remote.disputed:
        raise DownloadError(
            f"{remote.where} cannot be checked, as no SHA-256 is stated for it: "
            f"set HF_ENDPOINT to the Hub itself, {way_out(remote)}"
        )
    if stated and stated != sha256:
        raise changed(remote, f"SHA-256 {sha256} ({source})", stated)
    return sha256, source


def _checked(remote: Remote, path: Path | None, progress: Progress | None = None) -> Fetched:
    """Compare the file, downloaded if `path` is None, with what decides; record it, or put it away and raise."""
    record, client = _record(remote), _client(remote)
    stated = client.ask(remote) if path is None or (remote.disputed and record is None) else None
    sha256, source = _authority(remote, record, stated)
    # One that has changed since it was checked may be another program's by now.
    came = client.download(remote, progress) if path is None else Arrived(path, transferred=False)
    with _reading(came.path):
        before = came.path.stat()  # of before hashing: what is written meanwhile must not pass as checked
    got = None
    if before.st_size == remote.size:
        got = came.sha256 or digest(came.path)
    accepted = _recorded_in(remote)
    if got != sha256:
        with _writing_home():
            accepted.unlink(missing_ok=True)
        became = _quarantine(remote, came.path)
        raise DownloadError(
            f"{remote.where} is damaged: expected {remote.size} bytes with SHA-256 {sha256} ({source}), "
            f"got {before.st_size} bytes{f' with {got}' if got else ''}; {became}: "
            f"run the command again to download it anew, {way_out(remote)}"
        )
    checked = {
        "sha256": sha256,
        "source": source,
        "pinned_sha256": remote.sha256,
        "file": str(came.path),
        "mtime_ns": before.st_mtime_ns,
        "downloaded": came.transferred,
    }
    with _writing_home():
        accepted.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(accepted) as partial:
            partial.write_text(json.dumps(asdict(remote) | checked, indent=1) + "\n", encoding="utf-8")
    return Fetched(came.path, remote.size, sha256, source, came.transferred)


def _chain(path: Path) -> list[Path]:
    """A file of the cache with the links that lead to it, the file last."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / chain[-1].readlink())
    return chain


def _quarantine(remote: Remote, path: Path) -> str:
    """Take a file out of its cache; what became of it, in words. The latest one of a remote is kept."""
    *links, file = _chain(path)
    kept = _quarantined(remote)
    try:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            file.replace(kept)
            became = f"it was moved to {kept}"
        except OSError:  # no right to, or another disk, where a copy might fill it
            file.unlink()
            became = "it was deleted"
        for link in links:
            link.unlink(missing_ok=True)
    except OSError as error:
        return f"it could not be removed ({error.strerror}), so delete {file} yourself"
    return became
