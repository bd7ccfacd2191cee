"""Runs that are killed at any moment and go on, for tests and benchmarks: started, killed, compared bit for bit."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import checkpoint
import training
from interruption import Stopped
from runs import Options
from tests.small_runs import SmallRuns, differing, records, without_times

RECIPE = ("training.epochs=3", "training.batch_size=32", "training.log_every_steps=1", "training.ema_decay=0.5",
          "training.keep_checkpoints=2", "evaluation.max_validation=8", "report.gallery_queries=0")
OFTEN = ("training.save_every_minutes=0.0001",)  # after every step
LONGEST_S = 4.0


def in_process(small: SmallRuns, folder: Path, *overrides: str) -> BaseProcess:
    """A process that trains, or goes on training, in `folder`; its exit code is that of the program."""
    server = multiprocessing.get_context("forkserver")  # has loaded everything, and trained nothing
    server.set_forkserver_preload(["tests.killing"])
    process = server.Process(target=_train, args=(small, folder, overrides))
    process.start()
    return process


def _train(small: SmallRuns, folder: Path, overrides: tuple[str, ...]) -> None:
    sys.stdout = sys.stderr = open(folder.with_suffix(".out"), "a", encoding="utf-8")
    torch.set_num_threads(1)
    try:
        training.train(small.config(folder, *RECIPE, *overrides), Options("cpu", "auto"))
    except Stopped as stopped:
        print(stopped, flush=True)
        os._exit(3)
    sys.stdout.flush()
    os._exit(0)


def history(folder: Path) -> list[dict[str, Any]]:
    """All records but what only restarts and times tell."""
    found = [line for line in records(folder) if not line.get("message", "").startswith("Resumed after")]
    return without_times([line | {"file": None} if line["kind"] == "report" else line for line in found])


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint without what may differ: paths, workers, times, and how often it is saved."""
    state = checkpoint.load(path)
    config = {name: value for name, value in state["config"].items() if name not in ("paths", "data", "training")}
    return {**state, "config": config, "progress": {**state["progress"], "stage_s": 0.0}}


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("checkpoint_epoch_3.pt", "best_model.pt", "final_model.pt"):
        assert differing(state_of(folder / "checkpoints" / name), state_of(whole / "checkpoints" / name)) == [], name
    found, expected = history(folder), history(whole)
    for one, other in itertools.zip_longest(found, expected):
        assert one == other, f"{one} is not {other}"
    assert len(list((folder / "reports").glob("*.md"))) >= 1


def kill_until_done(start: Callable[[int], BaseProcess], place: Path, most: int, draw: random.Random) -> int:
    """SIGKILL at `most` random moments, then to the end; how many kills there were."""
    for kills in range(most + 1):
        process = start(kills)
        if kills < most:
            wait_for_a_moment(process, place, draw)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, place.with_suffix(".out").read_text("utf-8")[-2000:]
    raise AssertionError("the last process trains to the end")


def wait_for_a_moment(process: BaseProcess, place: Path, draw: random.Random) -> None:
    """A quarter of the moments lies anywhere from the start on, the others from when the run has begun to write."""
    log = place / "logs" / "metrics.jsonl"
    before = log.stat().st_size if log.exists() else 0
    if draw.random() < 0.25:
        process.join(draw.uniform(0, LONGEST_S))
        return
    while process.is_alive() and (log.stat().st_size if log.exists() else 0) == before:
        time.sleep(0.005)
    process.join(draw.uniform(0, LONGEST_S))


def killed_runs(small: SmallRuns, whole: Path, folder: Path, kills: int) -> Iterator[int]:
    """Runs that are killed at random moments and compared with `whole` when they are through, until there were so many
    kills; yields how many so far. The first one prepares its own data; the number of reading processes changes.

    Raises:
        AssertionError: a run ended otherwise.
    """
    draw, done, turn = random.Random(0), 0, 0
    while done < kills:
        turn += 1
        own = SmallRuns(folder / f"shared{turn}") if turn == 1 else small
        place = folder / f"run{turn}"

        def start(number: int, own: SmallRuns = own, place: Path = place) -> BaseProcess:
            return in_process(own, place, *OFTEN, f"data.workers={number % 2}")

        done += kill_until_done(start, place, kills - done, draw)
        assert_same(place, whole)
        shutil.rmtree(place)
        yield done
