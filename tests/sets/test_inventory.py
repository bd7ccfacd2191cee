"""Markers and lists of contents: they must notice what is not there, and never claim what was not finished."""

import os
from pathlib import Path
from typing import Any

import pytest

from trimodal.sets import inventory

NAMES = (" a.wav", "sub/é.wav", "sub/b.txt", "sub/deeper/c.wav", "z")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*NAMES, ".hidden/x.wav", "sub/._é.wav", "._z", ".DS_Store"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "set"


def contents(folder: Path) -> Path:
    path = inventory.contents_path(folder, "dataset/archive.zip")
    path.unlink(missing_ok=True)
    with inventory.Listing(path, {"sha256": ["x"]}) as listing:
        for name, size in inventory.tree(folder):
            listing.add(name, size, 7)
        assert not path.exists(), "there only when it is whole"
        listing.finish()
    return path


def test_a_list_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), inventory.Listing(tmp_path / "lists/x", {}) as listing:
        listing.add("a", 1, None)
        raise KeyboardInterrupt
    assert list((tmp_path / "lists").iterdir()) == []


def test_entries_come_back_in_their_order(folder: Path) -> None:
    assert list(inventory.entries(contents(folder))) == [
        (name, len(name.encode()), 7) for name in (" a.wav", "z", "sub/b.txt", "sub/é.wav", "sub/deeper/c.wav")]
    assert list(inventory.entries(folder / "absent")) == []


def test_folders_that_alternate_in_a_list_are_each_looked_at(folder: Path) -> None:
    path = inventory.contents_path(folder, "mixed")
    with inventory.Listing(path, {}) as listing:
        for name in ("sub/b.txt", "z", "sub/absent", " a.wav", "sub/é.wav"):
            listing.add(name, 1, None)
        listing.finish()
    assert list(inventory.missing(folder, path, sizes=False)) == ["sub/absent"]


def test_tree_and_count_leave_out_what_is_hidden(folder: Path) -> None:
    assert {name for name, _ in inventory.tree(folder)} == set(NAMES)
    assert dict(inventory.tree(folder, ".wav"))["sub/é.wav"] == len("sub/é.wav".encode())
    assert [inventory.count(folder, suffix) for suffix in ("", ".wav", ".no")] == [5, 3, 0]
    assert inventory.count(folder / "absent", "") == 0


def test_record_comes_back_with_its_numbers(folder: Path) -> None:
    size = sum(len(name.encode()) for name in NAMES)
    assert inventory.read_record(contents(folder)) == {"sha256": ["x"], "files": 5, "bytes": size}
    assert inventory.read_record(folder / "absent") == {}


def test_nothing_is_missing_when_all_is_there(folder: Path) -> None:
    for sizes in (True, False):
        assert list(inventory.missing(folder, contents(folder), sizes=sizes)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    path = contents(folder)
    (folder / name).unlink()
    for sizes in (True, False):
        assert list(inventory.missing(folder, path, sizes=sizes)) == [name]


def test_another_size_is_seen_by_the_thorough_check_only(folder: Path) -> None:
    path = contents(folder)
    (folder / "z").write_text("longer")
    assert list(inventory.missing(folder, path, sizes=True)) == ["z"]
    assert list(inventory.missing(folder, path, sizes=False)) == []


def test_a_missing_folder_is_all_its_files(folder: Path) -> None:
    path = contents(folder)
    assert len(list(inventory.missing(folder / "elsewhere", path, sizes=False))) == 5


@pytest.mark.parametrize("damage", [b"", b"not gzip"])
def test_a_damaged_list_vouches_for_nothing(folder: Path, damage: bytes) -> None:
    path = contents(folder)
    path.write_bytes(damage)
    assert list(inventory.missing(folder, path, sizes=False)) == [path.name]


def test_marker_is_written_whole_and_read_back(folder: Path) -> None:
    marker: dict[str, Any] = {"items": {"a": {"bytes": 1}}, "complete": True, "title": "é"}
    inventory.write_marker(folder, marker)
    assert inventory.read_marker(folder) == marker
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"items": 3}'])
def test_a_damaged_marker_counts_as_none(folder: Path, text: str) -> None:
    (folder / inventory.MARKER).write_text(text)
    assert inventory.read_marker(folder) == {}
    assert inventory.read_marker(folder / "absent") == {}


def test_a_list_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    folder, replace = tmp_path.stat().st_ino, os.replace

    def sync(file: int) -> None:
        order.append("sync folder" if os.fstat(file).st_ino == folder else "sync file")

    def rename(one: Path, other: Path) -> None:
        order.append("rename")
        replace(one, other)

    monkeypatch.setattr("os.fsync", sync)
    monkeypatch.setattr("os.replace", rename)
    with inventory.Listing(tmp_path / "a.gz", {}) as listing:
        listing.finish()
    assert order == ["sync file", "rename", "sync folder"]


def test_a_link_that_leads_nowhere_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").symlink_to(tmp_path / "gone")
    assert list(inventory.tree(tmp_path)) == [("a.wav", 0)]


def test_a_link_that_leads_up_is_not_followed(folder: Path) -> None:
    (folder / "sub/again").symlink_to(folder, target_is_directory=True)
    (folder / "sub/here").symlink_to(".", target_is_directory=True)
    (folder / "other").symlink_to(folder / "sub/deeper", target_is_directory=True)
    assert {name for name, _ in inventory.tree(folder)} == {*NAMES, "other/c.wav"}


def test_a_link_that_leads_nowhere_hides_no_neighbours(folder: Path) -> None:
    path = contents(folder)
    (folder / "sub/of the user").symlink_to(folder / "gone")
    assert list(inventory.missing(folder, path, sizes=True)) == []
    (folder / "sub/b.txt").unlink()
    (folder / "sub/b.txt").symlink_to(folder / "gone")
    assert list(inventory.missing(folder, path, sizes=True)) == ["sub/b.txt"]
