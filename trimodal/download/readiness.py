"""Whether what is there of a set is enough to train on, by its lists and names of files, and the command to go on with.

The readers would know it better and take gigabytes and minutes for it: here each list is read until enough is found.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trimodal.download.selection import Selection
from trimodal.redaction import command_line
from trimodal.sets import annotations, inventory, voxceleb

ENOUGH = 3  # training samples: two make a contrast, and one may be kept for validation
RECIPES = {"voxceleb": "recipes/speakers.yaml"}  # sets that cannot go through the three default stages alone
_DRAWINGS = (".png", ".svg")
_LISTS = {  # that training opens, whatever the split
    "coco": [f"annotations/{kind}_{part}.json" for kind in ("captions", "instances") for part in
             ("train2017", "val2017")],
    "clotho": [f"clotho_{kind}_{part}.csv" for kind in ("captions", "metadata") for part in
               ("development", "validation", "evaluation")],
    "audiocaps": [f"dataset/{split}.csv" for split in annotations.SPLITS],
}


def next_command(selection: Selection) -> str:
    """The command that trains on the set, alone; where too little is there for it, the one that gets the rest."""
    name = selection.source.name
    if not trainable(name, selection.folder):
        return selection.unlimited().command()
    recipe = ["--config", RECIPES[name]] if name in RECIPES else ["--datasets", name]
    return command_line(["python", "run_training.py", *recipe, "--data-root", str(selection.options.data_root)])


def trainable(name: str, folder: Path) -> bool:
    """Whether every list is there that training opens, and enough of the training samples; of a set whose files are not
    known here training itself will tell."""
    if name not in _SAMPLES:
        return True
    if not all((folder / path).is_file() for path in _LISTS.get(name, ())):
        return False
    return sum(1 for _ in itertools.islice(training_samples(name, folder), ENOUGH)) == ENOUGH


def training_samples(name: str, folder: Path) -> Iterator[str]:
    """What the set `name` in `folder` has to train on, by name, as its reader would find it."""
    return _SAMPLES[name](folder)


def _coco(folder: Path) -> Iterator[str]:
    """By Karpathy's list where it is there, as training does; the pictures of its sides lie in both folders."""
    karpathy = folder / "annotations" / "dataset_coco.json"
    if not karpathy.is_file():
        return annotations.present("coco", folder, "train2017")
    there = {name for part in ("train2017", "val2017") for name in annotations.names_in(folder / part)}
    names = (f"{number:012d}.jpg" for number, side in annotations.karpathy(karpathy) if side in ("train", "restval"))
    return (name for name in names if name in there)


def _voxceleb(folder: Path) -> Iterator[str]:
    first, second = folder / "voxceleb1", folder / "voxceleb2/dev"
    sides = first / "iden_split.txt"
    names = _listed_training(sides) if sides.is_file() else (
        name for _, name in voxceleb.utterances(first / "wav", (".wav",)))
    if (first / "wav").is_dir():
        yield from (name for name in names if name.split("/")[0] not in annotations.VOX1_TEST_SPEAKERS
                    and (first / "wav" / name).is_file())
    yield from (stem for _, stem, _, _ in voxceleb.recordings(second))


def _listed_training(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (name.strip() for side, _, name in (line.partition(" ") for line in file) if side == "1")


def _stamps(folder: Path) -> Iterator[str]:
    """Stamps with a caption; nearly a third of them are kept for validation and test."""
    stems = (os.path.join(root, name[:-4]) for root, names in inventory.walk(folder) for name in names
             if name.endswith(".txt"))
    captioned = (stem for stem in stems if any(os.path.exists(stem + suffix) for suffix in _DRAWINGS))
    return itertools.islice(captioned, ENOUGH, None)


_SAMPLES: dict[str, Callable[[Path], Iterator[str]]] = {
    "coco": _coco, "clotho": lambda folder: annotations.present("clotho", folder, "development"),
    "audiocaps": lambda folder: annotations.present("audiocaps", folder, "train"),
    "voxceleb": _voxceleb, "stamps": _stamps,
}
SETS = _SAMPLES.keys()
