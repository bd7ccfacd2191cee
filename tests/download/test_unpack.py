"""Unpacking: all there under the right names, or nothing; and nothing ever outside its folder."""

import gc
import io
import lzma
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import packing
from tests.project import ROOT
from tests.refusals import refused
from trimodal.download import unpack as unpack_module
from trimodal.download.members import ArchiveError, Rules, destination, safe_name
from trimodal.download.seven_zip import TOOLS
from trimodal.download.unpack import Expected, Unpacked, Watcher, declared_size, unpack

FILES = {" leading blank.wav": b"one", "sub/naïve 水.txt": b"two" * 999, "sub/deep/x..WAV.wav": b"", "z": bytes(70_000)}
ENOUGH = Expected(files=1000, size=10_000_000)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run(folder: Path, data: bytes, kind: str, expected: Expected = ENOUGH) -> Unpacked:
    """Unpack `data` into folder/out."""
    return unpack([write(folder / "archive", data)], kind, folder / "out", folder / "beside", expected)


def seven_zip(folder: Path, files: dict[str, bytes]) -> bytes:
    for name, data in files.items():
        write(folder / "src" / name, data)
    return packing.seven_zip_of(folder / "src", folder / "made.7z")


def makers(folder: Path) -> dict[str, Callable[[dict[str, bytes]], bytes]]:
    return {"zip": packing.zip_of, "tar": packing.tar_of, "deb": packing.deb_of,
            "7z": lambda files: seven_zip(folder, files)}


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
def test_everything_is_there_under_its_own_name(tmp_path: Path, kind: str) -> None:
    done = run(tmp_path, makers(tmp_path)[kind](FILES), kind)
    assert tree(tmp_path / "out") == FILES
    assert done == Unpacked(files=4, size=sum(map(len, FILES.values())))
    assert not (tmp_path / "beside").exists()


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressions_of_tar(tmp_path: Path, compression: str) -> None:
    run(tmp_path, packing.tar_of(FILES, compression=compression), "tar")
    run(tmp_path, packing.deb_of({"from deb": b"1"}, compression), "deb")
    assert tree(tmp_path / "out") == {**FILES, "from deb": b"1"}


@pytest.mark.parametrize("size", [1, 1000, 10**9])
def test_parts_are_read_as_one_archive(tmp_path: Path, size: int) -> None:
    data = packing.zip_of(FILES)
    starts = list(range(0, len(data), size))[:39]  # one open file a byte would be too many
    parts = [write(tmp_path / f"part{at:05d}", data[at: at + size]) for at in starts]
    parts.insert(1, write(tmp_path / "empty", b""))
    parts.append(write(tmp_path / "rest", data[starts[-1] + size:]))
    unpack(parts, "zip", tmp_path / "out", tmp_path / "beside", ENOUGH)
    assert tree(tmp_path / "out") == FILES


def test_spans_read_like_a_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    first, second = write(tmp_path / "a", b"xx" + data[:300]), write(tmp_path / "b", data)
    spans = unpack_module.Spans([(first, 2, 300), (second, 300, 700)])
    with io.BufferedReader(spans, 64) as file:
        assert file.read() == data
        for start, length in ((0, 10), (295, 10), (990, 100), (300, 1)):
            file.seek(start)
            assert (file.tell(), file.read(length)) == (start, data[start: start + length])
        assert file.seek(-5, os.SEEK_END) == 995 and file.read() == data[995:]


