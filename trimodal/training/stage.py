"""A stage of training: its tasks, heads and optimizer, what is frozen, its batches, and the loss of one of them.

A stage is a row of the configuration; nothing here knows one by name.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from datasets import epoch_batches
from trimodal.checkpoint import describe_mismatch
from trimodal.config import Config, StageConfig, TaskConfig, TrainingConfig
from trimodal.data.batches import Batch, pool
from trimodal.distributed import World
from trimodal.errors import ConfigError, UserError, counted
from trimodal.memory import devices
from trimodal.objectives import OBJECTIVES, build_objective
from trimodal.objectives.base import Losses, learn
from trimodal.objectives.contrastive import loss_parameters
from trimodal.objectives.matching import Matching
from trimodal.objectives.step import Share, Step
from trimodal.training.diagnostics import Monitor
from trimodal.training.frozen import live_by_stage
from trimodal.training.optimizer import MovingAverage, Optimizer, freeze, lr_at, lr_factors
from trimodal.training.planner import DeviceSetup, apply_recompute, largest_batch, stage_upper, without_speaker
from trimodal.training.run import Run

TRIAL_SAMPLES = 4


@dataclass
class Stage:
    """The state of one stage while it trains: its tasks, their heads, the optimizer and the averaged weights."""

    row: StageConfig
    tasks: list[TaskConfig]
    objectives: nn.ModuleDict  # "TASKNUMBER_OBJECTIVE" -> the objective, whose parameters are its heads
    optimizer: Optimizer
    average: MovingAverage | None  # of the model's weights
    steps: int = 0  # optimizer steps of the whole stage
    most: int = 0  # if its epochs are not cut short, see pace
    length: float = 0.0  # of the learning rate's schedule: `steps`, as long as they have not been changed
    bad_in_a_row: int = 0  # steps whose gradient was not finite
    monitor: Monitor = field(default_factory=Monitor)

    def state_dict(self) -> dict[str, Any]:
        return {"objectives": self.objectives.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None, "bad_in_a_row": self.bad_in_a_row,
                "alarms": self.monitor.state_dict(),
                "pace": {"steps": self.steps, "most": self.most, "length": self.length}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint's stage had other heads, other parameters or another optimizer."""
        mismatch = describe_mismatch(state["objectives"], self.objectives.state_dict())
        if mismatch or not self.optimizer.fits(state["optimizer"]):
            raise UserError(f"--resume: stages.{self.row.name} had other tasks, objectives, trainable parameters or "
                            f"another optimizer ({mismatch or 'the optimizer holds other parameters'}); resume with "
                            "the settings it was trained with, or start anew in another --output-dir")
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bad_in_a_row = state["bad_in_a_row"]
        self.monitor.load_state_dict(state["alarms"])
        if self.average is not None and state["average"]:
            self.average.load_state_dict(state["average"])

    def end_at(self, steps: int, done: int) -> None:
        """Let the stage end after `steps` steps, of which `done` are done. What is left of the schedule is spread over
        the steps that are left."""
        if steps == self.steps:
            return
        left = (self.steps - done) / self.length
        if steps > done:
            self.length = (steps - done) / left if left > 0 else steps
        self.steps = steps

    def learning_rate(self, training: TrainingConfig, step: int) -> float:
        """Learning rate of step number `step`, from 0."""
        return lr_at(self.length - (self.steps - step), self.length, training.learning_rate * self.row.lr_factor,
                     training.warmup_pct, training.min_lr_pct)

    @property
    def matching_heads(self) -> dict[str, dict[str, Tensor]]:
        """The heads that tell right pairs from wrong ones, by pair ("image_text"), which re-ranking needs."""
        found = [objective for objective in self.objectives.values() if isinstance(objective, Matching)]
        return {"_".join(objective.inputs): objective.head.state_dict() for objective in found}

    @property
    def contrasts(self) -> bool:
        return any("contrastive" in task.objectives for task in self.tasks)

    def objectives_of(self, task: int) -> Iterator[tuple[str, float, Any]]:
        """Name, weight and objective of one task, in the order in which a step computes them."""
        weights = self.tasks[task].objectives
        for name in (known for known in OBJECTIVES if known in weights):
            yield name, weights[name], self.objectives[f"{task}_{name}"]


