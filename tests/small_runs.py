"""Training runs of a second: drawn pictures of 32 pixels and half a second of drawn sounds, the nano model, few steps.

    def test_it(small: SmallRuns, tmp_path: Path) -> None:     # the fixture of conftest.py: data and plans are kept
        small.train(tmp_path / "run", "training.epochs=3")     # all three stages, evaluation, report
        run = small.open(tmp_path / "run"); stage = small.stage(run, "align")    # or step by step
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from datasets import Loader
from trimodal.config import Config, config_from_dict
from trimodal.data.batches import Batch
from trimodal.memory.devices import Fit
from trimodal.training import loop
from trimodal.training import run as run_module
from trimodal.training.run import Options, Run

STAGES: list[dict[str, Any]] = [
    {"name": "pretrain", "share": 1, "image_keep": 0.5, "tasks": [
        {"inputs": ["image"], "objectives": {"masked": 1.0}}, {"inputs": ["text"], "objectives": {"masked": 1.0}}]},
    {"name": "align", "share": 1, "drop_path": 0.1, "audio_keep": 0.5, "tasks": [
        {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}},
        {"inputs": ["audio", "text"], "objectives": {"contrastive": 1.0}}]},
    {"name": "finetune", "share": 1, "lr_factor": 0.5, "tasks": [
        {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0, "matching": 0.5, "concepts": 0.5}}]},
]
RECIPE: dict[str, Any] = {
    "data": {"datasets": ["synthetic"], "synthetic_images": 128, "synthetic_sounds": 128, "min_crop": 1.0,
             "flip": False, "audio_max_s": 0.5, "workers": 0},
    "model": {"size": "nano", "image_size": 32, "context_length": 12, "embed_dim": 8, "num_classes": 60,
              "vocab_size": 135, "word_embeddings": f"file:{Path(__file__).with_name('words.json')}"},
    "memory": {"micro_batch": 32},
    "training": {"epochs": 3, "batch_size": 32, "gradient_accumulation_steps": 1, "use_amp": False,
                 "log_every_steps": 1, "learning_rate": 1e-3},
    "evaluation": {"resamples": 0}, "report": {"gallery_queries": 2}, "stages": STAGES,
}


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Models made within are float64 and so is all that they compute: what differs there by more than 1e-12 is no
    rounding, whatever the CPU and the number of its threads."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


_opened: list[Run] = []


def close_opened() -> None:
    """End the logs of all runs that are open: TensorBoard's threads would write on into folders that are gone."""
    while _opened:
        _opened.pop().tracker.close()


class SmallRuns:
    """Runs on one device that share their prepared data and their plans, below `root`."""

    def __init__(self, root: Path, device: str = "cpu"):
        self.data_root, self.plans, self.device = root / "data", root / "plans", device
        self.plans.mkdir(parents=True)

    def config(self, folder: Path, *overrides: str) -> Config:
        folder.mkdir(parents=True, exist_ok=True)
        plans = self.plans / str(torch.get_default_dtype())  # within float64() another number of bytes is planned
        plans.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):  # an earlier run's, or that of another process of torchrun
            (folder / "plans").symlink_to(plans)
        return config_from_dict(copy.deepcopy(RECIPE), [f"paths.data_root={json.dumps(str(self.data_root))}",
                                                        f"paths.output_dir={json.dumps(str(folder))}", *overrides])

    def train(self, folder: Path, *overrides: str, resume: str | None = None, overwrite: bool = False) -> Path:
        report = loop.train(self.config(folder, *overrides), Options(self.device, resume, overwrite))
        assert report is not None
        return report

    def open(self, folder: Path, *overrides: str, micro_batch: int = 32) -> Run:
        """A fresh run before its first step, its micro-batches given and not planned; open until the test ends."""
        run = run_module.open_run(self.config(folder, *overrides), Options(self.device), None)
        _opened.append(run)
        towers = ("image", "audio", "text", "fusion")
        run.fits = {row.name: Fit(dict.fromkeys(towers, micro_batch), dict.fromkeys(towers, 0), keep_tokens=True)
                    for row in run.config.stages}
        return run

    def stage(self, run: Run, name: str, epochs: int = 1) -> loop.Stage:
        """A stage of `run` before its first step, and an open progress bar for it."""
        row = next(row for row in run.config.stages if row.name == name)
        run.tracker.open_bar(1, 0, name)
        return loop.build_stage(run, row, loop.active_tasks(row, run.data)[0], epochs)


def batches(run: Run, stage: loop.Stage, task: int = 0, epoch: int = 1) -> list[Batch]:
    """The training batches of one task in an epoch."""
    jobs = [job for job in loop.epoch_jobs(run, stage, epoch) if job[0] == task]
    return list(Loader(run.data, "train", jobs, run.config, inputs=[task.inputs for task in stage.tasks], train=True,
                       epoch=epoch))


def step(run: Run, stage: loop.Stage, batch: Batch, task: int = 0) -> loop.StepResult:
    """One optimizer step, counted."""
    result = loop.train_step(run, stage, task, batch)
    run.progress.step += 1
    run.progress.stage_step += 1
    return result


def trained(small: SmallRuns, folder: Path, name: str, micro_batch: int, steps: int, task: int = 0,
            *overrides: str) -> tuple[Run, loop.Stage]:
    """A run after some steps of one task of a stage."""
    run = small.open(folder, *overrides, micro_batch=micro_batch)
    stage = small.stage(run, name)
    for batch in batches(run, stage, task)[:steps]:
        step(run, stage, batch, task)
    return run, stage


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that `module` saves."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def apart(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Norm of the difference of all that two models save, as a part of the first one's; in float64, or it raises."""
    first, second = (torch.cat([value.flatten() for value in model.state_dict().values()]) for model in (one, other))
    assert first.dtype == second.dtype == torch.float64, "in float32 this is rounding, which depends on the CPU"
    return float((first - second).norm() / first.norm())


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Places in two nests of dicts, lists and tensors whose values are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differing(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [place for i, pair in enumerate(zip(one, other, strict=True))
                for place in differing(*pair, f"{where}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if type(one) is type(other) and one == other else [where]


def records(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, all of them or those of some kinds."""
    lines = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line)) and (not kinds or record["kind"] in kinds)]


def without_times(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what two runs of the same mathematics may differ in."""
    vary = {"samples_per_s", "data_wait_pct", "memory_gib", "seconds", "save_s", "peak_gib", "held_gib"}
    return [{name: value for name, value in record.items() if name not in vary} for record in found]
