"""The verdict: against chance, and against the same recipe's earlier run in the same folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import reports
from trimodal.evaluation import verdict
from trimodal.evaluation.phrases import PHRASES, percent


def of(value: float, low: float | None, high: float | None, chance: float = 0.01, **given: Any) -> dict[str, Any]:
    """A report with one figure."""
    figures = {"stamps": {"image-text": {"text_to_image_R@1": reports.figure(value, chance, low, high)}}}
    return reports.composed(reports.run(figures, **given), [])


@pytest.mark.parametrize(("value", "low", "high", "expected"), [
    (0.25, 0.2, 0.3, "verdict_one"), (0.02, 0.01, 0.04, "verdict_none"), (0.005, 0.0, 0.009, "verdict_none"),
    (0.25, None, None, "verdict_one")])
def test_a_figure_is_better_than_chance_where_its_interval_is(value: float, low: float | None, high: float | None,
                                                              expected: str) -> None:
    for language, text in verdict.sentence(of(value, low, high)).items():
        assert PHRASES[expected][language] in text and percent(value) in text and percent(0.01) in text
        assert PHRASES["earlier_none"][language] in text


def test_less_is_better_for_speakers() -> None:
    assert verdict.above_chance("EER", reports.figure(0.1, 0.5, 0.08, 0.12))
    assert not verdict.above_chance("EER", reports.figure(0.45, 0.5, 0.4, 0.51))
    text = verdict.sentence(reports.kinds()["speakers"])
    assert PHRASES["verdict_one"]["en"] in text["en"] and PHRASES["verdict_EER"]["zh"][:6] in text["zh"]


def test_pairs_that_are_not_better_are_named() -> None:
    figures = {"stamps": {"image-text": reports.pair("image", "text"), "audio-text": reports.pair(
        "audio", "text", value=0.02, low=0.0, high=0.04)}}
    text = verdict.sentence(reports.composed(reports.run(figures), []))
    for language, words in text.items():
        shown, missed = (PHRASES[f"short_text_to_{name}_R@1"][language] for name in ("image", "audio"))
        assert PHRASES["verdict_some"][language].format(shown=shown, missed=missed) in words


def test_without_figures_nothing_is_claimed() -> None:
    assert verdict.sentence(reports.kinds()["nothing"])["en"] == PHRASES["verdict_nothing"]["en"]


# ---- the earlier run ---------------------------------------------------------------------------------------------


def put(folder: Path, hour: int, report: dict[str, Any]) -> str:
    name = f"report_20260304_{hour:02}0000.json"
    (folder / name).write_text(json.dumps({**report, "created": f"2026-03-04T{hour:02}:00:00+00:00"}), "utf-8")
    return name


def test_the_newest_of_the_same_recipe_is_found(tmp_path: Path) -> None:
    now = of(0.5, 0.45, 0.55)
    assert verdict.find_earlier(tmp_path, now) is None
    put(tmp_path, 1, of(0.1, 0.05, 0.15))
    expected = put(tmp_path, 2, of(0.2, 0.15, 0.25, config={
        "training": {"learning_rate": 1e-4, "seed": 7}, "paths": {"output_dir": "elsewhere"},
        "memory": {"budget_gb": 4}}))
    put(tmp_path, 3, of(0.3, 0.25, 0.35, config={"training": {"learning_rate": 2e-4, "seed": 0}}))
    put(tmp_path, 4, of(0.3, 0.25, 0.35, kind="evaluation"))
    for name in ("report_20260304_050000.json", "report_20260304_060000.json"):
        (tmp_path / name).write_text("[1, 2" if "05" in name else "[]", "utf-8")  # damaged; of somebody else
    found = verdict.find_earlier(tmp_path, now)
    assert found is not None
    assert found["file"] == expected and found["same_samples"] and found["compared"] == 1
    assert found["differences"] == [{"set": "stamps", "pair": "image-text", "metric": "text_to_image_R@1",
                                     "before": 0.2, "after": 0.5, "is_better": True}]
    text = verdict.sentence({**now, "earlier": found})
    assert PHRASES["earlier_differs"]["en"].format(when="2026-03-04 02:00", better=1, compared=1, worse=0) in text["en"]


def test_intervals_that_touch_are_no_difference(tmp_path: Path) -> None:
    put(tmp_path, 1, of(0.4, 0.35, 0.45))
    now = of(0.5, 0.45, 0.55)
    found = verdict.find_earlier(tmp_path, now)
    assert found is not None and found["compared"] == 1 and found["differences"] == []
    words = PHRASES["earlier_same"]["zh"].format(when="2026-03-04 01:00", compared=1)
    assert words in verdict.sentence({**now, "earlier": found})["zh"]


def test_less_is_better_in_a_comparison_too(tmp_path: Path) -> None:
    before, after = ({"voxceleb": {"speakers": {"EER": reports.figure(value, 0.5, value - 0.01, value + 0.01)}}}
                     for value in (0.2, 0.1))
    _, [found] = verdict.differences(*(reports.composed(reports.run(figures), []) for figures in (before, after)))
    assert found.is_better


def test_other_samples_are_not_compared(tmp_path: Path) -> None:
    put(tmp_path, 1, of(0.1, 0.05, 0.15, data={"digests": {"test": "other"}}))
    found = verdict.find_earlier(tmp_path, of(0.5, 0.45, 0.55))
    assert found is not None and not found["same_samples"] and found["differences"] == []


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    """Its report can have been written before."""
    now = reports.composed(reports.run(), reports.records())
    put(tmp_path, 1, now)
    assert verdict.find_earlier(tmp_path, now) is None
