"""A Hub on 127.0.0.1 for HF_ENDPOINT, and a plain file server for CLAPSEP_ENDPOINT: it fails in the ways that they do.

with HubServer() as hub:
    hub.add_file("owner/name", "model", revision, "folder/file.bin", data)
    hub.faults = Faults(flip=True)
    ...  # HF_ENDPOINT=hub.url
    assert hub.gets()
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/(?P<type>spaces/|datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<type>models|spaces|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/main(/(?P<path>.*))?)?"
)
PREFIXES = {"model": "", "space": "spaces/", "dataset": "datasets/"}
BLOCK = 16 * 1024


@dataclass
class Faults:
    """What goes wrong, until another one is assigned to `HubServer.faults`. Sizes in bytes of the body, times in s."""

    status: int | None = None  # the answer to every request
    error_code: str | None = None  # of that answer: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo
    busy: int = 0  # so many requests are answered 503 first
    cut_after: int | None = None  # a body breaks off there, with its full length announced
    cuts: int = 1_000_000  # so many bodies break off
    reset: bool = False  # a body that breaks off does so with a TCP reset, not with an orderly end
    short_by: int = 0  # a body is shorter by this, and so is its announced length
    flip: bool = False  # one byte in the middle of a body is another one
    commit: str | None = None  # what X-Repo-Commit says instead of the revision; "" leaves it out
    hold_at: int | None = None  # a body stops there until `release` is set
    release: threading.Event = field(default_factory=threading.Event)
    unsized: bool = False  # no length is announced, the end of the connection is the end of the body
    gzips: bool = False  # bodies come compressed, to whom that is not declined


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str


@dataclass(frozen=True)
class _File:
    data: bytes
    sha256: str
    lfs: bool


class HubServer:
    """The server. With `redirect`, bodies come from another host, as on the Hub.

    `requests` lists what it was asked for files, and `asides` the paths of all other requests, which get a 404 and meet
    no faults: the client reports itself once per process.
    """

    def __init__(self, redirect: bool = False) -> None:
        self.faults = Faults()
        self.redirect = redirect
        self.requests: list[Request] = []
        self.asides: list[str] = []
        self._files: dict[tuple[str, str, str, str], _File] = {}
        self._plain: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def add_file(self, repo: str, repo_type: str, revision: str, path: str, data: bytes, lfs: bool = True) -> str:
        """Serve `data`; its SHA-256. Without `lfs`, the metadata state a Git hash instead of it."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._files[PREFIXES[repo_type], repo, revision, path] = _File(data, sha256, lfs)
        return sha256

    def add_plain(self, path: str, data: bytes) -> None:
        """Serve `data` at `path`, as any host would."""
        self._plain[path] = data

    def gets(self) -> list[Request]:
        """The requests for a file's body."""
        return [request for request in self.requests if request.method == "GET"]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away: nobody listens there any more. May be called again."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def take(self, request: Request) -> Faults:
        """Note a request; the faults that it meets. Counted ones are used up."""
        with self._lock:
            self.requests.append(request)
            faults, get = self.faults, request.method == "GET"
            met = Faults(**vars(faults))
            if faults.busy:
                met.status = 503
                faults.busy -= 1
            elif get and faults.cut_after is not None:
                met.cut_after = faults.cut_after if faults.cuts else None
                faults.cuts -= bool(faults.cuts)
            return met

    def plain(self, target: str) -> bytes | None:
        """The plain file that a request names, by a path or, to a proxy, by a whole URL."""
        return self._plain.get(target) or self._plain.get(urlsplit(target).path)

    def find(self, path: str) -> tuple[_File, str] | None:
        """The file that a URL names, with its revision; with `redirect`, bodies lie below /lfs/."""
        match = RESOLVE.fullmatch(unquote(path))
        named = (match["type"] or "", match["repo"], match["revision"], match["path"]) if match else None
        for key, file in self._files.items():
            if key == named or path == f"/lfs/{file.sha256}":
                return file, key[2]
        return None

    def told(self, target: str) -> Any:
        """What the Hub's API tells of a repository's revision `main`, or of a folder in it; None for others."""
        url = urlsplit(target)
        match = API.fullmatch(unquote(url.path))
        if match is None:
            return None
        asked = PREFIXES[match["type"].removesuffix("s")], match["repo"], "main"
        files = {key[3]: file for key, file in self._files.items() if key[:3] == asked}
        if not files:
            return None
        if match["what"] != "tree":
            return {"id": match["repo"], "sha": "0" * 40, "siblings": []}
        folder, deep = match["path"] or "", "recursive=true" in url.query.lower()
        entries = {}
        for path, file in files.items():
            name = path.removeprefix(f"{folder}/") if folder else path
            if name == path and folder:
                continue
            first, *rest = name.split("/")
            if rest and not deep:
                below = f"{folder}/{first}".lstrip("/")
                entries[below] = {"type": "directory", "path": below, "oid": "0" * 40}
            else:
                entries[path] = {"type": "file", "path": path, "size": len(file.data), "oid": file.sha256[:40]}
        return list(entries.values())


