"""Runs that are killed at any moment and go on, for tests and benchmarks: started, killed, compared bit for bit."""

import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests import forked, tiny_towers, trees
from tests.small_runs import SmallRuns, differing, records, without_times
from trimodal import checkpoint
from trimodal.data import cache
from trimodal.errors import Stopped
from trimodal.training import loop
from trimodal.training.run import Options
from trimodal.training.tracking import read_records

RECIPE = ("training.epochs=3", "training.batch_size=32", "training.log_every_steps=1", "training.ema_decay=0.5",
          "training.keep_checkpoints=2", "evaluation.max_validation=8", "report.gallery_queries=0")
OFTEN = ("training.save_every_minutes=0.0001",)  # after every step
LONGEST_S = 1.0

# Where a process can be told to die: before which call of what, in which stage.
PLACES: dict[str, tuple[str, int, str]] = {
    "before the data are decoded": ("trimodal.data.cache.read_all", 1, ""),
    "while decoded pictures are written": ("trimodal.data.cache.replacing", 1, ""),
    "between two files of the prepared sounds": ("trimodal.data.cache.replacing", 5, ""),
    "after the rename of prepared data": ("trimodal.data.cache.sync_folder", 1, ""),
    "before a plan is kept": ("trimodal.training.planner.replacing", 1, ""),
    "between two plans": ("trimodal.training.planner.replacing", 3, ""),
    "before the first step": ("trimodal.training.loop.train_step", 1, "pretrain"),
    "in pretrain": ("trimodal.training.loop.train_step", 3, "pretrain"),
    "before the checkpoint of a step is renamed": ("os.replace", 2, ""),
    "in validation": ("trimodal.training.validation.validation_loss", 1, ""),
    "before the best weights are written": ("trimodal.training.saving.save_file", 1, ""),
    "between the stages pretrain and align": ("trimodal.training.loop.train_stage", 1, "align"),
    "in align": ("trimodal.training.loop.train_step", 2, "align"),
    "before old checkpoints are deleted": ("trimodal.training.saving.rotate", 1, ""),
    "between the stages align and finetune": ("trimodal.training.loop.train_stage", 1, "finetune"),
    "in finetune": ("trimodal.training.loop.train_step", 2, "finetune"),
    "before the final model is written": ("trimodal.training.validation.save_file", 1, ""),
    "before the last evaluation": ("trimodal.training.loop.finish", 1, ""),
    "before the report is written": ("trimodal.evaluation.report.write_report", 1, ""),
}

# Of runs on pretrained towers: that of images is frozen up to the stage that trains it, and after it.
FROZEN = r"['(?!(image|text)\.tower).*']"
OF_PAIRS = ", ".join(f"{{inputs: [{name}, text], objectives: {{contrastive: 1, matching: 0.5}}}}"
                     for name in ("image", "audio"))
TOWERS = ("model.image.tower=./tiny_image", "model.image.keep_tokens=4", f"model.image_size={tiny_towers.SIDE}",
          "model.text.tower=./tiny_text", "model.text.adapter_depth=1", "memory.micro_batch=12",
          f"stages.pretrain.tasks=[{OF_PAIRS}]", f"stages.align.tasks=[{OF_PAIRS}]", "stages.pretrain.image_keep=1",
          "stages.align.feature_dropout=0.2", f"stages.pretrain.trainable={FROZEN}",
          r"stages.align.trainable=['(?!text\.tower).*']", f"stages.finetune.trainable={FROZEN}")
OF_FEATURES = {  # where it dies, one time after another, while the cache is filled with what its towers make
    "before the first features": ("trimodal.towers.features.encode_batch", 1, ""),
    "between two batches of features": ("trimodal.towers.features.encode_batch", 2, ""),
    "between two entries of features": ("trimodal.towers.features.encode_batch", 2, ""),
    "between two batches of captions": ("trimodal.towers.features.encode_batch", 4, ""),
}


def with_files(root: Path, device: str = "cpu") -> SmallRuns:
    """Shared data of runs: drawn ones, and a list of pictures and sounds in files, to be decoded before training."""
    small = SmallRuns(root, device)
    trees.manifest(small.data_root / "own", samples=30)
    return small


def recipe(small: SmallRuns, *overrides: str) -> tuple[str, ...]:
    files = json.dumps(str(small.data_root / "own" / "manifest.jsonl"))
    return (*RECIPE, "data.datasets=[synthetic, manifest]", f"data.manifest={files}", *overrides)


def in_process(small: SmallRuns, folder: Path, *overrides: str, dies: str = "", by: str = "SIGKILL") -> BaseProcess:
    """A process that trains, or goes on training, in `folder`, to the place where it dies, if any, or gets another
    signal; its exit code is that of the program."""
    process = forked.context().Process(target=_train, args=(small, folder, overrides, dies, by,
                                                           torch.get_num_threads()))
    process.start()
    return process


