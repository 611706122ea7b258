"""Serves the page: its files, the state of the session as JSON, and the actions that it requests.

It listens only on 127.0.0.1, and `Guard` accepts only requests of the page itself. Other sites could send requests to
127.0.0.1, and read the answers through a name that resolves there; so could other users of the machine. Requests name
sounds, examples and attempts by random ids, never by paths.
"""

from __future__ import annotations

import mimetypes
import secrets
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, unquote

import anyio
import uvicorn
from anyio import to_thread
from soundfile import SoundFileError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clapsep_cli.errors import ClapsepError, OutputError, UsageError
from clapsep_cli.page.overview import Overview
from clapsep_cli.page.session import Session

HOST = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
mimetypes.add_type("text/javascript", ".js")  # which the registry of Windows may state otherwise
MAX_COLUMNS = 4096  # of one picture, at most
HUGE = 1e15
MAX_FRAMES = 1 << 19  # samples in one answer, at most
MAX_REQUEST_BYTES = 1 << 20  # of a request in JSON, at most
PIECE_BYTES = 1 << 20  # bytes of an upload written at a time
BAD, MISSING, TOO_LARGE, FULL = 400, 404, 413, 507
HOSTS = ("127.0.0.1", "localhost")
SAFE_METHODS = ("GET", "HEAD")
HEADER = "x-clapsep"  # which forms and scripts of other sites cannot send
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
POLICY = (
    "default-src 'self'; style-src 'self' 'nonce-{nonce}'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

Handler = Callable[[Request], Awaitable[Response]]


class Page:
    """Serves the page of a session on 127.0.0.1.

    Args:
        session: the session to show.
        port: to listen on; 0 for any that is free.

    Raises:
        UsageError: the port cannot be used.
    """

    def __init__(self, session: Session, port: int = 0) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((HOST, port))
            self.socket.listen()  # a browser that connects before the server runs waits
        except (OSError, OverflowError) as error:
            self.socket.close()
            raise UsageError(f"port {port} cannot be used ({getattr(error, 'strerror', None) or error})") from error
        self.port: int = self.socket.getsockname()[1]
        key = secrets.token_urlsafe(32)
        self.address = f"http://{HOST}:{self.port}/?key={key}"
        # Cookies are shared by all ports of a machine, so each server has a name of its own.
        self.app = Guard(application(session), key, f"clapsep-{self.port}")
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2, ws="none"
            )
        )

    def run(self) -> None:
        """Answer requests until the process is told to stop."""
        self.server.run(sockets=[self.socket])

    def close(self) -> None:
        """Release the port."""
        self.socket.close()


def application(session: Session) -> Starlette:
    """Make the page's application, unguarded."""
    handlers = _Handlers(session)
    routes = [
        Route("/", handlers.index),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/state", handlers.state),
        Route("/api/recording", handlers.uploads(session.open), methods=["POST"]),
        Route("/api/recording/tracks/{track:int}", handlers.choose_track, methods=["POST"]),
        Route("/api/shots", handlers.uploads(session.add_shot), methods=["POST"]),
        Route("/api/shots/{id}", handlers.acts(session.remove_shot), methods=["DELETE"]),
        Route("/api/attempts", handlers.extract, methods=["POST"]),
        Route("/api/attempts/{id}", handlers.acts(session.remove), methods=["DELETE"]),
        Route("/api/attempts/{id}/cancel", handlers.acts(session.cancel), methods=["POST"]),
        Route("/api/sounds/{id}/peaks", handlers.peaks),
        Route("/api/sounds/{id}/picture", handlers.picture),
        Route("/api/sounds/{id}/samples", handlers.samples),
        Route("/api/sounds/{id}/file", handlers.file),
    ]
    return Starlette(routes=routes, exception_handlers={ClapsepError: _told, HTTPException: _told})


