"""A run from its folder's point of view: open it fresh or resumed, save checkpoints, evaluate and report at the end."""

import contextlib
import dataclasses
import itertools
import math
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
from checkpoint import CheckpointError, describe_mismatch, find_latest, load, plain, remove_leftovers, rotate
from checkpoint import save as save_file
from config import MODALITIES, Config, UserError
from datasets import Data, load_data
from distributed import World
from model import TriModalModel
from tracking import SilentTracker, Tracker, read_records
from vocabulary import Tokenizer, load_word_table

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
    """Where a run is: whole epochs done over all stages, steps since its start, steps and time in this stage."""

    epoch: int = 0
    step: int = 0
    stage_step: int = 0
    stage_s: float = 0.0


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
    world: World = field(default_factory=World)
    fits: dict[str, memory.Fit] = field(default_factory=dict)  # by stage, and of evaluation
    predicted_gib: dict[str, float] = field(default_factory=dict)  # planned peak, by stage
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] = field(default_factory=dict)  # stage, epoch, loss, model_state_dict on the host

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision.dtype)


# ---- stages and epochs ----------------------------------------------------------------------------------------------


def stage_epochs(config: Config) -> list[int]:
    """Epochs of each stage: `training.epochs` by `share`, at least one each where there are enough, rest by largest
    remainder (a tie goes to the later stage)."""
    total, shares = config.training.epochs, [stage.share for stage in config.stages]
    wanted = [total * share / sum(shares) for share in shares]
    least = 1 if total >= len(shares) else 0
    given = [max(least, int(w)) for w in wanted]
    while sum(given) != total:
        behind = [w - g for w, g in zip(wanted, given, strict=True)]
        if sum(given) < total:
            given[max(range(len(given)), key=lambda i: (behind[i], i))] += 1
        else:
            able = [i for i in range(len(given)) if given[i] > least]
            given[min(able, key=lambda i: behind[i])] -= 1
    return given


def _check_stage(config: Config, state: dict[str, Any]) -> None:
    """Raises UserError where the last epoch of a checkpoint belongs to another stage than it was trained in."""
    epoch, total, ends = state["progress"]["epoch"], config.training.epochs, itertools.accumulate(stage_epochs(config))
    now = next((row.name for row, end in zip(config.stages, ends, strict=True) if epoch <= end), "no stage")
    if now != state["stage"]:
        raise UserError(f"--resume: the checkpoint's epoch {epoch} belongs to stage {state['stage']}, but to {now} of "
                        f"training.epochs={total}; resume with the epochs and stages it was trained with "
                        f"(--epochs {state['config']['training']['epochs']}), or start anew in another --output-dir")


# ---- opening -----------------------------------------------------------------------------------------------------


def find_state(config: Config, options: Options) -> dict[str, Any] | None:
    """The checkpoint that `options` ask to go on from, with its run's `best` so far; None: a fresh start.

    Raises:
        UserError: no such checkpoint, or none that training can go on from with this configuration.
    """
    if options.resume is None:
        return None
    if options.overwrite:
        raise UserError("--overwrite deletes the run that --resume would go on with; give one of them")
    auto = options.resume == "auto"
    path = find_latest(Path(config.paths.output_dir) / "checkpoints") if auto else Path(options.resume)
    if path is None:
        return None
    if auto:
        print(f"Going on from {path}")
    try:
        state = load(path)
    except CheckpointError as error:
        raise UserError(f"--resume: {error}") from None
    if "progress" not in state or "stage_state" not in state:
        raise UserError(f"--resume: {path}: holds weights only, training cannot go on from it; "
                        "give a checkpoint_epoch_*.pt")
    _check_stage(config, state)
    return state | {"best": _best_beside(path, state["progress"]["epoch"])}


def _best_beside(path: Path, epoch: int) -> dict[str, Any]:
    """What best_model.pt in the checkpoint's folder holds, if it was known by then: a later one will be found anew."""
    try:
        state = load(path.with_name("best_model.pt"))
    except CheckpointError:
        return {}
    if state["epoch"] > epoch:
        return {}
    return {name: state[name] for name in ("stage", "epoch", "loss", "model_state_dict")}


