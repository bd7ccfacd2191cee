"""Plans the memory of every stage: its real training step, on fake tensors, before a run and for `--plan`.

The step is the one that trains (`losses`, `optimization`), over a batch of the largest shapes that the stage can meet:
sounds of `data.audio_max_s`, captions of `model.context_length`. What a step reads off its data on the host (how many
patches are kept, which words are hidden) is put at its worst case, since fake tensors have no values. At most
`PARTS` micro-batches of each tower are run, beside inputs and features of full size: further ones free what they took.

Everything at once, the likeliest choice, is tried first, by two whole steps of each task. Where that takes too much,
the search runs the gradients alone at each fit that it tries, and what it chooses for two whole steps. All of them end
as soon as they take too much; what a larger or a smaller fit has told already is not run. Under torchrun a plan is that
of each process: its share of the batch, the features of all.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from operator import ge, le
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import model as model_module
from model import KERNELS_OF, TriModalModel
from trimodal.config import AUDIO_WINDOW_FRAMES, FRAME_RATE_HZ, NUM_MELS, Config, StageConfig, TaskConfig
from trimodal.data.batches import Batch
from trimodal.memory import shapes
from trimodal.memory import tracker as tracker_module
from trimodal.memory.devices import EVALUATION, GIB, Fit
from trimodal.memory.tracker import OverLimit, Usage
from trimodal.objectives import OBJECTIVES, build_objective
from trimodal.objectives.base import Objective, learn
from trimodal.objectives.step import Share, Step
from trimodal.training import budget
from trimodal.training.budget import Limits, Plan
from trimodal.training.optimizer import MovingAverage, Optimizer, freeze

PARTS = 2
_SOURCES = ("objectives/step", "objectives/base", "objectives/contrastive", "objectives/matching", "objectives/labels",
            "objectives/masked", "memory/tracker", "memory/shapes", "memory/devices",
            "training/planner", "training/optimizer")
TOWERS = ("image", "audio", "text", "fusion")

Tracing = Callable[[int | None], AbstractContextManager[tracker_module.PeakMemory]]


@dataclass(frozen=True)
class Place:
    """Where a step is planned to run."""

    device: str  # type of device
    amp: torch.dtype | None  # of autocast; None: float32
    num_speakers: int = 0
    processes: int = 1  # that share each effective batch
    ratio: float | None = None  # budget.calibration of the device


@dataclass
class PlanStep(Step):
    """A step on fake tensors, which have no values and all lie on the CPU: what depends on values takes its worst case,
    and where it is planned for another device a transfer makes a copy."""

    is_on_host: bool = True

    def to_device(self, value: Tensor) -> Tensor:
        return value if self.is_on_host else value.clone()

    def read(self, number: Tensor, most: int) -> int:
        return most

    def gather(self, features: Tensor, num_rows: int) -> Tensor:
        others = features.new_zeros(num_rows - len(features), features.shape[1])
        return tracker_module.loss_ends_at(torch.cat([features, others]) if len(others) else features)


def largest_batch(config: Config, row: StageConfig, task: TaskConfig) -> Batch:
    """A batch of the largest shapes of this task, with no meaningful values."""
    B = config.effective_batch(row)
    C, L = B * config.training.captions_per_visit, config.model.context_length
    T = min(-(-int(config.data.audio_max_s * FRAME_RATE_HZ) // 16) * 16, AUDIO_WINDOW_FRAMES)
    S, zeros = config.model.image_size, torch.zeros
    noise = {"path": zeros(B, 64), "drop_text": zeros(B)}
    columns: dict[str, Any] = {"concepts": zeros(B, config.model.num_classes, dtype=torch.bool)}
    if "image" in task.inputs:
        columns["images"] = zeros(B, 3, S, S, dtype=torch.uint8)
        noise["image"] = zeros(B, (S // 16) ** 2)
    if "audio" in task.inputs:
        columns |= {"audio": zeros(B, T, NUM_MELS, dtype=torch.float16),
                    "audio_lengths": zeros(B, dtype=torch.int64), "speakers": zeros(B, dtype=torch.int64)}
        noise["audio"] = zeros(B, T // 16 * (NUM_MELS // 16))
    if "text" in task.inputs:
        columns |= {"input_ids": zeros(C, L, dtype=torch.int64), "attention_mask": zeros(C, L, dtype=torch.bool),
                    "caption_owner": zeros(C, dtype=torch.int64), "caption_ids": zeros(C, dtype=torch.int64)}
        noise |= {"text": zeros(C, L), "path_text": zeros(C, 64)}
    return Batch(inputs=task.inputs, keys=[], sample_ids=zeros(B, dtype=torch.int64), noise=noise, **columns)


@dataclass(frozen=True)
class StepPlan:
    """A step of one task at one fit, or the part of it that some of its objectives make."""

    config: Config
    row: StageConfig
    task: TaskConfig
    fit: Fit
    place: Place

    @property
    def is_whole(self) -> bool:
        """As `Step.is_whole`: no tower of the task encodes in parts."""
        upper = stage_upper(self.config, self.row, self.place)
        return all(self.fit.micro_batch[tower] >= upper[tower] for tower in (*self.task.inputs, "fusion"))

    def usage(self, *, limit_bytes: int | None = None, gradient_of: Sequence[str] | None = None,
              tracing: Tracing = tracker_module.tracing) -> Usage | None:
        """Bytes at the peak of two optimizer steps on fake tensors; None as soon as more than `limit_bytes` live.

        `gradient_of`: only the gradients of these objectives, once and without the update, which takes as much at every
        fit.
        """
        names = [name for name in OBJECTIVES if name in (gradient_of or self.task.objectives)]
        try:
            with kernels_of(self.place.device), tracing(limit_bytes) as tracker:
                self._run(tracker, names, 0 if gradient_of else 2)
            return tracker.usage()
        except OverLimit:
            return None

    def _run(self, tracker: tracker_module.PeakMemory, names: Sequence[str], num_updates: int) -> None:
        config, training = self.config, self.config.training
        model = TriModalModel(config.model)
        freeze(model, self.row)
        apply_recompute(model, self.fit)
        objectives = [build_objective(name, model, self.task.inputs, self.place.num_speakers,
                                      training.contrastive_loss) for name in names]
        both = nn.ModuleDict({"model": model, "objectives": nn.ModuleList(objectives)})
        tracker.watch(both.parameters())
        optimizer = Optimizer(both, training, self.place.amp)
        optimizer.allocate()
        average = MovingAverage(model, training.ema_decay) if training.ema_decay else None
        tracker.mark("optimizer", [list(state.values()) for state in optimizer.state.values()],
                     average.values if average else [])
        batch = self._batch()
        for _ in range(num_updates or 1):
            learn(self._step(model, batch), [(1.0, objective) for objective in objectives],
                  lambda loss: _backward(optimizer, loss))
            if num_updates:
                _, finite = optimizer.step(1e-4)
                if average:
                    average.update(model.parameters(), finite)

    def _batch(self) -> Batch:
        with tracker_module.phase("data" if self.place.device == "cpu" else tracker_module.HOST):
            return largest_batch(self.config, self.row, self.task)

    def _step(self, model: TriModalModel, batch: Batch) -> PlanStep:
        amp, row = self.place.amp, self.row
        return PlanStep(
            model=model, batch=batch, device=torch.device("cpu"), micro_batch=self.fit.micro_batch,
            autocast=lambda: torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None),
            keep={"image": row.image_keep, "audio": row.audio_keep}, drop_path=row.drop_path,
            num_concepts=self.config.model.num_classes, share=self._share(), stage=row.name,
            is_on_host=self.place.device == "cpu")

    def _share(self) -> Share:
        """The first micro-batches of the process with most rows; it holds all images and audio, as matching asks."""
        upper = stage_upper(self.config, self.row, self.place)
        return Share({tower: range(min(PARTS * self.fit.micro_batch[tower], rows)) for tower, rows in upper.items()}, 0)


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Inside, the model chooses its kernels as on this type of device."""
    token = KERNELS_OF.set(device)
    try:
        yield
    finally:
        KERNELS_OF.reset(token)


