"""Training, from the whole to its parts: a run has stages, a stage epochs, an epoch steps of the optimizer.

A stage is a row of the configuration; nothing here knows one by name. What a stage inherits: the model's weights, the
run's clock and its step count. What it begins anew: its objectives' heads, the optimizer, the schedule.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from datasets import Loader
from trimodal import distributed
from trimodal.config import Config, StageConfig, TaskConfig
from trimodal.data import wording
from trimodal.data.batches import Batch
from trimodal.distributed import OutOfMemoryElsewhere, World
from trimodal.errors import TrainingError, UserError
from trimodal.evaluation import protocols
from trimodal.memory import devices
from trimodal.objectives.base import Losses
from trimodal.objectives.contrastive import start_sigmoid
from trimodal.objectives.step import Share, shared_batch
from trimodal.towers.settings import frozen_until
from trimodal.training import plans
from trimodal.training.diagnostics import Figures, Finding, Inputs, contrasts_of, locate, report_skipped_step
from trimodal.training.examples import show_examples
from trimodal.training.frozen import open_features, read_features
from trimodal.training.optimizer import freeze, lr_factors
from trimodal.training.pace import Pace
from trimodal.training.plans import fit_stages
from trimodal.training.resume import begins_with_sigmoid, find_state, finished_report, stage_epochs
from trimodal.training.run import Options, Run, claim_folder, last_checkpoint, open_run
from trimodal.training.saving import Saver
from trimodal.training.signals import Interruption
from trimodal.training.stage import (
    Stage,
    active_tasks,
    build_stage,
    compute_losses,
    epoch_jobs,
    first_contrastive_batch,
    make_step,
    own_jobs,
    reduce_gradients,
    shrink,
)
from trimodal.training.validation import ADD_TEST, NO_TEST, finish, validate

T = TypeVar("T")


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: Config, options: Options, now: Callable[[], float] = time.monotonic) -> Path | None:
    """Run what is left of every stage, evaluate the best weights on the test split, write the report; its path. Under
    torchrun all processes train, and the main one does the rest: the others return None. `now`: the clock by which
    `training.max_hours` counts.

    Raises:
        UserError: a mistake that the user can mend.
        TrainingError: the run cannot go on.
        Stopped: a signal asked for it; what is done is saved.
    """
    begin_s = now()
    devices.prepare_process()
    world = distributed.start(devices.choose_device(options.device))
    try:
        with world.quiet(), Interruption() as interruption:
            folder = Path(config.paths.output_dir)
            lock = world.together(lambda: claim_folder(folder, options) if world.is_main else None)
            try:
                return run_stages(config, options, world, interruption, begin_s, now)
            finally:
                if lock:
                    lock.release()
    except RuntimeError as error:
        if devices.is_out_of_memory(error):  # a step and the evaluation go on with less; what is beside them cannot
            raise UserError(devices.no_room(world.device, error)) from None
        if not world.has_lost_someone(error):
            raise
        raise TrainingError("another process of this run has ended (its own lines say why); go on with --resume "
                            "auto from the newest checkpoint") from None
    finally:
        world.stop()


def run_stages(config: Config, options: Options, world: World, interruption: Interruption, begin_s: float,
               now: Callable[[], float]) -> Path | None:
    """`train`, as one of the processes of `world`."""
    state = world.on_main(lambda: find_state(config, options))
    if report := world.on_main(lambda: finished_report(config, state)):
        assert state is not None, "a fresh run has no report"
        print(f"Complete: all {state['progress']['epoch']} epochs are done and evaluated. Report: {report}")
        return report
    run = open_run(config, options, state, world)
    try:
        if not protocols.can_score(run.data, "test"):
            run.tracker.say(f"Evaluation: {NO_TEST}; {ADD_TEST}")
        if line := wording.warning(run.data.splits["train"], run.data.tokenizer):
            run.tracker.event(line, run.progress.step, once=True)
        tasks = {row.name: active_tasks(row, run.data) for row in config.stages}
        for row in config.stages:
            freeze(run.model, row)  # a pattern without a match is found now, not after the first stages
            lr_factors(run.model, row)
        if begins_with_sigmoid(config, state, run.initialised_from):
            start_sigmoid(run.model, first_contrastive_batch(config))
        open_features(run)
        fit_stages(run, {name: found for name, (found, _) in tasks.items()}, state)
        epochs, first = stage_epochs(config, state), 1
        saver = Saver(run, epochs, interruption)
        pace = Pace(run, {name: found for name, (found, _) in tasks.items()}, epochs, begin_s, now)
        for row in config.stages:
            span = range(first, first + epochs[row.name])
            if not span and (pace.hours is None or not stage_epochs(config)[row.name]):
                run.tracker.say(f"[{row.name}] skipped: training.epochs={config.training.epochs} is too few for it")
            elif span and run.progress.epoch < span[-1]:
                found, skipped = tasks[row.name]
                for line in skipped:
                    run.tracker.say(line)
                train_stage(run, row, found, span, state, saver, pace)
            first += epochs[row.name]  # fewer than before where the time was short
        saver.wait()
        return finish(run) if world.is_main else None
    finally:
        run.tracker.close()


# ---- a stage ---------------------------------------------------------------------------------------------------------


def train_stage(run: Run, row: StageConfig, tasks: list[TaskConfig], epochs: range, state: dict[str, Any] | None,
                saver: Saver, pace: Pace) -> None:
    """Train a stage for those of its epochs that a resumed run has not done yet; after each, validate and save.

    Args:
        epochs: the stage's epochs, numbered from 1 across all stages of the run.
        state: the checkpoint that the run resumes from, if it does.
    """
    read_features(run, frozen_until(run.config, run.model.towers)[row.name])
    stage = build_stage(run, row, tasks, len(epochs))
    if run.progress.epoch >= epochs[0] or run.progress.epoch_step:
        assert state is not None, "only a resumed run begins inside a stage"
        stage.load_state_dict(state["stage_state"])
        saved = state["stage_state"]
    else:
        saved = None
        run.progress.stage_step, run.progress.stage_s = 0, 0.0
    start_s = time.perf_counter() - run.progress.stage_s
    devices.free_cached(run.device)  # else what the stage before took would count as this one's
    devices.reset_peak(run.device)
    per_epoch = num_samples(epoch_jobs(run, stage, 1))
    done = per_epoch * (run.progress.epoch + 1 - epochs[0])
    done += num_samples(epoch_jobs(run, stage, run.progress.epoch + 1)[:run.progress.epoch_step])
    run.tracker.open_bar(per_epoch * len(epochs), done, row.name)
    pace.enter(stage, saved)
    for epoch in range(max(run.progress.epoch + 1, epochs[0]), epochs[-1] + 1):
        with saver.interruption.can_wait():
            log = train_epoch(run, stage, epoch, saver, pace)
            # the other ranks go on to their next collective operation and wait there
            encoded = validate(run, stage, log.speed) if run.world.is_main else None
            pace.after_validation()
            if is_last := epoch == epochs[-1] or pace.stage_is_over:
                pace.end_stage(epoch - epochs[0] + 1)
            if run.world.is_main:
                run.progress.stage_s = time.perf_counter() - start_s
                if is_last:  # before the checkpoint: a run that is killed between the two writes the record again
                    run.tracker.record({
                        "kind": "stage", "stage": row.name, "step": run.progress.step,
                        "epochs": saver.stage_epochs[row.name], "steps": run.progress.stage_step,
                        "seconds": run.progress.stage_s, "save_s": saver.spent_s, **compare_memory(run, row.name),
                        "samples": round(per_epoch * len(epochs) * stage.steps / stage.most)})
                if stage.contrasts and (is_last or epoch % run.config.training.save_every_epochs == 0):
                    show_examples(run, encoded)
            saver.after_epoch(row.name, stage.state_dict, is_last=is_last)
        if is_last:
            break
    run.tracker.close_bar()


def num_samples(jobs: list[Any]) -> int:
    """How many samples these batches, from `epoch_jobs`, hold together."""
    return sum(len(indices) for _, indices in jobs)


def compare_memory(run: Run, name: str) -> dict[str, float]:
    """Print and log the measured peak memory of stage `name` beside the planned one, and calibrate later plans by it.

    Memory taken before the model was made is subtracted before the two are compared. Only CUDA is calibrated, and only
    by a stage that ran as planned, without smaller micro-batches after it had run out of memory.

    Returns:
        {"peak_gib": the measured peak, "held_gib": the part of it from before the model}, for the stage's record.
    """
    measured, planned = devices.peak_gib(run.device), run.predicted_gib[name]
    comparable = max(measured.gib - run.held_gib, 0.0)
    less = f", less {run.held_gib:.2f} GiB held before the model was made" if run.held_gib else ""
    run.tracker.say(f"[{name}] memory: planned {planned:.2f} GiB of tensors, measured {comparable:.2f} GiB "
                    f"({measured.gib:.2f} GiB {measured.kind}{less})")
    run.tracker.memory(name, planned, comparable, measured.gib, run.progress.step)
    if run.device.type != "cuda" and measured.gib > run.config.budget_gb:
        run.tracker.say(f"[{name}] the process took more than memory.budget_gb={run.config.budget_gb:g}, and nothing "
                        f"refuses it on {run.device}; set memory.micro_batch or a lower budget")
    as_planned = run.fits.get(name) == run.planned_fits.get(name)  # not where it has been made smaller since
    if run.device.type == "cuda" and as_planned:
        plans.calibrate(devices.device_name(run.device), measured.gib, planned)
    return {"peak_gib": measured.gib, "held_gib": run.held_gib}


# ---- an epoch --------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, stage: Stage, epoch: int, saver: Saver | None = None, pace: Pace | None = None) -> "StepLog":
    """Do the optimizer steps of one epoch that are not done yet: all, or after a resume those that are left, or where
    `pace` ends the stage before, some of them.

    Raises:
        Stopped: a signal asked for it, and the saver has saved.
    """
    run.model.train()
    progress, log, jobs = run.progress, StepLog(run, stage, epoch), epoch_jobs(run, stage, epoch)
    if not progress.epoch_step:
        progress.loss_sum, progress.losses = 0.0, 0
    start = min(progress.epoch_step, len(jobs))  # fewer where the effective batch has grown since
    batches = Loader(run.data, "train", own_jobs(run, jobs), run.config, start=start, whole=jobs,
                     inputs=[task.inputs for task in stage.tasks], train=True, epoch=epoch,
                     say=lambda line: run.tracker.event(line, progress.step))
    for (task, indices), batch in zip(jobs[start:], log.clock.waiting_for(batches), strict=True):
        result = train_step(run, stage, task, batch)
        progress.step += 1
        progress.stage_step += 1
        progress.epoch_step += 1
        log.add(result, batch, len(indices))
        if pace:
            pace.after_step()
            if pace.stage_is_over:
                break
        if saver and progress.epoch_step < len(jobs):  # the last one's checkpoint is that of the epoch
            saver.after_step(stage.row.name, stage.state_dict, log.flush)
    log.flush()
    progress.epoch, progress.epoch_step = epoch, 0
    return log


class StepLog:
    """Reads each step's device tensors one step late, so that the device never waits for the host; logs every n-th,
    counts bad steps, drives the progress bar."""

    def __init__(self, run: Run, stage: Stage, epoch: int):
        self.run, self.stage, self.epoch = run, stage, epoch
        self.pending: tuple[StepResult, dict[str, Any]] | None = None
        self.clock = devices.Clock()
        self.samples = 0
        self.start_s = time.perf_counter()
        self.window_start = (self.start_s, 0)

    @property
    def speed(self) -> str:
        """Samples per second and share of time spent waiting for data since the epoch's start, as text."""
        samples_per_s = self.samples / max(time.perf_counter() - self.start_s, 1e-9)
        return f"{samples_per_s:.0f} samples/s  waiting {self.clock.wait_pct:.0f} %"

    def add(self, result: "StepResult", batch: Batch, samples: int) -> None:
        """Log a step. `samples`: number of the whole effective batch, of which `batch` is this process's share."""
        self.flush()
        self.samples += samples
        facts = {"stage": self.stage.row.name, "epoch": self.epoch, "step": self.run.progress.step,
                 "task": "_".join(batch.inputs), "samples": samples, "lr": self.stage.optimizer.lr}
        if factors := self.stage.row.lr_factors:  # else there is one rate
            facts["lr_of"] = {pattern: self.stage.optimizer.lr * given.factor for pattern, given in factors.items()}
        if self._is_logged(facts):
            facts |= self._scales()  # of this step, not of the next, at which they are read
        self.pending = (result, facts)

    def flush(self) -> None:
        if self.pending is None:
            return
        (result, facts), self.pending = self.pending, None
        loss, parts, norm, finite = result.read()
        parts = self.run.world.sum_scalars({"loss": loss, **parts})
        loss = parts.pop("loss")
        self.run.tracker.advance(facts["samples"], loss)
        facts |= {"loss": loss, "parts": parts, "grad_norm": norm}
        if not finite:
            self._skipped(result.inputs, facts)
            return
        self.stage.bad_in_a_row = 0
        self.run.progress.loss_sum += loss
        self.run.progress.losses += 1
        if self._is_logged(facts):
            self._write(facts)
        contrasts = contrasts_of(parts, result.inputs.whole, self.run.config.training.contrastive_loss)
        for line in self.stage.monitor.observe(facts["step"], facts["task"], Figures(loss, norm, contrasts)):
            self.run.tracker.event(line, facts["step"])

    def _is_logged(self, facts: dict[str, Any]) -> bool:
        return facts["step"] % self.run.config.training.log_every_steps == 0

    def _scales(self) -> dict[str, dict[str, Tensor]]:
        """Temperatures, and biases where the loss has them, as tensors of the device."""
        model = self.run.model
        found = {"temperature": {pair: scale.detach().exp() for pair, scale in model.logit_scale.items()}}
        if self.run.config.training.contrastive_loss == "sigmoid":
            found["bias"] = {pair: value.detach().clone() for pair, value in model.logit_bias.items()}
        return found

    def _write(self, facts: dict[str, Any]) -> None:
        now, (start, before) = time.perf_counter(), self.window_start
        self.window_start = (now, self.samples)
        for name in facts.keys() & {"temperature", "bias"}:
            facts[name] = {pair: float(value) for pair, value in facts[name].items()}
        planned = self.run.predicted_gib.get(facts["stage"])
        self.run.tracker.step({
            **facts, "samples_per_s": (self.samples - before) / max(now - start, 1e-9),
            "data_wait_pct": self.clock.wait_pct, "memory_gib": devices.peak_gib(self.run.device)[0],
        }, planned_gib=None if planned is None else planned + self.run.held_gib)

    def _skipped(self, inputs: Inputs, facts: dict[str, Any]) -> None:
        """Log a step that was not finite and changed nothing; many in a row end the run."""
        self.stage.bad_in_a_row += 1
        scaler = self.stage.optimizer.scaler
        cause = report_skipped_step(self.run.world, self.run.tracker, find_cause(self.run, self.stage, inputs), facts,
                                    scaler.get_scale() if scaler else None)
        if self.stage.bad_in_a_row >= self.run.config.training.max_bad_steps:
            raise TrainingError(f"stage {facts['stage']}, step {facts['step']}: {self.stage.bad_in_a_row} steps in a "
                                f"row were not finite, in {cause}; last good checkpoint: {last_checkpoint(self.run)}. "
                                "Lower --lr, or set training.use_amp=false")


