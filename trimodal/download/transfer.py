"""Fetch one file over HTTP: resumed where it stopped, checked while it arrives, there whole or not at all.

While a file arrives it is NAME.part, with a note of the server's validators beside it (arrivals.py). It gets its name
only when its size and digest are right, and a file that has the name till then gets another one (files.settle). Killed
at any moment, the next call goes on from the bytes that are there. Of several processes that want the same file one
fetches it, and the others wait and then find it there.
"""

import errno
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimodal.download import answers, arrivals
from trimodal.download.answers import Again, NextServer, host_of
from trimodal.download.progress import Bar, Progress
from trimodal.errors import UserError
from trimodal.files import locked, same_bytes, settle, sync_file, sync_folder
from trimodal.redaction import redact

if TYPE_CHECKING:
    from requests import Response, Session

CHUNK_BYTES = 64 * 1024  # what a cut connection may cost


class TransferError(Exception):
    """A file could not be had from any server. One line, without secrets."""


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
    ours: str = ""  # SHA-256 of what may be replaced: what an earlier call put there
    noted: bool = False  # whether the note stays beside the file, as the proof that it came by this command

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

    @property
    def timeouts_s(self) -> tuple[float, float]:
        return self.connect_timeout_s, self.read_timeout_s

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
    """Have `wanted.path`, from the disk if it is there and its digest right, else from the first server that gives it.
    Another file that is there stays as it is until the new one is whole, and is then kept under another name.

    Raises:
        TransferError: no server gave it; says what each answered.
        UserError: the disk is full.
    """
    policy = policy or Policy()
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(wanted.path, _Waiting(wanted, policy)):
            if wanted.pinned and (fetched := _there(wanted, policy.progress)):
                return fetched
            with policy.progress.bar(wanted.path.name, wanted.size, transfer=True) as bar:
                return _from_any_server(wanted, policy, bar)
    except OSError as error:
        raise _disk_error(error, wanted.path) from None


def _there(wanted: Wanted, progress: Progress) -> Fetched | None:
    try:
        fetched = check_file(wanted, progress)
    except (FileNotFoundError, Mismatch):
        return None
    if not (wanted.noted and arrivals.digest(wanted.path)):
        arrivals.forget(wanted.path)  # of a run that was killed just before it did so
    return fetched


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
    hashes, progress = _new_hashes(), progress or Progress()
    with wanted.path.open("rb") as file:
        with progress.bar(f"checking {wanted.path.name}", wanted.path.stat().st_size) as bar:
            size = _hash_into(hashes, file, bar.move_to)
    fetched = _verdict(wanted, size, hashes)
    progress.add(size, arrived=False)  # of what was to be fetched in all, this is there
    return fetched


def _from_any_server(wanted: Wanted, policy: Policy, bar: Bar) -> Fetched:
    problems: list[str] = []
    dead: set[str] = set()
    with answers.open_session(wanted.unverified_hosts) as session:
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
    if wanted.path.is_file():
        what_they_said += f"; what is there now is another file and is left as it is ({wanted.path})"
    raise TransferError(redact(f"{wanted.path.name}: {what_they_said}", wanted.secrets))


def _from_server(session: "Session", part: "_Part", policy: Policy) -> Fetched:
    """Ask one server until the file is whole; gives up when tries bring nothing new."""
    failures = mismatches = 0
    best = part.size
    while True:
        try:
            _receive(session, part, policy)
            return part.finish(policy.progress)
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


def _wait(error: Again, failures: int, part: "_Part", policy: Policy) -> None:
    wait_s = policy.wait_s(error, failures)
    kept = f"; {part.size:,} bytes are kept" if part.size else ""
    policy.progress.say(f"{part.wanted.path.name}: {host_of(part.url)} {error}; trying again in {wait_s:.0f} s{kept}")
    policy.pause(wait_s)


def _receive(session: "Session", part: "_Part", policy: Policy) -> None:
    """One request: adds what arrives to the part. Returns when the file is whole, raises `Again` when it is not."""
    if part.whole():
        return
    with answers.translated(policy.timeouts_s):
        response = session.get(part.address, headers=part.headers(), stream=True, timeout=policy.timeouts_s)
        with response:
            start = _start_of_body(response, part)
            if start is None:
                return
            _store(response, part, start, policy.stop)
    if part.size < part.total:
        raise Again(f"ended {part.total - part.size:,} bytes early")


