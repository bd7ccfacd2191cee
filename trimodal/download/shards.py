"""Parquet shards of sounds, read in little memory. The mirror puts all sounds of a shard, a hundred megabytes, into one
page, which the usual reader holds several times over: here such a page is unpacked piece by piece.

A page is a header (a struct in Thrift's compact protocol) and a body; see github.com/apache/parquet-format. What is
packed in other ways than the usual ones goes through the usual reader. A few kilobytes may unpack to gigabytes: nothing
is read whole before the headers of its pages have shown that it is small.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trimodal.download.members import ArchiveError, Member
from trimodal.errors import UserError

COLUMN = "audio.bytes"
PIECE_BYTES = 1 << 16
HISTORY_BYTES = 1 << 21  # that a copy may reach back; packers use 64 KiB
ROWS = 10_000  # of a shard; those of the mirror have 110
NAME_BYTES = 1 << 20  # of one column of names or starts; 11 letters a row
NAME_LETTERS = 100
SOUND_BYTES = 32 << 20  # of one sound: 10 seconds, 8 channels of 96 kHz and 32 bits; those of the mirror have 0.4 MB
USUAL_BYTES = 32 << 20  # of a group of rows; the usual reader holds a page several times over
FOOTER_BYTES = 1 << 20  # which the usual reader takes whole; those of the mirror have a few kilobytes
HEADER_BYTES = 1 << 16  # of a page; values in it are passed over
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # types of pages
_LARGEST_PAGE = 1 << 31
_PLAIN, _INDICES, _DELTA_OF_BYTES = 0, (2, 8), 7  # encodings; by the last one n bytes may stand for n squared
DAMAGE = (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError)
_SOUND_MAGIC = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}


@dataclass(frozen=True, slots=True)
class Page:
    kind: int
    encoding: int
    values: int
    offset: int  # of the body
    packed: int  # bytes
    unpacked: int = 0  # bytes


def members(path: Path) -> Iterator[Member]:
    """One sound a clip, as YOUTUBEID_START.EXT; a clip of val and test has five rows."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path.name}: sounds in parquet files need the package pyarrow; run: "
                        "pip install pyarrow") from None
    seen: set[str] = set()
    rows = 0
    try:
        _check_footer(path)
        with parquet.ParquetFile(path, pre_buffer=False) as table, path.open("rb") as file:
            for group in range(table.metadata.num_row_groups):
                names = _names(table, group, file)
                rows += len(names)
                _check_rows(rows)
                yield from _sounds(table, group, file, names, seen)
    except (pyarrow.ArrowException, *DAMAGE) as error:
        raise ArchiveError(f"is not a readable shard of sounds ({type(error).__name__})") from None


def _check_footer(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), io.SEEK_END)
        if int.from_bytes(file.read(4), "little") > FOOTER_BYTES:
            raise ArchiveError("is not a readable shard of sounds: its list of contents is beyond all measure")


def _names(table: Any, group: int, file: IO[bytes]) -> list[str]:
    """YOUTUBEID_START of each row."""
    columns = ["youtube_id", "start_time"]
    for name in columns:
        column = _column(table.metadata.row_group(group), name)
        _check_size(column, pages_of(file, column), NAME_BYTES)
    batches = table.iter_batches(batch_size=16, row_groups=[group], columns=columns, use_threads=False)
    return [_name(row["youtube_id"], row["start_time"]) for batch in batches for row in batch.to_pylist()]


def _name(video: str, start: Any) -> str:
    if len(video) > NAME_LETTERS:
        raise ArchiveError("holds a name that is none of YouTube's")
    if isinstance(start, str) and len(start) > NAME_LETTERS:
        raise ArchiveError("holds a start that is not a start")
    return f"{video}_{int(float(start))}"


def _column(facts: Any, path: str) -> Any:
    return next(column for column in map(facts.column, range(facts.num_columns)) if column.path_in_schema == path)


def _check_rows(rows: int) -> None:
    if rows > ROWS:
        raise ArchiveError(f"holds {rows:,} rows or more: not what is expected here")


def _check_size(column: Any, pages: Iterable[Page], most: int) -> None:
    """Before the usual reader takes it whole. Metadata may lie, and so the pages are looked at as well."""
    _check_rows(column.num_values)
    unpacked = 0
    for page in pages:
        unpacked += page.unpacked
        if page.encoding == _DELTA_OF_BYTES:
            raise ArchiveError("is packed in a way that is not known here")
    if max(unpacked, column.total_compressed_size) > most:
        raise ArchiveError(f"holds {unpacked:,} bytes in {column.path_in_schema}: not what is expected here")


def _sounds(table: Any, group: int, file: IO[bytes], names: list[str], seen: set[str]) -> Iterator[Member]:
    facts = table.metadata.row_group(group)
    column = _column(facts, COLUMN)
    levels = next(one for one in map(table.schema.column, range(facts.num_columns)) if one.path == COLUMN)
    pages = list(pages_of(file, column))
    if not _is_usual(column, levels) or any(page.kind not in (_DATA, _DICTIONARY) for page in pages):
        _check_size(column, pages, USUAL_BYTES)
        batches = table.iter_batches(batch_size=1, row_groups=[group], columns=[COLUMN], use_threads=False)
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