# ---- a step ----------------------------------------------------------------------------------------------------------


def train_step(run: Run, stage: Stage, task: int, batch: Batch) -> "StepResult":
    """Do one optimizer step on one effective batch, of which `batch` is this process's share.

    If any process runs out of memory, all halve their micro-batches and repeat the step. No random number is drawn
    within a step, so there is no random state to restore and the mathematics stays the same. The memory of the update
    is reserved with the gradients, so that it cannot run out when only some of the weights are updated.

    Raises:
        UserError: out of memory at micro-batch 1; names what can be turned.
    """
    with_media = any(objective.encodes_others for _, _, objective in stage.objectives_of(task))
    whole, share = shared_batch(run.world, batch, with_media=with_media)
    losses = None
    while losses is None:
        losses, cause = attempt(run.world, lambda: compute_gradients(run, stage, task, whole, share))
        if losses is None:
            stage.optimizer.zero_grad()
            shrink(run, stage, cause)
    loss = torch.zeros((), device=run.device) if losses.total is None else losses.total
    reduce_gradients(run, stage)
    lr = stage.learning_rate(run.config.training, run.progress.stage_step)
    norm, finite = stage.optimizer.step(lr, run.world.all_true(loss.isfinite()))
    run.model.bound_temperatures()
    if stage.average is not None:
        stage.average.update(run.model.parameters(), finite)
    return StepResult(loss, losses.parts, norm, finite, Inputs(task, batch, whole, share))


