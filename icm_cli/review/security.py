"""Access to the page of a review: checks of every request, and security headers of every response."""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
"""HTTP methods that change nothing."""
OPEN_THE_LINK = "icm review prints a link when it starts; open that link in this browser"
NO_TOKEN = (
    f"this page needs the link of the icm review that runs now: {OPEN_THE_LINK}. Tabs of the review that are open can "
    "be used again then"
)
WRONG_TOKEN = f"this link is incomplete, or from an earlier start: {OPEN_THE_LINK}"


class RequestGuard:
    """ASGI middleware that passes on only requests of browsers that have opened the link with the token.

    Opening the link stores the token in a cookie. A request that another website starts in the same browser is refused:
    its ``Host`` or ``Origin`` header differs, and browsers do not attach a ``SameSite`` cookie to it.
    """

    def __init__(self, app: ASGIApp, token: str, host: str, port: int) -> None:
        """``host``, ``port``: the address that the server is bound to."""
        self._app = app
        self._token = token
        self._cookie = f"icm-{port}"
        self._hosts = LOOPBACK_NAMES | {host.lower()}
        self._has_all_addresses = is_any_address(host)
        if self._has_all_addresses:
            self._hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the server has no {scope['type']} connections")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        responder = self._check(scope) or self._app
        await responder(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> Response | None:
        """Return a refusal, or the response that sets the cookie; None if the request is passed on to the page."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            host = ", ".join(hosts)
            return refuse(scope, 403, f"the host {host!r} of the address is not that of icm review: {OPEN_THE_LINK}")
        is_safe = scope["method"] in SAFE_METHODS
        token = _token_in_query(scope)
        if is_safe and scope["path"] == "/" and token:
            return self._redirect_with_cookie() if self._is_token(token) else refuse(scope, 403, WRONG_TOKEN)
        cookies = cookie_parser(headers.get("cookie", ""))
        if not self._is_token(cookies.get(self._cookie, "")):
            return refuse(scope, 403, NO_TOKEN)
        if is_safe:
            return None
        origins = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}
        if headers.get("origin", "").lower() not in origins:
            return refuse(scope, 403, "the request comes from another site")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return refuse(scope, 400, "expected Content-Type: application/json")
        return None

    def _is_own_host(self, host: str) -> bool:
        """Return whether a ``Host`` header names this server. Its port may be any, because SSH may forward another.

        A server that is bound to all addresses accepts every IP address, which cannot be another website's domain.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._has_all_addresses

    def _is_token(self, text: str) -> bool:
        """Return whether a text is the token. The comparison takes equally long for all wrong tokens."""
        return secrets.compare_digest(text.encode(errors="replace"), self._token.encode())

    def _redirect_with_cookie(self) -> Response:
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._token, path="/", httponly=True, samesite="strict")
        return response


def refuse(scope: Scope, status: int, sentence: str) -> Response:
    """Return a response that says why a request is refused: JSON for the page, and text for a person."""
    if scope["path"].startswith("/api/"):
        return Response(json.dumps({"error": sentence}), status, media_type="application/json")
    return Response(f"icm review: {sentence}.\n", status, media_type="text/plain")


def is_any_address(host: str) -> bool:
    """Return whether a host stands for all addresses of this machine, such as 0.0.0.0."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Return whether a server at this host can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _token_in_query(scope: Scope) -> str:
    """Return the token in the URL of a request; "" without one."""
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return query.get("token", [""])[0]
