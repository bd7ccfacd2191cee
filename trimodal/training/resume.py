"""Going on with a run: the checkpoint it goes on from, and what a changed configuration makes of it."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimodal.checkpoint import find_latest, load
from trimodal.config import OWN_IMAGE_SIDE, Config
from trimodal.errors import CheckpointError, UserError, counted
from trimodal.memory.devices import choose_device
from trimodal.redaction import settings
from trimodal.sets import SETS, read_split
from trimodal.training.initial import read_source
from trimodal.training.run import Options, claim_folder
from trimodal.training.tracking import read_records

WORDS = "model.word_embeddings:"  # a run goes on with the tokenizer and the word table that it has
NEEDED = {"progress", "stage", "stage_state", "stage_epochs", "fits"}  # beside the weights


def check_start(config: Config, options: Options) -> None:
    """Raise what training would refuse whatever the data sets hold: device, own list of samples, output folder,
    checkpoint. The output folder is locked for that moment and left as it was.

    Raises:
        UserError: as training would.
    """
    choose_device(options.device)
    for name in config.data.datasets:
        if SETS[name].reads_at_once:
            read_split(name, "train", config)
    lock = claim_folder(Path(config.paths.output_dir), options)
    find_state(config, options)
    if options.init:
        read_source(options.init)
    if lock:
        lock.release()


def find_state(config: Config, options: Options) -> dict[str, Any] | None:
    """The checkpoint that `options` ask to go on from, with its run's `best` so far; None: a fresh start. Prints what
    has changed in the configuration since.

    Raises:
        UserError: no such checkpoint, or none that training can go on from with this configuration.
    """
    if options.resume is None:
        return None
    if options.init:
        raise UserError("--init begins a new run, and --resume goes on with one, whose weights are all there; give one "
                        "of them")
    if options.overwrite:
        raise UserError("--overwrite deletes the run that --resume would go on with; give one of them")
    auto = options.resume == "auto"
    folder = Path(config.paths.output_dir) / "checkpoints"
    path = find_latest(folder) if auto else Path(options.resume)
    if path is None:
        _refuse_to_start_anew(folder)
        return None
    if auto:
        print(f"Going on from {path}")
    try:
        state = load(path)
    except CheckpointError as error:
        raise UserError(f"--resume: {error}") from None
    if not state.keys() >= NEEDED:
        raise UserError(f"--resume: {path}: holds weights only, training cannot go on from it; "
                        "give a checkpoint_epoch_*.pt")
    stage_epochs(config, state)  # whether the stages still fit
    changed = changes(state["config"], settings(config.to_dict()))
    for line in changed:
        kept = " (not used: the words are those of the checkpoint)" if line.startswith(WORDS) else ""
        print(f"Changed since this checkpoint: {line}{kept}")
    if changed and (done := state["progress"]["epoch_step"]):
        print(f"Done of its unfinished epoch, whatever it would hold now: {counted(done, 'step')}")
    best = _best_beside(path, state["progress"]["epoch"])
    if best and (by := _judged_otherwise(config, state, changed, best["stage"])):
        print(f"{', '.join(by)}: losses before and after do not compare, so the best weights are chosen anew from here "
              "on")
        best["loss"] = math.nan
    return state | {"best": best}


def _judged_otherwise(config: Config, state: Mapping[str, Any], changed: Sequence[str], stage: str) -> list[str]:
    """The changed settings by which the validation loss of a stage is another."""
    before, now = state["config"].get("training", {}), config.training
    judging = {"training.contrastive_loss", "training.soft_targets", "training.false_negatives",
               "evaluation.max_validation", "data.audio_max_s", "data.datasets"}
    judging |= {f"stages.{stage}.{name}" for name in ("tasks", "effective_batch", "image_keep", "audio_keep")}
    if before.get("batch_size", 0) * before.get("gradient_accumulation_steps", 0) != now.effective_batch:
        judging |= {"training.batch_size", "training.gradient_accumulation_steps"}
    return [name for line in changed if (name := line.partition(":")[0]) in judging]


def _refuse_to_start_anew(folder: Path) -> None:
    """Raise UserError where `folder` has checkpoints of which none can be read, as a fresh run would replace them."""
    if damaged := sorted(folder.glob("checkpoint_epoch_*.pt")):
        raise UserError(f"--resume auto: none of the {counted(len(damaged), 'checkpoint')} in {folder} can be read; "
                        "see to the disk, or start anew with --overwrite or in another --output-dir")


def _best_beside(path: Path, epoch: int) -> dict[str, Any]:
    """The best weights so far, from best_model.pt beside the checkpoint `path` of `epoch`; {} where that file cannot be
    read, or is of a later epoch: then a line says that the best are chosen anew."""
    try:
        state = load(path.with_name("best_model.pt"))
    except CheckpointError as error:
        print(f"The best weights so far are lost, the next validation begins anew: {error}")
        return {}
    if state["epoch"] > epoch:
        print(f"The best weights are chosen anew from here on: those in best_model.pt are of epoch {state['epoch']}")
        return {}
    return {name: state[name] for name in ("stage", "epoch", "loss", "model_state_dict")} | {
        "matching_head": state.get("matching_head", {})}  # earlier releases wrote none


def finished_report(config: Config, state: dict[str, Any] | None) -> Path | None:
    """The report of a run whose epochs are all done, of its last checkpoint; None while there is something to do."""
    if state is None or state["progress"]["epoch"] < sum(stage_epochs(config, state).values()):
        return None
    folder = Path(config.paths.output_dir)
    made = [folder / "reports" / record["file"] for record in read_records(folder / "logs" / "metrics.jsonl")
            if (record["kind"], record["step"]) == ("report", state["progress"]["step"])]
    return next((path for path in reversed(made) if path.is_file()), None)


def begins_with_sigmoid(config: Config, state: Mapping[str, Any] | None,
                        initialised_from: Mapping[str, Any] | None = None) -> bool:
    """Whether the sigmoid loss is new to the weights: in a run from nothing, or after a checkpoint of another loss."""
    before = (initialised_from or {}).get("loss")
    if state is not None:
        before = state["config"].get("training", {}).get("contrastive_loss")
    return config.training.contrastive_loss == "sigmoid" != before


# ---- epochs ------------------------------------------------------------------------------------------------------


def stage_epochs(config: Config, state: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Epochs of each stage: `training.epochs` by `share`, at least one each where there are enough.

    A resumed run keeps what it was given. With another `training.epochs` or `max_hours`, stages that are over keep
    their epochs, the one that the checkpoint is in at least those it has had, and the rest is divided anew.

    Raises:
        UserError: the checkpoint's stages up to its own are not those of the configuration.
    """
    total, shares = config.training.epochs, {row.name: row.share for row in config.stages}
    if state is None:
        least = 1 if total >= len(shares) else 0
        return dict(zip(shares, divide(total, list(shares.values()), [least] * len(shares)), strict=True))
    given: dict[str, int] = state["stage_epochs"]
    if list(given) == list(shares) and (sum(given.values()) == total or _is_limited_as_before(config, state)):
        return given
    names, now = list(shares), list(given).index(state["stage"])
    if names[:now + 1] != list(given)[:now + 1]:
        raise UserError(f"--resume: the checkpoint has trained the stages {', '.join(list(given)[:now + 1])}, but the "
                        f"configuration begins with {', '.join(names[:now + 1])}; resume with the stages it was "
                        "trained with, or start anew in another --output-dir")
    over = list(given.values())[:now]
    progress = state["progress"]
    had = progress["epoch"] + (progress["epoch_step"] > 0) - sum(over)
    left = max(total - sum(over), had)
    rest = divide(left, list(shares.values())[now:], [had, *[0] * (len(names) - now - 1)])
    return dict(zip(names, [*over, *rest], strict=True))


