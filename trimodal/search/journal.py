"""What an indexing has encoded so far, so that one that is killed goes on where it was.

    journal = Journal(place / NAME, model.digest)       # what was cut off at the end by a kill is dropped
    journal.add(entries, features_NF)                   # appended; on the disk before the next one

A record is a line of JSON, which states how many bytes of numbers follow and their CRC-32, and these bytes. The first
one says by which model.

Shape suffixes: N entries, F numbers of a feature.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from trimodal.search.index import Entry

NAME = "encoded.journal"
_BEGIN = b'{"model": "'


class Record(NamedTuple):
    """Entries and their features, float32 [N, F]."""

    entries: list[Entry]
    features_NF: np.ndarray


def read_journal(path: Path) -> tuple[str, list[Record], int]:
    """The digest of the model ("" where there is no journal), all whole records, and where the last one ends. Features
    are mapped into memory."""
    if not path.exists() or not path.stat().st_size:
        return "", [], 0
    content, digest, records, whole = np.memmap(path, np.uint8, "r"), "", list[Record](), 0
    for header, begin, end in _whole(path, content):
        if whole:
            entries = [Entry(*row) for row in header["entries"]]
            records.append(Record(entries, content[begin:end].view("<f4").reshape(len(entries), -1)))
        else:
            digest = header["model"]
        whole = end
    return digest, records, whole


def is_journal(path: Path) -> bool:
    """Whether a file can be a journal, be it one whose first line was cut off by a kill."""
    with path.open("rb") as file:
        return _BEGIN.startswith(file.read(len(_BEGIN)))


def _whole(path: Path, content: np.ndarray) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The header of each whole record, and where its numbers begin and end."""
    with path.open("rb") as file, contextlib.suppress(ValueError, KeyError):  # of a line that was cut off
        while line := file.readline():
            header, begin = json.loads(line), file.tell()
            end = begin + header["bytes"]
            if end > len(content) or zlib.crc32(content[begin:end].data) != header["crc32"]:
                return
            yield header, begin, end
            file.seek(end)


class Journal:
    """A journal, open to append."""

    def __init__(self, path: Path, model: str):
        """Go on with the journal at `path` if it is of the same model (its digest), else begin it anew."""
        known, _, end = read_journal(path)
        self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")
        self._file.truncate(end if known == model else 0)
        self._file.seek(0, os.SEEK_END)
        if known != model:
            self._append({"model": model}, b"")

    def add(self, entries: Sequence[Entry], features_NF: np.ndarray) -> None:
        self._append({"entries": entries}, features_NF.astype("<f4", copy=False).tobytes())

    def _append(self, header: dict[str, Any], numbers: bytes) -> None:
        line = json.dumps({**header, "bytes": len(numbers), "crc32": zlib.crc32(numbers)})
        self._file.write(line.encode("ascii") + b"\n" + numbers)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
