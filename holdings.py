"""What is there of one data set: which items are whole, what was linked or taken over, how many files of how many."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import annotations
import inventory
import transfer
from files import replacing
from selection import Selection
from sources import Item
from transfer import Mismatch, Wanted

LICENCE = "LICENCE.txt"

@dataclass
class Holdings:
    """The files of `selection` on the disk. `marker` is that of the set's folder; who changes it writes it."""

    selection: Selection
    marker: dict[str, Any] = field(default_factory=dict)

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
        if self.linked(item) or self.kept(item):
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
        path = self.folder / item.into
        if item.kind != "plain" or not self.differs(item):
            return False
        return self.selection.options.skip_existing or _is_behind_link(path.parent, self.folder)

    def differs(self, item: Item) -> bool:
        """Whether there is a file with bytes in it where a list belongs, which neither came by this command nor is the
        published one."""
        path, file, record = self.folder / item.into, item.files[0], self.items.get(item.name) or {}
        if not path.is_file() or not path.stat().st_size or _plain_is_right(path, record, True):
            return False
        if not (file.sha256 or file.md5):
            return True
        with contextlib.suppress(Mismatch):
            return not transfer.check_file(Wanted(path=path, urls=(), size=file.size, sha256=file.sha256, md5=file.md5,
                                                  also_good=file.also_good))
        return True

    def linked(self, item: Item) -> bool:
        linked = self.marker.get("linked", {})
        return (item.kind == "parquet" and item.into in linked) or any(count.folder in linked for count in item.counts)

    def adopt(self, item: Item) -> int:
        """Take over what somebody else unpacked: as many files as published, none empty, of a likely size in all.
        Returns the number of files, 0 where it does not look like that."""
        source = self.selection.source
        if source.one_of or not item.counts or not all(count.number for count in item.counts):
            return 0
        if self.items.get(item.name, {}).get("damaged"):
            return 0
        files: list[tuple[str, int]] = []
        for count in item.counts:
            found = list(inventory.tree(self.folder / count.folder, count.suffix))
            if len(found) != count.number or not all(size for _, size in found):
                return 0
            below = Path(count.folder).relative_to(item.into)
            files += [((below / name).as_posix(), size) for name, size in found]
        if 2 * sum(size for _, size in files) < item.unpacked:
            return 0
        record = {"sha256": [], "checked": [], "adopted": True}
        with inventory.Listing(inventory.contents_path(self.folder, item.name), record) as listing:
            for name, size in files:
                listing.add(name, size, None)
            self.items[item.name] = listing.finish()
        return len(files)

    def write_licence(self) -> bool:
        """Write LICENCE.txt, and its digest into the marker; false where one is there that is not ours, which stays."""
        path, source = self.folder / LICENCE, self.selection.source
        text = f"{source.title}\n{source.page}\n\n{source.licence}\n{source.note}\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        there = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        if path.is_symlink() or there not in ("", digest, self.marker.get("licence_sha256")):
            return False
        if there != digest:
            with replacing(path, "w") as file:
                file.write(text)
        self.marker["licence_sha256"] = digest
        return True

    def coverage(self) -> list[annotations.Coverage]:
        """Files that the lists name; only those asked for, and not of samples, which fall short on purpose."""
        selection = self.selection
        if selection.source.name != "audiocaps" and (selection.left_out or selection.options.sample):
            return []
        return list(annotations.coverage(selection.source.name, self.folder,
                                         selection.options.splits or annotations.SPLITS))

    def counts(self, covered: list[annotations.Coverage]) -> list[tuple[str, int, int]]:
        """(place, files found, files published or listed) of the items that are there, and of what may fall short."""
        expected: dict[tuple[str, str], int] = {}
        held = [item for item in self.selection.items if item.name in self.items or self.linked(item)]
        for count in (count for item in held for count in item.counts if count.number):
            expected[count.folder, count.suffix] = expected.get((count.folder, count.suffix), 0) + count.number
        rows = [(f"{folder.rstrip('.')} {suffix}".strip(), inventory.count(self.folder / folder, suffix), number)
                for (folder, suffix), number in expected.items()]
        splits = self.selection.options.splits or annotations.SPLITS
        partly = {count.folder: count.number for count in self.selection.source.partly if count.folder in splits}
        first = {row.place: row for row in reversed(covered) if row.place in partly}  # later versions name further ones
        rows += [(row.place if first.get(row.place) is row else
                  f"{'further ' if row.place in first else ''}{row.place} named in {row.source}", row.found, row.listed)
                 for row in covered if first.get(row.place) is row or row.absent]
        unknown = partly.keys() - {row.place for row in covered}
        return rows + [(place, inventory.count(self.folder / place, ""), number)
                       for place, number in partly.items() if place in unknown]


def _plain_is_right(path: Path, record: Mapping[str, Any], thorough: bool) -> bool:
    if not path.is_file() or path.stat().st_size != record.get("bytes"):
        return False
    with contextlib.suppress(Mismatch, KeyError, IndexError):
        return not thorough or bool(transfer.check_file(Wanted(path=path, urls=(), sha256=record["sha256"][0])))
    return False


def _is_behind_link(place: Path, folder: Path) -> bool:
    """Whether `place`, or a folder between it and `folder`, is a link."""
    return place != folder and (place.is_symlink() or _is_behind_link(place.parent, folder))
