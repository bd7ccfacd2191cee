"""Files that appear whole or not at all, second names for what would be overwritten, and locks between processes."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout

BESIDE = ".tmp"  # ends the name of what is not whole yet
SET_ASIDE = re.compile(r"\.before_\d{8}_\d{6}(_\d+)?$")  # ends the name of what had to make way
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that knows none


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb",
              rename: Callable[[Path, Path], Any] | None = None) -> Iterator[IO[Any]]:
    """A file to write, beside `path`: synced and renamed to it at the end (over what is there, unless `rename` keeps
    that), or gone if the block fails.

    with replacing("config.yaml", "w") as file:
        file.write(text)
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{BESIDE}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (rename or os.replace)(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # renamed already, or the disk is read-only
            temporary.unlink()


def rename_to_free(temporary: Path, path: Path) -> None:
    """Rename a file, but never over what is there: raises FileExistsError instead."""
    try:
        os.link(temporary, path)
    except OSError:  # what the next line says, or a disk without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)


def remove_left(folder: Path, names: str) -> None:
    """Remove what `replacing` of killed processes left in a folder, NAME.PROCESS.tmp, of each NAME that the regular
    expression `names` matches, and nothing else."""
    ours = re.compile(rf"({names})\.\d+{re.escape(BESIDE)}")
    for left in folder.iterdir() if folder.is_dir() else ():
        if ours.fullmatch(left.name) and (left.is_symlink() or not left.is_dir()):
            left.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make the bytes of a file survive a power cut, before it is renamed."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks know no sync of a folder
            raise
    finally:
        os.close(handle)


def replace_with_backup(new: Path, path: Path, *, may_overwrite: Callable[[], bool] = lambda: False,
                        announce: Callable[[Path], None] = lambda kept: None) -> Path | None:
    """Rename the file `new` to `path`, after giving a file that is already there a backup name (see `back_up`).

    No backup is made of an empty file, nor where `may_overwrite()` is true, as for a file that this project wrote: it
    is replaced. Where `path` already holds the same bytes, it stays as it is and `new` is deleted. A link at `path` is
    backed up as a link, whatever it leads to.

    Args:
        may_overwrite: only called where something else than `new` is at `path`.
        announce: called with the path of the backup, before anything at `path` changes.

    Returns:
        The path of the backup, or None where none was made.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    kept = None
    if os.path.lexists(path):
        if same_bytes(new, path):
            new.unlink()
            return None
        if not may_overwrite() and (path.is_symlink() or path.stat().st_size):
            kept = back_up(path, announce)
    os.replace(new, path)
    return kept


def back_up(path: Path, announce: Callable[[Path], None] = lambda kept: None) -> Path:
    """Hard-link a file to a new name in its folder, NAME.before_DATE_TIME, so that `os.replace` over it loses nothing.

    Where the file system has no hard links, the file is moved to that name. If an earlier process made the link and was
    killed before it replaced the file, that link is used. A symbolic link is itself backed up, not what it leads to.

    Args:
        announce: called with the new path before it is made; not called for the link of an earlier process.

    Returns:
        The path of the backup.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for other in path.parent.glob("*.before_*") if path.lstat().st_nlink > 1 else ():
        if is_set_aside(other.name, path.name) and os.path.samestat(other.lstat(), path.lstat()):
            return other  # of a process that was killed before it took the first name
    kept = _free_name(path)
    announce(kept)
    try:
        os.link(path, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        kept.open("x").close()
        os.replace(path, kept)
    return kept


def set_aside(path: Path) -> Path:
    """Rename a file, link or folder to NAME.before_DATE_TIME and print that; returns its new path."""
    place = _free_name(path)
    os.rename(path, place)
    say_kept(path, place)
    return place


def say_kept(path: Path, kept: Path) -> None:
    """Print that what was at `path` is now `kept`."""
    print(f"{path}: not as this project wrote it; what was there is kept as {kept.name}", flush=True)


def _free_name(path: Path) -> Path:
    now = time.strftime("%Y%m%d_%H%M%S")
    ends = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    places = (path.with_name(f"{path.name}.before_{now}{end}") for end in ends)
    return next(place for place in places if not os.path.lexists(place))


def is_set_aside(name: str, of: str = "") -> bool:
    """Whether `name` is a backup name, NAME.before_DATE_TIME; where `of` is given, of the file called `of`."""
    match = SET_ASIDE.search(name)
    return match is not None and of in ("", name[: match.start()])


def same_bytes(one: Path, other: Path) -> bool:
    """Whether both are files of the same bytes; links are followed."""
    return (one.is_file() and other.is_file() and one.stat().st_size == other.stat().st_size
            and sha256_of(one) == sha256_of(other))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and below it, 0 where there is none; links count as themselves."""
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(folder) for name in names)


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, which goes again; raises OSError where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def nearest_existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def hold_lock(path: Path, say_waiting: Callable[[], Any] | None = None, *, reentrant: bool = True,
              pause: Callable[[float], Any] = time.sleep) -> BaseFileLock | None:
    """Take an exclusive lock on the file `path`, waiting while another process holds it.

    The lock ends with `release()`, when the returned object is garbage-collected, or when this process ends, even if it
    is killed. Child processes do not inherit it. The lock file is created where it is missing and is not deleted; a
    file of the user's of that name is left alone, and NAME.lock is locked instead.

    Args:
        say_waiting: called once if another process holds the lock; None: do not wait but raise.
        reentrant: True: this process may take the lock again while it holds it; False: its threads exclude each other.
        pause: called with the seconds to wait between tries.

    Returns:
        The lock, or None on a file system without locks.

    Raises:
        BlockingIOError: the lock is held elsewhere, and `say_waiting` is None.
    """
    lock = FileLock(_lock_file(path), thread_local=False, fallback_to_soft=False, preserve_lock_file=True,
                    is_singleton=reentrant)
    is_said = False
    while True:
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            if say_waiting is None:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            raise
        if not is_said:
            say_waiting()
            is_said = True
        pause(0.1)


@contextlib.contextmanager
def locked(path: Path, say_waiting: Callable[[], Any] | None = None,
           pause: Callable[[float], Any] = time.sleep) -> Iterator[bool]:
    """Hold the lock file `path`.lock for the length of the block, against other processes and threads (`hold_lock`).

    Yields True, or False where the file system has no locks. The lock file is deleted at the end if it is empty.

    Raises:
        BlockingIOError: the lock is held elsewhere, and `say_waiting` is None.
    """
    place = _lock_file(path.with_name(f"{path.name}.lock"))
    lock = hold_lock(place, say_waiting, reentrant=False, pause=pause)
    try:
        yield lock is not None
    finally:
        with contextlib.suppress(FileNotFoundError):
            if not place.stat().st_size:
                place.unlink()  # before the release: who waits sees that the file is gone, and makes another
        if lock:
            lock.release()


def _lock_file(place: Path) -> Path:
    """`place`, or NAME.lock where `place` is a file with content, taken to be the user's: some releases of filelock
    empty the file that they lock."""
    is_of_user = place.is_file() and place.stat().st_size > 0
    return _lock_file(place.with_name(f"{place.name}.lock")) if is_of_user else place
