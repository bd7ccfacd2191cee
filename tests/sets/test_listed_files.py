"""A name in a list leads to its file however another system wrote it; what was taken for what is counted."""

import os
import unicodedata
from pathlib import Path

import pytest

from tests.refusals import assert_names, refused
from trimodal.sets import listed_files
from trimodal.sets.listed_files import SHOWN, Files


def files_of(folder: Path, *names: str) -> Files:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return Files(folder, os.path.join(os.path.realpath(folder), ""))


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(("there", "named", "told"), [
    (nfd("été/photo à 1.png"), nfc("été/photo à 1.png"), "Unicode"),
    (nfc("été/photo à 1.png"), nfd("été/photo à 1.png"), "Unicode"),
    (nfd("é/") + nfc("é.png"), nfc("é/é.png"), "Unicode"),
    (nfd("가/나.png"), nfc("가/나.png"), "Unicode"),
    ("p/0.png", "p\\0.png", "backslashes"), ("p/q/0.png", ".\\p\\q\\0.png", "backslashes"),
    (nfd("p/é.png"), nfc("p\\é.png"), "Unicode"),
    ("p/0.png", " p/0.png ", "blanks"), ("p/0.png", " p\\0.png", "backslashes"),
])
def test_a_name_written_otherwise_is_found_and_told(tmp_path: Path, there: str, named: str, told: str) -> None:
    files = files_of(tmp_path, there, "p/other.png")
    found = files.find(named, "line 2: image")
    assert Path(found.path).read_bytes() == os.fsencode(there) and not files.missing
    assert found.number == files.find(there, "line 3: image").number, "the same file"
    (line,) = [line for line in files.describe() if told in line]
    assert_names(line, 1, told, repr(named))
    assert any("blanks" in line for line in files.describe()) == (named != named.strip())


def test_names_as_they_are_come_first_and_nothing_is_told(tmp_path: Path) -> None:
    names = [nfc("é.png"), nfd("é.png"), " a.png", "a.png", "p\\0.png", "p/0.png"]
    files = files_of(tmp_path, *names)
    assert [Path(files.find(name, "").path).read_bytes() for name in names] == [os.fsencode(name) for name in names]
    assert files.describe() == [] and len(files.numbers) == len(names)


def test_of_several_none_is_guessed(tmp_path: Path) -> None:
    both = "é" + nfd("é")  # neither NFC nor NFD
    files = files_of(tmp_path, nfc("éé.png"), nfd("éé.png"))
    files.find(both + ".png", "line 2: image")
    assert len(files.missing) == 1
    assert_names(files.shown[0], "line 2", "Unicode")


@pytest.mark.parametrize(("named", "hint"), [
    ("P/A.PNG", ""), ("p/A.png", "'a.png'"), ("q\\none.png", ""), ("p/none.png", "")])
def test_a_missing_file_comes_with_what_may_be_wrong(tmp_path: Path, named: str, hint: str) -> None:
    files = files_of(tmp_path, "p/a.png")
    found = files.find(named, "line 7: image")
    assert files.missing == {found.number} and found.path == os.path.abspath(tmp_path / named)
    assert_names(files.shown[0], "line 7", "image", found.path, *([hint] if hint else []))


def test_a_path_from_the_current_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files_of(tmp_path, "data/a.png")
    monkeypatch.chdir(tmp_path)
    files = files_of(tmp_path / "data")
    files.find("data/a.png", "line 1: image")
    assert_names(files.shown[0], f"start at {tmp_path / 'data'}")


def test_missing_files_are_counted_once_and_the_first_are_shown(tmp_path: Path) -> None:
    files = files_of(tmp_path, "a.png")
    for _ in range(2):
        for i in range(5):
            files.find(f"{i}.png", f"line {i}: image")
    files.find("a.png", "line 9: image")
    assert len(files.missing) == 5 and len(files.numbers) == 6
    assert len(files.shown) == SHOWN and "line 0" in files.shown[0]


def test_a_name_is_looked_for_once_however_many_lines_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of one caption a line; links among the files and folders lead where they lead."""
    files_of(tmp_path, "elsewhere/a.png")
    files = files_of(tmp_path / "mine", "p/a.png", "p/b.png")
    (tmp_path / "mine/p/link.png").symlink_to("a.png")
    (tmp_path / "mine/q").symlink_to("p")
    (tmp_path / "mine/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/p/out.png").symlink_to(tmp_path / "elsewhere/a.png")
    names = ["p/a.png", "p/b.png", "p/link.png", "q/a.png", "q/link.png"]
    first = [files.find(name, "line 1: image") for name in names]
    assert [file.number for file in first] == [0, 1, 0, 0, 0]
    with monkeypatch.context() as patched:
        patched.delattr(listed_files, "_stat")
        assert [files.find(name, "line 2: image") for name in names] == first
    for name in ("out/a.png", "p/out.png") * 2:
        with refused("data.manifest_root=FOLDER", error=ValueError):
            files.find(name, "line 3: image")


def test_no_other_writing_leads_out_of_the_folder(tmp_path: Path) -> None:
    files_of(tmp_path, "secret.png", nfd("é.png"))
    files = files_of(tmp_path / "mine", "a.png")
    for name in ("..\\secret.png", "../" + nfc("é.png"), " ../secret.png", "../none.png"):
        with refused("data.manifest_root=FOLDER", error=ValueError):
            files.find(name, "line 1: image")
    for name, why in (("../mine", "folder"), ("a.png\0", "path")):
        with refused(why, error=ValueError):
            files.find(name, "line 1: image")
