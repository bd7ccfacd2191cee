"""What does saving cost? Each size's checkpoints written as a run writes them, against the default time between two.

    python benchmarks/saving_cost.py [--sizes tiny small base large --rounds 3]

The state is that of the finetune stage after one step: weights, heads, moments of the optimizer; with new best weights
each time, so two files. `waits`: seconds that training stands still; `in the background`, as on a GPU: while the state
is copied on the host (here from host to host) and the files before it are finished. A share in % is that of
`training.save_every_minutes`; the limit is 2. The end of an epoch saves as well: `from min` is how long an epoch has to
be for that to cost at most 2 %.
Medians of the rounds, wall time: the disk and what else the machine does decide as well.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch

from benchmarks.attention_memory import cpu_name
from tests.small_runs import SmallRuns, batches, step
from trimodal.checkpoint import tensor_bytes
from trimodal.config import SIZES, load_config
from trimodal.training.saving import Saver
from trimodal.training.signals import Interruption

LIMIT_PCT = 2.0


def measure(size: str, folder: Path, rounds: int) -> tuple[float, float, float]:
    """GB of both files; seconds that training waits for it, written at once and in the background."""
    small = SmallRuns(folder / "shared")
    run = small.open(folder / "run", f"model.size={size}", "model.embed_dim=512", "model.num_classes=1000",
                     "model.vocab_size=30522", "model.word_embeddings=random")
    stage = small.stage(run, "finetune")
    step(run, stage, batches(run, stage)[0])
    waits: list[float] = []
    for in_background in (False, True):
        saver, seconds = Saver(run, {"finetune": 1}, Interruption()), []
        saver.in_background = in_background
        for _ in range(rounds):
            run.progress.epoch += 1
            run.best = {"stage": "finetune", "epoch": run.progress.epoch, "loss": 1.0,
                        "model_state_dict": run.model.state_dict()}
            start_s = time.perf_counter()
            saver.save("finetune", stage.state_dict)
            seconds.append(time.perf_counter() - start_s)
            saver.wait()  # ten minutes pass between two saves
        waits.append(statistics.median(seconds))
    run.tracker.close()
    state = [run.model.state_dict(), stage.state_dict(), run.best]
    return tensor_bytes(state) / 1e9, waits[0], waits[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    interval_s = 60 * load_config().training.save_every_minutes
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores; a save every "
          f"{interval_s / 60:g} minutes\n{'size':6}  {'GB':>5}  {'waits s':>7}  {'share %':>7}  "
          f"{'from min':>8}  {'in the background s':>19}  {'share %':>7}  {'from min':>8}", flush=True)
    worst = 0.0
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            size_gb, *waits = measure(size, Path(folder), args.rounds)
        shares = [100 * seconds / interval_s for seconds in waits]
        worst = max(worst, *shares)
        epochs = [seconds / 60 * 100 / LIMIT_PCT for seconds in waits]
        print(f"{size:6}  {size_gb:5.2f}  {waits[0]:7.2f}  {shares[0]:7.2f}  {epochs[0]:8.1f}  {waits[1]:19.2f}  "
              f"{shares[1]:7.2f}  {epochs[1]:8.1f}", flush=True)
    print(f"Largest share {worst:.2f} %, limit {LIMIT_PCT:g} %")
    return int(worst > LIMIT_PCT)


if __name__ == "__main__":
    sys.exit(main())