async def _told(request: Request, error: Exception) -> Response:
    """Answer an error as one line of JSON."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, FULL if isinstance(error, OutputError) else BAD)


class _Handlers:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def index(self, request: Request) -> Response:
        html = (STATIC / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(html.replace("{nonce}", request.state.nonce))

    async def state(self, request: Request) -> Response:
        return JSONResponse(self.session.state())

    def uploads(self, take: Callable[[Path, str], object]) -> Handler:
        """Return a handler of uploads, which calls `take` with the path and the name of each."""

        async def handle(request: Request) -> Response:
            return await self._upload(request, take)

        return handle

    def acts(self, act: Callable[[str], None]) -> Handler:
        """Return a handler that calls `act` with the id in the address."""

        async def handle(request: Request) -> Response:
            with _known():
                act(request.path_params["id"])
            return await self.state(request)

        return handle

    async def _upload(self, request: Request, take: Callable[[Path, str], object]) -> Response:
        """Write the body of a request to disk, and call `take`; if that fails, no file stays."""
        name = Path(unquote(request.headers.get("x-name", "")).replace("\\", "/")).name or "recording"
        path = self.session.upload(name)
        try:
            await self._receive(request, path)
            await to_thread.run_sync(take, path, name)
        except BaseException as error:
            shutil.rmtree(path.parent, ignore_errors=True)
            if isinstance(error, ClientDisconnect):
                return Response(status_code=BAD)  # the connection is closed
            if isinstance(error, ClapsepError):  # replace the path of the upload, which the user does not know
                raise type(error)(str(error).replace(str(path), name)) from error
            raise
        return await self.state(request)

    async def _receive(self, request: Request, path: Path) -> None:
        announced = int(length) if (length := request.headers.get("content-length", "")).isdecimal() else 0
        room, written, waiting = self.session.room(), 0, bytearray()
        full = HTTPException(TOO_LARGE, f"there is room for {room / 1e9:.1f} GB on the disk, and this is larger")
        if announced > room:
            raise full
        try:
            async with await anyio.open_file(path, "wb") as file:
                async for piece in request.stream():
                    waiting += piece
                    if written + len(waiting) > room:
                        raise full
                    if len(waiting) >= PIECE_BYTES:
                        written += await file.write(waiting)
                        waiting = bytearray()
                await file.write(waiting)
        except OSError as error:
            raise OutputError(f"the upload cannot be written ({error.strerror or error})") from error

    async def choose_track(self, request: Request) -> Response:
        await to_thread.run_sync(self.session.choose_track, request.path_params["track"])
        return await self.state(request)

    async def extract(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_REQUEST_BYTES:
                raise HTTPException(TOO_LARGE, "the request is too large")
        await to_thread.run_sync(self.session.extract, bytes(body))
        return await self.state(request)

    def _seen(self, request: Request) -> Overview:
        with _known():
            seen = self.session.sound(request.path_params["id"]).overview
        if seen is None:
            raise HTTPException(MISSING, "this recording is still being read")
        return seen

    async def peaks(self, request: Request) -> Response:
        return _file(self._seen(request).peaks)

    async def picture(self, request: Request) -> Response:
        seen = self._seen(request)
        start, end = _number(request, "from", 0), _number(request, "to", seen.seconds)
        columns = min(MAX_COLUMNS, max(1, int(_number(request, "columns", 1))))
        with _there():
            picture = await to_thread.run_sync(seen.picture, start, end, columns)
        return Response(picture.tobytes(), media_type="application/octet-stream")

    async def samples(self, request: Request) -> Response:
        seen = self._seen(request)
        start, frames = int(_number(request, "start", 0)), min(MAX_FRAMES, int(_number(request, "frames", MAX_FRAMES)))
        with _there():
            samples = await to_thread.run_sync(seen.samples, start, frames)
        return Response(samples.astype("<f4").tobytes(), media_type="application/octet-stream")

    async def file(self, request: Request) -> Response:
        with _known():
            sound = self.session.sound(request.path_params["id"])
        return _file(sound.path, sound.path.name)


@contextmanager
def _known() -> Iterator[None]:
    """Answer 404 for an unknown id."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(MISSING, "this no longer exists") from error


@contextmanager
def _there() -> Iterator[None]:
    """Answer 404 if a file of the session, or the recording itself, has gone."""
    try:
        yield
    except (OSError, SoundFileError) as error:
        raise HTTPException(MISSING, "the recording, or its copy for the page, no longer exists") from error


def _file(path: Path, name: str | None = None) -> Response:
    """Answer with a file or the requested ranges of it; with `name`, as a download."""
    with _there():
        return FileResponse(path, filename=name, media_type="application/octet-stream", stat_result=path.stat())


def _number(request: Request, name: str, default: float) -> float:
    """Return a number from the query of a request. Raises `UsageError` unless it is 0 or more."""
    try:
        number = float(request.query_params.get(name, default))
    except ValueError:
        number = -1.0
    if not 0 <= number < HUGE:
        raise UsageError(f"{name} is not a number from 0 on")
    return number


class Guard:
    """Refuses requests that do not come from the page. `key` opens `/` in a browser, and is its cookie from then on."""

    def __init__(self, app: ASGIApp, key: str, cookie: str) -> None:
        self.app, self.key, self.cookie = app, key, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        nonce = secrets.token_urlsafe(16)
        invited = self._is_invited(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers["content-security-policy"] = POLICY.format(nonce=nonce)
                if invited and message["status"] == 200:
                    headers.append("set-cookie", f"{self.cookie}={self.key}; HttpOnly; SameSite=Strict; Path=/")
            await send(message)

        refused = self._refusal(scope, invited)
        if refused is not None:
            await PlainTextResponse(f"{refused}\n", 403)(scope, receive, send_guarded)
            return
        scope["state"] = {**scope.get("state", {}), "nonce": nonce}
        await self.app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, invited: bool) -> str | None:
        """Return the reason to refuse a request, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host.partition(":")[0] not in HOSTS:
            return "this server answers to 127.0.0.1 and localhost alone"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "this request comes from another site"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this request comes from another site"
        if not (invited or self._has_cookie(headers)):
            return "open the address that clapsep ui printed, with its key"
        if scope["method"] not in SAFE_METHODS and HEADER not in headers:
            return f"changes need the header {HEADER}"
        return None

    def _is_invited(self, scope: Scope) -> bool:
        if scope["path"] != "/" or scope["method"] != "GET":
            return False
        (given,) = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[:1]
        return secrets.compare_digest(given.encode(), self.key.encode())

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        given = cookies[self.cookie].value if self.cookie in cookies else ""
        return secrets.compare_digest(given.encode(), self.key.encode())
