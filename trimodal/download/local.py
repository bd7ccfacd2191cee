"""What the user has already, named by --local: archives and lists to use as if they had just arrived, and unpacked
copies of a set, also as other tools leave them, to link into the layout that the readers expect. Never changed."""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from trimodal.download.http import is_right
from trimodal.download.selection import Selection, as_published
from trimodal.errors import UserError
from trimodal.media import WITH_SOUND
from trimodal.sets import inventory
from trimodal.sets.base import Copies, Count, File, Item
from trimodal.sets.reading import folders_in

MOSTLY_PCT = 75  # of a split's published clips, where nobody said that they are all: those of the mirror are 91 to 94
LIKELY_PCT = 95  # of a folder's published files: with fewer, training would refuse it by default
_DEEPEST = 4  # folders between the given one and those of pictures, recordings or lists
_MANY = re.compile(r"id\d{5}")  # folders of speakers, of which there may be thousands
_WITH_LISTS = {"csv_files_v1": "dataset", "csv_files_v2": "dataset2.0"}  # aac-datasets' folders of lists


class LocalFiles:
    """The files of a data set that the user already has at `path`: a folder, a single file, or None for nothing.

    `by_hand`: `path` is the set's own folder, where the user put sounds without naming it with --local.
    """

    def __init__(self, selection: Selection, path: Path | None, by_hand: bool = False) -> None:
        self.selection, self.source, self.path, self.by_hand = selection, selection.source, path, by_hand
        self.differing: dict[str, Path] = {}  # list -> a file of its name that is another one

    # --- Archives and lists ----------------------------------------------------------------------------------------

    def file(self, item: Item, file: File) -> Path | None:
        """The user's copy of one file of the item. A list that has a published digest must have it."""
        if not self.path:
            return None
        name = PurePosixPath(file.name)
        if self.path.is_file():
            return self.path if self.source.one_of or self.path.name == name.name else None
        paths = self._by_name.get(name.name.lower(), [])
        if item.kind != "plain":
            return next((path for path in paths if path.stat().st_size == file.size), next(iter(paths), None))
        # Lists of several versions are named alike, and told by their folder.
        likely = [path for path in paths if not name.parent.name or name.parent.name == _WITH_LISTS.get(
            path.parent.name.lower(), path.parent.name.lower())]
        if not as_published(file, self.path).digests:
            return next(iter(likely), None)
        right = next((path for path in paths if is_right(as_published(file, path))), None)
        if likely and not right:
            self.differing[file.name] = likely[0]
        return right

    def whole(self, item: Item) -> Path | None:
        """The user's copy of an archive that is published in parts, put together."""
        return next(iter(self._by_name.get(item.name.lower(), [])), None) if item.whole_md5 else None

    def has(self, item: Item) -> bool:
        return bool(self.whole(item)) or all(self.file(item, file) for file in item.files)

    def alternative(self) -> Item:
        """Which of the alternatives the single file is.

        Raises:
            UserError: it is none of them.
        """
        for item in self.source.items:
            if self.path and is_right(as_published(item.files[0], self.path)):
                return item
        known = ", ".join(f"{item.name} (sha256 {item.files[0].sha256})" for item in self.source.items)
        raise UserError(f"{self.path}: is another release than those that were verified, or damaged; known: {known}")

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """Name in lower case -> files of this name, whatever the case, the least deep first."""
        if not self.path or self.path.is_file():
            return {self.path.name.lower(): [self.path]} if self.path else {}
        names = {PurePosixPath(file.name).name.lower() for item in self.source.items for file in item.files}
        names |= {item.name.lower() for item in self.source.items if item.whole_md5}
        found: dict[str, list[Path]] = {}
        for folder in sorted(_below(self.path, _DEEPEST, []), key=lambda folder: len(folder.parts)):
            for name in sorted(os.listdir(folder)):
                if name.lower() in names and (folder / name).is_file():
                    found.setdefault(name.lower(), []).append(folder / name)
        return found

    # --- Unpacked copies -------------------------------------------------------------------------------------------

    def copies(self) -> Copies:
        """What can be linked into the set's folder; nothing is changed."""
        if not self.path or not self.path.is_dir():
            return Copies()
        local, lists = Path(os.path.abspath(self.path)), self._lists()  # links that the user made inside are kept
        if self.source.clips and not lists and inventory.has(local, WITH_SOUND):
            return Copies(left_out=(
                f"sounds in {self.path}: the lists of captions tell which clips they are; a download fetches those "
                "first, and counts the clips that are here then",))
        if not self.source.find_copies:
            return Copies() if self.source.one_of else _find_folders(self.selection.items, local)
        found = self.source.find_copies(local, lists)
        return self._without_sparse_splits(found) if self.by_hand else found

    def _lists(self) -> list[tuple[str, Path]]:
        """(split, path) of the lists that name clips: those in the set's folder, else the user's; earlier versions
        first."""
        if not self.source.clips:
            return []
        folder = self.selection.folder
        plain = [item for item in self.source.items if item.kind == "plain"]
        paths = [folder / item.into if (folder / item.into).is_file() else self.file(item, item.files[0])
                 for item in plain]
        return [(PurePosixPath(item.into).stem, path) for item, path in zip(plain, paths, strict=True) if path]

    def _without_sparse_splits(self, copies: Copies) -> Copies:
        """`copies` less the splits of which fewer than MOSTLY_PCT per cent of the published clips are there.

        For clips that lie in the set's folder though --local did not name them. Each split that is dropped and has some
        clips adds a sentence to `left_out`, which says how to use these clips all the same. Links into a folder that is
        itself a link of the user's are dropped as well: training reads the sounds in it directly.
        """
        published = {count.folder: count.number for count in self.source.partly}
        numbers = {split: copies.numbers.get(split, 0) for split in published}
        few = [split for split, number in numbers.items() if 100 * number < MOSTLY_PCT * published[split]]
        left_out = [f"{numbers[split]:,} of the {published[split]:,} clips of {split}: fewer than {MOSTLY_PCT} %, so "
                    f"the published sounds are fetched; to use these alone: --local {self.path}"
                    for split in few if numbers[split]]
        links = [(path, place) for path, place in copies.links if place.partition("/")[0] not in few
                 and not (self.selection.folder / place).parent.is_symlink()]
        return Copies(links=tuple(links), left_out=(*copies.left_out, *left_out),
                      numbers={split: number for split, number in numbers.items() if split not in few})


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