def _is_limited_as_before(config: Config, state: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's stages may have been cut short by the same `training.max_hours`."""
    before, now = state["config"].get("training", {}), config.training
    return now.max_hours is not None and (before.get("max_hours"), before.get("epochs")) == (now.max_hours, now.epochs)


def divide(total: int, shares: Sequence[float], least: Sequence[int]) -> list[int]:
    """`total` by shares, none below its least; what is left over goes by largest remainder, a tie to the later one."""
    wanted = [total * share / sum(shares) for share in shares]
    given = [max(least, int(wish)) for wish, least in zip(wanted, least, strict=True)]
    while sum(given) != total:
        behind = [wish - now for wish, now in zip(wanted, given, strict=True)]
        if sum(given) < total:
            given[max(range(len(given)), key=lambda i: (behind[i], i))] += 1
        else:
            able = [i for i in range(len(given)) if given[i] > least[i]]
            given[min(able, key=lambda i: behind[i])] -= 1
    return given


# ---- differences -------------------------------------------------------------------------------------------------


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """"training.learning_rate: 0.0001 -> 0.0005" for each setting that differs. Paths and the size of the vocabulary,
    which follows from the data, are left out. A setting that there was not yet had its default."""
    usual = {name: value for name, value in _flat(Config().to_dict()) if not name.startswith("stages.")}
    old, new = usual | dict(_flat(before)), dict(_flat(now))
    for of in (old, new):  # of a pretrained tower it is that of the tower, which does not change
        if of.get("model.image.tower", "own") != "own":
            of.pop("model.image_size", None)
        elif of.get("model.image_size") == "auto":
            of["model.image_size"] = OWN_IMAGE_SIDE
    names = [name for name in {**old, **new} if not name.startswith("paths.") and name != "model.vocab_size"]
    return [f"{name}: {_shown(old, name)} -> {_shown(new, name)}" for name in names
            if old.get(name) != new.get(name)]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value), and nothing of an empty section; rows that have a name, as the stages do, go by it."""
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) and "name" in row for row in value):
        value = {row["name"]: {key: item for key, item in row.items() if key != "name"} for row in value}
    if isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(_flat(item, f"{prefix}.{key}" if prefix else str(key))
                                                 for key, item in value.items())
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "not there"