def test_declared_size(tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    for kind, make in makers(tmp_path).items():
        path = write(tmp_path / kind, make(FILES))
        assert declared_size([path], kind) == (size if kind in ("zip", "7z") else 0)


@pytest.mark.parametrize(("name", "rules", "place"), [
    ("a/b", (), "a/b"),
    ("usr/share/stamps/animals/cat.png", (("usr/share/stamps/", ""),), "animals/cat.png"),
    ("usr/share/doc/copyright", (("usr/share/stamps/", ""), ("usr/share/doc/copyright", "COPYRIGHT")), "COPYRIGHT"),
    ("top-1.0/stamps/cat.png", (("*/stamps/", "x"),), "x/cat.png"),
    ("top/more/stamps/cat.png", (("*/stamps/", ""),), None),
    ("stamps", (("stamps/", ""),), None),
    ("usr", (("usr/share/doc/copyright", "COPYRIGHT"),), None),
    ("list.json", (("*/list.json", "l"), ("list.json", "l")), "l"),
    ("list.json/x", (("list.json", "l"),), None),
])
def test_rules_choose_and_place(name: str, rules: Rules, place: str | None) -> None:
    assert destination(name, rules) == place


def test_only_what_the_rules_name_is_written(tmp_path: Path) -> None:
    data = packing.deb_of({"./usr/stamps/a.png": b"a", "./usr/doc/b": b"b"})
    run(tmp_path, data, "deb", Expected(files=9, size=9, rules=(("usr/stamps/", ""),)))
    assert tree(tmp_path / "out") == {"a.png": b"a"}
    with refused("archive", error=ArchiveError):
        run(tmp_path, data, "deb", Expected(files=9, size=9, rules=(("opt/", ""),)))


def test_the_listing_is_shown_before_anything_is_renamed(tmp_path: Path) -> None:
    seen: list[dict[str, bytes]] = []

    def look(folder: Path) -> None:
        seen.append(tree(folder))
        assert not (tmp_path / "out").exists()

    unpack([write(tmp_path / "a", packing.zip_of(FILES))], "zip", tmp_path / "out", tmp_path / "beside", ENOUGH,
           Watcher(staged=look))
    assert seen == [FILES]


# --- Into a folder that is there -------------------------------------------------------------------------------------


def test_two_archives_of_one_folder_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "out/wav/id1/own.txt", b"mine")
    run(tmp_path, packing.zip_of({"wav/id1/a.wav": b"a", "wav/id2/b.wav": b"b"}), "zip")
    run(tmp_path, packing.zip_of({"wav/id1/z.wav": b"z", "wav/id3/c.wav": b"c"}), "zip")
    assert tree(tmp_path / "out") == {"wav/id1/own.txt": b"mine", "wav/id1/a.wav": b"a", "wav/id2/b.wav": b"b",
                                      "wav/id1/z.wav": b"z", "wav/id3/c.wav": b"c"}


def test_a_linked_folder_of_the_user_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/wav").symlink_to(tmp_path / "own")
    with refused(tmp_path / "out/wav"):
        run(tmp_path, packing.zip_of({"wav/a": b"a"}), "zip")
    assert tree(tmp_path / "own") == {}


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    write(tmp_path / "out/a/x", b"")
    with refused(tmp_path / "out/a"):
        run(tmp_path, packing.zip_of({"a": b"a"}), "zip")


# A child that dies by itself before it gives the 100th file its name.
KILLED = """
import itertools, os, pathlib, signal, sys
from trimodal.download import unpack as archives
folder, calls, replace = pathlib.Path(sys.argv[1]), itertools.count(1), os.replace

def counted(*names):
    if next(calls) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = counted
archives.unpack([folder / "a.zip"], "zip", folder / "out", folder / "beside", archives.Expected(files=1000, size=10**8))
"""


def test_killed_in_mid_unpacking_then_run_again(tmp_path: Path) -> None:
    files = {f"folder{i % 7}/file{i:04d}.bin": bytes([i]) * 2_000 for i in range(150)}
    path = write(tmp_path / "a.zip", packing.zip_of(files))
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert len(tree(tmp_path / "beside")) == 99 and not (tmp_path / "out").exists()
    unpack([path], "zip", tmp_path / "out", tmp_path / "beside", ENOUGH)
    assert tree(tmp_path / "out") == files and not (tmp_path / "beside").exists()


def test_what_an_interrupted_unpacking_left_is_not_written_again(tmp_path: Path) -> None:
    """Members with the CRC of the archive stay; those that a power cut spoiled, and missing ones, are made."""
    files = {f"sub/{i}": random.Random(i).randbytes(5_000) for i in range(6)}
    beside = tmp_path / "beside"
    for i, data in ((0, files["sub/0"]), (1, bytes(5_000)), (2, files["sub/2"][:-1])):
        write(beside / f"sub/{i}", data)
    inode = (beside / "sub/0").stat().st_ino
    seen: list[tuple[str, int, int]] = []
    unpack([write(tmp_path / "a", packing.zip_of(files))], "zip", tmp_path / "out", beside, ENOUGH,
           Watcher(file=lambda *entry: seen.append(entry)))
    assert tree(tmp_path / "out") == files and not beside.exists()
    assert (tmp_path / "out/sub/0").stat().st_ino == inode and (tmp_path / "out/sub/1").stat().st_ino != inode
    assert seen == [(name, 5_000, zlib.crc32(data)) for name, data in files.items()]


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
def test_left_overs_of_any_kind_do_no_harm(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "beside/sub/deep/x..WAV.wav", b"half")
    write(tmp_path / "beside.writing", b"half a file")
    run(tmp_path, makers(tmp_path)[kind](FILES), kind)
    assert tree(tmp_path / "out") == FILES and not (tmp_path / "beside.writing").exists()


