"""Archives and lists that the user has, named by --local: found by their names, lists by their bytes."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from trimodal.download import http, local_copies
from trimodal.download.http import Mismatch
from trimodal.download.selection import as_published
from trimodal.errors import UserError
from trimodal.sets.base import Copies, File, Item, Source


class LocalFiles:
    """Of the set `source` and its `items`; `local` is a folder, a single file, or None for nothing."""

    def __init__(self, source: Source, items: Sequence[Item], local: Path | None) -> None:
        self.source, self.items, self.local = source, items, local
        self.by_hand, self.passed_over = False, list[str]()  # see `use_folder`
        self.differing: dict[str, Path] = {}  # list -> a file of its name that is another one

    def file(self, item: Item, file: File) -> Path | None:
        """The user's copy of one file of the item. A list that has a published digest must have it."""
        if not self.local:
            return None
        if self.local.is_file():
            return self.local if self.source.one_of or self.local.name == PurePosixPath(file.name).name else None
        places = self._named.get(PurePosixPath(file.name).name.lower(), [])
        folder = PurePosixPath(file.name).parent.name  # of lists that are named alike: those of AudioCaps
        likely = [path for path in places if not folder or local_copies.holds_lists_of(path, folder)]
        if item.kind != "plain":
            return next((path for path in places if path.stat().st_size == file.size), places[0] if places else None)
        if not (file.sha256 or file.md5):
            return likely[0] if likely else None
        right = next((path for path in places if _is(path, file)), None)
        if likely and not right:
            self.differing[file.name] = likely[0]
        return right

    def whole(self, item: Item) -> Path | None:
        """The user's copy of an archive that is published in parts, put together."""
        if not self.local or not item.whole_md5:
            return None
        if self.local.is_file():
            return self.local if self.local.name == item.name else None
        return next(iter(self._named.get(item.name.lower(), [])), None)

    def has(self, item: Item) -> bool:
        return bool(self.whole(item)) or all(self.file(item, file) for file in item.files)

    def alternative(self) -> Item:
        """Which of the alternatives the single file is.

        Raises:
            UserError: it is none of them.
        """
        found = next((item for item in self.items if self.local and _is(self.local, item.files[0])), None)
        if found:
            return found
        known = ", ".join(f"{item.name} (sha256 {item.files[0].sha256})" for item in self.items)
        raise UserError(f"{self.local}: is another release than those that were verified, or damaged; known: {known}")

    def use_folder(self, folder: Path) -> bool:
        """Take the `folder` of the set for what --local names, where most clips of a split lie in it, however named and
        arranged. `passed_over` tells of a split that has fewer."""
        own = LocalFiles(self.source, self.items, folder.resolve())
        copies = own._mostly(own.copies(self.items, folder), folder)
        if copies.numbers:
            self.local, self.by_hand = own.local, True
        self.passed_over = [] if copies.numbers else [*copies.left_out]  # else `copies` tells of them
        return self.by_hand

    def copies(self, items: Sequence[Item], folder: Path) -> Copies:
        """What of the `items` can be linked into the set's `folder`."""
        if not self.local or not self.local.is_dir():
            return Copies(left_out=tuple(self.passed_over))
        lists = self.lists(folder) if self.source.clips else []
        if self.source.clips and not lists and local_copies.has_sounds(self.local):
            return Copies(left_out=(
                f"sounds in {self.local}: the lists of captions tell which clips they are; a download fetches those "
                "first, and counts the clips that are here then",))
        copies = local_copies.find(self.source, items, self.local, lists)
        return self._mostly(copies, folder) if self.by_hand else copies

    def _mostly(self, copies: Copies, folder: Path) -> Copies:
        """No link is made in a folder behind a link of the user's: training finds the sounds in it as they are."""
        found = local_copies.mostly(copies, self.source.partly, self.local)
        return replace(found, links=tuple(link for link in found.links if not (folder / link[1]).parent.is_symlink()))

    def lists(self, folder: Path) -> list[tuple[str, Path]]:
        """(split, path) of the set's lists: those in the set's `folder`, else the user's; earlier versions first."""
        plain = [item for item in self.items if item.kind == "plain"]
        paths = [(item, folder / item.into if (folder / item.into).is_file() else self.file(item, item.files[0]))
                 for item in plain]
        return [(PurePosixPath(item.into).stem, path) for item, path in paths if path]

    @cached_property
    def _named(self) -> dict[str, list[Path]]:
        assert self.local
        names = {PurePosixPath(file.name).name for item in self.items for file in item.files}
        return local_copies.files_named(self.local, names | {item.name for item in self.items if item.whole_md5})


def _is(path: Path, file: File) -> bool:
    with contextlib.suppress(Mismatch, OSError):
        return bool(http.check_file(as_published(file, path)))
    return False