def active_tasks(row: StageConfig, data: Any) -> tuple[list[TaskConfig], list[str]]:
    """Tasks that have samples in an epoch, and a line about each that has none. `data`: of a run, or whatever has its
    `tables`, `speakers` and `names()`.

    Raises:
        UserError: no task of the stage has samples.
    """
    table, tasks, skipped = data.tables["train"], [], []
    for task in row.tasks:
        possible, samples = [task] if data.speakers else without_speaker([task]), len(pool(table, task.inputs))
        visited = round(min(task.passes, 1.0) * samples)
        if visited >= 2 and possible:
            tasks += possible
        elif samples >= 2 and possible:
            skipped.append(f"[{row.name}] passes={task.passes:g} of {samples} samples with "
                           f"{' and '.join(task.inputs)}: {visited} an epoch: {', '.join(task.objectives)} on "
                           "them is skipped")
        else:
            wanted = " and ".join(task.inputs) if possible else "named speakers"
            skipped.append(f"[{row.name}] no samples with {wanted}: {', '.join(task.objectives)} on them is skipped")
    if not tasks:
        raise UserError(f"stages.{row.name}: none of its tasks has samples in {', '.join(data.names())}; "
                        "add a set (--datasets), raise the passes of its tasks, or remove the stage")
    return tasks, skipped


def build_stage(run: Run, row: StageConfig, tasks: list[TaskConfig], epochs: int) -> Stage:
    """A stage before its first step, which lasts `epochs` epochs.

    Freezes and recomputes in `run.model` what the stage's settings and plan say. New are the objectives' heads (of the
    training seed, the main rank's on all), the optimizer, the moving average of the weights, and the monitor.

    Raises:
        ConfigError: it hides words, and the tokenizer has no token for that.
    """
    hiding = [name for task in tasks for name in ("masked", "masked_words")
              if "text" in task.inputs and name in task.objectives]
    if hiding and run.data.tokenizer.mask_id < 0:
        raise ConfigError(f"stages.{row.name}.tasks: {hiding[0]} hides words behind a token [MASK], which the "
                          f"tokenizer of {run.config.model.word_embeddings} lacks; leave {hiding[0]} out for text, or "
                          "set model.word_embeddings=minilm")
    torch.manual_seed(run.config.training.seed)
    freeze(run.model, row)
    apply_recompute(run.model, run.fits[row.name])
    built = {f"{i}_{name}": build_objective(name, run.model, task.inputs, len(run.data.speakers), run.config.training)
             for i, task in enumerate(tasks) for name in task.objectives}
    for objective in built.values():
        objective.prepare(run.data)
    objectives = nn.ModuleDict(built).to(run.device)
    run.world.broadcast_tensors([*run.model.state_dict().values(), *objectives.state_dict().values()])
    training = run.config.training
    trained = nn.ModuleDict({"model": run.model, "objectives": objectives})
    factors = lr_factors(run.model, row)
    optimizer = Optimizer(trained, training, run.precision.dtype, run.device.type if run.precision.use_scaler else None,
                          {p: factor for found in factors.values() for p, factor in found.items()})
    optimizer.allocate()
    if factors:
        run.tracker.say(f"[{row.name}] learning rate times {describe_factors(factors)}")
    average = MovingAverage(run.model, training.ema_decay) if training.ema_decay else None
    stage = Stage(row, tasks, objectives, optimizer, average)
    stage.steps = stage.most = epochs * len(epoch_jobs(run, stage, epoch=1))
    stage.length = stage.steps
    stage.monitor = Monitor(row.name, round(stage.steps * training.warmup_pct / 100))
    if run.compiled_blocks:
        compile_blocks(run, stage)
    return stage


def describe_factors(factors: Mapping[str, Mapping[Tensor, float]]) -> str:
    """"0.032 to 0.1 for image.*; 0.1 for text.*", from `lr_factors`."""
    found = {pattern: sorted({min(of.values()), max(of.values())}) for pattern, of in factors.items()}
    return "; ".join(f"{' to '.join(f'{factor:.3g}' for factor in ends)} for {pattern}"
                     for pattern, ends in found.items())


