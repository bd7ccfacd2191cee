"""The note beside a file that arrives, NAME.part.json: where the bytes in NAME.part come from.

The note of an archive stays beside it with its digest, as the proof that this command fetched it: an archive without
one is the user's, and is only ever read. Where the user has files of these names, NAME.2.part and NAME.2.part.json
stand in, and so on.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trimodal.files import remove_left, replacing, sha256_of

START = '{"url": "'  # of every note


def part_of(path: Path) -> Path:
    """Where the bytes of `path` are while it arrives; nothing of the user's has this name."""
    return names_beside(path)[0]


def names_beside(path: Path) -> tuple[Path, Path]:
    """(part, note): the first names that are free or hold what earlier calls left there."""
    stems: Iterable[str] = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    pairs = ((path.with_name(f"{stem}.part"), path.with_name(f"{stem}.part.json")) for stem in stems)
    return next((part, note) for part, note in pairs
                if _is_note(note) or not (os.path.lexists(part) or os.path.lexists(note)))


def _is_note(path: Path) -> bool:
    """Also one that is cut: earlier releases did not write notes whole or not at all."""
    text = _text(path)
    return text is not None and (text.startswith(START) or START.startswith(text))


def _text(path: Path) -> str | None:
    try:
        return None if path.is_symlink() else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def read(path: Path) -> dict[str, Any]:
    """The note about `path`, {} where there is none that can be read."""
    try:
        note = json.loads(_text(names_beside(path)[1]) or "")
    except ValueError:
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("total", 0), int) else {}


def write(path: Path, note: Mapping[str, Any]) -> None:
    """Write the note about `path`, whole or not at all; "url" is its first key (see `_is_note`)."""
    with replacing(names_beside(path)[1], "w") as file:
        file.write(json.dumps(note))


def whole_sha256(path: Path) -> str:
    """The SHA-256 that `path` had when it came by this command, "" where it did not."""
    return str(read(path).get("whole") or "")


def forget(path: Path) -> None:
    """Remove the note about `path`, and what has arrived of it; `path` itself stays."""
    part, note = names_beside(path)
    if _is_note(note):
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    remove_left(note.parent, re.escape(note.name))


def keep_archive(path: Path) -> None:
    """Make the archive `path` the user's from now on; its digest stays known."""
    note = read(path)
    if note.get("whole") and not note.get("kept"):
        write(path, {**note, "kept": True})


def remove_archive(path: Path, sha256: str = "") -> bool:
    """Remove the archive `path` if it came by this command, is as it came and was not to be kept, and what is left of
    transfers that were killed. `sha256` is that of the file where it is known. Returns whether an archive stays."""
    if os.path.lexists(path):
        note = read(path)
        ours = note.get("whole") and not note.get("kept") and not path.is_symlink()
        if not ours or note["whole"] != (sha256 or sha256_of(path)):
            return True
        path.unlink()
    forget(path)
    remove_lock(path)
    return False


def remove_lock(path: Path) -> None:
    """Remove the lock of `path`, an empty file, that `files.locked` of a killed process left."""
    lock = path.with_name(f"{path.name}.lock")
    if lock.is_file() and not lock.is_symlink() and not lock.stat().st_size:
        lock.unlink(missing_ok=True)
