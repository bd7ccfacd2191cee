"""Is the planner's choice the fast one? Compared, run for real on a CPU, with a sweep of all that fits as well.

    python benchmarks/plan_choice.py [--stages align finetune --tasks image+text audio+text --rounds 9]

The sweep: micro-batches of 1, 2, 4, ..., with every n-th block recomputed (n of 0, 4, 2, 1); of one or two towers every
combination, of three (as in finetune, with the fusion) those of all towers alike or with one tower whole. Their peaks
are measured as the planner measures. The budgets lie between the smallest and the largest of them: in %, 100 takes
everything at once, 0 only what takes least. The step is the one that trains, float32, on random values of the largest
shapes.

Times are CPU seconds of one thread, since others may use the machine; medians of the rounds, in which the fits take
turns. After the first round those go that are 1.3 times slower than the fastest in every budget that they fit. `ratio`:
the time of the planner's choice over that of the fastest of the sweep that fits the same budget; `slower`: over that of
the fastest of all. Sizes are written as image 8/2: micro-batches of 8, every 2nd block recomputed.
"""

import argparse
import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.attention_memory import cpu_name
from model import TriModalModel
from trimodal.config import Config, StageConfig, TaskConfig, load_config
from trimodal.data.batches import Batch
from trimodal.memory.devices import CONTEXT_GIB, GIB, Fit
from trimodal.memory.tracker import Usage
from trimodal.objectives import OBJECTIVES, build_objective
from trimodal.objectives.base import learn
from trimodal.objectives.step import Step
from trimodal.training.fitting import Limits, plan_fit
from trimodal.training.optimizer import Optimizer
from trimodal.training.planner import DeviceSetup, TaskMeasure, apply_recompute, largest_batch, stage_upper

LIMIT = 1.10
SLOW = 1.3  # times the fastest: not run again after the first round
RECOMPUTE = (0, 4, 2, 1)
LINES_PCT = (100, 70, 50, 35, 25, 15, 8, 3, 0)
SETUP = DeviceSetup("cpu", None)


class Key(NamedTuple):
    """What of a fit counts for a task."""

    towers: tuple[tuple[str, int, int], ...]  # tower, micro-batch, recompute, of those that the task uses
    keeps: bool = False  # the tokens of all samples, for the fusion


@dataclasses.dataclass(frozen=True)
class Case:
    """One task of a stage."""

    config: Config
    row: StageConfig
    task: TaskConfig

    @property
    def upper(self) -> dict[str, int]:
        return stage_upper(self.config, self.row, SETUP)

    @property
    def fuses(self) -> bool:
        return any(OBJECTIVES[name].scope == "fusion" for name in self.task.objectives)

    @property
    def towers(self) -> list[str]:
        return [tower for tower in self.upper if tower in self.task.inputs or (self.fuses and tower == "fusion")]

    def fit(self, key: Key) -> Fit:
        return Fit(self.upper | {tower: size for tower, size, _ in key.towers},
                   dict.fromkeys(self.upper, 0) | {tower: every for tower, _, every in key.towers}, key.keeps)

    def key(self, fit: Fit) -> Key:
        return Key(tuple((tower, fit.micro_batch[tower], fit.recompute[tower]) for tower in self.towers),
                   self.fuses and fit.keep_tokens)

    def sweep(self) -> list[Key]:
        return [Key(towers, keeps) for keeps in ((True, False) if self.fuses else (False,))
                for towers in self._mixtures()]

    def _mixtures(self) -> list[tuple[tuple[str, int, int], ...]]:
        powers = [[1 << exponent for exponent in range(self.upper[tower].bit_length())] for tower in self.towers]
        if len(self.towers) <= 2:
            return list(itertools.product(*([(tower, size, every) for size in sizes for every in RECOMPUTE]
                                            for tower, sizes in zip(self.towers, powers, strict=True))))
        *small, most = max(powers)
        alike = [dict.fromkeys(self.towers, size) for size in (*small, most)]
        alike += [dict.fromkeys(self.towers, size) | {tower: most} for size in small for tower in self.towers]
        return [tuple((tower, of[tower], every) for tower in self.towers) for of in alike for every in RECOMPUTE]


