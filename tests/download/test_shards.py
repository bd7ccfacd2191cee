"""Parquet shards of sounds, however they are packed: the same clips, in little memory."""

import io
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.project import ROOT
from tests.refusals import assert_names, refused
from trimodal.download import shards
from trimodal.download.members import ArchiveError


def sound(number: int, size: int = 3_000) -> bytes:
    """Noise as FLAC has it, or a wave that packs well."""
    if number % 3:
        return b"fLaC" + random.Random(number).randbytes(size)
    return b"RIFF" + bytes(itertools.islice(itertools.cycle((*range(200), *range(200, 0, -3))), size))


def write(path: Path, clips: list[int], **settings: Any) -> dict[str, bytes]:
    """A shard of these clips, some of them several times; returns what should come out of it."""
    rows = [{"audiocap_id": i, "youtube_id": f"-id{number:06d}", "start_time": 30, "caption": "x",
             "audio": {"bytes": sound(number), "path": None}} for i, number in enumerate(clips)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return {f"-id{number:06d}_30.{'flac' if number % 3 else 'wav'}": sound(number) for number in clips}


def read(path: Path) -> dict[str, bytes]:
    found = {}
    for member in shards.members(path):
        assert member.name not in found
        found[member.name] = b"".join(member.chunks())
        assert len(found[member.name]) == member.size
    return found


FIVE_EACH = [number for number in range(12) for _ in range(5)]


@pytest.mark.parametrize("clips", [list(range(40)), FIVE_EACH, [3, 1, 3, 2, 1, 3]], ids=["once", "five", "mixed"])
@pytest.mark.parametrize("settings", [
    {}, {"compression": "NONE"}, {"use_dictionary": False}, {"use_dictionary": False, "compression": "NONE"},
    {"row_group_size": 7}, {"compression": "GZIP"}, {"compression": "ZSTD"}, {"data_page_version": "2.0"},
    {"write_statistics": False}, {"data_page_size": 10_000, "write_batch_size": 4, "dictionary_pagesize_limit": 20_000},
], ids=str)
def test_clips_come_out_once_whatever_the_packing(tmp_path: Path, clips: list[int], settings: dict[str, Any]) -> None:
    expected = write(tmp_path / "a.parquet", clips, **settings)
    assert read(tmp_path / "a.parquet") == expected


def test_the_usual_packing_is_not_left_to_the_usual_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "a.parquet", FIVE_EACH)
    batches = pyarrow.parquet.ParquetFile.iter_batches

    def names_only(self: Any, *, columns: list[str], **settings: Any) -> Any:
        assert columns == ["youtube_id", "start_time"]
        return batches(self, columns=columns, **settings)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", names_only)
    assert read(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize("clips", [list(range(9)), FIVE_EACH], ids=["once", "five"])
def test_columns_that_are_never_empty_have_no_levels_to_skip(tmp_path: Path, clips: list[int]) -> None:
    expected = write(tmp_path / "a.parquet", clips)
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    sounds = pyarrow.struct([pyarrow.field("bytes", pyarrow.binary(), nullable=False),
                             pyarrow.field("path", pyarrow.string())])
    schema = pyarrow.schema([pyarrow.field("audio", sounds, nullable=False) if field.name == "audio" else field
                             for field in table.schema])
    strict = pyarrow.Table.from_pylist(table.to_pylist(), schema=schema)
    pyarrow.parquet.write_table(strict, tmp_path / "b.parquet")
    column = pyarrow.parquet.ParquetFile(tmp_path / "b.parquet").schema.column(4)
    assert (column.path, column.max_definition_level) == (shards.COLUMN, 0)
    assert read(tmp_path / "b.parquet") == expected


def test_a_sound_begins_where_a_piece_ends(tmp_path: Path) -> None:
    for short in range(40):
        sizes = (shards.PIECE_BYTES - 20 - short, 50)
        rows = [{"youtube_id": f"id{size}", "start_time": 1, "audio": {"bytes": b"fLaC" + bytes(size), "path": None}}
                for size in sizes]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="NONE",
                                    use_dictionary=False)
        assert {len(data) for data in read(tmp_path / "a.parquet").values()} == {size + 4 for size in sizes}


