"""What is found in a folder: by suffix, through links but not in circles, and what cannot be read is named."""

import os
from pathlib import Path

import pytest

from tests.refusals import refused
from trimodal.search import walk
from trimodal.search.walk import Found, Skipped, digests, find


def files(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(name.encode())
    return place


def paths(found: Found) -> list[str]:
    return [file.path for file in found.files]


def test_files_are_known_by_their_suffix_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    place = files(tmp_path / "photos", "b.JPG", "a/c.wav", "a/d.mp4", "a/notes.txt", ".hidden.png", ".git/x.png")
    found = find(place)
    assert paths(found) == ["a/c.wav", "a/d.mp4", "b.JPG"]
    assert [file.sort for file in found.files] == ["sounds", "videos", "pictures"]
    assert (found.num_others, found.skipped, found.unread) == (1, [], [])


def test_what_matches_a_pattern_is_left_out(tmp_path: Path) -> None:
    place = files(tmp_path / "photos", "a.png", "a.gif", "old/b.png", "sub/old/c.png", "sub/d.png", "sub/e_small.png")
    assert paths(find(place, ["*.gif", "old", "*_small.*"])) == ["a.png", "sub/d.png"]
    assert paths(find(place, ["old/*", "sub/d.png"])) == ["a.gif", "a.png", "sub/e_small.png", "sub/old/c.png"]
    with refused(place):
        find(place, ["*"])


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    place = files(tmp_path / "photos", "z/own.png")
    other = files(tmp_path / "elsewhere", "far.png", "deep/far.wav")
    (place / "a_link_within").symlink_to(place / "z")
    (place / "far").symlink_to(other)
    (place / "far_again").symlink_to(other)
    (other / "back_and_forth").symlink_to(other / "deep")
    (place / "one.png").symlink_to(other / "far.png")
    assert paths(find(place)) == ["far/deep/far.wav", "far/far.png", "one.png", "z/own.png"]


def test_circles_and_links_to_what_is_around_are_not_followed(tmp_path: Path) -> None:
    place = files(tmp_path / "photos", "sub/own.png")
    (place / "sub" / "up").symlink_to(place)
    (place / "root").symlink_to("/")
    (place / "itself.png").symlink_to(place / "itself.png")
    (place / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (place / "nowhere").symlink_to(tmp_path / "gone")
    found = find(place)
    assert paths(found) == ["sub/own.png"]
    assert [path for path, _ in found.skipped] == ["itself.png", "nowhere.png", "root", "sub/up"]
    assert not found.may_hold("root/x.png"), "its absence is known"


def test_what_cannot_be_listed_or_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = files(tmp_path / "photos", "own.png", "closed/in.png")
    os.mkfifo(place / "pipe.wav")
    listing = os.scandir

    def scandir(path: str | Path) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(walk.os, "scandir", scandir)  # root, who may run this, is denied nothing
    found = find(place)
    assert paths(found) == ["own.png"]
    assert [path for path, _ in found.skipped] == ["closed", "pipe.wav"]
    assert found.may_hold("closed/in.png") and not found.may_hold("closed2/in.png")


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    (place / os.fsdecode(b"caf\xe9 \xe4\xbd\xa0.png")).write_bytes(b"x")
    assert [os.fsencode(path) for path in paths(find(place))] == [b"caf\xe9 \xe4\xbd\xa0.png"]


def test_a_folder_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "empty/notes.txt", "file.png")
    with refused(tmp_path / "gone"):
        find(tmp_path / "gone")
    with refused(tmp_path / "file.png"):
        find(tmp_path / "file.png")
    with refused(tmp_path / "empty", 1):
        find(tmp_path / "empty")


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = files(tmp_path / "photos", *(f"{n:03}.png" for n in range(300)))
    found = find(place)
    whole = walk.sha256_of

    def read(path: Path) -> str:
        if path.name == "100.png":
            path.write_bytes(b"another")
        if path.name == "101.png":
            path.unlink()
        return whole(path)

    monkeypatch.setattr(walk, "sha256_of", read)
    results = list(digests(place, found.files))
    assert len(results) == 300 and len(set(results)) == 300
    assert [one.path for one in results if isinstance(one, Skipped)] == ["100.png", "101.png"]
