"""What has a file's name while it arrives, or the names of our notes, and is the user's: it stays, byte by byte."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.download.test_http import CHUNK, DATA, get, only_file, wanted, with_one_aside
from tests.loopback import Loopback
from tests.refusals import refused
from trimodal.download import notes
from trimodal.download.http import TransferError


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback({"/a.bin": DATA}) as loopback:
        yield loopback


@pytest.mark.parametrize("fault", ["404", "cut:1000", "page", "other"])
def test_a_wrong_file_stays_until_the_right_one_is_whole(server: Loopback, tmp_path: Path, fault: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"of the user")
    server.faults["/a.bin"] = [fault] * 9
    with refused("a.bin", tmp_path / "a.bin", error=TransferError):
        get(wanted(tmp_path, server.url("/a.bin")), failures=1)
    assert (tmp_path / "a.bin").read_bytes() == b"of the user"
    server.faults.clear()
    get(wanted(tmp_path, server.url("/a.bin")))
    assert with_one_aside(tmp_path) == (DATA, b"of the user")


@pytest.mark.parametrize("target", ["elsewhere/own", "elsewhere/gone"])
def test_a_link_is_kept_as_a_link_and_what_it_leads_to_as_it_is(server: Loopback, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/own").write_bytes(b"of the user")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin").symlink_to(tmp_path / target)
    get(wanted(tmp_path / "set", server.url("/a.bin")))
    (kept,) = (path for path in (tmp_path / "set").iterdir() if path.name != "a.bin")
    assert not (tmp_path / "set/a.bin").is_symlink() and (tmp_path / "set/a.bin").read_bytes() == DATA
    assert kept.readlink() == tmp_path / target
    assert [path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()] == [b"of the user"]


@pytest.mark.parametrize("names", [("a.bin.part",), ("a.bin.part.json",), ("a.bin.part", "a.bin.part.json"),
                                   ("a.bin.lock",), ("a.bin.part", "a.bin.2.part"), ("a.bin.part.json.7.tmp.txt",)])
def test_files_of_the_user_with_names_like_ours_stay(server: Loopback, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b'{"own": 1}')
    server.faults["/a.bin"] = [f"cut:{CHUNK}", "other", f"cut:{CHUNK}"]
    get(wanted(tmp_path, server.url("/a.bin")), failures=9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.bin": DATA, **dict.fromkeys(names, b'{"own": 1}')}


def test_what_this_command_put_there_is_replaced(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"an older release")
    ours = hashlib.sha256(b"an older release").hexdigest()
    get(wanted(tmp_path, server.url("/a.bin"), replaces=ours))
    assert only_file(tmp_path) == DATA


def archive(folder: Path, server: Loopback) -> Path:
    """One that came by a download."""
    get(wanted(folder, server.url("/a.bin"), keep_note=True))
    return folder / "a.bin"


def test_an_archive_that_came_goes_with_all_that_lies_beside_it(server: Loopback, tmp_path: Path) -> None:
    path = archive(tmp_path, server)
    for name in ("a.bin.part", "a.bin.lock", "a.bin.part.json.77.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "a.bin.own").touch()
    assert notes.whole_sha256(path) == hashlib.sha256(DATA).hexdigest()
    assert notes.remove_archive(path) is False
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.own"]


@pytest.mark.parametrize("case", ["placed by the user", "changed", "a link", "to be kept"])
def test_any_other_archive_stays(server: Loopback, tmp_path: Path, case: str) -> None:
    path = archive(tmp_path, server) if case != "placed by the user" else tmp_path / "a.bin"
    if case == "a link":
        path.rename(tmp_path / "own")
        path.symlink_to(tmp_path / "own")
    elif case == "to be kept":
        notes.keep_archive(path)
    else:
        path.write_bytes(b"of the user")
    before = path.read_bytes()
    assert notes.remove_archive(path) is True and path.read_bytes() == before
    assert notes.remove_archive(path) is True and path.is_symlink() == (case == "a link")


def test_an_equal_file_that_was_there_before_is_not_ours(server: Loopback, tmp_path: Path) -> None:
    """Nothing can tell before it has come once more, where no digest is published."""
    (tmp_path / "a.bin").write_bytes(DATA)
    get(wanted(tmp_path, server.url("/a.bin"), digests=(), size=0, keep_note=True))
    assert notes.remove_archive(tmp_path / "a.bin") is True and only_file(tmp_path) == DATA