def test_sounds_that_nobody_takes_are_passed_over(tmp_path: Path) -> None:
    expected = write(tmp_path / "a.parquet", list(range(9)))
    found = {member.name: b"".join(member.chunks()) for i, member in enumerate(shards.members(tmp_path / "a.parquet"))
             if i % 2}
    assert len(found) == 4 and found.items() <= expected.items()


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95])
def test_damage_is_told_or_does_not_matter(tmp_path: Path, place: float) -> None:
    """One byte is another: the clips are told apart, or it is an error of one kind."""
    write(tmp_path / "a.parquet", list(range(30)))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    for shift in range(0, 400, 37):
        at = int(len(data) * place) + shift
        if at < len(data):
            changed = bytes(data[:at]) + bytes([data[at] ^ 0xA5]) + bytes(data[at + 1:])
            (tmp_path / "b.parquet").write_bytes(changed)
            try:
                read(tmp_path / "b.parquet")
            except ArchiveError as error:
                assert "\n" not in str(error)


def test_a_sound_of_an_unknown_format_and_a_missing_one_are_errors(tmp_path: Path) -> None:
    for data, named in ((b"what", ("b_1",)), (None, ())):
        table = pyarrow.Table.from_pylist([
            {"youtube_id": "a", "start_time": 1, "audio": {"bytes": b"fLaC1", "path": "x"}},
            {"youtube_id": "b", "start_time": 1, "audio": {"bytes": data, "path": "x"}}])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with refused(*named, error=ArchiveError):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("start", [30, 30.0, "30"])
