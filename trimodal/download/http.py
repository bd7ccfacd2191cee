"""Fetch a file over HTTP: resumed where it stopped, checked while it arrives, there whole or not at all.

While NAME arrives its bytes are in NAME.part, and a note beside it says where they come from (notes.py). NAME appears
when size and digest are right; another file of that name is kept under a new one (files.replace_with_backup).
"""

import contextlib
import hashlib
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trimodal import __version__
from trimodal.download import notes
from trimodal.download.progress import Bar, Progress
from trimodal.files import locked, replace_with_backup, same_bytes, sha256_of, sync_file, sync_folder
from trimodal.redaction import without_secrets

if TYPE_CHECKING:
    from requests import Response, Session

CHUNK_BYTES = 64 * 1024  # what a cut connection may cost
# Some hosts turn away the default agents of HTTP libraries; a name of our own is what they ask for.
USER_AGENT = f"trimodal-trainer/{__version__} (data set downloader; resumes by Range, obeys Retry-After)"
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
LONGEST_BACKOFF_S = 60.0


class TransferError(Exception):
    """A file could not be had from any server. One line, without secrets."""


class Stopped(Exception):
    """`Policy.stop` was set; what has arrived is kept."""


class Mismatch(Exception):
    """A file has another size or digest than it should."""


class NextServer(Exception):
    """This server does not give the file; `unreachable`: nor any other one."""

    def __init__(self, why: str, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.unreachable = unreachable


class _Interrupted(Exception):
    """A body ended early, or was not the piece that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to have at `path`, from the first of `urls` that gives it. `digests` are "sha256:..." or "md5:...", any of
    which is right; none where none is published."""

    path: Path
    urls: tuple[str, ...] = ()
    size: int = 0
    digests: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()  # hidden in messages and notes
    unverified_hosts: tuple[str, ...] = ()  # whose TLS certificate the user agreed not to check
    replaces: str = ""  # SHA-256 of what may be overwritten: what an earlier call put there
    keep_note: bool = False  # as the proof that the file came by this command


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How patient transfers are, and how they show. `failures` counts those in a row without one new byte, for a server
    that cannot be reached `failures_to_connect`. Setting `stop` ends a transfer at its next byte."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    failures: int = 6
    failures_to_connect: int = 2
    backoff_s: float = 1.0
    longest_wait_s: float = 600.0
    sleep: Callable[[float], None] | None = None  # None: until `stop`
    progress: Progress = field(default_factory=Progress)
    stop: threading.Event = field(default_factory=threading.Event)

    def pause(self, seconds: float) -> None:
        (self.sleep or self.stop.wait)(seconds)
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, kw_only=True)
class Fetched:
    path: Path
    size: int
    sha256: str
    checked: str  # the digest that matched, as "sha256:..." or "md5:..."; "" where none is known


def fetch(wanted: Wanted, policy: Policy | None = None) -> Fetched:
    """Have `wanted.path`: from the disk if its digest is right, else from the first server that gives it. Of several
    processes that want the same file one fetches it, and the others wait.

    Raises:
        TransferError: no server gave it; says what each answered.
        OSError: of the disk.
    """
    policy = policy or Policy()
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{wanted.path.name}: another process is fetching it; waiting for that"
    with locked(wanted.path, lambda: policy.progress.say(waiting), policy.pause):
        with contextlib.suppress(FileNotFoundError, Mismatch):
            if wanted.digests:
                fetched = check_file(wanted, policy.progress)
                if not (wanted.keep_note and notes.whole_sha256(wanted.path)):
                    notes.forget(wanted.path)  # the note of a run that was killed just before it did so
                return fetched
        return _from_any_server(wanted, policy)


def _from_any_server(wanted: Wanted, policy: Policy) -> Fetched:
    problems: list[str] = []
    dead: set[str] = set()
    for url in wanted.urls:
        host = host_of(url)
        if host in dead:
            continue
        try:
            return _from_server(wanted, url, policy)
        except NextServer as error:
            problems.append(f"{host} {error}")
            dead |= {host} if error.unreachable else set()
    answers = "; ".join(problems) or "no address is known"
    if wanted.path.is_file():
        answers += f"; what is there now is another file and is left as it is ({wanted.path})"
    raise TransferError(without_secrets(f"{wanted.path.name}: {answers}", wanted.secrets))


