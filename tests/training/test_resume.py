"""Nothing is lost: a run that is killed at any moment, or told to stop, goes on to the same bits."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import run_training
from tests import forked
from tests.killing import OF_FEATURES, OFTEN, PLACES, TOWERS, assert_same, in_process, killed_run, recipe, with_files
from tests.refusals import refused
from tests.small_runs import SmallRuns, records
from tests.tiny_towers import by_name
from trimodal import checkpoint
from trimodal.arguments import exit_code
from trimodal.errors import Stopped, UserError
from trimodal.training import loop
from trimodal.training import run as run_module
from trimodal.training.run import Options, Run
from trimodal.training.signals import Interruption

pytestmark = pytest.mark.timed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    yield with_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and that saved at the end of epochs only."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *recipe(small), "training.save_every_minutes=0")
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path,
                                                                all_repetitions: bool) -> None:
    hits: list[str] = []
    kills = 25 if all_repetitions else 3
    for turn in itertools.count(1):
        hits += killed_run(small, whole, tmp_path, turn, kills - len(hits), plans=all_repetitions and turn == 1)
        if len(hits) >= kills:
            return


def test_a_run_killed_at_each_place_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """One run, killed again and again: while data are prepared and memory is planned, in each stage, between stages, in
    validation, while saving, in the last evaluation. The number of reading processes changes from start to start."""
    own, folder = with_files(tmp_path / "shared"), tmp_path / "run"
    for number, place in enumerate(PLACES):
        process = in_process(own, folder, *OFTEN, f"data.workers={number % 2}", dies=place)
        process.join()
        said = folder.with_suffix(".out").read_text("utf-8")
        assert process.exitcode == -signal.SIGKILL, f"not {place}: {said[-2000:]}"
    own.train(folder, *recipe(own, *OFTEN), resume="auto")
    assert_same(folder, whole)


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "live"])
def test_a_killed_run_on_frozen_towers_ends_with_the_same_bits(small: SmallRuns, tmp_path: Path, is_cached: bool,
                                                               all_repetitions: bool) -> None:
    """Also where it dies while it encodes what is to be kept: the next start goes on from there."""
    own, folder, whole = with_files(tmp_path / "shared"), tmp_path / "run", tmp_path / "whole"
    places = ["between two batches of features"] if is_cached else ["in align"]
    if all_repetitions:
        places = [*(OF_FEATURES if is_cached else ()), "in pretrain", "in align", "before the final model is written"]
    settings = f"data.cache_max_gb={int(is_cached)}"
    with by_name():
        small.train(whole, *recipe(small, *TOWERS, settings), "training.save_every_minutes=0",
                    f"data.cache_dir={tmp_path}/cache")
        shutil.copytree(small.plans, own.plans, dirs_exist_ok=True)
        for place in places:
            process = in_process(own, folder, *OFTEN, *TOWERS, settings, dies=place)
            process.join()
            said = folder.with_suffix(".out").read_text("utf-8")
            assert process.exitcode == -signal.SIGKILL, f"not {place}: {said[-2000:]}"
        process = in_process(own, folder, *OFTEN, *TOWERS, settings, "data.workers=1")
        process.join()
        said = folder.with_suffix(".out").read_text("utf-8")
        assert process.exitcode == 0, said[-2000:]
    assert ("features: going on from" in said) == is_cached and ("not in the cache" in said) != is_cached
    for cache in (tmp_path / "cache", own.data_root / "cache"):
        assert any(cache.glob("*-features-*")) == is_cached
    assert_same(folder, whole)
    kills, turns = 12 if all_repetitions else 0, itertools.count(1)
    while kills > 0:
        kills -= len(killed_run(small, whole, tmp_path, next(turns), kills, *TOWERS, settings))


def test_more_epochs_have_a_report_of_their_own_even_if_their_end_failed(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, more = tmp_path / "run", (*recipe(small), "training.epochs=4")
    shutil.copytree(whole, folder, symlinks=True)
    [first] = (folder / "reports").glob("*.md")

    def full(run: Run) -> Path:
        raise UserError("no space left")

    with monkeypatch.context() as patch, refused("no space left"):
        patch.setattr(loop, "finish", full)
        small.train(folder, *more, resume="auto")
    report = small.train(folder, *more, resume="auto")
    assert report != first
    assert checkpoint.load(folder / "checkpoints" / "final_model.pt")["progress"]["epoch"] == 4
    assert small.train(folder, *more, resume="auto") == report


def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_to_the_same_bits(small: SmallRuns, whole: Path,
                                                                              tmp_path: Path) -> None:
    """One that comes while a step is at its work."""
    folder = tmp_path / "run"
    process = in_process(small, folder, "training.save_every_minutes=0", dies="in align", by="SIGTERM")
    process.join()
    said = folder.with_suffix(".out").read_text("utf-8")
    assert process.exitcode == 3, said[-2000:]
    path = checkpoint.find_latest(folder / "checkpoints")
    assert path is not None
    progress = checkpoint.load(path)["progress"]
    step = progress["step"]
    assert progress["epoch_step"] == 2, "the step in hand was done and saved, and no other one"
    assert path.name == f"checkpoint_epoch_2_step_{step}.pt"
    assert f"SIGTERM after step {step}, " in said.splitlines()[-1]
    assert records(folder)[-1]["step"] == step, "what was done is recorded, and nothing more"
    small.train(folder, *recipe(small), "training.save_every_minutes=0", resume="auto")
    assert_same(folder, whole)


def test_an_output_that_nobody_reads_any_more_stops_training_as_a_signal_does(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, more, said = tmp_path / "run", (*recipe(small), "training.save_every_minutes=0"), list[Stopped]()
    reading, writing = os.pipe()

    def train_epoch(run: Run, *rest: Any, whole: Any = loop.train_epoch) -> Any:
        if not run.progress.epoch:
            os.close(reading)
        return whole(run, *rest)

    def main() -> int:
        try:
            small.train(folder, *more)
        except Stopped as stopped:
            said.append(stopped)
        return 3

    with monkeypatch.context() as patch, os.fdopen(writing, "w", buffering=1) as pipe:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(loop, "train_epoch", train_epoch)
        assert exit_code(main) == 141
    [stopped] = said
    assert stopped.is_saved and "Stopped by output that cannot be written (" in str(stopped)
    assert checkpoint.find_latest(folder / "checkpoints") == folder / "checkpoints" / "checkpoint_epoch_1.pt"
    small.train(folder, *more, resume="auto")
    assert_same(folder, whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_each_signal_asks_once_while_somebody_looks_and_stops_at_once_where_nobody_does(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with Interruption() as interruption:
        assert signal.getsignal(getattr(signal, name)) != before, "else it would end these tests"
        with pytest.raises(KeyboardInterrupt) as stop:
            signal.raise_signal(getattr(signal, name))  # nothing to wait for
        assert stop.value.args == (name,) and interruption.asked == ""
        with interruption.can_wait():
            signal.raise_signal(getattr(signal, name))
            assert interruption.asked == name
            with pytest.raises(KeyboardInterrupt) as stop:
                signal.raise_signal(signal.SIGINT)
            assert stop.value.args == ("SIGINT",)
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_signal_that_comes_after_its_reader_has_gone_is_the_first_one() -> None:
    """Ctrl-C ends `tee` as well, which may be faster."""
    with Interruption() as interruption, interruption.can_wait():
        interruption._cannot_write("Broken pipe")
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked == "output that cannot be written (Broken pipe)"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_torchrun_sends_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    clock = [0.0]
    with Interruption(lambda: clock[0]) as interruption, interruption.can_wait():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked == "SIGINT"
        clock[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def _wait_for(word: Connection) -> None:
    word.send("here")  # Python forgets signals that come while it forks
    os._exit(0 if word.recv() == "go on" else 1)


@pytest.mark.parametrize(("name", "ends_with"), [("SIGINT", 0), ("SIGTERM", -signal.SIGTERM)])
def test_reading_processes_leave_ctrl_c_to_their_parent_and_obey_their_own_end(name: str, ends_with: int) -> None:
    ours, its = multiprocessing.Pipe()
    with Interruption():
        process = multiprocessing.get_context("fork").Process(target=_wait_for, args=(its,))
        process.start()
        its.close()  # so that its end ends what waits for its word
        assert ours.recv() == "here"
        os.kill(process.pid or 0, getattr(signal, name))
        ours.send("go on")  # after the signal, which is handled first
        process.join()
    assert process.exitcode == ends_with


def test_the_program_ends_with_3_when_told_to_stop(monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any) -> None:
        raise Stopped("at step 7")

    monkeypatch.setattr(loop, "train", stop)
    assert run_training.main([]) == 3
    assert capsys.readouterr().err == "at step 7\n"


def _claim(folder: Path, word: Connection) -> None:
    lock = run_module.claim_folder(folder, Options("cpu"))
    word.send(lock is not None)
    word.recv()  # until it is killed


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    ours, its = multiprocessing.Pipe()
    process = forked.context().Process(target=_claim, args=(tmp_path, its))
    process.start()
    its.close()
    assert ours.recv()
    for options in (Options("cpu"), Options("cpu", overwrite=True)):  # not even to throw it away
        with refused(tmp_path, "--output-dir"):
            run_module.claim_folder(tmp_path, options)
    process.kill()
    process.join()
    lock = run_module.claim_folder(tmp_path, Options("cpu"))
    assert lock is not None
    lock.release()