def test_a_start_is_whole_seconds_whatever_its_type(tmp_path: Path, start: object) -> None:
    rows = [{"youtube_id": "a", "start_time": start, "audio": {"bytes": b"fLaC1", "path": "x"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == {"a_30.flac": b"fLaC1"}


# --- Memory ----------------------------------------------------------------------------------------------------------

# Reads each shard that it is told in a child of its own, which begins with the libraries loaded and nothing else.
MEASURE = """
import json, os, pathlib, sys, pyarrow.parquet
from trimodal.download import shards
from trimodal.download.members import ArchiveError

def most_kb():
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))

def measure(small, path):
    for member in shards.members(pathlib.Path(small)):  # what is loaded only now is not the shard's
        b"".join(member.chunks())
    before, size, error = most_kb(), 0, ""
    try:
        for member in shards.members(pathlib.Path(path)):
            size += sum(map(len, member.chunks()))
    except ArchiveError as refused:
        error = str(refused)
    print(json.dumps([size, 1024 * (most_kb() - before), error]), flush=True)

for line in sys.stdin:
    if not (child := os.fork()):
        measure(sys.argv[1], line.strip())
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    small = tmp_path_factory.mktemp("small") / "a.parquet"
    write(small, FIVE_EACH)
    with subprocess.Popen([sys.executable, "-c", MEASURE, str(small)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def measured(reader: "subprocess.Popen[str]", path: Path) -> tuple[int, int, str]:
    """(bytes that came out, bytes that the process grew by, error) of a process that reads a shard."""
    assert reader.stdin and reader.stdout
    print(path, file=reader.stdin, flush=True)
    size, grown, error = json.loads(reader.stdout.readline())
    return size, grown, error


@pytest.mark.parametrize("compression", ["SNAPPY", "NONE"])
def test_a_large_shard_takes_little_memory(reader: "subprocess.Popen[str]", tmp_path: Path, compression: str) -> None:
    """50 MB in one page: what the process holds above the libraries is a few megabytes."""
    block = random.Random(0).randbytes(1_000_000)
    rows = [{"youtube_id": f"id{i}", "start_time": 1, "audio": {"bytes": b"fLaC" + bytes([i]) + block, "path": None}}
            for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression=compression)
    size, grown, _ = measured(reader, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").unlink()
    assert size == 50 * 1_000_005 and grown < size / 2


def test_the_largest_that_is_left_to_the_usual_reader_takes_little_memory(reader: "subprocess.Popen[str]",
                                                                          tmp_path: Path) -> None:
    rows = [{"youtube_id": f"id{i}", "start_time": 1, "audio": {"bytes": b"fLaC" + sound(3, 3_300_000), "path": None}}
            for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="ZSTD",
                                use_dictionary=False)
    size, grown, error = measured(reader, tmp_path / "a.parquet")
    assert 33_000_000 < size < shards.USUAL_BYTES, error
    assert grown < 4 * shards.USUAL_BYTES


# --- Shards that nobody should unpack --------------------------------------------------------------------------------


def table_of(rows: int, **columns: Any) -> Any:
    """`rows` rows alike, whose values are held once."""
    kept = pyarrow.array([0] * rows, pyarrow.int32())

    def repeated(value: Any) -> Any:
        return pyarrow.DictionaryArray.from_arrays(kept, pyarrow.array([value]))

    sound = {"bytes": repeated(columns.pop("bytes", b"fLaC1234")), "path": repeated(columns.pop("path", ""))}
    row = {"audiocap_id": 0, "youtube_id": "abcdefghijk", "start_time": 30, **columns}
    alike = {name: repeated(value) if isinstance(value, str) else pyarrow.array([value] * rows)
             for name, value in row.items()}
    return pyarrow.table({**alike, "audio": pyarrow.StructArray.from_arrays(list(sound.values()), list(sound))})


LONG = 6 * shards.NAME_BYTES // 10
LARGE = shards.USUAL_BYTES + 8_000_000
BOMBS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {  # what is in it, how it is packed, what is named
    "rows": (lambda: table_of(600_000), {"row_group_size": 600_000}, ("600,000",)),
    "groups": (lambda: table_of(30_000), {"row_group_size": 5_000}, ("15,000",)),
    "a name": (lambda: table_of(1, youtube_id="x" * LARGE), {"compression": "ZSTD"}, ("youtube_id",)),
    "names": (lambda: table_of(200, youtube_id="x" * LONG), {"compression": "ZSTD"}, ("name",)),
    "starts": (lambda: table_of(200, start_time="0" * LONG), {"compression": "ZSTD"}, ("start",)),
    "prefixes": (lambda: table_of(200, youtube_id="x" * LONG), {
        "use_dictionary": False, "column_encoding": {"youtube_id": "DELTA_BYTE_ARRAY"}}, ()),
    "packed": (lambda: table_of(1, bytes=b"fLaC" + bytes(LARGE)), {"compression": "ZSTD"}, (shards.COLUMN,)),
    "path": (lambda: table_of(5, path="x" * LARGE), {"compression": "ZSTD"}, ()),
    "shared": (lambda: table_of(5, bytes=b"fLaC" + bytes(LARGE)), {}, (f"{LARGE + 4:,}",)),
    "columns": (lambda: table_of(1, **{f"{i:0400d}": 0 for i in range(3_000)}), {}, ()),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_cannot_take_much_memory(reader: "subprocess.Popen[str]", tmp_path: Path, bomb: str) -> None:
    make, settings, named = BOMBS[bomb]
    pyarrow.parquet.write_table(make(), tmp_path / "a.parquet", store_schema=False, **settings)
    assert (tmp_path / "a.parquet").stat().st_size < 5_000_000
    _, grown, error = measured(reader, tmp_path / "a.parquet")
    assert bool(error) == (bomb != "path"), error
    if named:
        assert_names(error, *named)
    assert grown < 60_000_000


def test_numbers_and_headers_have_an_end(tmp_path: Path) -> None:
    """What costs time by the square of its length, or goes back to where it began."""
    with refused(error=ArchiveError):
        shards.varint(io.BytesIO(b"\xff" * 10 + b"\0"))
    assert shards.varint(io.BytesIO(b"\xff" * 9 + b"\1")) == (1 << 64) - 1
    with refused(error=ArchiveError):
        shards.struct_of(shards.Header(io.BytesIO(b"\x15\2" * 50_000)))
    for packed in (-12, 1):  # back, and on and on
        path = tmp_path / "pages"
        header = b"\x15\0\x15\0\x15" + varint(2 * packed if packed > 0 else -2 * packed - 1)
        path.write_bytes((header + b"\x2c\x15\2\x15\0\0\0" + b"x") * 20_000)
        column = SimpleNamespace(data_page_offset=0, has_dictionary_page=False, total_compressed_size=1 << 40)
        with path.open("rb") as file, refused(error=ArchiveError):
            list(shards.pages_of(file, column))


def test_indices_are_as_many_as_there_are_values() -> None:
    for head in (1 << 60, (1 << 60) + 1):  # a run, and groups of eight
        body = (0).to_bytes(4, "little") + b"\3" + varint(head) + b"\2" + bytes(99)
        stream = shards.Stream(io.BytesIO(body), shards.Page(0, 0, 0, 0, len(body)), "UNCOMPRESSED")
        assert list(shards.indices(stream, 3)) == [2, 2, 2] if head % 2 == 0 else [2, 0, 0]


# --- Blocks packed by snappy, as no packer of ours makes them --------------------------------------------------------


def varint(number: int) -> bytes:
    return bytes([number & 127 | (128 if number > 127 else 0)]) + (varint(number >> 7) if number > 127 else b"")


def literal(data: bytes) -> bytes:
    number = len(data) - 1
    more = b"" if number < 60 else number.to_bytes((number.bit_length() + 7) // 8, "little")
    return bytes([(59 + len(more) if more else number) << 2]) + more + data


def copied(size: int, offset: int, width: int) -> bytes:
    """`size` bytes again, from `offset` before; told in 1, 2 or 4 bytes."""
    if width == 1:
        return bytes([1 | (size - 4) << 2 | offset >> 8 << 5, offset & 255])
    return bytes([(2 if width == 2 else 3) | (size - 1) << 2]) + offset.to_bytes(width, "little")


def unpacked(block: bytes) -> bytes:
    page = shards.Page(0, 0, 0, 2, len(block))
    return b"".join(shards.unsnapped(shards.Body(io.BytesIO(b"??" + block + b"??"), page)))


def test_blocks_of_any_make_unpack_as_by_the_library() -> None:
    draw = random.Random(5)
    for _ in range(6):
        body, total = b"", 0
        while len(body) < 200_000:
            width = draw.choice((0, 0, 1, 2, 4)) if total > 70_000 else 0
            size = draw.randint(4, 11 if width == 1 else 64) if width else draw.choice((1, 5, 60, 61, 256, 257, 70_000))
            farthest = min(total, {1: 2047, 2: 65_535, 4: 1_000_000}.get(width, 0))
            offset = draw.choice((draw.randint(1, max(1, farthest)), draw.randint(1, 9)))
            body += copied(size, offset, width) if width else literal(draw.randbytes(size))
            total += size
        block = varint(total) + body
        assert unpacked(block) == pyarrow.Codec("snappy").decompress(block, total, asbytes=True)


def test_a_long_literal_is_given_in_pieces() -> None:
    body = literal(bytes(5_000_000))
    page = shards.Page(0, 0, 0, 0, 4 + len(body))
    pieces = shards.unsnapped(shards.Body(io.BytesIO(varint(5_000_000) + body), page))
    assert max(map(len, pieces)) <= 2 * shards.PIECE_BYTES


def test_copies_reach_back_as_far_as_is_kept() -> None:
    """A history is dropped only beyond what a copy may reach."""
    noise = random.Random(1).randbytes(2 * shards.HISTORY_BYTES + 150_000)
    body = b"".join(literal(noise[at: at + 100_000]) for at in range(0, len(noise), 100_000))
    body += copied(64, shards.HISTORY_BYTES - 200_000, 4)
    found = unpacked(varint(len(noise) + 64) + body)
    start = len(noise) - (shards.HISTORY_BYTES - 200_000)
    assert found == noise + noise[start: start + 64]


@pytest.mark.parametrize("body", [
    literal(b"abcd") + copied(4, 5, 2), literal(b"abcd") + copied(4, 0, 2), literal(b"abcd") + copied(9, 1, 2),
    literal(b"abcd"), literal(b"abcd")[:-1], literal(b"abcd") + copied(4, 1, 4)[:-1],
], ids=["before the beginning", "from where it is", "more than told", "less than told", "a cut literal", "a cut copy"])
def test_damaged_blocks_are_told(body: bytes) -> None:
    with refused(error=ArchiveError):
        unpacked(varint(8) + body)


def test_fields_of_a_header_may_be_far_apart() -> None:
    header = bytes([0x15, 0x08, 0x05]) + varint(200) + bytes([0x06, 0x18, 0x03]) + b"abc" + bytes([0x15, 0x02, 0])
    found = shards.struct_of(io.BytesIO(header))
    assert (found[1], found[100], found[102]) == (4, 3, 1)


@pytest.mark.parametrize("header", [b"", b"\x15", b"\x19\x00", b"\x1c" * 3000, b"\x18" + varint(1 << 45),
                                    b"\x18" + varint(1 << 70)])
def test_damaged_headers_are_told(tmp_path: Path, header: bytes) -> None:
    """All that they raise is one of what a reader of shards takes for damage."""
    (tmp_path / "header").write_bytes(header)
    with (tmp_path / "header").open("rb") as file, pytest.raises((*shards.DAMAGE, ArchiveError)):
        shards.struct_of(file)