def _from_server(wanted: Wanted, url: str, policy: Policy) -> Fetched:
    """Ask one server until the file is whole; gives up when requests bring nothing new."""
    part = _Part(wanted, url, policy.progress)
    failures = mismatches = 0
    with (open_session(url, wanted, policy) as session,
          policy.progress.bar(wanted.path.name, part.total, part.size, transfer=True) as bar):
        part.bar, best = bar, part.size
        while True:
            try:
                if not 0 < part.size == part.total:
                    _receive(session, url, part, policy)
                return part.finish()
            except Mismatch as error:
                part.restart()
                mismatches += 1
                if mismatches == 2:  # once may be a bad line, twice is another file
                    raise NextServer(str(error)) from None
            except _Interrupted as error:
                failures = 0 if part.size > best else failures + 1
                best = max(best, part.size)
                if failures > policy.failures:
                    raise NextServer(f"{error} ({failures} tries)") from None
                wait_s = min(LONGEST_BACKOFF_S, policy.backoff_s * 2 ** max(0, failures - 1))
                policy.progress.say(f"{wanted.path.name}: {host_of(url)} {error}; trying again in {wait_s:.0f} s; "
                                    f"{part.size:,} bytes are kept")
                policy.pause(wait_s)


def _receive(session: "Session", url: str, part: "_Part", policy: Policy) -> None:
    """Send one request, and add what arrives to the part until the body ends."""
    import requests

    with ask(session, url, policy, (200, 206, 416), part.headers()) as response:
        chunks = response.iter_content(CHUNK_BYTES)
        try:
            head = next(chunks, b"")
            _refuse_page(response, head if response.status_code == 200 else b"")
            part.store(response, part.body_offset(response), itertools.chain([head], chunks), policy.stop)
        except requests.RequestException as error:
            raise _Interrupted(_reason(error, policy)) from None
    if part.size < part.total:
        raise _Interrupted(f"ended {part.total - part.size:,} bytes early")


class _Part:
    """The bytes of a file that have arrived from one server, and their hashes."""

    def __init__(self, wanted: Wanted, url: str, progress: Progress) -> None:
        self.wanted, self.url = wanted, without_secrets(url, wanted.secrets)
        self.progress, self.bar = progress, Bar()
        self.path, _ = notes.names_beside(wanted.path)
        self.note = notes.read(wanted.path)
        self.total = wanted.size or self.note.get("total", 0)
        self.size, self.hashes = 0, _new_hashes(wanted)
        # Bytes of unknown origin count only where a digest will judge the whole.
        if self.path.is_file() and (wanted.digests or (self.note.get("url") == self.url and self._validator())):
            self.size = _hash_file(self.path, self.hashes, progress)
        if not self.size or self.size > self.total > 0:
            self.restart()

    def _validator(self) -> str:
        """The value for the If-Range header: the noted ETag if it is a strong one, else the noted Last-Modified."""
        etag = str(self.note.get("etag") or "")
        return str(self.note.get("last_modified") or "") if etag.startswith("W/") or not etag else etag

    def headers(self) -> dict[str, str]:
        headers = {"Range": f"bytes={self.size}-"} if self.size else {}
        if self.size and self.note.get("url") == self.url and self._validator():
            headers["If-Range"] = self._validator()
        return headers

    def restart(self) -> None:
        self.path.unlink(missing_ok=True)
        self.size, self.hashes = 0, _new_hashes(self.wanted)
        self.bar.restart()

    def body_offset(self, response: "Response") -> int:
        """The offset in the file, in bytes, of the first byte of the body of `response`: 0, or the bytes already here.

        Raises:
            NextServer: the server offers a file of another size than the published one.
            _Interrupted: the body starts elsewhere (status 416 has none), or the file on the server changed since the
                first bytes were stored. What was stored is deleted, so that the next request asks for the whole file.
        """
        first, total = content_range(response.headers)
        if response.status_code == 200:
            first, total = 0, _body_length(response.headers)
        elif response.status_code == 416:  # there is nothing where the file should go on: another one
            first = -1
        if self.wanted.size and total not in (0, self.wanted.size):
            raise NextServer(f"offers {total:,} bytes instead of {self.wanted.size:,}: another file or release")
        # Some servers go on with another file though If-Range asked them not to; a digest would tell that later.
        changed = not self.wanted.digests and response.headers.get("ETag", "") != self.note.get("etag", "")
        if first not in (0, self.size) or (first and (changed or 0 < self.total != total > 0)):
            self.restart()
            raise _Interrupted("answered with another part of the file than asked for")
        return first

    def store(self, response: "Response", start: int, chunks: Iterable[bytes], stop: threading.Event) -> None:
        if start == 0:
            self.restart()
        length = _body_length(response.headers)
        self.total = self.wanted.size or (start + length if length else 0)
        note = {"url": self.url, "total": self.total, "etag": response.headers.get("ETag", ""),
                "last_modified": response.headers.get("Last-Modified", ""), "sha256": _announced_sha256(response)}
        if note != self.note:
            notes.write(self.wanted.path, note)
        self.note = note
        with self.path.open("ab") as file:
            for chunk in chunks:
                if stop.is_set():
                    raise Stopped
                file.write(chunk)
                self.size += len(chunk)
                _update(self.hashes, chunk)
                self.bar.add(len(chunk))
                if self.size > self.total > 0:
                    raise Mismatch(f"sent more than the {self.total:,} bytes of the file")

    def finish(self) -> Fetched:
        """Check all that has arrived, make it durable, and give it its name."""
        wanted = self.wanted
        announced = (f"sha256:{self.note['sha256']}",) if self.note.get("sha256") else ()
        fetched = _compare(wanted, wanted.digests or announced, self.size, self.hashes)
        sync_file(self.path)
        noted = wanted.keep_note and not same_bytes(self.path, wanted.path)  # else it was there before: the user's
        if noted:
            notes.write(wanted.path, {"url": self.url, **self.note, "whole": fetched.sha256})
        put(self.path, wanted, self.progress.say)
        if not noted:
            notes.forget(wanted.path)
        sync_folder(wanted.path.parent)
        return fetched