@dataclass
class StepResult:
    """Device tensors, so that nobody waits for the device; `read` costs one synchronisation."""

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    finite: Tensor
    inputs: Inputs  # to look for the cause where it is not finite

    def read(self) -> tuple[float, dict[str, float], float, bool]:
        loss, norm, finite, *parts = torch.stack(
            [x.detach().float() for x in (self.loss, self.grad_norm, self.finite, *self.parts.values())]).tolist()
        return loss, dict(zip(self.parts, parts, strict=True)), norm, bool(finite)


def compute_gradients(run: Run, stage: Stage, task: int, batch: Batch, share: Share | None) -> Losses:
    """Loss of a batch, and gradients in the parameters. Its locals are freed before processes wait for each other."""
    step = make_step(run, stage, batch, share, train=True)
    losses = compute_losses(stage, task, step, stage.optimizer.backward)
    run.world.reserve(stage.optimizer.parameters)
    stage.optimizer.reserve()
    return losses


def attempt(world: World, work: Callable[[], T]) -> tuple[T | None, str]:
    """Result of `work`, or None and the cause if it ran out of memory here or in another process.

    Processes agree once on whether one did: here, or in `World.agree_on_memory` within `work`, which raises.
    """
    try:
        result = work()
    except OutOfMemoryElsewhere as error:
        return None, str(error)
    except (RuntimeError, MemoryError) as error:
        cause = devices.out_of_memory_cause(error)
    else:
        return (None, "another process of this run") if world.any_flag(False) else (result, "")
    world.any_flag(True)
    return None, cause


def find_cause(run: Run, stage: Stage, inputs: Inputs) -> Finding:
    """Repeat a step that was not finite to find where that began. All processes do so together, each its share."""
    step = make_step(run, stage, inputs.whole, inputs.share, train=True)

    def repeat() -> Losses:
        return compute_losses(stage, inputs.task, step, Tensor.backward)

    try:
        finding, problem = attempt(run.world, lambda: locate(step, stage.objectives, inputs, repeat))
    except Exception as error:
        if run.world.size > 1:
            raise  # the others wait elsewhere now
        finding, problem = None, repr(error)[:200]  # whatever it is, it does not end the run
    stage.optimizer.zero_grad()
    return finding or Finding("unknown", problem, inputs.own.keys)
