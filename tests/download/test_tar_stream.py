"""Tar archives of any make are read member by member; what stands before one takes little memory."""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import pytest

from tests import packing
from tests.refusals import refused
from trimodal.download import tar_stream
from trimodal.download.members import ArchiveError

LARGE = 40_000_000  # bytes of what an attack makes the library read; 40 KB when packed
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def contents(data: bytes) -> dict[str, bytes]:
    with ExitStack() as stack:
        return {member.name: b"".join(member.chunks())
                for member in tar_stream.members(io.BytesIO(data), (), stack)}


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def filled(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    """Of a pax header: its own length comes first."""
    rest = f" {key}={value}\n"
    size = len(rest) + len(str(len(rest)))
    return f"{size + (len(str(size)) > len(str(len(rest))))}{rest}".encode()


def packed(parts: Iterable[bytes]) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6) as file:
        for part in parts:
            file.write(part)
    return out.getvalue()


def zeros(size: int) -> Iterator[bytes]:
    return (bytes(1_000_000) for _ in range(0, size, 1_000_000))


def sparse_of_gnu() -> Iterator[bytes]:
    """A member whose map goes on and on, in blocks of 21 pieces."""
    first = bytearray(header(tarfile.GNUTYPE_SPARSE, 512))
    first[257:265] = tarfile.GNU_MAGIC
    first[386:482] = b"00000000001\0" * 8
    first[482], first[483:495] = 1, b"00000001000\0"
    first[148:156] = b"%06o\0 " % (sum(first[:148]) + sum(first[156:]) + 8 * ord(" "))
    yield bytes(first)
    block = b"00000000001\0" * 42 + b"\1" + bytes(7)
    for _ in range(LARGE // 512_000):
        yield block * 1000


def sparse_of_pax() -> Iterator[bytes]:
    """The same in the newest form: the map is text at the beginning of the contents."""
    facts = filled(b"".join(record(f"GNU.sparse.{key}", value) for key, value in (
        ("major", "1"), ("minor", "0"), ("name", "x"), ("realsize", "1"))))
    yield header(b"x", len(facts)) + facts + header(b"0", LARGE)
    yield b"90000000\n" + b"1\n" * 500
    for _ in range(LARGE // 1_000_000):
        yield b"1\n" * 500_000


def globals_of_members() -> Iterator[bytes]:
    """Each of them has a little that is said of all that follow."""
    for i in range(LARGE // 10_000):
        facts = filled(record(f"key{i}", "x" * 10_000))
        yield header(b"g", len(facts)) + facts + header(b"0", 0, f"f{i}")


ATTACKS = {
    "pax": lambda: (header(b"x", LARGE), *zeros(LARGE)), "global": lambda: (header(b"g", LARGE), *zeros(LARGE)),
    "long name": lambda: (header(b"L", LARGE), *zeros(LARGE)),
    "long link": lambda: (header(b"K", LARGE), *zeros(LARGE)),
    "solaris": lambda: (header(b"X", LARGE), *zeros(LARGE)),
    "sparse of GNU": sparse_of_gnu, "sparse of pax": sparse_of_pax, "globals of members": globals_of_members,
    "headers of headers": lambda: (header(b"x", 512) + filled(record("a", "b")) for _ in range(10_000)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_headers_are_bounded(attack: str) -> None:
    data = packed(ATTACKS[attack]())
    assert len(data) < 400_000
    tracemalloc.start()
    try:
        with refused(error=ArchiveError):
            contents(data)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_headers_without_sense_are_damage() -> None:
    facts = filled(b"".join(record(f"GNU.sparse.{key}", value) for key, value in (
        ("major", "1"), ("minor", "0"), ("name", "x"), ("realsize", "1"))))
    with refused("ValueError", error=ArchiveError):
        contents(packed([header(b"x", len(facts)), facts, header(b"0", 1024), b"x" * 1024, bytes(1024)]))
    with refused("IndexError", error=ArchiveError):
        contents(packed([next(sparse_of_gnu())]))


@pytest.mark.parametrize("form", FORMATS)
def test_the_longest_names_are_read(form: int) -> None:
    """As long as a system takes them, in letters that UTF-8 writes with three bytes, and of a link as well."""
    name = "/".join(["水" * 80] * 16)[:1365] if form != tarfile.USTAR_FORMAT else f"{'a' * 150}/{'b' * 99}"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for number, last in enumerate(("", "x")):
            info = tarfile.TarInfo(name[:-1] + last)
            info.size = 3
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"linkpath": name, "comment": str(number)}
            archive.addfile(info, io.BytesIO(b"abc"))
    assert contents(out.getvalue()) == {name[:-1] + last: b"abc" for last in ("", "x")}


def test_many_members_with_headers_of_their_own_are_read() -> None:
    """The bound is one for each member."""
    files = {f"{'long' * 50}/{i:05d}": b"x" for i in range(300)}
    assert contents(packing.tar_of(files)) == files
