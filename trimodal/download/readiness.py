"""Whether what is there of a set is enough to train on, by its lists and names of files, and the command to go on with.

The readers would know it better and take gigabytes and minutes for it: here each list is read until enough is found.
"""

import itertools
import shlex
from pathlib import Path

from trimodal.download.selection import Selection
from trimodal.sets.base import Source
from trimodal.sets.lists import training_files

ENOUGH = 3  # training samples: two make a contrast, and one may be kept for validation


def next_command(selection: Selection) -> str:
    """The command that trains on the set, alone; where too little is there for it, the one that gets the rest."""
    source = selection.source
    if not trainable(source, selection.folder):
        return selection.unlimited().command()
    recipe = ["--config", source.recipe] if source.recipe else ["--datasets", source.name]
    return shlex.join(["python", "run_training.py", *recipe, "--data-root", str(selection.options.data_root)])


def trainable(source: Source, folder: Path) -> bool:
    """Whether every list is there that training opens, and enough of the training samples."""
    if not all((folder / path).is_file() for path in source.required):
        return False
    files = training_files(source, folder)
    return files is None or sum(1 for _ in itertools.islice(files, ENOUGH)) == ENOUGH