def finished_report(config: Config, state: dict[str, Any] | None) -> Path | None:
    """The report of a run whose epochs are all done; None while there is something left to do."""
    if state is None or state["progress"]["epoch"] < config.training.epochs:
        return None
    folder = Path(config.paths.output_dir)
    made = [folder / "reports" / record["file"] for record in read_records(folder / "logs" / "metrics.jsonl")
            if record["kind"] == "report"]
    return next((path for path in reversed(made) if path.is_file()), None)


def open_run(config: Config, options: Options, state: dict[str, Any] | None, world: World | None = None, *,
             data: Data | None = None) -> Run:
    """Folder, device, data, model and logs of a run, fresh or as `state` left it. Only the main process of `world`
    writes to the folder. `data`: what has been read already.

    Raises:
        UserError: the folder is in use or cannot be written; no such device or data; the checkpoint does not fit.
    """
    folder = Path(config.paths.output_dir)
    world = world or World(device=memory.choose_device(options.device))
    device = world.device
    precision = memory.choose_precision(device, config.training.use_amp)
    world.together(lambda: _prepare_folder(folder, options) if world.is_main else None)
    print(f"Device: {device}; {precision.reason}")
    memory.cap_allocator(device, int(config.budget_gb * memory.GIB))
    torch.use_deterministic_algorithms(config.training.deterministic)
    data = data or world.together(lambda: _load_data(config, state))
    model = world.together(lambda: build_model(config, data, state)).to(device)
    progress = Progress(**state["progress"]) if state else Progress()
    run = Run(config, folder, device, precision, data, model, SilentTracker(folder / "logs"), world, progress=progress)
    if not world.is_main:
        return run
    if options.overwrite:
        _delete_run(folder)  # not before all that could fail has been tried
    remove_leftovers(folder / "checkpoints")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True),
                                        encoding="utf-8")
    run.tracker = Tracker(folder / "logs", progress.step)
    if state:
        run.best = state["best"]
        run.tracker.event(f"Resumed after epoch {progress.epoch} (step {progress.step})", progress.step)
    return run


def _load_data(config: Config, state: Mapping[str, Any] | None) -> Data:
    """A resumed run keeps the numbers of its words, concepts and speakers, whatever has come to its data since."""
    if state is None:
        return load_data(config)
    return load_data(config, tokenizer=Tokenizer.from_json(state["tokenizer"]), concepts=state["concepts"],
                     speakers=state["speakers"])


def parts_in_use(folder: Path) -> list[str]:
    """What an earlier run has left in an output folder."""
    parts = {"checkpoints": folder.glob("checkpoints/*"), "logs/metrics.jsonl": folder.glob("logs/metrics.jsonl")}
    return [name for name, paths in parts.items() if any(path.stat().st_size for path in paths)]


