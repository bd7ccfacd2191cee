"""A run from its folder's point of view: open it fresh or resumed, save checkpoints, evaluate and report at the end."""

import contextlib
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import memory
import model as model_module
import protocols
import report
from checkpoint import CheckpointError, describe_mismatch, find_latest, load, plain, rotate
from checkpoint import save as save_file
from config import Config, UserError
from datasets import Data, load_data
from model import TriModalModel
from tracking import Tracker, read_records
from vocabulary import load_word_table

KEEP_EVERY = 10  # every tenth epoch's checkpoint stays


class TrainingError(RuntimeError):
    """The run cannot go on: it says at which stage and step, why, and which checkpoint is the last good one."""


@dataclass(frozen=True)
class Options:
    """What the command line says about a run beside its configuration."""

    device: str = "auto"
    resume: str | None = None  # a checkpoint's path, or "auto": the newest good one, or a fresh start
    overwrite: bool = False


@dataclass
class Progress:
    """Where a run is: whole epochs done over all stages, optimizer steps since its start and in this stage."""

    epoch: int = 0
    step: int = 0
    stage_step: int = 0


@dataclass
class Run:
    """What lives as long as the run."""

    config: Config
    folder: Path
    device: torch.device
    precision: memory.Precision
    data: Data
    model: TriModalModel
    tracker: Tracker
    micro_batch: dict[str, dict[str, int]] = field(default_factory=dict)  # by stage, then by tower
    predicted_gib: dict[str, float] = field(default_factory=dict)  # planned peak, by stage
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] = field(default_factory=dict)  # stage, epoch, loss, model_state_dict on the host

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision.dtype)


# ---- opening -----------------------------------------------------------------------------------------------------


def open_run(config: Config, options: Options) -> tuple[Run, dict[str, Any] | None]:
    """Folder, device, data, model and logs of a run, and the checkpoint that it goes on from, if any.

    Raises:
        UserError: the folder is in use or cannot be written; no such device, data, or checkpoint.
    """
    folder = Path(config.paths.output_dir)
    state = _find_state(folder, options)
    device = memory.choose_device(options.device)
    precision = memory.choose_precision(device, config.training.use_amp)
    _prepare_folder(folder, options, state)
    print(f"Device: {device}; {precision.reason}")
    memory.cap_allocator(device, int(config.budget_gb * memory.GIB))
    torch.use_deterministic_algorithms(config.training.deterministic)
    data = load_data(config)
    model = build_model(config, data, state).to(device)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True),
                                        encoding="utf-8")
    progress = Progress(**state["progress"]) if state else Progress()
    tracker = Tracker(folder / "logs", progress.step if state else None)
    run = Run(config, folder, device, precision, data, model, tracker, progress=progress)
    if state:
        run.best = _best_on_disk(folder)
        tracker.event(f"Resumed after epoch {progress.epoch} (step {progress.step})", progress.step)
    return run, state


def _find_state(folder: Path, options: Options) -> dict[str, Any] | None:
    if options.resume is None:
        return None
    if options.resume != "auto":
        try:
            state = load(options.resume)
        except CheckpointError as error:
            raise UserError(f"--resume: {error}") from None
        if "progress" not in state or "stage_state" not in state:
            raise UserError(f"{options.resume}: holds weights only, training cannot go on from it; "
                            "give a checkpoint_epoch_*.pt")
        return state
    latest = find_latest(folder / "checkpoints")
    if latest is None:
        return None
    print(f"Going on from {latest}")
    return load(latest)


