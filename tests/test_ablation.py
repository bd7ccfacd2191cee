"""The benchmark of ways of learning: what it compares, how it chooses, and the folds of older trees."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from trimodal.config import load_config
from trimodal.sets.reading import draw_fold, draw_splits


def row(option: str, seed: int, value: float, name: str = "stamps") -> dict[str, Any]:
    return {"set": name, "option": option, "seed": seed,
            "figures": {"image-text": value, "audio-text": value + 0.2}}


def test_every_option_is_a_recipe_that_can_be_trained() -> None:
    for name, recipe in ablation.RECIPES.items():
        for option in ablation.names_of(name):
            config = load_config(ablation.ROOT / "recipes" / f"{recipe}.yaml",
                                 [*ablation.USUAL[name], *ablation.OPTIONS[option]])
            assert config.stages[-1].name == ablation.LAST
    assert set(ablation.ONLY) <= set(ablation.OPTIONS)


def test_an_option_is_compared_with_the_recipe_of_the_same_set_and_seed() -> None:
    rows = [row("recipe", 0, 0.3), row("recipe", 0, 0.6, "synthetic"), row("adamw", 0, 0.2),
            row("adamw", 0, 0.4, "synthetic"), row("sigmoid", 0, 0.5), row("less pretraining", 0, 0.4)]
    gains = ablation.gains(rows, (0,), ablation.SCREENED)
    assert list(gains) == ["less pretraining", "recipe", "adamw"], "sigmoid lacks a run"
    assert [round(gain, 6) for gain, in gains.values()] == [0.1, 0.0, -0.15]
    assert ablation.finalists(rows) == ["recipe", "less pretraining", "adamw"]
    assert ablation.gains(rows) == {}, "no run of other seeds and of emoji"
    rows += [row(option, seed, value, name) for option, value in (("recipe", 0.3), ("less pretraining", 0.2))
             for seed in ablation.SEEDS for name in ablation.RECIPES if seed or name == "emoji"]
    gains = ablation.gains(rows)
    assert list(gains) == ["recipe", "less pretraining"], "it was better with one seed of one set alone"
    assert gains["less pretraining"] == pytest.approx([0.0, -0.1, -0.1])


def test_the_table_has_sets_without_sounds_and_failures() -> None:
    facts = {"seconds": 9.0, "cpu_s": 8.0, "steps": {"align": 7}}
    rows = [row("recipe", 0, 0.25) | facts, row("adamw", 0, 0.5, "emoji") | facts | {"figures": {"image-text": 0.5}},
            {"set": "stamps", "option": "sigmoid", "seed": 0, "problem": "error: no room"}]
    lines = ablation.table(rows).splitlines()
    assert any(line.split()[:6] == ["stamps", "recipe", "1", "0.250", "(0.250)", "0.450"] for line in lines)
    assert any(line.split()[:6] == ["emoji", "adamw", "1", "0.500", "(0.500)", "-"] for line in lines)
    assert any(line.split()[:3] == ["stamps", "sigmoid", "failed:"] and "no room" in line for line in lines)


def test_each_query_counts_once() -> None:
    """Of 75 pictures and 10 sounds, not of two pairs."""
    better = {**row("adamw", 0, 0.3), "figures": {"image-text": 0.3, "audio-text": 1.0}}
    gains = ablation.gains([row("recipe", 0, 0.3), better], (0,), ("stamps",))
    assert gains["adamw"] == pytest.approx([(1.0 - 0.5) * 10 / 85])


def test_figures_are_those_of_the_lowest_validation_loss_of_the_last_stage() -> None:
    metrics = [{f"{way}_R@1": value for ways in ablation.PAIRS.values() for way in ways} for value in (0.9, 0.2, 0.4)]
    records = [{"kind": "validation", "stage": stage, "loss": loss, "metrics": one} for stage, loss, one in zip(
        ("align", "finetune", "finetune"), (0.1, 2.0, 1.0), metrics, strict=True)]
    found = ablation.figures_of([*records, {"kind": "stage", "stage": "finetune", "steps": 7}], "R@1")
    assert found["figures"] == dict.fromkeys(ablation.PAIRS, 0.4) and found["steps"] == {"finetune": 7}
    pictures = {key: value for key, value in metrics[0].items() if "audio" not in key}
    found = ablation.figures_of([{**records[1], "metrics": pictures}], "R@1")
    assert found["figures"] == {"image-text": 0.9} and len(found["metrics"]) == 2, "a set without sounds"


def test_equal_time_is_epochs_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ("pretrain", "align", "finetune")
    rows = [{"set": "stamps", "option": option, "seed": ablation.COST, "cost": dict.fromkeys(stages, cost)}
            for option, cost in (("recipe", 10.0), ("adamw", 5.0), ("sigmoid", 12.0))]
    monkeypatch.setattr(ablation, "found", lambda: rows)
    assert [ablation.equal_epochs("stamps", option) for option in ("recipe", "adamw", "sigmoid")] == [18, 36, 15]


def test_the_figure_of_all_folds_is_over_their_queries() -> None:
    folds = [{"figures": {"scratch_stamps_r5": {"value": value, "queries": number, "chance": 0.1}}}
             for value, number in ((0.5, 10), (0.2, 30))]
    value, low, high, number = ablation.pooled(folds, "scratch_stamps_r5")
    assert (value, number) == (pytest.approx(0.275), 40)
    assert (low, high) == (pytest.approx(0.161, abs=1e-3), pytest.approx(0.428, abs=1e-3)), "Wilson's of 11 in 40"


def test_an_older_tree_has_the_same_folds(tmp_path: Path) -> None:
    """A module of that name stands for it: all that is asked of it is `draw_splits` and a `main`."""
    units = [f"a caption {i}" for i in range(27)]
    splits = dict(itertools.islice(draw_splits(units, 0, 0).items(), 27))
    (tmp_path / "readers.py").write_text(
        f"ORDER = {list(splits)!r}\n"
        "def draw_splits(units, test, val):\n"
        "    sides = ['test'] * test + ['val'] * val\n"
        "    return {unit: (sides + ['train'] * len(ORDER))[i] for i, unit in enumerate(ORDER)}\n", "utf-8")
    (tmp_path / "run_training.py").write_text(
        "import json, readers\n"
        "def main():\n    print(json.dumps(readers.draw_splits(readers.ORDER, 5, 3)))\n", "utf-8")
    for fold in (0, 1, 4):
        found = subprocess.run([sys.executable, "-c", ablation.OLDER, str(fold)], cwd=tmp_path, check=True,
                               capture_output=True, text=True)
        assert json.loads(found.stdout) == draw_fold(units, fold, 5, 0.1)
