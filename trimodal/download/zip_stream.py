"""Reads zip archives of any number of members in little memory: their directory is read entry by entry, where the
standard library keeps all of it (a gigabyte for the million files of VoxCeleb 2). Every CRC is checked."""

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any
from zipfile import BadZipFile

from trimodal.download.members import ArchiveError, Member, safe_name

CHUNK_BYTES = 1 << 18  # read and given out at once
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 1 << 16
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 1, 0x800
_IN_EXTRA = 0xFFFFFFFF  # the true number, of 64 bits, stands in the extra field


@dataclass(frozen=True, slots=True)
class _Entry:
    raw_name: bytes
    flags: int
    method: int
    crc32: int
    packed: int  # bytes
    size: int
    mode: int  # of the file, 0 where none is told
    offset: int

    @property
    def name(self) -> str:
        return self.raw_name.decode("utf-8" if self.flags & _UTF8 else "cp437", "replace")


class _Window(io.RawIOBase):
    """A piece of a file that others read as well."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._at, self._end = file, start, start + length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        chunk = self._file.read(min(len(buffer), self._end - self._at))
        buffer[: len(chunk)] = chunk
        self._at += len(chunk)
        return len(chunk)


def members(file: IO[bytes]) -> Iterator[Member]:
    """The regular files of the archive, in the order of its directory.

    Raises:
        BadZipFile, EOFError, zlib.error: it is damaged.
        ArchiveError: it holds what is never unpacked.
    """
    start, length, number = _directory(file)
    shift = start - length - number[1]
    directory = io.BufferedReader(_Window(file, start - length, length), 1 << 16)
    for _ in range(number[0]):
        entry = _read_entry(directory)
        if entry.raw_name.endswith(b"/"):
            safe_name(entry.name)
            continue
        if stat.S_IFMT(entry.mode) not in (0, stat.S_IFREG):
            raise ArchiveError(f"holds a link or device, {entry.name!r}")
        if entry.offset + shift >= start:
            raise BadZipFile(f"nothing where {entry.name!r} should be")
        if entry.flags & _ENCRYPTED:
            raise ArchiveError(f"is encrypted ({entry.name!r})")
        yield Member(entry.name, entry.size, partial(_contents, file, entry, entry.offset + shift), entry.crc32)
    if directory.read(4):
        raise BadZipFile("more entries than are told")


def _directory(file: IO[bytes]) -> tuple[int, int, tuple[int, int]]:
    """(end of the directory, its bytes, (number of entries, where it says that it begins))."""
    size = file.seek(0, io.SEEK_END)
    tail_at = max(0, size - _END.size - _LONGEST_COMMENT)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and int.from_bytes(tail[at + 20: at + 22], "little") != len(tail) - at - _END.size:
        at = tail.rfind(b"PK\5\6", 0, at)  # in a comment, whose length the true end tells
    if at < 0:
        raise BadZipFile("no end of a zip archive in it")
    *_, number, length, begin, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if end >= _LOCATOR64.size:
        file.seek(end - _LOCATOR64.size)
        if file.read(4) == b"PK\6\7":
            end -= _LOCATOR64.size + _END64.size
            if end < 0:
                raise BadZipFile("a damaged end")
            file.seek(end)
            mark, *_, number, length, begin = _END64.unpack(file.read(_END64.size))
            if mark != b"PK\6\6":
                raise BadZipFile("a damaged end")
    if end - length - begin < 0:
        raise BadZipFile("a directory that is cut")
    return end, length, (number, begin)


def _read_entry(directory: IO[bytes]) -> _Entry:
    fixed = directory.read(_ENTRY.size)
    if len(fixed) < _ENTRY.size or not fixed.startswith(b"PK\1\2"):
        raise BadZipFile("a damaged directory")
    (_, _, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes, comment_bytes, _, _, attributes,
     offset) = _ENTRY.unpack(fixed)
    raw_name, extra = directory.read(name_bytes), directory.read(extra_bytes)
    if len(raw_name) + len(extra) + len(directory.read(comment_bytes)) != name_bytes + extra_bytes + comment_bytes:
        raise BadZipFile("a directory that is cut")
    size, packed, offset = _from_extra(extra, [size, packed, offset])
    return _Entry(raw_name, flags, method, crc32, packed, size, attributes >> 16, offset)


def _from_extra(extra: bytes, numbers: list[int]) -> list[int]:
    """Numbers that do not fit into 32 bits stand in the extra field of kind 1, one after another."""
    while len(extra) >= 4 and _IN_EXTRA in numbers:
        kind, length = struct.unpack_from("<2H", extra)
        field, extra = extra[4: 4 + length], extra[4 + length:]
        if kind == 1:
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [next(wide, number) if number == _IN_EXTRA else number for number in numbers]
    return numbers


def _contents(file: IO[bytes], entry: _Entry, offset: int) -> Iterator[bytes]:
    file.seek(offset)
    fixed = file.read(_LOCAL.size)
    if len(fixed) < _LOCAL.size or not fixed.startswith(b"PK\3\4"):
        raise BadZipFile(f"no file where {entry.name!r} should be")
    *_, name_bytes, extra_bytes = _LOCAL.unpack(fixed)
    if file.read(name_bytes) != entry.raw_name:
        raise BadZipFile(f"another file where {entry.name!r} should be")
    window = _Window(file, offset + _LOCAL.size + name_bytes + extra_bytes, entry.packed)
    size = crc32 = 0
    for chunk in _unpacked(window, entry):
        size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
        if size > entry.size:
            break
        yield chunk
    if (size, crc32) != (entry.size, entry.crc32):
        raise BadZipFile(f"wrong CRC or size of {entry.name!r}")


def _unpacked(window: _Window, entry: _Entry) -> Iterator[bytes]:
    if entry.method not in (_STORED, _DEFLATED):
        raise NotImplementedError(f"compression method {entry.method}")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    while chunk := window.read(CHUNK_BYTES):
        if entry.method == _STORED:
            yield chunk
            continue
        while chunk:  # a bomb gives its bytes in pieces as well
            yield inflater.decompress(chunk, CHUNK_BYTES)
            chunk = inflater.unconsumed_tail
    if entry.method == _DEFLATED:
        yield inflater.flush()
