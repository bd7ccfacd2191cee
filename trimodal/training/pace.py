"""`training.max_hours`: when the stages of a run end, so that all of it is done in time.

Time counts from the start of the command: planning, filling the cache, validation and saving are in it, and so is what
earlier commands of a resumed run had spent by its checkpoint. Every LOOK_STEPS steps, and after each validation, the
steps of the stages are fitted to the time that is left, less an allowance for the evaluation at the end. Each stage
gets the same part of its epochs, and never more than `training.epochs` gives it: the run is as one with fewer epochs.
How long validation takes is measured before the first step. Of a stage that has not begun it is assumed that a token
takes as long in it as in the present one.

A stage may end within an epoch. Its learning rate follows the part of the stage that is done (`Stage.end_at`), so that
the schedule reaches its end with the last step, however often that is moved.

The clock decides, so two runs differ. But what was decided is saved with the weights that it has led to: a resumed run
goes on from both, and where time passes alike, it ends with the same bits as a run that was not killed.
"""

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from trimodal.config import FRAME_RATE_HZ, NUM_MELS, StageConfig, TaskConfig
from trimodal.data.batches import PATCH, pool
from trimodal.training.run import Run
from trimodal.training.stage import Stage, epoch_jobs
from trimodal.training.validation import averaged, encode_all, validated_samples

LOOK_STEPS = 5  # steps from one decision to the next
WARM_STEPS = 2  # of a stage, or after a resume, whose time says little: kernels are chosen, readers start
END_FACTOR = 2.0  # a sample takes longer in the evaluation than in validation: intervals, report, final weights
TOLD_PCT = 25  # a stage's end that has moved by more is told


