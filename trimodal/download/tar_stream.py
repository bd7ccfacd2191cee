"""Tar archives, packed or not, read from the beginning to the end in little memory, whatever they claim.

The library takes what stands before a member - extended headers, long names, maps of sparse files - whole into memory,
and that may pack a thousandfold: here it has a bound. What holds for every member is bounded likewise.
"""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import IO, Any

from trimodal.download.members import ArchiveError, Member, Rules, destination, safe_name

CHUNK_BYTES = 1 << 18
HEADER_BYTES = 1 << 14  # for one member; the longest path and link take 11,000, and older libraries are quadratic here
XZ_MEMORY_BYTES = 96 << 20  # of the dictionary; the largest preset takes 65 MiB


def members(source: IO[bytes], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    """The regular files that the rules let through, in order; links and devices among them are refused."""
    plain = stack.enter_context(_decompressed(source))
    for archive, info in _entries(plain, stack):
        if info.isdir():
            continue
        if not info.isreg():
            if destination(safe_name(info.name), rules) is None:
                continue  # is not unpacked anyway
            raise ArchiveError(f"holds a link or device, {info.name!r}")
        yield Member(info.name, info.size, partial(_contents, archive, info))
    while plain.read(1 << 20):
        pass  # the checksum stands at the end


def _entries(plain: IO[bytes], stack: ExitStack) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    try:
        archive = stack.enter_context(tarfile.open(fileobj=plain, mode="r|", tarinfo=_Entry))
        for info in archive:
            yield archive, info
            archive.members = []  # type: ignore[attr-defined]  # it would remember them all
            if sum(len(key) + len(value) for key, value in archive.pax_headers.items()) > HEADER_BYTES:
                raise ArchiveError("holds headers beyond all measure")
    except (ArithmeticError, LookupError, ValueError, RecursionError) as error:  # headers without sense
        raise ArchiveError(f"is not a readable tar archive ({type(error).__name__})") from None


class _Entry(tarfile.TarInfo):
    """Made of no more than HEADER_BYTES of the archive, all that stands before the member counted."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Entry":
        stream = tarfile.fileobj
        if isinstance(stream, _Headers):  # what follows an extended header
            return super().fromtarfile(tarfile)
        tarfile.fileobj = _Headers(stream)  # type: ignore[assignment]  # all that is asked of it here
        try:
            return super().fromtarfile(tarfile)
        finally:
            tarfile.fileobj = stream


class _Headers:
    """The stream that headers are read from, HEADER_BYTES of it at most."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, HEADER_BYTES
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise ArchiveError("holds headers beyond all measure")
        data: bytes = self._stream.read(size)
        return data


def _decompressed(source: IO[bytes]) -> IO[bytes]:
    """The standard readers, since tarfile's own for streams checks no checksum of gz."""
    magic = source.read(6)
    source.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=source)  # type: ignore[return-value]
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(source)
    return io.BufferedReader(_Xz(source), CHUNK_BYTES) if magic == b"\xfd7zXZ\0" else source


class _Xz(io.RawIOBase):
    """An xz file whose dictionary has a bound, which the standard reader does not know."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__()
        self._source, self._decoder = source, lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = b""
        while not chunk and not self._decoder.eof:
            packed = self._source.read(CHUNK_BYTES) if self._decoder.needs_input else b""
            if self._decoder.needs_input and not packed:
                raise EOFError("the xz file is cut")
            chunk = self._decoder.decompress(packed, len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _contents(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    contents = archive.extractfile(info)
    assert contents is not None, "only regular files are asked for"
    while chunk := contents.read(CHUNK_BYTES):
        yield chunk