def _prepare_folder(folder: Path, options: Options, state: dict[str, Any] | None) -> None:
    """Make the folder's three parts; refuse one in use unless it is resumed or thrown away."""
    used = [path for path in (folder / "checkpoints", folder / "logs") if path.is_dir() and any(path.iterdir())]
    if used and options.overwrite:
        for path in used:
            shutil.rmtree(path)
    elif used and state is None and options.resume is None:
        raise UserError(f"{folder}: holds an earlier run ({', '.join(p.name for p in used)}/). Continue it with "
                        "--resume auto, delete it with --overwrite, or choose another --output-dir")
    try:
        for name in ("checkpoints", "logs", "reports"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir") from None


def build_model(config: Config, data: Data, state: Mapping[str, Any] | None) -> TriModalModel:
    """The model of a checkpoint, or a fresh one on its word table.

    Raises:
        UserError: the checkpoint's model has other shapes than the configuration asks for.
    """
    torch.manual_seed(config.training.seed)
    size = data.tokenizer.vocab_size
    settings = {**config.to_dict()["model"], "vocab_size": max(size, config.model.vocab_size)}
    model = model_module.create_model(**settings)
    if state is not None:
        mismatch = describe_mismatch(state["model_state_dict"], model.state_dict())
        if mismatch:
            raise UserError(f"--resume: the checkpoint's model is of another shape: {mismatch}; resume with the "
                            "model settings it was trained with, or start anew in another --output-dir")
        model.load_state_dict(state["model_state_dict"])
        return model
    table = load_word_table(config.model)
    if table is not None:
        with torch.no_grad():
            model.text.words.weight[:len(table)].copy_(torch.from_numpy(table))
    return model


# ---- saving ------------------------------------------------------------------------------------------------------


def remember_best(run: Run, stage: str, loss: float) -> bool:
    """Keep these weights on the host if their validation loss is the lowest of the stage; later stages start anew."""
    if run.best and run.best["stage"] == stage and not loss < run.best["loss"]:
        return False
    run.best = {"stage": stage, "epoch": run.progress.epoch, "loss": loss,
                "model_state_dict": plain(run.model.state_dict(), copy=True)}
    return True


def description(run: Run) -> dict[str, Any]:
    """What a checkpoint needs to be used later, beside the weights, as plain data."""
    return {
        "config": run.config.to_dict() | {"model": run.config.to_dict()["model"]
                                          | {"vocab_size": run.model.config.vocab_size}},
        "tokenizer": run.data.tokenizer.to_json(),
        "concepts": list(run.data.concepts),
        "speakers": list(run.data.speakers),
        "normalisation": {"image_mean": list(model_module.IMAGE_MEAN), "image_std": list(model_module.IMAGE_STD),
                          "log_mel_mean": model_module.LOG_MEL_MEAN, "log_mel_std": model_module.LOG_MEL_STD},
    }


def save(run: Run, stage: str, stage_state: Mapping[str, Any]) -> None:
    """checkpoint_epoch_N.pt with all that training needs to go on, and best_model.pt; deletes what has been outlived.

    A disk that is full costs this checkpoint, not the run: earlier files stay whole, and the run says so.
    """
    folder = run.folder / "checkpoints"
    progress = run.progress
    common = {**description(run), "progress": vars(progress).copy(), "stage": stage}
    best = {**common, **run.best}
    try:
        save_file({**common, "model_state_dict": run.model.state_dict(), "stage_state": stage_state,
                   "micro_batch": run.micro_batch}, folder / f"checkpoint_epoch_{progress.epoch}.pt")
        save_file(best, folder / "best_model.pt")
    except CheckpointError as error:
        run.tracker.event(f"Not saved after epoch {progress.epoch}: {error}", progress.step)
        return
    rotate(folder, run.config.training.keep_checkpoints, KEEP_EVERY)


def last_checkpoint(run: Run) -> str:
    """Name of the newest whole checkpoint of this run, or "none yet"."""
    return str(find_latest(run.folder / "checkpoints", say=run.tracker.say) or "none yet")


def _best_on_disk(folder: Path) -> dict[str, Any]:
    try:
        state = load(folder / "checkpoints" / "best_model.pt")
    except CheckpointError:
        return {}
    return {name: state[name] for name in ("stage", "epoch", "loss", "model_state_dict")}


# ---- evaluating and reporting --------------------------------------------------------------------------------------


def retrieval_figures(run: Run) -> dict[str, float]:
    """Retrieval on a fixed part of the validation split, over all sets: values by name, and each one's chance."""
    if not len(run.data.tables["val"]):
        return {}
    setting = protocols.Setting(device=run.device, amp=run.precision.dtype, concepts=False,
                                limit=run.config.evaluation.max_validation)
    quick = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, resamples=0))
    pairs = protocols.evaluate_split(run.model, run.data, "val", quick, setting)[0].get(protocols.ALL, {})
    return {name: float(figure["value"]) for kind, figures in pairs.items() if kind != "speakers"
            for name, figure in figures.items() if figure["value"] is not None}


def show_examples(run: Run) -> None:
    """A grid of what a few validation captions find, as a picture in TensorBoard."""
    setting = protocols.Setting(device=run.device, amp=run.precision.dtype, concepts=False, limit=200)
    encoded = protocols.encode_split(run.model, run.data, "val", run.config, setting)
    for modality in ("image", "audio"):
        if modality in encoded.items and "text" in encoded.items:
            rows = protocols.examples(encoded, run.data, modality, queries=4)
            if rows:
                run.tracker.picture(f"examples/{modality}", report.retrieval_grid(rows), run.progress.step)


def finish(run: Run) -> Path:
    """Evaluate the best weights on the test split, save final_model.pt, write the report; path of its Markdown."""
    if run.best:
        run.model.load_state_dict(run.best["model_state_dict"])
    run.model.to(run.device).eval()
    setting = protocols.Setting(device=run.device, amp=run.precision.dtype)
    figures, encoded = protocols.evaluate_split(run.model, run.data, "test", run.config, setting)
    run.tracker.say(report.format_table(figures))
    count = run.config.report.gallery_queries
    gallery = [row for modality in ("image", "audio")
               for row in protocols.examples(encoded, run.data, modality, count)] if count and figures else []
    save_file({**description(run), **run.best, "progress": vars(run.progress).copy()},
              run.folder / "checkpoints" / "final_model.pt")
    facts = {
        "kind": "training", "command": shlex.join(["python", *sys.argv]),
        "checkpoint": str(run.folder / "checkpoints" / "best_model.pt"),
        "best": {name: run.best.get(name) for name in ("stage", "epoch", "loss")},
        "model": {"size": run.model.config.size, "parameters": sum(p.numel() for p in run.model.parameters())},
        "config": run.config.to_dict(), "data": run.data.describe(), "device": str(run.device),
        "precision": run.precision.reason, "predicted_gib": run.predicted_gib,
        "evaluation": {"split": "test", "figures": figures, "facts": encoded.facts},
    }
    _, markdown = report.write_report(run.folder / "reports", facts, read_records(run.tracker.path),
                                      language=run.config.report.language, gallery=gallery)
    run.tracker.say(f"Report: {markdown}")
    return markdown
