"""Recorded figures: what is measured replaces the record of its key alone, and what fails replaces nothing."""

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.run import CannotMeasure, Figure

FIELDS = {"median", "low", "high", "runs", "limit", "command", "hardware", "commit", "date"}


def test_every_record_belongs_to_a_figure_and_is_whole() -> None:
    found = run.read()
    assert found.keys() <= run.FIGURES.keys()
    for key, one in found.items():
        assert one.keys() - {"at_least"} == FIELDS
        assert one["low"] <= one["median"] <= one["high"] and one["runs"] >= 1
        assert one["limit"] == run.FIGURES[key].limit and one.get("at_least") == run.FIGURES[key].at_least
        assert one["command"].endswith(key)


def test_a_measurement_gives_the_records_of_all_its_keys_and_touches_no_other(tmp_path: Path) -> None:
    records, values = tmp_path / "records.json", iter([5.0, 1.0, 3.0, 9.0])
    records.write_text(json.dumps({"old": {"median": 7}}), "utf-8")

    def both() -> dict[str, float]:
        value = next(values)
        return {"a": value, "b": 10 * value}

    figures = {"a": Figure(4.0, both), "b": Figure(None, both), "c": Figure(None, lambda: {"c": 0.0})}
    assert run.measure(["a", "b"], figures, records) == []
    found = run.read(records)
    assert found["old"] == {"median": 7} and found.keys() == {"old", "a", "b"}
    assert [found["a"][name] for name in ("low", "median", "high", "runs", "limit")] == [1.0, 3.0, 5.0, 3, 4.0]
    assert found["b"]["median"] == 30.0 and found["b"]["limit"] is None
    assert found["a"].keys() == FIELDS


def test_a_figure_that_must_not_be_too_small_says_so_in_its_record(tmp_path: Path) -> None:
    figures = {"ratio": Figure(None, lambda: {"ratio": 1.5}, at_least=1.4)}
    assert run.measure(["ratio"], figures, tmp_path / "records.json") == []
    one = run.read(tmp_path / "records.json")["ratio"]
    assert one["at_least"] == 1.4 and one["limit"] is None and one.keys() == FIELDS | {"at_least"}


def test_what_cannot_be_measured_keeps_its_earlier_record(tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    run.write({"amx_only": {"median": 2.0}}, records)

    def here() -> dict[str, float]:
        raise CannotMeasure("this CPU has no AMX")

    [problem] = run.measure(["amx_only"], {"amx_only": Figure(None, here)}, records)
    assert "amx_only" in problem and run.read(records) == {"amx_only": {"median": 2.0}}


def test_an_unknown_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["no_such_key"]) == 2
    told = capsys.readouterr().err
    assert "no_such_key" in told and all(key in told for key in run.FIGURES)
