"""Is anything lost? Kills a small run at random moments, goes on until it is through, and compares every bit.

    python benchmarks/kills.py [--kills 200]

SIGKILL after up to 4 seconds, over and over. The run (drawn pictures and sounds, and some in files that are decoded
first; `tiny`, all three stages) saves after every step; its number of reading processes changes with each start. At the
end its weights, optimizer, averages and all records must be those of a run that nobody stopped; times, memory and
restarts aside. The first difference ends the benchmark. The table says what was left where a kill had hit.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from tests.killing import in_process, killed_runs, with_files
from tests.small_runs import one_thread


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    args = parser.parse_args(argv)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores", flush=True)
    runs, hits = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as place, one_thread(), tqdm(total=args.kills, disable=None) as bar:
        folder = Path(place)
        small = with_files(folder / "shared")
        process = in_process(small, folder / "whole", "training.save_every_minutes=0")
        process.join()
        assert process.exitcode == 0, (folder / "whole.out").read_text("utf-8")
        for hits in killed_runs(small, folder / "whole", folder, args.kills):
            runs += 1
            bar.update(hits.total() - bar.n)
    for name, count in hits.most_common():
        print(f"{count:5}  {name}")
    print(f"{hits.total()} kills over {runs} runs, each of which ended with the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
