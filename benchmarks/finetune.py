"""Speed and memory of finetune in this checkout against another one of the project, on the same batches; and, in this
one, of finetune against align.

    python benchmarks/finetune.py [CHECKOUT] [--cases CASE ...] [--demo-data ./data] [--turns 5]

Without a CHECKOUT it is that of BEFORE, from the history of this one. Two effective batches of generated pictures and
sounds with captions, with the tiny model: one that the budget holds whole, and one that it holds in micro-batches. Each
checkout plans, trains and is timed in a process of its own; the two take turns, in alternating order. Ratios are of
optimizer steps on batches that have been read; `CPU`: by the processes' CPU seconds, which other work on the machine
disturbs less. Peaks are the process's above what it held before the model was made, beside the plan of all tensors.
`first loss` and `norm` of the gradient show that both learn the same.

`demo`: samples per second of finetune over those of align, an epoch of the demo's recipe each. It needs the demo's
data: python download_datasets.py --datasets stamps.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "9d618e6"  # the last commit of which each objective encoded its own samples, before trimodal/
GENERATED = ("model.image_size=128", "stages.finetune.drop_path=0.1", "training.captions_per_visit=1")


@dataclass(frozen=True)
class Case:
    """What a process trains: a stage of a recipe, on the first batch of each task, or on all of an epoch."""

    recipe: str
    overrides: tuple[str, ...]
    stage: str
    rounds: int  # of all these batches in a turn
    all_batches: bool = False


def generated(size: int, budget_gb: float, rounds: int) -> Case:
    return Case("recipes/synthetic.yaml", (*GENERATED, f"training.batch_size={size}", f"memory.budget_gb={budget_gb}"),
                "finetune", rounds)


CASES = {"finetune_whole": generated(32, 4, 2), "finetune_micro_batches": generated(128, 1.7, 1)}


# ---- in a process of its own -------------------------------------------------------------------------------------


def serve(case: Case, data: str, answers: int) -> None:
    """Train in the checkout that is the current folder. Writes to `answers` a line of JSON about the plan and the first
    step, then one for each line that is read from stdin, about a turn of steps."""
    def answer(found: dict[str, Any]) -> None:
        os.write(answers, (json.dumps(found) + "\n").encode())

    sys.path[0] = os.getcwd()  # in the place of this folder
    is_flat = not Path("trimodal").exists()  # before the modules moved into the package
    config_of, loop, runs, stages, devices = (importlib.import_module(name) for name in (
        ("config", "training", "runs", "stages", "memory") if is_flat else
        ("trimodal.config", "trimodal.training.loop", "trimodal.training.run", "trimodal.training.stage",
         "trimodal.memory.devices")))
    getattr(devices, "keep_few_kernels" if is_flat else "prepare_process")()  # as a run begins
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = config_of.load_config(case.recipe, [*case.overrides, f"paths.data_root={data}", "data.workers=0",
                                                     f"paths.output_dir={folder}"])
        run = runs.open_run(config, runs.Options("cpu"), None)
        held = devices.peak_gib(run.device).gib if is_flat else run.held_gib
        row = next(row for row in config.stages if row.name == case.stage)
        tasks = stages.active_tasks(row, run.data)[0]
        (loop.plan if is_flat else loop.fit_stages)(run, {row.name: tasks}, None)
        run.tracker.open_bar(1, 0, row.name)
        stage = stages.build_stage(run, row, tasks, 100)
        jobs = stages.epoch_jobs(run, stage, 1)
        if not case.all_batches:
            jobs = [next(job for job in jobs if job[0] == task) for task in range(len(tasks))]
        read = getattr(importlib.import_module("datasets"), "loader" if is_flat else "Loader")
        inputs = [task.inputs for task in tasks]
        batches = list(zip(jobs, read(run.data, "train", jobs, config, inputs=inputs, train=True, epoch=1),
                           strict=True))

        def train() -> list[Any]:
            return [loop.train_step(run, stage, task, batch).read() for (task, _), batch in batches]

        loss, _, norm, _ = train()[0]
        devices.reset_peak(run.device)
        answer({"fit": str(run.fits[row.name]), "planned_gib": run.predicted_gib[row.name], "loss": loss, "norm": norm})
        for _ in sys.stdin:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            for _ in range(case.rounds):
                train()
            answer({"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s,
                    "samples": case.rounds * sum(len(indices) for _, indices in jobs),
                    "peak_gib": devices.peak_gib(run.device).gib - held})
        run.tracker.close()


# ---- turns ---------------------------------------------------------------------------------------------------------


class Served:
    """A process that trains in one checkout."""

    def __init__(self, checkout: Path, case: Case, data: str):
        reading, writing = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(vars(case)), data, str(writing)]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, cwd=checkout, text=True, pass_fds=[writing], stdin=subprocess.PIPE,
                                        stdout=self.said, stderr=self.said)
        os.close(writing)
        self.answers = os.fdopen(reading)
        self.turns: list[dict[str, Any]] = []
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"a process has ended: {self.said.read()[-2000:]}")
        return json.loads(line)

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(self.answer())

    def per_s(self, clock: str) -> list[float]:
        return [turn["samples"] / turn[clock] for turn in self.turns]

    @property
    def peak_gib(self) -> float:
        return max(turn["peak_gib"] for turn in self.turns)


Pair = tuple["Served", "Served"]


@contextlib.contextmanager
def compared(one: tuple[Path, Case], other: tuple[Path, Case], data: str, turns: int) -> Iterator[Pair]:
    """Two processes after `turns` turns of each."""
    pair = [Served(*which, data) for which in (one, other)]
    try:
        for turn in range(turns):
            for served in pair if turn % 2 == 0 else reversed(pair):
                served.turn()
        yield pair[0], pair[1]
    finally:
        for served in pair:
            served.process.kill()
            served.process.wait()


def ratios(this: Served, other: Served, clock: str = "wall_s") -> list[float]:
    return [a / b for a, b in zip(this.per_s(clock), other.per_s(clock), strict=True)]


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(name: str, this: Served, other: Served) -> None:
    print(f"{name}: this / other {shown(ratios(this, other))} of samples/s; CPU "
          f"{shown(ratios(this, other, 'cpu_s'))}")
    for title, served in (("this", this), ("other", other)):
        per_s, first = statistics.median(served.per_s("wall_s")), served.first
        print(f"  {title:5}  {per_s:6.2f} samples/s  peak {served.peak_gib:.2f} GiB, planned {first['planned_gib']:.2f}"
              f"  first loss {first['loss']:.4f} norm {first['norm']:.4f}  {first['fit']}", flush=True)


def against(checkout: Path, turns: int = 5, names: Sequence[str] = tuple(CASES)) -> dict[str, list[float]]:
    """Ratios of samples per second, by case; prints them."""
    found = {}
    with tempfile.TemporaryDirectory() as data:
        for name in names:
            with compared((ROOT, CASES[name]), (checkout, CASES[name]), data, turns) as (this, other):
                report(name, this, other)
                found[name] = ratios(this, other)
    return found


@contextlib.contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        files = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, check=True, input=files)
        yield Path(folder)


_turns: dict[str, list[float]] = {}  # measured already, for later runs


def measured() -> dict[str, float]:
    """One turn of each case: samples per second over those of BEFORE. Five are measured at a time."""
    if not all(_turns.values()) or not _turns:
        with checkout_of(BEFORE) as folder:
            _turns.update(against(folder))
    return {name: turns.pop(0) for name, turns in _turns.items()}


def demo(data: Path, turns: int = 5) -> list[float]:
    """Samples per second of the demo's finetune over those of its align; prints them."""
    finetune, align = (Case("recipes/demo.yaml", (), name, 1, all_batches=True) for name in ("finetune", "align"))
    with compared((ROOT, finetune), (ROOT, align), str(data.resolve()), turns) as (one, other):
        print(f"demo: finetune / align {shown(ratios(one, other))} of samples/s; CPU "
              f"{shown(ratios(one, other, 'cpu_s'))}; {statistics.median(one.per_s('wall_s')):.1f} and "
              f"{statistics.median(other.per_s('wall_s')):.1f}", flush=True)
        return ratios(one, other)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Case(**json.loads(sys.argv[2])), sys.argv[3], int(sys.argv[4]))
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import commit, hardware
    from trimodal.openmp import bound_waiting

    bound_waiting()  # of both checkouts' processes, which inherit it

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("other", nargs="?", type=Path, help=f"folder of the other checkout; none: of {BEFORE}")
    parser.add_argument("--demo-data", type=Path, help="data root that holds the demo's set; none: leave it out")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print(f"{date.today()}, {hardware()}; this {commit()}", flush=True)
    with contextlib.nullcontext(options.other) if options.other else checkout_of(BEFORE) as other:
        against(other, options.turns, options.cases)
    if options.demo_data:
        demo(options.demo_data, options.turns)


if __name__ == "__main__":
    main()
