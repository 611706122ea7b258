"""Files at HTTPS addresses, brought to `home()/downloads`: what the Hub's client does for the Hub.

What has arrived stays when the connection breaks or the process is killed, as NAME.partial beside its ETag, and the
next attempt or process goes on from there. Proxies and certificates are those of the system and its variables;
CLAPSEP_ENDPOINT names a mirror in place of all hosts. Nothing here is believed because it arrived; `hub` checks it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import SHORT, WebFile, home
from clapsep_cli.store.transfer import (
    Arrived,
    Progress,
    attempts,
    changed,
    check_room,
    disk_error,
    disk_words,
    first_line,
    offline,
    offline_words,
    passing_status,
    way_out,
)

if TYPE_CHECKING:
    import httpx2

TIMEOUT_S = 30.0  # of silence
BLOCK_BYTES = 1 << 20
_NO_HEAD = (405, 501)  # HTTP statuses: the host only hands out bodies
_NO_SUCH_RANGE = 416
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def endpoint() -> str:
    """The mirror that is asked in place of all hosts: CLAPSEP_ENDPOINT, or ""."""
    return os.environ.get("CLAPSEP_ENDPOINT", "").rstrip("/")


def cached(remote: WebFile) -> Path | None:
    """The file, if all of it was downloaded before."""
    path = _place(remote)
    return path if path.is_file() else None


def ask(remote: WebFile) -> None:
    """Raise `DownloadError` if the host has not got the file, or one of another size. It states no SHA-256."""

    def head() -> None:
        with _response("HEAD", remote, {}, _NO_HEAD) as response:
            if response.status_code not in _NO_HEAD:
                _check_size(remote, response)

    attempts(head, _passes, lambda error: _explained(remote, error))


def download(remote: WebFile, progress: Progress | None) -> Arrived:
    """Bring the file to its place, going on from what an earlier call has left. Raises `DownloadError`."""
    path = _place(remote)
    partial, tag = _partial(path)

    def transfer() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as file:
            check_room(remote, path.parent, remote.size - file.tell(), "CLAPSEP_HOME")
            sha256 = _transfer(remote, file, tag, progress)
        partial.replace(path)
        tag.unlink(missing_ok=True)
        return sha256

    sha256 = attempts(transfer, _passes, lambda error: _explained(remote, error))
    return Arrived(path, True, sha256)


def leftovers(remote: WebFile) -> list[Path]:
    """What downloads of the file have left, whole or not: nobody else keeps anything there."""
    return [path for path in (_place(remote), *_partial(_place(remote))) if path.exists()]


def _place(remote: WebFile) -> Path:
    return home() / "downloads" / remote.sha256[:SHORT] / remote.name


def _partial(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.etag")


def _transfer(remote: WebFile, file: BinaryIO, tag: Path, progress: Progress | None) -> str:
    """Fetch what `file` lacks; the SHA-256 of the whole. Raises what httpx2 raises, `OSError`, `DownloadError`."""
    from httpx2 import RemoteProtocolError

    sha256, done = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        sha256.update(block)
        done += len(block)
    if done == remote.size:  # the process was killed between the last byte and the file's name
        return sha256.hexdigest()
    with _response("GET", remote, _going_on(done, tag), (_NO_SUCH_RANGE,) if done else ()) as response:
        start, _ = _range(response)
        if response.status_code == _NO_SUCH_RANGE or start not in (0, done):
            file.truncate(0)  # and all of it at the next attempt
            raise RemoteProtocolError(f"bytes from {done} on were asked for, and answered otherwise")
        _check_size(remote, response)
        if start == 0:  # the first time, or another file by now, or a server that has no ranges
            file.truncate(0)
            sha256, done = hashlib.sha256(), 0
            tag.write_text(_strong(response.headers.get("ETag", "")), encoding="ascii")
        for block in response.iter_raw():
            if done + len(block) > remote.size:
                raise changed(remote, f"{remote.size} bytes", "more")
            file.write(block)
            sha256.update(block)
            done += len(block)
            if progress:
                progress(done, remote.size)
    if done < remote.size:
        raise RemoteProtocolError(f"the connection ended after {done} of {remote.size} bytes")
    return sha256.hexdigest()


def _going_on(done: int, tag: Path) -> dict[str, str]:
    """Headers that ask for the bytes from `done` on, or for all if the file is another one by now."""
    if not done:
        return {}
    etag = tag.read_text(encoding="ascii") if tag.is_file() else ""
    return {"Range": f"bytes={done}-"} | ({"If-Range": etag} if etag else {})


def _strong(etag: str) -> str:
    """An ETag that vouches for every byte, or "": a weak one does not."""
    return etag if etag.startswith('"') and etag.isascii() else ""


@contextmanager
def _response(
    method: str, remote: WebFile, headers: dict[str, str], handled: tuple[int, ...]
) -> Iterator[httpx2.Response]:
    """The host's answer, its body not yet read; redirects are followed, but never out of encryption.

    Raises `HTTPStatusError` for what is no success, unless its status is among `handled`.
    """
    import httpx2

    if offline():
        raise DownloadError(offline_words(remote))

    def no_downgrade(response: httpx2.Response) -> None:
        onward = response.url.join(response.headers["Location"]) if response.has_redirect_location else response.url
        if response.url.scheme == "https" != onward.scheme:
            raise DownloadError(
                f"{remote.where}: {response.url.host} leads on to {onward.scheme}://{onward.host}, without encryption, "
                f"which is refused: check the proxy, and whether the network wants a login, {way_out(remote)}"
            )

    url = endpoint() + urlsplit(remote.url).path if endpoint() else remote.url
    client = httpx2.Client(follow_redirects=True, timeout=TIMEOUT_S, event_hooks={"response": [no_downgrade]})
    # Compressed, the announced size and the ranges would not be the file's.
    with client, client.stream(method, url, headers={"Accept-Encoding": "identity"} | headers) as response:
        if response.status_code not in handled:
            response.raise_for_status()
        yield response


def _range(response: httpx2.Response) -> tuple[int | None, int | None]:
    """Where an answer's bytes begin in the file, and the file's size; None where it is not told."""
    if response.status_code != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    told = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (int(told[1]), int(told[2]) if told[2].isdigit() else None) if told else (None, None)


def _check_size(remote: WebFile, response: httpx2.Response) -> None:
    _, size = _range(response)
    if size not in (None, remote.size):
        raise changed(remote, f"{remote.size} bytes", size)


def _passes(error: Exception) -> bool:
    """Whether another attempt may help. Where nobody answers at all, the user should not have to wait for it."""
    import httpx2

    if isinstance(error, httpx2.HTTPStatusError):
        return passing_status(error.response.status_code)
    lost = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
    return isinstance(error, httpx2.TransportError) and not isinstance(error, lost)


def _explained(remote: WebFile, error: Exception) -> str:
    import httpx2

    mirror = f", asked of {endpoint()} (CLAPSEP_ENDPOINT)," if endpoint() else ""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"{remote.where}{mirror} {_refusal(error.response)}, {way_out(remote)}"
    disk = disk_error(error)
    if disk:
        return disk_words(remote, disk, _place(remote).parent, "CLAPSEP_HOME")
    return (
        f"{remote.where}{mirror} could not be downloaded ({first_line(error)}): "
        f"check the network and try again, {way_out(remote)}"
    )


def _refusal(response: httpx2.Response) -> str:
    """What an HTTP status means."""
    status = response.status_code
    if status in (404, 410):
        return f"is gone ({status}): look for a newer clapsep"
    if status in (401, 403):
        return f"is refused ({status}): check the proxy and whether the network wants a login"
    after = response.headers.get("Retry-After", "")
    return f"cannot be served now (status {status}): try again {f'in {after} s' if after.isdigit() else 'later'}"
