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


def settle(new: Path, place: Path, *, ours: Callable[[], bool] = lambda: False,
           tell: Callable[[Path], None] = lambda kept: None) -> Path | None:
    """Give the file `new` the name `place`, and keep what is there under another name, which is told before `place`
    changes and returned. What is empty, or `ours` by what the caller knows, is replaced; what has the same bytes stays,
    and `new` goes. A link is never followed: it is what is kept.

    Raises:
        OSError: `place` is a folder, among others.
    """
    kept = None
    if os.path.lexists(place):
        if same_bytes(new, place):
            new.unlink()
            return None
        if not ours() and (place.is_symlink() or place.stat().st_size):
            kept = keep_beside(place, tell)
    os.replace(new, place)
    return kept


def keep_beside(path: Path, tell: Callable[[Path], None] = lambda kept: None) -> Path:
    """Give a file a second name in its folder, NAME.before_DATE_TIME, that nothing has yet; its first one is free to be
    taken by `os.replace`. Where the file system knows no second names, the file is moved."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for other in path.parent.glob("*.before_*") if path.lstat().st_nlink > 1 else ():
        if is_set_aside(other.name, path.name) and os.path.samestat(other.lstat(), path.lstat()):
            return other  # of a process that was killed before it took the first name
    kept = _free_name(path)
    tell(kept)
    try:
        os.link(path, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        kept.open("x").close()
        os.replace(path, kept)
    return kept


def set_aside(path: Path) -> Path:
    """Rename a file, link or folder that is not ours and in the way as `keep_beside` does, and say so; its new path."""
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
    """Whether a file of this name had to make way, for one of the name `of` where it is given."""
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


def hold_lock(place: Path, say_waiting: Callable[[], Any] | None = None, *, of_process: bool = True,
              pause: Callable[[float], Any] = time.sleep) -> BaseFileLock | None:
    """Lock the file `place`, which stays, until `release()`, until what is returned is forgotten, or until this process
    ends, however it ends; child processes do not hold it. Where another one holds it, call `say_waiting` once, then
    `pause` between tries. `of_process`: one process may hold it several times; else its threads exclude each other as
    well. None: a file system without locks.

    Raises:
        BlockingIOError: another one holds it, and there is no `say_waiting`.
    """
    lock = FileLock(_lock_file(place), thread_local=False, fallback_to_soft=False, preserve_lock_file=True,
                    is_singleton=of_process)
    is_said = False
    while True:
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            if say_waiting is None:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(place)) from None
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
    """Hold the lock `path`.lock against other processes and threads, see `hold_lock`; False where the file system has
    no locks. The file goes at the end."""
    place = _lock_file(path.with_name(f"{path.name}.lock"))
    lock = hold_lock(place, say_waiting, of_process=False, pause=pause)
    try:
        yield lock is not None
    finally:
        with contextlib.suppress(FileNotFoundError):
            if not place.stat().st_size:
                place.unlink()  # before the release: who waits sees that the file is gone, and makes another
        if lock:
            lock.release()


def _lock_file(place: Path) -> Path:
    """`place`, or NAME.lock where the user has a file of that name: some releases of filelock empty what they lock."""
    is_of_user = place.is_file() and place.stat().st_size > 0
    return _lock_file(place.with_name(f"{place.name}.lock")) if is_of_user else place