def _prepare_folder(folder: Path, options: Options) -> None:
    """Make the folder's three parts; refuse one in use unless it is resumed or thrown away."""
    used = parts_in_use(folder)
    if used and not options.overwrite and options.resume is None:
        raise UserError(f"{folder}: holds an earlier run ({', '.join(used)}). Continue it with --resume auto, delete "
                        "it with --overwrite, or choose another --output-dir")
    try:
        for name in ("checkpoints", "logs", "reports"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir") from None


def _delete_run(folder: Path) -> None:
    """Checkpoints and logs of an earlier run; what this one has found out about its files stays."""
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    shutil.rmtree(folder / "logs" / "tensorboard", ignore_errors=True)
    (folder / "logs" / "metrics.jsonl").unlink(missing_ok=True)


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
    before = run.best["loss"] if run.best and run.best["stage"] == stage else math.nan
    if loss >= before or (math.isnan(loss) and not math.isnan(before)):
        return False  # without validation samples all losses are NaN: then the newest weights are taken
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
    """best_model.pt, then checkpoint_epoch_N.pt with all that training needs to go on; deletes what has been outlived.

    In this order a kill between them loses nothing: the epoch is redone and finds the same best weights. A disk that
    is full costs this checkpoint, not the run: earlier files stay whole, and the run says so.
    """
    folder = run.folder / "checkpoints"
    progress = run.progress
    common = {**description(run), "progress": vars(progress).copy(), "stage": stage}
    best = {**common, **run.best}
    try:
        save_file(best, folder / "best_model.pt")
        fits = {name: vars(fit) for name, fit in run.fits.items()}
        save_file({**common, "model_state_dict": run.model.state_dict(), "stage_state": stage_state, "fits": fits},
                  folder / f"checkpoint_epoch_{progress.epoch}.pt")
    except CheckpointError as error:
        run.tracker.event(f"Not saved after epoch {progress.epoch}: {error}", progress.step)
        return
    for later in range(progress.epoch + 1, run.config.training.epochs + 1):  # of a run that went on from before them
        (folder / f"checkpoint_epoch_{later}.pt").unlink(missing_ok=True)
    rotate(folder, run.config.training.keep_checkpoints, KEEP_EVERY)


def last_checkpoint(run: Run) -> str:
    """Name of the newest whole checkpoint of this run, or "none yet"."""
    return str(find_latest(run.folder / "checkpoints", say=run.tracker.say) or "none yet")


# ---- evaluating and reporting --------------------------------------------------------------------------------------


def encoding(run: Run, **settings: Any) -> protocols.Setting:
    """How splits are encoded: in parts of the size that evaluation was planned with."""
    fit = run.fits.get(memory.EVALUATION)

    def less(size: int, cause: str) -> None:
        run.fits[memory.EVALUATION] = memory.Fit(dict.fromkeys(MODALITIES, size), dict.fromkeys(MODALITIES, 0))
        run.tracker.event(f"[evaluation] out of memory ({cause}): the same samples again, {size} at a time",
                          run.progress.step)

    return protocols.Setting(device=run.device, amp=run.precision.dtype, less=less,
                             sizes=dict(fit.micro_batch) if fit else {}, **settings)


def retrieval_figures(run: Run) -> dict[str, float]:
    """Retrieval on a fixed part of the validation split, over all sets: values by name, and each one's chance."""
    if not len(run.data.tables["val"]):
        return {}
    setting = encoding(run, concepts=False, limit=run.config.evaluation.max_validation)
    quick = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, resamples=0))
    pairs = protocols.evaluate_split(run.model, run.data, "val", quick, setting)[0].get(protocols.ALL, {})
    return {name: float(figure["value"]) for kind, figures in pairs.items() if kind != "speakers"
            for name, figure in figures.items() if figure["value"] is not None}


def show_examples(run: Run) -> None:
    """A grid of what a few validation captions find, as a picture in TensorBoard."""
    setting = encoding(run, concepts=False, limit=200)
    encoded = protocols.encode_split(run.model, run.data, "val", run.config, setting)
    for modality in ("image", "audio"):
        if modality in encoded.items and "text" in encoded.items:
            rows = protocols.examples(encoded, run.data, modality, queries=4)
            if rows:
                run.tracker.picture(f"examples/{modality}", report.retrieval_grid(rows), run.progress.step)


def finish(run: Run) -> Path:
    """Evaluate the best weights on the test split, save final_model.pt, write the report; path of its Markdown.

    Raises:
        UserError: the disk is full, or the test data are broken.
    """
    if run.best:
        run.model.load_state_dict(run.best["model_state_dict"])
    run.model.to(run.device).eval()
    setting = encoding(run)
    figures, encoded = protocols.evaluate_split(run.model, run.data, "test", run.config, setting)
    run.tracker.say(report.format_table(figures))
    count = run.config.report.gallery_queries
    gallery = [row for modality in ("image", "audio")
               for row in protocols.examples(encoded, run.data, modality, count)] if count and figures else []
    facts = {
        "kind": "training", "command": shlex.join(["python", *sys.argv]),
        "checkpoint": str(run.folder / "checkpoints" / "best_model.pt"),
        "best": {name: run.best.get(name) for name in ("stage", "epoch", "loss")},
        "model": {"size": run.model.config.size, "parameters": sum(p.numel() for p in run.model.parameters())},
        "config": run.config.to_dict(), "data": run.data.describe(), "device": str(run.device),
        "precision": run.precision.reason, "predicted_gib": run.predicted_gib,
        "evaluation": {"split": "test", "figures": figures, "facts": encoded.facts},
    }
    try:
        save_file({**description(run), **run.best, "progress": vars(run.progress).copy()},
                  run.folder / "checkpoints" / "final_model.pt")
        _, markdown = report.write_report(run.folder / "reports", facts, read_records(run.tracker.path),
                                          language=run.config.report.language, gallery=gallery)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{error}; training is done: mend this, then --resume auto evaluates and reports") from None
    run.tracker.record({"kind": "report", "step": run.progress.step, "file": markdown.name})
    run.tracker.say(f"Report: {markdown}")
    return markdown
