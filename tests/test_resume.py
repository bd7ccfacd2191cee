"""Nothing is lost: a run that is killed at any moment, or told to stop, goes on to the same bits."""

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import checkpoint
import run_training
import runs
import training
from config import UserError
from interruption import Interruption, Stopped
from runs import Options, Run
from tests.killing import OFTEN, PLACES, assert_same, in_process, killed_run, recipe, with_files
from tests.small_runs import SmallRuns, records
from tracking import read_records

KILLS = 25


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    yield with_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and that saved at the end of epochs only."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *recipe(small), "training.save_every_minutes=0")
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    hits: list[str] = []
    for turn in itertools.count(1):
        hits += killed_run(small, whole, tmp_path, turn, KILLS - len(hits))
        if len(hits) >= KILLS:
            return


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


def test_more_epochs_have_a_report_of_their_own_even_if_their_end_failed(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, more = tmp_path / "run", (*recipe(small), "training.epochs=4")
    shutil.copytree(whole, folder, symlinks=True)
    [first] = (folder / "reports").glob("*.md")

    def full(run: Run) -> Path:
        raise UserError("no space left")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(training, "finish", full)
        small.train(folder, *more, resume="auto")
    report = small.train(folder, *more, resume="auto")
    assert report != first
    assert checkpoint.load(folder / "checkpoints" / "final_model.pt")["progress"]["epoch"] == 4
    assert small.train(folder, *more, resume="auto") == report


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
    path = checkpoint.find_latest(folder / "checkpoints")
    assert path is not None
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
