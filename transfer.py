"""Fetch one file over HTTP: resumed where it stopped, checked while it arrives, there whole or not at all.

While a file arrives it is NAME.part, with a note NAME.part.json of the server's validators beside it. It gets its name
only when its size and digest are right. Killed at any moment, the next call goes on from the bytes that are there. Of
several processes that want the same file one fetches it, and the others wait and then find it there.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from config import UserError
from files import locked, sync_folder
from progress import Bar, Progress
from redaction import redact

if TYPE_CHECKING:
    from requests import Response, Session

# Some hosts turn away the default agents of HTTP libraries; a name of our own is what they ask for.
USER_AGENT = "trimodal-trainer/0.1 (data set downloader; resumes by Range, obeys Retry-After)"
CHUNK_BYTES = 64 * 1024  # what a cut connection may cost
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be different later


class TransferError(Exception):
    """A file could not be had from any server. One line, without secrets."""


class NextServer(Exception):
    """This server will not give the file, however often it is asked."""

    def __init__(self, why: str, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.unreachable = unreachable


class Again(Exception):
    """This try failed; another may not. `wait_s` is the server's wish."""

    def __init__(self, why: str, wait_s: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.unreachable = unreachable

    @classmethod
    def of(cls, response: "Response") -> "Again":
        return cls(f"answered {response.status_code}", _retry_after_s(response.headers))


class Stopped(Exception):
    """`Policy.stop` was set; what has arrived is kept."""


class Mismatch(Exception):
    """All bytes are there and they are the wrong ones: another size or digest."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to fetch into `path` from the first of `urls` that gives it. Digests are hex, "" where none is known."""

    path: Path
    urls: tuple[str, ...]
    size: int = 0
    sha256: str = ""
    md5: str = ""
    also_good: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    unverified_hosts: tuple[str, ...] = ()  # whose TLS certificate the user agreed not to check

    @property
    def pinned(self) -> str:
        """The digest to check, as "sha256:..." or "md5:...", or ""."""
        return f"sha256:{self.sha256}" if self.sha256 else f"md5:{self.md5}" if self.md5 else ""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Patience, and who hears of it. `failures` counts tries in a row without one new byte; a server that cannot be
    reached gets fewer. Whoever sets `stop` ends the transfer at its next byte."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    failures: int = 6
    failures_to_connect: int = 2
    backoff_s: float = 1.0
    longest_wait_s: float = 600.0
    sleep: Callable[[float], None] | None = None  # None: until `stop`
    progress: Progress = field(default_factory=Progress)
    stop: threading.Event = field(default_factory=threading.Event)

    def wait_s(self, error: Again, failures: int) -> float:
        """As long as the server asks for, else longer after each failure."""
        wait_s = error.wait_s
        if wait_s is None:
            wait_s = min(60.0, self.backoff_s * 2 ** max(0, failures - 1)) * random.uniform(0.75, 1.25)
        if wait_s > self.longest_wait_s:
            raise NextServer(f"{error} and asks to come back in {wait_s:.0f} s")
        return wait_s

    def pause(self, seconds: float) -> None:
        (self.sleep or self.stop.wait)(seconds)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    path: Path
    size: int
    sha256: str
    checked: str  # the digest that matched, as "sha256:..." or "md5:..."; "" where none is known


def fetch(wanted: Wanted, policy: Policy | None = None) -> Fetched:
    """Have `wanted.path`, from the disk if it is there and right, else from the first server that gives it.

    Raises:
        TransferError: no server gave it; says what each answered.
        UserError: the disk is full.
    """
    policy = policy or Policy()
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(wanted.path, _Waiting(wanted, policy)):
            with contextlib.suppress(FileNotFoundError, Mismatch):
                return check_file(wanted, policy.progress)
            wanted.path.unlink(missing_ok=True)
            with policy.progress.bar(wanted.path.name, wanted.size, transfer=True) as bar:
                return _from_any_server(wanted, policy, bar)
    except OSError as error:
        raise _disk_error(error, wanted.path) from None


class _Waiting:
    """For another process that fetches the same file; says so once."""

    def __init__(self, wanted: Wanted, policy: Policy) -> None:
        self._wanted, self._policy, self._said = wanted, policy, False

    def __call__(self) -> None:
        if not self._said:
            self._policy.progress.say(f"{self._wanted.path.name}: another process is fetching it; waiting for that")
        self._said = True
        if self._policy.stop.wait(0.1):
            raise Stopped


def check_file(wanted: Wanted, progress: Progress | None = None) -> Fetched:
    """Hash `wanted.path` and compare. Raises FileNotFoundError or Mismatch."""
    hashes = _new_hashes()
    with wanted.path.open("rb") as file:
        with (progress or Progress()).bar(f"checking {wanted.path.name}", wanted.path.stat().st_size) as bar:
            size = _hash_into(hashes, file, bar)
    return _verdict(wanted, size, hashes)


def _from_any_server(wanted: Wanted, policy: Policy, bar: Bar) -> Fetched:
    problems: list[str] = []
    dead: set[str] = set()
    with open_session() as session:
        for url in wanted.urls:
            host = host_of(url)
            if host in dead:
                continue
            try:
                return _from_server(session, _Part(wanted, url, bar), policy)
            except NextServer as error:
                problems.append(f"{host} {error}")
                dead |= {host} if error.unreachable else set()
    what_they_said = "; ".join(problems) or "no address is known"
    raise TransferError(redact(f"{wanted.path.name}: {what_they_said}", wanted.secrets))


def open_session() -> "Session":
    from requests import Session

    session = Session()  # honours proxies and CA bundles of the environment, and drops credentials on other hosts
    session.headers.update({"User-Agent": USER_AGENT, "Accept": "*/*"})
    return session


def _from_server(session: "Session", part: "_Part", policy: Policy) -> Fetched:
    """Ask one server until the file is whole; gives up when tries bring nothing new."""
    failures = mismatches = 0
    best = part.size
    while True:
        try:
            _receive(session, part, policy)
            return part.finish()
        except Mismatch as error:
            part.restart()
            mismatches += 1
            if mismatches == 2:  # once may be a bad line, twice is another file
                raise NextServer(str(error)) from None
        except Again as error:
            failures = 0 if part.size > best else failures + 1
            best = max(best, part.size)
            allowed = policy.failures_to_connect if error.unreachable else policy.failures
            if failures > allowed:
                raise NextServer(f"{error} ({failures} tries)", unreachable=error.unreachable) from None
            _wait(error, failures, part, policy)


def host_of(url: str) -> str:
    """Name and port, without the user's name and password that an address can hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _wait(error: Again, failures: int, part: "_Part", policy: Policy) -> None:
    wait_s = policy.wait_s(error, failures)
    kept = f"; {part.size:,} bytes are kept" if part.size else ""
    policy.progress.say(f"{part.wanted.path.name}: {host_of(part.url)} {error}; trying again in {wait_s:.0f} s{kept}")
    policy.pause(wait_s)


def _receive(session: "Session", part: "_Part", policy: Policy) -> None:
    """One request: adds what arrives to the part. Returns when the file is whole, raises `Again` when it is not."""
    if part.whole():
        return
    verify = urlsplit(part.address).hostname not in part.wanted.unverified_hosts
    with translated(policy), _quiet_about_tls(verify):
        response = session.get(part.address, headers=part.headers(), stream=True, verify=verify,
                               timeout=(policy.connect_timeout_s, policy.read_timeout_s))
        with response:
            start = _start_of_body(response, part)
            if start is None:
                return
            _store(response, part, start, policy.stop)
    if part.size < part.total:
        raise Again(f"ended {part.total - part.size:,} bytes early")


def _start_of_body(response: "Response", part: "_Part") -> int | None:
    """Where the body of this answer belongs in the file; None when there is nothing left to fetch."""
    status = response.status_code
    if status in AGAIN:
        raise Again.of(response)
    first, total = _content_range(response.headers.get("Content-Range", ""))
    if status == 416:
        if part.size and total == part.size and part.wanted.size in (0, total):
            part.total = part.size
            return None
        part.restart()
        raise Again("answered 416 to a request to resume")
    if status not in (200, 206):
        raise NextServer(f"answered {status} {response.reason}".strip())
    if "text/html" in response.headers.get("Content-Type", "").lower():
        raise NextServer("answered with a web page instead of the file")
    if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise NextServer("sends the file encoded, though asked not to")
    if status == 200:
        first, total = 0, int(response.headers.get("Content-Length") or 0)
    _check_offer(part, first, total)
    return first


def _check_offer(part: "_Part", first: int, total: int) -> None:
    if part.wanted.size and total and total != part.wanted.size:
        raise NextServer(f"offers {total:,} bytes instead of {part.wanted.size:,}: another file or release")
    if first not in (0, part.size) or (first and part.total and total and total != part.total):
        part.restart()
        raise Again("answered with another part of the file than asked for")


def _store(response: "Response", part: "_Part", start: int, stop: threading.Event) -> None:
    chunks = response.iter_content(CHUNK_BYTES)
    head = next(chunks, b"")
    if start == 0 and _looks_like_page(head):
        raise NextServer("answered with a web page instead of the file")
    if start == 0:
        part.restart()
    part.note(response, start)
    with part.path.open("ab") as file:
        for chunk in _prepend(head, chunks):
            if stop.is_set():
                raise Stopped
            file.write(chunk)
            part.add(chunk)
            if part.total and part.size > part.total:
                break  # found out in `finish`


class _Part:
    """What has arrived: the bytes in NAME.part, their hashes, and the server's validators in NAME.part.json."""

    def __init__(self, wanted: Wanted, address: str, bar: Bar) -> None:
        self.wanted = wanted
        self.address = address
        self.url = redact(address, wanted.secrets)  # the one to write down
        self.bar = bar
        self.path = wanted.path.with_name(wanted.path.name + ".part")
        self.notes_path = wanted.path.with_name(wanted.path.name + ".part.json")
        self.notes = self._read_notes()
        self.size = 0
        self.hashes = _new_hashes()
        self.total = wanted.size or int(self.notes.get("total") or 0)
        if self._can_resume():
            self._load()
        else:
            self.restart()

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self.notes_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return notes if isinstance(notes, dict) and isinstance(notes.get("total", 0), int) else {}

    def _can_resume(self) -> bool:
        """Bytes of unknown origin count only where a pinned digest will judge the whole."""
        if not self.path.is_file() or not self.notes:
            return False
        return bool(self.wanted.pinned) or (self.notes.get("url") == self.url and bool(self._validator()))

    def _validator(self) -> str:
        etag = str(self.notes.get("etag") or "")
        return str(self.notes.get("last_modified") or "") if etag.startswith("W/") or not etag else etag

    def _load(self) -> None:
        with self.path.open("rb") as file:
            self.size = _hash_into(self.hashes, file)
        if self.total and self.size > self.total:
            self.restart()
        self.bar.move_to(self.size, arrived=False)

    def restart(self) -> None:
        self.path.unlink(missing_ok=True)
        self.size = 0
        self.hashes = _new_hashes()
        self.bar.move_to(0)

    def whole(self) -> bool:
        return self.size > 0 and self.size == self.total

    def headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}  # a compressed answer would break byte counts and Range
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
            if self.notes.get("url") == self.url and self._validator():
                headers["If-Range"] = self._validator()
        return headers

    def note(self, response: "Response", start: int) -> None:
        """Write down what identifies the file on this server, before the first byte of it is written."""
        length = int(response.headers.get("Content-Length") or 0)
        self.total = self.wanted.size or (start + length if length else 0)
        self.bar.expect(self.total)
        self.notes = {"url": self.url, "total": self.total, "etag": response.headers.get("ETag", ""),
                      "last_modified": response.headers.get("Last-Modified", ""), "sha256": _announced(response)}
        self.notes_path.write_text(json.dumps(self.notes), encoding="utf-8")

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.bar.move_to(self.size)
        for hasher in self.hashes.values():
            hasher.update(chunk)

    def finish(self) -> Fetched:
        """Check, make durable, give the file its name."""
        wanted = self.wanted
        if not wanted.pinned and self.notes.get("sha256"):
            wanted = Wanted(path=wanted.path, urls=(), size=wanted.size, sha256=self.notes["sha256"])
        if self.total and self.size > self.total:
            raise Mismatch(f"sent more than the {self.total:,} bytes of the file")
        fetched = _verdict(wanted, self.size, self.hashes)
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.wanted.path)
        self.notes_path.unlink(missing_ok=True)
        sync_folder(self.wanted.path.parent)
        return fetched


