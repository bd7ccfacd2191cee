"""Work in several threads, and its display: a line for each file and one for all, with bytes, rate and time left."""

import hashlib
import io
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.loopback import Loopback
from tests.project import ROOT
from trimodal.download import http, notes
from trimodal.download.http import Policy, Wanted
from trimodal.download.progress import Progress, in_threads


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(terminal: io.StringIO) -> list[str]:
    """All that stood in any line at any time."""
    return [line.strip() for line in re.split(r"\r|\n|\x1b\[A", terminal.getvalue()) if line.strip()]


def fetch_two(folder: Path, stream: io.StringIO) -> None:
    with Loopback({f"/{name}": bytes(400_000) for name in "ab"}) as server:
        progress = Progress(stream, interval_s=0)
        policy = Policy(progress=progress)
        with progress.overall("the set", 800_000):
            threads = [threading.Thread(target=http.fetch, args=(Wanted(
                path=folder / name, urls=(server.url(f"/{name}"),), size=400_000), policy)) for name in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def test_each_file_and_all_of_them_have_a_line_with_bytes_rate_and_time_left(tmp_path: Path) -> None:
    terminal = Terminal()
    fetch_two(tmp_path, terminal)
    for title, total in (("a", "400k"), ("b", "400k"), ("the set", "800k")):
        told = [line for line in lines(terminal) if line.startswith(f"{title}:")]
        assert any(re.search(rf"{total} \[\d\d:\d\d<\d\d:\d\d, *[\d.]+[kM]B/s\]", line) for line in told), told
    assert any("800k/800k" in line for line in lines(terminal)), "adds up both"


def test_nothing_is_written_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    fetch_two(tmp_path, stream)
    assert stream.getvalue() == ""


def test_bytes_that_were_there_are_not_to_come() -> None:
    terminal = Terminal()
    progress = Progress(terminal, interval_s=0)
    with progress.overall("all", 1000), progress.bar("a", 1000, 900, transfer=True) as bar:
        bar.add(50)
        bar.restart()  # a wrong digest: all of it again
        bar.add(1000)
    shown = lines(terminal)
    assert any(line.startswith("a:") and "900/1.00k" in line for line in shown)


def last_of_all(terminal: io.StringIO) -> str:
    return [line for line in lines(terminal) if line.startswith("all:")][-1]


@pytest.mark.parametrize("part", [False, True])
def test_what_is_there_already_makes_less_to_come(tmp_path: Path, part: bool) -> None:
    """The whole file, or a part of it."""
    terminal = Terminal()
    progress = Progress(terminal, interval_s=0)
    digests = (f"sha256:{hashlib.sha256(bytes(10)).hexdigest()}",)
    if part:
        notes.write(tmp_path / "a", {"url": "http://x"})
    (notes.part_of(tmp_path / "a") if part else tmp_path / "a").write_bytes(bytes(4 if part else 10))
    with Loopback({"/a": bytes(10), "/b": bytes(10)}) as server, progress.overall("all", 20):
        for name in "ab":
            http.fetch(Wanted(path=tmp_path / name, urls=(server.url(f"/{name}"),), size=10, digests=digests),
                       Policy(progress=progress))
    assert ("16.0/16.0" if part else "10.0/10.0") in last_of_all(terminal)


def test_a_transfer_that_ends_late_adds_nothing_to_the_next_line() -> None:
    terminal = Terminal()
    progress = Progress(terminal, interval_s=0)
    with progress.overall("first", 10):
        late = progress.bar("a", 10, transfer=True)
        bar = late.__enter__()
    with progress.overall("all", 10):
        bar.add(5)
        late.__exit__(None, None, None)
    assert "5.00/10.0" not in last_of_all(terminal)


def test_notes_go_through_the_display(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("a note", sys.stdout)
    Progress().say("a warning")
    assert capsys.readouterr() == ("a note\n", "a warning\n")


# --- Several threads -------------------------------------------------------------------------------------------------


def test_results_and_errors_come_with_their_keys() -> None:
    found = dict(in_threads(((n, partial(divmod, 12, n)) for n in range(4)), 2))
    assert [found[n].result()[0] for n in (1, 2, 3)] == [12, 6, 4]
    assert isinstance(found[0].exception(), ZeroDivisionError) and list(in_threads([], 3)) == []


def test_tasks_are_begun_only_where_there_is_room_and_before_a_result_is_looked_at() -> None:
    begun = [threading.Event() for _ in range(100)]
    ended = in_threads(((n, begun[n].set) for n in range(100)), 2)
    for count, _ in zip(range(1, 6), ended, strict=False):
        assert all(event.wait(60) for event in begun[:count + 2]) and not begun[count + 2].is_set()


def test_a_call_that_hangs_does_not_keep_the_program_from_ending() -> None:
    code = ("import time; from trimodal.download.progress import in_threads\n"
            "for _ in in_threads([(1, lambda: time.sleep(10**6)), (2, lambda: 5)], 2): break")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)
