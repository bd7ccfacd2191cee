"""Zip archives of any shape are read entry by entry, with every CRC; memory does not grow with their number."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest

import zip_stream
from tests import packing

FILES = {" leading blank.wav": b"one", "sub/naïve 水.txt": b"two" * 99_999, "empty": b""}


def contents(data: bytes) -> dict[str, bytes]:
    return {member.name: b"".join(member.chunks()) for member in zip_stream.members(io.BytesIO(data))}


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_names_and_bytes_come_back(compression: int) -> None:
    assert contents(packing.zip_of(FILES, compression=compression)) == FILES


def test_comments_and_bytes_before_the_archive_do_no_harm() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.comment = b"PK\5\6 looks like an end" + bytes(100)
    assert contents(out.getvalue()) == {"a": b"1"}
    assert contents(b"#!/bin/sh\n" + packing.zip_of(FILES)) == FILES


def test_archives_with_numbers_of_64_bits() -> None:
    """More members than 16 bits count, and a member that was packed as if it were huge."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        with archive.open("large", "w", force_zip64=True) as file:
            file.write(b"x" * 1000)
        for number in range(70_000):
            archive.writestr(f"{number % 7}/{number}", b"")
    found = contents(out.getvalue())
    assert len(found) == 70_001 and found["large"] == b"x" * 1000 and "6/69999" in found


def test_numbers_in_the_extra_field_are_taken_in_their_order() -> None:
    wide = zip_stream._IN_EXTRA
    extra = b"\x55\x54\x01\x00z" + b"\x01\x00\x10\x00" + (5).to_bytes(8, "little") + (7).to_bytes(8, "little")
    assert zip_stream._from_extra(extra, [wide, 3, wide]) == [5, 3, 7]
    assert zip_stream._from_extra(b"", [1, 2, 3]) == [1, 2, 3]


def test_the_directory_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"folder/{number:09d}.wav", b"")
    with path.open("rb") as file:
        tracemalloc.start()
        number = sum(1 for member in zip_stream.members(file))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert number == 20_000 and peak < 1_000_000, f"{peak:,} bytes; the standard library takes 10 MB and more"


def test_a_file_that_is_not_where_the_directory_says_is_damage() -> None:
    data = bytearray(packing.zip_of({"aa": b"1", "bb": b"2"}))
    data[data.index(b"aa")] = ord("x")  # in the local header only
    with pytest.raises(zipfile.BadZipFile, match="another file where 'aa' should be"):
        contents(bytes(data))


@pytest.mark.parametrize("cut", [10, 22, 40, 60])
def test_a_cut_archive_is_damage(cut: int) -> None:
    data = packing.zip_of({"a": b"1" * 30})
    with pytest.raises((zipfile.BadZipFile, EOFError)):
        contents(data[:-cut])


def test_other_compressions_are_named() -> None:
    with pytest.raises(NotImplementedError, match="compression method 12"):
        contents(packing.zip_of({"a": b"1"}, compression=zipfile.ZIP_BZIP2))


def test_a_place_beyond_the_archive_is_damage() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.filelist[0].header_offset = 2 ** 63 + 5
    with pytest.raises(zipfile.BadZipFile, match="nothing where 'a' should be"):
        contents(out.getvalue())
