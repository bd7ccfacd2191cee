"""What is on the disk of a data set: a marker, a list of what each archive brought, and checks of both.

The marker, .downloaded.json, holds the digest and counts of every item. The list of an archive (name, bytes
and CRC-32 of each file) is written before its files are renamed into place, so an interruption between the two
leaves a list with files missing: an item counts as there only when nothing of its list is missing.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trimodal.files import is_set_aside, keep_beside, replacing, settle, sync_file, sync_folder

MARKER = ".downloaded.json"
CONTENTS = ".contents"


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker's contents, {} where there is none that can be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return marker if isinstance(marker, dict) and isinstance(marker.get("items"), dict) else {}


def write_marker(folder: Path, marker: dict[str, Any]) -> None:
    """Write the marker, whole or not at all; a file of its name that is none is kept under another one."""
    if os.path.lexists(folder / MARKER) and not read_marker(folder):
        keep_beside(folder / MARKER)
    with replacing(folder / MARKER, "w") as file:
        file.write(json.dumps(marker, indent=1, ensure_ascii=False) + "\n")


def contents_path(folder: Path, item: str) -> Path:
    return folder / CONTENTS / f"{item.replace('/', '_')}.jsonl.gz"


class Listing:
    """Writes the list of an item's files (name below its folder, bytes, CRC-32 or None) as they come, in little memory.

    It is there, under its name, when `finish` returns, and not before.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.record = path, record | {"files": 0, "bytes": 0}
        self._beside = path.with_name(path.name + ".new")
        self._out = gzip.open(self._beside, "wt", encoding="utf-8", compresslevel=3)

    def add(self, name: str, size: int, crc32: int | None) -> None:
        self.record["files"] += 1
        self.record["bytes"] += size
        self._out.write(json.dumps([name, size, crc32]) + "\n")

    def finish(self) -> dict[str, Any]:
        """The record for the marker, with the number of files and bytes; it stands at the end of the list as well."""
        self._out.write(json.dumps(self.record) + "\n")
        self._out.close()
        sync_file(self._beside)
        settle(self._beside, self._path, ours=lambda: bool(read_record(self._path)))
        sync_folder(self._path.parent)
        return self.record

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._out.close()
        self._beside.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record at the end of a list of contents; {} where there is none."""
    *_, last = ({}, *(line for line in _lines(path) if isinstance(line, dict)))
    return last


def tree(folder: Path, suffix: str = "") -> Iterator[tuple[str, int]]:
    """(path below `folder` with "/", bytes) of every file whose name ends in `suffix`; hidden ones and what had to make
    way are left out. A link that leads nowhere has no bytes."""
    for root, names in walk(folder):
        for name in names:
            if name.endswith(suffix):
                path = Path(root, name)
                yield path.relative_to(folder).as_posix(), path.stat().st_size if path.exists() else 0


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def count(folder: Path, suffix: str) -> int:
    return sum(name.endswith(suffix) for _, names in walk(folder) for name in names)


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


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files in order) of `folder` and all below it, folders that the user linked in too.

    Names that begin with "." are left out: macOS puts a file ._NAME beside NAME on disks of other systems, and what a
    stopped download left lies in hidden folders. A link to a folder that it lies in is not followed.
    """
    for root, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not is_hidden(name) and not _leads_up(root, name))
        yield root, sorted(name for name in names if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of a data set: see `walk`, and `files.settle`."""
    return name.startswith(".") or is_set_aside(name)


def _leads_up(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    return os.path.islink(path) and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(path))


def _sizes(folder: Path, sizes: bool) -> dict[str, int | None]:
    """Name -> bytes of the files in one folder, None for bytes where `sizes` are not asked for; -1 of a link that leads
    nowhere."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _size(entry) if sizes else None for entry in entries}
    except OSError:
        return {}


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return -1


def _lines(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError, RecursionError, EOFError, zlib.error):
        return
