"""Which samples show the same picture, or the same stretch of the same sound, whatever paths lead there.

    image_ids(table), audio_ids(table)    # int64 [n]: equal exactly for equal files and stretches
"""

import os
from collections.abc import Hashable

import numpy as np

from trimodal.data import generated
from trimodal.data.samples import SampleTable, Strings


def key_of(found: os.stat_result, path: str) -> str:
    """Equal for a file, the links to it and its hard links, which `path` led to.

    Size and date of change are part of it, since some file systems give several files one number, or none.
    """
    if not found.st_ino:
        return os.path.realpath(path)
    return f"{found.st_dev:x} {found.st_ino:x} {found.st_size:x} {found.st_mtime_ns:x}"


def file_key(path: str) -> str:
    """`key_of`, and of a file that is not there its path."""
    try:
        return key_of(os.stat(path), path)
    except (OSError, ValueError):
        return path


def image_ids(table: SampleTable) -> np.ndarray:
    """int64 [n]: the first row that has the same picture; of a sample without one, or with one that is drawn anew at
    each visit, a number of its own."""
    return _first_rows(table.images, None)


def audio_ids(table: SampleTable) -> np.ndarray:
    """int64 [n]: as `image_ids`, of the same stretch of the same sound: start and duration are equal, too."""
    return _first_rows(table.audio, np.stack([table.start_s, table.duration_s], 1))


def _first_rows(paths: Strings, stretches: np.ndarray | None) -> np.ndarray:
    ids = -1 - np.arange(len(paths))
    keys: dict[str, str] = {}
    first: dict[Hashable, int] = {}
    for row in np.flatnonzero(paths.lengths).tolist():
        path = paths[row]
        if generated.is_generated(path):
            continue
        if path not in keys:
            keys[path] = file_key(path)
        stretch = () if stretches is None else (float(stretches[row, 0]), float(stretches[row, 1]))
        ids[row] = first.setdefault((keys[path], stretch), row)
    return ids
