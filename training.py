"""Training: `train` runs the stages of config.yaml, `train_stage` its epochs, `train_step` one optimizer step.

A stage is a row of the configuration; nothing here knows one by name. What a stage inherits: the model's weights, the
run's clock and its step count. What it begins anew: its objectives' heads, the optimizer, the schedule.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memory
from checkpoint import describe_mismatch
from config import FRAME_RATE_HZ, Config, ConfigError, StageConfig, TaskConfig, UserError
from datasets import Batch, Data, epoch_batches, loader, pool
from losses import OBJECTIVES
from optimization import MovingAverage, Optimizer, lr_at
from planning import plan_stages, print_plan, without_speaker
from runs import (
    Options,
    Run,
    TrainingError,
    find_state,
    finish,
    finished_report,
    last_checkpoint,
    open_run,
    remember_best,
    retrieval_figures,
    save,
    show_examples,
    stage_epochs,
)
from steps import Step, accumulate

__all__ = ["Options", "TrainingError", "print_plan", "train"]

VALIDATION_BATCH = 512  # contrast on validation data is over at most this many samples, whatever the training batch


@dataclass
class Stage:
    """What lives as long as a stage."""

    row: StageConfig
    tasks: list[TaskConfig]
    objectives: nn.ModuleDict  # "task/objective" -> head parameters, if any
    optimizer: Optimizer
    average: MovingAverage | None
    steps: int = 0  # optimizer steps of the whole stage
    bad_in_a_row: int = 0  # steps whose gradient was not finite

    def state_dict(self) -> dict[str, Any]:
        return {"objectives": self.objectives.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint's stage had other heads, other parameters or another optimizer."""
        mismatch = describe_mismatch(state["objectives"], self.objectives.state_dict())
        if mismatch or not self.optimizer.fits(state["optimizer"]):
            raise UserError(f"--resume: stages.{self.row.name} had other tasks, objectives, trainable parameters or "
                            f"another optimizer ({mismatch or 'the optimizer holds other parameters'}); resume with "
                            "the settings it was trained with, or start anew in another --output-dir")
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None and state["average"]:
            self.average.load_state_dict(state["average"])

    def objectives_of(self, task: int) -> Iterator[tuple[str, float, Any]]:
        """Name, weight and objective of one task; contrast first, since matching looks at its features."""
        weights = self.tasks[task].objectives
        for name in (known for known in OBJECTIVES if known in weights):
            yield name, weights[name], self.objectives[f"{task}_{name}"]


# ---- stages ------------------------------------------------------------------------------------------------------


def active_tasks(row: StageConfig, data: Data) -> tuple[list[TaskConfig], list[str]]:
    """Tasks that have samples, and a line about each that has none.

    Raises:
        UserError: no task of the stage has samples.
    """
    table, tasks, skipped = data.tables["train"], [], []
    for task in row.tasks:
        possible = task if data.speakers else without_speaker(task)
        if len(pool(table, task.inputs)) >= 2 and possible.objectives:
            tasks.append(possible)
        else:
            wanted = " and ".join(task.inputs) if possible.objectives else "named speakers"
            skipped.append(f"[{row.name}] no samples with {wanted}: {', '.join(task.objectives)} on them is skipped")
    if not tasks:
        raise UserError(f"stages.{row.name}: none of its tasks has samples in {', '.join(data.names())}; "
                        "add a set (--datasets) or remove the stage")
    return tasks, skipped


