"""One side of benchmarks/gpu.py: trains a stage of some checkout of the project step by step, as it is told on stdin.

    echo '{"do": "stage", "stage": "align"}' |
        python benchmarks/gpu_worker.py CHECKOUT SIZE BATCH DEVICE FOLDER [KEY=VALUE ...]

Answers each line of JSON by one. Imports the checkout's own modules: those of the package, or the flat ones that stood
in the root up to 9d618e6 and after it for a while.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = {"devices": "trimodal.memory.devices", "planner": "trimodal.training.planner", "config": "trimodal.config",
           "run": "trimodal.training.run", "stage": "trimodal.training.stage", "loop": "trimodal.training.loop"}
FLAT = {"devices": "memory", "planner": "planning", "config": "config", "run": "runs", "stage": "stages",
        "loop": "training"}
PEAK_SIZE = 8192  # of the square matrices whose product says what a GPU can do
GIB = 1 << 30


class Side:
    """A run of one checkout at one size and effective batch, with random batches of the largest shapes."""

    def __init__(self, checkout: Path, size: str, batch: int, device: str, folder: Path, settings: list[str]):
        sys.path.insert(0, str(checkout))
        places = PACKAGE if (checkout / "trimodal").is_dir() else FLAT
        self.of = {name: import_module(module) for name, module in places.items()}
        self.choice = import_module("benchmarks.plan_choice")
        config = self.of["config"].load_config(None, [
            f"model.size={size}", f"training.batch_size={batch}", "training.gradient_accumulation_steps=1",
            "data.datasets=[synthetic]", "data.synthetic_images=128", "data.synthetic_sounds=128", "data.workers=0",
            "model.word_embeddings=random", f"paths.data_root={folder / 'data'}",
            f"paths.output_dir={folder / f'{size}_{batch}'}", *settings])
        self.device = self.of["devices"].choose_device(device)
        self.run = self.of["run"].open_run(config, self.of["run"].Options(device), None)

    def stage(self, stage: str) -> dict[str, Any]:
        """Plan and build a stage; two turns warm up, and tell what is computed."""
        from torch.utils.flop_counter import FlopCounterMode

        row = next(row for row in self.run.config.stages if row.name == stage)
        self.tasks = without_speaker(self.of["planner"].without_speaker, row.tasks)
        kind = getattr(self.of["planner"], "DeviceSetup", None) or self.of["planner"].Place
        plan = self.of["planner"].plan_stages(self.run.config, {stage: self.tasks},
                                              kind(self.device.type, self.run.precision.dtype))[stage]
        self.run.fits[stage] = plan.fit
        self.built = self.of["stage"].build_stage(self.run, row, self.tasks, 1)
        self.batches = [self.choice.random_batch(self.choice.Case(self.run.config, row, task), self.device.type)
                        for task in self.tasks]
        if self.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]
        self.samples = self.run.config.effective_batch(row) * len(self.tasks)
        self.of["devices"].free_cached(self.device)
        self.of["devices"].reset_peak(self.device)
        self.run.tracker.open_bar(1, 0, stage)
        self.turn()
        counter = FlopCounterMode(display=False)
        is_compiled = getattr(self.run, "compiled_blocks", None) is not None  # and then it sees nothing of the blocks
        with contextlib.nullcontext() if is_compiled else counter:
            self.turn()
        return {"planned_gib": plan.peak_bytes / GIB, "samples": self.samples, "fit": str(plan.fit),
                "tera_operations": None if is_compiled else counter.get_total_flops() / 1e12}

    def turn(self) -> dict[str, Any]:
        """One step of each task."""
        self.wait()
        began_s = time.perf_counter()
        for number, batch in enumerate(self.batches):
            result = self.of["loop"].train_step(self.run, self.built, number, batch)
        _, _, norm, is_finite = result.read()
        seconds = time.perf_counter() - began_s
        assert is_finite, f"norm of the gradient {norm}"
        return {"samples_per_s": self.samples / seconds, "seconds": seconds}

    def memory(self) -> dict[str, Any]:
        """What the stage has taken; the next one starts from nothing."""
        self.run.tracker.close_bar()
        return {"peak_gib": self.of["devices"].peak_gib(self.device).gib}

    def idle(self) -> dict[str, Any]:
        """Share of a turn in which the GPU runs no kernel, since none has been launched or all are done; None on a
        CPU. And how many kernels it runs."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CUDA] if self.device.type == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=kinds) as found:
            seconds = self.turn()["seconds"]
        events = [(event.time_range.start, event.time_range.end) for event in found.events()
                  if event.device_type == torch.autograd.DeviceType.CUDA]
        return {"idle_pct": 100 * (1 - busy(events) / (1e6 * seconds)) if events else None, "kernels": len(events)}

    def peak(self) -> dict[str, Any]:
        """What torch.mm reaches on this device in bfloat16, in tera-operations per second."""
        import torch

        n = PEAK_SIZE if self.device.type == "cuda" else 512
        a = torch.ones(n, n, dtype=torch.bfloat16, device=self.device)
        seconds = []
        for _ in range(8):
            self.wait()
            began_s = time.perf_counter()
            for _ in range(4):
                a @ a
            self.wait()
            seconds.append((time.perf_counter() - began_s) / 4)
        return {"tera_per_s": 2 * n**3 / min(seconds) / 1e12}

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def without_speaker(reduce: Any, tasks: Iterable[Any]) -> list[Any]:
    """The tasks without the objective that synthetic sounds have no labels for; at 9d618e6 `reduce` takes one."""
    try:
        return list(reduce(list(tasks)))
    except AttributeError:
        return [reduce(task) for task in tasks]


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main(checkout: str, size: str, batch: str, device: str, folder: str, *settings: str) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a run prints is no answer
    side = Side(Path(checkout).resolve(), size, int(batch), device, Path(folder), list(settings))
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(side, asked.pop("do"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
