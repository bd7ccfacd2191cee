"""Transfers from a server that misbehaves on command: a file arrives whole, with the fewest bytes, or not at all."""

import errno
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_cache import wait_for
from tests.loopback import Loopback, http_date
from tests.project import ROOT
from tests.refusals import assert_names, refused
from trimodal.download import http
from trimodal.download.http import Fetched, Policy, TransferError, Wanted, fetch
from trimodal.download.progress import Progress
from trimodal.files import is_set_aside

DATA = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
RIGHT = (f"sha256:{SHA256}",)
CHUNK = http.CHUNK_BYTES


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback({"/a.bin": DATA, "/b.bin": DATA}) as loopback:
        yield loopback


class Patience:
    """A policy that notes the seconds it would sleep."""

    def __init__(self, **settings: Any) -> None:
        self.slept_s: list[float] = []
        self.policy = Policy(sleep=self.slept_s.append, **settings)


def wanted(folder: Path, *urls: str, **settings: Any) -> Wanted:
    return Wanted(path=folder / "a.bin", urls=urls, **{"size": len(DATA), "digests": RIGHT, **settings})


def get(want: Wanted, **settings: Any) -> Fetched:
    return fetch(want, Patience(**settings).policy)


def only_file(folder: Path) -> bytes:
    """The contents of the one file there; .part and its notes are gone."""
    (path,) = folder.iterdir()
    assert path.name == "a.bin"
    return path.read_bytes()


def with_one_aside(folder: Path) -> tuple[bytes, bytes]:
    """The contents of the file there, and of the one that had to make way."""
    (kept,) = (path for path in folder.iterdir() if path.name != "a.bin")
    assert is_set_aside(kept.name, "a.bin")
    return (folder / "a.bin").read_bytes(), kept.read_bytes()


def test_file_arrives_with_its_digest(server: Loopback, tmp_path: Path) -> None:
    fetched = get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA
    assert (fetched.size, fetched.sha256, fetched.checked) == (len(DATA), SHA256, f"sha256:{SHA256}")
    ((_, headers),) = server.requests
    assert headers["user-agent"] == http.USER_AGENT and "python" not in http.USER_AGENT
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("digests", [(f"md5:{hashlib.md5(DATA).hexdigest()}",), (),
                                     (f"sha256:{64 * '0'}", f"md5:{hashlib.md5(DATA).hexdigest()}")])
def test_other_ways_to_know_a_file(server: Loopback, tmp_path: Path, digests: tuple[str, ...]) -> None:
    get(wanted(tmp_path, server.url("/a.bin"), digests=digests))
    assert only_file(tmp_path) == DATA


