"""One display: a line for each file and one for all, with bytes, rate and time left; and nothing where nobody looks."""

import hashlib
import io
import re
import threading
from pathlib import Path

import pytest

from tests.loopback import Loopback
from trimodal.download import arrivals, transfer
from trimodal.download.progress import Progress
from trimodal.download.transfer import Policy, Wanted


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
            threads = [threading.Thread(target=transfer.fetch, args=(Wanted(
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


def test_bytes_that_were_there_count_and_are_no_speed() -> None:
    progress = Progress(Terminal())
    with progress.overall("all", 1000) as everything, progress.bar("a", 1000, transfer=True) as bar:
        bar.move_to(900, arrived=False)
        assert bar.shown == everything.shown == (900, 900)
        bar.move_to(950)
        assert bar.shown == everything.shown == (950, 900)
        bar.move_to(0)  # a wrong digest: all of it again
        assert everything.shown[0] == 0


def test_bytes_that_were_there_are_drawn_now_and_then() -> None:
    for interval_s, most in ((3600, 10), (0, 2000)):
        terminal = Terminal()
        with Progress(terminal, interval_s).bar("a", 100_000, transfer=True) as bar:
            for position in range(1000):
                bar.move_to(position, arrived=False)
            bar.move_to(50_000, arrived=False)
            assert len(lines(terminal)) < most and bar.shown == (50_000, 50_000)
            assert interval_s or "50.0k/100k" in lines(terminal)[-1]


def test_a_file_that_is_there_already_counts_in_the_line_of_all(tmp_path: Path) -> None:
    progress = Progress(Terminal())
    (tmp_path / "a").write_bytes(b"1234")
    sha256 = hashlib.sha256(b"1234").hexdigest()
    with progress.overall("all", 4) as everything:
        transfer.fetch(Wanted(path=tmp_path / "a", urls=(), sha256=sha256), Policy(progress=progress))
        assert everything.shown == (4, 4)


def test_what_a_part_holds_is_shown_while_it_is_read_and_is_no_speed(tmp_path: Path) -> None:
    progress = Progress(Terminal())
    with Loopback({"/a": bytes(10)}) as server, progress.overall("all", 10) as everything:
        arrivals.write_note(tmp_path / "a", server.url("/a"), {})
        arrivals.part_of(tmp_path / "a").write_bytes(bytes(4))
        transfer.fetch(Wanted(path=tmp_path / "a", urls=(server.url("/a"),), size=10,
                              sha256=hashlib.sha256(bytes(10)).hexdigest()), Policy(progress=progress))
        assert everything.shown == (10, 4)


def test_a_transfer_that_ends_late_adds_nothing_to_the_next_line() -> None:
    progress = Progress(Terminal())
    with progress.overall("first", 10):
        late = progress.bar("a", 10, transfer=True)
        bar = late.__enter__()
    with progress.overall("second", 10) as everything:
        bar.add(5)
        assert everything.shown == (0, 0)
        late.__exit__(None, None, None)


def test_notes_go_through_the_display(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    Progress().say("a note", sys.stdout)
    Progress().say("a warning")
    assert capsys.readouterr() == ("a note\n", "a warning\n")
