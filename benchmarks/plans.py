"""What `--plan` finds for a GPU with bf16: each size at several effective batches, in its default budget.

    python benchmarks/plans.py [--sizes tiny small base large] [--batches 32 1024 4096 8192]

Planned, nothing of it measured: the real steps run on fake tensors, without a GPU. Stages and data are those of
config.yaml: 224 pixels, sounds of 10 s, captions of 64 tokens. GiB: tensors at the peak + what is left free for the
context, gaps and workspaces. Micro-batches are those of image/audio/text/fusion; 32/2: of 32, every 2nd block
recomputed. Without --batches 8192 is planned for `large` alone. What each row's planning took goes to stderr: seconds,
and CPU seconds of this process and of those beside it, which count where others use the machine as well.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch

from trimodal.config import SIZES, Config, load_config
from trimodal.memory.devices import GIB
from trimodal.training.fitting import OverBudget, Plan
from trimodal.training.planner import TOWERS, DeviceSetup, plan_stages, without_speaker

BATCHES, LARGEST = (32, 1024, 4096), 8192
SETUP = DeviceSetup("cuda", torch.bfloat16)


def rows(sizes: Sequence[str] = tuple(SIZES), batches: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """Size and effective batch of each row of the table."""
    return [(size, batch) for size in sizes
            for batch in batches or (*BATCHES, *([LARGEST] if size == "large" else []))]


def configured(size: str, effective_batch: int, folder: str) -> Config:
    steps = load_config().training.gradient_accumulation_steps
    return load_config(None, [f"model.size={size}", f"training.batch_size={effective_batch // steps}",
                              f"paths.output_dir={folder}"])


def plans_of(config: Config) -> dict[str, Plan]:
    tasks = {row.name: without_speaker(row.tasks) for row in config.stages}
    return plan_stages(config, tasks, SETUP)


def cell(plan: Plan) -> str:
    sizes = ", ".join(f"{plan.micro_batch[tower]}" + (f"/{n}" if (n := plan.recompute[tower]) else "")
                      for tower in TOWERS)
    return f"{plan.peak_bytes / GIB:.1f} + {plan.allowance_bytes / GIB:.1f}: {sizes}"


def table_row(config: Config, plans: Mapping[str, Plan] | OverBudget) -> str:
    cells = ["fits not" if isinstance(plans, OverBudget) else cell(plans[row.name]) for row in config.stages]
    return f"| {config.model.size} | {config.training.effective_batch:,} | {config.budget_gb:g} | " + " | ".join(
        cells) + " |"


def cpu_seconds(since: os.times_result) -> str:
    """Of this process and, of those that it started and that have ended, of all together."""
    now = os.times()
    own = now.user + now.system - since.user - since.system
    beside = now.children_user + now.children_system - since.children_user - since.children_system
    return f"{own:.0f} s" + (f" and {beside:.0f} s beside it" if beside else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", help="effective batches, multiples of 4")
    args = parser.parse_args(argv)
    stages = " | ".join(row.name for row in Config().stages)
    print(f"Planned for CUDA with bf16, torch {torch.__version__}; GiB of tensors + allowance: micro-batches of "
          f"{', '.join(TOWERS)}\n\n| size | effective batch | budget GiB | {stages} |\n"
          "| --- | ---: | ---: | --- | --- | --- |", flush=True)
    for size, batch in rows(args.sizes, args.batches):
        with tempfile.TemporaryDirectory() as folder:
            config, began, cpu = configured(size, batch, folder), time.perf_counter(), os.times()
            found: Mapping[str, Plan] | OverBudget
            try:
                found = plans_of(config)
            except OverBudget as error:
                found = error
                print(error, file=sys.stderr)
        seconds = time.perf_counter() - began
        print(table_row(config, found), flush=True)
        print(f"{size} {batch}: {seconds:.0f} s, CPU {cpu_seconds(cpu)}, load {os.getloadavg()[0]:.1f}",
              file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
