"""Weights that a new run begins with (--init): those of a checkpoint, as far as they fit the model of the run.

    source = read_source("outputs/checkpoints")                             # a file, or the best one of a folder
    taken = take_weights(source, model, tokenizer, concepts, "infonce")     # what was taken, what was left and why
    print(headline(taken), format_table(taken), sep="\n")

A weight is taken where the file has one of its name and shape. Two go by rows: word vectors by the text of their token,
classes by the name of their concept. What reads the features of a part that is left is left, too.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import TriModalModel
from trimodal import checkpoint
from trimodal.arguments import reading
from trimodal.config import MODALITIES
from trimodal.data.tokenizer import Tokenizer
from trimodal.errors import CheckpointError, UserError
from trimodal.files import sha256_of

FILES = ("best_model.pt", "final_model.pt", "model.safetensors")  # of a run, the first that is there
SHOWN = 3  # names of a part that were left for one reason
WORDS, CLASSES = "text.words.weight", ("classifier.weight", "classifier.bias")  # taken by rows
OF_TOWER = ("{}.", "projections.{}.", "fusion.bridges.{}.")  # a tower, and what reads its features alone
CLASSIFIED = "fused_projection.weight"  # makes the features that the classifier reads
TEMPERATURES = "temperatures"  # part of what a checkpoint of any model has: nothing by itself


@dataclass(frozen=True)
class Source:
    """A checkpoint that weights are taken from: what to call it, the digest of the file, and all that it holds."""

    path: Path
    name: str  # the path as it was given; of one from the root or from above, the file's name alone
    sha256: str
    state: Mapping[str, Any]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self.state["model_state_dict"]

    def tower(self, modality: str) -> Mapping[str, Any] | None:
        """The description of its pretrained tower of a modality; None: it is our own."""
        return self.state.get("towers", {}).get(modality)

    def has_tower(self, modality: str) -> bool:
        """Whether the weights of that tower are in the file: checkpoints to resume from may leave out frozen ones."""
        return checkpoint.has_tower(self.state, modality)

    @property
    def loss(self) -> str | None:
        """The contrastive loss that its temperatures are of."""
        return self.state["config"].get("training", {}).get("contrastive_loss")

    @property
    def trained_on(self) -> Tensor:
        """`splits.file_hashes` of all files that it was trained on; of earlier releases, which recorded none, empty."""
        found = self.state.get("trained_on")
        return found if isinstance(found, Tensor) else torch.empty(0, dtype=torch.int64)


# ---- reading -----------------------------------------------------------------------------------------------------


def find_checkpoint(given: str) -> Path:
    """The file that --init names: a checkpoint, or of an output folder or its folder `checkpoints` the best weights,
    else the final ones, else the newest.

    Raises:
        UserError: there is none.
    """
    path = Path(given)
    with reading(f"--init: {path}"):
        if path.is_file():
            return path
        if not path.is_dir():
            raise UserError(f"--init: {path}: no such file or folder; give a checkpoint, or the output folder of a run")
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        files = [folder / name for name in FILES if (folder / name).is_file()]
    found = files[0] if files else checkpoint.find_latest(folder)
    if found is None:
        raise UserError(f"--init: {folder}: holds no checkpoint: {', '.join(FILES)} or checkpoint_epoch_N.pt")
    return found


def read_source(given: str) -> Source:
    """Read the checkpoint that --init names.

    Raises:
        UserError: there is none, it is damaged, or it holds no model of this project.
    """
    path = find_checkpoint(given)
    try:
        state = checkpoint.load_export(path) if path.suffix == ".safetensors" else checkpoint.load(path)
    except CheckpointError as error:
        raise UserError(f"--init: {error}") from None
    weights, settings = state.get("model_state_dict"), state.get("config")
    if not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
            and isinstance(settings, dict) and isinstance(settings.get("model"), dict)
            and isinstance(state.get("tokenizer"), str) and isinstance(state.get("concepts"), list)
            and all(isinstance(name, str) for name in state["concepts"])):
        raise UserError(f"--init: {path}: not a checkpoint of this project (it lacks model_state_dict, config.model, "
                        "tokenizer or concepts)")
    is_below = not path.is_absolute() and ".." not in path.parts
    state.pop("stage_state", None)  # moments, which nobody needs
    return Source(path, path.as_posix() if is_below else path.name, sha256_of(path), state)


# ---- taking ------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """How much of a part of the model was taken, and the names that were left, by reason."""

    parameters: int = 0
    taken: int = 0
    rows: tuple[int, int] | None = None  # words or classes: known to both, of how many of the run
    left: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """The weights of a model and of a file, by name, and what else must agree for one to be taken."""

    own: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    other_towers: Collection[str]  # modalities
    named_towers: Collection[str]  # of which the file holds the digest alone, and it is that of the model's
    is_other_loss: bool  # to which the file's temperatures say nothing

    def why_left(self, name: str) -> str:
        """Why a weight of either is not taken; "" if it is."""
        if any(name.startswith(tuple(part.format(modality) for part in OF_TOWER)) for modality in self.other_towers):
            return "of another tower"
        if self.is_named(name):
            return ""
        if name not in self.given:
            return "not in the file"
        if name not in self.own:
            return "not in the model"
        if self.is_other_loss and part_of(name) == TEMPERATURES:
            return "of another loss"
        by_rows = name == WORDS or name in CLASSES
        if self.given[name].shape[by_rows:] != self.own[name].shape[by_rows:]:
            return "of another shape"
        if name == CLASSES[0] and self.why_left(CLASSIFIED):
            return "of other features"
        weight = re.sub(r"\.bias$", ".weight", name)  # without which a bias is of no use
        return self.why_left(weight) if weight != name and weight in self.own else ""

    def is_named(self, name: str) -> bool:
        """Whether a weight is one that the model has already."""
        return name not in self.given and any(name.startswith(f"{modality}.tower.") for modality in self.named_towers)


def take_weights(source: Source, model: TriModalModel, tokenizer: Tokenizer, concepts: Sequence[str],
                 loss: str) -> dict[str, Any]:
    """Copy into `model` what fits of the weights of `source`.

    Args:
        tokenizer, concepts, loss: of the run; the file holds its own. Temperatures of InfoNCE are not taken for the
            sigmoid loss, which begins with its own.

    Returns:
        As plain data, for checkpoint and report: "name" and "sha256" of the file, "stage", "epoch" and "loss" of its
        weights, "taken" of how many "parameters", and "parts", with the fields of `Part` for each part of the model.

    Raises:
        UserError: nothing fits.
    """
    state, words = source.state, Tokenizer.from_json(source.state["tokenizer"]).tokens
    pairs = {name: (source.tower(name), tower_of(model, name)) for name in MODALITIES}
    others = {name for name, (there, here) in pairs.items() if are_other_towers(there, here, source.has_tower(name))}
    named = {name for name, (there, _) in pairs.items() if there and not source.has_tower(name)} - others
    match = Match(model.state_dict(), source.weights, others, named, loss == "sigmoid" != source.loss)
    own, given, parts = match.own, match.given, dict[str, Part]()
    by_name = {WORDS: (words, tokenizer.tokens), **dict.fromkeys(CLASSES, (state["concepts"], list(concepts)))}
    rows = {name: matching_rows(there, here) for name, (there, here) in by_name.items() if there != here}
    for name in (*own, *(name for name in given if name not in own)):
        part = parts.setdefault(part_of(name), Part())
        part.parameters += own[name].numel() if name in own else 0
        if reason := match.why_left(name):
            part.left.setdefault(reason, []).append(name)
        elif name in rows:
            here, there = rows[name]
            own[name][here] = given[name][there].to(own[name].dtype)
            part.taken += len(here) * own[name][0].numel()
            part.rows = len(here), len(by_name[name][1])
        elif match.is_named(name):
            part.taken += own[name].numel()
        else:
            same = slice(min(len(own[name]), len(given[name]))) if name in by_name else ...  # unused rows may follow
            own[name][same] = given[name][same].to(own[name].dtype)
            part.taken += own[name][same].numel()
    if not any(part.taken for name, part in parts.items() if name != TEMPERATURES):
        raise _nothing_fits(source, model)
    epoch = state.get("epoch", state.get("progress", {}).get("epoch"))
    return {"name": source.name, "sha256": source.sha256, "stage": state.get("stage"), "epoch": epoch,
            "loss": source.loss, "taken": sum(part.taken for part in parts.values()),
            "parameters": sum(part.parameters for part in parts.values()),
            "parts": {name: asdict(part) for name, part in parts.items()}}


def part_of(name: str) -> str:
    """The part of the model that a weight is counted with: a child of the model, or a part of a tower."""
    first, second, *_ = *name.split("."), ""
    if first in ("logit_scale", "logit_bias"):
        return TEMPERATURES
    is_part_of_tower = name == WORDS or (first in MODALITIES and second in ("tower", "bridge", "adapter"))
    return f"{first}.{second}" if is_part_of_tower else first


def matching_rows(there: Sequence[str], here: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers, in `here` and in `there`, of the names that are in both."""
    known = {name: number for number, name in enumerate(there)}
    pairs = [(number, known[name]) for number, name in enumerate(here) if name in known]
    return [number for number, _ in pairs], [number for _, number in pairs]


