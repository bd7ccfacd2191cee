"""Runs side by side: what differs, what exceeds the intervals, on the terminal and as a page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import reports
from tests.evaluation.test_page import HOSTILE, Parsed
from tests.project import ROOT
from tests.refusals import assert_told
from trimodal.arguments import columns_of
from trimodal.evaluation import compare, report
from trimodal.evaluation.phrases import PHRASES

OLD = ROOT / "tests" / "old_run" / "run"


def made(value: float, margin: float | None = 0.05, rate: float = 1e-4, **given: Any) -> dict[str, Any]:
    """A report of a run with two figures, of which more and less is better."""
    low, high = (None, None) if margin is None else (value - margin, value + margin)
    figures = {"stamps": {"image-text": {"text_to_image_R@1": reports.figure(value, 0.01, low, high),
                                         "text_to_image_median_rank": reports.figure(
                                             100 * value, 500.0, low and 100 * low, high and 100 * high)}}}
    config = {"training": {"learning_rate": rate, "seed": 0}, "stages": [{"name": "align", "tasks": [
        {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}, "passes": rate}]}],
              "paths": {"output_dir": str(value)}}
    return reports.composed(reports.run(figures, **{"config": config, **given}), reports.records())


def put(folder: Path, found: dict[str, Any], stamp: str = "20260304_010000") -> Path:
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    path = folder / "reports" / f"report_{stamp}.json"
    path.write_text(json.dumps(found), "utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    put(tmp_path / "a", made(0.2))
    put(tmp_path / "b", made(0.5, rate=2e-4))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_exceeds_the_intervals_is_marked(two: list[str]) -> None:
    runs = compare.read_runs(two)
    marks = {place[2]: [mark for _, mark in cells] for place, cells in compare.figure_rows(runs)}
    assert marks == {"text_to_image_R@1": ["", "▲"], "text_to_image_median_rank": ["", "▼"]}
    turned = {place[2]: cells[1][1] for place, cells in compare.figure_rows(compare.read_runs(two[::-1]))}
    assert turned == {"text_to_image_R@1": "▼", "text_to_image_median_rank": "▲"}


def test_what_lies_within_the_intervals_or_has_none_is_not(tmp_path: Path) -> None:
    for number, found in enumerate((made(0.2), made(0.3), made(0.9, None),
                                    made(0.9, data={"digests": {"test": "other"}}))):
        put(tmp_path / str(number), found)
    runs = compare.read_runs([str(tmp_path / str(number)) for number in range(4)])
    assert {mark for _, cells in compare.figure_rows(runs) for _, mark in cells} == {""}
    assert not compare.evaluated_alike(runs) and compare.evaluated_alike(runs[:3])


def test_settings_that_differ_are_told_and_no_others(two: list[str]) -> None:
    assert compare.differing_settings(compare.read_runs(two)) == [
        ("training.learning_rate", ["0.0001", "0.0002"]), ("stages.align.tasks.image+text.passes",
                                                                     ["0.0001", "0.0002"])]
    assert compare.differing_settings(compare.read_runs([two[0], two[0]])) == []


def test_the_terminal_speaks_the_language_of_the_locale(two: list[str], monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are aligned, though Chinese letters are two wide."""
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert report.main(["compare", *two]) == 0
    told = capsys.readouterr().out
    for key in ("kind_of_training", "settings", "results", "compare_text", "time_and_memory", "time_evaluation"):
        assert PHRASES[key]["zh"] in told and PHRASES[key]["en"] not in told.splitlines(), key
    head, _, *rows = told.split("\n\n")[-1].splitlines()
    at = columns_of(head[:head.rindex("B")])
    assert {columns_of(row[:row.rindex("  ") + 2]) for row in rows} == {at}
    assert report.main(["compare", two[0], two[0]]) == 0
    assert PHRASES["settings_same"]["zh"] in capsys.readouterr().out


