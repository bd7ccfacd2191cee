"""Saving: when a run writes its checkpoints, what they hold, and what happens when there is no room.

A checkpoint is written at the end of every n-th epoch (`training.save_every_epochs`), after so many minutes
(`training.save_every_minutes`), and when a signal asks the run to stop. `checkpoint_epoch_4.pt` is the end of the
fourth epoch of all, `checkpoint_epoch_4_step_120.pt` lies within it. On a GPU the state is copied to the host at one
moment and written while training goes on; on a CPU it is written at once, since a copy would be in the budget.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model import TriModalModel
from trimodal.checkpoint import check_room, plain, rotate
from trimodal.checkpoint import save as save_file
from trimodal.config import Config
from trimodal.errors import CheckpointError, Stopped
from trimodal.towers.base import PretrainedTower, digest_of
from trimodal.towers.opening import build_tower
from trimodal.towers.settings import trains
from trimodal.training.optimizer import block_matrices
from trimodal.training.run import Run, checkpoint_name, description
from trimodal.training.signals import Interruption

KEEP_EVERY = 10  # every tenth epoch's checkpoint stays

StageState = Callable[[], Mapping[str, Any]]


def checkpoint_bytes(config: Config, towers: Mapping[str, PretrainedTower] | None = None) -> tuple[int, int, int]:
    """How many checkpoints a run keeps at most, the bytes of each, and those of all with the three further files that
    hold weights: the best, the final one and model.safetensors. `towers`: the pretrained ones that `config` names."""
    training = config.training
    with torch.device("meta"):
        model = TriModalModel(config.model, {name: build_tower(of.description) for name, of in (towers or {}).items()})
    weights = 4 * sum(p.numel() for p in model.parameters())
    one_moment = 4 * sum(p.numel() for p in block_matrices(model)) if training.optimizer == "muon" else 0
    each = weights * (3 + (training.ema_decay > 0)) - one_moment  # weights, two moments (Muon keeps one), average
    count = training.keep_checkpoints + training.epochs // KEEP_EVERY + 1  # one more while it is written
    return count, each, count * each + 3 * weights


def left_out_of_checkpoints(run: Run) -> tuple[str, ...]:
    """The modalities of pretrained towers whose weights `checkpoint_epoch_*.pt` name instead of holding them: they are
    those of their source, and no stage trains them. The best and the final model hold all."""
    if run.left_out is None:
        run.left_out = tuple(name for name, tower in run.model.towers.items()
                             if not any(trains(row, name, tower) for row in run.config.stages)
                             and digest_of(tower) == tower.digest)
    return run.left_out


class Saver:
    """Decides after each step and epoch whether to save and whether to stop. Only the main process writes."""

    def __init__(self, run: Run, stage_epochs: Mapping[str, int], interruption: Interruption,
                 now: Callable[[], float] = time.monotonic):
        self.run, self.stage_epochs, self.interruption, self.now = run, stage_epochs, interruption, now
        self.in_background = run.device.type == "cuda"
        self.has_saved = True  # all that it was asked to
        self.spent_s = 0.0  # that training has waited for saving
        self._last_s = now()
        self._best: dict[str, Any] | None = None  # what best_model.pt holds
        self._pool = ThreadPoolExecutor(1, "saving")
        self._writing: Future[None] | None = None

    def after_step(self, stage: str, state: StageState, flush: Callable[[], None]) -> None:
        """Save a checkpoint after a step within an epoch, where a signal asked for it or it is time for one.

        `flush` completes the records of the steps so far.

        Raises:
            Stopped: a signal asked for it.
        """
        if self.run.world.any_flag(bool(self.interruption.asked) or self._is_due()):
            flush()  # all processes: where a step was not finite, they look for the cause together
            asked = self._asked()
            self.save(stage, state)
            self._stop(asked)

    def after_epoch(self, stage: str, state: StageState, *, is_last: bool) -> None:
        """At the end of an epoch, validated. Raises Stopped as `after_step` does."""
        asked, every = self._asked(), self.run.config.training.save_every_epochs
        if asked or is_last or self.run.progress.epoch % every == 0 or self._is_due():
            self.save(stage, state)
        self._stop(asked)

    def save(self, stage: str, state: StageState) -> None:
        """Write best_model.pt if it has changed, then the checkpoint, then delete checkpoints that need not be kept.

        In this order a kill in between loses nothing: the resumed run repeats the steps and finds the same best
        weights. If the disk is full, this checkpoint is missing and a message says so, but the run continues and
        earlier files stay whole. Only the main process writes.
        """
        if not self.run.world.is_main:
            return
        start_s = self.now()
        self.wait()
        self.run.tracker.sync()
        files, self.has_saved = self._files(stage, state()), False
        if self.in_background:
            files = [(path, plain(content, copy=True)) for path, content in files]
            self._writing = self._pool.submit(self._write, files)
        else:
            self._report(lambda: self._write(files))
        self._last_s = self.now()
        self.spent_s += self._last_s - start_s

    def wait(self) -> None:
        """Wait until the files that are being written in the background are on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._report(writing.result)

    def _files(self, stage: str, state: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
        run, progress, folder = self.run, self.run.progress, self.run.folder / "checkpoints"
        common = {**description(run), "progress": vars(progress).copy(), "stage": stage,
                  "stage_epochs": dict(self.stage_epochs)}
        best = [(folder / "best_model.pt", {**common, **run.best})] if run.best and run.best is not self._best else []
        self._best = run.best
        fits = {name: vars(fit) for name, fit in run.fits.items()}
        left_out = tuple(f"{name}.tower." for name in left_out_of_checkpoints(run))
        weights = {key: value for key, value in run.model.state_dict().items() if not key.startswith(left_out)}
        whole = {**common, "model_state_dict": weights, "stage_state": state, "fits": fits,
                 "fits_asked": run.fits_asked}
        return [*best, (folder / checkpoint_name(progress), whole)]

    def _write(self, files: list[tuple[Path, Mapping[str, Any]]]) -> None:
        folder = files[-1][0].parent
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, *(content for _, content in files))
        for path, content in files:
            save_file(content, path)
        self.has_saved = True
        try:
            rotate(folder, self.run.config.training.keep_checkpoints, KEEP_EVERY)
        except OSError as error:
            raise CheckpointError(f"{folder}: older checkpoints cannot be deleted ({error.strerror})") from None

    def _report(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (CheckpointError, OSError) as error:
            progress, what = self.run.progress, "Saved" if self.has_saved else "Not saved"
            self._best = self._best if self.has_saved else None
            self.run.tracker.event(f"{what} (epoch {progress.epoch}, step {progress.step}): {error}", progress.step,
                                   saved=self.has_saved)

    def _is_due(self) -> bool:
        minutes = self.run.config.training.save_every_minutes
        return self.run.world.is_main and 0 < minutes <= (self.now() - self._last_s) / 60

    def _asked(self) -> bool:
        return self.run.world.any_flag(bool(self.interruption.asked))

    def _stop(self, asked: bool) -> None:
        if asked:
            self.wait()
            saved = "which is saved" if self.has_saved else "which could NOT be saved"
            raise Stopped(f"Stopped by {self.interruption.asked or 'a signal'} after step {self.run.progress.step}, "
                          f"{saved}. Go on with --resume auto", self.has_saved)
