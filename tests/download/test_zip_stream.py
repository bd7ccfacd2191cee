"""Zip archives of any shape are read entry by entry, with every CRC; memory does not grow with their number."""

import io
import struct
import tracemalloc
import zipfile

import pytest

from tests import packing
from tests.refusals import refused
from trimodal.download import zip_stream

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


def empty_files(number: int) -> bytes:
    """An archive of so many empty files, as fast as may be; it has the end for 64 bits."""
    entries, at = [], 0
    for i in range(number):
        name = b"%09d.wav" % i
        facts = (45, 0, 0, 0, 33, 0, 0, 0, len(name), 0)
        entries.append((struct.pack("<4s5H3L2H", b"PK\3\4", *facts) + name,
                        struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, *facts, 0, 0, 0, 0, at) + name))
        at += len(entries[-1][0])
    listed = b"".join(entry for _, entry in entries)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(listed), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(listed), 1)
    counted = min(number, 0xFFFF)
    return b"".join(local for local, _ in entries) + listed + end + locator + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, counted, counted, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def test_more_members_than_16_bits_count() -> None:
    number = (1 << 16) + 2
    with zipfile.ZipFile(io.BytesIO(empty_files(3))) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 3, "the library agrees with what is made here"
    names = [member.name for member in zip_stream.members(io.BytesIO(empty_files(number)))]
    assert len(set(names)) == number and names[-1] == f"{number - 1:09d}.wav"


def test_a_member_that_was_packed_as_if_it_were_huge() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, archive.open("large", "w", force_zip64=True) as file:
        file.write(b"x" * 1000)
    assert contents(out.getvalue()) == {"large": b"x" * 1000}


def test_numbers_in_the_extra_field_are_taken_in_their_order() -> None:
    """Size and place of the second member stand there, after a field of another kind; its packed size does not."""
    data = packing.zip_of({"first": b"1", "second": b"22"}, compression=zipfile.ZIP_STORED)
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    end = data.index(b"PK\5\6")
    entry, wide = bytearray(data[at: end]), b"\xff" * 4
    extra = b"UT\1\0z" + b"\1\0\x10\0" + (2).to_bytes(8, "little") + bytes(entry[42:46]) + bytes(4)
    entry[24:28] = entry[42:46] = wide
    entry[30:32] = len(extra).to_bytes(2, "little")
    directory = data[data.index(b"PK\1\2"): at] + bytes(entry) + extra
    tail = bytearray(data[end:])
    tail[12:16] = len(directory).to_bytes(4, "little")
    changed = data[: data.index(b"PK\1\2")] + directory + bytes(tail)
    assert contents(changed) == {"first": b"1", "second": b"22"}


def test_the_directory_takes_no_memory() -> None:
    """What is held at most does not grow with the number of members."""
    peaks = []
    for number in (2_000, 8_000):
        with io.BytesIO(empty_files(number)) as file:
            tracemalloc.start()
            assert sum(1 for _ in zip_stream.members(file)) == number
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_a_file_that_is_not_where_the_directory_says_is_damage() -> None:
    data = bytearray(packing.zip_of({"aa": b"1", "bb": b"2"}))
    data[data.index(b"aa")] = ord("x")  # in the local header only
    with refused(repr("aa"), error=zipfile.BadZipFile):
        contents(bytes(data))


@pytest.mark.parametrize("cut", [10, 22, 40, 60])
def test_a_cut_archive_is_damage(cut: int) -> None:
    data = packing.zip_of({"a": b"1" * 30})
    with pytest.raises((zipfile.BadZipFile, EOFError)):
        contents(data[:-cut])


def test_other_compressions_are_named() -> None:
    with refused(12, error=NotImplementedError):
        contents(packing.zip_of({"a": b"1"}, compression=zipfile.ZIP_BZIP2))


def test_a_place_beyond_the_archive_is_damage() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.filelist[0].header_offset = 2 ** 63 + 5
    with refused(repr("a"), error=zipfile.BadZipFile):
        contents(out.getvalue())
