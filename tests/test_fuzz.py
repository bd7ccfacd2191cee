"""Damaged files of every kind are read or refused; and the benchmark that says so sees it when they are not."""

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import fuzz
from benchmarks.damage import MENDED, damaged, whole
from benchmarks.fuzz import Bad, Kind, Reader, format_table, outcome


def test_damaged_files_are_read_or_refused() -> None:
    kinds = list(fuzz.KINDS)
    counts, problems = fuzz.fuzz(kinds, 200, seed=1, timeout_s=120.0)
    assert problems == [], format_table(counts)
    assert sum(found["inputs"] for found in counts.values()) == 200
    assert counts["checkpoint"]["refused"] == counts["checkpoint"]["inputs"] > 10


def test_some_damaged_lists_and_settings_are_accepted() -> None:
    """So many that it does not hang on a word of config.yaml, which the damage is drawn over."""
    counts, problems = fuzz.fuzz(["jsonl", "yaml"], 120, seed=1, timeout_s=120.0)
    assert problems == [] and counts["jsonl"]["accepted"] and counts["yaml"]["accepted"], format_table(counts)


def test_damage_is_the_same_for_ever_and_always_some() -> None:
    for kind in ("png", "wav", "jsonl", "yaml"):
        inputs = [damaged(kind, number, 0) for number in range(40)]
        assert inputs == [damaged(kind, number, 0) for number in range(40)]
        assert not set(inputs) & set(whole(kind)) and len(set(inputs)) > 30
        assert inputs != [damaged(kind, number, 1) for number in range(40)]
    for kind, mend in MENDED.items():
        assert [mend(data) for data in whole(kind)] == list(whole(kind))


def answer(error: Exception | None) -> tuple[str, str]:
    def read(path: Path) -> None:
        if error:
            raise error

    fuzz.KINDS["made up"] = Kind(".x", read, LookupError)
    try:
        return outcome("made up", Path("x"))
    finally:
        del fuzz.KINDS["made up"]


def test_outcomes() -> None:
    assert answer(None) == ("accepted", "")
    assert answer(LookupError("no")) == ("refused", "no")
    assert answer(LookupError("two\nlines"))[0] == "bad values"
    assert answer(Bad("nan")) == ("bad values", "nan")
    column, said = answer(ValueError("not what this kind raises"))
    assert column == "crashes" and said.startswith("ValueError: 'not what this kind raises' in test_fuzz.py:")


def misbehave(pipe: Connection, folder: str) -> None:
    """Hangs, dies, or answers, as it is told."""
    pipe.send(("ready", ""))
    while True:
        kind, _ = pipe.recv()
        if kind == "hang":
            time.sleep(1_000)
        if kind == "die":
            os.abort()
        pipe.send(("accepted", ""))


def test_a_reader_goes_on_after_a_hang_and_after_a_death(tmp_path: Path) -> None:
    reader = Reader(tmp_path, 5.0, misbehave)
    try:
        found = [reader.read(kind, b"")[0] for kind in ("live", "hang", "live", "die", "live")]
    finally:
        reader.close()
    assert found == ["accepted", "hangs", "accepted", "crashes", "accepted"]
