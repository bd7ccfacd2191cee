"""Markers and lists of contents: they must notice what is not there, and never claim what was not finished."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sets.test_inventory import NAMES, folder
from trimodal.download import state
from trimodal.sets import inventory

__all__ = ["folder"]  # a fixture


def contents(folder: Path) -> Path:
    state.write_contents(folder, "dataset/archive.zip", ((name, size, 7) for name, size in inventory.tree(folder)),
                         {"sha256": ["x"]})
    return state.contents_path(folder, "dataset/archive.zip")


def test_a_list_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, int, None]]:
        yield "a", 1, None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.write_contents(tmp_path, "x", interrupted(), {})
    assert list((tmp_path / state.CONTENTS).iterdir()) == []


def test_entries_come_back_in_their_order(folder: Path) -> None:
    assert list(state.entries(contents(folder))) == [
        (name, len(name.encode()), 7) for name in (" a.wav", "z", "sub/b.txt", "sub/é.wav", "sub/deeper/c.wav")]
    assert list(state.entries(folder / "absent")) == []


def test_folders_that_alternate_in_a_list_are_each_looked_at(folder: Path) -> None:
    names = ("sub/b.txt", "z", "sub/absent", " a.wav", "sub/é.wav")
    state.write_contents(folder, "mixed", ((name, 1, None) for name in names), {})
    assert list(state.missing(folder, state.contents_path(folder, "mixed"), sizes=False)) == ["sub/absent"]


def test_record_comes_back_with_its_numbers(folder: Path) -> None:
    size = sum(len(name.encode()) for name in NAMES)
    assert state.read_record(contents(folder)) == {"sha256": ["x"], "files": 5, "bytes": size}
    assert state.read_record(folder / "absent") == {}


def test_nothing_is_missing_when_all_is_there(folder: Path) -> None:
    for sizes in (True, False):
        assert list(state.missing(folder, contents(folder), sizes=sizes)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    path = contents(folder)
    (folder / name).unlink()
    for sizes in (True, False):
        assert list(state.missing(folder, path, sizes=sizes)) == [name]


def test_another_size_is_seen_by_the_thorough_check_only(folder: Path) -> None:
    path = contents(folder)
    (folder / "z").write_text("longer")
    assert list(state.missing(folder, path, sizes=True)) == ["z"]
    assert list(state.missing(folder, path, sizes=False)) == []


def test_a_missing_folder_is_all_its_files(folder: Path) -> None:
    path = contents(folder)
    assert len(list(state.missing(folder / "elsewhere", path, sizes=False))) == 5


@pytest.mark.parametrize("damage", [b"", b"not gzip"])
def test_a_damaged_list_vouches_for_nothing(folder: Path, damage: bytes) -> None:
    path = contents(folder)
    path.write_bytes(damage)
    assert list(state.missing(folder, path, sizes=False)) == [path.name]


def test_marker_is_written_whole_and_read_back(folder: Path) -> None:
    marker: dict[str, Any] = {"items": {"a": {"bytes": 1}}, "complete": True, "title": "é"}
    state.write_marker(folder, marker)
    assert inventory.read_marker(folder) == marker
    assert not list(folder.glob("*.new"))


def test_a_list_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    (tmp_path / state.CONTENTS).mkdir()
    folder, replace = (tmp_path / state.CONTENTS).stat().st_ino, os.replace

    def sync(file: int) -> None:
        order.append("sync folder" if os.fstat(file).st_ino == folder else "sync file")

    def rename(one: Path, other: Path) -> None:
        order.append("rename")
        replace(one, other)

    monkeypatch.setattr("os.fsync", sync)
    monkeypatch.setattr("os.replace", rename)
    state.write_contents(tmp_path, "a", [], {})
    assert order == ["sync file", "rename", "sync folder"]


def test_a_link_that_leads_nowhere_hides_no_neighbours(folder: Path) -> None:
    path = contents(folder)
    (folder / "sub/of the user").symlink_to(folder / "gone")
    assert list(state.missing(folder, path, sizes=True)) == []
    (folder / "sub/b.txt").unlink()
    (folder / "sub/b.txt").symlink_to(folder / "gone")
    assert list(state.missing(folder, path, sizes=True)) == ["sub/b.txt"]
