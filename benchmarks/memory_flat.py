"""Does memory stay flat: over 16 times as many micro-batches in a step, and over hundreds of steps?

    python benchmarks/memory_flat.py [--micro-batch 24 --image-size 64 --steps 500 --batch 32]

On drawn pictures and the `tiny` model, by the real training step (`training.train_step`) in float32, with the default
stage align.

1. One step of 4 and one of 64 micro-batches, all of the same size. MiB of the tensors at the peak, followed, by what
   they are. `data` is the effective batch itself, 16 times as large; it waits in the host's memory when the model is on
   a GPU, so the limit is for the peak `without data`. `resident`: the peak of the process in a second such step, which
   nothing follows.
2. Many steps of whole batches, read in this process, logged as a run logs them. MiB that the process holds, every
   fifth of them; growth counts from the first fifth on.

Linux only. glibc is told to return every freed block from 64 KiB on, so that the process holds little but what lives.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from benchmarks.memory_prediction import MALLOC
from datasets import Loader
from trimodal.config import load_config
from trimodal.data.batches import Batch, pool
from trimodal.memory.devices import Fit, peak_gib, reset_peak
from trimodal.memory.tracker import TAGS, PeakMemory, Usage
from trimodal.training import loop
from trimodal.training.planner import TOWERS
from trimodal.training.run import Options, Run, open_run
from trimodal.training.stage import Stage, active_tasks, build_stage, epoch_jobs

STAGE = "align"
FEW, MANY = 4, 64
LIMIT = 1.10  # times the peak of FEW
GROWTH_LIMIT_PCT = 2.0  # of what the process holds after a fifth of the steps
MIB = 1 << 20
CPU = torch.device("cpu")


class Peak(NamedTuple):
    micro_batches: int
    usage: Usage
    resident_mib: float

    @property
    def without_data(self) -> float:
        return (self.usage.peak_bytes - self.usage.by_tag["data"]) / MIB

    def __str__(self) -> str:
        tags = "  ".join(f"{self.usage.by_tag[tag] / MIB:11.2f}" for tag in TAGS)
        return (f"{self.micro_batches:13}  {tags}  {self.usage.peak_bytes / MIB:7.1f}  {self.without_data:12.1f}  "
                f"{self.resident_mib:8.0f}")


def peak_mib() -> float:
    return peak_gib(CPU).gib * 1024


def resident_mib() -> float:
    reset_peak(CPU)  # to what is held now
    return peak_mib()


def opened(args: argparse.Namespace, folder: str) -> tuple[Run, Stage]:
    """A run of drawn data before its first step, and its stage align: pictures with captions."""
    config = load_config(None, [
        "model.size=tiny", f"model.image_size={args.image_size}", "model.context_length=24",
        "model.word_embeddings=random", "data.datasets=[synthetic]", "data.workers=0", "data.audio_max_s=0.5",
        "training.use_amp=false", f"training.batch_size={args.batch}", "training.gradient_accumulation_steps=1",
        f"paths.data_root={folder}/data", f"paths.output_dir={folder}/outputs"])
    run = open_run(config, Options("cpu"), None)
    row = next(row for row in config.stages if row.name == STAGE)
    fit_to(run, args.batch)
    stage = build_stage(run, row, active_tasks(row, run.data)[0][:1], epochs=100)
    run.tracker.open_bar(1, 0, row.name)
    return run, stage


def fit_to(run: Run, micro_batch: int) -> None:
    run.fits[STAGE] = Fit(dict.fromkeys(TOWERS, micro_batch), dict.fromkeys(TOWERS, 0))


def batch_of(run: Run, stage: Stage, samples: int) -> Batch:
    inputs = stage.tasks[0].inputs
    rows = pool(run.data.tables["train"], inputs)[:samples]
    assert len(rows) == samples, f"there are {len(rows)} pictures to train on"
    return next(iter(Loader(run.data, "train", [(0, rows)], run.config, inputs=[inputs], train=True, epoch=1)))


def followed(run: Run, stage: Stage, batch: Batch) -> Usage:
    with PeakMemory() as tracker:
        tracker.watch(run.model.parameters())
        tracker.mark("optimizer", [list(state.values()) for state in stage.optimizer.state.values()])
        tracker.mark("data", [value for value in vars(batch).values() if isinstance(value, Tensor)], batch.noise)
        loop.train_step(run, stage, 0, batch)
    return tracker.usage()


def peak_of(run: Run, stage: Stage, micro_batches: int, micro_batch: int) -> Peak:
    batch = batch_of(run, stage, micro_batches * micro_batch)
    usage = followed(run, stage, batch)
    resident_mib()
    loop.train_step(run, stage, 0, batch)
    return Peak(micro_batches, usage, peak_mib())


def compare_peaks(run: Run, stage: Stage, micro_batch: int) -> bool:
    """Prints a row for few and one for many micro-batches; whether the peak stays below the limit."""
    fit_to(run, micro_batch)
    print(f"{'micro-batches':13}  " + "  ".join(f"{tag:>11}" for tag in TAGS)
          + f"  {'peak':>7}  {'without data':>12}  {'resident':>8}")
    found = []
    for count in (FEW, MANY):
        found.append(peak_of(run, stage, count, micro_batch))
        print(found[-1], flush=True)
    few, many = found
    ratio = many.without_data / few.without_data
    print(f"{MANY} micro-batches of {micro_batch} take {ratio:.3f} times the peak of {FEW} without data, limit "
          f"{LIMIT:.2f}; with data {many.usage.peak_bytes / few.usage.peak_bytes:.3f}; of the process "
          f"{many.resident_mib / few.resident_mib:.3f}")
    return ratio <= LIMIT


def endless_steps(run: Run, stage: Stage) -> Iterator[int]:
    """Trains; yields the number of steps done so far."""
    for epoch in itertools.count(1):
        log = loop.StepLog(run, stage, epoch)
        jobs = epoch_jobs(run, stage, epoch)
        batches = Loader(run.data, "train", jobs, run.config, inputs=[stage.tasks[0].inputs], train=True, epoch=epoch)
        for (task, indices), batch in zip(jobs, batches, strict=True):
            result = loop.train_step(run, stage, task, batch)
            run.progress.step += 1
            run.progress.stage_step += 1
            log.add(result, batch, len(indices))
            yield run.progress.step
        log.flush()


def watch_growth(run: Run, stage: Stage, steps: int) -> bool:
    """Prints what the process holds every fifth of the steps; whether its growth stays below the limit."""
    fit_to(run, run.config.training.effective_batch)
    held: dict[int, float] = {}
    print(f"\n{'steps':>5}  resident MiB")
    for done in tqdm(itertools.islice(endless_steps(run, stage), steps), total=steps, disable=None):
        if done % (steps // 5) == 0:
            held[done] = resident_mib()
            print(f"{done:5}  {held[done]:12.1f}", flush=True)
    first, *_, last = held
    growth = held[last] - held[first]
    print(f"Growth from step {first} to {last}: {growth:.1f} MiB, {100 * growth / held[first]:.2f} %, limit "
          f"{GROWTH_LIMIT_PCT:g} %")
    return growth <= GROWTH_LIMIT_PCT / 100 * held[first]


def measure(args: argparse.Namespace) -> bool:
    """All of it, in a process that was started with these settings of malloc; whether all limits are kept."""
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, float32, tiny, {STAGE}, "
          f"{args.image_size} pixels", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run, stage = opened(args, folder)
        try:
            good = [compare_peaks(run, stage, args.micro_batch), watch_growth(run, stage, args.steps)]
        finally:
            run.tracker.close()
    return all(good)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch", type=int, default=24, help="at most 26: there are 1,672 pictures to train on")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500, help="a multiple of 5")
    parser.add_argument("--batch", type=int, default=32, help="effective batch of these steps")
    args = parser.parse_args(argv)
    os.environ.update(MALLOC)
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return 0 if executor.submit(measure, args).result() else 1


if __name__ == "__main__":
    sys.exit(main())