def test_right_file_is_not_fetched_again_and_a_wrong_one_is(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    get(wanted(tmp_path, server.url("/a.bin")))
    assert server.requests == []
    (tmp_path / "a.bin").write_bytes(DATA[:-1] + b"x")
    get(wanted(tmp_path, server.url("/a.bin")))
    assert with_one_aside(tmp_path) == (DATA, DATA[:-1] + b"x") and len(server.requests) == 1


def test_a_file_that_nothing_can_check_stays_until_there_is_another(server: Loopback, tmp_path: Path) -> None:
    unknown = wanted(tmp_path, server.url("/a.bin"), digests=(), size=0)
    (tmp_path / "a.bin").write_bytes(b"of the user")
    server.faults["/a.bin"] = ["404"]
    with pytest.raises(TransferError):
        get(unknown)
    assert only_file(tmp_path) == b"of the user"
    get(unknown)
    assert with_one_aside(tmp_path) == (DATA, b"of the user")


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_cut_connection_is_resumed_where_it_ended(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", f"cut:{CHUNK}"]
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA
    assert server.ranges("/a.bin") == ["", f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    assert [headers.get("if-range") for _, headers in server.requests] == [None, etag, etag]


def test_every_cut_that_brings_bytes_earns_new_patience(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"cut:{CHUNK}"] * 4
    get(wanted(tmp_path, server.url("/a.bin")), failures=0)
    assert only_file(tmp_path) == DATA


def test_a_second_run_goes_on_from_the_part(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", "cut:0"]
    with refused("a.bin", error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin")), failures=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin.part", "a.bin.part.json"]
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA
    assert server.ranges("/a.bin")[-1] == f"bytes={2 * CHUNK}-"


def test_another_server_goes_on_from_the_part(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", "404"]
    get(wanted(tmp_path, server.url("/a.bin"), server.url("/b.bin")))
    assert only_file(tmp_path) == DATA
    assert server.ranges("/b.bin") == [f"bytes={2 * CHUNK}-"]


@pytest.mark.parametrize("fault", ["no-range", "wrong-range", "416"])
def test_server_that_cannot_resume_sends_all_again(server: Loopback, tmp_path: Path, fault: str) -> None:
    server.faults["/a.bin"] = [f"cut:{CHUNK}", fault]
    get(wanted(tmp_path, server.url("/a.bin"), digests=(), size=0))
    assert only_file(tmp_path) == DATA


def test_a_file_that_changed_meanwhile_is_not_mixed(server: Loopback, tmp_path: Path) -> None:
    """No digest and no size are known here: the server's validator alone must tell."""
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", "cut:0"]
    unknown = wanted(tmp_path, server.url("/a.bin"), digests=(), size=0)
    with pytest.raises(TransferError):
        get(unknown, failures=0)
    server.files["/a.bin"] = newer = random.Random(1).randbytes(len(DATA))
    get(unknown)
    assert only_file(tmp_path) == newer


def test_a_changed_file_is_not_mixed_though_the_server_ignores_if_range(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", "cut:0", "no-if-range"]
    unknown = wanted(tmp_path, server.url("/a.bin"), digests=(), size=0)
    with pytest.raises(TransferError):
        get(unknown, failures=0)
    server.files["/a.bin"] = newer = random.Random(1).randbytes(len(DATA))
    get(unknown)
    assert only_file(tmp_path) == newer and server.ranges("/a.bin")[-1] == ""


def test_a_part_whose_notes_are_lost_counts_where_a_digest_judges(server: Loopback, tmp_path: Path) -> None:
    for notes in ("", "{"):
        (tmp_path / "a.bin.part").write_bytes(DATA[:CHUNK])
        (tmp_path / "a.bin.part.json").write_text(notes)
        get(wanted(tmp_path, server.url("/a.bin")))
        assert only_file(tmp_path) == DATA and server.ranges("/a.bin")[-1] == f"bytes={CHUNK}-"
        (tmp_path / "a.bin").unlink()


def test_notes_are_written_only_where_they_change(server: Loopback, tmp_path: Path) -> None:
    unknown = wanted(tmp_path, server.url("/a.bin"), digests=(), size=0)
    notes = tmp_path / "a.bin.part.json"
    for size in (1, 2):
        server.faults["/a.bin"] = [f"cut:{CHUNK}", "cut:0"]
        with pytest.raises(TransferError):
            get(unknown, failures=0)
        assert (tmp_path / "a.bin.part").stat().st_size == size * CHUNK
        assert size == 1 or notes.stat().st_mtime_ns == 1
        os.utime(notes, ns=(1, 1))


def test_notes_that_a_kill_left_beside_the_whole_file_go(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "a.bin.part.json").write_text('{"url": "x"}')
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA and server.requests == []


def test_part_of_unknown_origin_counts_only_with_a_digest(server: Loopback, tmp_path: Path) -> None:
    notes = json.dumps({"url": "http://elsewhere/a.bin", "total": len(DATA), "etag": '"x"'})
    for settings, ranges in (({}, f"bytes={CHUNK}-"), ({"digests": ()}, "")):
        (tmp_path / "a.bin.part").write_bytes(DATA[:CHUNK])
        (tmp_path / "a.bin.part.json").write_text(notes)
        get(wanted(tmp_path, server.url("/a.bin"), **settings))
        assert only_file(tmp_path) == DATA and server.ranges("/a.bin")[-1] == ranges
        (tmp_path / "a.bin").unlink()


def test_complete_part_is_checked_and_named_without_a_request(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA)
    (tmp_path / "a.bin.part.json").write_text(json.dumps({"url": server.url("/a.bin"), "total": len(DATA)}))
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA and server.requests == []


@pytest.mark.timed
def test_killed_in_mid_transfer_then_run_again(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"stall:{3 * CHUNK}"]
    code = ("import pathlib\nfrom trimodal.download import http\n"
            f"http.fetch(http.Wanted(path=pathlib.Path({str(tmp_path / 'a.bin')!r}), urls=({server.url('/a.bin')!r},), "
            f"size={len(DATA)}, digests={RIGHT!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    part = tmp_path / "a.bin.part"
    try:
        wait_for(lambda: (part.exists() and part.stat().st_size >= 2 * CHUNK) or process.poll() is not None)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "a.bin").exists()
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA
    assert int(server.ranges("/a.bin")[-1].strip("bytes=-")) >= 2 * CHUNK


# --- Patience --------------------------------------------------------------------------------------------------------


def test_429_waits_as_long_as_the_server_asks(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["retry:7", f"retry:{http_date(500)}"]
    patience = Patience()
    begin_s = time.time()
    fetch(wanted(tmp_path, server.url("/a.bin")), patience.policy)
    assert only_file(tmp_path) == DATA
    first, second = patience.slept_s
    assert first == 7 and 498 - (time.time() - begin_s) <= second <= 500, "whole seconds of what is left"


def test_too_long_a_wait_goes_to_the_next_server(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["retry:9999"]
    patience = Patience()
    fetch(wanted(tmp_path, server.url("/a.bin"), server.url("/b.bin")), patience.policy)
    assert only_file(tmp_path) == DATA and patience.slept_s == []


def test_errors_of_the_server_are_retried_with_growing_pauses(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["503", "500", "408"]
    patience = Patience()
    fetch(wanted(tmp_path, server.url("/a.bin")), patience.policy)
    assert only_file(tmp_path) == DATA
    assert patience.slept_s[0] < patience.slept_s[1] < patience.slept_s[2] <= 5


def test_it_gives_up_in_the_end(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["503"] * 99
    with refused("a.bin", 503, 3, error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin")), failures=2)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_clear_no_goes_to_the_next_server_at_once(server: Loopback, tmp_path: Path, status: str) -> None:
    server.faults["/a.bin"] = [status]
    get(wanted(tmp_path, server.url("/a.bin"), server.url("/b.bin")))
    assert only_file(tmp_path) == DATA
    assert [path for path, _ in server.requests] == ["/a.bin", "/b.bin"]


def test_a_host_that_is_not_there_is_not_asked_for_its_other_address(tmp_path: Path) -> None:
    with refused("a.bin", "127.0.0.1:9", 3, error=TransferError) as caught:
        get(wanted(tmp_path, "http://127.0.0.1:9/a.bin", "http://127.0.0.1:9/b.bin"))
    assert str(caught.value).count("127.0.0.1:9") == 1


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    patience = Patience()
    with socket.socket() as bound:  # and nobody else can be: it never listens
        bound.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        with refused("a.bin", host, 3, error=TransferError):
            fetch(wanted(tmp_path, f"http://{host}/a.bin"), patience.policy)
    assert len(patience.slept_s) == 2


# --- Wrong answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "size"), [("page", 0), ("page", len(DATA)), ("sly-page", 0)])
def test_a_web_page_is_not_the_file(server: Loopback, tmp_path: Path, fault: str, size: int) -> None:
    server.faults["/a.bin"] = [fault]
    with refused("a.bin", error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin"), digests=(), size=size))
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("fault", ["page", "sly-page"])
def test_a_web_page_does_not_cost_what_has_arrived(server: Loopback, tmp_path: Path, fault: str) -> None:
    server.faults["/a.bin"] = [f"cut:{2 * CHUNK}", fault]
    get(wanted(tmp_path, server.url("/a.bin"), server.url("/b.bin"), size=0))
    assert only_file(tmp_path) == DATA and server.ranges("/b.bin") == [f"bytes={2 * CHUNK}-"]


def test_a_short_body_of_untold_length_is_completed(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["no-length"]
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA
    assert server.ranges("/a.bin")[1] == f"bytes={len(DATA) // 2}-"


def test_a_wrong_digest_is_tried_once_more(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["other"]
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA


def test_a_wrong_digest_that_stays_is_an_error_with_both(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = ["other"] * 9
    with refused("a.bin", SHA256, hashlib.sha256(bytes(len(DATA))).hexdigest(), error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin")))
    assert len(server.requests) == 2 and not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(("fault", "named"), [("more", ("300,000",)), ("gzip", ())])
def test_other_bytes_than_asked_for_are_refused(server: Loopback, tmp_path: Path, fault: str,
                                                named: tuple[str, ...]) -> None:
    server.faults["/a.bin"] = [fault] * 9
    with refused("a.bin", *named, error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin")))
    get(wanted(tmp_path, server.url("/a.bin"), server.url("/b.bin")))
    assert only_file(tmp_path) == DATA and server.requests[-1][0] == "/b.bin"


def test_another_size_than_published_is_not_even_fetched(server: Loopback, tmp_path: Path) -> None:
    with refused("a.bin", "300,000", "300,001", error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin"), size=len(DATA) + 1))
    assert not list(tmp_path.iterdir())


# --- Redirects, secrets, disk ----------------------------------------------------------------------------------------


def test_a_redirect_to_another_host_is_followed_and_its_digest_checked(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"redirect:{server.url('/b.bin', host='localhost')}"] * 9
    unknown = wanted(tmp_path, server.url("/a.bin"), digests=(), size=0)
    assert get(unknown).checked == f"sha256:{SHA256}"  # the digest that the redirecting answer announced
    (tmp_path / "a.bin").unlink()
    server.files["/b.bin"] = bytes(len(DATA))
    with refused("a.bin", SHA256, error=TransferError):
        get(unknown)


def test_a_redirect_carries_no_credentials_to_another_host(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"redirect:{server.url('/b.bin', host='localhost')}"]
    get(wanted(tmp_path, server.url("/a.bin").replace("http://", "http://user:word@")))
    (_, first), (_, second) = server.requests
    assert first["authorization"].startswith("Basic ") and "authorization" not in second


def test_secrets_are_nowhere(server: Loopback, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key = "s3cret key/7"
    url = server.url("/a.bin?key=s3cret%20key%2F7")
    server.faults["/a.bin"] = [f"cut:{CHUNK}", "cut:0", "cut:0"]
    with pytest.raises(TransferError) as error:
        get(wanted(tmp_path, url, secrets=(key,)), failures=1)
    output = capfd.readouterr()
    written = "".join(path.read_text("latin-1") for path in tmp_path.glob("*.json"))
    assert "***" in written
    for text in (str(error.value), output.out, output.err, written):
        assert "s3cret" not in text


def test_a_proxy_of_the_environment_is_used(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url())
    monkeypatch.setenv("no_proxy", "")
    server.files["http://data.invalid/a.bin"] = DATA
    get(wanted(tmp_path, "http://data.invalid/a.bin"))
    assert only_file(tmp_path) == DATA


def test_a_full_disk_keeps_what_has_arrived(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        if os.fstat(handle).st_size == len(DATA):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        get(wanted(tmp_path, server.url("/a.bin")))
    assert (tmp_path / "a.bin.part").stat().st_size == len(DATA)


# --- Several at once -------------------------------------------------------------------------------------------------


def test_of_several_that_want_a_file_one_fetches_it(server: Loopback, tmp_path: Path) -> None:
    server.slow_s = 0.02
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: get(wanted(tmp_path, server.url("/a.bin"))), range(4)))
    assert {fetched.sha256 for fetched in found} == {SHA256} and len(server.requests) == 1
    assert only_file(tmp_path) == DATA


@pytest.mark.timed
def test_another_process_is_waited_for_and_the_wait_is_told_once(server: Loopback, tmp_path: Path) -> None:
    code = ("import pathlib, sys; from trimodal import files\n"
            f"with files.locked(pathlib.Path({str(tmp_path / 'a.bin')!r})):\n"
            "    print('held', flush=True)\n    sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        told: list[str] = []

        class Listening(Progress):
            """Lets the holder go some rounds of waiting after it has heard of it."""

            def say(self, text: str, stream: object = None) -> None:
                told.append(text)
                assert process.stdin
                threading.Timer(0.5, process.stdin.close).start()

        assert process.stdout and process.stdout.readline() == "held\n"
        get(wanted(tmp_path, server.url("/a.bin")), progress=Listening())
        assert process.wait() == 0
    (line,) = told
    assert_names(line, "a.bin")
    assert only_file(tmp_path) == DATA


def test_the_lock_of_a_killed_process_is_no_obstacle(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "a.bin.lock").touch()
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA


def test_a_pause_ends_when_the_transfer_is_stopped() -> None:
    policy = Policy()
    stopping = threading.Timer(0.05, policy.stop.set)
    stopping.start()
    with pytest.raises(http.Stopped):
        policy.pause(600)
    stopping.join()


def test_a_disk_without_locks_is_no_obstacle(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(handle: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA


def test_a_transfer_that_is_stopped_keeps_what_arrived(server: Loopback, tmp_path: Path) -> None:
    server.faults["/a.bin"] = [f"stall:{2 * CHUNK}"]
    patience, part = Patience().policy, tmp_path / "a.bin.part"

    def stop() -> None:
        wait_for(lambda: part.exists() and part.stat().st_size == 2 * CHUNK)
        patience.stop.set()
        server.stop_stalling.set()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(http.Stopped):
        fetch(wanted(tmp_path, server.url("/a.bin")), patience)
    thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin.part", "a.bin.part.json"}
    get(wanted(tmp_path, server.url("/a.bin")))
    assert only_file(tmp_path) == DATA and server.ranges("/a.bin") == ["", f"bytes={2 * CHUNK}-"]
