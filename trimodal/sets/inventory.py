"""The files of a data set on the disk, and the marker that a download leaves there, .downloaded.json."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimodal.files import is_set_aside

MARKER = ".downloaded.json"


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker's contents, {} where there is none that can be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return marker if isinstance(marker, dict) and isinstance(marker.get("items"), dict) else {}


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


def has(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file in the folder or below it ends in one of the `suffixes`, in upper or lower case."""
    return any(name.lower().endswith(suffixes) for _, names in walk(folder) for name in names)


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files in order) of `folder` and all below it, folders that the user linked in too.

    Names that begin with "." are left out: macOS puts a file ._NAME beside NAME on disks of other systems, and what a
    stopped download left lies in hidden folders. A link to a folder that it lies in is not followed.
    """
    for root, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not is_hidden(name) and not _leads_up(root, name))
        yield root, sorted(name for name in names if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of a data set: see `walk`, and `files.replace_with_backup`."""
    return name.startswith(".") or is_set_aside(name)


def _leads_up(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    return os.path.islink(path) and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(path))
