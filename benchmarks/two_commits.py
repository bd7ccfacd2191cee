"""Speed and memory of training in this checkout against another one of the project, side by side.

    git worktree add /tmp/before a977262
    python benchmarks/two_commits.py /tmp/before --turns 5

Each turn trains the same short recipe once in each checkout, in alternating order, on generated data, and reads what
the runs have recorded themselves. Prints a ratio (this / other) for each stage: samples per second, and peak memory of
the process above what it held before the model was made; median, lowest and highest of the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

from benchmarks.attention_memory import cpu_name
from benchmarks.run import commit
from tests.project import ROOT

RECIPE = ("--config", "recipes/synthetic.yaml", "--epochs", "3", "--device", "cpu", "evaluation.resamples=0",
          "report.gallery_queries=0")

Stages = dict[str, tuple[float, float]]  # name -> samples/s, GiB


def train(checkout: Path, data: Path) -> Stages:
    """Train once in `checkout`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "run_training.py", *RECIPE, "--output-dir", folder, "--data-root", str(data)]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(folder) / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
    ends = [record for record in map(json.loads, lines) if record["kind"] == "stage"]
    return {end["stage"]: (end["samples"] / end["seconds"], end["peak_gib"] - end["held_gib"]) for end in ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    this, other = list[Stages](), list[Stages]()
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f} before; this {commit()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            pair = [(this, ROOT), (other, options.other)]
            for found, checkout in pair if turn % 2 == 0 else reversed(pair):
                found.append(train(checkout, Path(folder)))
    print("| stage | samples/s, this / other | GiB, this / other |\n| --- | ---: | ---: |")
    for stage in this[0]:
        cells = []
        for i in (0, 1):
            ratios = [a[stage][i] / b[stage][i] for a, b in zip(this, other, strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
