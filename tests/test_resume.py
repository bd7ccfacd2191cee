"""Nothing is lost: a run that is killed at any moment, or told to stop, goes on to the same bits."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import files
import run_training
import runs
import saving
import training
from interruption import Interruption, Stopped
from runs import Options
from tests.killing import OFTEN, PLACES, assert_same, in_process, killed_runs, recipe, with_files
from tests.small_runs import SmallRuns, differing, one_thread, records
from tracking import read_records

KILLS = 25


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    with one_thread():
        yield with_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and that saved at the end of epochs only."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *recipe(small), "training.save_every_minutes=0")
    return folder


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    assert [hits.total() for hits in killed_runs(small, whole, tmp_path, KILLS)][-1] == KILLS


@pytest.mark.slow
def test_a_run_killed_at_each_place_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """One run, killed again and again: while data are prepared, in each stage, between stages, in validation, while
    saving, in the last evaluation. The number of reading processes changes from one start to the next."""
    own, folder = with_files(tmp_path / "shared"), tmp_path / "run"
    shutil.copytree(small.plans, own.plans, dirs_exist_ok=True)
    for number, place in enumerate(PLACES):
        process = in_process(own, folder, *OFTEN, f"data.workers={number % 2}", dies=place)
        process.join()
        said = folder.with_suffix(".out").read_text("utf-8")
        assert process.exitcode == -signal.SIGKILL, f"not {place}: {said[-2000:]}"
    process = in_process(own, folder, *OFTEN)
    process.join()
    assert process.exitcode == 0
    assert_same(folder, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_to_the_same_bits(
        small: SmallRuns, whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    process = in_process(small, folder, "training.save_every_minutes=0")
    while process.is_alive() and not records_of_steps(folder):
        time.sleep(0.01)
    os.kill(process.pid or 0, getattr(signal, name))
    process.join()
    assert process.exitcode == 3, folder.with_suffix(".out").read_text("utf-8")[-2000:]
    said = folder.with_suffix(".out").read_text("utf-8")
    [path] = (folder / "checkpoints").glob("checkpoint_epoch_*.pt")
    step = checkpoint.load(path)["progress"]["step"]
    assert f"Stopped by {name} after step {step}, which is saved. Go on with --resume auto" in said
    assert records(folder)[-1]["step"] == step, "what was done is recorded, and nothing more"
    again = in_process(small, folder)
    again.join()
    assert again.exitcode == 0
    assert_same(folder, whole)


def records_of_steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_records(folder / "logs" / "metrics.jsonl") if line["kind"] == "step"]


def test_a_second_signal_and_one_outside_of_training_stop_at_once() -> None:
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)  # nothing to wait for
        with interruption.can_wait():
            signal.raise_signal(signal.SIGUSR1)
            assert interruption.asked == "SIGUSR1"
            with pytest.raises(KeyboardInterrupt, match="SIGINT"):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_torchrun_sends_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interruption() as interruption, interruption.can_wait():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked == "SIGINT"
        interruption._asked_s -= 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_reading_processes_leave_ctrl_c_to_their_parent_and_obey_their_own_end() -> None:
    def wait() -> None:
        for _ in range(1000):
            time.sleep(0.01)

    with Interruption():
        process = multiprocessing.get_context("fork").Process(target=wait)
        process.start()
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(0.3)
        assert process.exitcode is None
        process.terminate()
        process.join()
    assert process.exitcode == -signal.SIGTERM


def test_the_program_ends_with_3_when_told_to_stop(monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any) -> None:
        raise Stopped("Stopped by SIGTERM after step 7, which is saved. Go on with --resume auto")

    monkeypatch.setattr(training, "train", stop)
    assert run_training.main([]) == 3
    assert capsys.readouterr().err == "Stopped by SIGTERM after step 7, which is saved. Go on with --resume auto\n"


# ---- saving ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(small: SmallRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = in_process(small, folder)
    while process.is_alive() and not records_of_steps(folder):
        time.sleep(0.01)
    with pytest.raises(run_training.UserError, match=f"{folder}: another process trains there at this moment; wait"):
        small.open(folder)
    process.kill()
    process.join()
    config = small.config(folder, *recipe(small))
    runs.open_run(config, Options("cpu", overwrite=True), None).tracker.close()


def saver_of(small: SmallRuns, folder: Path, *overrides: str) -> saving.Saver:
    run = small.open(folder, *overrides)
    return saving.Saver(run, {"pretrain": 1}, Interruption())


def test_a_state_that_is_saved_in_the_background_is_that_of_one_moment(small: SmallRuns, tmp_path: Path) -> None:
    saver = saver_of(small, tmp_path)
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
    saver = saver_of(small, tmp_path)
    saver.save("pretrain", dict)
    saver.run.progress.epoch = 1
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        saver.save("pretrain", dict)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch_0.pt"]
    [event] = records(tmp_path, "event")
    assert "Not saved (epoch 1, step 0): " in event["message"] and "0.00 are free" in event["message"]
    saver.save("pretrain", dict)
    assert (tmp_path / "checkpoints" / "checkpoint_epoch_1.pt").exists()


def test_it_is_time_to_save_when_the_minutes_are_over(small: SmallRuns, tmp_path: Path) -> None:
    saver, clock = saver_of(small, tmp_path, "training.save_every_minutes=2"), [0.0]
    saver.now, saver._last_s = lambda: clock[0], 0.0
    saver.run.progress.epoch_step, saver.run.progress.step = 3, 3
    flushed: list[bool] = []
    for clock[0] in (60.0, 119.0, 121.0, 200.0):
        saver.after_step("pretrain", dict, lambda: flushed.append(True))
    assert flushed == [True]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch_1_step_3.pt"]


def test_a_full_disk_costs_records_and_not_the_run(small: SmallRuns, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    tracker = small.open(tmp_path).tracker
    tracker.file = open("/dev/full", "a", encoding="utf-8")  # each write says that there is no space
    for step in (1, 2):
        tracker.record({"kind": "step", "step": step})
    assert capsys.readouterr().out.count("records are lost (No space left on device); training goes on") == 1


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        if fails != "write":
            patch.setattr(files.os, fails, fail)
        with files.replacing(path, "w") as file:
            file.write("half")
            if fails == "write":
                fail()
            file.write(" and half")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