def tower_of(model: TriModalModel, modality: str) -> Mapping[str, Any] | None:
    """The description of the model's pretrained tower of a modality; None: it is our own."""
    tower = getattr(getattr(model, modality), "tower", None)
    return None if tower is None else tower.description


def are_other_towers(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None, has_weights: bool) -> bool:
    """Whether the weights of one tower, by its description, are of no use in the other: that is of another architecture
    or input, or, where the file does not hold them, has others."""
    if there is None or here is None:
        return there is not here
    free = {"source", "licence"} | ({"digest"} if has_weights else set())
    return any(there.get(key) != here.get(key) for key in {*there, *here} - free)


def _nothing_fits(source: Source, model: TriModalModel) -> UserError:
    size, here = source.state["config"]["model"].get("size"), model.config.size
    advice = f"set model.size={size}" if size != here else "set the model settings that it was trained with"
    return UserError(f"--init: {source.path}: nothing of it fits the model (size {size} there, {here} here); {advice}, "
                     "or leave --init out")


# ---- telling -----------------------------------------------------------------------------------------------------


def headline(taken: Mapping[str, Any]) -> str:
    """"Initialised from NAME (sha256 ..., stage align, epoch 40): 14.6 of 15.1 M parameters"."""
    place = f", stage {taken['stage']}, epoch {taken['epoch']}" if taken["stage"] else ""
    return (f"Initialised from {taken['name']} (sha256 {taken['sha256'][:16]}{place}): {taken['taken']:,} of "
            f"{taken['parameters']:,} parameters")


