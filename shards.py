"""Parquet shards of sounds, read in little memory. The mirror puts all sounds of a shard, a hundred megabytes, into one
page, which the usual reader holds several times over: here such a page is unpacked piece by piece.

A page is a header (a struct in Thrift's compact protocol) and a body; see github.com/apache/parquet-format. What is
packed in other ways than the usual ones goes through the usual reader.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from config import UserError
from members import ArchiveError, Member

COLUMN = "audio.bytes"
PIECE_BYTES = 1 << 16
HISTORY_BYTES = 1 << 21  # that a copy may reach back; packers use 64 KiB
_DATA, _DICTIONARY = 0, 2  # types of pages
_LARGEST_PAGE = 1 << 31
_PLAIN, _INDICES = 0, (2, 8)  # encodings
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError)
_SOUND_MAGIC = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}


@dataclass(frozen=True, slots=True)
class _Page:
    kind: int
    encoding: int
    values: int
    offset: int  # of the body
    packed: int  # bytes


def members(path: Path) -> Iterator[Member]:
    """One sound a clip, as YOUTUBEID_START.EXT; a clip of val and test has five rows."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path.name}: sounds in parquet files need the package pyarrow; run: "
                        "pip install pyarrow") from None
    seen: set[str] = set()
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as table, path.open("rb") as file:
            for group in range(table.metadata.num_row_groups):
                rows = table.read_row_group(group, columns=["youtube_id", "start_time"]).to_pylist()
                names = [f"{row['youtube_id']}_{int(float(row['start_time']))}" for row in rows]
                yield from _sounds(table, group, file, names, seen)
    except (pyarrow.ArrowException, *_DAMAGE) as error:
        raise ArchiveError(f"is not a readable shard of sounds ({type(error).__name__})") from None


def _sounds(table: Any, group: int, file: IO[bytes], names: list[str], seen: set[str]) -> Iterator[Member]:
    facts = table.metadata.row_group(group)
    column = next(column for column in map(facts.column, range(facts.num_columns))
                  if column.path_in_schema == COLUMN)
    levels = next(one for one in map(table.schema.column, range(facts.num_columns)) if one.path == COLUMN)
    pages = list(_pages(file, column)) if _is_usual(column, levels) else []
    if not pages or any(page.kind not in (_DATA, _DICTIONARY) for page in pages):
        batches = table.iter_batches(batch_size=1, row_groups=[group], columns=["audio"], use_threads=False)
        sounds = (row["audio"]["bytes"] for batch in batches for row in batch.to_pylist())
        for name, data in zip(names, sounds, strict=True):
            yield from _member(name, len(data), iter([data]), seen)
        return
    for name, (size, pieces) in _named(file, pages, column.compression, names):
        yield from _member(name, size, pieces, seen)


def _is_usual(column: Any, levels: Any) -> bool:
    """Every value is there, preceded by levels that say so, and packed in a way that is read here."""
    if not levels.max_definition_level or levels.max_repetition_level:
        return False
    known = column.statistics is not None and column.statistics.has_null_count and column.statistics.null_count == 0
    return known and column.compression in ("SNAPPY", "UNCOMPRESSED")


def _member(name: str, size: int, pieces: Iterator[bytes], seen: set[str]) -> Iterator[Member]:
    if name in seen:
        return
    seen.add(name)
    head = b""
    while len(head) < min(4, size):
        head += next(pieces)
    suffix = _SOUND_MAGIC.get(head[:4])
    if suffix is None:
        raise ArchiveError(f"holds a sound of an unknown format ({name!r})")
    yield Member(f"{name}.{suffix}", size, lambda: itertools.chain([head], pieces))


def _named(file: IO[bytes], pages: list[_Page], compression: str,
           names: list[str]) -> Iterator[tuple[str, tuple[int, Iterator[bytes]]]]:
    """(name, (bytes, their pieces)) of each value, in the order in which they lie in the file. A value that several
    rows share stands in the dictionary once: rows of one clip, or clips of the very same sound."""
    names_of: dict[int, dict[str, None]] = {}
    row, plain = 0, []
    for page in pages:
        if page.kind == _DATA and page.encoding in _INDICES:
            for number, index in enumerate(itertools.islice(_indices(_Stream(file, page, compression)), page.values)):
                names_of.setdefault(index, {})[names[row + number]] = None
        elif page.kind == _DATA and page.encoding == _PLAIN:
            plain.append((page, row))
        elif page.kind == _DATA:
            raise ArchiveError("is packed in a way that is not known here")
        row += page.values if page.kind == _DATA else 0
    for page in pages:
        if page.kind == _DICTIONARY:
            for index, (size, pieces) in enumerate(_values(_Stream(file, page, compression), page.values)):
                own = list(names_of.get(index, ()))
                data = b"".join(pieces) if len(own) > 1 else b""
                for name in own:
                    yield name, (size, iter([data]) if data else pieces)
    for page, row in plain:
        stream = _Stream(file, page, compression)
        stream.skip_levels()
        yield from zip(names[row: row + page.values], _values(stream, page.values), strict=True)


# --- Pages -----------------------------------------------------------------------------------------------------------


