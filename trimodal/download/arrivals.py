"""The names under which a file arrives, and the note beside it that tells what came by this command.

While NAME arrives its bytes are in NAME.part, and NAME.part.json says where they come from. The note of an archive
stays beside it and then holds its digest too: an archive without such a note is the user's, and is only ever read.
Where the user has a file of such a name, NAME.2.part and NAME.2.part.json stand in, and so on.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimodal.files import remove_left, replacing, sha256_of

_BEGINS = '{"url": "'  # every note does


def part_of(path: Path) -> Path:
    """Where the bytes of `path` are while it arrives; nothing of the user's has this name."""
    return _places(path)[0]


def note_of(path: Path) -> Path:
    """Where the note about `path` is."""
    return _places(path)[1]


def _places(path: Path) -> tuple[Path, Path]:
    """(part, note): the first names that are free or hold what earlier calls left there."""
    stems = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    pairs = ((path.with_name(f"{stem}.part"), path.with_name(f"{stem}.part.json")) for stem in stems)
    return next((part, note) for part, note in pairs
                if _is_ours(note) or not (os.path.lexists(part) or os.path.lexists(note)))


def _is_ours(note: Path) -> bool:
    """Also where it is cut: releases before this one did not write notes whole or not at all."""
    text = _text(note)
    return text is not None and (text.startswith(_BEGINS) or _BEGINS.startswith(text))


def _text(path: Path) -> str | None:
    try:
        return None if path.is_symlink() else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def read_note(path: Path) -> dict[str, Any]:
    """What the note about `path` says, {} where there is none that can be read."""
    try:
        note = json.loads(_text(note_of(path)) or "")
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("total", 0), int) else {}


def write_note(path: Path, url: str, more: Mapping[str, Any]) -> None:
    """Write the note about `path`, whole or not at all."""
    with replacing(note_of(path), "w") as file:
        file.write(json.dumps({"url": url, **more}))


def forget(path: Path) -> None:
    """Remove the note about `path`, and what has arrived of it; `path` itself stays."""
    part, note = _places(path)
    if _is_ours(note):
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    remove_left(note.parent, re.escape(note.name))


def digest(path: Path) -> str:
    """The SHA-256 that `path` had when it came by this command, "" where it did not."""
    return str(read_note(path).get("whole") or "")


def keep(path: Path) -> None:
    """From now on the archive `path` is the user's; its digest stays known."""
    note = read_note(path)
    if note.get("whole") and not note.get("kept"):
        write_note(path, note["url"], {**note, "kept": True})


def remove(path: Path, sha256: str = "") -> bool:
    """Remove the archive `path` if it came by this command, is as it came and was not to be kept, and what is left of
    transfers that were killed. `sha256` is that of the file where it is known. Returns whether an archive stays.
    """
    if os.path.lexists(path):
        note = read_note(path)
        ours = note.get("whole") and not note.get("kept") and not path.is_symlink()
        if not ours or note["whole"] != (sha256 or sha256_of(path)):
            return True
        path.unlink()
    forget(path)
    lock = path.with_name(f"{path.name}.lock")
    if lock.is_file() and not lock.is_symlink() and not lock.stat().st_size:
        lock.unlink(missing_ok=True)
    return False
