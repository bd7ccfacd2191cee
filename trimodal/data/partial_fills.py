"""A filling of the cache that may be killed at any moment: the next one goes on from what is written down as done.

The folder ENTRY.tmp holds `data.bin`, to which each decoded file is appended, and `journal.jsonl`: a head that names
the entry, then a line for each stretch of files, written once their bytes are on the disk. The entry's name holds a
digest of files and settings, so that a filling of others is never gone on with.
"""

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

JOURNAL, DATA, SUFFIX = "journal.jsonl", "data.bin", ".tmp"
STRETCH_BYTES, STRETCH_S = 64_000_000, 10.0  # at most so much is lost by a kill
FORMAT = 1

_FILES = re.compile(r"(journal\.jsonl|data\.bin|index\.npz|broken\.json)(\.\S+\.tmp)?")


class PartialFill:
    """What is there of one entry, and the way to add to it. One process at a time.

    `lengths` (bytes), `shapes` and `reasons` (of those that cannot be decoded, by number) are of the files done so far.
    """

    def __init__(self, folder: Path, total: int, bytes_of: Callable[[Sequence[int]], int]):
        """Open `folder`, made if need be, with what is whole in it. `total`: files of the entry; `bytes_of`: how many
        bytes a decoded file of some shape has. Raises OSError."""
        self.folder, self.total, self.bytes_of = folder, total, bytes_of
        self.lengths, self.shapes, self.reasons = list[int](), list[tuple[int, int]](), dict[int, str]()
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"*{SUFFIX}"):  # of a kill while the index was written
            if _FILES.fullmatch(path.name):
                path.unlink()
        self.data, self.journal = _opened(folder / DATA), _opened(folder / JOURNAL)
        self._recover()
        self.kept, self._since_s = len(self.lengths), time.monotonic()
        self._written = (0, 0, 0)  # bytes, their checksum, files since the last line

    @property
    def size(self) -> int:
        """Bytes of the files so far."""
        return self.data.tell()

    def add(self, shape: tuple[int, int], content: bytes, reason: str | None = None) -> None:
        """The next file, decoded; or the reason why it cannot be."""
        if reason is not None:
            self.reasons[len(self.lengths)] = reason
        self.data.write(content)
        self.lengths.append(len(content))
        self.shapes.append(shape)
        size, crc, count = self._written
        self._written = (size + len(content), zlib.crc32(content, crc), count + 1)
        if self._written[0] >= STRETCH_BYTES or time.monotonic() - self._since_s >= STRETCH_S:
            self.write_down()

    def write_down(self) -> None:
        """What has been added is on the disk, and counts as done."""
        _, crc, count = self._written
        if not count:
            return
        _sync(self.data)
        first = len(self.lengths) - count
        self._line({"shapes": self.shapes[first:], "crc32": crc, "reasons": {
            number: reason for number, reason in self.reasons.items() if number >= first}})
        self._written, self._since_s = (0, 0, 0), time.monotonic()

    def close(self) -> None:
        self.data.close()
        self.journal.close()

    def _line(self, record: dict[str, Any]) -> None:
        self.journal.write(json.dumps(record).encode() + b"\n")
        _sync(self.journal)

    def _recover(self) -> None:
        """Take over the stretches that are whole, and cut off what follows."""
        head = {"format": FORMAT, "entry": self.folder.name.removesuffix(SUFFIX), "files": self.total}
        lines = iter(self.journal.readlines())
        whole, used = 0, 0
        if _record(next(lines, b"")) == head:
            whole = len(json.dumps(head)) + 1
            for line in lines:
                size = self._take(_record(line))
                if size is None:
                    break
                whole, used = whole + len(line), used + size
        for file, length in ((self.data, used), (self.journal, whole)):
            file.seek(length)
            file.truncate()
        if not whole:
            self._line(head)

    def _take(self, record: Any) -> int | None:
        """Bytes of a stretch whose bytes are there and right; None for any other."""
        try:
            shapes = [(int(first), int(second)) for first, second in record["shapes"]]
            reasons = {int(number): str(reason) for number, reason in record["reasons"].items()}
            lengths = [self.bytes_of(shape) for shape in shapes]
            fits = min(map(min, shapes)) >= 0 and len(self.lengths) + len(shapes) <= self.total
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        crc = 0
        for length in lengths if fits else ():
            content = self.data.read(length)
            crc = zlib.crc32(content, crc)
            fits = fits and len(content) == length
        if not fits or crc != record.get("crc32"):
            return None
        self.lengths += lengths
        self.shapes += shapes
        self.reasons |= reasons
        return sum(lengths)


def _record(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # a kill within the line, or damage
        return None


def _opened(path: Path) -> BinaryIO:
    """To be read and written where it is, without a link being followed."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def remove_others(folder: Path, *, superseded: bool = False) -> None:
    """Delete the fillings beside `folder` that did not end, if we hold the lock; `superseded`: those of the same set,
    split and kind alone, whose files or settings are others now."""
    for other in sorted(folder.parent.glob(f"*-*-*-{'[0-9a-f]' * 16}{SUFFIX}")):
        same = other.name.rsplit("-", 1)[0] == folder.name.rsplit("-", 1)[0]
        if other != folder and (same or not superseded) and is_ours(other):
            remove(other)


def is_ours(folder: Path) -> bool:
    """Whether `folder` holds files that a filling makes, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = list(folder.iterdir())
    return bool(found) and all(_FILES.fullmatch(path.name) and path.is_file() and not path.is_symlink()
                               for path in found)


def remove(folder: Path) -> None:
    """Delete what a filling made in `folder`, and it if that was all."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
            if _FILES.fullmatch(path.name) and not path.is_dir():
                path.unlink()
        folder.rmdir()
