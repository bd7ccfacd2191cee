"""A run: its folder locked and opened, fresh or resumed, and what its checkpoints describe."""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock

import model as model_module
from datasets import Data, load_data
from model import TriModalModel
from trimodal.blocks import KERNELS
from trimodal.checkpoint import describe_mismatch, find_latest, has_tower
from trimodal.config import MODALITIES, Config
from trimodal.data.batches import pool
from trimodal.data.codecs import KINDS, Kind
from trimodal.data.features import Features
from trimodal.data.splits import file_hashes, has_known_file
from trimodal.data.tokenizer import Tokenizer, load_word_table
from trimodal.distributed import World
from trimodal.errors import UserError, counted
from trimodal.files import check_writable, hold_lock, remove_left
from trimodal.memory import devices
from trimodal.redaction import settings
from trimodal.towers.base import Load, PretrainedTower
from trimodal.towers.captions import caption_vectors
from trimodal.towers.opening import build_tower
from trimodal.towers.settings import decoded_kinds, inputs_of, open_towers, tokenizer_of, with_towers
from trimodal.training import outputs
from trimodal.training.compiling import CompiledBlocks, wants_compiling
from trimodal.training.initial import format_table, headline, read_source, take_weights
from trimodal.training.tracking import Tracker

FOLDERS = ("checkpoints", "logs", "reports")
LOCK = ".lock"


@dataclass(frozen=True)
class Options:
    """The options of the command line that are not settings of the configuration."""

    device: str = "auto"
    resume: str | None = None  # a checkpoint's path, or "auto": the newest good one, or a fresh start
    overwrite: bool = False
    init: str | None = None  # a checkpoint, or a folder with one, whose weights a fresh run begins with


@dataclass
class Progress:
    """How far a run has come; saved in its checkpoints."""

    epoch: int = 0  # whole epochs done, over all stages
    step: int = 0  # optimizer steps since the run's start
    stage_step: int = 0  # and since that of the stage
    stage_s: float = 0.0
    epoch_step: int = 0  # steps of the epoch in progress
    loss_sum: float = 0.0  # of those steps
    losses: int = 0  # how many of them it sums
    spent_s: float = 0.0  # by this command and those before it; this and what follows with training.max_hours alone
    timed_steps: int = 0  # of the stage
    timed_s: float = 0.0  # that these took
    sample_s: float = 0.0  # of the newest validation, 0: none yet


@dataclass
class Run:
    """The state of a training run over all its stages."""

    config: Config
    folder: Path
    device: torch.device
    precision: devices.Precision
    data: Data
    model: TriModalModel
    tracker: Tracker
    world: World = field(default_factory=World)
    fits: dict[str, devices.Fit] = field(default_factory=dict)  # by stage, and of evaluation
    kernel: str = KERNELS[0]  # of attention
    predicted_gib: dict[str, float] = field(default_factory=dict)  # planned peak, by stage
    held_gib: float = 0.0  # of memory, before the model was made: in what is measured, and in no plan
    planned_fits: dict[str, devices.Fit] = field(default_factory=dict)  # that this peak is of
    fits_asked: dict[str, str] = field(default_factory=dict)  # digests of the settings that `fits` obey
    features: dict[str, Mapping[str, Features | None]] = field(default_factory=dict)  # by split and modality: frozen
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] = field(default_factory=dict)  # stage, epoch, loss (None: no validation), model_state_dict
    has_logged_no_validation: bool = False  # for lack of samples
    splits: dict[str, Any] = field(default_factory=dict)  # samples and digest of each, on the main process
    compiled_blocks: CompiledBlocks | None = None  # None: blocks run uncompiled
    initialised_from: dict[str, Any] | None = None  # what `take_weights` took; None: a run from nothing
    left_out: tuple[str, ...] | None = None  # see saving.left_out_of_checkpoints; None: not looked at yet
    trained_on: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # splits.file_hashes
    modalities: tuple[str, ...] = MODALITIES  # see aligned_modalities

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision.dtype)


# ---- opening -----------------------------------------------------------------------------------------------------


