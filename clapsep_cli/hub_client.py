"""The Hub's own client, asked for one pinned file: what it says, whether it has it, the transfer.

Whatever goes wrong in it becomes one `DownloadError` that says what, where, and what to do. Nothing here is believed
because it arrived; `hub` checks it.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, Remote

Progress = Callable[[int, int], None]  # bytes done, bytes in all; must not raise

BACKOFF_S = (1.0, 2.0, 4.0)  # pauses before further attempts, in seconds; after the last one, the error is the user's
PASSING_STATUS = (408, 429)  # besides all 5xx: what may be gone at the next attempt
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def where(remote: Remote) -> str:
    """The file, in words."""
    return f"{remote.path} of the {remote.repo_type} {remote.repo}"


def way_out(remote: Remote) -> str:
    """What to do where the Hub cannot be reached: the files can be carried."""
    entry = next((e for e in MODELS.values() if remote in e.remotes), None)
    name = entry.name if entry else "NAME"
    files = " ".join(Path(r.path).name for r in (entry.remotes if entry else (remote,)))
    return f"or fetch it elsewhere, carry it here and run: clapsep models convert {name} --from {files}"


def changed(remote: Remote, expected: str, states: object) -> DownloadError:
    """That the Hub announces another file than the one that was pinned or accepted."""
    return DownloadError(
        f"{where(remote)} is not what it was: expected {expected}, the Hub states {states}; "
        "nothing was downloaded: look for a newer clapsep"
    )


def endpoint() -> str:
    """The Hub that is asked: HF_ENDPOINT, which may be a mirror, or the Hub itself."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cached(remote: Remote) -> Path | None:
    """The file in the client's cache, whole or not.

    Without any request, which the client's own download would make even then: it reports who is asking.
    """
    from huggingface_hub import try_to_load_from_cache

    path = _attempts(remote, lambda: try_to_load_from_cache(**_pinned(remote)))
    return Path(path) if isinstance(path, str) else None


def ask(remote: Remote) -> str | None:
    """The SHA-256 that the Hub states for the file; None where it states none, as for small files.

    Raises `DownloadError` if what the Hub has cannot be the pinned file, before any of it is downloaded.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(**_pinned(remote))
    about = _attempts(remote, lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if about.commit_hash is None:
        raise DownloadError(
            f"{endpoint()} does not answer for {where(remote)} as the Hub would: "
            "check HF_ENDPOINT, the proxy, and whether the network wants a login"
        )
    if about.commit_hash != remote.revision:
        raise changed(remote, f"revision {remote.revision}", about.commit_hash)
    if about.size not in (None, remote.size):
        raise changed(remote, f"{remote.size} bytes", about.size)
    return about.etag if about.etag and _SHA256.fullmatch(about.etag) else None


def download(remote: Remote, progress: Progress | None) -> tuple[Path, bool]:
    """Bring the file into the client's cache; its path there, and whether anything had to be transferred for it.

    A cut connection is resumed by the client where it broke, within one call. A new call begins anew. Raises
    `DownloadError`.
    """
    from huggingface_hub import constants, hf_hub_download

    folder = Path(constants.HF_HUB_CACHE)
    existing = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
    if existing and shutil.disk_usage(existing).free < remote.size:
        raise _no_space(remote)
    bar: Any = _bar(progress, remote.size)
    path = _attempts(remote, lambda: hf_hub_download(**_pinned(remote), tqdm_class=bar))
    return Path(path), bar.used


def _pinned(remote: Remote) -> dict[str, Any]:
    return {
        "repo_id": remote.repo,
        "filename": remote.path,
        "repo_type": remote.repo_type,
        "revision": remote.revision,
    }


def _bar(progress: Progress | None, total: int) -> type:
    """A class that the client takes for a tqdm: it calls `progress`, and prints nothing."""

    class Bar:
        used = False  # whether there ever was one

        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.n, self.total = initial, total
            Bar.used = True

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            if progress:
                progress(min(self.n, total), total)

        def ignore(self, *_: object, **__: object) -> None:
            pass

        # With `update_transfer`, the client counts the network's bytes apart, and `update` only the file's.
        update_transfer = set_transfer_postfix_str = set_postfix_str = refresh = close = __exit__ = ignore

        def __enter__(self) -> Bar:
            return self

    return Bar


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client's warnings off the terminal, unless its user has asked for another verbosity."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _attempts(remote: Remote, call: Callable[[], _T]) -> _T:
    """Call the client until it succeeds or its failure is final, which is then a `DownloadError`.

    Its parts raise classes of their own (HTTP, Xet, the disk), and all of them mean that there is no file.
    """
    pauses = iter(BACKOFF_S)
    while True:
        try:
            with _quiet_client():
                return call()
        except Exception as error:
            pause = next(pauses, None)
            if pause is None or not _is_passing(error):
                raise _explained(remote, error) from error
        time.sleep(pause)


def _disk_error(error: Exception) -> OSError | None:
    """The error, if the disk is to blame. Connections fail with an `OSError` too."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return error
    return None


def _is_passing(error: Exception) -> bool:
    """Whether another attempt may help. Where nobody answers at all, the user should not have to wait for it."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status in PASSING_STATUS or status >= 500
    lost = isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ValueError))
    # By name, as the client's HTTP library has changed its own.
    return not (lost or _disk_error(error) or type(error).__name__ in ("ConnectError", "ConnectTimeout"))


def _explained(remote: Remote, error: Exception) -> DownloadError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client wraps what went wrong when it looks into its cache instead
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError(
            f"HF_HUB_OFFLINE is set, and {where(remote)} was not downloaded before: unset it, {way_out(remote)}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return DownloadError(f"{where(remote)}: {_refusal(remote, error)}, {way_out(remote)}")
    disk = _disk_error(error)
    if disk and disk.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(remote)
    if disk:
        return DownloadError(
            f"cannot keep {where(remote)} in the Hub's cache, {constants.HF_HUB_CACHE} ({disk.strerror}): "
            "make that folder writable, or set HF_HOME to another one"
        )
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    return DownloadError(
        f"{where(remote)} could not be downloaded from {endpoint()} ({type(error).__name__}: {first}): "
        f"check the network and try again, {way_out(remote)}"
    )


def _refusal(remote: Remote, error: Any) -> str:
    """What the Hub's HTTP status means. `error` is an `HfHubHTTPError`."""
    from huggingface_hub import errors

    status = error.response.status_code
    if status == 404:
        gone = f"repository {remote.repo}"
        if isinstance(error, errors.RevisionNotFoundError):
            gone = f"pinned revision {remote.revision}"
        elif isinstance(error, errors.EntryNotFoundError):
            gone = "file"
        return f"the {gone} is gone from the Hub (404): look for a newer clapsep"
    if status in (401, 403):
        return f"the Hub refuses it as private, gated or gone ({status}): log in with `hf auth login` or set HF_TOKEN"
    return f"the Hub cannot serve it now (status {status}): try again later"


def _no_space(remote: Remote) -> DownloadError:
    from huggingface_hub import constants

    return DownloadError(
        f"no space for {where(remote)} ({remote.size / 1e6:,.1f} MB) in {constants.HF_HUB_CACHE}: "
        "free some, or set HF_HOME to a folder on another disk"
    )
