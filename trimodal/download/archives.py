"""Read zip, tar and 7z archives, Debian packages and parquet tables: their members, and the bytes of these.

What is safe to unpack, and where it goes, is decided in unpack.py.
"""

import bisect
import contextlib
import io
import itertools
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from trimodal.download.progress import Bar
from trimodal.download.remote import RemoteFile
from trimodal.sets.base import Rows

CHUNK_BYTES = 1 << 18
ROWS_AT_ONCE = 16  # of a table; so many are decoded and held at a time

Part = Path | RemoteFile


class ArchiveError(Exception):
    """The archive is broken, or holds what is never unpacked. One line."""


class Written(NamedTuple):
    """A file that was unpacked; the CRC-32 is None where a 7z archive has none."""

    name: str  # below the folder that it was unpacked into
    size: int  # bytes
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive, as the archive describes it."""

    name: str
    size: int  # bytes
    crc32: int | None = None
    regular: bool = True  # neither link nor device
    open: Callable[[], IO[bytes]] = io.BytesIO


class Archive:
    """An archive that is open. `declared_bytes` is what it says that it unpacks to, 0 where it does not say."""

    declared_bytes = 0

    def members(self) -> Iterator[Member]:
        """All but folders; a member is opened before the next one is asked for."""
        raise NotImplementedError

    def extract(self, accepted: Iterable[tuple[str, Member]], folder: Path, bar: Bar) -> Iterator[Written]:
        """Write (name, member) pairs below `folder`, each member under the name that stands with it."""
        for name, member in accepted:
            yield Written(name, member.size, _write(member, folder / name))
            bar.add(member.size)


@contextlib.contextmanager
def _parsing(*errors: type[Exception]) -> Iterator[None]:
    """Turn what libraries raise for headers without sense, and `errors`, into an ArchiveError."""
    damage: tuple[type[Exception], ...] = (ArithmeticError, LookupError, TypeError, ValueError, struct.error, *errors)
    try:
        yield
    except damage as error:
        raise ArchiveError(f"is broken ({type(error).__name__}: {' '.join(str(error).split())})") from None


@_parsing()
def open_archive(parts: Sequence[Part], kind: str, rows: Rows | None, stack: contextlib.ExitStack) -> Archive:
    """The archive whose bytes are those of all `parts`; `stack` closes it. `rows` says how a table holds files."""
    if kind == "parquet":
        assert rows and isinstance(parts[0], Path)
        return _Table(parts[0], rows, stack)
    if kind == "7z" and isinstance(parts[0], Path):
        return _SevenZip(parts[0], stack)  # from a path, not a file, it unpacks in several threads
    file = stack.enter_context(io.BufferedReader(JoinedFile(parts), CHUNK_BYTES))
    if kind == "deb":
        return _Tar(_data_of_package(file), stack)
    return {"zip": _Zip, "tar": _Tar, "7z": _SevenZip}[kind](file, stack)


def _write(member: Member, path: Path) -> int:
    """Write the member to `path`, unless a file there has its bytes by the archive's CRC-32. Returns the CRC-32."""
    if member.crc32 is not None and path.is_file() and path.stat().st_size == member.size:
        if crc32_of(path) == member.crc32:
            return member.crc32
    path.parent.mkdir(parents=True, exist_ok=True)
    crc32 = 0
    with member.open() as source, path.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
            target.write(chunk)
    return crc32


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