def test_left_overs_that_are_not_of_the_archive_end_the_unpacking(tmp_path: Path) -> None:
    write(tmp_path / "beside/stranger", b"x")
    with refused("archive", 5, 4, error=ArchiveError):  # files there, and expected
        run(tmp_path, packing.zip_of(FILES), "zip")
    run(tmp_path, packing.zip_of(FILES), "zip")  # they are gone now
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
def test_each_file_is_told_with_its_size_and_crc(tmp_path: Path, kind: str) -> None:
    seen: list[tuple[str, int, int]] = []
    unpack([write(tmp_path / "archive", makers(tmp_path)[kind](FILES))], kind, tmp_path / "out", tmp_path / "beside",
           ENOUGH, Watcher(file=lambda *entry: seen.append(entry)))
    assert sorted(seen) == sorted((name, len(data), zlib.crc32(data)) for name, data in FILES.items())


def test_a_tar_remembers_no_members_and_its_dictionary_is_bounded(tmp_path: Path) -> None:
    many = write(tmp_path / "many.tar", packing.tar_of({f"f{i:03d}": b"" for i in range(300)}))
    alive: list[int] = []

    def look(name: str, size: int, crc32: int) -> None:
        if name == "f299":
            gc.collect()
            alive.append(sum(issubclass(type(one), tarfile.TarInfo) for one in gc.get_objects()))

    unpack([many], "tar", tmp_path / "out", tmp_path / "beside", Expected(files=300, size=0), Watcher(file=look))
    assert len(alive) == 1 and alive[0] < 10, alive
    packed = bytearray(lzma.compress(packing.tar_of(FILES, compression="")))
    header = slice(12, 12 + 4 * packed[12])  # of the first block: the filter, the bytes of what it tells, a dictionary
    at = packed.index(b"\x21\x01", 12) + 2
    packed[at] = 32  # 256 MiB
    packed[header.stop: header.stop + 4] = zlib.crc32(packed[header]).to_bytes(4, "little")
    rejected(tmp_path / "big", bytes(packed), "tar", "LZMAError")
    assert len(lzma.decompress(bytes(packed))) > 70_000, "it is well, but for that"


# --- What is never unpacked ------------------------------------------------------------------------------------------


def rejected(folder: Path, data: bytes, kind: str, *named: str, expected: Expected = ENOUGH) -> None:
    """The archive is refused by its name, and those that are `named`; nothing is left, and a file that an attack would
    hit is as it was."""
    write(folder / "victim", b"whole")
    with refused("archive", *named, error=ArchiveError):
        run(folder, data, kind, expected)
    left = {name for name in tree(folder) if not name.startswith(("src/", "made.7z"))}
    assert left == {"archive", "victim"} and (folder / "victim").read_bytes() == b"whole"
    assert not (folder / "beside").exists() and not (folder / "out").exists()


UNSAFE = ["../victim", "a/../../victim", "/tmp/trimodal-victim", "a\\..\\b", "./C:/victim", "..", "a/./../../victim"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["zip", "tar", "deb"])
def test_names_that_lead_out_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    rejected(tmp_path, makers(tmp_path)[kind]({"good": b"good", name: b"bad"}), kind, repr(name))


@pytest.mark.parametrize("name", [*UNSAFE, "", ".", "/", "a\0b"])
def test_unsafe_names(name: str) -> None:
    with refused(repr(name), error=ArchiveError):
        safe_name(name)


@pytest.mark.parametrize(("name", "safe"), [("./a//b/", "a/b"), (" a /b ", " a /b "), ("a..b/...", "a..b/..."),
                                            ("w: x.wav", "w: x.wav")])
def test_odd_names_that_are_safe(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_names_that_lead_out_of_7z_are_refused(tmp_path: Path) -> None:
    packing.seven_zip_with_name("aa/victim", "../victim", tmp_path / "made.7z")
    rejected(tmp_path, (tmp_path / "made.7z").read_bytes(), "7z", repr("../victim"))


def test_links_are_refused(tmp_path: Path) -> None:
    rejected(tmp_path, packing.zip_of({"a": b"a"}, links={"link": "../victim"}), "zip", repr("link"))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        rejected(tmp_path, packing.tar_of({"a": b"a"}, links={"link": (kind, "../victim")}), "tar", repr("link"))


def test_links_in_7z_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "src/a", b"a")
    (tmp_path / "src/link").symlink_to("a")
    rejected(tmp_path, packing.seven_zip_of(tmp_path / "src", tmp_path / "made.7z"), "7z", repr("link"))


