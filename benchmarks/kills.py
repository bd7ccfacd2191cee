"""Is anything lost? Kills small runs at random moments, goes on until they are through, and compares every bit.

    python benchmarks/kills.py [--kills 200] [--jobs 1]

SIGKILL over and over, at most 20 times a run, up to a second after its start or after some of its records. A run
(drawn pictures and sounds, and some in files that are decoded first; `nano`, all three stages) saves after every step;
its number of reading processes changes with each start. At the end its weights, optimizer, averages and all records
must be those of a run that nobody stopped; times, memory and restarts aside. The first difference ends the benchmark.
The table says what was left where a kill had hit. `--jobs`: runs at a time.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import date
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from tests.killing import in_process, killed_run, with_files
from tests.small_runs import SmallRuns

MOST = 20  # kills of one run


def killed(small: SmallRuns, whole: Path, folder: Path, turn: int, most: int) -> list[str]:
    return killed_run(small, whole, folder, turn, most, plans=turn == 1)


def all_kills(folder: Path, kills: int, jobs: int) -> Iterator[list[str]]:
    """Where the kills of each run hit, until there were as many as wanted."""
    small = with_files(folder / "shared")
    process = in_process(small, folder / "whole", "training.save_every_minutes=0")
    process.join()
    assert process.exitcode == 0, (folder / "whole.out").read_text("utf-8")
    turns, done = itertools.count(1), 0
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        def one_more() -> Future[list[str]]:
            return pool.submit(killed, small, folder / "whole", folder, next(turns), min(MOST, -(-kills // jobs)))

        running = {one_more() for _ in range(jobs)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                done += len(future.result())
                yield future.result()
            if done < kills:
                running |= {one_more() for _ in ended}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least; runs that have begun are finished")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {args.jobs} jobs",
          flush=True)
    runs, hits = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, disable=None) as bar:
        for found in all_kills(Path(folder), args.kills, args.jobs):
            runs += 1
            hits.update(found)
            bar.update(len(found))
    for name, count in hits.most_common():
        print(f"{count:5}  {name}")
    print(f"{hits.total()} kills over {runs} runs, each of which ended with the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
