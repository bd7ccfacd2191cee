"""The predicted peak of a step's memory against what the same step takes for real, on a CPU in float32.

    python benchmarks/memory_prediction.py [--sizes tiny small base large --stages pretrain align finetune
        --batch 8 --micro-batches 2 4 8 --image-size 224 --audio-s 10 --optimizer muon]

For each size, stage and micro-batch, of the task that the planner says takes most; where the stage fuses, with the
tokens of all samples `kept` for it, and encoded again by each objective:

- planned: the planner's own figure, an optimizer step on fake tensors.
- tensors: the peak of all tensors, followed through two real steps (`Step`, losses, optimizer) on random values of the
  largest shapes: pictures, sounds of full length, captions without padding.
- resident: what the process holds at its peak over two such steps that nothing follows, in a process of its own, less
  what it held before the batch and the model were made. Read from Linux's /proc, after a small step has loaded the
  libraries. glibc is told to return every freed block from 64 KiB on.

Errors are those of the prediction: + where the planner says more than is taken. Objectives that need names of speakers
are left out. A quarter of the words is hidden as in training, where the planner allows for half as many again.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from benchmarks.plan_choice import SETUP, Case, Key, Trainer
from trimodal.config import SIZES, Config, load_config
from trimodal.memory.devices import GIB, peak_gib, reset_peak
from trimodal.memory.tracker import PeakMemory
from trimodal.training.planner import TOWERS, TaskMeasure, without_speaker

TENSORS_LIMIT_PCT, RESIDENT_LIMIT_PCT = 2.0, 10.0
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # read when a process starts
CPU = torch.device("cpu")


class Row(NamedTuple):
    """One configuration; GiB."""

    case: Case
    key: Key
    planned: float
    tensors: float
    resident: float

    @property
    def errors_pct(self) -> tuple[float, float]:
        """Of the prediction over what the tensors and the process took."""
        return 100 * (self.planned / self.tensors - 1), 100 * (self.planned / self.resident - 1)

    def __str__(self) -> str:
        of_tensors, of_resident = self.errors_pct
        micro_batch = f"{self.key.towers[0][1]}{' kept' if self.key.keeps else ''}"
        return (f"{self.case.config.model.size:6}  {self.case.row.name:8}  {micro_batch:11}  "
                f"{'+'.join(self.case.task.inputs):11}  {self.planned:7.3f}  {self.tensors:7.3f}  {of_tensors:+7.2f}  "
                f"{self.resident:8.3f}  {of_resident:+7.2f}")


HEADER = (f"{'size':6}  {'stage':8}  micro-batch  {'task':11}  planned  tensors  error %  resident  error %")


def two_steps(case: Case, key: Key) -> None:
    trainer = Trainer(case)
    for _ in range(2):
        trainer.seconds(key)


def tensors_gib(case: Case, key: Key) -> float:
    with PeakMemory() as tracker:
        two_steps(case, key)
    return tracker.peak_bytes / GIB


def resident_gib(case: Case, key: Key) -> float:
    """For a process that has done nothing else."""
    small = load_config(None, ["model.size=tiny", "model.image_size=32", "model.context_length=8",
                               "data.audio_max_s=0.3", "training.batch_size=2", "model.vocab_size=1100"])
    two_steps(replace(case, config=small), key_of(4, key.keeps))
    reset_peak(CPU)
    before = peak_gib(CPU).gib
    two_steps(case, key)
    return peak_gib(CPU).gib - before


def planned_gib(case: Case, key: Key) -> float:
    usage = TaskMeasure(case.config, case.row, case.task, SETUP)(case.fit(key))
    assert usage is not None, "no limit, so there is a figure"
    return usage.peak_bytes / GIB


def key_of(micro_batch: int, keeps: bool) -> Key:
    return Key(tuple((tower, micro_batch, 0) for tower in TOWERS), keeps)


def elsewhere(measure: Callable[[Case, Key], float], case: Case, key: Key) -> float:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, case, key).result()


def compare(cases: list[Case], key: Key) -> Row:
    """Of a stage's tasks the one that takes most, as the planner finds it."""
    planned, place = max((planned_gib(case, key), place) for place, case in enumerate(cases))
    largest = cases[place]
    return Row(largest, key, planned, elsewhere(tensors_gib, largest, key), elsewhere(resident_gib, largest, key))


def configured(args: argparse.Namespace, size: str) -> Config:
    return load_config(None, [f"model.size={size}", f"model.image_size={args.image_size}",
                              f"data.audio_max_s={args.audio_s}", f"training.batch_size={args.batch}",
                              "training.gradient_accumulation_steps=1", "model.word_embeddings=random",
                              f"training.optimizer={args.optimizer}"])


def stages_of(config: Config, names: list[str]) -> list[list[Case]]:
    return [[Case(config, row, task) for task in without_speaker(row.tasks)]
            for row in config.stages if row.name in names]


def ways(cases: list[Case], micro_batch: int) -> tuple[bool, ...]:
    """Tokens kept or encoded again, where a stage fuses; those of a single micro-batch are in memory anyway."""
    if not any(case.fuses for case in cases):
        return (False,)
    return (True, False) if micro_batch < max(max(case.upper.values()) for case in cases) else (True,)


def verdict(rows: list[Row]) -> bool:
    """Prints the largest errors; whether both are within their limits."""
    errors = [max(map(abs, column)) for column in zip(*(row.errors_pct for row in rows), strict=True)]
    print(f"Largest errors: {errors[0]:.2f} % of the tensors, limit {TENSORS_LIMIT_PCT:g} %; {errors[1]:.2f} % of the "
          f"resident memory, limit {RESIDENT_LIMIT_PCT:g} %")
    return errors[0] <= TENSORS_LIMIT_PCT and errors[1] <= RESIDENT_LIMIT_PCT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--stages", nargs="+", default=[row.name for row in Config().stages])
    parser.add_argument("--batch", type=int, default=8, help="effective batch")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--audio-s", type=float, default=10.0)
    parser.add_argument("--optimizer", default="muon", help="adamw is quicker where the model is large")
    args = parser.parse_args(argv)
    os.environ.update(MALLOC)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, float32, effective batch "
          f"{args.batch}, {args.image_size} pixels, sounds of {args.audio_s:g} s, {args.optimizer}; GiB\n{HEADER}",
          flush=True)
    work = [(cases, key_of(size, keeps))
            for name in args.sizes for cases in stages_of(configured(args, name), args.stages)
            for size in args.micro_batches for keeps in ways(cases, size)]
    rows = []
    for cases, key in tqdm(work, disable=None):
        rows.append(compare(cases, key))
        print(rows[-1], flush=True)
    return 0 if verdict(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