def put(new: Path, wanted: Wanted, say: Callable[[str], Any]) -> None:
    """Rename the complete file `new` to `wanted.path`. A file already there is overwritten if its digest is
    `wanted.replaces`, the one that an earlier call put there; any other is backed up first, and `say` gets a line."""
    def announce(kept: Path) -> None:
        hint = "" if wanted.keep_note else "; to use yours, give it back its name and add --skip-existing"
        say(f"{wanted.path.name}: what was there is another file than the published one, and is kept as {kept}{hint}")

    replace_with_backup(new, wanted.path, announce=announce, may_overwrite=lambda: bool(
        wanted.replaces and wanted.path.is_file() and sha256_of(wanted.path) == wanted.replaces))


# --- Digests ---------------------------------------------------------------------------------------------------------


def check_file(wanted: Wanted, progress: Progress | None = None) -> Fetched:
    """Compare the size and digest of `wanted.path`. Raises FileNotFoundError or Mismatch."""
    progress, hashes = progress or Progress(), _new_hashes(wanted)
    size = _hash_file(wanted.path, hashes, progress)
    progress.already_there(size)
    return _compare(wanted, wanted.digests, size, hashes)


def is_right(wanted: Wanted) -> bool:
    """Whether `wanted.path` can be read and has one of the digests; False where none is known."""
    with contextlib.suppress(Mismatch, OSError):
        return bool(wanted.digests and check_file(wanted))
    return False


def _new_hashes(wanted: Wanted) -> dict[str, Any]:
    """SHA-256, which the marker holds of every file, and MD5 where only that is published."""
    names = {"sha256", *(digest.partition(":")[0] for digest in wanted.digests)}
    return {name: hashlib.new(name, usedforsecurity=False) for name in sorted(names)}


def _update(hashes: Mapping[str, Any], chunk: bytes) -> None:
    for one in hashes.values():
        one.update(chunk)


def _hash_file(path: Path, hashes: Mapping[str, Any], progress: Progress) -> int:
    """The number of bytes that went into `hashes`."""
    size = 0
    with path.open("rb") as file, progress.bar(f"checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            _update(hashes, chunk)
            bar.add(len(chunk))
    return size


def _compare(wanted: Wanted, digests: tuple[str, ...], size: int, hashes: Mapping[str, Any]) -> Fetched:
    if size == 0 or (wanted.size and size != wanted.size):
        raise Mismatch(f"has {size:,} bytes" + (f" instead of {wanted.size:,}" if wanted.size else ""))
    found = {name: f"{name}:{one.hexdigest()}" for name, one in hashes.items()}
    matched = next((digest for digest in digests if digest in found.values()), "")
    if digests and not matched:
        raise Mismatch(f"has the digest {found[digests[0].partition(':')[0]]} instead of {digests[0]}")
    return Fetched(path=wanted.path, size=size, sha256=found["sha256"].partition(":")[2], checked=matched)


# --- Servers ---------------------------------------------------------------------------------------------------------


def open_session(url: str, wanted: Wanted, policy: Policy) -> "Session":
    """A session for one server, which asks again where another answer may come. It honours proxies and CA bundles of
    the environment, drops credentials on other hosts, and checks certificates but of `wanted.unverified_hosts`."""
    from requests import Session
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry, disable_warnings
    from urllib3.exceptions import InsecureRequestWarning, InvalidHeader

    class Patience(Retry):
        """Waits as long as the server asks for, within the policy, and says so."""

        def sleep(self, response: Any = None) -> None:
            last, asked_s = self.history[-1], None
            with contextlib.suppress(InvalidHeader):
                asked_s = self.get_retry_after(response) if response else None
            wait_s = self.get_backoff_time() if asked_s is None else asked_s
            why = f"answered {last.status}" if last.error is None else _reason(last.error, policy)
            if wait_s > policy.longest_wait_s:
                raise NextServer(f"{why} and asks to come back in {wait_s:.0f} s")
            policy.progress.say(f"{wanted.path.name}: {host_of(url)} {why}; trying again in {wait_s:.0f} s")
            policy.pause(wait_s)

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **settings: Any) -> "Response":
            if urlsplit(request.url).hostname in wanted.unverified_hosts:
                settings["verify"] = False
            return super().send(request, *arguments, **settings)

    if wanted.unverified_hosts:
        disable_warnings(InsecureRequestWarning)  # the user asked for it: a warning a request adds nothing
    patience = Patience(total=None, connect=policy.failures_to_connect, other=policy.failures_to_connect,
                        read=policy.failures, status=policy.failures, status_forcelist=RETRY_STATUS,
                        backoff_factor=policy.backoff_s, backoff_max=LONGEST_BACKOFF_S, raise_on_status=False)
    session = Session()
    session.headers.update({"User-Agent": USER_AGENT, "Accept": "*/*",
                            "Accept-Encoding": "identity"})  # a compressed answer would break byte counts and Range
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(max_retries=patience))
    return session