def format_table(taken: Mapping[str, Any]) -> str:
    """A line for each part: how much of it was taken, and what was left, by reason."""
    rows = [[name, f"{part['taken']:,} of {part['parameters']:,}", "; ".join(_notes(name, part))]
            for name, part in taken["parts"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {name:{widths[0]}}  {count:>{widths[1]}}  {notes}".rstrip() for name, count, notes in rows)


def _notes(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    if part["rows"]:
        (known, of), what = part["rows"], "words" if name == part_of(WORDS) else "classes"
        yield f"{known:,} of {of:,} {what}, those that the file knows by name"
    for reason, names in part["left"].items():
        shown = shortened(name, names)
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        yield f"{reason}: {', '.join(shown[:SHOWN])}{more}"


def shortened(part: str, names: Iterable[str]) -> list[str]:
    """Names of weights without their part's; all of neighbouring blocks as one: "blocks 4 to 11", "embed.weight"."""
    blocks, others = set[int](), list[str]()
    for name in names:
        if found := re.fullmatch(r".*?\bblocks\.(\d+)\..*", name):
            blocks.add(int(found[1]))
        else:
            others.append(name.removeprefix(f"{part}."))
    runs = [[number for _, number in run] for _, run in itertools.groupby(
        enumerate(sorted(blocks)), key=lambda pair: pair[1] - pair[0])]
    return [f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]} to {run[-1]}" for run in runs] + others
