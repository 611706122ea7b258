"""The Hub's own client, asked for one pinned file: what it says, whether it has it, the transfer.

Whatever goes wrong in it becomes one `DownloadError` that says what, where, and what to do. Nothing here is believed
because it arrived; `hub` checks it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import HubFile
from clapsep_cli.store.transfer import (
    Arrived,
    Progress,
    attempts,
    changed,
    check_room,
    disk_error,
    disk_words,
    first_line,
    offline_words,
    passing_status,
    way_out,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def endpoint() -> str:
    """The Hub that is asked: HF_ENDPOINT, which may be a mirror, or the Hub itself."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cached(remote: HubFile) -> Path | None:
    """The file in the client's cache, whole or not.

    Without any request, which the client's own download would make even then: it reports who is asking.
    """
    from huggingface_hub import try_to_load_from_cache

    path = _attempts(remote, lambda: try_to_load_from_cache(**_pinned(remote)))
    return Path(path) if isinstance(path, str) else None


def ask(remote: HubFile) -> str | None:
    """The SHA-256 that the Hub states for the file; None where it states none, as for small files.

    Raises `DownloadError` if what the Hub has cannot be the pinned file, before any of it is downloaded.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(**_pinned(remote))
    about = _attempts(remote, lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if about.commit_hash is None:
        raise DownloadError(
            f"{endpoint()} does not answer for {remote.where} as the Hub would: "
            "check HF_ENDPOINT, the proxy, and whether the network wants a login"
        )
    if about.commit_hash != remote.revision:
        raise changed(remote, f"revision {remote.revision}", about.commit_hash)
    if about.size not in (None, remote.size):
        raise changed(remote, f"{remote.size} bytes", about.size)
    return about.etag if about.etag and _SHA256.fullmatch(about.etag) else None


def download(remote: HubFile, progress: Progress | None) -> Arrived:
    """Bring the file into the client's cache. Raises `DownloadError`.

    A cut connection is resumed by the client where it broke, within one call. A new call begins anew.
    """
    from huggingface_hub import constants, hf_hub_download

    check_room(remote, Path(constants.HF_HUB_CACHE), remote.size, "HF_HOME")
    bar: Any = _bar(progress, remote.size)
    path = _attempts(remote, lambda: hf_hub_download(**_pinned(remote), tqdm_class=bar))
    return Arrived(Path(path), bar.used)


def leftovers(remote: HubFile) -> list[Path]:
    """What downloads of the file that were killed have left in the client's cache."""
    from huggingface_hub import constants

    folder = "--".join((f"{remote.repo_type}s", *remote.repo.split("/")))
    of_file = "" if remote.disputed else remote.sha256  # they are named after the hash that the Hub states
    return sorted(Path(constants.HF_HUB_CACHE, folder, "blobs").glob(f"{of_file}*.incomplete"))


def _pinned(remote: HubFile) -> dict[str, Any]:
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


def _attempts(remote: HubFile, call: Callable[[], _T]) -> _T:
    """Call the client, whose parts raise classes of their own (HTTP, Xet, the disk): all mean that there is no file."""

    def quietly() -> _T:
        with _quiet_client():
            return call()

    return attempts(quietly, _passes, lambda error: _explained(remote, error))


def _passes(error: Exception) -> bool:
    """Whether another attempt may help. Where nobody answers at all, the user should not have to wait for it."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return passing_status(error.response.status_code)
    lost = isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ValueError))
    # By name, as the client's HTTP library has changed its own.
    return not (lost or disk_error(error) or type(error).__name__ in ("ConnectError", "ConnectTimeout"))


def _explained(remote: HubFile, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client wraps what went wrong when it looks into its cache instead
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline_words(remote)
    if isinstance(error, errors.HfHubHTTPError):
        return f"{remote.where}: {_refusal(remote, error)}, {way_out(remote)}"
    disk = disk_error(error)
    if disk:
        return disk_words(remote, disk, Path(constants.HF_HUB_CACHE), "HF_HOME")
    return (
        f"{remote.where} could not be downloaded from {endpoint()} ({first_line(error)}): "
        f"check the network and try again, {way_out(remote)}"
    )


def _refusal(remote: HubFile, error: Any) -> str:
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
