"""The files that a set's own lists name, compared with those on the disk: name by name, not only by their number."""

import contextlib
import csv
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trimodal.data.samples import SPLITS
from trimodal.errors import UserError
from trimodal.media import WITH_SOUND
from trimodal.sets.base import Source
from trimodal.sets.reading import names_in

SHOWN = 10  # absent files that are named


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many of the files that `source` names are there, and the names of some that are not."""

    place: str
    source: str
    found: int
    listed: int
    absent: tuple[str, ...]


def coverage(source: Source, folder: Path, splits: Collection[str] = SPLITS) -> Iterator[Coverage]:
    """For each list of a set that is on the disk, beside a folder that it is of."""
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
    """What is there to train on, by name, as the reader would find it; no more is read than is asked. None of a set
    that has no list: training itself will tell."""
    if source.training_files:
        return _readable(source.training_files(folder))
    for one in source.lists(("train",)) if source.lists else ():
        return filter(looker(folder / one.place), _readable(one.names(folder / one.path)))
    return None


def _readable(names: Iterable[str]) -> Iterator[str]:
    """The names of a list as far as it can be read; what is wrong with it training will tell."""
    with contextlib.suppress(UserError):
        yield from names


def looker(folder: Path) -> Callable[[str], bool]:
    """A function that tells whether a name is there below `folder`, without suffix for one of any kind of sound.

    Names compare in one Unicode form: a Mac may have unpacked the files under the other one.
    """
    look = lru_cache(maxsize=64)(lambda parent: frozenset(map(_composed, names_in(folder / parent))))

    def is_there(name: str) -> bool:
        parent, _, last = _composed(name).rpartition("/")
        there = look(parent)
        return last in there or (not os.path.splitext(last)[1] and any(last + end in there for end in WITH_SOUND))

    return is_there


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def other_rows(path: Path, published: int) -> str:
    """A note where a list has another number of rows than is published (0: not known), else ""."""
    if not published:
        return ""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            rows = sum(1 for _ in csv.reader(file)) - 1 if path.suffix == ".csv" else sum(1 for _ in file)
        except csv.Error:
            rows = 0
    return f"has {rows:,} rows, {published:,} are published" if rows != published else ""
