"""The files that a data set's own lists name, compared with those on the disk: by name, not only by number."""

import contextlib
import csv
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trimodal.data.samples import SPLITS
from trimodal.errors import UserError, counted
from trimodal.media import WITH_SOUND
from trimodal.sets.base import Source
from trimodal.sets.reading import names_in

SHOWN = 10  # absent files that are named


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many of the files that a list names are on the disk, and the names of some that are not."""

    place: str  # folder of the files, below the data set's
    source: str  # path of the list, below the data set's folder
    found: int
    listed: int
    absent: tuple[str, ...]  # at most SHOWN names


def coverage(source: Source, folder: Path, splits: Collection[str] = SPLITS) -> Iterator[Coverage]:
    """Compare each list of a data set with the folder of its files, where both are on the disk. `folder`: the set's."""
    for one in source.lists(splits) if source.lists else ():
        if (folder / one.path).is_file() and (folder / one.place).is_dir():
            is_there = looker(folder / one.place)
            listed, absent = 0, []
            for name in _readable(one.names(folder / one.path)):
                listed += 1
                absent += [] if is_there(name) else [name]
            yield Coverage(place=one.place, source=one.path, found=listed - len(absent), listed=listed,
                           absent=tuple(absent[:SHOWN]))


def training_files(source: Source, folder: Path) -> Iterable[str] | None:
    """Names of the training files that are on the disk, found lazily one by one; None for a data set without lists,
    where only its reader can find them."""
    if source.training_files:
        return _readable(source.training_files(folder))
    for one in source.lists(("train",)) if source.lists else ():
        return filter(looker(folder / one.place), _readable(one.names(folder / one.path)))
    return None


def _readable(names: Iterable[str]) -> Iterator[str]:
    """`names` up to the first UserError, which is dropped here: training raises it again when it reads the list."""
    with contextlib.suppress(UserError):
        yield from names


def looker(folder: Path) -> Callable[[str], bool]:
    """A function that says whether a file of some name is below `folder`; a name without suffix means a sound file of
    any type. It remembers the folders that it has listed.

    Names are compared in Unicode's composed form (NFC), as a Mac may have unpacked the files in the decomposed one.
    """
    look = lru_cache(maxsize=64)(lambda parent: frozenset(map(_composed, names_in(folder / parent))))

    def is_there(name: str) -> bool:
        parent, _, last = _composed(name).rpartition("/")
        there = look(parent)
        return last in there or (not os.path.splitext(last)[1] and any(last + end in there for end in WITH_SOUND))

    return is_there


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def row_count_note(path: Path, published: int) -> str:
    """A note for the log where a list has another number of rows than its publisher states, else "".

    Rows of a CSV file are counted without its header, of other files all lines. `published` 0: not known, no note.
    """
    if not published:
        return ""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            rows = sum(1 for _ in csv.reader(file)) - 1 if path.suffix == ".csv" else sum(1 for _ in file)
        except csv.Error:
            rows = 0
    return f"has {counted(rows, 'row')}, published with {published:,}" if rows != published else ""
