"""Files appear whole or not at all, and survive a power cut once they are there."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.project import ROOT
from trimodal import checkpoint
from trimodal.files import BESIDE, back_up, hold_lock, is_set_aside, locked, remove_left, replace_with_backup, replacing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs and renames in their order, each with the name of what it is about; all are really done."""
    seen: list[tuple[str, str]] = []

    def recorded(name: str, about: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*given: Any) -> Any:
            seen.append((name, about(*given)))
            return real(*given)

        monkeypatch.setattr(os, name, call)

    recorded("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    recorded("replace", lambda source, target: Path(target).name)
    return seen


def write_text(path: Path) -> None:
    with replacing(path, "w") as file:
        file.write("all of it")


@pytest.mark.durable
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are asked of /proc")
@pytest.mark.parametrize("write", [write_text, lambda path: checkpoint.save({"a": 1}, path)], ids=["text", "weights"])
def test_bytes_are_synced_before_the_rename_and_the_folder_after_it(
        tmp_path: Path, calls: list[tuple[str, str]], write: Callable[[Path], None]) -> None:
    write(tmp_path / "kept")
    [(first, temporary), *rest] = calls
    assert first == "fsync" and temporary.startswith("kept.") and temporary.endswith(BESIDE)
    assert rest == [("replace", "kept"), ("fsync", tmp_path.name)]


def test_a_block_that_fails_leaves_the_file_of_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_text(path)
    with pytest.raises(KeyError), replacing(path, "w") as file:
        file.write("half of")
        raise KeyError
    assert path.read_text("utf-8") == "all of it" and list(tmp_path.iterdir()) == [path]


def put(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    """Name -> text; what had to make way stands under the name that it had, with a star for each."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.partition(".before_")[0] if is_set_aside(path.name) else path.name
        while name in found or (is_set_aside(path.name) and not name.endswith("*")):
            name += "*"
        found[name] = path.read_text("utf-8")
    return found


@pytest.mark.parametrize("links", [True, False], ids=["links", "a disk without links"])
def test_what_differs_gets_a_second_name_each_time_another(tmp_path: Path, links: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object, **more: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    told: list[Path] = []
    place = put(tmp_path / "list.csv", "one")
    for text in ("two", "three", "three"):  # within one second; the last one is there already
        replace_with_backup(put(tmp_path / "new", text), place, announce=told.append)
    assert contents(tmp_path) == {"list.csv": "three", "list.csv*": "one", "list.csv**": "two"}
    assert [path.read_text("utf-8") for path in told] == ["one", "two"]


@pytest.mark.parametrize(("there", "may_overwrite", "left"), [("", False, {"a": "new"}), ("old", True, {"a": "new"}),
                                                     ("old", False, {"a": "new", "a*": "old"})])
def test_what_is_empty_or_ours_is_replaced(tmp_path: Path, there: str, may_overwrite: bool,
                                           left: dict[str, str]) -> None:
    replace_with_backup(put(tmp_path / "b", "new"), put(tmp_path / "a", there), may_overwrite=lambda: may_overwrite)
    assert contents(tmp_path) == left


def test_a_second_name_that_a_killed_process_gave_is_enough(tmp_path: Path) -> None:
    first = back_up(put(tmp_path / "a", "of the user"))
    assert back_up(tmp_path / "a") == first
    replace_with_backup(put(tmp_path / "b", "new"), tmp_path / "a")
    assert contents(tmp_path) == {"a": "new", "a*": "of the user"}


def test_a_folder_is_no_file_to_make_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_with_backup(put(tmp_path / "b", "new"), tmp_path / "a")
    assert (tmp_path / "a").is_dir() and (tmp_path / "b").exists()


def test_only_what_replacing_left_is_removed(tmp_path: Path) -> None:
    own = ["a.csv", "a.csv.old.tmp", "a.csv.tmp", "xa.csv.7.tmp", "a.csv.7.tmp.txt"]
    for name in [*own, f"a.csv.7{BESIDE}"]:
        put(tmp_path / name, "x")
    remove_left(tmp_path, "a[.]csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(own)


def test_a_file_of_the_name_of_a_lock_stays(tmp_path: Path) -> None:
    put(tmp_path / "a.lock", "of the user")
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass
    assert contents(tmp_path) == {"a.lock": "of the user"}


HOLDER = """
import os, pathlib, sys, time
from trimodal.files import hold_lock
lock = hold_lock(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.timed
def test_a_lock_goes_with_its_process_and_children_do_not_hold_it(tmp_path: Path) -> None:
    place = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError):
                hold_lock(place)
            said: list[str] = []
            holder.kill()  # its child lives on
            lock = hold_lock(place, lambda: said.append("waiting"))
            assert lock and lock.is_locked and len(said) <= 1
            lock.release()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_threads_exclude_each_other_where_a_file_is_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), pytest.raises(BlockingIOError), locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
