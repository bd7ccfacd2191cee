"""What lies in a folder: its pictures, sounds and videos, known by the suffixes that the trainer knows.

Names that begin with a dot are left out, and those that match a pattern. Links are followed, each folder is read once,
and a link to a folder that holds the whole one, such as "/", is not followed.
"""

import contextlib
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trimodal import media
from trimodal.arguments import reading
from trimodal.errors import UserError, counted
from trimodal.files import sha256_of

SUFFIXES = (*media.PICTURE_SUFFIXES, *media.WITH_SOUND)
CHANGED = "was changed while it was read; index again when it is whole"
_THREADS, _AT_ONCE = 4, 256  # that read files for their digests, and how many of these wait for one


class File(NamedTuple):
    """A file as it was found."""

    path: str  # from the folder, with "/"
    size: int
    changed_ns: int

    @property
    def is_video(self) -> bool:
        return media.is_video(self.path)

    @property
    def sort(self) -> str:
        """"pictures", "sounds" or "videos"."""
        return "videos" if self.is_video else (
            "pictures" if self.path.lower().endswith(media.PICTURE_SUFFIXES) else "sounds")


class Skipped(NamedTuple):
    """Something that was left out, and why."""

    path: str
    reason: str


@dataclass
class Found:
    """The content of a folder, files in the order of their paths."""

    files: list[File] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # folders that cannot be listed: what is below may well be there
    num_others: int = 0  # files with other suffixes

    def may_hold(self, path: str) -> bool:
        """Whether a file that was not found may still be there, in a folder that cannot be listed."""
        return any(path.startswith(f"{folder}/") for folder in self.unread)


def find(folder: Path, exclude: Sequence[str] = ()) -> Found:
    """Look through a folder and all folders below it, without files and folders whose name, or path from `folder`,
    matches one of `exclude` (* any letters, ? one, [ab] one of these).

    Raises:
        UserError: it is no folder, or holds no picture, sound or video that could be read.
    """
    with reading(folder):  # as are the folders above it
        is_folder = folder.is_dir()
    if not is_folder:
        raise UserError(f"{folder}: is {'no folder' if folder.exists() else 'not there'}; name one with pictures, "
                        "sounds or videos")
    found = Found()
    waiting, links = [""], deque[str]()
    real = folder.resolve()
    around = {_identity(one) for one in (real, *real.parents)}
    seen = {_identity(folder)}
    while waiting or links:  # links last: what they lead to is listed where it is, if it is in the folder
        below = waiting.pop() if waiting else links.popleft()
        with _noting(below, found):
            if below:
                identity = _identity(folder / below)
                if identity in around:
                    found.skipped.append(Skipped(below, "a link to a folder around this one is not followed"))
                    continue
                if identity in seen:
                    continue
                seen.add(identity)
            for entry in _entries(folder / below):
                path = f"{below}/{entry.name}".lstrip("/")
                if not any(fnmatchcase(name, pattern) for name in (entry.name, path) for pattern in exclude):
                    _add(entry, path, found, waiting, links)
    found.files.sort()
    found.skipped.sort()
    if not found.files:
        other = f"; {found.skipped[0].path}: {found.skipped[0].reason}" if found.skipped else ""
        raise UserError(f"{folder}: holds no pictures, sounds or videos, as their names tell (.jpg, .png, .wav, .mp3, "
                        f".mp4 and others of these kinds), but {counted(found.num_others, 'other file')}{other}")
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


@contextlib.contextmanager
def _noting(below: str, found: Found) -> Iterator[None]:
    """A folder that cannot be listed is skipped, and remembered."""
    try:
        yield
    except OSError as error:
        found.skipped.append(Skipped(below or ".", f"a folder that cannot be listed ({error.strerror})"))
        found.unread.append(below)


def _add(entry: "os.DirEntry[str]", path: str, found: Found, waiting: list[str], links: deque[str]) -> None:
    is_known = entry.name.lower().endswith(SUFFIXES)
    try:
        if entry.is_dir():
            (links if entry.is_symlink() else waiting).append(path)
            return
        status = entry.stat() if is_known else None
    except OSError as error:  # a link that leads nowhere, or in a circle
        if is_known:
            found.skipped.append(Skipped(path, f"cannot be found ({error.strerror})"))
        return
    if status is None:
        found.num_others += 1
    elif stat.S_ISREG(status.st_mode):
        found.files.append(File(path, status.st_size, status.st_ctime_ns))
    else:
        found.skipped.append(Skipped(path, "is no regular file"))


# ---- digests -----------------------------------------------------------------------------------------------------


def digests(folder: Path, files: Sequence[File]) -> Iterator[str | Skipped]:
    """Yield the SHA-256 of each file, or why it has none."""
    with ThreadPoolExecutor(_THREADS, "reading") as pool:
        for first in range(0, len(files), _AT_ONCE):
            yield from pool.map(partial(_digest, folder), files[first:first + _AT_ONCE])


def _digest(folder: Path, file: File) -> str | Skipped:
    try:
        digest = sha256_of(folder / file.path)
    except OSError as error:
        return Skipped(file.path, f"cannot be read ({error.strerror})")
    return Skipped(file.path, CHANGED) if has_changed(folder, file) else digest


def has_changed(folder: Path, file: File) -> bool:
    """Whether a file is another one than when it was found, or has gone."""
    try:
        status = (folder / file.path).stat()
    except OSError:
        return True
    return (status.st_size, status.st_ctime_ns) != (file.size, file.changed_ns)
