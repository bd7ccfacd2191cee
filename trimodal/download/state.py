"""What is on the disk of a data set, and what is missing.

The marker, .downloaded.json, holds the digest and counts of every item. The list of contents of an archive (name, bytes
and CRC-32 of each file) is written before its files are renamed into place: an interruption between the two leaves a
list with files missing, and an item counts as there only when nothing of its list is missing.
"""

import gzip
import hashlib
import itertools
import json
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from trimodal.data.samples import SPLITS
from trimodal.download.http import Wanted, is_right
from trimodal.download.selection import Selection, as_published
from trimodal.errors import UserError
from trimodal.files import back_up, replace_with_backup, replacing, sha256_of
from trimodal.media import WITH_SOUND
from trimodal.sets import inventory, lists
from trimodal.sets.base import Count, Item, Source

CONTENTS, LICENCE = ".contents", "LICENCE.txt"
ENOUGH = 3  # training samples: two make a contrast, and one may be kept for validation


class Row(NamedTuple):
    """Files of one kind that are there, and how many there should be."""

    name: str
    found: int
    expected: int


@dataclass
class State:
    """The files of `selection` on the disk. `marker` is that of the set's folder; who changes it writes it."""

    selection: Selection
    marker: dict[str, Any] = field(default_factory=dict)
    offered: Mapping[str, int] = field(default_factory=dict)  # what a download would link, as after `look`
    adoptable: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # item -> files that it would take over

    def __post_init__(self) -> None:
        self.folder = self.selection.folder
        if not self.marker:
            self.reread()

    def reread(self) -> None:
        self.marker = inventory.read_marker(self.folder)

    def save(self) -> None:
        write_marker(self.folder, self.marker)

    @property
    def records(self) -> dict[str, Any]:
        """The record of each item that is there, by name."""
        return self.marker.setdefault("items", {})

    # --- What is there -------------------------------------------------------------------------------------------

    def todo(self, *, sizes: bool = True) -> list[Item]:
        """Items that are not there. Of alternatives: none as soon as one is there."""
        absent = [item for item in self.selection.items if not self.present(item, sizes)]
        return [] if self.selection.source.one_of and len(absent) < len(self.selection.items) else absent

    def present(self, item: Item, sizes: bool = True) -> bool:
        """Whether all of an item is there; without `sizes` names alone are looked at."""
        if self.linked(item) or self.kept(item) or item.name in self.adoptable:
            return True
        record, sample = self.records.get(item.name), self.selection.options.sample
        if record and record.get("damaged"):  # found by --verify
            return False
        if sample and item.kind == "parquet" and inventory.count(self.folder / item.into, "") >= sample:
            return True  # other shards, or this one, brought enough
        if item.kind == "plain":
            came = self.as_it_came(item)
            return bool(record) and (is_right(came) if sizes else came.size == inventory.size_of(came.path))
        contents = contents_path(self.folder, item.name)
        if next(missing(self.folder / item.into, contents, sizes=sizes), None) is not None:
            return False
        if not record:  # stopped between the last rename and the marker
            record = self.records[item.name] = read_record(contents)
        return record.get("sample", 0) in (0, sample)  # a part is no whole

    def linked(self, item: Item, places: Mapping[str, int] | None = None) -> bool:
        """Whether the marker, or `places`, has links to what the user has of the item."""
        linked = self.marker.get("linked", {}) if places is None else places
        if item.kind == "parquet":
            return item.into in linked
        return (any(place in linked for count in item.counts for place, _ in count.places)
                or (bool(item.needed) and all(place in linked for place in item.needed)))

    def kept(self, item: Item) -> bool:
        """Whether a list is the user's and left as it is: there, another than the one that this command fetches, and
        in a folder behind a link of the user's, or --skip-existing is given."""
        if item.kind != "plain" or not (self.selection.options.skip_existing or _is_behind_link(
                (self.folder / item.into).parent, self.folder)):
            return False
        return self.differs(item)

    def differs(self, item: Item) -> bool:
        """Whether there is a file with bytes in it where a list belongs, which neither came by this command nor is the
        published one."""
        came = self.as_it_came(item)
        return inventory.size_of(came.path) > 0 and not is_right(came) and not self.is_published(item)

    def is_published(self, item: Item) -> bool:
        """Whether a list is there and has the digest that is published of it."""
        return is_right(as_published(item.files[0], self.folder / item.into))

    def as_it_came(self, item: Item) -> Wanted:
        """A list with the size and digest that it had when it came, or where it did not, with the published ones."""
        path, record = self.folder / item.into, self.records.get(item.name) or {}
        if not record.get("sha256"):
            return as_published(item.files[0], path)
        return Wanted(path=path, size=record["bytes"], digests=(f"sha256:{record['sha256'][0]}",))

    def extent(self, item: Item) -> tuple[int, int]:
        """(number of files, bytes) on the disk of an item that is there. Where the user's sounds are linked in place of
        shards, the first shard of a folder counts all of them and the others none."""
        if not self.linked(item) and item.name not in self.adoptable:
            record = self.records.get(item.name) or {}
            return record.get("files", 0), record.get("bytes", 0)
        files = self.adoptable.get(item.name) or []
        if not files and item.kind != "parquet":
            files = self._with_needed(item, [file for count in item.counts for file in self._largest(count)])
        elif not files and next(other for other in self.selection.items if other.into == item.into) is item:
            files = [*inventory.tree(self.folder / item.into)]
        return len(files), sum(size for _, size in files)

    def further_links(self) -> list[str]:
        """Folders that are linked, or hold links, of what was not asked for."""
        known = {place for item in self.selection.items for count in item.counts for place, _ in count.places}
        known |= {place for item in self.selection.items for place in (item.into, *item.needed)}
        return [place for place in self.marker.get("linked", {}) if place not in known
                and (self.folder / place).is_dir()]

    # --- What somebody else put there ------------------------------------------------------------------------------

    def look(self, offered: Mapping[str, int]) -> None:
        """Count as there what a download would link (`offered`) or take over, without doing so."""
        self.offered = offered
        for item in self.selection.items:
            if not self.present(item) and (files := self._complete_files(item)):
                self.adoptable[item.name] = files

    def adopt(self, item: Item) -> int:
        """Take over what somebody else unpacked: as many files as published, none empty, of a likely size in all.
        Returns the number of files, 0 where it does not look like that."""
        files = self._complete_files(item)
        if files:
            entries = ((Path(place).relative_to(item.into).as_posix(), size, None) for place, size in files)
            self.records[item.name] = write_contents(self.folder, item.name, entries,
                                                     {"sha256": [], "checked": [], "adopted": True})
        return len(files)

    def _complete_files(self, item: Item) -> list[tuple[str, int]]:
        """(path below the set's folder, bytes) of the files of an archive that the user unpacked; empty unless they are
        complete by their number and likely so by their size."""
        record = self.records.get(item.name, {})
        known = bool(item.needed) or (bool(item.counts) and all(count.number for count in item.counts))
        came = contents_path(self.folder, item.name).is_file() and not record.get("adopted")  # unpacked in part
        if self.selection.source.one_of or not known or record.get("damaged") or came:
            return []
        by_count = [(count, self._largest(count)) for count in item.counts]
        if not item.needed and any(len(files) < count.number for count, files in by_count):
            return []
        files = self._with_needed(item, [file for _, files in by_count for file in files])
        sizes = [size for _, size in files]
        return files if all(sizes) and 2 * sum(sizes) >= item.unpacked else []

    def _largest(self, count: Count) -> list[tuple[str, int]]:
        """(path below the set's folder, bytes) of the files that `count` describes; where it allows several folders or
        suffixes, of the one with most files."""
        forms = ([(f"{folder}/{name}", size) for name, size in inventory.tree(self.folder / folder, suffix)
                  if count.holds is None or count.holds(name)] for folder, suffix in count.places)
        return max(forms, key=len)

    def _with_needed(self, item: Item, files: list[tuple[str, int]]) -> list[tuple[str, int]]:
        listed = {place for place, _ in files}
        return files + [(place, inventory.size_of(self.folder / place)) for place in item.needed if place not in listed]

    def has_sounds_by_hand(self, ledger: str) -> bool:
        """Whether sounds lie in the set's folder that did not come by this command: no shard ever did, no `ledger` of
        clips is there, and nothing is linked."""
        shards = [item.name for item in self.selection.source.items if item.kind == "parquet"]
        if not shards or self.marker.get("linked") or (self.folder / ledger).exists() or any(
                name in self.records or contents_path(self.folder, name).exists() for name in shards):
            return False
        return inventory.has(self.folder, WITH_SOUND)

    # --- Links of the user's ---------------------------------------------------------------------------------------

    def check_places(self, item: Item) -> None:
        """Raise UserError where an archive would be unpacked into a folder that is a link of the user's."""
        for folder in [] if item.kind == "plain" else [item.into, *(count.folder for count in item.counts)]:
            if _is_behind_link(self.folder / folder, self.folder):
                raise UserError(f"{self.folder / folder}: is a link to a folder of yours, which lacks files of "
                                f"{item.name}, and nothing is unpacked into it; rename the link, or add the files")

    def check_nothing_lacks(self, why: OSError) -> None:
        """Raise UserError where something is not there, by `look` and the lists, of a folder that cannot be written."""
        absent = [item.name for item in self.todo() if not (
            self.is_published(item) if item.kind == "plain" else self.linked(item, self.offered))]
        if absent:
            names = ", ".join(absent[:3]) + (" and more" if absent[3:] else "")
            raise UserError(f"{self.folder}: cannot be written ({why.strerror or why}), and {names} must come; to use "
                            f"what is there rename it, or the link, and give --local {self.folder.resolve()}")

    def check_links(self) -> None:
        """Raise UserError where links to what the user has lead nowhere now: else that would be fetched."""
        lost = self._lost_links()
        if lost:
            more = f", and so are {len(lost) - 1:,} more" if lost[1:] else ""
            raise UserError(f"{lost[0]}: is a link to {lost[0].readlink()}, which is not there{more}; mount that disk, "
                            "name its place now (--local FOLDER), or remove the links to fetch the set")

    def begin(self) -> None:
        """Make the marker that of a download which is under way."""
        before, source = self.marker, self.selection.source
        self.marker = {
            "set": source.name, "title": source.title, "licence": source.licence, "complete": False,
            "items": before.get("items", {}), "licence_sha256": before.get("licence_sha256", ""),
            "linked_from": before.get("linked_from")  # earlier releases made links without noting where they lead
            or sorted({str(path.readlink().parent) for path in self._lost_links()}),
            "linked": {place: number for place, number in before.get("linked", {}).items()
                       if (self.folder / place).exists() or not number}}

    def note_origin(self, local: Path) -> list[Path]:
        """Write down, before its first link is made, that --local names `local`; returns the folders that it named
        before: links into them are ours."""
        earlier = list(self.marker["linked_from"])
        self.marker["linked_from"] = [*dict.fromkeys([*earlier, os.path.realpath(local), os.path.abspath(local)])]
        self.save()
        return [Path(folder) for folder in earlier]

    def _lost_links(self) -> list[Path]:
        places = [self.folder / place for place in self.marker.get("linked", {})]
        inside = (path for place in places if place.is_dir() and not place.is_symlink() for path in place.iterdir())
        return [path for path in itertools.chain(places, inside) if path.is_symlink() and not path.exists()]

    # --- What it comes to ------------------------------------------------------------------------------------------

    def write_licence(self) -> bool:
        """Write LICENCE.txt, and its digest into the marker; false where one is there that is not ours, which stays."""
        path, source = self.folder / LICENCE, self.selection.source
        text = f"{source.title}\n{source.page}\n\n{source.licence}\n{source.note}\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        there = sha256_of(path) if path.exists() else ""
        if path.is_symlink() or there not in ("", digest, self.marker.get("licence_sha256")):
            return False
        if there != digest:
            with replacing(path, "w") as file:
                file.write(text)
        self.marker["licence_sha256"] = digest
        return True

    def coverage(self) -> list[lists.Coverage]:
        """Files that the lists name; only those asked for, and not of samples, which fall short on purpose."""
        selection = self.selection
        if not selection.source.partly and (selection.left_out or selection.options.sample):
            return []
        return list(lists.coverage(selection.source, self.folder, selection.options.splits or SPLITS))

    def rows(self, covered: list[lists.Coverage]) -> list[Row]:
        """How many files are there: of the items, of folders that are linked beside them, and that the lists name."""
        further = {place: inventory.count(self.folder / place, "") for place in self.further_links()}
        return [*self._rows_of_items(), *(Row(place, number, number) for place, number in further.items()),
                *self._rows_of_lists(covered), *self.made()]

    def made(self) -> list[Row]:
        """Rows of the table for files that are made from the downloaded items, such as unpacked stamps: how many there
        are, and how many there should be."""
        return [Row(f"{count.folder} {count.suffix}", inventory.count(self.folder / count.folder, count.suffix),
                    count.number) for count in self.selection.source.made]

    def _rows_of_items(self) -> Iterator[Row]:
        expected: dict[tuple[tuple[str, str], ...], int] = {}
        for item in self.selection.items:
            there, linked = item.name in self.records, self.linked(item)
            # Of what the user has, no more need be there than training needs.
            only_needed = item.needed and (linked or self.records.get(item.name, {}).get("adopted"))
            for count in item.counts if (there or linked) and not only_needed else ():
                if count.number:  # two archives may share a folder
                    expected[count.places] = expected.get(count.places, 0) + count.number
        for places, number in expected.items():
            found = {place: inventory.count(self.folder / place[0], place[1]) for place in places}
            folder, suffix = next((place for place in places if found[place]), places[0])
            yield Row(f"{folder.rstrip('.')} {suffix}".strip(), sum(found.values()), number)

    def _rows_of_lists(self, covered: list[lists.Coverage]) -> Iterator[Row]:
        """One row for each list that names missing files, and one for each split of a set that is hardly ever complete.

        Such are clips from YouTube, many of which are gone (`Source.partly`): every split gets a row that says how many
        are here. The row comes from the first of the lists in `covered` that name files of the split's folder,
        and a later version of the list gets a row "further ..." where files that it names are missing; without a list
        the row compares the files in the folder with the published number. `covered`: see `coverage`.
        """
        splits = self.selection.options.splits or SPLITS
        partly = {count.folder: count.number for count in self.selection.source.partly if count.folder in splits}
        first = {one.place: one for one in reversed(covered) if one.place in partly}
        for one in covered:
            if first.get(one.place) is one:
                yield Row(one.place, one.found, one.listed)
            elif one.absent:
                further = "further " if one.place in first else ""
                yield Row(f"{further}{one.place} named in {one.source}", one.found, one.listed)
        for place, number in partly.items():
            if place not in {one.place for one in covered}:
                yield Row(place, inventory.count(self.folder / place, ""), number)

    def next_command(self) -> str:
        """The command that trains on the set, alone; where too little is there for it, the one that gets the rest."""
        source, options = self.selection.source, self.selection.options
        if not trainable(source, self.folder):
            return self.selection.unlimited().command()
        recipe = ["--config", source.recipe] if source.recipe else ["--datasets", source.name]
        return shlex.join(["python", "run_training.py", *recipe, "--data-root", str(options.data_root)])