class _Http(ThreadingHTTPServer):
    daemon_threads = False  # joined when the server closes: no thread outlives a test

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is none of our failures
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.close_connection = True
        plain = self.hub.plain(self.path)
        if plain:
            self._answer_plain(plain, body)
            return
        if body and (told := self.hub.told(self.path)) is not None:
            answer = json.dumps(told).encode()
            self._head(200, {"Content-Length": str(len(answer)), "Content-Type": "application/json"})
            self.wfile.write(answer)
            return
        if not self.path.startswith("/lfs/") and not RESOLVE.fullmatch(self.path):
            self.hub.asides.append(self.path)
            self._head(404, {"Content-Length": "0"})
            return
        faults = self.hub.take(Request(self.command, self.path))
        found = self.hub.find(self.path)
        if faults.status or found is None:
            self._refuse(faults, faults.status or 404)
            return
        file, revision = found
        headers = {"X-Repo-Commit": revision if faults.commit is None else faults.commit, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        headers["ETag"] = f'"{file.sha256 if file.lfs else hashlib.sha1(file.data).hexdigest()}"'
        if self.hub.redirect and not self.path.startswith("/lfs/"):
            headers["Location"] = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{file.sha256}"
            self._head(302, headers | {"Content-Length": "0"})
            return
        self._send(faults, file.data, headers, body)

    def _answer_plain(self, data: bytes, body: bool) -> None:
        faults = self.hub.take(Request(self.command, self.path))
        if faults.status:
            self._head(faults.status, {"Content-Length": "0"})
        elif faults.gzips and "gzip" in self.headers.get("Accept-Encoding", "gzip"):
            self._send(faults, gzip.compress(data), {"Content-Encoding": "gzip"}, body)
        else:
            self._send(faults, data, {}, body)

    def _refuse(self, faults: Faults, status: int) -> None:
        code = faults.error_code or ("EntryNotFound" if status == 404 else None)
        self._head(status, {"Content-Length": "0"} | ({"X-Error-Code": code} if code else {}))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, faults: Faults, data: bytes, headers: dict[str, str], body: bool) -> None:
        if faults.flip and body:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        data = data[: len(data) - faults.short_by] if body else data
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted and start >= len(data):
            self._head(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
            return
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        length = {} if faults.unsized else {"Content-Length": str(len(data) - start)}
        self._head(206 if wanted else 200, headers | length)
        if not body:
            return
        end = len(data) if faults.cut_after is None else min(faults.cut_after, len(data))
        hold_at = len(data) if faults.hold_at is None else faults.hold_at
        for at in range(start, end, BLOCK):
            if at >= hold_at:
                faults.release.wait(20)
            self.wfile.write(data[at : min(at + BLOCK, end)])
        self.wfile.flush()
        if end < len(data) and faults.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
