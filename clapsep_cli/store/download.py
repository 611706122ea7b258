"""Downloads pinned files. A file is used only after its size and SHA-256 were checked.

Downloads lie in `home()/downloads`, each in a folder with `SHA256SUMS`, which is written last: without it a file does
not count. Files of the Hub are downloaded by its own client, so HF_ENDPOINT, HF_HUB_OFFLINE and its tokens work, and
its cache (HF_HOME) is used.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clapsep_cli import files
from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, SHORT, HubFile, Remote, home

Say = Callable[[str], None]  # gets a line for the user
Progress = Callable[[int, int], None]  # bytes done, bytes in all; must not raise

SUMS = "SHA256SUMS"  # the hashes of the files in its folder, for `sha256sum -c`
PINNED, STATED = "pinned by clapsep", "stated by the Hub for the pinned revision"  # sources of a hash
PAUSES_S = (1.0, 2.0, 4.0)  # before further attempts; after the last one, the error is the user's
TIMEOUT_S = 30.0  # without data
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Fetched:
    """A checked file: its path, its SHA-256 in hex, and the `source` of that hash."""

    path: Path
    sha256: str
    source: str


@contextmanager
def lock(name: str, say: Say | None = None) -> Iterator[None]:
    """Hold the lock `name` among all processes that share `home()`; report to `say` before waiting for it.

    The lock ends with its process. It is not re-entrant. Raises `DownloadError` if `home()` cannot be written.
    """
    from filelock import FileLock, Timeout

    path = home() / "locks" / f"{name}.lock"
    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            if say:
                say(f"waiting for another clapsep process that installs {name}")
            held.acquire()
    except OSError as error:
        raise DownloadError(_disk(home(), error)) from error
    try:
        yield
    finally:
        held.release()


def fetch(remote: Remote, progress: Progress | None = None) -> Fetched:
    """Return the pinned file; download it if it is neither in `home()` nor in the Hub's cache.

    Processes that may want the same file must hold a `lock`.

    Args:
        remote: the file.
        progress: called with bytes done and bytes in all.

    Returns:
        The file, checked.

    Raises:
        DownloadError: one line with what is wrong and what to do.
    """
    folder, partial = _folder(remote), _partial(remote)
    try:
        kept = find(remote)
        if kept:
            return _checked(remote, kept, read_sums(folder).get(kept.name))
        cached = _cached(remote)
        if cached:  # the Hub's client names cached files by the hash that the Hub states
            return _checked(remote, cached, cached.resolve().name, f"delete {cached}")
        stated = ask(remote)
        partial.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(partial).free < remote.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fetched = _checked(remote, _tried(remote, lambda: _bring(remote, partial, progress)), stated)
        folder.mkdir(exist_ok=True)
        path = fetched.path.replace(folder / remote.name)
        write_sums(folder, {remote.name: fetched.sha256})
        shutil.rmtree(partial)
    except OSError as error:
        raise DownloadError(f"{_disk(folder, error)}; {remote.where} takes {amount(remote.size)}") from error
    return Fetched(path, fetched.sha256, fetched.source)


def find(remote: Remote) -> Path | None:
    """Return the path of the file in `home()`; None if it is not there."""
    path = _folder(remote) / remote.name
    return path if path.is_file() and (path.parent / SUMS).is_file() else None


def to_download(remote: Remote) -> int:
    """Return how many bytes `fetch` would download. Raises `DownloadError` if the Hub has another file."""
    if find(remote) or _cached(remote):
        return 0
    ask(remote)
    return remote.size


def clear(remote: Remote) -> list[Path]:
    """Delete complete and unfinished downloads of a file from `home()`; return their folders. Raises `OSError`."""
    found = [path for path in (_folder(remote), _partial(remote)) if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return found


def ask(remote: Remote) -> str | None:
    """Ask the Hub for the SHA-256 of a file of the pinned revision; None if it states none, and for another host.

    Raises `DownloadError` where nothing may be downloaded, or the Hub has another file.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"HF_HUB_OFFLINE is set, and {remote.where} is not here: unset it, {_way_out(remote)}")
    if not isinstance(remote, HubFile):
        return None
    about = _tried(remote, lambda: get_hf_file_metadata(hf_hub_url(**_pinned(remote)), timeout=TIMEOUT_S))
    if about.commit_hash != remote.revision or about.size not in (None, remote.size):
        raise DownloadError(
            f"{remote.where} is not what was pinned: expected revision {remote.revision} with {remote.size} bytes, "
            f"{constants.ENDPOINT} has {about.commit_hash} with {about.size}: check HF_ENDPOINT and whether the "
            f"network wants a login, {_way_out(remote)}"
        )
    return about.etag if about.etag and _SHA256.fullmatch(about.etag) else None


def read_sums(folder: Path) -> dict[str, str]:
    """Read the SHA-256 of each file of a folder from its `SHA256SUMS`. Raises `OSError`, `ValueError`."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write a folder's `SHA256SUMS`, completely or not at all. Raises `OSError`."""
    with files.replacing(folder / SUMS) as temporary:
        temporary.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()), encoding="utf-8")


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file in hex. Raises `DownloadError` if it cannot be read."""
    try:
        return files.digest(path)
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}") from error


def amount(size: int) -> str:
    """Format a number of bytes, e.g. "2.53 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _checked(remote: Remote, path: Path, stated: str | None, advice: str = "") -> Fetched:
    """Check that a file is the pinned one, or has the hash `stated` by the Hub. Raises `DownloadError` otherwise.

    Without `advice` for the message, a refused file is deleted.
    """
    size = path.stat().st_size
    sha256 = digest(path) if size == remote.size else "another size"
    if sha256 in (remote.sha256, stated):
        return Fetched(path, sha256, PINNED if sha256 == remote.sha256 else STATED)
    what = f"expected {remote.size} bytes with SHA-256 {stated or remote.sha256}, got {size} bytes with {sha256}"
    if not advice:
        clear(remote)
        advice = "it was deleted, run the command again to download it"
    raise DownloadError(f"{remote.where} is damaged: {what}; {advice}, {_way_out(remote)}")


