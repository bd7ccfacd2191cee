"""Parquet shards of sounds, however they are packed: the same clips, in little memory."""

import itertools
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import shards
from members import ArchiveError

ROOT = Path(__file__).resolve().parent.parent


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
    monkeypatch.delattr(pyarrow.parquet.ParquetFile, "iter_batches")
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
    for data, said in ((b"what", "unknown format"), (None, "not a readable shard")):
        table = pyarrow.Table.from_pylist([
            {"youtube_id": "a", "start_time": 1, "audio": {"bytes": b"fLaC1", "path": "x"}},
            {"youtube_id": "b", "start_time": 1, "audio": {"bytes": data, "path": "x"}}])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ArchiveError, match=said):
            read(tmp_path / "a.parquet")


def test_a_large_shard_takes_little_memory(tmp_path: Path) -> None:
    """120 MB in one page: what the process holds above the libraries is a few megabytes."""
    block = random.Random(0).randbytes(1_000_000)
    rows = [{"youtube_id": f"id{i}", "start_time": 1, "audio": {"bytes": b"fLaC" + bytes([i]) + block, "path": None}}
            for i in range(120)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    code = ("import pathlib, resource, sys, shards, pyarrow.parquet\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "size = sum(len(p) for m in shards.members(pathlib.Path(sys.argv[1])) for p in m.chunks())\n"
            "print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    output = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout
    size, grown_kb = map(int, output.split())
    assert size == 120 * 1_000_005 and grown_kb < 60_000, f"{grown_kb} KB; {resource.getpagesize()}"