def _train(small: SmallRuns, folder: Path, overrides: tuple[str, ...], dies: str, by: str, threads: int) -> None:
    sys.stdout = sys.stderr = open(folder.with_suffix(".out"), "a", encoding="utf-8")
    forked.as_usual()
    torch.set_num_threads(threads)  # sums round otherwise with another number of them
    os.fsync = lambda fd: None  # what a process has written outlives it: only a power cut would differ
    cache.STRETCH_BYTES = 1  # nor would a longer stretch, which loses more
    if dies:
        die_at(*(PLACES | OF_FEATURES)[dies], getattr(signal, by))
    try:
        with tiny_towers.by_name():
            loop.train(small.config(folder, *recipe(small, *overrides)), Options(small.device, "auto"))
    except Stopped as stopped:
        print(stopped, flush=True)
        os._exit(3)
    sys.stdout.flush()
    os._exit(0)


def die_at(called: str, number: int, stage: str = "", by: int = signal.SIGKILL) -> None:
    """Replace a function by one that sends its process a signal at the call of that number; of those in `stage`, if
    one is named. Processes that are forked from here die as well."""
    module, _, name = called.rpartition(".")
    whole, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if (not stage or getattr(args[1], "row", args[1]).name == stage) and next(calls) == number:
            os.kill(os.getpid(), by)
        return whole(*args, **kwargs)

    setattr(importlib.import_module(module), name, dying)


def history(folder: Path) -> list[dict[str, Any]]:
    """All records but what only restarts and times tell."""
    found = [line for line in records(folder) if not line.get("resumed")]
    return without_times([line | {"file": None} if line["kind"] == "report" else line for line in found])


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint without what may differ: paths, workers, times, and how often it is saved."""
    state = checkpoint.load(path)
    config = {name: value for name, value in state["config"].items() if name not in ("paths", "data", "training")}
    return {**state, "config": config, "progress": {**state["progress"], "stage_s": 0.0},
            "trained_on": len(state["trained_on"])}  # the hashes are of paths


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("checkpoint_epoch_3.pt", "best_model.pt", "final_model.pt"):
        assert differing(state_of(folder / "checkpoints" / name), state_of(whole / "checkpoints" / name)) == [], name
    found, expected = history(folder), history(whole)
    for one, other in itertools.zip_longest(found, expected):
        assert one == other, f"{one} is not {other}"
    assert len(list((folder / "reports").glob("*.md"))) >= 1


def kill_until_done(start: Callable[[int], BaseProcess], small: SmallRuns, place: Path, most: int,
                    draw: random.Random) -> list[str]:
    """SIGKILL at `most` random moments, then to the end; where each kill hit."""
    hits: list[str] = []
    while True:
        begun, process = unfinished(small, place), start(len(hits))
        if len(hits) < most:
            wait_for_a_moment(process, place, draw)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return hits
        assert process.exitcode == -signal.SIGKILL, place.with_suffix(".out").read_text("utf-8")[-2000:]
        hits.append(where(small, place, begun))


def wait_for_a_moment(process: BaseProcess, place: Path, draw: random.Random) -> None:
    """A quarter of the moments lies anywhere from the start on, the others from when the run has written some more
    records, which brings it on to its later stages."""
    log = place / "logs" / "metrics.jsonl"

    def written() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    until = written() + draw.randint(1, 6) if draw.random() < 0.75 else 0
    while process.is_alive() and written() < until:
        time.sleep(0.005)
    process.join(draw.uniform(0, LONGEST_S))


def unfinished(small: SmallRuns, place: Path) -> set[Path]:
    """Files that are being written."""
    return {path for folder in (place, small.data_root) for path in folder.rglob("*.tmp")}


def where(small: SmallRuns, place: Path, begun: set[Path]) -> str:
    """What a process was at when it was killed, by what it left; `begun` was there before."""
    left = unfinished(small, place) - begun
    if left:
        return "writing a checkpoint" if any(path.parent.name == "checkpoints" for path in left) else "preparing data"
    log = place / "logs" / "metrics.jsonl"
    found = [line for line in read_records(log) if line["kind"] != "event"] if log.exists() else []
    if not found:
        return "before the first step"
    kind, stage = found[-1]["kind"], found[-1].get("stage", "")
    if kind == "step":
        return f"in {stage}, validation included"
    is_over = kind == "report" or (kind == "stage" and stage == "finetune")
    return "after the last stage" if is_over else f"after an epoch of {stage}"


def killed_run(small: SmallRuns, whole: Path, folder: Path, turn: int, most: int, *overrides: str,
               plans: bool = False) -> list[str]:
    """A run that is killed at up to `most` random moments, drawn by `turn`, and compared with `whole` when it is
    through; where the kills hit. It prepares its data itself, and plans itself if it is to; the number of reading
    processes changes.

    Raises:
        AssertionError: it ended otherwise.
    """
    own, place = with_files(folder / f"shared{turn}"), folder / f"run{turn}"
    if not plans:
        shutil.copytree(small.plans, own.plans, dirs_exist_ok=True)

    def start(number: int) -> BaseProcess:
        return in_process(own, place, *OFTEN, *overrides, f"data.workers={number % 2}")

    hits = kill_until_done(start, own, place, most, random.Random(turn))
    assert_same(place, whole)
    shutil.rmtree(place)
    shutil.rmtree(own.data_root)
    return hits
