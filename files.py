"""Files that appear whole or not at all, and where they would."""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BESIDE = ".tmp"  # ends the name of what is not whole yet


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write, beside `path`: synced and renamed to it at the end, or gone if the block fails.

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
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # renamed already, or the disk is read-only
            temporary.unlink()


@contextlib.contextmanager
def appearing(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """As `replacing`, but never over what is there: raises FileExistsError instead."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{BESIDE}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def set_aside(path: Path, *, copy: bool = False) -> Path:
    """Rename, or copy, what is not ours and in the way to NAME.old or the next free name, and say so; its new path."""
    names = (f"{path.name}.old{number or ''}" for number in itertools.count())
    place = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    if copy:
        shutil.copy2(path, place)
    else:
        os.rename(path, place)
    print(f"{path}: not as this project wrote it; what was there is kept as {place.name}", flush=True)
    return place


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
    """Hold `path`.lock; gives what `take_lock` gave. While another holds it, `wait` is called.

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
                if not os.fstat(file.fileno()).st_size:  # else it is another's, of the same name
                    place.unlink(missing_ok=True)
            return


def _is_at(file: IO[Any], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False
