"""What a resumed run is asked for now wins: micro-batches are the checkpoint's only while it is asked for the same."""

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.refusals import assert_names
from tests.small_runs import SmallRuns, records
from trimodal.checkpoint import load
from trimodal.memory import devices
from trimodal.memory.devices import EVALUATION
from trimodal.training import plans, resume
from trimodal.training import run as run_module
from trimodal.training.run import Options, Run
from trimodal.training.stage import active_tasks

NAMES = ["pretrain", "align", "finetune", EVALUATION]


def tasks_of(run: Run) -> dict[str, list[Any]]:
    return {row.name: active_tasks(row, run.data)[0] for row in run.config.stages}


def fitted(small: SmallRuns, folder: Path, state: dict[str, Any] | None, *overrides: str) -> Run:
    run = small.open(folder, *overrides)
    plans.fit_stages(run, tasks_of(run), state)
    return run


def micro_batches(run: Run) -> dict[str, int]:
    return {name: fit.micro_batch["image"] for name, fit in run.fits.items()}


def halved_state(small: SmallRuns, folder: Path, *overrides: str) -> dict[str, Any]:
    """What a checkpoint holds of fits after each stage, and the evaluation, ran out of memory."""
    run = fitted(small, folder, None, *overrides)
    assert list(run.fits) == NAMES
    smaller = {name: devices.smaller(fit, may_recompute=True) for name, fit in run.fits.items()}
    return {"fits": {name: dataclasses.asdict(fit) for name, fit in smaller.items() if fit},
            "fits_asked": run.fits_asked, "config": run_module.description(run)["config"]}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("before")


@pytest.fixture(scope="module")
def state(small: SmallRuns, before: Path) -> dict[str, Any]:
    found = halved_state(small, before)
    fitted(small, before, found)
    return found


@pytest.fixture
def folder(before: Path, state: dict[str, Any], tmp_path: Path) -> Path:
    """With the plans that were made already, for the settings of `state`."""
    shutil.copytree(before / "plans", tmp_path / "plans")
    return tmp_path


HALVED = dict(zip(NAMES, (16, 16, 16, 32), strict=True))


@pytest.mark.parametrize(("override", "expected"), [
    ("training.learning_rate=0.5", {}), ("stages.finetune.tasks.0.objectives.matching=0.7", {}),
    ("memory.micro_batch=4", {"pretrain": 4, "align": 4, "finetune": 4}),
    ("memory.micro_batch=auto", dict.fromkeys(NAMES[:3], 32)),
    ("stages.align.effective_batch=96", {"align": 32}), ("stages.align.drop_path=0", {"align": 32}),
    ("training.ema_decay=0.9", dict.fromkeys(NAMES[:3], 32)), ("evaluation.batch_size=128", {EVALUATION: 128}),
    ("memory.budget_gb=1.9", dict(zip(NAMES, (32, 32, 32, 64), strict=True)))])
def test_what_is_asked_for_now_wins_and_all_else_stays_as_it_was(
        small: SmallRuns, folder: Path, capsys: pytest.CaptureFixture[str], state: dict[str, Any], override: str,
        expected: dict[str, int]) -> None:
    run = fitted(small, folder, state, override)
    assert micro_batches(run) == HALVED | expected
    assert run.planned_fits == run.fits and run.fits_asked.keys() == run.fits.keys()
    said = capsys.readouterr().out.splitlines()
    for name, fit in run.fits.items():
        [shown] = [line for line in said if line.startswith(f"{name} ")]
        assert f"image {fit.micro_batch['image']} (" in shown, "the table shows what is used"
    anew = [line for line in said if line.startswith("Planned anew")]
    assert len(anew) == bool(expected)
    if anew:
        assert_names(anew[0], *expected)


@pytest.mark.parametrize(("override", "expected"), [
    ("training.learning_rate=0.5", {}), ("memory.micro_batch=4", {"pretrain": 4, "align": 4, "finetune": 4}),
    ("evaluation.batch_size=128", {EVALUATION: 128})])
def test_a_checkpoint_that_does_not_say_what_it_was_asked_for_says_its_settings(
        small: SmallRuns, folder: Path, state: dict[str, Any], override: str, expected: dict[str, int]) -> None:
    """As those of earlier releases."""
    older = {name: value for name, value in state.items() if name != "fits_asked"}
    assert micro_batches(fitted(small, folder, older, override)) == HALVED | expected