def _verdict(wanted: Wanted, size: int, hashes: Mapping[str, Any]) -> Fetched:
    if size == 0 or (wanted.size and size != wanted.size):
        raise Mismatch(f"has {size:,} bytes" + (f" instead of {wanted.size:,}" if wanted.size else ""))
    found = {f"{name}:{hasher.hexdigest()}" for name, hasher in hashes.items()}
    good = [digest for digest in (wanted.pinned, *wanted.also_good) if digest]
    matched = next((digest for digest in good if digest in found), "")
    if good and not matched:
        kind = good[0].split(":")[0]
        theirs = next(digest for digest in sorted(found) if digest.startswith(kind))
        raise Mismatch(f"has the digest {theirs} instead of {good[0]}")
    return Fetched(path=wanted.path, size=size, sha256=hashes["sha256"].hexdigest(), checked=matched)


def _new_hashes() -> dict[str, Any]:
    return {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}


def _hash_into(hashes: Mapping[str, Any], file: Any, bar: Bar | None = None) -> int:
    size = 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        if bar:
            bar.add(len(chunk))
        for hasher in hashes.values():
            hasher.update(chunk)
    return size


def _announced(response: "Response") -> str:
    """The sha256 that Hub-like servers name in the answer that redirects to the bytes."""
    for answer in (*response.history, response):
        digest = answer.headers.get("X-Linked-ETag", "").strip('"').lower()
        if len(digest) == 64 and all(c in "0123456789abcdef" for c in digest):
            return digest
    return ""


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where there is none or it is not readable."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _content_range(text: str) -> tuple[int, int]:
    """(first byte, total) of `bytes 5-9/10` or `bytes */10`; -1 and 0 stand for what it does not say."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes":
        return -1, 0
    return int(first) if first.isdigit() else -1, int(total) if total.isdigit() else 0


def _looks_like_page(head: bytes) -> bool:
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))


def _prepend(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks


@contextlib.contextmanager
def translated(policy: Policy) -> Iterator[None]:
    """Turn the library's exceptions, whose texts hold addresses and with them keys, into our short ones."""
    import requests
    from urllib3.exceptions import NameResolutionError, NewConnectionError

    errors = requests.exceptions
    try:
        yield
    except errors.SSLError:
        raise NextServer("shows a TLS certificate that is not accepted") from None
    except (errors.TooManyRedirects, errors.MissingSchema, errors.InvalidSchema, errors.InvalidURL) as error:
        raise NextServer(f"cannot be used ({type(error).__name__})") from None
    except errors.ConnectTimeout:
        raise Again(f"did not answer in {policy.connect_timeout_s:.0f} s", unreachable=True) from None
    except errors.ReadTimeout:
        raise Again(f"sent nothing for {policy.read_timeout_s:.0f} s") from None
    except errors.RequestException as error:
        reason = getattr(error.args[0], "reason", None) if error.args else None
        lost = not isinstance(reason, NewConnectionError | NameResolutionError)
        raise Again("cut the connection" if lost else "cannot be reached", unreachable=not lost) from None


@contextlib.contextmanager
def _quiet_about_tls(verify: bool) -> Iterator[None]:
    """The user asked for no verification of this host: one warning a request adds nothing."""
    import warnings

    with warnings.catch_warnings():
        if not verify:
            warnings.filterwarnings("ignore", message="Unverified HTTPS request")
        yield


def _disk_error(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return UserError(f"{path.parent}: the disk is full; what has arrived is kept, free some space and run again")
    return UserError(f"{error.filename or path}: {error.strerror or error}")