def _folder(remote: Remote) -> Path:
    return home() / "downloads" / remote.sha256[:SHORT]


def _partial(remote: Remote) -> Path:
    folder = _folder(remote)
    return folder.with_name(f"{folder.name}.partial")


def _pinned(remote: HubFile) -> dict[str, Any]:
    place = {"repo_id": remote.repo, "filename": remote.path}
    return place | {"repo_type": remote.repo_type, "revision": remote.revision}


def _cached(remote: Remote) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(**_pinned(remote)) if isinstance(remote, HubFile) else None
    return Path(path) if isinstance(path, str) else None


def _bring(remote: Remote, folder: Path, progress: Progress | None) -> Path:
    """Download a file. The Hub's client resumes after a broken connection."""
    if isinstance(remote, HubFile):
        from huggingface_hub import hf_hub_download

        bar = _bar(progress, remote.size)
        return Path(hf_hub_download(**_pinned(remote), local_dir=folder, tqdm_class=bar))
    path = folder / remote.name
    save(remote.url, path, remote.size, progress)
    return path


def save(url: str, path: Path, size: int | None = None, progress: Progress | None = None) -> None:
    """Download a file from its address, or from its path below CLAPSEP_ENDPOINT, without resuming.

    Args:
        url: the address.
        path: the file to write.
        size: expected size in bytes; None for the size that the server announces.
        progress: called with bytes done and bytes in all.

    Raises:
        DownloadError: for a file that is longer.
        Exception: of httpx2 and of the disk, for `attempts`.
    """
    import httpx2

    mirror = os.environ.get("CLAPSEP_ENDPOINT", "").rstrip("/")
    done = 0
    with (
        httpx2.Client(follow_redirects=True, timeout=TIMEOUT_S) as client,
        client.stream(
            "GET", mirror + urlsplit(url).path if mirror else url, headers={"Accept-Encoding": "identity"}
        ) as response,
        path.open("wb") as file,
    ):
        response.raise_for_status()
        total = size or int(response.headers.get("Content-Length", 0))
        for block in response.iter_raw():
            done += len(block)
            if size is not None and done > size:
                raise DownloadError(f"{url} is longer than the {size} bytes that it should have")
            file.write(block)
            if progress:
                progress(done, max(total, done))
    if size is not None and done < size:
        raise httpx2.RemoteProtocolError(f"the connection ended after {done} of {size} bytes")


def _bar(progress: Progress | None, total: int) -> Any:
    """Make a progress bar class for the Hub's client that calls `progress` and prints nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings["disable"] = True  # print nothing
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            if progress:
                progress(min(self.n, total), total)

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore the count of transferred bytes: `update` counts those of the file."""

    return Bar


def _tried(remote: Remote, call: Callable[[], _T]) -> _T:
    return attempts(remote.where, _folder(remote), _way_out(remote), call)


def attempts(where: str, folder: Path, way_out: str, call: Callable[[], _T]) -> _T:
    """Call `call` until it succeeds, with pauses. Raise `DownloadError` if another attempt cannot help.

    Args:
        where: description of the file, for messages.
        folder: the folder it is written to.
        way_out: advice for the end of a message, after a comma.
        call: downloads the file.
    """
    pauses = iter(PAUSES_S)
    while True:
        try:
            return call()
        except DownloadError:
            raise
        except Exception as error:  # the Hub's client raises classes of its own parts: HTTP, Xet, the disk
            if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
                raise DownloadError(f"{_disk(folder, error)}") from error
            pause = next(pauses, None)
            if pause is None or not _passes(error):
                raise DownloadError(f"{where} {_reason(error)}, {way_out}") from error
        time.sleep(pause)


def _passes(error: Exception) -> bool:
    """Return True if another attempt may help: not if no server answered, so that the user need not wait."""
    import httpx2

    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    lost = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
    return isinstance(error, httpx2.TransportError) and not isinstance(error, lost)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is None:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        return f"could not be downloaded ({type(error).__name__}: {first}): check the network and try again"
    status = response.status_code
    if status in (404, 410):
        return f"is gone ({status}): look for a newer clapsep"
    if status in (401, 403):
        return f"is refused ({status}): check the proxy and whether the network wants a login, for the Hub set HF_TOKEN"
    return f"cannot be served now (status {status}): try again later"


def _disk(folder: Path, error: OSError) -> str:
    return f"cannot write to {folder} ({error.strerror or error}): free space there, or set CLAPSEP_HOME to another"


def _way_out(remote: Remote) -> str:
    """Return advice to download the files elsewhere, for a host that cannot be reached."""
    entry = next((e for e in MODELS.values() if remote in e.remotes), None)
    name = entry.name if entry else "NAME"
    names = " ".join(r.name for r in (entry.remotes if entry else (remote,)))
    return f"or fetch {remote.address} elsewhere, carry it here and run: clapsep models convert {name} --from {names}"
