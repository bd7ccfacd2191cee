"""Stages read features where towers are as a run began with them, and learn what they learn by encoding each time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from tests.ranks import in_ranks
from tests.refusals import assert_names
from tests.small_runs import SmallRuns, batches, records
from tests.tiny_towers import TinyTower, by_name
from tests.training.test_plans import tasks_of
from tests.training.test_pretrained import FROZEN, TINY, tiny
from trimodal import distributed
from trimodal.memory import devices
from trimodal.towers import features
from trimodal.towers.settings import decoded_kinds, frozen_until
from trimodal.training import plans
from trimodal.training.frozen import live_by_stage, open_features, read_features
from trimodal.training.run import Options, Run, open_run

__all__ = ["tiny"]  # the fixture
ALL_LIVE = {"pretrain": ("image", "text"), "align": ("text",), "finetune": ("image", "text")}


def test_stages_read_features_of_towers_that_none_has_trained(small: SmallRuns, tiny: Iterator[None],
                                                              tmp_path: Path) -> None:
    run = small.open(tmp_path / "run", *TINY)
    open_features(run)
    held, until = {}, frozen_until(run.config, run.model.towers)
    for row in run.config.stages:
        read_features(run, until[row.name])
        held[row.name] = set(batches(run, small.stage(run, row.name))[0].tokens)
    assert held == until == {"pretrain": {"image", "text"}, "align": {"text"}, "finetune": {"text"}}
    assert decoded_kinds(run.config, run.model.towers) == ("image", "sound")
    frozen = small.config(tmp_path / "other", *TINY, r"stages.align.trainable=['(?!image\.tower|text\.tower).*']")
    assert decoded_kinds(frozen, run.model.towers) == ("sound",), "pictures are decoded for their features alone"


def test_a_run_without_room_for_features_learns_the_same(small: SmallRuns, tiny: Iterator[None],
                                                         tmp_path: Path) -> None:
    losses = []
    for name, gb in (("with", 1), ("without", 0)):
        small.train(tmp_path / name, *TINY, f"data.cache_max_gb={gb}", f"data.cache_dir={tmp_path}/cache_{name}",
                    "training.epochs=3", "stages.align.feature_dropout=0")
        losses.append([line["loss"] for line in records(tmp_path / name, "step")])
    assert any((tmp_path / "cache_with").glob("*features*"))
    assert not any((tmp_path / "cache_without").glob("*features*"))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- what is cached ----------------------------------------------------------------------------------------------


def told(folder: Path) -> dict[str, Any]:
    """Figures of the one report below a folder."""
    (path,) = folder.glob("reports/report_*.json")
    figures: dict[str, Any] = json.loads(path.read_text("utf-8"))["evaluation"]["figures"]
    return figures


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_evaluation_of_the_best_model_gives_the_figures_of_the_run(
        small: SmallRuns, tiny: Iterator[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype | None) -> None:
    """Exactly, of towers that were frozen throughout: both read the cache, where it was filled and where it was not."""
    monkeypatch.setattr(devices, "choose_precision", lambda *_: devices.Precision(dtype, False, str(dtype)))
    run, calls, forward = tmp_path / "run", list[str](), TinyTower.forward
    small.train(run, *TINY, f"stages.align.trainable={FROZEN}", "training.epochs=3")

    def counted(tower: TinyTower, *given: Any) -> Any:
        calls.append(tower.modality)
        return forward(tower, *given)

    def again(folder: Path, *overrides: str) -> dict[str, Any]:
        small.config(folder)  # which finds the plans of earlier tests
        calls.clear()
        assert evaluate.main(["--checkpoint", str(run / "checkpoints" / "best_model.pt"), "--output-dir", str(folder),
                              "--data-root", str(small.data_root), "--device", "cpu", *overrides]) == 0
        return told(folder)

    monkeypatch.setattr(TinyTower, "forward", counted)
    expected = told(run)
    assert again(tmp_path / "cached") == expected and not calls, "no tower is asked again"
    elsewhere = f"data.cache_dir={tmp_path}/empty"
    assert again(tmp_path / "part", elsewhere, "--limit", "40").keys() == expected.keys()
    assert not any((tmp_path / "empty").glob("*-features*")), "a part of a split does not encode the whole of it"
    assert again(tmp_path / "anew", elsewhere) == expected and set(calls) == {"image", "text"}
    assert again(tmp_path / "live", "data.cache=false").keys() == expected.keys() and calls


def test_weights_are_read_once_for_the_keys_of_all_splits(small: SmallRuns, tiny: Iterator[None], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run, read, digest_of = small.open(tmp_path / "run", *TINY), list[int](), features.digest_of

    def counted(module: torch.nn.Module) -> str:
        read.append(id(module))
        return digest_of(module)

    monkeypatch.setattr(features, "digest_of", counted)
    open_features(run)
    towers = {id(tower) for tower in run.model.towers.values()}
    assert len(run.data.splits) == 3 and sorted(read) == sorted(towers)
    before = run.features["val"]["text"]
    with torch.no_grad():
        run.model.text.tower.pooler.bias += 1
    open_features(run)
    after = run.features["val"]["text"]
    assert before and after and before.entries[0][0].folder != after.entries[0][0].folder, "weights that have changed"


# ---- no room in the cache --------------------------------------------------------------------------------------------


def fitted(small: SmallRuns, folder: Path, *overrides: str, state: dict[str, Any] | None = None) -> Run:
    run = small.open(folder, *TINY, f"data.cache_dir={folder}/cache", *overrides)
    open_features(run)
    plans.fit_stages(run, tasks_of(run), state)
    return run


def kept_of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of fits, after each had run out of memory."""
    smaller = {name: devices.smaller(fit, may_recompute=True) for name, fit in run.fits.items()}
    return {"fits": {name: vars(fit) for name, fit in smaller.items()}, "fits_asked": run.fits_asked}


