"""What the shipped sizes take and how fast they are on the GPU of this machine, beside what was planned.

    python benchmarks/gpu_memory.py [--sizes tiny small base large] [--batches 32 1024 4096 8192] [--steps 3]

For each size, effective batch and stage the plan is made first, as in every run; then the step that trains (all tasks
of the stage in turn, the stage's optimizer) runs on random values of the largest shapes: pictures of 224 pixels, sounds
of 10 s, captions of 64 tokens without padding. The allocator is held to the budget, as in every run.

- planned: peak of all tensors, of the task that takes most; the micro-batches are those of image/audio/text/fusion,
  /n where every n-th block is recomputed.
- tensors: the allocator's own peak of them; reserved: what it took from the device; all: reserved + the context, which
  is what the device holds beside that, where nobody else uses it. GiB.
- samples/s: of the whole effective batches, all tasks, `--steps` times each, below 1,024 after one that warms up;
  data lie ready in the host's memory, so nothing waits for them.
- smaller: how often a step ran out of memory and was done again in smaller parts.

Without --batches 8192 is run for `large` alone. `--jobs`: plans made at a time, in processes.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch

from benchmarks.plan_choice import Case, random_batch
from benchmarks.plans import BATCHES, LARGEST
from trimodal.config import SIZES, Config, StageConfig, load_config
from trimodal.memory import devices
from trimodal.memory.devices import GIB
from trimodal.training.fitting import Plan
from trimodal.training.loop import train_step
from trimodal.training.planner import TOWERS, DeviceSetup, plan_stages, without_speaker
from trimodal.training.run import Options, Run, open_run
from trimodal.training.stage import build_stage
from trimodal.training.tracking import read_records

LONG = 1024  # effective batch whose steps are so long that none is spent on warming up


class Row(NamedTuple):
    """One stage; GiB."""

    config: Config
    stage: StageConfig
    plan: Plan
    tensors: float
    reserved: float
    beside: float
    samples_per_s: float
    smaller: int

    def __str__(self) -> str:
        sizes = "/".join(f"{self.plan.micro_batch[tower]}" for tower in TOWERS)
        again = "/".join(str(self.plan.recompute[tower]) for tower in TOWERS)
        planned = self.plan.peak_bytes / GIB
        return (f"{self.config.model.size:5}  {self.config.effective_batch(self.stage):6,}  {self.stage.name:8}  "
                f"{self.config.budget_gb:6g}  {planned:7.2f}  {self.tensors:7.2f}  {self.reserved:8.2f}  "
                f"{self.reserved + self.beside:5.2f}  {self.reserved / planned:5.2f}  {self.samples_per_s:9.0f}  "
                f"{self.smaller:7}  {sizes} {'' if again == '0/0/0/0' else '(recompute ' + again + ')'}")


HEADER = ("size    batch  stage     budget  planned  tensors  reserved    all  ratio  samples/s  smaller  "
          "micro-batches of image/audio/text/fusion")


def configured(size: str, effective_batch: int, folder: Path) -> Config:
    steps = load_config().training.gradient_accumulation_steps
    return load_config(None, [
        f"model.size={size}", f"training.batch_size={effective_batch // steps}", "data.datasets=[synthetic]",
        "data.synthetic_images=128", "data.synthetic_sounds=128", f"paths.data_root={folder / 'data'}",
        f"paths.output_dir={folder / f'{size}_{effective_batch}'}", "model.word_embeddings=random", "data.workers=0"])


def plans_of(config: Config, setup: DeviceSetup) -> dict[str, Plan]:
    tasks = {row.name: without_speaker(row.tasks) for row in config.stages}
    return plan_stages(config, tasks, setup)


def measured(run: Run, row: StageConfig, plan: Plan, steps: int) -> Row:
    """The stage's steps for real. What a stage leaves is freed before the next."""
    tasks = without_speaker(row.tasks)
    run.fits[row.name] = plan.fit
    stage = build_stage(run, row, tasks, 1)
    batches = [random_batch(Case(run.config, row, task), "cuda").pin_memory() for task in tasks]  # as data arrive
    devices.free_cached(run.device)
    devices.reset_peak(run.device)
    run.tracker.open_bar(1, 0, row.name)
    began = 0.0
    first = 0 if run.config.effective_batch(row) >= LONG else 1
    for turn in range(steps + first):
        if turn == first:
            torch.cuda.synchronize()
            began = time.perf_counter()
        for task, batch in enumerate(batches):
            result = train_step(run, stage, task, batch)
    loss, _, norm, finite = result.read()
    seconds = time.perf_counter() - began
    assert finite, f"loss {loss}, norm of the gradient {norm}"
    run.tracker.close_bar()
    messages = [record.get("message", "") for record in read_records(run.tracker.path)]
    smaller = sum(message.startswith(f"[{row.name}] out of memory") for message in messages)
    free, total = torch.cuda.mem_get_info(run.device)
    return Row(run.config, row, plan, torch.cuda.max_memory_allocated() / GIB, devices.peak_gib(run.device).gib,
               (total - free - torch.cuda.memory_reserved()) / GIB,
               run.config.effective_batch(row) * len(tasks) * steps / seconds, smaller)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", help="effective batches, multiples of 4")
    parser.add_argument("--stages", nargs="+", default=[row.name for row in Config().stages])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    device = devices.choose_device("cuda")
    setup = DeviceSetup("cuda", devices.choose_precision(device, True).dtype)
    print(f"{date.today()}, torch {torch.__version__}, {devices.device_name(device)}, {str(setup.amp)[6:]}\n{HEADER}",
          flush=True)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        configs = [configured(size, batch, Path(name)) for size in args.sizes
                   for batch in args.batches or (*BATCHES, *([LARGEST] if size == "large" else []))]
        plans = [pool.submit(plans_of, config, setup) for config in configs]
        for config, found in zip(configs, plans, strict=True):
            with redirect_stdout(sys.stderr):
                run = open_run(config, Options("cuda"), None)
            for row in config.stages:
                if row.name in args.stages:
                    print(measured(run, row, found.result()[row.name], args.steps), flush=True)
            run.tracker.close()
            del run
            devices.free_cached(device)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
