"""Who may ask the page's server, and what browsers are told about its answers.

A browser sends requests to this machine on behalf of any site that is open in it. They are refused before anything else
is looked at: those with a Host that is not ours (a foreign name that was made to lead here, DNS rebinding), those with
another page's Origin, and those that the browser itself marks as caused by another site.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Scripts, styles, pictures and sounds come from this server alone, and no other page may show it in a frame.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'")
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()", "cache-control": "no-cache"}


class Refused(Exception):
    """A request that is not answered: a status of HTTP and one line for people."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, line

    def response(self) -> PlainTextResponse:
        return PlainTextResponse(f"{self.line}\n", self.status)


class Guard:
    """An ASGI application around `app` that refuses requests of other sites and adds HEADERS to every answer.

    Args:
        host: where the server listens. On a loopback address only this machine's names and loopback addresses are ours;
            elsewhere `host`, the machine's own name and every address written in digits, which nobody can rebind.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app, self.is_local = app, is_loopback(host)
        self.names = {"localhost"} if self.is_local else {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self.problem(scope["path"], Headers(scope=scope))
        await (refused.response() if refused else self.app)(scope, receive, send_guarded)

    def problem(self, path: str, headers: Headers) -> Refused | None:
        """Why a request is not answered; None where it is."""
        host = headers.get("host", "")
        if not self.is_ours(host):
            return Refused(421, f"{host[:100]!r} is not this server; open it by its address")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refused(403, "requests of pages of other sites are not answered")
        is_link = path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_link:
            return Refused(403, "requests of pages of other sites are not answered")
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header (NAME, NAME:PORT or [IPV6]:PORT) means this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (is_loopback(name) if self.is_local else is_address(name))


def is_address(name: str) -> bool:
    """Whether `name` is an IP address written in digits."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether `name` can only mean the machine that reads it."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)