class JoinedFile(io.RawIOBase):
    """The parts of an archive, on the disk or on a server, read as one seekable file."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self._parts = [part.open("rb", buffering=0) if isinstance(part, Path) else part for part in parts]
        sizes = (part.stat().st_size if isinstance(part, Path) else part.size for part in parts)
        self._ends = list(itertools.accumulate(sizes))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        number = bisect.bisect_right(self._ends, self._position)
        if number == len(self._parts):
            return 0
        part, start = self._parts[number], self._ends[number - 1] if number else 0
        if isinstance(part, RemoteFile):
            data = part.read_at(self._position - start, len(buffer))
        else:
            part.seek(self._position - start)
            data = part.read(len(buffer)) or b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        for part in self._parts:
            if not isinstance(part, RemoteFile):
                part.close()
        super().close()


# --- Formats ---------------------------------------------------------------------------------------------------------


class _Zip(Archive):
    def __init__(self, file: IO[bytes], stack: contextlib.ExitStack) -> None:
        self._archive = stack.enter_context(zipfile.ZipFile(file))
        self.declared_bytes = sum(info.file_size for info in self._archive.infolist())

    def members(self) -> Iterator[Member]:
        for info in self._archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise ArchiveError(f"is encrypted ({info.filename!r})")
            regular = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            yield Member(info.filename, info.file_size, info.CRC, regular, partial(self._archive.open, info))


class _Tar(Archive):
    """Plain or compressed."""

    def __init__(self, file: IO[bytes], stack: contextlib.ExitStack) -> None:
        self._archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))

    def members(self) -> Iterator[Member]:
        with _parsing():
            for info in self._archive:
                if not info.isdir():
                    yield Member(info.name, info.size, None, info.isreg(), partial(self._contents, info))
        assert self._archive.fileobj
        while self._archive.fileobj.read(CHUNK_BYTES):
            pass  # the checksum of what is compressed stands at its end

    def _contents(self, info: tarfile.TarInfo) -> IO[bytes]:
        contents = self._archive.extractfile(info)
        assert contents, "only regular files are opened"
        return contents


def _data_of_package(file: IO[bytes]) -> IO[bytes]:
    """The tar file of a Debian package's contents. A package is an `ar` archive, whose members have headers of 60
    bytes and begin at even offsets."""
    if file.read(8) != b"!<arch>\n":
        raise ArchiveError("is not a Debian package")
    while len(header := file.read(60)) == 60 and header.endswith(b"`\n"):
        size = int(header[48:58])
        data = file.read(size + size % 2)
        if header.startswith(b"data.tar"):
            return io.BytesIO(data[:size])
    raise ArchiveError("is a damaged Debian package: it has no data.tar")


class _Table(Archive):
    """A parquet table, each row of which holds a file. Of rows that give the same name the first one counts."""

    def __init__(self, path: Path, rows: Rows, stack: contextlib.ExitStack) -> None:
        from pyarrow import parquet

        self._rows, self._table = rows, stack.enter_context(parquet.ParquetFile(path, pre_buffer=False))
        groups = map(self._table.metadata.row_group, range(self._table.metadata.num_row_groups))
        self.declared_bytes = sum(group.total_byte_size for group in groups)

    def members(self) -> Iterator[Member]:
        names: set[str] = set()
        batches = self._table.iter_batches(ROWS_AT_ONCE, columns=list(self._rows.columns), use_threads=False)
        with _parsing():
            for row in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
                name, data = self._rows.file_of(row)
                if name not in names:
                    names.add(name)
                    yield Member(name, len(data), open=partial(io.BytesIO, data))


class _SevenZip(Archive):
    def __init__(self, file: Path | IO[bytes], stack: contextlib.ExitStack) -> None:
        import py7zr

        self._error = py7zr.exceptions.ArchiveError
        with _parsing(self._error):
            self._archive = stack.enter_context(py7zr.SevenZipFile(file))
            if self._archive.needs_password():
                raise ArchiveError("is encrypted")
            self.declared_bytes = sum(member.size for member in self.members())

    def members(self) -> Iterator[Member]:
        for file in self._archive.files:
            if not file.is_directory:
                regular = not (file.is_symlink or file.is_junction or file.is_socket)
                yield Member(file.filename, file.uncompressed or 0, file.crc32, regular)

    def extract(self, accepted: Iterable[tuple[str, Member]], folder: Path, bar: Bar) -> Iterator[Written]:
        """Unpack the accepted members below `folder`, which is emptied first, under the names that they have in the
        archive; all in one call, as they share one compressed stream."""
        files = list(accepted)
        shutil.rmtree(folder)
        folder.mkdir()
        with _parsing(self._error):
            self._archive.extract(folder, [member.name for _, member in files], callback=_callback(bar))
        for _, member in files:
            yield Written(member.name, member.size, member.crc32)


def _callback(bar: Bar) -> Any:
    """Moves the bar at the end of each member; the package wants all six methods."""
    from py7zr.callbacks import ExtractCallback

    class Callback(ExtractCallback):
        def report_start_preparation(self) -> None: ...
        def report_start(self, processing_file_path: str, processing_bytes: str) -> None: ...
        def report_update(self, decompressed_bytes: str) -> None: ...
        def report_warning(self, message: str) -> None: ...
        def report_postprocess(self) -> None: ...

        def report_end(self, processing_file_path: str, wrote_bytes: str) -> None:
            bar.add(int(wrote_bytes))

    return Callback()