def _backward(optimizer: Optimizer, loss: Tensor) -> None:
    with tracker_module.phase("loss"):
        optimizer.backward(loss)


def stage_upper(config: Config, row: StageConfig, place: Place) -> dict[str, int]:
    """Rows of each tower in one process's share of an effective batch."""
    own = -(-config.effective_batch(row) // place.processes)
    return {tower: own * (config.training.captions_per_visit if tower == "text" else 1) for tower in TOWERS}


def apply_recompute(model: TriModalModel, fit: Fit) -> None:
    """Let the blocks of each tower be recomputed as the fit says."""
    for tower, every in fit.recompute.items():
        getattr(model, tower).blocks.recompute_every = every


class StageMeasure:
    """Runs the steps of a stage's tasks at a fit. What has been measured is kept, by what it uses of the fit; limits
    never rise from call to call. `run` measures a step."""

    def __init__(self, config: Config, row: StageConfig, tasks: Sequence[TaskConfig], place: Place,
                 run: Callable[..., Usage | None] = StepPlan.usage):
        self.config, self.row, self.tasks, self.place, self.run = config, row, list(tasks), place, run
        self.costly = [(i, name) for i, task in enumerate(tasks) for name in task.objectives]  # the likeliest first
        self.steps: dict[str, Usage | None] = {}
        self.gradients: dict[str, dict[tuple[int, ...], Usage | None]] = {}

    def __call__(self, fit: Fit, limit_bytes: int | None) -> Usage | None:
        """Usage of the task that takes most, over two steps; with a limit of its gradients, unless all is at once; None
        if they pass it. Of gradients it may be that of larger micro-batches, if they keep to the limit."""
        all_at_once = Fit(stage_upper(self.config, self.row, self.place), dict.fromkeys(TOWERS, 0))
        whole_steps = limit_bytes is None or fit == all_at_once
        found = []
        for i, names in self._runs(fit, whole_steps):
            step = StepPlan(self.config, self.row, self.tasks[i], fit, self.place)
            usage = (self._gradients(step, names, limit_bytes) if limit_bytes is not None and not whole_steps
                     else self._steps(step, limit_bytes))
            if usage is None:
                self.costly.sort(key=lambda one: (one[0] != i, one[1] not in names))  # first at the next fit as well
                return None
            found.append(usage)
        return max(found, key=lambda usage: usage.peak_bytes)

    def _runs(self, fit: Fit, whole_steps: bool) -> list[tuple[int, list[str]]]:
        """Which task and objectives of it are run together. In parts the objectives follow each other, so gradients are
        measured of each alone."""
        runs: dict[tuple[int, str], list[str]] = {}
        for i, name in self.costly:
            together = whole_steps or StepPlan(self.config, self.row, self.tasks[i], fit, self.place).is_whole
            runs.setdefault((i, "" if together else name), []).append(name)
        return [(i, names) for (i, _), names in runs.items()]

    def _steps(self, step: StepPlan, limit_bytes: int | None) -> Usage | None:
        key = str((step.task, step.fit))
        if self.steps.get(key) is None:  # not measured yet, or above a limit
            self.steps[key] = self.run(step, limit_bytes=limit_bytes)
        return _within(self.steps[key], limit_bytes)

    def _gradients(self, step: StepPlan, names: Sequence[str], limit_bytes: int) -> Usage | None:
        """Measured anew only when what is used of the fit has changed, and tells more than what is known."""
        task, fit = step.task, step.fit
        fusion = ("fusion",) if any(OBJECTIVES[name].uses_fusion for name in names) else ()
        again = [fit.recompute[tower] for tower in (*task.inputs, *fusion)]
        towers, upper = fusion or task.inputs, stage_upper(self.config, self.row, self.place)
        whole = [fit.micro_batch[tower] == upper[tower] for tower in towers]  # may take less than two parts
        known = self.gradients.setdefault(str((task, sorted(names), step.is_whole, again, whole)), {})
        sizes = tuple(fit.micro_batch[tower] for tower in towers)
        implied = _implied(known, sizes, limit_bytes)
        if implied is None:
            known[sizes] = self.run(step, limit_bytes=limit_bytes, gradient_of=names)
            return known[sizes]
        return known[implied] if _within(known[implied], limit_bytes) else None


def _implied(known: Mapping[tuple[int, ...], Usage | None], sizes: tuple[int, ...],
             limit_bytes: int) -> tuple[int, ...] | None:
    """The sizes known that tell whether these keep to the limit: no smaller ones that do, or no larger ones that do
    not. What is chosen on their word is measured by whole steps."""
    for other, usage in known.items():
        if all(map(ge if _within(usage, limit_bytes) else le, other, sizes)):
            return other
    return None


def _within(usage: Usage | None, limit_bytes: int | None) -> Usage | None:
    return usage if usage and (limit_bytes is None or usage.peak_bytes <= limit_bytes) else None


def _pays_for_parts(kind: type[Objective]) -> bool:
    """Whether micro-batches are encoded more often than a whole batch: for contrast again in the backward pass, and for
    the fusion beside it."""
    return kind.is_of_whole_batch or kind.uses_fusion


def limits(config: Config, place: Place) -> Limits:
    """On a CPU the host's copy of the best weights so far is in the budget as well."""
    held = 0
    if place.device == "cpu":
        with torch.device("meta"):
            held = sum(p.numel() * p.element_size() for p in TriModalModel(config.model).parameters())
    return Limits(int(config.budget_gb * GIB), place.device, place.ratio, held)


def plan_stage(config: Config, row: StageConfig, tasks: Sequence[TaskConfig], place: Place, fit: Fit | None = None,
               run: Callable[..., Usage | None] = StepPlan.usage) -> Plan:
    """A fit at which every task of the stage stays in the budget, from the cache if it was planned before.

    Args:
        fit: plan this one, whether it stays in the budget or not.
        run: measures a step.
    """
    pinned = None if config.memory.micro_batch == "auto" else config.memory.micro_batch
    kinds = [OBJECTIVES[name] for task in tasks for name in task.objectives]

    def search() -> Plan:
        measure, upper = StageMeasure(config, row, tasks, place, run), stage_upper(config, row, place)
        if fit is not None:
            return budget.plan_of(fit, measure, upper, limits(config, place))
        return budget.plan_fit(measure, upper, limits(config, place), pinned=pinned,
                               may_recompute=config.model.use_checkpoint,
                               parts_are_free=not any(map(_pays_for_parts, kinds)))

    return _kept(config, _stage_facts(config, row, tasks), place, fit, search)


def _stage_facts(config: Config, row: StageConfig, tasks: Sequence[TaskConfig]) -> dict[str, Any]:
    """What the plan of a stage depends on beside `_facts`. Rates, weights and seeds take no memory."""
    return {"effective_batch": config.effective_batch(row), "captions": config.training.captions_per_visit,
            "average": config.training.ema_decay > 0, "optimizer": config.training.optimizer,
            "loss": config.training.contrastive_loss, "keep": (row.image_keep, row.audio_keep),
            "drop_path": row.drop_path > 0, "trainable": row.trainable, "micro_batch": config.memory.micro_batch,
            "audio_max_s": config.data.audio_max_s,
            "tasks": [(task.inputs, sorted(task.objectives)) for task in tasks]}


def _evaluation_facts(config: Config) -> dict[str, Any]:
    return {"evaluation": config.evaluation.batch_size}


def _facts(config: Config, place: Place) -> dict[str, Any]:
    """What every plan depends on."""
    model = {name: value for name, value in config.to_dict()["model"].items() if name != "word_embeddings"}
    return {"model": model, "preset": dataclasses.asdict(config.model.preset), "budget_gb": config.budget_gb,
            "place": dataclasses.asdict(place)}


def asked_of(config: Config, tasks: Mapping[str, Sequence[TaskConfig]], place: Place) -> dict[str, str]:
    """For each stage that `tasks` names, and evaluation, a digest of all settings that its plan is asked to obey. What
    this machine's allocator was measured to waste is no setting."""
    everywhere = _facts(config, dataclasses.replace(place, ratio=None))
    own = {row.name: _stage_facts(config, row, tasks[row.name]) for row in config.stages if tasks.get(row.name)}
    return {name: budget.fingerprint(everywhere | facts)
            for name, facts in (*own.items(), (EVALUATION, _evaluation_facts(config)))}


def _kept(config: Config, facts: Mapping[str, Any], place: Place, fit: Fit | None, search: Callable[[], Plan]) -> Plan:
    """A plan, or that of `fit`, from the cache in the output folder, or what `search` finds."""
    everything = {**facts, **_facts(config, place), "fit": fit and dataclasses.asdict(fit)}
    sources = [Path(model_module.__file__), *(Path(__file__).parents[1] / f"{name}.py" for name in _SOURCES)]
    folder, key = Path(config.paths.output_dir) / "plans", budget.plan_key(everything, sources)
    plan = budget.read_plan(folder, key)
    if plan is None:
        plan = search()
        try:
            budget.write_plan(folder, key, plan)
        except OSError as error:
            print(f"Plan: {folder} cannot be written ({error.strerror}), so the plan is not kept", file=sys.stderr)
    return plan


def plan_evaluation(config: Config, place: Place, fit: Fit | None = None) -> Plan:
    """How many samples of each modality are encoded at a time: `evaluation.batch_size`, or what the budget allows; or
    what `fit` says.

    Sounds are windows of the encoder's length. Out of memory the encoding halves its parts by itself; a plan spares
    that, and says beforehand what it takes.
    """
    towers = TOWERS[:3]

    def measure(fit: Fit, limit_bytes: int | None) -> Usage | None:
        found = [_encoding_usage(config, tower, fit.micro_batch[tower], place, limit_bytes) for tower in towers]
        usages = [usage for usage in found if usage is not None]
        return max(usages, key=lambda usage: usage.peak_bytes) if len(usages) == len(found) else None

    def search() -> Plan:
        upper = dict.fromkeys(towers, config.evaluation.batch_size)
        if fit is not None:
            return budget.plan_of(fit, measure, upper, limits(config, place))
        return budget.plan_fit(measure, upper, limits(config, place), may_recompute=False)

    return _kept(config, _evaluation_facts(config), place, fit, search)


def _encoding_usage(config: Config, tower: str, size: int, place: Place, limit_bytes: int | None) -> Usage | None:
    """Peak of one modality through its encoder, the fusion and the classifier, without gradients."""
    S, L = config.model.image_size, config.model.context_length
    try:
        with kernels_of(place.device), tracker_module.tracing(limit_bytes) as tracker, torch.no_grad():
            model = TriModalModel(config.model)
            tracker.mark("parameters", list(model.parameters()))
            given = {"image": {"images": torch.zeros(size, 3, S, S, dtype=torch.uint8)},
                     "audio": {"audio": torch.zeros(size, AUDIO_WINDOW_FRAMES, NUM_MELS, dtype=torch.float16)},
                     "text": {"input_ids": torch.zeros(size, L, dtype=torch.int64),
                              "attention_mask": torch.zeros(size, L, dtype=torch.bool)}}[tower]
            tracker.mark("data", given)
            with torch.autocast("cpu", place.amp or torch.bfloat16, enabled=place.amp is not None):
                model(**given)
        return tracker.usage()
    except OverLimit:
        return None


def plan_stages(config: Config, tasks: Mapping[str, Sequence[TaskConfig]], place: Place,
                fits: Mapping[str, Fit] | None = None) -> dict[str, Plan]:
    """The plan of each stage that `tasks` names, in order, and of `evaluation`; those in `fits` are planned so."""
    fits = fits or {}
    rows = [row for row in config.stages if tasks.get(row.name)]
    work = [(config, row, tasks[row.name], place, fits.get(row.name)) for row in rows]
    helpers = min(len(rows), os.cpu_count() or 1) - 1
    try:
        if helpers < 1 or max(config.effective_batch(row) for row in rows) <= budget.AMPLE_MICRO_BATCH:
            found = [plan_stage(*one) for one in work]
            evaluation = plan_evaluation(config, place, fits.get(EVALUATION))
        else:
            found, evaluation = _side_by_side(work, fits.get(EVALUATION), helpers)
    finally:
        shapes.forget()
    return {row.name: plan for row, plan in zip(rows, found, strict=True)} | {EVALUATION: evaluation}


def _side_by_side(work: Sequence[tuple[Config, StageConfig, Sequence[TaskConfig], Place, Fit | None]],
                  evaluation_fit: Fit | None, helpers: int) -> tuple[list[Plan], Plan]:
    """Long searches: the last stage, which tends to take longest, here at once; all else in other processes, which take
    seconds to start."""
    pool = ProcessPoolExecutor(helpers, get_context("spawn"))
    try:
        others = [pool.submit(plan_stage, *one) for one in reversed(work[:-1])][::-1]
        config, _, _, place, _ = work[-1]
        evaluation = pool.submit(plan_evaluation, config, place, evaluation_fit)
        last = plan_stage(*work[-1])
        return [*(other.result() for other in others), last], evaluation.result()
    finally:
        pool.shutdown(cancel_futures=True)  # where one stage does not fit, the others need not be waited for


def without_speaker(tasks: Iterable[TaskConfig]) -> list[TaskConfig]:
    """The tasks less the objective of speakers, and less the tasks that have no other."""
    return [dataclasses.replace(task, objectives={n: w for n, w in task.objectives.items() if n != "speaker"})
            for task in tasks if set(task.objectives) != {"speaker"}]