def freeze(model: nn.Module, row: StageConfig) -> None:
    """Train the parameters whose whole name matches one of the stage's patterns, freeze the others.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in row.trainable:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(f"stages.{row.name}.trainable: {pattern!r} matches no parameter; names look like "
                              f"{names[0]}, {names[-1]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.fullmatch(pattern, name) for pattern in row.trainable))


def build_stage(run: Run, row: StageConfig, tasks: list[TaskConfig], epochs: int) -> Stage:
    """Heads, optimizer and average of a stage, with fresh state."""
    torch.manual_seed(run.config.training.seed)
    freeze(run.model, row)
    objectives = nn.ModuleDict({
        f"{i}_{name}": OBJECTIVES[name](run.model, task.inputs, len(run.data.speakers))
        for i, task in enumerate(tasks) for name in task.objectives}).to(run.device)
    training = run.config.training
    both = nn.ModuleDict({"model": run.model, "objectives": objectives})
    optimizer = Optimizer(both, training, run.precision.dtype, run.device.type if run.precision.use_scaler else None)
    optimizer.allocate()
    average = MovingAverage(run.model, training.ema_decay) if training.ema_decay else None
    stage = Stage(row, tasks, objectives, optimizer, average)
    stage.steps = epochs * len(epoch_jobs(run, stage, epoch=1))
    return stage


def epoch_jobs(run: Run, stage: Stage, epoch: int) -> list[Any]:
    """The batches of an epoch: (task, indices), a pure function of the seed and the epoch."""
    pools = [pool(run.data.tables["train"], task.inputs) for task in stage.tasks]
    return epoch_batches(pools, [task.passes for task in stage.tasks], run.config.effective_batch(stage.row),
                         run.config.training.seed, epoch)


# ---- one step ----------------------------------------------------------------------------------------------------


@dataclass
class StepResult:
    """Device tensors, so that nobody waits for the device; `read` costs one synchronisation."""

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    finite: Tensor

    def read(self) -> tuple[float, dict[str, float], float, bool]:
        loss, norm, finite, *parts = torch.stack(
            [x.detach().float() for x in (self.loss, self.grad_norm, self.finite, *self.parts.values())]).tolist()
        return loss, dict(zip(self.parts, parts, strict=True)), norm, bool(finite)


def make_step(run: Run, stage: Stage, batch: Batch, *, train: bool) -> Step:
    return Step(model=run.model, batch=batch, device=run.device, micro_batch=run.micro_batch[stage.row.name],
                autocast=run.autocast, keep={"image": stage.row.image_keep, "audio": stage.row.audio_keep},
                drop_path=stage.row.drop_path, train=train, mask_id=run.data.tokenizer.mask_id,
                num_concepts=len(run.data.concepts))


def weighted_terms(stage: Stage, task: int, step: Step) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Every term of every objective, divided by the count over the whole effective batch and weighted."""
    for _, weight, objective in stage.objectives_of(task):
        count = objective.count(step)
        if count:
            for loss, parts in objective.terms(step):
                if step.train and not loss.requires_grad:
                    raise ConfigError(f"stages.{stage.row.name}.trainable: {', '.join(parts)} depends on none of the "
                                      "parameters named; name some of its encoders', or leave it out")
                yield weight / count * loss, {name: value / count for name, value in parts.items()}


