"""Unpacking: all there under the right names, or nothing; nothing ever outside its folder; the user's files stay."""

import errno
import io
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests import packing
from tests.project import ROOT
from tests.refusals import refused
from trimodal.download import unpack
from trimodal.download.archives import ArchiveError, JoinedFile, Written
from trimodal.download.unpack import Contents, Rules, destination, safe_name
from trimodal.sets import SOURCES
from trimodal.sets.audiocaps import ROWS

FILES = {" leading blank.wav": b"one", "sub/naïve 水.txt": b"two" * 999, "sub/deep/x..WAV.wav": b"", "z": bytes(70_000)}
ENOUGH = Contents(max_files=1000, max_bytes=10_000_000, rows=ROWS)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run(folder: Path, data: bytes, kind: str, contents: Contents = ENOUGH) -> list[Written]:
    """Unpack `data` into folder/out."""
    written = list(unpack.extract([write(folder / "archive", data)], kind, folder / "staging", contents))
    unpack.move_into(folder / "staging", folder / "out")
    return written


def seven_zip(folder: Path, files: dict[str, bytes]) -> bytes:
    for name, data in files.items():
        write(folder / "src" / name, data)
    return packing.seven_zip_of(folder / "src", folder / "made.7z")


KINDS = ["zip", "tar", "deb", "7z"]


def packed(folder: Path, kind: str, files: dict[str, bytes]) -> bytes:
    makers: dict[str, Callable[[dict[str, bytes]], bytes]] = {
        "zip": packing.zip_of, "tar": packing.tar_of, "deb": packing.deb_of,
        "7z": lambda files: seven_zip(folder, files)}
    return makers[kind](files)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_there_under_its_own_name_and_told_with_size_and_crc(tmp_path: Path, kind: str) -> None:
    written = run(tmp_path, packed(tmp_path, kind, FILES), kind)
    assert tree(tmp_path / "out") == FILES and not (tmp_path / "staging").exists()
    assert {(file.name, file.size, file.crc32 or 0) for file in written} == {
        (name, len(data), zlib.crc32(data)) for name, data in FILES.items()} and len(written) == len(FILES)


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
    assert len(list(unpack.extract(parts, "zip", tmp_path / "staging", ENOUGH))) == len(FILES)
    assert tree(tmp_path / "staging") == FILES


def test_joined_parts_read_like_a_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    parts = [write(tmp_path / "a", data[:300]), write(tmp_path / "empty", b""), write(tmp_path / "b", data[300:])]
    with io.BufferedReader(JoinedFile(parts), 64) as file:
        assert file.read() == data
        for start, length in ((0, 10), (295, 10), (990, 100), (300, 1)):
            file.seek(start)
            assert (file.tell(), file.read(length)) == (start, data[start: start + length])
        assert file.seek(-5, os.SEEK_END) == 995 and file.read() == data[995:]


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


def test_only_what_the_rules_name_is_written_and_other_links_harm_nobody(tmp_path: Path) -> None:
    data = packing.tar_of({"./in/a.png": b"a", "./doc/b": b"b"}, links={"out/link": (tarfile.SYMTYPE, "/")})
    run(tmp_path, data, "tar", replace(ENOUGH, rules=(("in/", ""),)))
    assert tree(tmp_path / "out") == {"a.png": b"a"}
    with refused("archive", error=ArchiveError):
        run(tmp_path, data, "tar", replace(ENOUGH, rules=(("opt/", ""),)))


# --- Zip archives of any make ----------------------------------------------------------------------------------------


def test_comments_and_bytes_before_a_zip_do_no_harm(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.comment = b"looks like a comment" + bytes(100)
    run(tmp_path, b"#!/bin/sh\n" + out.getvalue(), "zip")
    assert tree(tmp_path / "out") == {"a": b"1"}


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    number, entries, at = (1 << 16) + 2, [], 0
    for i in range(number):
        name = b"%09d.wav" % i
        facts = (45, 0, 0, 0, 33, 0, 0, 0, len(name), 0)
        entries.append((struct.pack("<4s5H3L2H", b"PK\3\4", *facts) + name,
                        struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, *facts, 0, 0, 0, 0, at) + name))
        at += len(entries[-1][0])
    listed = b"".join(entry for _, entry in entries)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(listed), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(listed), 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    data = b"".join(local for local, _ in entries) + listed + end + locator + last
    chosen = {f"{i:09d}.wav" for i in (0, number - 1)}
    run(tmp_path, data, "zip", replace(ENOUGH, choose=lambda names: chosen & set(names)))
    assert tree(tmp_path / "out") == dict.fromkeys(chosen, b"")