def open_run(config: Config, options: Options, state: dict[str, Any] | None, world: World | None = None, *,
             data: Data | None = None, towers: Mapping[str, PretrainedTower] | None = None) -> Run:
    """Folder, device, data, model and logs of a run, fresh or as `state` left it. Only the main process of `world`
    writes to the folder. `data`, `towers`: what has been read already.

    Raises:
        UserError: the folder cannot be written; no such device or data; the checkpoint does not fit.
    """
    folder = Path(config.paths.output_dir)
    world = world or World(device=devices.choose_device(options.device))
    device = world.device
    precision = devices.choose_precision(device, config.training.use_amp)
    compiles = wants_compiling(config.training.compile, device)
    world.together(lambda: _make_folders(folder) if world.is_main else None)
    print(f"Device: {device}; {precision.reason}")
    devices.cap_allocator(device, int(config.budget_gb * devices.GIB))
    devices.use_deterministic(config.training.deterministic)
    begins_from = options.init if state is None else None
    source = world.together(lambda: read_source(begins_from) if begins_from and world.is_main else None)
    opened = world.together(lambda: towers_of(config, state) if towers is None else towers)
    config = replace(config, model=with_towers(config.model, opened))
    kinds = decoded_kinds(config, opened)
    data = world.together(lambda: with_caption_vectors(
        data or read_data(config, state, towers=opened, fill_cache=kinds), config))
    held_gib = devices.held_gib(device)
    model = world.together(lambda: build_model(config, data, state, opened)).to(device)
    initialised_from = state.get("initialised_from") if state else world.on_main(
        lambda: take_weights(source, model, data.tokenizer, data.concepts, config.training.contrastive_loss)
        if source else None)
    if begins_from:  # at once: processes look for features of frozen towers by the weights that they have
        world.broadcast_tensors([*model.state_dict().values()])
    progress = Progress(**state["progress"]) if state else Progress()
    run = Run(config, folder, device, precision, data, model, Tracker(folder / "logs", writes=False), world,
              progress=progress, held_gib=held_gib, initialised_from=initialised_from)
    if compiles:
        run.compiled_blocks = CompiledBlocks(model, lambda line: run.tracker.event(line, run.progress.step))
    if not world.is_main:
        return run
    if options.overwrite:
        outputs.remove_run(folder)  # not before all that could fail has been tried
    for name in ("", *FOLDERS, outputs.BOARD):
        remove_left(folder / name, outputs.WRITTEN)
    back = outputs.go_back(folder, checkpoint_name(progress), progress.epoch, progress.step)
    path = outputs.write_settings(folder, settings(config.to_dict()))
    run.tracker = Tracker(folder / "logs", progress.step)
    run.tracker.text("run/settings", f"```yaml\n{path.read_text('utf-8')}```", progress.step + 1)
    if state:
        run.best = state["best"]
        within = f" and {counted(progress.epoch_step, 'step')} of the next" if progress.epoch_step else ""
        moved = f"; what came after it is in {back}" if back else ""
        run.tracker.event(f"Resumed after epoch {progress.epoch}{within} (step {progress.step}){moved}", progress.step,
                          resumed=True)
    elif back:
        run.tracker.say(f"Started anew, for there is no checkpoint; what an earlier run has left is in {back}")
    if source and initialised_from:
        run.tracker.event(headline(initialised_from), progress.step)
        run.tracker.say(format_table(initialised_from))
    remember_splits(run, state, source.trained_on if source else None)
    run.modalities = aligned_modalities(config, data, state or (source.state if source else None))
    return run


def towers_of(config: Config, state: Mapping[str, Any] | None, load: Load = "always") -> dict[str, PretrainedTower]:
    """The pretrained towers that the configuration names: those of the checkpoint `state`, or opened by their names.

    A checkpoint may leave out the weights of a frozen tower (see `saving`): then these are read where they were first,
    and have to be the same. `load`: as `open_tower` takes it.

    Raises:
        UserError: a tower cannot be had, or is not the one that the checkpoint was trained with.
    """
    if state is None:
        return open_towers(config.model, load=load)
    described = state.get("towers", {})
    if other := {*described} ^ {*config.model.pretrained}:
        name = min(other)
        raise UserError(f"--resume: the checkpoint was trained with model.{name}.tower="
                        f"{described[name]['source'] if name in described else 'own'}, not "
                        f"{config.model.tower(name).tower}; resume with that, or start anew in another --output-dir")
    opened = open_towers(config.model, {name for name in described if not has_tower(state, name)}, load=load)
    for name, tower in opened.items():
        if tower.digest not in ("", described[name]["digest"]):
            raise UserError(f"--resume: model.{name}.tower: {tower.source} has other weights than when this run began "
                            f"(sha256 {tower.digest[:12]}, then {described[name]['digest'][:12]}); bring back the "
                            "earlier ones, or start anew in another --output-dir")
    return {name: opened[name] if name in opened else build_tower(described[name]) for name in described}