def _named(file: IO[bytes], pages: list[Page], compression: str,
           names: list[str]) -> Iterator[tuple[str, tuple[int, Iterator[bytes]]]]:
    """(name, (bytes, their pieces)) of each value, in the order in which they lie in the file. A value that several
    rows share stands in the dictionary once: rows of one clip, or clips of the very same sound."""
    names_of: dict[int, dict[str, None]] = {}
    row, plain = 0, []
    for page in pages:
        if page.kind == _DATA and page.encoding in _INDICES:
            for number, index in enumerate(indices(Stream(file, page, compression), page.values)):
                names_of.setdefault(index, {})[names[row + number]] = None
        elif page.kind == _DATA and page.encoding == _PLAIN:
            plain.append((page, row))
        elif page.kind == _DATA:
            raise ArchiveError("is packed in a way that is not known here")
        row += page.values if page.kind == _DATA else 0
    for page in pages:
        if page.kind == _DICTIONARY:
            for index, (size, pieces) in enumerate(_values(Stream(file, page, compression), page.values)):
                own = list(names_of.get(index, ()))
                data = b"".join(pieces) if len(own) > 1 else b""
                for name in own:
                    yield name, (size, iter([data]) if data else pieces)
    for page, row in plain:
        stream = Stream(file, page, compression)
        stream.skip_levels()
        yield from zip(names[row: row + page.values], _values(stream, page.values), strict=True)


# --- Pages -----------------------------------------------------------------------------------------------------------


def pages_of(file: IO[bytes], column: Any) -> Iterator[Page]:
    """The pages of the column, their bodies unread."""
    at = column.data_page_offset
    if column.has_dictionary_page:
        at = min(at, column.dictionary_page_offset or at)
    end = at + column.total_compressed_size
    for number in itertools.count():
        if at >= end:
            return
        file.seek(at)
        header = struct_of(Header(file))
        page = _page(header, file.tell())
        if number > ROWS or page.values not in range(ROWS + 1) or min(page.packed, page.unpacked) < 0:
            raise ArchiveError("holds a page header that is damaged, or more rows than are expected here")
        yield page
        at = page.offset + page.packed


def _page(header: dict[int, Any], offset: int) -> Page:
    facts = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(header[1], 0), {1: 0, 2: 0, 4: 0})
    return Page(header[1], facts[4 if header[1] == _DATA_2 else 2], facts[1], offset, header[3], header[2])


class Header:
    """The file, of which a header may take HEADER_BYTES."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, HEADER_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise ArchiveError("holds a page header beyond all measure")
        return self._file.read(size)

    def seek(self, offset: int, whence: int) -> int:
        return self._file.seek(offset, whence)


def struct_of(file: Header | IO[bytes]) -> dict[int, Any]:
    """A struct in the compact protocol: value by the number of its field."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := file.read(1)[0]) != 0:
        number = number + (head >> 4) if head >> 4 else _signed(file)
        fields[number] = _thrift(file, head & 15)
    return fields


def _thrift(file: Header | IO[bytes], kind: int) -> Any:
    if kind in (1, 2):
        return kind == 1
    if kind in (4, 5, 6):
        return _signed(file)
    if kind == 8:
        return file.seek(min(varint(file), _LARGEST_PAGE), io.SEEK_CUR)  # of no interest, and may be many bytes
    if kind == 12:
        return struct_of(file)
    if kind in (3, 7):
        return file.read(1 if kind == 3 else 8)
    raise ArchiveError("holds a page header that is not known here")


def varint(file: Any) -> int:
    """An unsigned number of 64 bits, seven of them a byte."""
    number = 0
    for shift in range(0, 70, 7):  # 64 bits take ten bytes
        byte = file.read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ArchiveError("holds a number that is damaged")


def _signed(file: Header | IO[bytes]) -> int:
    number = varint(file)
    return (number >> 1) ^ -(number & 1)


class Stream:
    """The unpacked body of a page, read from its beginning on."""

    def __init__(self, file: IO[bytes], page: Page, compression: str) -> None:
        source = Body(file, page)
        self._pieces = unsnapped(source) if compression == "SNAPPY" else iter(lambda: source.read(PIECE_BYTES), b"")
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


class Body:
    """The packed body of a page; others may move the file's position meanwhile."""

    def __init__(self, file: IO[bytes], page: Page) -> None:
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


def _values(stream: Stream, number: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(bytes, their pieces) of each plain value; pieces that nobody took are passed over."""
    for _ in range(number):
        size = int.from_bytes(stream.read(4), "little")
        if size > SOUND_BYTES:
            raise ArchiveError(f"holds a sound of {size:,} bytes: not what is expected here")
        pieces = stream.pieces(size)
        yield size, pieces
        for _ in pieces:
            pass


def indices(stream: Stream, values: int) -> Iterator[int]:
    """Places in the dictionary: runs of one value, or bit-packed groups of eight."""
    stream.skip_levels()
    bits = stream.read(1)[0]
    while values > 0:
        head = varint(stream)
        number = min(head >> 1, values)
        if head & 1:
            number = min(8 * (head >> 1), values)  # the last group is filled up, whatever it claims
            packed = int.from_bytes(stream.read(-(-number // 8) * bits), "little")
            yield from ((packed >> (place * bits)) & ((1 << bits) - 1) for place in range(number))
        else:
            yield from itertools.repeat(int.from_bytes(stream.read(-(-bits // 8)), "little"), number)
        values -= number


def unsnapped(source: Body) -> Iterator[bytes]:
    """A block packed by snappy, in pieces: literals, and copies of what came shortly before."""
    left, given, window = varint(source), 0, bytearray()
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


def _size_of_literal(told: int, source: Body) -> int:
    return 1 + (told if told < 60 else int.from_bytes(source.exactly(told - 59), "little"))


def _copy(window: bytearray, tag: int, source: Body) -> None:
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
