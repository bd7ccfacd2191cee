"""What keeping the features of frozen towers saves: an epoch of alignment with them beside one that encodes each time.

    python benchmarks/cached_align.py                              # about 2 minutes on 2 idle cores
    python benchmarks/cached_align.py --fill --data-root ./data    # the cache of the demo, about 1 minute
    python benchmarks/cached_align.py --once                       # about 2 minutes on 2 idle cores
    python benchmarks/run.py cached_align_speedup pretrained_cache_s

Both towers of recipes/demo_pretrained.yaml are frozen, projections are trained, on 512 drawn pictures with captions in
steps of 256 (data set synthetic), with the default precision. Turns alternate; a turn is a whole epoch that encodes
each time, and the mean of CACHED_EPOCHS epochs that read the cache. Filling it is in neither; `--fill` times that for
the pictures and captions of the demo, in one view: the towers opened, nothing decoded before.

`--once`: without a cache, a step in micro-batches whose frozen towers run once for each row, as they do, beside the
same step with towers that run again for each backward pass, as trained ones do. Turns alternate, on one batch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

from trimodal.config import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo_pretrained.yaml"
BATCH, PICTURES, TURNS, CACHED_EPOCHS = 256, 512, 5, 5
MICRO_BATCH, ROWS = 32, 96  # of `--once`
TASKS = "stages.align.tasks=[{inputs: [image, text], objectives: {contrastive: 1}}]"


def opened(folder: str, *, cached: bool) -> tuple[Any, Any]:
    """A run of the one stage, with or without room for features, and the stage before its first step."""
    from trimodal.memory.devices import Fit
    from trimodal.towers.settings import frozen_until
    from trimodal.training.frozen import open_features, read_features
    from trimodal.training.run import Options, open_run
    from trimodal.training.stage import active_tasks, build_stage

    config = load_config(RECIPE, [
        "data.datasets=[synthetic]", f"data.synthetic_images={PICTURES + 128}", "data.fit=crop", "data.views=1",
        f"data.cache_max_gb={60 if cached else 0}", f"paths.data_root={folder}/{cached}", "model.size=tiny",
        f"paths.output_dir={folder}/run_{cached}", f"training.batch_size={BATCH}", TASKS])
    run = open_run(config, Options(), None)
    open_features(run)
    read_features(run, frozen_until(run.config, run.model.towers)["align"])
    towers = ("image", "audio", "text", "fusion")
    run.fits = {"align": Fit(dict.fromkeys(towers, BATCH), dict.fromkeys(towers, 0), keep_tokens=True)}
    [row] = run.config.stages
    run.tracker.open_bar(1, 0, "align")
    return run, build_stage(run, row, active_tasks(row, run.data)[0], 1000)


def epoch_s(run: Any, stage: Any, epoch: int) -> float:
    from trimodal.training.loop import train_epoch

    began = time.perf_counter()
    train_epoch(run, stage, epoch)
    return time.perf_counter() - began


def turns(number: int) -> list[tuple[float, float]]:
    """Seconds of an epoch that encodes each time, and of one that reads the cache, in each turn; one before counts
    not."""
    with tempfile.TemporaryDirectory() as folder:
        live, cached = (opened(folder, cached=which) for which in (False, True))
        found = []
        for turn in range(number + 1):
            encoding_s = epoch_s(*live, epoch=turn + 1)
            first = turn * CACHED_EPOCHS + 1
            reading_s = sum(epoch_s(*cached, epoch=first + i) for i in range(CACHED_EPOCHS)) / CACHED_EPOCHS
            found.append((encoding_s, reading_s))
        for run, _ in (live, cached):
            run.tracker.close()
        return found[1:]


def step_turns(number: int) -> list[tuple[float, float]]:
    """Seconds of a step of ROWS pairs in micro-batches whose frozen towers run again, and of one in which they run
    once, in each turn; one before counts not."""
    from datasets import Loader
    from trimodal.objectives.step import Step
    from trimodal.training.loop import train_step
    from trimodal.training.stage import epoch_jobs

    with tempfile.TemporaryDirectory() as folder:
        run, stage = opened(folder, cached=False)
        run.fits["align"].micro_batch.update(dict.fromkeys(run.fits["align"].micro_batch, MICRO_BATCH))
        task, rows = epoch_jobs(run, stage, 1)[0]
        [batch] = Loader(run.data, "train", [(task, rows[:ROWS])], run.config, inputs=[stage.tasks[task].inputs],
                         train=True, epoch=1)

        def step_s() -> float:
            began = time.perf_counter()
            train_step(run, stage, task, batch).read()
            return time.perf_counter() - began

        found = []
        for _ in range(number + 1):
            with mock.patch.object(Step, "_runs_once", lambda step, modality: False):
                again_s = step_s()
            found.append((again_s, step_s()))
        run.tracker.close()
        return found[1:]


def fill_s(data_root: str) -> float:
    """Seconds of filling the cache with the features of the demo's pictures and captions, in one view."""
    from trimodal.training.frozen import open_features
    from trimodal.training.run import Options, open_run

    with tempfile.TemporaryDirectory() as folder:
        run = open_run(load_config(RECIPE, [
            "model.size=tiny", "data.views=1", f"paths.data_root={data_root}", f"data.cache_dir={folder}/cache",
            f"paths.output_dir={folder}/run"]), Options(), None)
        began = time.perf_counter()
        open_features(run)
        seconds = time.perf_counter() - began
        run.tracker.close()
        return seconds


def measured() -> dict[str, float]:
    """One turn, after one that does not count."""
    [(encoding_s, reading_s)] = turns(1)
    return {"cached_align_speedup": encoding_s / reading_s}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--data-root", default="./data")
    options = parser.parse_args(argv)
    from benchmarks.run import commit, hardware

    print(f"{hardware()}, {commit()}", flush=True)
    if options.fill:
        print(f"features of the demo's pictures and captions: {fill_s(options.data_root):.1f} s")
        return 0
    if options.once:
        show(f"a step of {ROWS} pairs in micro-batches of {MICRO_BATCH}: towers run again", "once", step_turns(TURNS))
    else:
        show(f"an epoch of {PICTURES} pairs in steps of {BATCH}: encoding each time", "reading the cache", turns(TURNS))
    return 0


def show(slow: str, fast: str, seconds: Sequence[tuple[float, float]]) -> None:
    """Print each turn, and the median and range of the ratios."""
    for slow_s, fast_s in seconds:
        print(f"{slow} {slow_s:6.2f} s, {fast} {fast_s:6.3f} s, {slow_s / fast_s:6.1f} times")
    ratios = sorted(slow_s / fast_s for slow_s, fast_s in seconds)
    print(f"{statistics.median(ratios):.3g} times ({ratios[0]:.3g} to {ratios[-1]:.3g}, {len(ratios)} turns)")


if __name__ == "__main__":
    sys.exit(main())