def trainable(source: Source, folder: Path) -> bool:
    """Whether every list is there that training opens, and enough of the training samples. The readers would know it
    better and take minutes: here a list is read until enough is found."""
    if not all((folder / path).is_file() for path in source.required):
        return False
    files = lists.training_files(source, folder)
    return files is None or sum(1 for _ in itertools.islice(files, ENOUGH)) == ENOUGH


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write the marker, whole or not at all; a file of its name that is none is kept under another one."""
    path = folder / inventory.MARKER
    if os.path.lexists(path) and not inventory.read_marker(folder):
        back_up(path)
    with replacing(path, "w") as file:
        file.write(json.dumps(marker, indent=1, ensure_ascii=False) + "\n")


def _is_behind_link(place: Path, folder: Path) -> bool:
    """Whether `place`, or a folder between it and `folder`, is a link."""
    return place != folder and (place.is_symlink() or _is_behind_link(place.parent, folder))


# --- Lists of contents -----------------------------------------------------------------------------------------------


def contents_path(folder: Path, item: str) -> Path:
    return folder / CONTENTS / f"{item.replace('/', '_')}.jsonl.gz"


def write_contents(folder: Path, item: str, entries: Iterable[tuple[str, int, int | None]],
                   record: dict[str, Any]) -> dict[str, Any]:
    """Write (name below the item's folder, bytes, CRC-32 or None) of its files, whole or not at all, and at the end the
    record for the marker, which is returned with the number of files and bytes."""
    path = contents_path(folder, item)
    path.parent.mkdir(exist_ok=True)
    files = size = 0

    def rename(new: Path, place: Path) -> None:
        replace_with_backup(new, place, may_overwrite=lambda: bool(read_record(place)))

    with replacing(path, rename=rename) as raw, gzip.open(raw, "wt", encoding="utf-8", compresslevel=3) as out:
        for entry in entries:
            files, size = files + 1, size + entry[1]
            out.write(json.dumps(entry) + "\n")
        record = record | {"files": files, "bytes": size}
        out.write(json.dumps(record) + "\n")
    return record


def read_record(contents: Path) -> dict[str, Any]:
    """The record at the end of a list of contents; {} where there is none."""
    *_, last = ({}, *(line for line in _lines(contents) if isinstance(line, dict)))
    return last


def entries(contents: Path) -> Iterator[tuple[str, int, int | None]]:
    """(name, bytes, CRC-32 or None) of each file of a list; none where it cannot be read."""
    for line in _lines(contents):
        if isinstance(line, list):
            yield line[0], line[1], line[2]


def missing(folder: Path, contents: Path, *, sizes: bool) -> Iterator[str]:
    """Files of the list that are not below `folder`, and with `sizes` those with another size. Without, only names are
    read, a folder at a time. A list that cannot be read counts as one missing file."""
    look = lru_cache(maxsize=64)(lambda parent: _sizes(folder / parent, sizes))  # archives may hop between folders
    empty = True
    for name, size, _ in entries(contents):
        empty = False
        parent, _, last = name.rpartition("/")
        if look(parent).get(last, -1) not in (size, None):
            yield name
    if empty:
        yield contents.name


def _sizes(folder: Path, sizes: bool) -> dict[str, int | None]:
    """Name -> bytes of the files in one folder, None for bytes where `sizes` are not asked for; -1 of a link that leads
    nowhere."""
    def size(entry: "os.DirEntry[str]") -> int:
        try:
            return entry.stat().st_size
        except FileNotFoundError:
            return -1

    try:
        with os.scandir(folder) as found:
            return {entry.name: size(entry) if sizes else None for entry in found}
    except OSError:
        return {}


def _lines(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError, EOFError, zlib.error):
        return
