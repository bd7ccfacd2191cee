"""Unpack archives: `extract` them into a staging folder, and from there `move_into` the folder of a data set.

Nothing is written outside the staging folder: an archive that holds an absolute name, a "..", a link or a device is
refused. What it says that it holds is compared with bounds and with the free disk before that is written.
"""

import contextlib
import errno
import importlib.util
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trimodal.download.archives import Archive, ArchiveError, Member, Part, Written, open_archive
from trimodal.download.progress import Progress
from trimodal.errors import UserError
from trimodal.files import bytes_below, replace_with_backup
from trimodal.sets.base import Item, Rows, Source

STAGING = ".unpacking"
PACKAGES = {"parquet": "pyarrow", "7z": "py7zr"}  # what the standard library cannot unpack
# What the decoders raise for damage; they also raise an OSError, without a number.
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)

Rules = tuple[tuple[str, str], ...]  # what is taken out, and where it goes: see `destination`


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Which members to unpack from an archive, and limits on their number and size.

    `choose` is given the names of all members that `rules` let through, and returns those to unpack.
    """

    max_files: int
    max_bytes: int
    rules: Rules = ()
    choose: Callable[[Iterator[str]], Collection[str]] | None = None
    rows: Rows | None = None  # of a parquet table


def extract(parts: Sequence[Part], kind: str, staging: Path, contents: Contents,
            progress: Progress | None = None) -> Iterator[Written]:
    """Write the files of an archive, whose bytes are those of all `parts`, below `staging`; yields each that is whole.

    `staging` must belong to this very archive. What a killed call left there stays where the CRC-32 in the archive (a
    zip) says that it is whole, and is written anew otherwise.

    Raises:
        ArchiveError: the archive is broken or unsafe; nothing is left in `staging`.
        UserError: too little disk is free; what is whole in `staging` stays.
    """
    with _errors(parts[0].name, staging), contextlib.ExitStack() as stack:
        staging.mkdir(parents=True, exist_ok=True)
        archive = open_archive(parts, kind, contents.rows, stack)
        if contents.choose is None:
            check_free(staging, archive.declared_bytes - bytes_below(staging), parts[0].name)
        bar = stack.enter_context((progress or Progress()).bar(
            f"unpacking {parts[0].name}", 0 if contents.choose else archive.declared_bytes))
        empty = True
        for written in archive.extract(_accepted(archive, contents), staging, bar):
            empty = False
            yield written
        if empty:
            raise ArchiveError("holds nothing of what is expected in it: another file or release")


def _accepted(archive: Archive, contents: Contents) -> Iterator[tuple[str, Member]]:
    """(name below the staging folder, member) of all that is to be unpacked.

    Raises:
        ArchiveError: a member is unsafe, or they come to more than expected.
    """
    chosen = None
    if contents.choose:
        chosen = set(contents.choose(member.name for _, member in _placed(archive, contents.rules)))
    names: set[str] = set()
    size = 0
    for name, member in _placed(archive, contents.rules):
        if chosen is not None and member.name not in chosen:
            continue
        if not member.regular:
            raise ArchiveError(f"holds a link or device, {member.name!r}")
        if name in names:
            raise ArchiveError(f"holds the name {name!r} twice")
        names.add(name)
        size += member.size
        if len(names) > contents.max_files or size > contents.max_bytes:
            raise ArchiveError(f"unpacks to {len(names):,} files and {size:,} bytes or more: not what is expected here")
        yield name, member


def _placed(archive: Archive, rules: Rules) -> Iterator[tuple[str, Member]]:
    for member in archive.members():
        name = destination(safe_name(member.name), rules)
        if name is not None:
            yield name, member


def safe_name(name: str) -> str:
    """The member's path with "/" and without "./", or an ArchiveError where it could lead out of the folder."""
    steps = [step for step in name.split("/") if step not in ("", ".")]
    drive = steps and re.fullmatch(r"[A-Za-z]:", steps[0])
    if "\0" in name or "\\" in name or name.startswith("/") or drive or ".." in steps or not steps:
        raise ArchiveError(f"holds the unsafe name {name!r}")
    return "/".join(steps)


def destination(name: str, rules: Rules) -> str | None:
    """Where the member goes below the target, None to leave it out.

    A rule "a/*/" takes what is below these folders (`*` is any one), a rule without the final "/" takes that file.
    """
    if not rules:
        return name
    steps = name.split("/")
    for pattern, into in rules:
        wanted = pattern.rstrip("/").split("/")
        if len(steps) < len(wanted) or not all(map(fnmatchcase, steps, wanted)):
            continue
        rest = steps[len(wanted):]
        if pattern.endswith("/") and rest:
            return "/".join([*filter(None, [into.rstrip("/")]), *rest])
        if not pattern.endswith("/") and not rest:
            return into
    return None


