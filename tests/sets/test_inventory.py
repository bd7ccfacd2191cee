"""The files of a set on the disk, and its marker."""

from pathlib import Path

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


def test_tree_and_count_leave_out_what_is_hidden(folder: Path) -> None:
    assert {name for name, _ in inventory.tree(folder)} == set(NAMES)
    assert dict(inventory.tree(folder, ".wav"))["sub/é.wav"] == len("sub/é.wav".encode())
    assert [inventory.count(folder, suffix) for suffix in ("", ".wav", ".no")] == [5, 3, 0]
    assert inventory.count(folder / "absent", "") == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"items": 3}'])
def test_a_damaged_marker_counts_as_none(folder: Path, text: str) -> None:
    (folder / inventory.MARKER).write_text(text)
    assert inventory.read_marker(folder) == {}
    assert inventory.read_marker(folder / "absent") == {}


def test_a_link_that_leads_nowhere_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").symlink_to(tmp_path / "gone")
    assert list(inventory.tree(tmp_path)) == [("a.wav", 0)]


def test_a_link_that_leads_up_is_not_followed(folder: Path) -> None:
    (folder / "sub/again").symlink_to(folder, target_is_directory=True)
    (folder / "sub/here").symlink_to(".", target_is_directory=True)
    (folder / "other").symlink_to(folder / "sub/deeper", target_is_directory=True)
    assert {name for name, _ in inventory.tree(folder)} == {*NAMES, "other/c.wav"}


