"""Files that appear whole or not at all, what becomes of others that have their name, and locks."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BESIDE = ".tmp"  # ends the name of what is not whole yet
SET_ASIDE = re.compile(r"\.before_\d{8}_\d{6}(_\d+)?$")  # ends the name of what had to make way


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb",
              rename: Callable[[Path, Path], Any] | None = None) -> Iterator[IO[Any]]:
    """A file to write, beside `path`: synced and renamed to it at the end (by `rename`, else over what is there), or
    gone if the block fails.

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


def appearing(path: str | Path, mode: str = "wb") -> contextlib.AbstractContextManager[IO[Any]]:
    """As `replacing`, but never over what is there: raises FileExistsError instead."""
    return replacing(path, mode, _rename_to_free)


def _rename_to_free(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)
    try:
        sync_folder(path.parent)
    except OSError:
        path.unlink()
        raise


def set_aside(path: Path) -> Path:
    """Rename a file, link or folder that is not ours and in the way as `keep_beside` does, and say so; its new path."""
    place = next(place for place in _names_beside(path) if not os.path.lexists(place))
    os.rename(path, place)
    say_kept(path, place)
    return place


def say_kept(path: Path, kept: Path) -> None:
    """Print that what was at `path` is now `kept`."""
    print(f"{path}: not as this project wrote it; what was there is kept as {kept.name}", flush=True)


def remove_left(folder: Path, names: str) -> None:
    """Remove what `replacing` of killed processes left in a folder, NAME.PROCESS.tmp, of each NAME that the regular
    expression `names` matches, and nothing else."""
    ours = re.compile(rf"({names})\.\d+{re.escape(BESIDE)}")
    for left in folder.iterdir() if folder.is_dir() else ():
        if ours.fullmatch(left.name) and (left.is_symlink() or not left.is_dir()):
            left.unlink(missing_ok=True)


def settle(new: Path, place: Path, *, ours: Callable[[], bool] = lambda: False,
           tell: Callable[[Path], None] = lambda kept: None) -> Path | None:
    """Give the file `new` the name `place`, and keep what is there: it gets another name beside it, which is told
    before `place` changes and returned. What is empty, or `ours` by what the caller knows, is replaced; what has the
    same bytes stays, and `new` goes. A link is never followed: it is what is kept.

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
    there = path.lstat()
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for other in path.parent.iterdir() if there.st_nlink > 1 else ():
        if is_set_aside(other.name, path.name) and os.path.samestat(other.lstat(), there):
            return other  # of a process that was killed before it took the first name
    names = _names_beside(path)
    while True:
        kept = next(name for name in names if not os.path.lexists(name))
        tell(kept)
        try:
            os.link(path, kept, follow_symlinks=False)
        except FileExistsError:
            continue
        except (OSError, NotImplementedError):
            kept.open("x").close()
            os.replace(path, kept)
        return kept


def _names_beside(path: Path) -> Iterator[Path]:
    now = time.strftime("%Y%m%d_%H%M%S")
    yield path.with_name(f"{path.name}.before_{now}")
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}.before_{now}_{number}")


def is_set_aside(name: str, of: str = "") -> bool:
    """Whether a file of this name had to make way, for one of the name `of` where it is given."""
    match = SET_ASIDE.search(name) if ".before_" in name else None
    return match is not None and of in ("", name[: match.start()])


def same_bytes(one: Path, other: Path) -> bool:
    """Whether both are files of the same bytes; links are followed."""
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while chunk := first.read(1 << 18):
            if second.read(len(chunk)) != chunk:
                return False
    return True


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


def sync_file(path: Path) -> None:
    """Make the bytes of a file survive a power cut, before it is renamed."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; Windows cannot open a folder and needs no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks know no sync of a folder
            raise
    finally:
        os.close(handle)


def take_lock(file: IO[Any], *, of_process: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed, or its process ends, however that ends. False where the system or the disk
    has no locks: some network disks have none.

    `of_process`: our threads share the lock, and our children do not hold it as well; else it is the other way round.

    Raises:
        BlockingIOError: another one holds it, and we do not `wait`.
    """
    if os.name == "nt":
        return False
    import fcntl

    lock = fcntl.lockf if of_process else fcntl.flock
    try:
        lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(*error.args) from None
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold `path`.lock; gives what `take_lock` gave. While another holds it, `wait` is called. A file of the user's
    that has this name serves as well, and stays as it is.

    Raises:
        BlockingIOError: another one holds it, and no `wait` is given.
    """
    place = path.with_name(f"{path.name}.lock")
    while True:
        with place.open("a") as file:
            try:
                held = take_lock(file)
            except BlockingIOError:
                if wait is None:
                    raise
                wait()
                continue
            if not _is_at(file, place):
                continue  # removed by its holder just before
            try:
                yield held
            finally:
                if not place.is_symlink() and not os.fstat(file.fileno()).st_size:  # else another's
                    place.unlink(missing_ok=True)
            return


def _is_at(file: IO[Any], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False