def _pages(file: IO[bytes], column: Any) -> Iterator[_Page]:
    """The pages of the column, their bodies unread."""
    at = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    end = at + column.total_compressed_size
    while at < end:
        file.seek(at)
        header = _struct(file)
        facts = header.get({_DATA: 5, _DICTIONARY: 7}.get(header[1], 0), {1: 0, 2: 0})
        yield _Page(header[1], facts[2], facts[1], file.tell(), header[3])
        at = file.tell() + header[3]


def _struct(file: IO[bytes]) -> dict[int, Any]:
    """A struct in the compact protocol: value by the number of its field."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := file.read(1)[0]) != 0:
        number = number + (head >> 4) if head >> 4 else _signed(file)
        fields[number] = _thrift(file, head & 15)
    return fields


def _thrift(file: IO[bytes], kind: int) -> Any:
    if kind in (1, 2):
        return kind == 1
    if kind in (4, 5, 6):
        return _signed(file)
    if kind == 8:
        return file.seek(min(_varint(file), _LARGEST_PAGE), io.SEEK_CUR)  # of no interest, and may be many bytes
    if kind == 12:
        return _struct(file)
    if kind in (3, 7):
        return file.read(1 if kind == 3 else 8)
    raise ArchiveError("holds a page header that is not known here")


def _varint(file: Any) -> int:
    number = shift = 0
    while True:
        byte = file.read(1)[0]
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


def _signed(file: IO[bytes]) -> int:
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)


class _Stream:
    """The unpacked body of a page, read from its beginning on."""

    def __init__(self, file: IO[bytes], page: _Page, compression: str) -> None:
        source = _Body(file, page)
        self._pieces = _unsnapped(source) if compression == "SNAPPY" else iter(lambda: source.read(PIECE_BYTES), b"")
        self._rest = b""

    def pieces(self, size: int) -> Iterator[bytes]:
        while size:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    raise ArchiveError("holds a page that is cut")
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def skip_levels(self) -> None:
        """Which values are there stands before them; all are."""
        for _ in self.pieces(int.from_bytes(self.read(4), "little")):
            pass


class _Body:
    """The packed body of a page; others may move the file's position meanwhile."""

    def __init__(self, file: IO[bytes], page: _Page) -> None:
        self._file, self._at, self._end = file, page.offset, page.offset + page.packed
        self._buffer = io.BytesIO()

    def read(self, size: int) -> bytes:
        """No more than `size` bytes, and none only at the end."""
        data = self._buffer.read(size)
        if data or self._at >= self._end:
            return data
        self._file.seek(self._at)
        block = self._file.read(min(4 * PIECE_BYTES, self._end - self._at))
        self._at += len(block)
        self._buffer = io.BytesIO(block)
        return self._buffer.read(size)

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        while len(data) < size:
            more = self.read(size - len(data))
            if not more:
                raise ArchiveError("holds a page that is cut")
            data += more
        return data


def _values(stream: _Stream, number: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(bytes, their pieces) of each plain value; pieces that nobody took are passed over."""
    for _ in range(number):
        size = int.from_bytes(stream.read(4), "little")
        pieces = stream.pieces(size)
        yield size, pieces
        for _ in pieces:
            pass


def _indices(stream: _Stream) -> Iterator[int]:
    """Places in the dictionary: runs of one value, or bit-packed groups of eight."""
    stream.skip_levels()
    bits = stream.read(1)[0]
    while True:
        head = _varint(stream)
        if head & 1:
            number = 8 * (head >> 1)
            packed = int.from_bytes(stream.read(number * bits // 8), "little")
            yield from ((packed >> (place * bits)) & ((1 << bits) - 1) for place in range(number))
        else:
            yield from itertools.repeat(int.from_bytes(stream.read(-(-bits // 8)), "little"), head >> 1)


def _unsnapped(source: _Body) -> Iterator[bytes]:
    """A block packed by snappy, in pieces: literals, and copies of what came shortly before."""
    left, given, window = _varint(source), 0, bytearray()
    literal = 0  # bytes still to come of one
    while left > 0:
        before = len(window)
        tag = source.exactly(1)[0] if not literal else 0
        if tag & 3:
            _copy(window, tag, source)
        else:
            literal = literal or _size_of_literal(tag >> 2, source)
            window += source.exactly(min(literal, PIECE_BYTES))
            literal -= len(window) - before
        left -= len(window) - before
        if len(window) - given >= PIECE_BYTES or left <= 0:
            yield bytes(window[given:])
            given = len(window)
            if given > 2 * HISTORY_BYTES:
                del window[:-HISTORY_BYTES]
                given = len(window)
    if left:
        raise ArchiveError("holds a page that unpacks to more than it says")


def _size_of_literal(told: int, source: _Body) -> int:
    return 1 + (told if told < 60 else int.from_bytes(source.exactly(told - 59), "little"))


def _copy(window: bytearray, tag: int, source: _Body) -> None:
    if tag & 3 == 1:
        size, offset = 4 + ((tag >> 2) & 7), (tag >> 5 << 8) | source.exactly(1)[0]
    else:
        size, offset = 1 + (tag >> 2), int.from_bytes(source.exactly(2 if tag & 3 == 2 else 4), "little")
    if not 0 < offset <= len(window):
        raise ArchiveError("holds a page that is damaged")
    start = len(window) - offset
    piece = window[start: start + size]
    while len(piece) < size:  # it overlaps with what it makes
        piece += piece[: size - len(piece)]
    window += piece
