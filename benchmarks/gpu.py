"""This checkout against another one on the GPU of this machine: speed, share of the peak, memory, launch gaps.

    git worktree add /tmp/before 9d618e6
    bash benchmarks/gpu.sh --against /tmp/before [--sizes base large --batches 32 1024 4096 --minutes 7.5]
    bash benchmarks/gpu.sh --against . --this training.compile=on     # compiled blocks against none

Both sides train at once in processes of their own (benchmarks/gpu_worker.py) with the settings that users have: each
plans for its budget, then runs the step that trains on random values of the largest shapes, which lie ready in pinned
memory. They take turns, the first one changing, each turn one step of every task of a stage: at most nine, and as many
as `--seconds` allows, two at least. Stages are measured in the order of their weight (`order`) until `--minutes` are
over; those left out are named.

- samples/s: median of the turns; ratio: this / other, median and range of the turns' ratios.
- peak %: operations that a turn runs, those of recompute included, by torch's counter, over what torch.mm reaches in
  bfloat16 on 8192 x 8192 matrices in the same process. Compiled blocks are not counted: no figure there.
- planned, real: GiB of tensors, and what CUDA's allocator has reserved.
- idle %: of a turn, while no kernel runs on the GPU, by torch.profiler; kernels: how many run in it.

`--device cpu` tries the script itself.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import ROOT, commit, hardware
from trimodal.config import SIZES

STAGES = ("align", "finetune", "pretrain")
MOST_TURNS, LEAST_TURNS = 9, 2


class Case(NamedTuple):
    size: str
    batch: int
    stages: list[str]


class Worker:
    """A process that trains one checkout; see gpu_worker.py."""

    def __init__(self, checkout: Path, case: Case, device: str, folder: Path, settings: list[str]):
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), str(checkout), case.size,
                   str(case.batch), device, str(folder), *settings]
        self.checkout = checkout
        self.log = (folder / "log.txt").open("a+")
        self.process = subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True)

    def ask(self, do: str, **given: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"error: benchmarks/gpu_worker.py in {self.checkout} ended:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def told(self, do: str, **given: Any) -> dict[str, Any]:
        self.ask(do, **given)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def order(sizes: list[str], batches: list[int], stages: list[str]) -> list[Case]:
    """The cases, those first that tell most in little time: large effective batches of finetune take minutes, so they
    come last, whatever the size."""
    long = max(batches) if len(batches) > 1 else 0
    short = [Case(size, batch, [stage for stage in stages if batch != long or stage != "finetune"])
             for batch in batches for size in sizes]
    rest = [Case(size, long, ["finetune"]) for size in sizes if long and "finetune" in stages]
    return [case for case in (*short, *rest) if case.stages]


def compared(sides: list[Worker], stage: str, seconds: float) -> list[dict[str, Any]]:
    """Both sides' figures of one stage."""
    for side in sides:
        side.ask("stage", stage=stage)  # both plan at once
    found = [side.answer() for side in sides]
    rates: list[list[float]] = [[], []]
    began_s = time.perf_counter()
    while len(rates[0]) < LEAST_TURNS or (len(rates[0]) < MOST_TURNS and time.perf_counter() - began_s < seconds):
        turns = list(zip(sides, rates, strict=True))
        for side, of_side in turns if len(rates[0]) % 2 == 0 else reversed(turns):
            of_side.append(side.told("turn")["samples_per_s"])
    return [{**one, "rates": of_side, **side.told("idle"), **side.told("memory")}
            for one, of_side, side in zip(found, rates, sides, strict=True)]


HEADER = ("size    batch  stage     samples/s: this  other  ratio (range, turns)       peak %: this other   "
          "GiB planned/real: this        other   idle %: this other   kernels: this  other")


def row(case: Case, stage: str, figures: list[dict[str, Any]], peaks: list[float]) -> str:
    this, other = figures
    ratios = [a / b for a, b in zip(this["rates"], other["rates"], strict=True)]
    rates = [statistics.median(one["rates"]) for one in figures]
    shares = ["-" if one["tera_operations"] is None else
              f"{100 * one['tera_operations'] * rate / one['samples'] / peak:.0f}"
              for one, rate, peak in zip(figures, rates, peaks, strict=True)]
    memory = [f"{one['planned_gib']:.2f}/{one['peak_gib']:.2f}" for one in figures]
    idle = ["-" if one["idle_pct"] is None else f"{one['idle_pct']:.0f}" for one in figures]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)})"
    return (f"{case.size:5}  {case.batch:6,}  {stage:8}  {rates[0]:15,.0f}  {rates[1]:5,.0f}  {spread:24}  "
            f"{shares[0]:>12} {shares[1]:>5}  {memory[0]:>22} {memory[1]:>12}  {idle[0]:>12} {idle[1]:>5}  "
            f"{this['kernels']:13,}  {other['kernels']:5,}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base", "large"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 1024, 4096], help="effective batches")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--this", nargs="+", default=[], metavar="KEY=VALUE", help="settings of this checkout alone")
    parser.add_argument("--both", nargs="+", default=[], metavar="KEY=VALUE", help="settings of both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the turns of a stage, both sides together")
    parser.add_argument("--minutes", type=float, default=7.5, help="in all; stages that would begin later are left out")
    args = parser.parse_args(argv)
    until_s = time.perf_counter() + 60 * args.minutes
    print(f"{date.today()}, {hardware()}; this {commit()}, other {args.against}; {' '.join(args.this + args.both)}\n"
          f"{HEADER}", flush=True)
    left_out = []
    with tempfile.TemporaryDirectory() as name:
        for case in order(args.sizes, args.batches, args.stages):
            if time.perf_counter() > until_s:
                left_out += [f"{case.size} {case.batch:,} {stage}" for stage in case.stages]
                continue
            sides = []
            for side, checkout in enumerate((ROOT, args.against.resolve())):
                folder = Path(name) / str(side)
                folder.mkdir(exist_ok=True)
                sides.append(Worker(checkout, case, args.device, folder, args.both + (args.this if not side else [])))
            peaks = [side.told("peak")["tera_per_s"] for side in sides]
            for stage in case.stages:
                if time.perf_counter() > until_s:
                    left_out.append(f"{case.size} {case.batch:,} {stage}")
                    continue
                print(row(case, stage, compared(sides, stage, args.seconds), peaks), flush=True)
            for one in sides:
                one.close()
    print(f"left out for lack of time: {', '.join(left_out) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
