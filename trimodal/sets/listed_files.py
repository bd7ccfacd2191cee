"""From the names in a list to files: in the list's folder alone, and in spite of how a name came to be written.

A Mac writes accented letters of file names as two characters (NFD) where lists have one (NFC), Windows parts folders by
backslashes, and some tables put blanks beside their commas. Where a name leads to no file, the one file that it leads
to without that is taken, and counted.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from trimodal.data.splits import key_of
from trimodal.errors import counted
from trimodal.sets.reading import names_in

SHOWN = 3  # missing files that are named
MAX_FOLDERS = 64  # whose names are kept in memory
UNICODE, BACKSLASH, BLANKS = "another Unicode form", "backslashes", "blanks beside them"


class File(NamedTuple):
    path: str  # absolute
    number: int  # equal for equal files, whatever paths lead there


class Files:
    """Looks up the files that a list names, and counts those that are missing.

    Relative names start at `base`. A file outside `root`, a real path that ends in "/", is refused.
    """

    def __init__(self, base: Path, root: str) -> None:
        self.base, self.root = base, root
        self.numbers: dict[str, int] = {}  # by what files are told apart by
        self.missing: set[int] = set()
        self.shown: list[str] = []  # the first of them, and where they are named
        self.written: dict[str, set[int]] = {}  # files that were found in spite of their writing, by it
        self.example: dict[str, str] = {}  # of each such writing
        self._found: dict[str, File] = {}  # lists of one caption a line name each file often
        self._real_folder = lru_cache(maxsize=1 << 16)(os.path.realpath)
        self._names = lru_cache(maxsize=MAX_FOLDERS)(_names_by_form)

    def find(self, name: Any, where: str) -> File:
        """The file of this name; one that is not there counts as missing, and `where` is kept of the first of them.

        Raises:
            ValueError: it is no path, lies outside `root`, or is no file.
        """
        if not isinstance(name, str) or "\0" in name:
            raise ValueError("expected a path")
        if name not in self._found:
            self._found[name] = self._find(name, where)
        return self._found[name]

    def _find(self, name: str, where: str) -> File:
        for path, ways in self._candidates(name):
            found = _stat(path)
            if found and stat.S_ISREG(found.st_mode):
                self._check_inside(path)
                number = self._number(key_of(found, path))
                for way in ways:
                    self.written.setdefault(way, set()).add(number)
                    self.example.setdefault(way, name)
                return File(path, number)
        path = os.path.abspath(os.path.join(self.base, name))
        self._check_inside(path)
        if os.path.exists(path):
            raise ValueError("is a folder, not a file" if os.path.isdir(path) else "is not a file")
        return File(path, self._miss(name, path, where))

    def _check_inside(self, path: str) -> None:
        folder, name = os.path.split(path)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real_folder(folder), name)
        if not real.startswith(self.root):
            raise ValueError(f"lies outside {self.root} (links followed); put it there, or name a folder that holds "
                             "all files: data.manifest_root=FOLDER")

    def _candidates(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Paths that a name may stand for, the exact one first, and what is taken for a way of writing in each."""
        slashes = name.replace("\\", "/") if os.sep == "/" else name
        writings: dict[str, list[str]] = {name: []}
        for writing, ways in ((name.strip(), [BLANKS]), (slashes, [BACKSLASH]), (slashes.strip(), [BLANKS, BACKSLASH])):
            writings.setdefault(writing, ways)
        for writing, ways in writings.items():
            path = os.path.abspath(os.path.join(self.base, writing))
            yield path, ways
            if other_form := self._in_other_form(path):
                yield other_form, [*ways, UNICODE]

    def describe(self) -> list[str]:
        """A line for each way of writing in spite of which files were found."""
        return [f"{counted(len(files), 'file name')} written with {way}, such as {self.example[way]!r:.100}: there "
                "without that, and taken" for way, files in self.written.items()]

    def _number(self, key: str) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def _miss(self, name: str, path: str, where: str) -> int:
        number = self._number(path)
        if number not in self.missing and len(self.shown) < SHOWN:
            self.shown.append(f"{where}: no such file ({path:.200}){self._hint(name, path)}")
        self.missing.add(number)
        return number

    def _in_other_form(self, path: str) -> str:
        """The path that differs in the Unicode form of its names alone; "" where there is none, or several."""
        if path.isascii():
            return ""
        folder, name = os.path.split(path)
        if not os.path.isdir(folder):
            folder = self._in_other_form(folder)
        names = self._names(folder).get(unicodedata.normalize("NFC", name), []) if folder else []
        return os.path.join(folder, names[0]) if len(names) == 1 else ""

    def _hint(self, name: str, path: str) -> str:
        """The end of an error message on a missing file: a likely mistake in its name, or ""."""
        if not os.path.isabs(name) and os.path.isfile(name):
            return f", which is in the current folder: relative paths start at {self.base}"
        folder, last = os.path.split(path)
        names, wanted = self._names(folder), unicodedata.normalize("NFC", last)
        if len(names.get(wanted, [])) > 1:
            return ", but several whose names are written in other Unicode forms"
        close = next((one for one in names if one.lower() == wanted.lower()), "")
        return f", but {names[close][0]!r}: capital and small letters differ" if close else ""


def _names_by_form(folder: str) -> dict[str, list[str]]:
    """{NFC form of a name: names in the folder that have this form}."""
    names: dict[str, list[str]] = {}
    for name in sorted(names_in(Path(folder))):
        names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None