def test_a_run_without_room_for_features_plans_for_the_towers_that_it_runs(
        small: SmallRuns, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = fitted(small, tmp_path / "with")
    assert "not in the cache" not in capsys.readouterr().out
    run = fitted(small, tmp_path / "without", "data.cache_max_gb=0")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not in the cache" in line]
    assert_names(line, "image", "text", "memory")
    assert live_by_stage(cached) == {"pretrain": (), "align": (), "finetune": ("image",)}, "align trains images"
    assert live_by_stage(run) == ALL_LIVE
    changed = {name for name, digest in run.fits_asked.items() if cached.fits_asked[name] != digest}
    assert changed == {"pretrain", "align", "finetune"}
    assert run.predicted_gib["pretrain"] > 1.5 * cached.predicted_gib["pretrain"]


def test_fits_are_used_again_as_long_as_the_same_towers_run(
        small: SmallRuns, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = ("data.cache_max_gb=0",)
    run = fitted(small, tmp_path / "without", *full)
    state = {**kept_of(run), "config": run.config.to_dict()}
    again = fitted(small, tmp_path / "again", *full, state=state)
    assert {name: vars(fit) for name, fit in again.fits.items()} == state["fits"]
    assert "Planned anew" not in capsys.readouterr().out
    fitted(small, tmp_path / "with", state=state)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "Planned anew" in line]
    assert_names(line, "pretrain", "align", "finetune")


def test_training_and_validation_are_what_a_plan_is_for(small: SmallRuns, tiny: None, tmp_path: Path) -> None:
    run, kept = small.open(tmp_path / "run", *TINY), object()
    for split, expected in (("train", ("image",)), ("val", ("image",)), ("test", ())):
        run.features = {name: {"image": None if name == split else kept, "text": kept}  # type: ignore[dict-item]
                        for name in ("train", "val", "test")}
        assert live_by_stage(run) == {"pretrain": expected, "align": (), "finetune": ("image",)}


def opened_in_ranks(root: Path) -> tuple[dict[str, Any], set[str], dict[str, str]]:
    """Of two processes, whose caches lie on disks of their own, the second has no room."""
    world = distributed.start()
    with by_name(), world.quiet():
        small = SmallRuns(root / f"shared{world.rank}")
        config = small.config(root / "run", *TINY, f"data.cache_max_gb={1 - world.rank}", "data.workers=0")
        run = open_run(config, Options("cpu"), None, world)
        open_features(run)
        plans.fit_stages(run, tasks_of(run), None)
        read_features(run, {"image", "text"})
        held = set(batches(run, small.stage(run, "pretrain"))[0].tokens)
        run.tracker.close()
    world.stop()
    return live_by_stage(run), held, run.fits_asked


def test_all_processes_run_the_towers_whose_features_one_cannot_keep(tmp_path: Path) -> None:
    first, second = (rank.value for rank in in_ranks(2, opened_in_ranks, tmp_path))
    assert first == second and first[:2] == (ALL_LIVE, set())