def test_a_smaller_budget_makes_smaller_micro_batches(small: SmallRuns, tmp_path: Path) -> None:
    wide = ("memory.micro_batch=auto", "training.batch_size=128")
    run = small.open(tmp_path / "before", *wide)
    align = {"align": tasks_of(run)["align"][:1]}
    plans.fit_stages(run, align, None)
    before = {"fits": {"align": dataclasses.asdict(run.fits["align"])}, "fits_asked": run.fits_asked}
    budget_gb = devices.CONTEXT_GIB["cpu"] + 0.8 * run.predicted_gib["align"]
    less = small.open(tmp_path / "now", *wide, f"memory.budget_gb={budget_gb}")
    plans.fit_stages(less, align, before)
    assert micro_batches(less)["align"] < micro_batches(run)["align"] == 128


def test_the_memory_foretold_is_that_of_the_micro_batches_used(small: SmallRuns, tmp_path: Path,
                                                               state: dict[str, Any]) -> None:
    whole, halved = fitted(small, tmp_path / "whole", None), fitted(small, tmp_path / "halved", state)
    assert all(halved.predicted_gib[name] < whole.predicted_gib[name] for name in ("align", EVALUATION))


def test_other_numbers_or_another_number_of_processes_are_planned_anew(small: SmallRuns, folder: Path,
                                                                       state: dict[str, Any]) -> None:
    run = fitted(small, folder, state)
    config, tasks = plans.settings_of(run, run.config), tasks_of(run)
    assert list(plans.saved_fits(run, config, tasks, state)) == NAMES
    for changed in ({"precision": devices.Precision(torch.bfloat16, False, "as on a GPU")},
                    {"world": SimpleNamespace(size=2)}):
        other = dataclasses.replace(run, **changed)
        assert plans.saved_fits(other, config, tasks, state) == {}


QUICK = ("training.save_every_minutes=0", "report.gallery_queries=0", "evaluation.max_validation=8")


@pytest.fixture(scope="module")
def once(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after one epoch; to be copied, or read."""
    folder = tmp_path_factory.mktemp("once")
    small.train(folder, *QUICK, "training.epochs=1")
    return folder


def goes_on(small: SmallRuns, once: Path, folder: Path, *overrides: str) -> None:
    shutil.copytree(once, folder, symlinks=True, dirs_exist_ok=True)
    small.train(folder, *QUICK, "training.epochs=2", *overrides, resume="auto")


@pytest.mark.parametrize(("override", "compare"), [
    ("training.learning_rate=0.5", True), ("training.gradient_accumulation_steps=2", False),
    ("training.contrastive_loss=sigmoid", False), ("stages.finetune.tasks.0.objectives.matching=0.7", False),
    ("stages.align.effective_batch=16", True)])
def test_best_weights_are_not_chosen_by_losses_that_do_not_compare(
        small: SmallRuns, once: Path, capsys: pytest.CaptureFixture[str], override: str, compare: bool) -> None:
    """A contrast over twice as many has another loss. The weights of before stay until there are new ones."""
    found = resume.find_state(small.config(once, *QUICK, "training.epochs=1", override), Options("cpu", "auto"))
    assert found is not None and found["best"]["stage"] == "finetune" and found["best"]["model_state_dict"]
    assert math.isnan(found["best"]["loss"]) != compare
    said = [line for line in capsys.readouterr().out.splitlines() if "do not compare" in line]
    assert len(said) == (not compare) and all(override.partition("=")[0] in line or "tasks" in line for line in said)


def test_a_run_that_goes_on_with_other_micro_batches_saves_them(small: SmallRuns, once: Path, tmp_path: Path) -> None:
    goes_on(small, once, tmp_path, "memory.micro_batch=4")
    first, second = (load(tmp_path / "checkpoints" / f"checkpoint_epoch_{epoch}.pt") for epoch in (1, 2))
    assert [one["fits"]["align"]["micro_batch"]["image"] for one in (first, second)] == [32, 4]
    assert first["fits_asked"]["align"] != second["fits_asked"]["align"]
    assert first["fits"][EVALUATION] == second["fits"][EVALUATION]


def test_a_run_that_goes_on_with_the_sigmoid_loss_begins_it_as_a_fresh_one_does(small: SmallRuns, once: Path,
                                                                                tmp_path: Path) -> None:
    goes_on(small, once, tmp_path, "training.contrastive_loss=sigmoid")
    first = next(record for record in records(tmp_path, "step") if "bias" in record)
    assert first["bias"]["image_text"] == pytest.approx(-math.log(31), abs=0.01)
    assert first["temperature"]["image_text"] == pytest.approx(10, rel=0.01)
    state = load(tmp_path / "checkpoints" / "checkpoint_epoch_2.pt")
    sigmoid, infonce = (small.config(tmp_path, f"training.contrastive_loss={name}") for name in ("sigmoid", "infonce"))
    assert not resume.begins_with_sigmoid(sigmoid, state), "it has begun"
    assert not resume.begins_with_sigmoid(infonce, None) and resume.begins_with_sigmoid(sigmoid, None)
