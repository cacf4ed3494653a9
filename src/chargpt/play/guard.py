"""Who may ask, and what a page from here may do."""

import contextlib
import hmac
from http import cookies
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refusal(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


class Guard:
    """Answers only pages that came from here.

    A name that an attacker has pointed at this machine (DNS rebinding) shows in the Host header, a
    page of somebody else in the Origin header. Where the server listens to a network, Host may be
    anything, and a token takes its place: the address that is printed has it, a cookie keeps it.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str | None):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                fixed = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *fixed]}
            await send(message)

        answer = self._judge(scope, headers)
        await (answer or self.app)(scope, receive, send_guarded)

    def _judge(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """A refusal, or a step on the way in; None for what may pass."""
        host, origin = (
            headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin")
        )
        if self.token is None and host not in self.hosts:
            return refusal(403, f"Host: is none of {', '.join(sorted(self.hosts))}")
        if origin and urlsplit(origin).netloc != host:
            return refusal(403, "Origin: requests of other pages are refused")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return refusal(415, "Content-Type: must be application/json")
        return None if self.token is None else self._ask_token(scope, headers, self.token)

    def _ask_token(self, scope: Scope, headers: dict[bytes, bytes], token: str) -> Response | None:
        name = f"chargpt-{scope['server'][1]}"  # cookies are shared by all ports of a host
        given: Any = cookies.SimpleCookie()
        with contextlib.suppress(cookies.CookieError):
            given.load(headers.get(b"cookie", b"").decode("latin-1"))
        if name in given and same(given[name].value, token):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and same(query, token):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(name, token, httponly=True, samesite="strict")
            return answer
        return refusal(401, "open the address that chargpt play printed: it holds a token")


def same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
