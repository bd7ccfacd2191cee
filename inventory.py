"""What is on the disk of a data set: a marker, a list of what each archive brought, and checks of both.

The marker, .downloaded.json, holds the digest, origin and counts of every item. The list of an archive's contents is
written before its files are renamed into place, so an interruption between the two leaves a list with files missing:
an item counts as there only when nothing of its list is missing.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from files import replacing

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
    with replacing(folder / MARKER, "w") as file:
        file.write(json.dumps(marker, indent=1, ensure_ascii=False) + "\n")


def contents_path(folder: Path, item: str) -> Path:
    return folder / CONTENTS / f"{item.replace('/', '_')}.jsonl.gz"


def write_contents(path: Path, record: dict[str, Any], files: Iterator[tuple[str, int]]) -> None:
    """List the `files` (name below the item's folder, bytes) of an item, after its `record` for the marker.

    Written beside and renamed. The record gains the number of files and bytes: `read_record` returns it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    number = size = 0
    with gzip.open(beside, "wt", encoding="utf-8", compresslevel=3) as out:
        for name, length in files:
            number, size = number + 1, size + length
            out.write(json.dumps([name, length]) + "\n")
        record |= {"files": number, "bytes": size}
        out.write(json.dumps(record) + "\n")
    os.replace(beside, path)


def read_record(path: Path) -> dict[str, Any]:
    """The record at the end of a list of contents; {} where there is none."""
    *_, last = ({}, *(line for line in _lines(path) if isinstance(line, dict)))
    return last


def tree(folder: Path, suffix: str = "") -> Iterator[tuple[str, int]]:
    """(path below `folder` with "/", bytes) of every file whose name ends in `suffix`; hidden folders are left out."""
    for root, names in _walk(folder):
        for name in sorted(names):
            if name.endswith(suffix):
                path = Path(root, name)
                yield path.relative_to(folder).as_posix(), path.stat().st_size


def count(folder: Path, suffix: str) -> int:
    return sum(name.endswith(suffix) for _, names in _walk(folder) for name in names)


def missing(folder: Path, contents: Path, *, sizes: bool) -> list[str]:
    """Files of the list that are not below `folder`, and with `sizes` those with another size. Without, only names are
    read, a folder at a time. A list that cannot be read counts as one missing file."""
    found = []
    empty = True
    listed = (line for line in _lines(contents) if isinstance(line, list))
    for parent, entries in groupby(listed, key=lambda entry: entry[0].rpartition("/")[0]):
        empty = False
        there = _sizes(folder / parent, sizes)
        found += [name for name, size in entries if there.get(name.rpartition("/")[2], -1) not in (size, None)]
    return [contents.name] if empty else found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of `folder` and all below it, folders that the user linked in too."""
    for root, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield root, names


def _sizes(folder: Path, sizes: bool) -> dict[str, int | None]:
    """Name -> bytes of the files in one folder, None for bytes where `sizes` are not asked for."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size if sizes else None for entry in entries}
    except OSError:
        return {}


def _lines(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError, RecursionError, EOFError, zlib.error):
        return