def leave_gradients(run: Run, stage: Stage, task: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and parts of a batch, gradients in the parameters; a function of its own, so that nothing else is left."""
    step = make_step(run, stage, batch, train=True)
    return accumulate(step, weighted_terms(stage, task, step), stage.optimizer.backward)


def train_step(run: Run, stage: Stage, task: int, batch: Batch) -> StepResult:
    """One optimizer step on one effective batch. Out of memory halves the micro-batches and does the same step again:
    all randomness is in the batch, so the mathematics stays the same.

    Raises:
        UserError: out of memory at micro-batch 1; names what can be turned.
    """
    while True:
        try:
            loss, parts = leave_gradients(run, stage, task, batch)
            break
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            cause = " ".join(str(error).split())[:100] or type(error).__name__  # Python's own says nothing
        shrink(run, stage, cause)
    training = run.config.training
    lr = lr_at(run.progress.stage_step, stage.steps, training.learning_rate * stage.row.lr_factor,
               training.warmup_pct, training.min_lr_pct)
    norm, finite = stage.optimizer.step(lr)
    with torch.no_grad():
        for scale in run.model.logit_scale.values():
            scale.clamp_(0.0, 4.6052)  # 1 to 100, arXiv:2103.00020
    if stage.average is not None:
        stage.average.update(run.model.parameters())
    return StepResult(loss, parts, norm, finite)


def shrink(run: Run, stage: Stage, cause: str) -> None:
    """After running out of memory: free what the failed step left, halve the stage's micro-batches, say so."""
    stage.optimizer.zero_grad()
    memory.free_cached(run.device)
    name = stage.row.name
    smaller = memory.halve(run.micro_batch[name])
    if smaller is None:
        raise UserError(memory.out_of_memory_message(f"stages.{name}", run.device))
    run.micro_batch[name] = smaller
    sizes = ", ".join(f"{tower} {size}" for tower, size in smaller.items())
    run.tracker.event(f"[{name}] out of memory ({cause}): the same step again with micro-batch {sizes}",
                      run.progress.step + 1)


# ---- an epoch ----------------------------------------------------------------------------------------------------


class StepLog:
    """Reads each step's device tensors one step late, so that the device never waits for the host; logs every n-th,
    counts bad steps, drives the progress bar."""

    def __init__(self, run: Run, stage: Stage, epoch: int):
        self.run, self.stage, self.epoch = run, stage, epoch
        self.pending: tuple[StepResult, dict[str, Any], list[str]] | None = None
        self.losses: list[float] = []
        self.clock = memory.Clock()
        self.samples = 0
        self.start_s = time.perf_counter()
        self.window_start = (self.start_s, 0)

    @property
    def samples_per_s(self) -> float:
        return self.samples / max(time.perf_counter() - self.start_s, 1e-9)

    def add(self, result: StepResult, batch: Batch) -> None:
        self.flush()
        self.samples += len(batch.keys)
        facts = {"stage": self.stage.row.name, "epoch": self.epoch, "step": self.run.progress.step,
                 "task": "_".join(batch.inputs), "samples": len(batch.keys),
                 "lr": self.stage.optimizer.lr}
        self.pending = (result, facts, batch.keys)

    def flush(self) -> None:
        if self.pending is None:
            return
        (result, facts, keys), self.pending = self.pending, None
        loss, parts, norm, finite = result.read()
        self.run.tracker.advance(facts["samples"], loss)
        if not finite:
            self._bad(facts, loss, parts, norm, keys)
            return
        self.stage.bad_in_a_row = 0
        self.losses.append(loss)
        if facts["step"] % self.run.config.training.log_every_steps == 0:
            self._write(facts, loss, parts, norm)

    def _write(self, facts: dict[str, Any], loss: float, parts: dict[str, float], norm: float) -> None:
        now, (start, before) = time.perf_counter(), self.window_start
        self.window_start = (now, self.samples)
        temperature = {pair: float(scale.detach().exp()) for pair, scale in self.run.model.logit_scale.items()}
        self.run.tracker.step({
            **facts, "loss": loss, "parts": parts, "grad_norm": norm, "temperature": temperature,
            "samples_per_s": (self.samples - before) / max(now - start, 1e-9),
            "data_wait_pct": self.clock.wait_pct, "memory_gib": memory.peak_gib(self.run.device)[0]})

    def _bad(self, facts: dict[str, Any], loss: float, parts: dict[str, float], norm: float, keys: list[str]) -> None:
        """A step whose gradient was not finite changed nothing; many in a row end the run."""
        self.stage.bad_in_a_row += 1
        name, step = facts["stage"], facts["step"]
        causes = [part for part, value in parts.items() if value != value or abs(value) == float("inf")]
        cause = f"loss part {', '.join(causes)}" if causes else "the gradient, not the loss"
        self.run.tracker.event(f"[{name}] step {step} skipped: not finite in {cause} (samples {', '.join(keys[:3])}, "
                               "...)", step)
        if self.stage.bad_in_a_row >= self.run.config.training.max_bad_steps:
            raise TrainingError(f"stage {name}, step {step}: {self.stage.bad_in_a_row} steps in a row were not finite, "
                                f"in {cause}; last good checkpoint: {last_checkpoint(self.run)}. "
                                "Lower --lr, or set training.use_amp=false")


def train_epoch(run: Run, stage: Stage, epoch: int) -> StepLog:
    """All optimizer steps of one epoch."""
    run.model.train()
    log = StepLog(run, stage, epoch)
    batches = loader(run.data, "train", epoch_jobs(run, stage, epoch), run.config,
                     inputs=[task.inputs for task in stage.tasks], train=True, epoch=epoch)
    tasks = (task for task, _ in epoch_jobs(run, stage, epoch))
    for task, batch in zip(tasks, log.clock.waiting_for(batches), strict=True):
        result = train_step(run, stage, task, batch)
        run.progress.step += 1
        run.progress.stage_step += 1
        log.add(result, batch)
    log.flush()
    return log


# ---- validation --------------------------------------------------------------------------------------------------


def validation_jobs(run: Run, stage: Stage) -> list[Any]:
    """The same batches every epoch: a seeded part of each task's validation pool."""
    pools = []
    for task in stage.tasks:
        indices = pool(run.data.tables["val"], task.inputs)
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        pools.append(indices[order[:run.config.evaluation.max_validation].sort().values.numpy()])
    size = min(run.config.effective_batch(stage.row), VALIDATION_BATCH)
    return epoch_batches(pools, [1.0] * len(pools), size, seed=0, epoch=0)


def crop_sounds(batch: Batch, max_s: float) -> Batch:
    """At most `max_s` from the start of each sound: validation losses are over one window, as in training."""
    if batch.audio is None:
        return batch
    frames = -(-int(max_s * FRAME_RATE_HZ) // 16) * 16
    patches = batch.noise["audio"].shape[1] * min(frames, batch.audio.shape[1]) // batch.audio.shape[1]
    assert batch.audio_lengths is not None
    return dataclasses.replace(
        batch, audio=batch.audio[:, :frames], audio_lengths=batch.audio_lengths.clamp(max=frames),
        noise={**batch.noise, "audio": batch.noise["audio"][:, :patches]})


@torch.no_grad()
def validation_loss(run: Run, stage: Stage) -> tuple[float, dict[str, float]]:
    """Mean over validation samples of their task's loss, and of each part; no augmentation, all captions.

    A sample weighs the same whatever its task, so that a handful of sounds does not outvote thousands of pictures.
    Batches with nothing to compare or predict are left out; NaN if that is all of them.
    """
    jobs = validation_jobs(run, stage)
    batches = loader(run.data, "val", jobs, run.config, inputs=[task.inputs for task in stage.tasks],
                     train=False, epoch=0)
    sums: dict[str, list[float]] = {}
    for (task, indices), batch in zip(jobs, batches, strict=True):
        batch = crop_sounds(batch, run.config.data.audio_max_s)
        step = make_step(run, stage, batch, train=False)
        loss, parts = accumulate(step, weighted_terms(stage, task, step), lambda loss: None)
        if not parts:
            continue
        for name, value in {"": loss, **parts}.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(value) * len(indices)
            entry[1] += len(indices)
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return means.pop("", float("nan")), means


@contextlib.contextmanager
def averaged(run: Run, stage: Stage) -> Iterator[None]:
    """Evaluate with the averaged weights, where an average is kept."""
    run.model.eval()
    if stage.average is None:
        yield
        return
    stage.average.swap(run.model)
    try:
        yield
    finally:
        stage.average.swap(run.model)


# ---- the run -----------------------------------------------------------------------------------------------------


def train(config: Config, options: Options) -> Path:
    """Run what is left of every stage, evaluate the best weights on the test split, write the report; its path.

    Raises:
        UserError: a mistake that the user can mend.
        TrainingError: the run cannot go on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE: training runs in one process so far; start it with python, not with torchrun")
    state = find_state(config, options)
    if report := finished_report(config, state):
        print(f"Complete: all {config.training.epochs} epochs are done and evaluated. Report: {report}")
        return report
    run = open_run(config, options, state)
    try:
        tasks = {row.name: active_tasks(row, run.data) for row in config.stages}
        for row in config.stages:
            freeze(run.model, row)  # a pattern without a match is found now, not after the first stages
        plan(run, {name: found for name, (found, _) in tasks.items()}, state)
        epochs = stage_epochs(config)
        for index, row in enumerate(config.stages):
            first = sum(epochs[:index]) + 1
            if epochs[index] == 0:
                run.tracker.say(f"[{row.name}] skipped: {config.training.epochs} epochs are too few for its share")
            elif run.progress.epoch < first + epochs[index] - 1:
                found, skipped = tasks[row.name]
                for line in skipped:
                    run.tracker.say(line)
                train_stage(run, row, found, range(first, first + epochs[index]), state)
        return finish(run)
    finally:
        run.tracker.close()


def plan(run: Run, tasks: dict[str, list[TaskConfig]], state: dict[str, Any] | None) -> None:
    """Micro-batches of each stage: the checkpoint's where it has them, since another split rounds otherwise."""
    plans = plan_stages(run.config, tasks, run.device.type, run.precision.dtype, len(run.data.speakers))
    run.micro_batch = {name: dict(found.micro_batch) for name, found in plans.items()}
    run.micro_batch.update({name: sizes for name, sizes in (state or {}).get("micro_batch", {}).items()
                            if name in plans})
    run.predicted_gib = {name: found.peak_bytes / memory.GIB for name, found in plans.items()}


def train_stage(run: Run, row: StageConfig, tasks: list[TaskConfig], epochs: range,
                state: dict[str, Any] | None) -> None:
    """The epochs of a stage that are not done yet; validates and saves after each."""
    stage = build_stage(run, row, tasks, len(epochs))
    if run.progress.epoch >= epochs[0]:
        assert state is not None, "only a resumed run begins inside a stage"
        stage.load_state_dict(state["stage_state"])
    else:
        run.progress.stage_step, run.progress.stage_s = 0, 0.0
    start_s = time.perf_counter() - run.progress.stage_s
    memory.reset_peak(run.device)
    samples = sum(len(indices) for _, indices in epoch_jobs(run, stage, 1))
    run.tracker.open_bar(samples * len(epochs), samples * (run.progress.epoch + 1 - epochs[0]), row.name)
    for epoch in range(max(run.progress.epoch + 1, epochs[0]), epochs[-1] + 1):
        log = train_epoch(run, stage, epoch)
        run.progress.epoch = epoch
        validate(run, stage, log)
        run.progress.stage_s = time.perf_counter() - start_s
        if epoch == epochs[-1]:  # before it is saved: a run that is killed in between then writes it again
            run.tracker.record({
                "kind": "stage", "stage": row.name, "step": run.progress.step, "epochs": len(epochs),
                "steps": run.progress.stage_step, "seconds": run.progress.stage_s,
                "peak_gib": memory.peak_gib(run.device)[0], "samples": samples * len(epochs)})
        if epoch % run.config.training.save_every_epochs == 0 or epoch == epochs[-1]:
            save(run, stage.row.name, stage.state_dict())
            if contrasts(stage):
                show_examples(run)
    run.tracker.close_bar()


def contrasts(stage: Stage) -> bool:
    return any("contrastive" in task.objectives for task in stage.tasks)


def validate(run: Run, stage: Stage, log: StepLog) -> None:
    """Validation loss, and retrieval where the stage contrasts; remembers the best weights; prints the epoch's line."""
    start_s = time.perf_counter()
    with averaged(run, stage):
        loss, parts = validation_loss(run, stage)
        figures = retrieval_figures(run) if contrasts(stage) else {}
        best = remember_best(run, stage.row.name, loss)
    progress = run.progress
    run.tracker.validation({"stage": stage.row.name, "epoch": progress.epoch, "step": progress.step, "loss": loss,
                            "parts": parts, "metrics": figures, "seconds": time.perf_counter() - start_s})
    mean = sum(log.losses) / max(len(log.losses), 1)
    shown = "".join(f"  {name} {value:.3f}" for name, value in figures.items() if name.endswith("R@1"))
    run.tracker.say(f"[{stage.row.name}] epoch {progress.epoch}/{run.config.training.epochs}  loss {mean:.4f}  "
                    f"validation {loss:.4f}{' *' if best else ''}{shown}  {log.samples_per_s:.0f} samples/s  "
                    f"waiting {log.clock.wait_pct:.0f} %")
