"""Is anything lost? Kills a small run at random moments, goes on until it is through, and compares every bit.

    python benchmarks/kills.py [--kills 200]

SIGKILL after up to 4 seconds, over and over: in the preparation of data, in each stage and between them, in validation,
while saving, in the last evaluation. The run (synthetic, `tiny`, all three stages) saves after every step; its number
of reading processes changes with each start. At the end its weights, optimizer, averages and all records must be those
of a run that nobody stopped; times, memory and restarts aside. The first difference ends the benchmark.
"""

import argparse
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from tests.killing import RECIPE, killed_runs
from tests.small_runs import SmallRuns, one_thread


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    args = parser.parse_args(argv)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores", flush=True)
    runs, done, begin_s = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place, one_thread(), tqdm(total=args.kills, disable=None) as bar:
        folder = Path(place)
        small = SmallRuns(folder / "shared")
        small.train(folder / "whole", *RECIPE, "training.save_every_minutes=0")
        for done in killed_runs(small, folder / "whole", folder, args.kills):
            runs += 1
            bar.update(done - bar.n)
            print(f"run {runs}: the same bits after {done} kills so far", flush=True)
    print(f"{done} kills over {runs} runs, each ended with the same bits; {(time.monotonic() - begin_s) / 60:.0f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