def test_a_bad_7z_is_not_even_given_to_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "src/a", b"a")
    (tmp_path / "src/link").symlink_to("a")
    data = packing.seven_zip_of(tmp_path / "src", tmp_path / "made.7z")
    monkeypatch.setenv("PATH", fake_tool(tmp_path, f"pathlib.Path({str(tmp_path / 'log')!r}).write_text('used')"))
    with refused(repr("link"), error=ArchiveError):
        run(tmp_path, data, "7z")
    assert not (tmp_path / "log").exists()


def test_a_link_that_is_not_taken_out_harms_nobody(tmp_path: Path) -> None:
    data = packing.tar_of({"in/a": b"a"}, links={"out/link": (tarfile.SYMTYPE, "/")})
    run(tmp_path, data, "tar", Expected(files=9, size=9, rules=(("in/", ""),)))
    assert tree(tmp_path / "out") == {"a": b"a"}


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
def test_bombs_are_bounded(tmp_path: Path, kind: str) -> None:
    bomb = makers(tmp_path)[kind]({"bomb": bytes(3_000_000)})
    assert len(bomb) < 30_000
    rejected(tmp_path, bomb, kind, expected=Expected(files=10, size=1_000_000))


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
def test_swarms_of_files_are_bounded(tmp_path: Path, kind: str) -> None:
    swarm = makers(tmp_path)[kind]({f"f{i}": b"" for i in range(50)})
    rejected(tmp_path, swarm, kind, expected=Expected(files=49, size=1_000_000))


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    data = packing.zip_of({"bomb": bytes(3_000_000)})
    lie = data.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lie != data
    rejected(tmp_path, lie, "zip", expected=Expected(files=10, size=1_000_000))


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    rejected(tmp_path, out.getvalue(), "zip")


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    data = bytearray(packing.zip_of({"a": b"a"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    rejected(tmp_path, bytes(data), "zip", repr("a"))


@pytest.mark.parametrize("kind", ["zip", "tar", "deb", "7z"])
@pytest.mark.parametrize("damage", ["cut", "flip", "page"])
def test_damage_is_noticed(tmp_path: Path, kind: str, damage: str) -> None:
    noise = {f"n{i}": random.Random(i).randbytes(20_000) for i in range(5)}
    data = makers(tmp_path)[kind](noise)
    middle = len(data) // 2
    data = {"cut": data[:middle], "flip": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1:],
            "page": b"<html>not found</html>"}[damage]
    rejected(tmp_path, data, kind)


def test_what_decoders_call_an_error_of_the_disk_is_damage(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    packed = packing.tar_of({"a": random.Random(0).randbytes(5000)}, compression="bz2")
    rejected(tmp_path, packed[:2000] + bytes(100) + packed[2100:], "tar", "OSError")
    table = pyarrow.Table.from_pylist([{"youtube_id": "a", "start_time": 1, "audio": {"bytes": b"fLaC1"}}])
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    shard = out.getvalue()
    described = int.from_bytes(shard[-8:-4], "little")
    rejected(tmp_path, shard[: -8 - described] + b"\xff" * described + shard[-8:], "parquet", "OSError")


def test_modes_and_owners_of_the_archive_are_not_taken_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("suid")
    info.mode, info.uid = 0o6777, 12345
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(info)
    run(tmp_path, out.getvalue(), "tar")
    status = (tmp_path / "out/suid").stat()
    assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID) and status.st_uid == os.getuid()


# --- 7z by a tool of the system --------------------------------------------------------------------------------------


def fake_tool(folder: Path, body: str) -> str:
    """A program 7zz that runs `body` with `archive` and `out` set; returns the PATH that finds it first."""
    script = write(folder / "bin/7zz", f"""#!{sys.executable}
import pathlib, sys
archive, (out,) = sys.argv[-1], [word[2:] for word in sys.argv if word.startswith("-o")]
assert sys.argv[1] == "x" and "-y" in sys.argv
{body}
""".encode())
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def test_a_tool_of_the_system_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    body = f"import py7zr; py7zr.SevenZipFile(archive).extractall(out); pathlib.Path({str(log)!r}).write_text(archive)"
    monkeypatch.setenv("PATH", fake_tool(tmp_path, body))
    run(tmp_path, seven_zip(tmp_path, FILES), "7z")
    assert tree(tmp_path / "out") == FILES and log.read_text() == str((tmp_path / "archive").resolve())


def test_a_tool_that_outlived_a_killed_process_is_not_in_the_way(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes into the folder that it was started in, which is moved away; so does one that is started now."""
    beside = tmp_path / "beside"
    beside.mkdir()
    old = os.open(beside, os.O_RDONLY)  # as the working folder of a process
    write(beside / "left", b"")
    body = ("import os, py7zr; py7zr.SevenZipFile(archive).extractall(out)\n"
            f"assert out == '.' and os.getcwd() == {str(beside)!r}\n"
            f"try: os.close(os.open('late', os.O_CREAT | os.O_WRONLY, dir_fd={old}))\n"
            "except FileNotFoundError: pass")
    monkeypatch.setenv("PATH", fake_tool(tmp_path, body))
    monkeypatch.setattr("trimodal.download.seven_zip.subprocess.run", partial(subprocess.run, pass_fds=(old,)))
    run(tmp_path, seven_zip(tmp_path, FILES), "7z")
    os.close(old)
    assert tree(tmp_path / "out") == FILES


def test_a_tool_that_is_still_writing_keeps_nothing_from_being_unpacked(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "beside/left", b"")
    monkeypatch.setattr(unpack_module.shutil, "rmtree", lambda folder, ignore_errors: None)  # as if never empty
    run(tmp_path, seven_zip(tmp_path, FILES), "7z")
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize(("body", "named"), [
    ("sys.exit('no such method')", ("7zz", "no such method")), ("pathlib.Path(out, 'a').write_text('a')", (1, 4)),
    ("pathlib.Path(out, 'a').symlink_to('/')", (repr("a"),)),
])
def test_a_tool_that_fails_or_strays_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str,
                                               named: tuple[str | int, ...]) -> None:
    monkeypatch.setenv("PATH", fake_tool(tmp_path, body))
    with refused("archive", *named, error=ArchiveError):
        run(tmp_path, seven_zip(tmp_path, FILES), "7z")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", ["write_bytes(bytes(60_000))", "open('wb').truncate(70_000)"])
def test_a_full_disk_is_not_taken_for_a_broken_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       written: str) -> None:
    """Less is free than what the tool has not written yet, though it gave the file its size; else it is the archive."""
    data = seven_zip(tmp_path, FILES)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setenv("PATH", fake_tool(tmp_path, f"pathlib.Path(out, 'z').{written}\nsys.exit('E_FAIL')"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=9_000))
    with refused(tmp_path / "out", "archive"):
        run(tmp_path, data, "7z")
    assert (tmp_path / "beside/z").exists(), "what was unpacked is kept"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=80_000))
    with refused("archive", "7zz", "E_FAIL", error=ArchiveError):
        run(tmp_path, data, "7z")
    monkeypatch.setenv("PATH", "")
    run(tmp_path, data, "7z")
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    found = shutil.which(tool)
    if not found:
        pytest.skip(f"{tool} is not on this system")
    write(tmp_path / "bin" / tool, f"#!/bin/sh\nexec {found} \"$@\"\n".encode()).chmod(0o755)
    data = seven_zip(tmp_path, FILES)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run(tmp_path, data, "7z")
    assert tree(tmp_path / "out") == FILES


# --- Shards of sounds ------------------------------------------------------------------------------------------------


def test_shards_need_a_package_or_are_unpacked(tmp_path: Path) -> None:
    """Five rows a clip become one file, named by its id and start, with the suffix of what the bytes are."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with refused("pip install pyarrow"):
            run(tmp_path, b"PAR1", "parquet")
        return
    rows = [{"youtube_id": video, "start_time": start, "audio": {"bytes": data, "path": None}}
            for video, start, data in (("-Ab_1", 30, b"fLaC1"), ("-Ab_1", 30, b"fLaC1"), ("Ycd", 0, b"RIFF2"))]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    run(tmp_path, out.getvalue(), "parquet")
    assert tree(tmp_path / "out") == {"-Ab_1_30.flac": b"fLaC1", "Ycd_0.wav": b"RIFF2"}
    shutil.rmtree(tmp_path / "out")
    rejected(tmp_path, b"<html>", "parquet")
