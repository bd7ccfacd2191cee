"""What does another process beside it cost a training step on the CPU, and what does it cost to be ready for one?

    python benchmarks/busy_machine.py                                # 5 turns of about a minute, on 2 idle cores
    python benchmarks/busy_machine.py --spins 1000 4000 PASSIVE    # which bound is best
    python benchmarks/run.py free_machine_cost busy_machine_slowdown

Steps of the stage align (tiny, 8 pictures of 224 pixels and their captions, float32, two threads) in processes that
differ in how long a waiting OpenMP thread spins: as OpenMP does by default, or bounded as every command does
(`openmp.py`). They take turns, first with all cores free, then with one process for each core that keeps it busy.
`cost`: time of a step more than by default, cores free. `slowdown`: time of a step with busy cores over that with free
ones; 2 is a fair share of each core. Medians over the turns decide.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal import openmp

THREADS = 2
DEFAULT, BOUNDED = "default", "bounded"
COST_PCT, SLOWDOWN = 3.0, 2.5  # the most that is allowed
SETTINGS = ["model.size=tiny", "training.batch_size=8", "training.gradient_accumulation_steps=1",
            "training.use_amp=false"]


class Turn(NamedTuple):
    """Steps a second of each kind of waiting, with free and with busy cores."""

    free: dict[str, float]
    busy: dict[str, float]

    def cost_pct(self, kind: str) -> float:
        return 100 * (self.free[DEFAULT] / self.free[kind] - 1)

    def slowdown(self, kind: str) -> float:
        return self.free[kind] / self.busy[kind]


class Trainer:
    """A process that does training steps when it is told to, and sleeps in between."""

    def __init__(self, kind: str):
        command = [sys.executable, __file__, "--trainer", kind]
        self.process = subprocess.Popen(command, env=environment(kind), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.answer()

    def answer(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that trains has ended; its own lines say why")
        return float(line)

    def steps_per_s(self, seconds: float) -> float:
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def environment(kind: str) -> dict[str, str]:
    """Without any choice of how to wait but that of `kind`, a number of spins or a policy."""
    own = {name: value for name, value in os.environ.items() if name not in openmp.OWN}
    own["OMP_NUM_THREADS"] = str(THREADS)
    if kind in (DEFAULT, BOUNDED):
        return own
    return own | {"GOMP_SPINCOUNT" if kind.isdigit() else "OMP_WAIT_POLICY": kind}


def train(kind: str) -> None:
    """In a process of its own: for each number of seconds read, train so long and print the steps a second."""
    if kind != DEFAULT:
        openmp.bound_waiting(lambda line: None)
    import torch

    import benchmarks.plan_choice as steps
    from trimodal.config import load_config

    torch.set_num_threads(THREADS)
    config = load_config(None, SETTINGS)
    row = next(row for row in config.stages if row.name == "align")
    case = steps.Case(config, row, row.tasks[0])
    trainer = steps.Trainer(case)
    at_once = steps.Key(tuple((tower, case.upper[tower], 0) for tower in case.towers))
    trainer.seconds(at_once)
    print(0.0, flush=True)
    for line in sys.stdin:
        count, begin_s = 0, time.perf_counter()
        while (passed_s := time.perf_counter() - begin_s) < float(line):
            trainer.seconds(at_once)
            count += 1
        print(count / passed_s, flush=True)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """One process for each core that computes all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def turns(kinds: Sequence[str], count: int, seconds: float) -> Iterator[Turn]:
    """Measure `count` times, `seconds` for each figure; the order of the kinds changes from turn to turn."""
    trainers = {kind: Trainer(kind) for kind in kinds}
    try:
        for number in range(count):
            order = list(kinds)[number % len(kinds):] + list(kinds)[:number % len(kinds)]
            free = {kind: trainers[kind].steps_per_s(seconds) for kind in order}
            with busy_cores():
                yield Turn(free, {kind: trainers[kind].steps_per_s(seconds) for kind in order})
    finally:
        for trainer in trainers.values():
            trainer.end()


def measured() -> dict[str, float]:
    """One turn, for `benchmarks/run.py`: the cost in % and the slowdown of what every command does."""
    [turn] = turns((DEFAULT, BOUNDED), 1, 20.0)
    return {"free_machine_cost": turn.cost_pct(BOUNDED), "busy_machine_slowdown": turn.slowdown(BOUNDED)}


def table(found: Sequence[Turn]) -> str:
    """A row for each kind of waiting: medians, and the range of the two figures that count."""
    lines = [f"{'waiting':>8}  {'steps/s free':>12}  {'busy':>6}  {'cost %':>18}  {'slowdown':>18}"]
    for kind in found[0].free:
        free, busy = (statistics.median(part[kind] for part in parts)
                      for parts in ([turn.free for turn in found], [turn.busy for turn in found]))
        shown = [_range([turn.cost_pct(kind) for turn in found], 1), _range([turn.slowdown(kind) for turn in found], 2)]
        lines.append(f"{kind:>8}  {free:12.2f}  {busy:6.2f}  {shown[0]:>18}  {shown[1]:>18}")
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}, {high})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each figure (default 15)")
    parser.add_argument("--spins", nargs="+", default=[], metavar="BOUND",
                        help="more kinds of waiting: values of GOMP_SPINCOUNT, or of OMP_WAIT_POLICY")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.trainer:
        train(options.trainer)
        return 0
    found = []
    for turn in turns([DEFAULT, BOUNDED, *options.spins], options.turns, options.seconds):
        found.append(turn)
        print(f"turn {len(found)}: cost {turn.cost_pct(BOUNDED):.1f} %, slowdown {turn.slowdown(BOUNDED):.2f}, by "
              f"default {turn.slowdown(DEFAULT):.2f}", file=sys.stderr, flush=True)
    from benchmarks.run import commit, hardware

    print(f"{date.today().isoformat()}, {commit()}, {hardware()}, {THREADS} threads")
    print(table(found))
    cost, slowdown = (statistics.median(getattr(turn, name)(BOUNDED) for turn in found)
                      for name in ("cost_pct", "slowdown"))
    print(f"limits: cost {COST_PCT:g} %, slowdown {SLOWDOWN:g}")
    return int(cost > COST_PCT or slowdown > SLOWDOWN)


if __name__ == "__main__":
    sys.exit(main())
