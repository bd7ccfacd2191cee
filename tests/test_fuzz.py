"""Damaged files of every kind are read or refused; and the benchmark that says so sees it when they are not."""

import faulthandler
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.damage import MENDED, damaged, whole
from benchmarks.fuzz import Bad, Kind, Reader, format_table, outcome

pytestmark = pytest.mark.timed


def test_damaged_files_are_read_or_refused(all_repetitions: bool) -> None:
    kinds = list(fuzz.KINDS)
    inputs = 400 if all_repetitions else 3 * len(kinds)
    counts, problems = fuzz.fuzz(kinds, inputs, seed=1, timeout_s=120.0)
    assert problems == [], format_table(counts)
    assert sum(found["inputs"] for found in counts.values()) == inputs
    assert counts["checkpoint"]["refused"] == counts["checkpoint"]["inputs"] >= 3


def test_some_damaged_lists_and_settings_are_accepted(all_repetitions: bool) -> None:
    """So many that it does not hang on a word of config.yaml, which the damage is drawn over."""
    counts, problems = fuzz.fuzz(["jsonl", "yaml"], 400 if all_repetitions else 60, seed=1, timeout_s=120.0)
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
    column, said = answer(ValueError("odd"))
    assert column == "crashes" and "ValueError" in said and "'odd'" in said and "test_fuzz.py:" in said


def misbehave(pipe: Connection, folder: str) -> None:
    """Hangs, dies, or answers, as it is told."""
    pipe.send(("ready", ""))
    while True:
        kind, _ = pipe.recv()
        if kind == "hang":
            threading.Event().wait()
        if kind == "die":
            faulthandler.disable()  # pytest's, which would print where
            os.abort()
        pipe.send(("accepted", ""))


def test_a_reader_goes_on_after_a_hang_and_after_a_death(tmp_path: Path) -> None:
    reader = Reader(tmp_path, 60.0, misbehave)
    found = []
    try:
        for kind in ("live", "hang", "live", "die", "live"):
            reader.timeout_s = 0.2 if kind == "hang" else 60.0
            found.append(reader.read(kind, b"")[0])
    finally:
        reader.close()
    assert found == ["accepted", "hangs", "accepted", "crashes", "accepted"]