def compile_blocks(run: Run, stage: Stage) -> None:
    """Compile the blocks for each kind of call that the stage's steps make, found by a trial of each task on a few
    samples, whole or in parts as the fit says; weights stay as they are."""
    assert run.compiled_blocks is not None
    row, was_training = stage.row, run.model.training
    upper = stage_upper(run.config, row, DeviceSetup(run.device.type, None, processes=run.world.size))
    sizes = {tower: min(size, TRIAL_SAMPLES // 2) if size < upper[tower] else upper[tower] * TRIAL_SAMPLES
             for tower, size in run.fits[row.name].micro_batch.items()}
    run.model.train()
    with run.compiled_blocks.trial():
        for number, task in enumerate(stage.tasks):
            step = make_step(run, stage, trial_batch(run, row, task), train=True)
            compute_losses(stage, number, replace(step, micro_batch=sizes), Tensor.backward)
            stage.optimizer.zero_grad()
    run.model.train(was_training)


def trial_batch(run: Run, row: StageConfig, task: TaskConfig) -> Batch:
    """A batch of a few samples of the largest shapes, with something in it for each objective."""
    batch = largest_batch(run.config, replace(row, effective_batch=TRIAL_SAMPLES), task, run.model,
                          live_by_stage(run)[row.name])
    concepts = torch.ones(TRIAL_SAMPLES, run.config.model.num_classes, dtype=torch.bool)
    mask = None if batch.attention_mask is None else torch.ones_like(batch.attention_mask)
    ids = None if batch.caption_ids is None else torch.arange(len(batch.caption_ids))
    owner = None if ids is None else ids * TRIAL_SAMPLES // len(ids)
    lengths = None if batch.audio is None else torch.full((TRIAL_SAMPLES,), batch.audio.shape[1])
    return replace(batch, sample_ids=torch.arange(TRIAL_SAMPLES), concepts=concepts,
                   attention_mask=mask, caption_ids=ids, caption_owner=owner, audio_lengths=lengths)


def epoch_jobs(run: Run, stage: Stage, epoch: int) -> list[Any]:
    """The batches of an epoch: (number of the task, indices of its samples); a pure function of seed and epoch."""
    pools = [pool(run.data.tables["train"], task.inputs) for task in stage.tasks]
    return epoch_batches(pools, [task.passes for task in stage.tasks], run.config.effective_batch(stage.row),
                         run.config.training.seed, epoch)


def own_jobs(run: Run, jobs: list[Any]) -> list[Any]:
    """Reduce each (task, indices) of a batch to this rank's share of the indices, which it reads and encodes.

    Raises:
        UserError: a batch has fewer samples than there are processes.
    """
    world = run.world
    least = min(len(indices) for _, indices in jobs)
    if least < world.size:
        raise UserError(f"torchrun: {world.size} processes, but a step of some task has {counted(least, 'sample')}; "
                        f"start at most {least}, or add data")
    return [(task, indices[world.share(len(indices))]) for task, indices in jobs]


def make_step(run: Run, stage: Stage, batch: Batch, share: Share | None = None, *, train: bool) -> Step:
    fit = run.fits[stage.row.name]
    return Step(model=run.model, batch=batch, device=run.device, micro_batch=fit.micro_batch,
                keep_tokens=fit.keep_tokens, autocast=run.autocast,
                keep={"image": stage.row.image_keep, "audio": stage.row.audio_keep}, drop_path=stage.row.drop_path,
                feature_dropout=stage.row.feature_dropout,
                train=train, mask_id=run.data.tokenizer.mask_id, num_concepts=len(run.data.concepts),
                world=run.world if share else World(), share=share, stage=stage.row.name)


def compute_losses(stage: Stage, task: int, step: Step, backward: Callable[[Tensor], None]) -> Losses:
    """The weighted loss of a task's batch and its parts; calls `backward` on it, in as many pieces as memory asks."""
    return learn(step, ((weight, objective) for _, weight, objective in stage.objectives_of(task)), backward)


def reduce_gradients(run: Run, stage: Stage) -> None:
    """Give every process the gradient of the whole effective batch."""
    whole = loss_parameters(run.model)
    known = {id(p) for p in whole}
    run.world.reduce_gradients([p for p in stage.optimizer.parameters if id(p) not in known],
                               [p for p in whole if p.requires_grad])


def shrink(run: Run, stage: Stage, cause: str, what: str = "the same step again", step: int | None = None) -> None:
    """After running out of memory: free what the failed work left, halve the stage's micro-batches, and log that `what`
    comes next. `step`: of the event; None: of the one that is being trained.

    Raises:
        UserError: the micro-batches are 1 already; names what can be turned.
    """
    devices.free_cached(run.device)
    name = stage.row.name
    smaller = devices.smaller(run.fits[name], may_recompute=run.config.model.use_checkpoint)
    if smaller is None:
        raise UserError(devices.out_of_memory_message(f"stages.{name}", run.device))
    run.fits[name] = smaller
    apply_recompute(run.model, smaller)
    at = run.progress.step + 1 if step is None else step
    run.tracker.event(f"[{name}] out of memory ({cause}): {what} with {smaller}", at)
    if run.compiled_blocks:
        compile_blocks(run, stage)  # parts are encoded twice: other kinds of calls


def first_contrastive_batch(config: Config) -> int:
    """Effective batch of the first stage that contrasts; that of training where none does."""
    rows = [row for row in config.stages if any("contrastive" in task.objectives for task in row.tasks)]
    return config.effective_batch(rows[0]) if rows else config.training.effective_batch
