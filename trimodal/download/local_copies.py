"""Copies of a data set that the user has already: found, linked into the layout that the readers expect, never changed.

`--local FOLDER` names the copy. Archives in it are used by download_datasets as if they had just arrived.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from trimodal.media import WITH_SOUND
from trimodal.sets import inventory
from trimodal.sets.base import Copies, Count, Item, Source
from trimodal.sets.reading import folders_in

MOSTLY_PCT = 75  # of a split's published clips, where nobody said that they are all: those of the mirror are 91 to 94
LIKELY_PCT = 95  # of a folder's published files: with fewer, training would refuse it by default
_DEEPEST = 4  # folders between the given one and those of pictures, recordings or lists
_MANY = re.compile(r"id\d{5}")  # folders of speakers, of which there may be thousands
_WITH_LISTS = {"csv_files_v1": "dataset", "csv_files_v2": "dataset2.0"}  # aac-datasets' folders of lists


def find(source: Source, items: Iterable[Item], local: Path, lists: Sequence[tuple[str, Path]] = ()) -> Copies:
    """What of the set lies below `local`; nothing is changed. `lists`: (split, path) of the
    set's own, in the order of their versions."""
    local = Path(os.path.abspath(local))  # links that the user made inside are kept as they are
    if source.find_copies:
        return source.find_copies(local, lists)
    return Copies() if source.one_of else find_folders(items, local)


def link(copies: Copies, folder: Path, earlier: Collection[Path] = ()) -> list[str]:
    """Link what was found into the set's `folder`. A link into an `earlier` folder, which such a call made, is
    replaced; what else is in the way is the user's and stays: the places of these are returned."""
    return [place for source, place in copies.links if not _link(source, folder / place, earlier)]


def _link(source: Path, place: Path, earlier: Collection[Path]) -> bool:
    """Make `place` a link to `source`; whether it leads there now."""
    leads_there = place.exists() and place.samefile(source)
    if place.is_symlink() and not leads_there:
        target = Path(os.path.normpath(place.parent / place.readlink()))
        if not any(target.is_relative_to(folder) for folder in earlier):
            return False
        place.unlink()
    elif os.path.lexists(place):
        return leads_there
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(source, target_is_directory=source.is_dir())
    return True


# --- Sounds that somebody put there ----------------------------------------------------------------------------------


def has_sounds(folder: Path) -> bool:
    """Whether a sound or video lies in the folder, or in one below it."""
    return any(name.lower().endswith(WITH_SOUND) for _, names in inventory.walk(folder) for name in names)


def mostly(copies: Copies, published: Iterable[Count], local: Path | None) -> Copies:
    """Of clips that nobody named: the splits of which MOSTLY_PCT are there. Of others it tells how to take them."""
    numbers = {count.folder: copies.numbers.get(count.folder, 0) for count in published}
    wanted = {count.folder: count.number for count in published}
    few = [split for split, number in numbers.items() if 100 * number < MOSTLY_PCT * wanted[split]]
    left_out = [f"{numbers[split]:,} of the {wanted[split]:,} clips of {split}: fewer than {MOSTLY_PCT} %, so the "
                f"published sounds are fetched; to use these alone: --local {local}"
                for split in few if numbers[split]]
    return Copies(links=tuple(link for link in copies.links if link[1].partition("/")[0] not in few),
                  numbers={split: number for split, number in numbers.items() if split not in few},
                  left_out=(*copies.left_out, *left_out))


# --- Folders of pictures and of recordings ---------------------------------------------------------------------------


def find_folders(items: Iterable[Item], local: Path) -> Copies:
    """The unpacked folders of these archives below `local`, whatever case their names are in; of folders that hold
    lists the single files, so that more lists may come beside them. The number of files by place."""
    left_out: list[str] = []
    below = [*_below(local, _DEEPEST, left_out)]
    links: list[tuple[Path, str]] = []
    numbers: dict[str, int] = {}
    for item in items:
        if item.needed:
            files = _lists(item, below)
            links += files
            numbers |= {place: 1 for _, place in files}
        for count in item.counts if item.kind != "plain" and not item.needed else ():
            found, number, why = _fullest(count, item, below)
            if found and not why:
                links.append((found, count.folder))
                numbers[count.folder] = number
            elif found:
                left_out.append(f"{found}: {why}")
    return Copies(links=tuple(links), numbers=numbers, left_out=tuple(left_out))


def _below(folder: Path, depth: int, unread: list[str]) -> Iterator[Path]:
    """The folder and those below it that can be read, those of single speakers left out."""
    problems = len(unread)
    entries = folders_in(folder, None if depth == _DEEPEST else unread)
    if len(unread) == problems:
        yield folder
    for entry in entries if depth else ():
        if not _MANY.fullmatch(entry.name):
            yield from _below(entry, depth - 1, unread)


def _lists(item: Item, below: Iterable[Path]) -> list[tuple[Path, str]]:
    """All that the first folder has of the item which has what is needed of it."""
    for folder in below:
        if all(inventory.size_of(folder / Path(place).name) for place in item.needed):
            names = {Path(place).name for place in item.needed} | {
                name for name in os.listdir(folder) if not inventory.is_hidden(name)
                for count in item.counts if name.endswith(count.suffix)}
            if 2 * sum(inventory.size_of(folder / name) for name in names) >= item.unpacked:
                parent = Path(item.needed[0]).parent
                return [(folder / name, (parent / name).as_posix()) for name in sorted(names)]
    return []


def _fullest(count: Count, item: Item, below: Iterable[Path]) -> tuple[Path | None, int, str]:
    """(folder that holds most of these files, how many, why it is not linked or "")."""
    named = Path(count.folder).name.lower()
    best: tuple[int, int, Path | None] = (0, 0, None)
    for folder in below:
        if folder.name.lower() == named:
            sizes = [size for name in os.listdir(folder) if name.endswith(count.suffix) and not
                     inventory.is_hidden(name) and (size := inventory.size_of(folder / name))]
            best = max(best, (len(sizes), sum(sizes), folder), key=lambda found: found[0])
    number, size, path = best
    if 100 * number < LIKELY_PCT * count.number:
        return path, number, f"holds {number:,} of the {count.number:,} {count.suffix} files: not linked"
    if 2 * size < item.unpacked:
        return path, number, (f"its {count.suffix} files have {size / 1e9:,.2f} GB in all, not about "
                              f"{item.unpacked / 1e9:,.2f} GB: another edition, not linked")
    return path, number, ""


# --- Lists and archives ----------------------------------------------------------------------------------------------


def files_named(local: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """Name in lower case -> the files below `local` that have it, whatever the case; the least deep first."""
    wanted = {name.lower() for name in names}
    found: dict[str, list[Path]] = {}
    for folder in sorted(_below(local, _DEEPEST, []), key=lambda folder: len(folder.parts)):
        for name in sorted(os.listdir(folder)):
            if name.lower() in wanted and (folder / name).is_file():
                found.setdefault(name.lower(), []).append(folder / name)
    return found


def holds_lists_of(path: Path, version: str) -> bool:
    """Whether the folder of a list is named as the folder `version`, by us or by aac-datasets."""
    return _WITH_LISTS.get(path.parent.name.lower(), path.parent.name.lower()) == version
