"""Who may speak to the server: the page that it opened itself, on this machine, and nobody else.

A page on the internet can send requests to 127.0.0.1, and with a name of its own that resolves there even read the
answers; other users of the machine can, too. So each request is checked before anything looks at it.
"""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
SAFE_METHODS = ("GET", "HEAD")
HEADER = "x-clapsep"  # which neither a form nor another site's script can send unasked
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


class Guard:
    """Refuses what does not come from the page. `key` opens `/` once in a browser, and is its cookie from then on."""

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
        """Why a request is refused, if it is."""
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