# --- Into a folder that is there -------------------------------------------------------------------------------------


def test_two_archives_of_one_folder_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "out/wav/id1/own.txt", b"mine")
    run(tmp_path, packing.zip_of({"wav/id1/a.wav": b"a", "wav/id2/b.wav": b"b"}), "zip")
    run(tmp_path, packing.zip_of({"wav/id1/z.wav": b"z", "wav/id3/c.wav": b"c"}), "zip")
    assert tree(tmp_path / "out") == {"wav/id1/own.txt": b"mine", "wav/id1/a.wav": b"a", "wav/id2/b.wav": b"b",
                                      "wav/id1/z.wav": b"z", "wav/id3/c.wav": b"c"}


def test_what_differs_is_kept_beside_and_what_is_equal_stays(tmp_path: Path) -> None:
    for name, data in (("out/a.wav", b"edited"), ("out/b.wav", b"b"), ("own/c.wav", b"c"), ("own/d.wav", b"own")):
        write(tmp_path / name, data)
    for name in ("c.wav", "d.wav"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "own" / name)
    equal = (tmp_path / "out/b.wav").stat().st_ino
    run(tmp_path, packing.zip_of({"a.wav": b"a", "b.wav": b"b", "c.wav": b"c", "d.wav": b"d", "e.wav": b"e"}), "zip")
    found = tree(tmp_path / "out")
    aside = {name.partition(".before_")[0]: found.pop(name) for name in list(found) if ".before_" in name}
    assert found == {f"{name}.wav": name.encode() for name in "abcde"}
    assert aside == {"a.wav": b"edited", "d.wav": b"own"}
    assert (tmp_path / "out/b.wav").stat().st_ino == equal and (tmp_path / "out/c.wav").is_symlink()
    assert tree(tmp_path / "own") == {"c.wav": b"c", "d.wav": b"own"}


def test_a_linked_folder_of_the_user_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/wav").symlink_to(tmp_path / "own")
    with refused(tmp_path / "out/wav"):
        run(tmp_path, packing.zip_of({"wav/a": b"a"}), "zip")
    assert tree(tmp_path / "own") == {}


@pytest.mark.parametrize(("own", "named"), [("out/a/x", "out/a"), ("out", "out")])
def test_a_folder_and_a_file_of_one_name_are_told(tmp_path: Path, own: str, named: str) -> None:
    write(tmp_path / own, b"of the user")
    with refused(tmp_path / named):
        run(tmp_path, packing.zip_of({"a": b"a"}), "zip")
    assert (tmp_path / own).read_bytes() == b"of the user"


def test_only_what_this_command_unpacked_is_cleared(tmp_path: Path) -> None:
    clotho = SOURCES["clotho"]
    ours = unpack.staging_folder(tmp_path, clotho.items[6], "0123456789abcdef")
    names = [ours.name, f"{ours.name}-200", f"{ours.name}.17.old", f"{clotho.items[6].name}--200"]
    own = ["mine", f"{clotho.items[6].name}", f"{ours.name}.backup", f"x{ours.name}", f"{clotho.items[6].name}-mine"]
    for name in [*names, *own]:
        write(tmp_path / unpack.STAGING / name / "a", b"a")
    assert unpack.staged_bytes(tmp_path, clotho) == len(names)
    unpack.clear_staging(tmp_path, clotho)
    assert sorted(path.name for path in ours.parent.iterdir()) == sorted(own)


def test_a_link_of_the_user_is_no_place_to_unpack(tmp_path: Path) -> None:
    write(tmp_path / "own/a", b"a")
    (tmp_path / unpack.STAGING).symlink_to(tmp_path / "own")
    with refused(tmp_path / unpack.STAGING):
        unpack.staging_folder(tmp_path, SOURCES["coco"].items[0], "0")
    unpack.clear_staging(tmp_path, SOURCES["coco"])
    assert tree(tmp_path / "own") == {"a": b"a"}


# --- Killed and run again --------------------------------------------------------------------------------------------

