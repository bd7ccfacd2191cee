"""Where the bytes of a picture or a sound are: in a file of their own, or within a shard that holds many.

A sample names its media by a path, which is a text: that of a file, or that of a member of a shard. Whoever opens,
names or compares media does it by this module, so that nothing else knows which of the two it has.

    path = in_tar("/data/00000.tar", first=1536, size=48211, name="7.jpg")
    with open_bytes(path) as file: file.read()        # also open_bytes("/data/7.jpg")
    shown(path)                                       # "/data/00000.tar: 7.jpg"

The text of a member is SHARD, PLACE and NAME with NUL between them, which no name of a file can hold. PLACE is all that
reading it needs: "1536+48211", first byte and bytes in a tar; "2.17.image.bytes", row group, row in it and column of a
parquet table.
"""

import contextlib
import functools
import io
import mmap
import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

Source = str | IO[bytes] | io.RawIOBase  # a path, or what is open

_BETWEEN = "\0"
_KEPT_TABLES, _KEPT_GROUPS = 16, 2  # parquet tables that are open, and row groups in memory, in each process


class Member(NamedTuple):
    shard: str  # path of the file
    place: str
    name: str  # by whose ending its kind is known


def in_tar(shard: str, first: int, size: int, name: str) -> str:
    """Path of the member of a tar whose content is `size` bytes from byte `first` on."""
    return _BETWEEN.join((shard, f"{first}+{size}", name))


def in_parquet(shard: str, group: int, row: int, column: str, name: str) -> str:
    """Path of the bytes in one row of a parquet table. `row` counts within the row group; `column` is a path of names
    with dots between them, as parquet has it."""
    return _BETWEEN.join((shard, f"{group}.{row}.{column}", name))


def member_of(path: str) -> Member | None:
    """What a path names within a shard; None for a file."""
    parts = path.split(_BETWEEN)
    return Member(*parts) if len(parts) == len(Member._fields) else None


def file_of(path: str) -> str:
    """The file on the disk that holds the bytes."""
    return path.partition(_BETWEEN)[0]


def name_of(path: str) -> str:
    """Name of a file without its folders, or of a member without those within its shard."""
    return path.rpartition(_BETWEEN)[2].replace("\\", "/").rpartition("/")[2]


def shown(path: str) -> str:
    """`path` for people, "SHARD: NAME" of a member."""
    member = member_of(path)
    return f"{member.shard}: {member.name}" if member else path


def open_bytes(path: str) -> IO[bytes]:
    """Open a file or a member of a shard to read, and to seek, its bytes. Raises OSError where they are not there."""
    member = member_of(path)
    if member is None:
        return open(path, "rb")
    if "+" not in member.place:
        return _Cell(path, _cell(member))
    first, size = map(int, member.place.split("+"))
    lacking = first + size - os.path.getsize(member.shard)
    if lacking > 0:
        raise OSError(f"its shard ends {lacking:,} bytes before it does")
    return _MemberFile(path, Stretch(member.shard, first, first + size))


def source(path: str) -> str | IO[bytes]:
    """What libraries of media are given: the path of a file, which they open themselves, or an open member."""
    return open_bytes(path) if member_of(path) else path


def size_of(path: str) -> int:
    if member_of(path) is None:
        return os.path.getsize(path)
    with open_bytes(path) as file:
        return file.seek(0, io.SEEK_END)


@contextlib.contextmanager
def mapped(path: str) -> Iterator[mmap.mmap | bytes]:
    """All bytes of a file or member: of a file, which may not be empty, mapped into memory."""
    with open_bytes(path) as file:
        if member_of(path):
            yield file.read()
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


class Stretch(io.RawIOBase):
    """The bytes `first` to `last` of a file or member as a file of its own, of which only what is asked for is ever in
    memory. With `head`, its first bytes are these."""

    def __init__(self, path: str, first: int, last: int, head: bytes = b"") -> None:
        self.file, self.first, self.size, self.head = open_bytes(path), first, last - first, head
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.first + self.at)
        content = bytearray(self.file.read(max(0, min(len(buffer), self.size - self.at))))
        head = self.head[self.at: self.at + len(content)]
        content[: len(head)] = head
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


class _MemberFile(io.BufferedReader):
    """A member of a tar. FFmpeg takes the ending of `name` for a hint; messages of Pillow and libsndfile show `repr`,
    which media.reason_of replaces."""

    def __init__(self, path: str, raw: Stretch) -> None:
        super().__init__(raw)
        self.path = path

    @property
    def name(self) -> str:
        return name_of(self.path)

    def __repr__(self) -> str:
        return repr(self.path)


class _Cell(io.BytesIO):
    """The bytes of a row of a parquet table, named as those of a tar."""

    def __init__(self, path: str, content: bytes) -> None:
        super().__init__(content)
        self.path, self.name = path, name_of(path)

    def __repr__(self) -> str:
        return repr(self.path)


def _cell(member: Member) -> bytes:
    group, row, column = member.place.split(".", 2)
    value = _row_group(member.shard, os.stat(member.shard).st_mtime_ns, int(group), column)[int(row)].as_py()
    for name in column.split(".")[1:]:
        value = value and value[name]
    if value is None:
        raise OSError("there are no bytes in this row")
    return value


@functools.lru_cache(_KEPT_GROUPS)
def _row_group(shard: str, changed_ns: int, group: int, column: str) -> Any:
    """One column of a row group (pyarrow.ChunkedArray): rows cannot be read by themselves."""
    return open_table(shard, changed_ns).read_row_group(group, columns=[column], use_threads=False).column(0)


@functools.lru_cache(_KEPT_TABLES)
def open_table(shard: str, changed_ns: int) -> Any:
    """A pyarrow.parquet.ParquetFile. Worker processes may share it, since it reads at places, without a position."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(shard)