class Peaks:
    """Measures a case's fits as the planner does, each once for all budgets."""

    def __init__(self, case: Case):
        self.case, self.known = case, dict[Key, Usage]()
        self.measure = TaskMeasure(case.config, case.row, case.task, SETUP)

    def __call__(self, fit: Fit, limit_bytes: int | None) -> Usage | None:
        key = self.case.key(fit)
        if key not in self.known:
            usage = self.measure(fit)
            assert usage is not None, "no limit, so there is a figure"
            self.known[key] = usage
        return self.known[key] if limit_bytes is None or self.known[key].peak_bytes <= limit_bytes else None

    def peak_bytes(self, key: Key) -> int:
        usage = self(self.case.fit(key), None)
        assert usage is not None
        return usage.peak_bytes

    def chosen(self, line_bytes: int) -> Key:
        """The planner's choice where `line_bytes` are for tensors."""
        limits = Limits(line_bytes + int(CONTEXT_GIB["cpu"] * GIB), "cpu", 1.0)
        are_free = all(OBJECTIVES[name].scope == "tower" for name in self.case.task.objectives)
        plan = plan_fit(self, self.case.upper, limits, parts_are_free=are_free, fuses=self.case.fuses)
        return self.case.key(plan.fit)


def random_batch(case: Case, device: str = "cpu") -> Batch:
    """A batch of the largest shapes, full of values: nothing is padding, each sample has its own caption. `device`:
    where pictures and sounds are drawn; they lie on the host."""
    with torch.device("meta"):
        model = TriModalModel(case.config.model)
    batch = largest_batch(case.config, case.row, case.task, model)
    rows = torch.arange(len(batch.sample_ids))
    columns: dict[str, Any] = {"sample_ids": rows, "noise": {k: torch.rand_like(v) for k, v in batch.noise.items()}}
    columns["concepts"] = torch.arange(case.config.model.num_classes) % 200 == rows[:, None]  # five of 1,000
    if batch.images is not None:
        columns["images"] = torch.randint(256, batch.images.shape, dtype=torch.uint8, device=device).cpu()
    if batch.audio is not None:
        columns |= {"audio": torch.randn(batch.audio.shape, device=device).half().cpu(),
                    "audio_lengths": torch.full_like(rows, batch.audio.shape[1])}
    if batch.input_ids is not None:
        captions = torch.arange(len(batch.input_ids))
        columns |= {"input_ids": torch.randint(1000, case.config.model.vocab_size, batch.input_ids.shape),
                    "attention_mask": torch.ones_like(batch.input_ids).bool(), "caption_ids": captions,
                    "caption_owner": captions * len(rows) // len(captions)}
    return dataclasses.replace(batch, **columns)


class Trainer:
    """Real optimizer steps of a case at any fit."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        training = case.config.training
        self.case, self.batch = case, random_batch(case)
        self.model = TriModalModel(case.config.model)
        self.objectives = [build_objective(name, self.model, case.task.inputs, 0, training)
                           for name in OBJECTIVES if name in case.task.objectives]
        both = nn.ModuleDict({"model": self.model, "objectives": nn.ModuleList(self.objectives)})
        self.optimizer = Optimizer(both, training)
        self.optimizer.allocate()

    def seconds(self, key: Key) -> float:
        fit, row = self.case.fit(key), self.case.row
        apply_recompute(self.model, fit)
        gc.collect()
        began = time.process_time()
        step = Step(model=self.model, batch=self.batch, device=torch.device("cpu"), micro_batch=fit.micro_batch,
                    autocast=lambda: torch.autocast("cpu", enabled=False), drop_path=row.drop_path,
                    keep={"image": row.image_keep, "audio": row.audio_keep}, keep_tokens=fit.keep_tokens,
                    num_concepts=self.case.config.model.num_classes)
        learn(step, [(1.0, objective) for objective in self.objectives], self.optimizer.backward)
        self.optimizer.step(1e-5)
        return time.process_time() - began


class Line(NamedTuple):
    """A budget: what is left for tensors, the planner's choice, what of the sweep fits."""

    percent: int
    line_bytes: int
    chosen: Key
    fitting: list[Key]


def lines_of(measure: Peaks) -> list[Line]:
    peaks = {key: measure.peak_bytes(key) for key in tqdm(measure.case.sweep(), desc="peaks", disable=None)}
    low, high, found = min(peaks.values()), max(peaks.values()), []
    for percent in LINES_PCT:
        line = low + (high - low) * percent // 100
        found.append(Line(percent, line, measure.chosen(line), [key for key, peak in peaks.items() if peak <= line]))
    return found


def timed(case: Case, lines: Sequence[Line], rounds: int) -> dict[Key, float]:
    """Median seconds of each fit that some line allows; of those that were sifted out, of one."""
    trainer, seconds = Trainer(case), dict[Key, list[float]]()
    keys = list(dict.fromkeys(key for line in lines for key in (line.chosen, *line.fitting)))
    trainer.seconds(keys[0])  # the first step is slower
    for i in tqdm(range(rounds), desc=case.row.name, disable=None):
        for key in keys:
            seconds.setdefault(key, []).append(trainer.seconds(key))
        if i == 0:
            keys = [key for key in keys if is_fast(key, lines, {key: own[0] for key, own in seconds.items()})]
    return {key: statistics.median(own) for key, own in seconds.items()}


def is_fast(key: Key, lines: Sequence[Line], seconds: Mapping[Key, float]) -> bool:
    return any(key == line.chosen or (key in line.fitting and
                                      seconds[key] <= SLOW * min(seconds[other] for other in line.fitting))
               for line in lines)


def write(key: Key) -> str:
    towers = " ".join(f"{tower} {size}" + (f"/{every}" if every else "") for tower, size, every in key.towers)
    return towers + (" kept" if key.keeps else "")


def compare(case: Case, rounds: int) -> list[float]:
    """Prints one row for each budget; the ratios."""
    measure = Peaks(case)
    lines = lines_of(measure)
    seconds, ratios = timed(case, lines, rounds), []
    for line in lines:
        fastest = min(line.fitting, key=lambda key: seconds[key])
        ratios.append(seconds[line.chosen] / seconds[fastest])
        print(f"{case.row.name:8}  {'+'.join(case.task.inputs):10}  {line.percent:4}  {line.line_bytes / 2**20:5.0f}  "
              f"{len(line.fitting):7}  {ratios[-1]:5.2f}  {seconds[line.chosen] / min(seconds.values()):6.2f}  "
              f"{write(line.chosen):34}  {write(fastest)}", flush=True)
    return ratios


def cases(args: argparse.Namespace) -> list[Case]:
    steps = load_config().training.gradient_accumulation_steps
    config = load_config(None, [f"model.size={args.size}", f"model.image_size={args.image_size}",
                                f"model.context_length={args.tokens}", f"data.audio_max_s={args.seconds}",
                                f"training.batch_size={args.batch // steps}", "model.word_embeddings=random",
                                "model.vocab_size=2000", f"training.optimizer={args.optimizer}"])
    return [Case(config, row, task) for row in config.stages if row.name in args.stages
            for task in row.tasks if "+".join(task.inputs) in args.tasks]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=["align", "finetune"])
    parser.add_argument("--tasks", nargs="+", default=["image+text", "audio+text"])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=16, help="effective batch, a multiple of 4")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="of sounds")
    parser.add_argument("--tokens", type=int, default=32, help="of captions")
    parser.add_argument("--optimizer", default="adamw", help="muon adds the same to all fits, and so hides differences")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, 1 thread, float32, {args.size}, effective batch "
          f"{args.batch}\n{'stage':8}  {'task':10}  {'%':>4}  {'MiB':>5}  fitting  ratio  slower  "
          f"{'planned':34}  fastest", flush=True)
    ratios = [ratio for case in cases(args) for ratio in compare(case, args.rounds)]
    print(f"Largest ratio {max(ratios):.2f}, limit {LIMIT:.2f}")
    return int(max(ratios) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
