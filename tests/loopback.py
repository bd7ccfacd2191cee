"""A web server on the loopback interface that misbehaves on command.

    with Loopback({"/a.zip": data}) as server:
        server.faults["/a.zip"] = ["cut:70000", "503"]     # the first two requests; later ones are answered well
        ... server.url("/a.zip"), server.requests
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

PAGE = b"<!DOCTYPE html>\n<html><body>Please sign in</body></html>"


class Loopback:
    """`faults` holds, by path, what goes wrong with the next requests:

    a status ("503"), "retry:SECONDS" or "retry:DATE" (429 with Retry-After), "redirect:URL", "page", "sly-page" (a page
    that does not call itself one), "cut:BYTES" (the connection ends after so many), "stall:BYTES" (it then hangs),
    "no-length" (the length is not told and half is sent), "no-range", "no-if-range" (a piece, though the file is
    another one), "wrong-range", "gzip", "other" (other bytes), "more" (bytes too many, their number not told).
    `slow_s` is a pause after each 64 KiB, for all answers.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.faults: dict[str, list[str]] = {}
        self.headers: dict[str, str] = {}  # sent with every answer
        self.slow_s = 0.0
        self.bytes_sent = 0
        self.at_once = self.most_at_once = 0  # files that are being sent
        self.wait_until_at_once = 0  # none goes on before so many were
        self._together = threading.Condition()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.stop_stalling = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"loopback": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # killed clients are our trade

    def __enter__(self) -> "Loopback":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop_stalling.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str = "", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self._server.server_port}{path}"

    @contextmanager
    def sending(self) -> Iterator[None]:
        with self._together:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self._together.notify_all()
            self._together.wait_for(lambda: self.most_at_once >= self.wait_until_at_once, timeout=30)
        try:
            yield
        finally:
            with self._together:
                self.at_once -= 1

    def asked_for(self, path: str, within_s: float) -> bool:
        """Waits for a request for `path`, or for so long."""
        with self._together:
            return self._together.wait_for(lambda: any(asked == path for asked, _ in self.requests), within_s)

    def note(self, path: str, headers: dict[str, str]) -> None:
        with self._together:
            self.requests.append((path, headers))
            self._together.notify_all()

    def ranges(self, path: str) -> list[str]:
        """The Range header of each request for `path`, "" where it had none."""
        return [headers.get("range", "") for asked, headers in self.requests if asked == path]


class _Handler(BaseHTTPRequestHandler):
    loopback: Loopback

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.loopback.note(path, {name.lower(): value for name, value in self.headers.items()})
        queue = self.loopback.faults.get(path, [])
        fault, _, detail = (queue.pop(0) if queue else "").partition(":")
        data = self.loopback.files.get(path)
        if data is None:
            self._answer(404, PAGE)
        elif fault.isdigit():
            self._answer(int(fault), b"")
        elif fault == "retry":
            self._answer(429, b"", {"Retry-After": detail})
        elif fault == "redirect":
            self._answer(302, b"", {"Location": detail, "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        elif fault == "page":
            self._answer(200, b"<p>Please sign in", {"Content-Type": "text/html; charset=utf-8"})
        elif fault == "sly-page":
            self._answer(200, PAGE)
        else:
            self._file(data, fault, detail)

    def do_HEAD(self) -> None:
        """What GET would say of a file, without it; nothing goes wrong here."""
        path = self.path.split("?")[0]
        self.loopback.note(path, {name.lower(): value for name, value in self.headers.items()})
        data = self.loopback.files.get(path)
        self.send_response(404 if data is None else 200)
        etag = {} if data is None else {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        for name, value in {**etag, **self.loopback.headers, "Content-Length": str(len(data or b""))}.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**self.loopback.headers, **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, data: bytes, fault: str, detail: str) -> None:
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        span = self._span(data, etag, heeds=fault != "no-if-range") if fault != "no-range" else None
        start, end = span or (0, len(data))
        if start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[start:end]
        if fault == "other":
            body = bytes(len(body))
        elif fault == "more":
            body += b"x" * 1000
        shown = start + 1 if fault == "wrong-range" else start
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {shown}-{end - 1}/{len(data)}")
        for name, value in {"ETag": etag, **self.loopback.headers}.items():
            self.send_header(name, value)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if fault not in ("no-length", "more"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "no-length":
            body = body[: len(body) // 2]
        self._send(body, fault, detail)

    def _span(self, data: bytes, etag: str, *, heeds: bool) -> tuple[int, int] | None:
        """(first byte, the one after the last) of what is asked for, None for all of it; If-Range is heeded or not."""
        wanted, condition = self.headers.get("Range", ""), self.headers.get("If-Range", etag)
        if not wanted or (heeds and condition != etag):
            return None
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        return int(first), min(len(data), int(last) + 1) if last else len(data)

    def _send(self, body: bytes, fault: str, detail: str) -> None:
        if fault in ("cut", "stall"):
            self.wfile.write(body[: int(detail)])
            self.wfile.flush()
            if fault == "stall":
                self.loopback.stop_stalling.wait(30)
        else:
            with self.loopback.sending():
                self._slowly(body[:-1])
            self._slowly(body[-1:])  # whoever has it may ask for the next file before this thread goes on
        self.close_connection = True

    def _slowly(self, body: bytes) -> None:
        for at in range(0, len(body), 1 << 16):
            self.wfile.write(body[at: at + (1 << 16)])
            self.loopback.bytes_sent += len(body[at: at + (1 << 16)])
            if self.loopback.slow_s:
                time.sleep(self.loopback.slow_s)

    def log_message(self, format: str, *args: Any) -> None:
        """The test's own output says enough."""


def http_date(seconds_from_now: float) -> str:
    return formatdate(time.time() + seconds_from_now, usegmt=True)
