"""Where archives are unpacked before their files are renamed into the set: .unpacking/ARCHIVE-DIGEST in its folder."""

import contextlib
import re
import shutil
from pathlib import Path

from trimodal.errors import UserError
from trimodal.files import bytes_below
from trimodal.sets.sources import Item, Source

STAGING = ".unpacking"


def place(folder: Path, item: Item, archive: str) -> Path:
    """The staging folder of this very `archive` of the item; the one above it is made.

    Raises:
        UserError: that one is a link of the user's.
    """
    if (folder / STAGING).is_symlink():
        raise UserError(f"{folder / STAGING}: is a link of yours, and archives are unpacked under this name; rename it")
    (folder / STAGING).mkdir(exist_ok=True)
    return folder / STAGING / f"{item.name}-{archive}"


def arrived_bytes(folder: Path, source: Source) -> int:
    """What is unpacked there already."""
    return sum(map(bytes_below, _ours(folder, source)))


def clear(folder: Path, source: Source) -> None:
    """Remove what this command, or one that was killed, left there; what the user has in such a folder stays."""
    for left in _ours(folder, source):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / STAGING).rmdir()  # only when empty


def _ours(folder: Path, source: Source) -> list[Path]:
    if (folder / STAGING).is_symlink() or not (folder / STAGING).is_dir():
        return []
    names = "|".join(re.escape(item.name) for item in source.items)
    ours = re.compile(rf"({names})-([0-9a-f]{{16}}|(?=-))(-\d+)?(\.writing|\.\d+\.old)?")
    return [path for path in (folder / STAGING).iterdir() if ours.fullmatch(path.name) and not path.is_symlink()]