def _start_of_body(response: "Response", part: "_Part") -> int | None:
    """Where the body of this answer belongs in the file; None when there is nothing left to fetch."""
    answers.refuse_errors(response, (200, 206, 416))
    first, total = answers.content_range(response.headers)
    if response.status_code == 416:
        if part.size and total == part.size and part.wanted.size in (0, total):
            part.total = part.size
            return None
        part.restart()
        raise Again("answered 416 to a request to resume")
    if "text/html" in response.headers.get("Content-Type", "").lower():
        raise NextServer("answered with a web page instead of the file")
    if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise NextServer("sends the file encoded, though asked not to")
    if response.status_code == 200:
        first, total = 0, answers.body_length(response.headers)
    _check_offer(part, first, total, response.headers.get("ETag", ""))
    return first


def _check_offer(part: "_Part", first: int, total: int, etag: str) -> None:
    if part.wanted.size and total and total != part.wanted.size:
        raise NextServer(f"offers {total:,} bytes instead of {part.wanted.size:,}: another file or release")
    changed = not part.wanted.pinned and etag != part.notes.get("etag", "")  # though If-Range asked not to go on then
    if first not in (0, part.size) or (first and (changed or (part.total and total and total != part.total))):
        part.restart()
        raise Again("answered with another part of the file than asked for")


def _store(response: "Response", part: "_Part", start: int, stop: threading.Event) -> None:
    chunks = response.iter_content(CHUNK_BYTES)
    head = next(chunks, b"")
    if start == 0 and answers.looks_like_page(head):
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
        self.path = arrivals.part_of(wanted.path)
        self.notes = arrivals.read_note(wanted.path)
        self.size = 0
        self.hashes = _new_hashes()
        self.total = wanted.size or int(self.notes.get("total") or 0)
        if self._can_resume():
            self._load()
        else:
            self.restart()

    def _can_resume(self) -> bool:
        """Bytes of unknown origin count only where a pinned digest will judge the whole."""
        known = self.notes.get("url") == self.url and bool(self._validator())
        return self.path.is_file() and (known or bool(self.wanted.pinned))

    def _validator(self) -> str:
        etag = str(self.notes.get("etag") or "")
        return str(self.notes.get("last_modified") or "") if etag.startswith("W/") or not etag else etag

    def _load(self) -> None:
        with self.path.open("rb") as file:
            self.size = _hash_into(self.hashes, file, lambda size: self.bar.move_to(size, arrived=False))
        if self.total and self.size > self.total:
            self.restart()

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
        length = answers.body_length(response.headers)
        self.total = self.wanted.size or (start + length if length else 0)
        self.bar.expect(self.total)
        notes = {"url": self.url, "total": self.total, "etag": response.headers.get("ETag", ""),
                 "last_modified": response.headers.get("Last-Modified", ""),
                 "sha256": answers.announced_sha256(response)}
        if notes != self.notes:
            arrivals.write_note(self.wanted.path, self.url, notes)
        self.notes = notes

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.bar.move_to(self.size)
        for hasher in self.hashes.values():
            hasher.update(chunk)

    def finish(self, progress: Progress) -> Fetched:
        """Check, make durable, give the file its name."""
        wanted = self.wanted
        if not wanted.pinned and self.notes.get("sha256"):
            wanted = replace(wanted, sha256=self.notes["sha256"])
        if self.total and self.size > self.total:
            raise Mismatch(f"sent more than the {self.total:,} bytes of the file")
        fetched = _verdict(wanted, self.size, self.hashes)
        sync_file(self.path)
        noted = wanted.noted and not same_bytes(self.path, wanted.path)  # else it was there before, and is the user's
        if noted:
            arrivals.write_note(wanted.path, self.url, {**self.notes, "whole": fetched.sha256})
        put(self.path, wanted, progress)
        if not noted:
            arrivals.forget(wanted.path)
        sync_folder(wanted.path.parent)
        return fetched


def put(new: Path, wanted: Wanted, progress: Progress) -> None:
    """Give the file `new`, which is whole, its name. What is there is replaced if it is what an earlier call put there,
    else kept under another name, which is told."""
    def tell(kept: Path) -> None:
        hint = "" if wanted.noted else "; to use yours, give it back its name and add --skip-existing"
        progress.say(f"{wanted.path.name}: what was there is another file than the published one, and is kept as "
                     f"{kept}{hint}")

    settle(new, wanted.path, ours=partial(_has_digest, wanted.path, wanted.ours), tell=tell)


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        return bool(sha256) and bool(check_file(Wanted(path=path, urls=(), sha256=sha256)))
    except (FileNotFoundError, Mismatch):
        return False


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


def _hash_into(hashes: Mapping[str, Any], file: Any, moved_to: Callable[[int], None]) -> int:
    size = 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        for hasher in hashes.values():
            hasher.update(chunk)
        moved_to(size)
    return size


def _prepend(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks


def _disk_error(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return UserError(f"{path.parent}: the disk is full; what has arrived is kept, free some space and run again")
    return UserError(f"{error.filename or path}: {error.strerror or error}")