def ask(session: "Session", url: str, policy: Policy, good: tuple[int, ...],
        headers: Mapping[str, str]) -> "Response":
    """The answer to one request, its body still to come. Raises NextServer where its status is none of `good`."""
    import requests
    from urllib3 import exceptions as of

    try:
        response = session.get(url, headers=dict(headers), stream=True,
                               timeout=(policy.connect_timeout_s, policy.read_timeout_s))
    except requests.RequestException as error:
        cause = _cause(error)
        unreachable = isinstance(cause, of.ConnectTimeoutError | of.ProxyError)
        number = 1 + (policy.failures_to_connect if unreachable else policy.failures)
        tries = f" ({number} tries)" if isinstance(cause, of.HTTPError) else ""
        raise NextServer(_reason(error, policy) + tries, unreachable=unreachable) from None
    if response.status_code in good:
        if response.headers.get("Content-Encoding", "identity").lower() in ("identity", ""):
            return response
        raise NextServer("sends the file encoded, though asked not to")
    response.close()
    tries = f" ({policy.failures + 1} tries)" if response.status_code in RETRY_STATUS else ""
    raise NextServer(f"answered {response.status_code} {response.reason}".strip() + tries)


def _reason(error: Exception, policy: Policy) -> str:
    """A phrase for a connection error, in our own words: the library's text holds URLs, and these the user's key."""
    from urllib3 import exceptions as of

    cause = _cause(error)
    if not isinstance(cause, of.HTTPError):
        return f"cannot be used ({type(error).__name__})"
    certificate = "certificate" in str(cause).lower()
    return next(why for kind, why in (  # the first that fits: some are classes of others
        (of.ProxyError, "cannot be reached by the proxy that the environment names"),
        (of.NewConnectionError, "cannot be reached"),
        (of.ConnectTimeoutError, f"did not answer in {policy.connect_timeout_s:.0f} s"),
        (of.ReadTimeoutError, f"sent nothing for {policy.read_timeout_s:.0f} s"),
        (of.SSLError, "shows a TLS certificate that is not accepted" if certificate else "cut the TLS connection"),
        (of.HTTPError, "cut the connection")) if isinstance(cause, kind))


def _cause(error: Exception) -> Any:
    """The urllib3 exception that an exception of requests wraps; `error` itself where it wraps none."""
    import requests
    from urllib3.exceptions import MaxRetryError

    cause = error.args[0] if isinstance(error, requests.RequestException) and error.args else error
    return cause.reason if isinstance(cause, MaxRetryError) else cause


def host_of(url: str) -> str:
    """Name and port, without the user's name and password that an address can hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


def content_range(headers: Mapping[str, str]) -> tuple[int, int]:
    """(first byte, total) of `bytes 5-9/10` or `bytes */10`; -1 and 0 stand for what it does not say."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", ""), re.ASCII)
    return (int(found[1] or -1), int(found[2] or 0)) if found else (-1, 0)


def _body_length(headers: Mapping[str, str]) -> int:
    """The Content-Length header in bytes, 0 where it is missing or no number."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isdecimal() else 0


def _refuse_page(response: "Response", head: bytes) -> None:
    """Raise NextServer for a web page, which hosts of files answer with where one must sign in."""
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if ("text/html" in response.headers.get("Content-Type", "").lower()
            or start.startswith((b"<!doctype html", b"<html", b"<head"))):
        raise NextServer("answered with a web page instead of the file")


def _announced_sha256(response: "Response") -> str:
    """The digest that the Hugging Face Hub names in the answer that redirects to the bytes."""
    digests = (answer.headers.get("X-Linked-ETag", "").strip('"').lower() for answer in (*response.history, response))
    return next((digest for digest in digests if re.fullmatch("[0-9a-f]{64}", digest)), "")
