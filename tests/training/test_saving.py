"""When checkpoints are written, which stay, and what a full disk costs."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import model as model_module
from model import TriModalModel
from tests.refusals import assert_names
from tests.small_runs import SmallRuns, differing, records
from trimodal import checkpoint
from trimodal.checkpoint import tensor_bytes
from trimodal.errors import Stopped
from trimodal.evaluation import protocols
from trimodal.files import replacing
from trimodal.training import run as run_module
from trimodal.training import saving, validation
from trimodal.training.optimizer import MovingAverage, Optimizer
from trimodal.training.signals import Interruption


def no_space(handle: int) -> None:
    raise OSError(28, os.strerror(28))


def saved(small: SmallRuns, folder: Path, epochs: Sequence[int], keep: int) -> run_module.Run:
    run = small.open(folder, f"training.keep_checkpoints={keep}", f"training.epochs={epochs[-1]}")
    for epoch in epochs:
        run.progress.epoch = epoch
        run.best = {"stage": "pretrain", "epoch": epoch, "loss": 1.0, "model_state_dict": {}}
        saver_of(run).save("pretrain", dict)
    return run


def saver_of(run: run_module.Run) -> saving.Saver:
    return saving.Saver(run, {"pretrain": run.config.training.epochs}, Interruption())


def test_the_newest_and_every_tenth_checkpoint_stay(small: SmallRuns, tmp_path: Path) -> None:
    run = saved(small, tmp_path, (1, 9, 10, 11, 20, 21, 23, 24), keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "best_model.pt", *(f"checkpoint_epoch_{epoch}.pt" for epoch in (10, 20, 23, 24))}
    assert run_module.last_checkpoint(run) == str(tmp_path / "checkpoints" / "checkpoint_epoch_24.pt")


def test_the_best_weights_are_evaluated_and_kept_not_the_last(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    torch.manual_seed(5)
    rows = run.model.config.vocab_size
    best = model_module.create_model(**run.config.to_dict()["model"] | {"vocab_size": rows})
    run.best = {"stage": "align", "epoch": 2, "loss": 1.5, "model_state_dict": best.state_dict()}
    report = json.loads(validation.finish(run).with_suffix(".json").read_text("utf-8"))
    setting = protocols.Setting(device=run.device)
    assert report["evaluation"]["figures"] == protocols.evaluate_split(best, run.data, "test", run.config, setting)[0]
    assert report["best"] == {"stage": "align", "epoch": 2, "loss": 1.5}
    final = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt")
    assert differing(final["model_state_dict"], dict(best.state_dict())) == []


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(small: SmallRuns, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(small, tmp_path, (1,), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        run.progress.epoch = 2
        saver_of(run).save("pretrain", dict)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["best_model.pt", "checkpoint_epoch_1.pt"]
    [event] = records(tmp_path, "event")
    assert_names(event["message"], tmp_path / "checkpoints" / "best_model.pt", os.strerror(28), 2)  # the first of two
    assert event["saved"] is False and event["step"] == 0


def test_what_could_not_be_saved_is_not_said_to_be(small: SmallRuns, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(small.open(tmp_path))
    saver.interruption.asked = "SIGTERM"
    with pytest.raises(Stopped) as stop:
        saver.after_step("pretrain", dict, lambda: None)
    assert_names(str(stop.value), "SIGTERM", 0, "--resume auto")
    assert stop.value.is_saved
    of_saved = str(stop.value)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(Stopped) as stop:
        saver.after_step("pretrain", dict, lambda: None)
    assert not stop.value.is_saved and str(stop.value) != of_saved
    assert_names(str(stop.value), "SIGTERM", 0, "--resume auto")


def test_old_checkpoints_that_cannot_be_deleted_cost_nothing(small: SmallRuns, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(small.open(tmp_path, "training.keep_checkpoints=1"))
    saver.run.progress.epoch = 1
    saver.save("pretrain", dict)
    saver.run.progress.epoch = 2
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: no_space(0))
        saver.save("pretrain", dict)
    assert saver.has_saved and (tmp_path / "checkpoints" / "checkpoint_epoch_2.pt").is_file()
    [event] = records(tmp_path, "event")
    assert_names(event["message"], tmp_path / "checkpoints")
    assert event["saved"] is True


def test_a_state_that_is_saved_in_the_background_is_that_of_one_moment(small: SmallRuns, tmp_path: Path) -> None:
    saver = saver_of(small.open(tmp_path))
    saver.in_background = True
    before = {name: value.clone() for name, value in saver.run.model.state_dict().items()}
    saver.save("pretrain", dict)
    with torch.no_grad():
        for parameter in saver.run.model.parameters():
            parameter.zero_()  # training goes on
    saver.wait()
    found = checkpoint.load(tmp_path / "checkpoints" / "checkpoint_epoch_0.pt")
    assert differing(found["model_state_dict"], before) == []


def test_without_room_for_the_next_checkpoint_the_run_goes_on(small: SmallRuns, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(small.open(tmp_path))
    saver.save("pretrain", dict)
    saver.run.progress.epoch = 1
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        saver.save("pretrain", dict)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch_0.pt"]
    [event] = records(tmp_path, "event")
    assert_names(event["message"], tmp_path / "checkpoints", "0.00")
    assert event["saved"] is False
    saver.save("pretrain", dict)
    assert (tmp_path / "checkpoints" / "checkpoint_epoch_1.pt").exists()


def test_it_is_time_to_save_when_the_minutes_are_over(small: SmallRuns, tmp_path: Path) -> None:
    clock = [0.0]
    run = small.open(tmp_path, "training.save_every_minutes=2")
    saver = saving.Saver(run, {"pretrain": 3}, Interruption(), lambda: clock[0])
    saver.run.progress.epoch_step, saver.run.progress.step = 3, 3
    flushed: list[bool] = []
    for clock[0] in (60.0, 119.0, 121.0, 200.0):
        saver.after_step("pretrain", dict, lambda: flushed.append(True))
    assert flushed == [True]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch_1_step_3.pt"]


def test_a_full_disk_costs_records_and_not_the_run(small: SmallRuns, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    tracker = small.open(tmp_path).tracker
    tracker.file = open("/dev/full", "ab")  # each write says that there is no space
    capsys.readouterr()
    for step in (1, 2):
        tracker.record({"kind": "step", "step": step})
    assert_names(capsys.readouterr().out.removesuffix("\n"), tmp_path / "logs", os.strerror(28))  # once


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise BlockingIOError

    with monkeypatch.context() as patch, pytest.raises(BlockingIOError):
        if fails != "write":
            patch.setattr(os, fails, fail)
        with replacing(path, "w") as file:
            file.write("half")
            if fails == "write":
                fail()
            file.write(" and half")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_size_of_a_checkpoint_is_foretold(
        small: SmallRuns, tmp_path: Path, optimizer: str) -> None:
    config = small.config(tmp_path, f"training.optimizer={optimizer}", "training.ema_decay=0.9")
    state = Optimizer(model := TriModalModel(config.model), config.training)
    state.allocate()
    weights = tensor_bytes(model.state_dict())
    true = weights + tensor_bytes([state.state_dict(), MovingAverage(model, 0.9).state_dict()])
    count, each, needed = saving.checkpoint_bytes(config)
    assert (count, each) == (4, pytest.approx(true, rel=0.03)), "beside small counters"
    assert needed == pytest.approx(count * each + 3 * weights, rel=0.01), "the best, final_model.pt, model.safetensors"