# A child that dies by itself when it has written a half of the 100th file.
KILLED = """
import os, pathlib, signal, sys
from trimodal.download import unpack
folder = pathlib.Path(sys.argv[1])
contents = unpack.Contents(max_files=1000, max_bytes=10**8)
for number, file in enumerate(unpack.extract([folder / "archive"], "zip", folder / "staging", contents), start=1):
    if number == 99:
        (folder / "staging/folder1/file0099.bin").write_bytes(bytes(1_000))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_mid_unpacking_then_run_again(tmp_path: Path) -> None:
    """What was whole is not written again."""
    files = {f"folder{i % 7}/file{i:04d}.bin": random.Random(i).randbytes(2_000) for i in range(150)}
    data = packing.zip_of(files)
    write(tmp_path / "archive", data)
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert len(tree(tmp_path / "staging")) == 100 and not (tmp_path / "out").exists()
    times = {name: (tmp_path / "staging" / name).stat().st_mtime_ns for name in tree(tmp_path / "staging")}
    written = run(tmp_path, data, "zip")
    assert tree(tmp_path / "out") == files and not (tmp_path / "staging").exists()
    assert written == [(name, 2_000, zlib.crc32(data)) for name, data in files.items()]
    again = {name for name, time in times.items() if (tmp_path / "out" / name).stat().st_mtime_ns != time}
    assert again == {"folder1/file0099.bin"}


def test_a_disk_that_fills_up_is_not_taken_for_a_broken_archive(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole by then is kept."""
    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        if path.name == "z" and mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open_file(path, mode, **more)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", full)
    with refused(tmp_path, "archive"):
        run(tmp_path, packing.zip_of(FILES), "zip")
    assert tree(tmp_path / "staging") == {name: data for name, data in FILES.items() if name != "z"}
    monkeypatch.undo()
    run(tmp_path, packing.zip_of(FILES), "zip")
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [b"half", bytes(70_000 - 1) + b"x"])
def test_left_overs_of_any_kind_do_no_harm(tmp_path: Path, kind: str, left: bytes) -> None:
    """Cut, or spoiled by a power cut."""
    write(tmp_path / "staging/z", left)
    run(tmp_path, packed(tmp_path, kind, FILES), kind)
    assert tree(tmp_path / "out") == FILES


# --- What is never unpacked ------------------------------------------------------------------------------------------


def rejected(folder: Path, data: bytes, kind: str, *named: str, contents: Contents = ENOUGH) -> None:
    """The archive is refused by its name, and those that are `named`; nothing is left, and a file that an attack would
    hit is as it was."""
    write(folder / "victim", b"whole")
    with refused("archive", *named, error=ArchiveError):
        run(folder, data, kind, contents)
    left = {name for name in tree(folder) if not name.startswith(("src/", "made.7z"))}
    assert left == {"archive", "victim"} and (folder / "victim").read_bytes() == b"whole"
    assert not (folder / "staging").exists() and not (folder / "out").exists()


UNSAFE = ["../victim", "a/../../victim", "/tmp/trimodal-victim", "a\\..\\b", "./C:/victim", "..", "a/./../../victim"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["zip", "tar", "deb"])
def test_names_that_lead_out_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    rejected(tmp_path, packed(tmp_path, kind, {"good": b"good", name: b"bad"}), kind, repr(name))


def test_names_that_lead_out_of_7z_are_refused(tmp_path: Path) -> None:
    packing.seven_zip_with_name("aa/victim", "../victim", tmp_path / "made.7z")
    rejected(tmp_path, (tmp_path / "made.7z").read_bytes(), "7z", repr("../victim"))


@pytest.mark.parametrize("name", [*UNSAFE, "", ".", "/", "a\0b", "C:", "C:/a"])
def test_unsafe_names(name: str) -> None:
    with refused(repr(name), error=ArchiveError):
        safe_name(name)


@pytest.mark.parametrize(("name", "safe"), [("./a//b/", "a/b"), (" a /b ", " a /b "), ("a..b/...", "a..b/..."),
                                            ("w: x.wav", "w: x.wav")])