def read_data(config: Config, state: Mapping[str, Any] | None, *, towers: Mapping[str, PretrainedTower] | None = None,
              fill_cache: Collection[Kind] = KINDS) -> Data:
    """A resumed run keeps the numbers of its words, concepts and speakers, whatever has come to its data since."""
    if state is None:
        return load_data(config, tokenizer=tokenizer_of(towers or {}), fill_cache=fill_cache,
                         inputs=inputs_of(towers or {}))
    return load_data(config, tokenizer=Tokenizer.from_json(state["tokenizer"]), concepts=state["concepts"],
                     speakers=state["speakers"], fill_cache=fill_cache, inputs=inputs_of(towers or {}))


def with_caption_vectors(data: Data, config: Config) -> Data:
    """`data`, where contrast looks at how alike captions are with a vector of each caption that it sees."""
    if not config.training.compares_captions:
        return data
    return replace(data, splits={
        name: split if name == "test" else replace(
            split, caption_vectors=caption_vectors(split.table.captions.tolist(), config))
        for name, split in data.splits.items()})


def aligned_modalities(config: Config, data: Data, before: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The modalities whose features a contrastive task with samples compares, and those of the checkpoint `before`
    that the run goes on from or begins with; features of others mean nothing beside them."""
    compared = {name for row in config.stages for task in row.tasks if "contrastive" in task.objectives
                and len(pool(data.tables["train"], task.inputs)) >= 2 for name in task.inputs}
    known = before.get("modalities", MODALITIES) if before else ()
    return tuple(name for name in MODALITIES if name in compared or name in known)


def remember_splits(run: Run, state: Mapping[str, Any] | None, trained_on: torch.Tensor | None = None) -> None:
    """Set what checkpoints record of the samples, and log what has changed since the one resumed from, unless that is
    of an earlier release, which recorded none of it. `trained_on`: by the weights that a fresh run begins with."""
    root, tables = run.config.paths.data_root, run.data.tables
    run.splits = {name: {"samples": len(table), "digest": table.digest()} for name, table in tables.items()}
    run.trained_on = torch.from_numpy(file_hashes(tables["train"], root))
    if trained_on is not None:
        run.trained_on = torch.cat([trained_on, run.trained_on]).unique()
    if state is None or not isinstance(state.get("trained_on"), torch.Tensor):
        return
    before = state["trained_on"].cpu()
    run.trained_on = torch.cat([before, run.trained_on]).unique()
    changed = []
    for name, now in run.splits.items():
        known = state["splits"].get(name, {"samples": 0, "digest": ""})
        if now["digest"] != known["digest"]:
            count = 0 if name == "train" else int(has_known_file(tables[name], root, before.numpy()).sum())
            changed.append(f"{name} {known['samples']} -> {now['samples']}"
                           + (f" ({count} of them were trained on)" if count else ""))
    if changed:
        done = run.progress.epoch_step
        run.tracker.event(f"Changed since this checkpoint: samples of {', '.join(changed)}"
                          + (f"; done of its unfinished epoch: {counted(done, 'step')}" if done else ""),
                          run.progress.step)


def parts_in_use(folder: Path) -> list[str]:
    """Which of "checkpoints" and "logs/metrics.jsonl" an earlier run has left, not empty, in the output folder."""
    models = [path for path in folder.glob("checkpoints/*") if outputs.MODELS.fullmatch(path.name)]
    parts = {"checkpoints": models, "logs/metrics.jsonl": [folder / outputs.LOG]}
    return [name for name, paths in parts.items() if any(path.exists() and path.stat().st_size for path in paths)]


def claim_folder(folder: Path, options: Options) -> BaseFileLock | None:
    """Create the output folder, lock it against other runs, and check that this run may write into it.

    Call it on the main process, before a checkpoint to resume from is looked for: a run that is just ending may still
    write one.

    Returns:
        The lock, held until its `release()` or the end of the process; None on a file system without locks.

    Raises:
        UserError: it cannot be written, another process trains in it, or a run is in it that is neither resumed nor
            overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
    except OSError as error:
        raise _not_writable(folder, error) from None
    if place := outputs.finish_going_back(folder):
        print(f"{folder}: went back to an earlier checkpoint and was killed; what came after it is now in {place}")
    used = parts_in_use(folder)
    if used and not options.overwrite and not is_within(options.resume, folder):
        if lock:
            lock.release()
        raise UserError(f"{folder}: holds an earlier run ({', '.join(used)}). {_advice(options.resume)}")
    return lock


def is_within(resume: str | None, folder: Path) -> bool:
    """Whether --resume names the run in `folder`, and not another one."""
    return resume == "auto" or bool(resume and Path(resume).resolve().parent == (folder / "checkpoints").resolve())


def _advice(resume: str | None) -> str:
    """The end of an error message: which options help where the output folder already holds a run.

    `resume`: the value of --resume, None without it; a path is that of a checkpoint of another run.
    """
    if not resume:
        return "Continue it with --resume auto, delete it with --overwrite, or choose another --output-dir"
    path = Path(resume)
    where = f"with --output-dir {path.parent.parent}" if path.parent.name == "checkpoints" else "in its own folder"
    return f"{path} is of another: go on {where}, or choose a new --output-dir"


def _make_folders(folder: Path) -> None:
    try:
        for name in FOLDERS:
            check_writable(folder / name)
    except OSError as error:
        raise _not_writable(folder, error) from None


def hold(folder: Path) -> BaseFileLock | None:
    """Lock an output folder until the process ends, however it ends. Worker processes do not hold the lock."""
    try:
        lock = hold_lock(folder / LOCK)
    except BlockingIOError:
        raise UserError(f"{folder}: another process trains there at this moment; wait for it, stop it, or choose "
                        "another --output-dir") from None
    if not lock:
        print(f"{folder}: this file system has no locks: see to it that no second run uses it")
    return lock


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir")


def build_model(config: Config, data: Data, state: Mapping[str, Any] | None,
                towers: Mapping[str, PretrainedTower] | None = None) -> TriModalModel:
    """The model of a checkpoint, or a fresh one on its word table; with `towers` as they are opened or described.

    Raises:
        UserError: the checkpoint's model has other shapes than the configuration asks for.
    """
    torch.manual_seed(config.training.seed)
    size = data.tokenizer.vocab_size
    model = TriModalModel(replace(config.model, vocab_size=max(size, config.model.vocab_size)), towers)
    if state is not None:
        weights = {**_opened_weights(model, state), **state["model_state_dict"]}
        mismatch = describe_mismatch(weights, model.state_dict())
        if mismatch:
            raise UserError(f"--resume: the checkpoint's model is of another shape: {mismatch}; resume with the "
                            "model settings it was trained with, or start anew in another --output-dir")
        model.load_state_dict(weights)
        return model
    table = load_word_table(config.model) if config.model.text.is_own else None
    if table is not None:
        with torch.no_grad():
            model.text.words.weight[:len(table)].copy_(torch.from_numpy(table))
    return model


def _opened_weights(model: TriModalModel, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights, by their names in the model, of towers that the checkpoint `state` leaves out."""
    left_out = {name for name in model.towers if not has_tower(state, name)}
    return {key: value for key, value in model.state_dict().items()
            if key.split(".")[0] in left_out and key.split(".")[1] == "tower"}


# ---- saving ------------------------------------------------------------------------------------------------------


def description(run: Run) -> dict[str, Any]:
    """The settings, tokenizer, class names and splits to save beside the weights, as plain data, so that a checkpoint
    can be used without the data set."""
    given = settings(run.config.to_dict())
    return {
        "config": given | {"model": given["model"] | {"vocab_size": run.model.config.vocab_size}},
        "towers": {name: tower.description for name, tower in run.model.towers.items()},
        "tokenizer": run.data.tokenizer.to_json(),
        "concepts": list(run.data.concepts),
        "speakers": list(run.data.speakers),
        "splits": run.splits,
        "trained_on": run.trained_on,
        "modalities": list(run.modalities),
        "attention_kernel": run.kernel,
        **({"initialised_from": run.initialised_from} if run.initialised_from else {}),
        "normalisation": {"image_mean": list(model_module.IMAGE_MEAN), "image_std": list(model_module.IMAGE_STD),
                          "log_mel_mean": model_module.LOG_MEL_MEAN, "log_mel_std": model_module.LOG_MEL_STD},
    }


def checkpoint_name(progress: Progress) -> str:
    if progress.epoch_step:
        return f"checkpoint_epoch_{progress.epoch + 1}_step_{progress.step}.pt"
    return f"checkpoint_epoch_{progress.epoch}.pt"


def last_checkpoint(run: Run) -> str:
    """Name of the newest whole checkpoint of this run, or "none yet"."""
    return str(find_latest(run.folder / "checkpoints", say=run.tracker.say) or "none yet")


