"""Is what two ways of splitting a batch differ in rounding, or more? Weights after two steps, in float32 and float64.

    python benchmarks/rounding.py [--size tiny]

A task of each stage is trained two steps of 32 samples at once and in micro-batches of 16, 8, 7; shown is the norm of
the difference of all weights, as a part of their norm. What is more than rounding would be as large in float64.
ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make the CPU an older one. The last column shows how far the steps moved.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import Tensor

from benchmarks.attention_memory import cpu_name
from benchmarks.run import commit
from tests.small_runs import SmallRuns, float64, trained

TASKS = (("pretrain", 0), ("pretrain", 1), ("align", 0), ("align", 1), ("finetune", 0))
MICRO_BATCHES = (16, 8, 7)


def weights_after(small: SmallRuns, size: str, stage: str, task: int, micro_batch: int, steps: int) -> Tensor:
    """All weights after some steps, in float64 whatever they are in."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run, _ = trained(small, Path(folder), stage, micro_batch, steps, task, f"model.size={size}")
        run.tracker.close()
    return torch.cat([value.flatten().double() for value in run.model.state_dict().values()])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    size = parser.parse_args(argv).size
    torch.set_num_threads(1)
    kind_of_cpu = torch.backends.cpu.get_cpu_capability()
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {cpu_name()} ({kind_of_cpu}), {size}")
    print("stage     task  type     " + "".join(f"{f'32 = {n} + ...':>14}" for n in MICRO_BATCHES) + "         moved")
    with tempfile.TemporaryDirectory() as folder:
        small = SmallRuns(Path(folder))
        for kind, context in (("float32", contextlib.nullcontext()), ("float64", float64())):
            with context:
                for stage, task in TASKS:
                    start, whole = (weights_after(small, size, stage, task, 32, steps) for steps in (0, 2))
                    parts = [weights_after(small, size, stage, task, n, 2) for n in MICRO_BATCHES]
                    shown = "".join(f"{float((whole - part).norm() / whole.norm()):14.1e}" for part in parts)
                    print(f"{stage:8}  {task:4}  {kind}  {shown}{float((whole - start).norm() / start.norm()):14.1e}",
                          flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