class Pace:
    """Ends the stages of a run. Without `training.max_hours` they end with their epochs, and no clock is read."""

    def __init__(self, run: Run, tasks: Mapping[str, Sequence[TaskConfig]], epochs: MutableMapping[str, int],
                 begin_s: float, now: Callable[[], float] = time.monotonic):
        """`epochs`: most of each stage, in their order; set to what they were when stages end. `begin_s`: when the
        command began, by the clock `now`."""
        self.hours, self.run, self.epochs, self.now = run.config.training.max_hours, run, epochs, now
        self.begin_s = begin_s - run.progress.spent_s
        self.tokens = {} if self.hours is None else {
            row.name: epochs[row.name] * tokens_per_epoch(run, row, tasks[row.name]) for row in run.config.stages}

    def enter(self, stage: Stage, state: Mapping[str, Any] | None) -> None:
        """Begin `stage`, or go on with it as its saved `state` was, unless its epochs or steps are others now."""
        self.stage, self.told, self.warm, self.last_s = stage, stage.most, 0, self.now()
        if self.hours is None:
            return
        self.steps_per_epoch = len(epoch_jobs(self.run, stage, 1))
        self.validated = validated_samples(self.run, stage)
        if state is None:
            self.run.progress.timed_steps, self.run.progress.timed_s = 0, 0.0
        elif (saved := state.get("pace")) and saved["most"] == stage.most:
            stage.steps, stage.length, self.told = saved["steps"], saved["length"], saved["steps"]
            self._follow()
        if not self.run.progress.sample_s:  # one whose figures nobody sees
            if self.run.world.is_main:
                with averaged(self.run, stage):
                    encode_all(self.run, stage)
            self._time_validation()

    @property
    def stage_is_over(self) -> bool:
        return self.hours is not None and self.run.progress.stage_step >= self.stage.steps

    def after_step(self) -> None:
        """Time a step, and decide anew every LOOK_STEPS."""
        if self.hours is None:
            return
        progress, took_s = self.run.progress, self._took_s()
        self.warm += 1
        if self.warm > WARM_STEPS:
            progress.timed_steps, progress.timed_s = progress.timed_steps + 1, progress.timed_s + took_s
        if progress.stage_step % LOOK_STEPS == 0:
            self._decide()

    def after_validation(self) -> None:
        """Time a validation, and decide anew, unless the stage is over."""
        if self.hours is None:
            return
        self._time_validation()
        if not self.stage_is_over:
            self._decide()

    def end_stage(self, epochs: int) -> None:
        """Note how many epochs the stage took, and drop those behind it where no time is left."""
        if self.hours is None:
            return
        name, progress = self.stage.row.name, self.run.progress
        if progress.stage_step < self.stage.most:
            self.run.tracker.event(f"[{name}] ended by training.max_hours={self.hours:g} after "
                                   f"{progress.stage_step / self.steps_per_epoch:.3g} of {self.epochs[name]} epochs",
                                   progress.step)
        self.epochs[name] = epochs
        if self.run.world.on_main(lambda: self._left_s() <= 0):
            for later in self._later():
                self.run.tracker.event(f"[{later}] left out: no time of training.max_hours={self.hours:g} is left",
                                       progress.step)
                self.epochs[later] = 0

    def _time_validation(self) -> None:
        took_s = self._took_s()
        if self.validated:
            self.run.progress.sample_s = took_s / self.validated

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def _took_s(self) -> float:
        """Seconds since the last call, or since the stage was entered."""
        before, self.last_s = self.last_s, self.now()
        self.run.progress.spent_s = self.last_s - self.begin_s
        return self.last_s - before

    def _decide(self) -> None:
        progress, stage = self.run.progress, self.stage
        if not progress.timed_steps:
            return
        stage.end_at(self.run.world.on_main(self._end), progress.stage_step)
        self._follow()
        if 100 * abs(stage.steps - self.told) > TOLD_PCT * self.told:
            self.told = stage.steps
            self.run.tracker.event(
                f"[{stage.row.name}] training.max_hours={self.hours:g}: {stage.steps:,} of {stage.most:,} steps, "
                f"{stage.steps / self.steps_per_epoch:.3g} of {self.epochs[stage.row.name]} epochs", progress.step)

    def _follow(self) -> None:
        """Tell the progress bar and the monitor where the stage and its warm-up end now."""
        stage, warmup_pct = self.stage, self.run.config.training.warmup_pct
        stage.monitor.warmup_steps = stage.steps - round(stage.length * (1 - warmup_pct / 100))
        self.run.tracker.resize_bar(stage.steps / stage.most)

    def _end(self) -> int:
        """The step at which the stage ends if it and those behind it get the same part of their epochs."""
        progress, name, most = self.run.progress, self.stage.row.name, self.stage.most
        training_s = self._step_s() * most
        validation_s = self._sample_s() * self.validated  # after each epoch
        validations = (progress.stage_step - progress.epoch_step) // self.steps_per_epoch
        done_s = self._step_s() * progress.stage_step + validations * validation_s
        stage_s = training_s + self.epochs[name] * validation_s
        later_s = sum(training_s * self.tokens[later] / self.tokens[name] + self.epochs[later] * validation_s
                      for later in self._later())
        part = (self._left_s() + done_s) / (stage_s + later_s)
        return min(most, max(progress.stage_step, math.floor(part * most)))

    def _later(self) -> list[str]:
        names = list(self.epochs)
        return [name for name in names[names.index(self.stage.row.name) + 1:] if self.epochs[name]]

    def _left_s(self) -> float:
        """Seconds left for the epochs of this and later stages; not for the validation of an epoch that is cut short,
        and for the evaluation."""
        assert self.hours is not None
        samples = END_FACTOR * len(self.run.data.tables["test"]) + (1 + len(self._later())) * self.validated
        return 3600 * self.hours - self.run.progress.spent_s - samples * self._sample_s()

    def _step_s(self) -> float:
        return self.run.progress.timed_s / max(self.run.progress.timed_steps, 1)

    def _sample_s(self) -> float:
        """Seconds a sample in validation; where there is none, in training."""
        return self.run.progress.sample_s or self._step_s() / self.run.config.effective_batch(self.stage.row)


def tokens_per_epoch(run: Run, row: StageConfig, tasks: Sequence[TaskConfig]) -> float:
    """Tokens that the towers read in an epoch of a stage, about."""
    config, split = run.config, run.data.splits["train"]
    captions = len(split.token_ids) / max(len(split.token_offsets) - 1, 1) * config.training.captions_per_visit
    tokens = {"image": (config.model.image_side // PATCH) ** 2 * row.image_keep,
              "audio": config.data.audio_max_s * FRAME_RATE_HZ / PATCH * (NUM_MELS // PATCH) * row.audio_keep,
              "text": captions}
    return sum(task.passes * len(pool(split.table, task.inputs)) * sum(tokens[name] for name in task.inputs)
               for task in tasks)