# --- Folders of pictures and of recordings ---------------------------------------------------------------------------


def _find_folders(items: Iterable[Item], local: Path) -> Copies:
    """The unpacked folders of these archives below `local`, whatever case their names are in; of folders that hold
    lists the single files, so that more lists may come beside them. The number of files by place."""
    left_out: list[str] = []
    below = [*_below(local, _DEEPEST, left_out)]
    links: list[tuple[Path, str]] = []
    numbers: dict[str, int] = {}
    for item in items:
        if item.needed:
            files = _lists_of(item, below)
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


def _lists_of(item: Item, below: Iterable[Path]) -> list[tuple[Path, str]]:
    """All that the first folder has of the item which has what is needed of it."""
    needed = {Path(place).name for place in item.needed}
    suffixes = tuple(count.suffix for count in item.counts)
    for folder in below:
        sizes = {name: size for name, size in _sizes(folder).items() if name in needed or name.endswith(suffixes)}
        if needed <= sizes.keys() and 2 * sum(sizes.values()) >= item.unpacked:
            parent = Path(item.needed[0]).parent
            return [(folder / name, (parent / name).as_posix()) for name in sorted(sizes)]
    return []


def _fullest(count: Count, item: Item, below: Iterable[Path]) -> tuple[Path | None, int, str]:
    """(folder that holds most of these files, how many, why it is not linked or "")."""
    named = Path(count.folder).name.lower()
    best: list[int] = []
    path = None
    for folder in below:
        if folder.name.lower() == named:
            sizes = [size for name, size in _sizes(folder).items() if name.endswith(count.suffix)]
            if len(sizes) > len(best):
                best, path = sizes, folder
    number, size = len(best), sum(best)
    if 100 * number < LIKELY_PCT * count.number:
        return path, number, f"holds {number:,} of the {count.number:,} {count.suffix} files: not linked"
    if 2 * size < item.unpacked:
        return path, number, (f"its {count.suffix} files have {size / 1e9:,.2f} GB in all, not about "
                              f"{item.unpacked / 1e9:,.2f} GB: another edition, not linked")
    return path, number, ""


def _sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files with bytes in them."""
    sizes = {name: inventory.size_of(folder / name) for name in os.listdir(folder) if not inventory.is_hidden(name)}
    return {name: size for name, size in sizes.items() if size}