def check_package(item: Item) -> None:
    """Raise a UserError where the package that unpacks the item is not installed."""
    package = PACKAGES.get(item.kind)
    if package and importlib.util.find_spec(package) is None:
        hint = ", or name sounds that you have: --local FOLDER" if item.kind == "parquet" else ""
        raise UserError(f"{item.name} is unpacked by the optional package {package}: pip install {package}{hint}")


def check_free(folder: Path, needed: int, what: str) -> None:
    """Raise a UserError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed / 1e9:,.1f} GB are needed for {what}, {free / 1e9:,.1f} GB are free; free "
                        "some, or give another --data-root")


@contextlib.contextmanager
def _errors(name: str, staging: Path) -> Iterator[None]:
    """Turn what decoders and the disk raise into our errors; a broken archive leaves nothing in `staging`."""
    try:
        yield
        return
    except ArchiveError as error:
        problem = f"{name} {error}"
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno == errno.ENOSPC:
                raise UserError(f"{staging.parent}: the disk is full, unpacking {name}; free some space and run again"
                                ) from None
            raise UserError(f"{error.filename or staging}: {error.strerror or error}") from None
        problem = f"{name} is broken ({type(error).__name__}: {' '.join(str(error).split())})"
    shutil.rmtree(staging, ignore_errors=True)
    raise ArchiveError(problem)


# --- The staging folder ----------------------------------------------------------------------------------------------


def staging_folder(folder: Path, item: Item, archive: str) -> Path:
    """The staging folder of the item's archive with the digest `archive`, .unpacking/ITEM-DIGEST in the set's `folder`;
    the one above it is made.

    Raises:
        UserError: that one is a link of the user's.
    """
    if (folder / STAGING).is_symlink():
        raise UserError(f"{folder / STAGING}: is a link of yours, and archives are unpacked under this name; rename it")
    (folder / STAGING).mkdir(exist_ok=True)
    return folder / STAGING / f"{item.name}-{archive}"


def staged_bytes(folder: Path, source: Source) -> int:
    """Bytes of what is unpacked in the staging folders of the set already."""
    return sum(map(bytes_below, _left_in(folder / STAGING, _names(source))))


def clear_staging(folder: Path, source: Source) -> None:
    """Remove the staging folders that this command, or one that was killed, left; what else is beside them stays."""
    remove_below(folder / STAGING, _names(source))


def remove_below(staging: Path, names: str) -> None:
    """Remove what lies in the folder `staging` under names that the regular expression `names` matches, and the folder
    when it is empty then. Links, and what lies behind them, stay."""
    for left in _left_in(staging, names):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        staging.rmdir()  # only when empty


def _left_in(staging: Path, names: str) -> list[Path]:
    if staging.is_symlink() or not staging.is_dir():
        return []
    return [path for path in staging.iterdir() if re.fullmatch(names, path.name) and not path.is_symlink()]


def _names(source: Source) -> str:
    """A regular expression for the names of staging folders, and of what earlier releases made beside them."""
    items = "|".join(re.escape(item.name) for item in source.items)
    return rf"({items})-([0-9a-f]{{16}}|(?=-))(-\d+)?(\.writing|\.\d+\.old)?"


def move_into(staging: Path, target: Path, announce: Callable[[Path], Any] = lambda kept: None) -> None:
    """Move everything in `staging` into `target`: whole folders where the name is free, else file by file.

    A file already there that differs is backed up first, and `announce` is called with the backup's path; one of the
    same bytes stays. After an interruption at any moment, another call completes the move.

    Raises:
        UserError: a folder and a file have the same name, or a folder of the target is a link.
    """
    _merge(staging, target, announce)
    shutil.rmtree(staging, ignore_errors=True)


def _merge(staging: Path, target: Path, announce: Callable[[Path], Any]) -> None:
    if target.is_symlink():
        raise UserError(f"{target}: is a link to a folder of yours, which is left alone; remove the link first")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, target)
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file where a folder of the data set belongs; move it away")
    for source in sorted(staging.iterdir()):
        place = target / source.name
        if source.is_dir():
            _merge(source, place, announce)
        elif place.is_dir():
            raise UserError(f"{place}: is a folder where a file of the data set belongs; move it away")
        else:
            replace_with_backup(source, place, announce=announce)