def test_odd_names_that_are_safe(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    rejected(tmp_path, packing.zip_of({"a": b"a"}, links={"link": "../victim"}), "zip", repr("link"))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        rejected(tmp_path, packing.tar_of({"a": b"a"}, links={"link": (kind, "../victim")}), "tar", repr("link"))
    write(tmp_path / "src/a", b"a")
    (tmp_path / "src/link").symlink_to("a")
    rejected(tmp_path, packing.seven_zip_of(tmp_path / "src", tmp_path / "made.7z"), "7z", repr("link"))


@pytest.mark.parametrize("kind", KINDS)
def test_bombs_and_swarms_are_refused_by_what_they_declare(tmp_path: Path, kind: str) -> None:
    bomb = packed(tmp_path / "bomb", kind, {"bomb": bytes(3_000_000)})
    assert len(bomb) < 30_000
    rejected(tmp_path / "bomb", bomb, kind, contents=replace(ENOUGH, max_bytes=1_000_000))
    swarm = packed(tmp_path / "swarm", kind, {f"f{i}": b"" for i in range(50)})
    rejected(tmp_path / "swarm", swarm, kind, contents=replace(ENOUGH, max_files=49))


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    data = packing.zip_of({"bomb": bytes(3_000_000)})
    lie = data.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lie != data
    rejected(tmp_path, lie, "zip", contents=replace(ENOUGH, max_bytes=1_000_000))


@pytest.mark.parametrize("kind", ["zip", "7z"])
def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path, kind: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed(tmp_path, kind, FILES)
    usage = unpack.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=70_000))
    with refused(tmp_path / "staging", "archive"):
        run(tmp_path, data, kind)
    assert tree(tmp_path / "staging") == {}


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    rejected(tmp_path, packing.zip_of({"a": b"1", "./a": b"2"}), "zip", repr("a"))


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    data = bytearray(packing.zip_of({"a": b"a"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    rejected(tmp_path, bytes(data), "zip", repr("a"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "flip", "page"])
def test_damage_is_noticed(tmp_path: Path, kind: str, damage: str) -> None:
    data = packed(tmp_path, kind, {f"n{i}": random.Random(i).randbytes(20_000) for i in range(5)})
    middle = len(data) // 2
    data = {"cut": data[:middle], "flip": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1:],
            "page": b"<html>not found</html>"}[damage]
    rejected(tmp_path, data, kind)


def test_what_decoders_call_an_error_of_the_disk_is_damage(tmp_path: Path) -> None:
    data = packing.tar_of({"a": random.Random(0).randbytes(2_000_000)}, compression="bz2")
    rejected(tmp_path, data[:1_500_000] + bytes(100) + data[1_500_100:], "tar", "OSError")
    shard = table([("a", 1, b"fLaC1")])
    described = int.from_bytes(shard[-8:-4], "little")
    rejected(tmp_path, shard[: -8 - described] + b"\xff" * described + shard[-8:], "parquet", "OSError")


def test_modes_and_owners_of_a_tar_are_not_taken_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("suid")
    info.mode, info.uid = 0o6777, 12345
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(info)
    run(tmp_path, out.getvalue(), "tar")
    status = (tmp_path / "out/suid").stat()
    assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID) and status.st_uid == os.getuid()


# --- Tables whose rows hold files ------------------------------------------------------------------------------------


def table(rows: list[tuple[str, Any, bytes | None]], **settings: Any) -> bytes:
    """A shard as the mirror of AudioCaps has them, of (clip, start, sound)."""
    out = io.BytesIO()
    columns = [{"audiocap_id": i, "youtube_id": video, "start_time": start, "audio": {"bytes": data, "path": None}}
               for i, (video, start, data) in enumerate(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), out, **settings)
    return out.getvalue()


@pytest.mark.parametrize("settings", [{}, {"compression": "ZSTD", "use_dictionary": False}, {"row_group_size": 7}],
                         ids=str)
def test_clips_come_out_once_whatever_the_packing(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Five rows a clip become one file, named by its id and start, with the suffix of what the bytes are."""
    sounds = {f"-Ab_{i}": (b"fLaC" if i % 3 else b"RIFF") + random.Random(i).randbytes(3_000) for i in range(12)}
    written = run(tmp_path, table([(name, 30, data) for name, data in sounds.items() for _ in range(5)], **settings),
                  "parquet")
    assert tree(tmp_path / "out") == {
        f"{name}_30.{'flac' if data.startswith(b'fLaC') else 'wav'}": data for name, data in sounds.items()}
    assert len(written) == 12


@pytest.mark.parametrize("start", [30, 30.0, "30"])
def test_a_start_is_whole_seconds_whatever_its_type(tmp_path: Path, start: object) -> None:
    run(tmp_path, table([("a", start, b"OggS1")]), "parquet")
    assert tree(tmp_path / "out") == {"a_30.ogg": b"OggS1"}


def test_tables_of_other_things_are_refused(tmp_path: Path) -> None:
    good = ("a", 1, b"fLaC1")
    rejected(tmp_path, table([good, ("b", 1, b"what")]), "parquet", repr("b_1"))
    rejected(tmp_path, table([good, ("b", 1, None)]), "parquet")
    rejected(tmp_path, table([good, ("../victim", 1, b"fLaC1")]), "parquet", repr("../victim_1.flac"))
    rejected(tmp_path, table([("b", "x", b"fLaC1")]), "parquet")
    rejected(tmp_path, b"<html>", "parquet")
    large = table([("b", 1, b"fLaC" + bytes(3_000_000))])
    assert len(large) < 200_000
    rejected(tmp_path, large, "parquet", contents=replace(ENOUGH, max_bytes=1_000_000))