def test_the_terminal_shows_all_of_it(two: list[str], monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert report.main(["compare", *two]) == 0
    lines = capsys.readouterr().out.splitlines()
    for expected in (r"training\.learning_rate +0\.0001 +0\.0002", r"stamps  text_to_image_R@1 +0\.2000 \[0\.1500, "
                     r"0\.2500\]  0\.5000 \[0\.4500, 0\.5500\] ▲", r"align  Time +40\.0 s +40\.0 s",
                     r"align  Predicted peak of tensors, GiB +0\.9000 +0\.9000",
                     r"align  Measured of them, GiB +1 +1", r"evaluation at the end +5\.0 s +5\.0 s"):
        assert [line for line in lines if re.fullmatch(expected, line)], expected
    assert PHRASES["compare_other"]["en"] not in lines


def test_a_folder_stands_for_its_newest_training(tmp_path: Path) -> None:
    put(tmp_path / "a", made(0.1))
    put(tmp_path / "a", made(0.2), "20260304_020000")
    evaluated = put(tmp_path / "a", made(0.3, kind="evaluation"), "20260304_030000")
    put(tmp_path / "b", made(0.4, kind="evaluation"))
    given = [str(tmp_path / "a"), str(tmp_path / "b"), str(evaluated), str(tmp_path / "a" / "reports")]
    values = [run.report["evaluation"]["figures"]["stamps"]["image-text"]["text_to_image_R@1"]["value"]
              for run in compare.read_runs(given)]
    assert values == [0.2, 0.4, 0.3, 0.2]


def test_runs_of_any_kind_and_release_stand_beside_each_other(tmp_path: Path) -> None:
    for kind, found in reports.kinds().items():
        put(tmp_path / kind, found)
    runs = compare.read_runs([*(str(tmp_path / kind) for kind in reports.kinds()), str(OLD)])
    for language in ("zh", "en"):
        assert "EER" in (text := compare.as_text(runs, language)) and runs[-1].name in text
        ids = Parsed(compare.as_page(runs, language)).ids()
        assert {"settings", "results", "curves", "time_and_memory"} <= set(ids) and len(ids) == len(set(ids))


def test_the_page_is_written_and_nothing_over_what_is_there(two: list[str], tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "both.html"
    assert report.main(["compare", *two, "--html", str(target)]) == 0
    text = target.read_text("utf-8")
    assert text.count("▲") >= 2 and str(target) in capsys.readouterr().out
    target.write_text("of the user")
    assert report.main(["compare", *two, "--html", str(target)]) == 2
    assert_told(capsys.readouterr().err, "--html", target)
    assert target.read_text() == "of the user"
    assert report.main(["compare", *two, "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert_told(capsys.readouterr().err, "--html", tmp_path / "none" / "x.html")


def test_a_reader_that_has_seen_enough_is_no_error(two: list[str], tmp_path: Path) -> None:
    target = tmp_path / "both.html"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-m", "trimodal.evaluation.report", "compare", *two, "--html", target],
                              cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.stderr, done.returncode) == ("", 141) and target.exists()


@pytest.mark.parametrize("words", HOSTILE)
def test_words_from_outside_stay_words(tmp_path: Path, words: str) -> None:
    pages = []
    for number, told in enumerate(("harmless", words)):
        for letter in "ab":
            put(tmp_path / f"{number}{letter}", made(0.2, command=told, config={told: {"x": told + letter}}))
        runs = compare.read_runs([str(tmp_path / f"{number}{letter}") for letter in "ab"])
        pages.append(Parsed(compare.as_page(runs, "en")))
    assert [tag for tag, _ in pages[0].elements] == [tag for tag, _ in pages[1].elements]


@pytest.mark.parametrize("given", ["one", "nothing", "not json", "no report", "newer"])
def test_mistakes_take_one_line(given: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = other / "report_20260304_010000.json"
    contents = {"not json": "{", "no report": "[]", "newer": json.dumps({**made(0.2), "schema": 9})}
    if given in contents:
        file.write_text(contents[given])
    assert report.main(["compare", two[0], *([] if given == "one" else [str(other)])]) == 2
    assert_told(capsys.readouterr().err, *([] if given == "one" else [file if given in contents else other]))


def test_the_command_runs_and_loads_no_torch(two: list[str]) -> None:
    code = ("import runpy, sys; sys.argv[0] = 'report'\ntry: runpy.run_module('trimodal.evaluation.report', "
            "run_name='__main__')\nfinally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, "compare", *two], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
