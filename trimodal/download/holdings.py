"""What is there of one data set: which items are whole, what was linked or taken over, how many files of how many."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimodal.data.samples import SPLITS
from trimodal.download import http, local_copies
from trimodal.download.http import Mismatch, Wanted
from trimodal.download.selection import Selection, as_published
from trimodal.errors import UserError
from trimodal.files import replacing, sha256_of
from trimodal.sets import inventory, lists
from trimodal.sets.base import Count, Item

LICENCE = "LICENCE.txt"


@dataclass
class Holdings:
    """The files of `selection` on the disk. `marker` is that of the set's folder; who changes it writes it."""

    selection: Selection
    marker: dict[str, Any] = field(default_factory=dict)
    offered: Mapping[str, int] = field(default_factory=dict)  # places that could be linked, of --local; see `look`
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # item that could be taken over -> (files, bytes)

    def __post_init__(self) -> None:
        self.folder = self.selection.folder
        self.marker = self.marker or inventory.read_marker(self.folder)

    def reread(self) -> None:
        self.marker = inventory.read_marker(self.folder)

    @property
    def items(self) -> dict[str, Any]:
        """The record of each item that is there, by name."""
        return self.marker.setdefault("items", {})

    def todo(self, *, sizes: bool = True) -> list[Item]:
        """Items that are not there. Of alternatives: none as soon as one is there."""
        wanted = self.selection.items
        absent = [item for item in wanted if not self.present(item, sizes)]
        return [] if self.selection.source.one_of and len(absent) < len(wanted) else absent

    def present(self, item: Item, sizes: bool) -> bool:
        if self.linked(item) or self.kept(item) or item.name in self.seen:
            return True
        record = self.items.get(item.name)
        if record and record.get("damaged"):  # found by --verify
            return False
        sample = self.selection.options.sample
        if sample and item.kind == "parquet" and inventory.count(self.folder / item.into, "") >= sample:
            return True  # other shards, or this one, brought enough
        if item.kind == "plain":
            return record is not None and _plain_is_right(self.folder / item.into, record, sizes)
        contents = inventory.contents_path(self.folder, item.name)
        if next(inventory.missing(self.folder / item.into, contents, sizes=sizes), None) is not None:
            return False
        if not record:  # stopped between the last rename and the marker
            record = self.items[item.name] = inventory.read_record(contents)
        return record.get("sample", 0) in (0, sample)  # a part is no whole

    def kept(self, item: Item) -> bool:
        """Whether a list is the user's and left as it is: there, another than the one that this command fetches, and
        in a folder behind a link of the user's, or --skip-existing is given."""
        place = (self.folder / item.into).parent
        if item.kind != "plain" or not (self.selection.options.skip_existing or _is_behind_link(place, self.folder)):
            return False
        return self.differs(item)

    def check_places(self, item: Item) -> None:
        """Raise UserError where an archive would be unpacked into a folder that is a link of the user's."""
        for folder in [] if item.kind == "plain" else [item.into, *(count.folder for count in item.counts)]:
            if _is_behind_link(self.folder / folder, self.folder):
                raise UserError(f"{self.folder / folder}: is a link to a folder of yours, which lacks files of "
                                f"{item.name}, and nothing is unpacked into it; rename the link, or add the files")

    def differs(self, item: Item) -> bool:
        """Whether there is a file with bytes in it where a list belongs, which neither came by this command nor is the
        published one."""
        path, file, record = self.folder / item.into, item.files[0], self.items.get(item.name) or {}
        if not path.is_file() or not path.stat().st_size or _plain_is_right(path, record, True):
            return False
        return not (file.sha256 or file.md5) or not self.is_published(item)

    def is_published(self, item: Item) -> bool:
        """Whether a list is there and has the digest that is published of it."""
        path, file = self.folder / item.into, item.files[0]
        with contextlib.suppress(Mismatch, FileNotFoundError, IsADirectoryError):
            return bool((file.sha256 or file.md5) and http.check_file(as_published(file, path)))
        return False

    def check_nothing_lacks(self, why: OSError) -> None:
        """Raise UserError where something is not there, by `look` and the lists, of a folder that cannot be written."""
        absent = [item.name for item in self.todo() if not (self.is_published(item) if item.kind == "plain" else
                                                            self.linked(item, self.offered))]
        if absent:
            names = ", ".join(absent[:3]) + (" and more" if absent[3:] else "")
            raise UserError(f"{self.folder}: cannot be written ({why.strerror or why}), and {names} must come; to use "
                            f"what is there rename it, or the link, and give --local {self.folder.resolve()}")

    def linked(self, item: Item, places: Mapping[str, int] | None = None) -> bool:
        """Whether the marker, or `places`, has links to what the user has of the item."""
        linked = self.marker.get("linked", {}) if places is None else places
        if item.kind == "parquet":
            return item.into in linked
        return (any(place in linked for count in item.counts for place, _ in count.places)
                or (bool(item.needed) and all(place in linked for place in item.needed)))

    def extent(self, item: Item) -> tuple[int, int]:
        """(files, bytes) of an item that is there. Of shards whose sounds are linked the first one stands for all."""
        if item.name in self.seen:
            return self.seen[item.name]
        if not self.linked(item):
            record = self.items.get(item.name) or {}
            return record.get("files", 0), record.get("bytes", 0)
        if item.kind == "parquet":
            is_first = next(other for other in self.selection.items if other.into == item.into) is item
            files = [*inventory.tree(self.folder / item.into)] if is_first else []
        else:
            files = [file for count in item.counts for place in count.places for file in self._files_of(count, *place)]
            listed = {place for place, _ in files}
            files += [(place, inventory.size_of(self.folder / place)) for place in item.needed if place not in listed]
        return len(files), sum(size for _, size in files)

    def further_links(self) -> list[str]:
        """Folders that are linked, or hold links, of what was not asked for."""
        known = {place for item in self.selection.items for count in item.counts for place, _ in count.places}
        known |= {place for item in self.selection.items for place in (item.into, *item.needed)}
        return [place for place in self.marker.get("linked", {}) if place not in known
                and (self.folder / place).is_dir()]

    def earlier_copies(self, local: Path) -> list[Path]:
        """Folders that --local named before: links into them are ours. `local` is noted before its first link."""
        earlier = [*self.marker["linked_from"]]
        names = [*earlier, os.path.realpath(local), os.path.abspath(local)]
        self.marker["linked_from"] = [*dict.fromkeys(names)]
        inventory.write_marker(self.folder, self.marker)
        return [Path(folder) for folder in earlier]

    def check_links(self) -> None:
        """Raise UserError where links to what the user has lead nowhere now: else that would be fetched."""
        lost = self._lost_links()
        if lost:
            more = f", and so are {len(lost) - 1:,} more" if lost[1:] else ""
            raise UserError(f"{lost[0]}: is a link to {lost[0].readlink()}, which is not there{more}; mount that disk, "
                            "name its place now (--local FOLDER), or remove the links to fetch the set")

    def origins_of_lost_links(self) -> list[str]:
        """The folders that they lead to; releases that did not note them in the marker made such links too."""
        return sorted({str(path.readlink().parent) for path in self._lost_links()})

    def _lost_links(self) -> list[Path]:
        places = [self.folder / place for place in self.marker.get("linked", {})]
        inside = (path for place in places if place.is_dir() and not place.is_symlink() for path in place.iterdir())
        return [path for path in itertools.chain(places, inside) if path.is_symlink() and not path.exists()]

    def has_sounds_by_hand(self, ledger: str) -> bool:
        """Whether sounds lie in the set's folder that did not come by this command: no shard ever did, no
        `ledger` of clips is there, and nothing is linked."""
        shards = [item.name for item in self.selection.source.items if item.kind == "parquet"]
        if not shards or self.marker.get("linked") or (self.folder / ledger).exists() or any(
                name in self.items or inventory.contents_path(self.folder, name).exists() for name in shards):
            return False
        return local_copies.has_sounds(self.folder)

    def look(self, offered: Mapping[str, int]) -> None:
        """Count as there what a download would link (`offered`) or take over, without doing so."""
        self.offered = offered
        for item in self.selection.items:
            if not self.present(item, True) and (files := self._complete_files(item)):
                self.seen[item.name] = len(files), sum(size for _, size in files)

    def adopt(self, item: Item) -> int:
        """Take over what somebody else unpacked: as many files as published, none empty, of a likely size in all.
        Returns the number of files, 0 where it does not look like that."""
        files = self._complete_files(item)
        if not files:
            return 0
        record = {"sha256": [], "checked": [], "adopted": True}
        with inventory.Listing(inventory.contents_path(self.folder, item.name), record) as listing:
            for place, size in files:
                listing.add(Path(place).relative_to(item.into).as_posix(), size, None)
            self.items[item.name] = listing.finish()
        return len(files)

    def _complete_files(self, item: Item) -> list[tuple[str, int]]:
        """(place, bytes) of the files of an archive that somebody else unpacked; none unless they look complete."""
        known = bool(item.needed) or (bool(item.counts) and all(count.number for count in item.counts))
        record = self.items.get(item.name, {})
        if self.selection.source.one_of or not known or record.get("damaged"):
            return []
        if inventory.contents_path(self.folder, item.name).is_file() and not record.get("adopted"):
            return []  # it came by this command, and is unpacked in part
        files: list[tuple[str, int]] = []
        for count in item.counts:
            found = max((self._files_of(count, *place) for place in count.places), key=len)
            if not item.needed and len(found) < count.number:
                return []
            files += found
        listed = {place for place, _ in files}
        files += [(place, inventory.size_of(self.folder / place)) for place in item.needed if place not in listed]
        right = all(size for _, size in files) and 2 * sum(size for _, size in files) >= item.unpacked
        return files if right else []

    def _files_of(self, count: Count, folder: str, suffix: str) -> list[tuple[str, int]]:
        """(place, bytes) of the files that are counted in one folder; two archives may share one."""
        return [(f"{folder}/{name}", size) for name, size in inventory.tree(self.folder / folder, suffix)
                if count.holds is None or count.holds(name)]

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
        return list(lists.coverage(selection.source, self.folder,
                                         selection.options.splits or SPLITS))

    def counts(self, covered: list[lists.Coverage]) -> list[tuple[str, int, int]]:
        """(place, files found, files published or listed) of the items that are there, and of what may fall short."""
        expected: dict[tuple[tuple[str, str], ...], int] = {}
        held = [item for item in self.selection.items if item.name in self.items or self.linked(item)]
        for count in (count for item in held if not self._by_needed(item) for count in item.counts if count.number):
            expected[count.places] = expected.get(count.places, 0) + count.number
        rows = [self._counted(places, number) for places, number in expected.items()]
        further = [(place, inventory.count(self.folder / place, "")) for place in self.further_links()]
        rows += [(place, found, found) for place, found in further]
        splits = self.selection.options.splits or SPLITS
        partly = {count.folder: count.number for count in self.selection.source.partly if count.folder in splits}
        first = {row.place: row for row in reversed(covered) if row.place in partly}  # later versions name further ones
        rows += [(row.place if first.get(row.place) is row else
                  f"{'further ' if row.place in first else ''}{row.place} named in {row.source}", row.found, row.listed)
                 for row in covered if first.get(row.place) is row or row.absent]
        unknown = partly.keys() - {row.place for row in covered}
        return rows + self.made() + [(place, inventory.count(self.folder / place, ""), number)
                                     for place, number in partly.items() if place in unknown]

    def made(self) -> list[tuple[str, int, int]]:
        """(place, files found, files expected) of what is made of the items when all of them are there."""
        return [(f"{count.folder} {count.suffix}", inventory.count(self.folder / count.folder, count.suffix),
                 count.number) for count in self.selection.source.made]

    def _by_needed(self, item: Item) -> bool:
        """Whether what is there of the item is the user's, who may have no more of it than training needs."""
        record = self.items.get(item.name, {})
        return bool(item.needed) and (bool(record.get("adopted")) or self.linked(item))

    def _counted(self, places: tuple[tuple[str, str], ...], number: int) -> tuple[str, int, int]:
        """A row of `counts`, of the files in all their forms; named by the first one that is there."""
        numbers = [inventory.count(self.folder / folder, suffix) for folder, suffix in places]
        folder, suffix = next((place for place, found in zip(places, numbers, strict=True) if found), places[0])
        return f"{folder.rstrip('.')} {suffix}".strip(), sum(numbers), number


def _plain_is_right(path: Path, record: Mapping[str, Any], thorough: bool) -> bool:
    if not path.is_file() or path.stat().st_size != record.get("bytes"):
        return False
    with contextlib.suppress(Mismatch, KeyError, IndexError):
        return not thorough or bool(http.check_file(Wanted(path=path, digests=(f"sha256:{record['sha256'][0]}",))))
    return False


def _is_behind_link(place: Path, folder: Path) -> bool:
    """Whether `place`, or a folder between it and `folder`, is a link."""
    return place != folder and (place.is_symlink() or _is_behind_link(place.parent, folder))
