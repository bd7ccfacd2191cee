"""Unpack zip, tar, 7z, Debian packages and parquet shards of sounds: beside the target first, then into it by renaming.

Nothing is written outside the staging folder; links, devices and encrypted members are refused; the number of files and
of bytes is bounded while they are written, whatever the archive claims. Names are kept as they are, leading blanks too.
An archive in several parts is read as one file, without a second copy on the disk. Memory does not grow with the
archive. What an interrupted unpacking left is kept where the archive's own CRC (of a zip) says that it is whole.
"""

import errno
import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimodal.download import seven_zip, shards, tar_stream, zip_stream
from trimodal.download.members import ArchiveError, ByteSource, Member, Rules, destination, safe_name
from trimodal.download.progress import Progress
from trimodal.download.remote import RemoteFile
from trimodal.errors import UserError
from trimodal.files import settle

CHUNK_BYTES = 1 << 18
_AR_MAGIC = b"!<arch>\n"
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError,
           NotImplementedError)


Part = Path | RemoteFile


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is taken out of an archive (see `destination`), and the most files and bytes that it may come to.

    `choose` is given the names of all members that the rules let through, and says which of them to take.
    """

    files: int
    size: int
    rules: Rules = ()
    choose: Callable[[Iterator[str]], Collection[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    files: int
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Who wants to know: of each file that is whole in the staging folder (name, bytes, CRC-32); when all are, before
    any is renamed; and of each file that was in the way, under the name that it has then; and the display."""

    file: Callable[[str, int, int], Any] = lambda name, size, crc32: None
    staged: Callable[[Path], Any] = lambda folder: None
    kept: Callable[[Path], Any] = lambda path: None
    progress: Progress = field(default_factory=Progress)


def unpack(parts: Sequence[Part], kind: str, target: Path, staging: Path, expected: Expected,
           watcher: Watcher | None = None) -> Unpacked:
    """Unpack the archive (all `parts` of it) into `staging`, then rename all into `target`. A file that is there and
    differs is kept under another name, one of the same bytes stays.

    `staging` must be on the file system of `target`, and of this very archive: what is in it is of an interrupted call.
    Done twice, or after an interruption at any moment, the end is the same.

    Raises:
        ArchiveError: the archive is broken or unsafe; `target` is untouched.
        UserError: the disk is full, a package is missing, or a folder and a file have the same name.
    """
    watcher = watcher or Watcher()
    with _errors(parts[0].name, target):
        try:
            fill = _unpack_7z if kind == "7z" else _unpack_members
            done = fill(parts, kind, staging, expected, watcher)
            found = _look_at_tree(staging)
            if found != done:
                raise ArchiveError(f"gave {found.files:,} files and {found.size:,} bytes instead of {done.files:,} and "
                                   f"{done.size:,}: it is damaged, or holds a name twice")
            watcher.staged(staging)
            _merge(staging, target, watcher.kept)
        except Exception as error:
            if _is_damage(error):
                _remove(staging)
            raise
        _remove(staging)
    return done


def _remove(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    _beside(staging).unlink(missing_ok=True)


def _beside(staging: Path) -> Path:
    """Where a file is written before it gets its name in `staging`."""
    return staging.with_name(staging.name + ".writing")


def declared_size(parts: Sequence[Part], kind: str) -> int:
    """Bytes that the archive says it unpacks to; 0 where only unpacking would tell."""
    with _errors(parts[0].name, Path(parts[0].name)), ExitStack() as stack:
        if kind == "zip":
            return sum(member.size for member in _zip_members(parts, (), stack))
        if kind == "7z":
            return sum(listed.size for listed in seven_zip.list_members(parts[0]))
        return 0


def _unpack_members(parts: Sequence[Part], kind: str, staging: Path, expected: Expected,
                    watcher: Watcher) -> Unpacked:
    files = size = 0
    members = {"zip": _zip_members, "tar": _tar_members, "deb": _deb_members, "parquet": _parquet_members}[kind]
    resumed = staging.exists()
    staging.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        bar = stack.enter_context(watcher.progress.bar(f"unpacking {parts[0].name}"))
        chosen: Collection[str] | None = None
        if expected.choose:
            names = (member.name for member in members(parts, expected.rules, stack))
            chosen = expected.choose(name for name in names if destination(safe_name(name), expected.rules))
        for member in members(parts, expected.rules, stack):
            place = destination(safe_name(member.name), expected.rules)
            if place is None or (chosen is not None and member.name not in chosen):
                continue
            files += 1
            if files > expected.files:
                raise ArchiveError(f"holds more than {expected.files:,} files: not what is expected here")
            if not (resumed and _is_whole(staging / place, member)):
                length, crc32 = _write(member, staging, place, expected.size - size)
            else:
                length, crc32 = member.size, member.crc32 or 0
            size += length
            if size > expected.size:
                raise ArchiveError("unpacks to more bytes than are expected here")
            bar.add(length)
            watcher.file(place, length, crc32)
    if not files:
        raise ArchiveError("holds nothing of what is expected in it: another file or release")
    return Unpacked(files=files, size=size)


def _is_whole(path: Path, member: Member) -> bool:
    """Whether an interrupted call wrote this file to its end; only the archive's own CRC can tell after a power cut."""
    if member.crc32 is None or not path.is_file() or path.stat().st_size != member.size:
        return False
    return crc32_of(path) == member.crc32


def crc32_of(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _write(member: Member, staging: Path, place: str, allowed: int) -> tuple[int, int]:
    """(bytes, CRC-32) of the member, which is now at staging/place; written beside, so that a file there is whole."""
    path, size, crc32 = staging / place, 0, 0
    with _beside(staging).open("wb") as target:
        for chunk in member.chunks():
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
            if size > allowed:
                raise ArchiveError("unpacks to more bytes than are expected here")
            target.write(chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(_beside(staging), path)
    return size, crc32


def _merge(staging: Path, target: Path, tell: Callable[[Path], Any]) -> None:
    """Move everything into `target` by renaming, whole folders where the name is free."""
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
            _merge(source, place, tell)
        elif place.is_dir():
            raise UserError(f"{place}: is a folder where a file of the data set belongs; move it away")
        else:
            settle(source, place, tell=tell)


# --- Formats ---------------------------------------------------------------------------------------------------------


class Spans(ByteSource):
    """Pieces of files (file, first byte, length) read as one seekable file."""

    def __init__(self, spans: Sequence[tuple[Part, int, int]]) -> None:
        super().__init__(sum(length for _, _, length in spans))
        self._files = [part.open("rb", buffering=0) if isinstance(part, Path) else part for part, _, _ in spans]
        self._starts = [start for _, start, _ in spans]
        self._lengths = [length for _, _, length in spans]

    @classmethod
    def join(cls, parts: Sequence[Part]) -> "Spans":
        return cls([(part, 0, part.stat().st_size if isinstance(part, Path) else part.size) for part in parts])

    def readinto(self, buffer: Any) -> int:
        offset = self.position
        for file, start, length in zip(self._files, self._starts, self._lengths, strict=True):
            if offset < length:
                file.seek(start + offset)
                chunk = file.read(min(len(buffer), length - offset))
                buffer[: len(chunk)] = chunk
                self.position += len(chunk)
                return len(chunk)
            offset -= length
        return 0

    def close(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()
        super().close()


def _zip_members(parts: Sequence[Part], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    return zip_stream.members(stack.enter_context(io.BufferedReader(Spans.join(parts), CHUNK_BYTES)))


def _tar_members(parts: Sequence[Part], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    source = stack.enter_context(io.BufferedReader(Spans.join(parts), 1 << 18))
    yield from tar_stream.members(source, rules, stack)


def _deb_members(parts: Sequence[Part], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    """A Debian package is an `ar` of three files; the contents are its data.tar.*."""
    (path,) = parts
    assert isinstance(path, Path), "only zip and 7z archives are read from a server"
    for name, start, length in _ar_index(path):
        if name.startswith("data.tar"):
            source = stack.enter_context(io.BufferedReader(Spans([(path, start, length)]), 1 << 18))
            yield from tar_stream.members(source, rules, stack)
            return
    raise ArchiveError("holds no data.tar: not a Debian package")


def _ar_index(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, length) of each member of an `ar` file."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise ArchiveError("is not a Debian package")
        while len(header := file.read(60)) == 60:
            name, length = header[:16].decode("latin-1").rstrip(" ").rstrip("/"), header[48:58].strip()
            if header[58:60] != b"`\n" or not length.isdigit():
                raise ArchiveError("is a damaged Debian package")
            yield name, file.tell(), int(length)
            file.seek(int(length) + int(length) % 2, os.SEEK_CUR)  # members begin at even offsets


def _parquet_members(parts: Sequence[Part], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    (path,) = parts
    assert isinstance(path, Path), "only zip and 7z archives are read from a server"
    yield from shards.members(path)


# --- 7z --------------------------------------------------------------------------------------------------------------


def _unpack_7z(parts: Sequence[Part], kind: str, staging: Path, expected: Expected,
               watcher: Watcher) -> Unpacked:
    """List and judge the whole archive first, then extract it in one go."""
    assert len(parts) == 1 and not expected.rules, "no source needs these for 7z"
    listing = seven_zip.list_members(parts[0])
    if expected.choose:
        chosen = expected.choose(listed.name for listed in listing)
        listing = [listed for listed in listing if listed.name in chosen]
    for listed in listing:
        safe_name(listed.name)
        if not listed.plain:
            raise ArchiveError(f"holds a link or device, {listed.name!r}")
    done = Unpacked(files=len(listing), size=sum(listed.size for listed in listing))
    if done.files > expected.files or done.size > expected.size:
        raise ArchiveError(f"unpacks to {done.files:,} files and {done.size:,} bytes: not what is expected here")
    _move_away(staging)
    staging.mkdir(parents=True)
    only = [listed.name for listed in listing] if expected.choose else None
    seven_zip.extract(parts[0], staging, done.size, watcher.progress, only)
    for listed in listing:
        name = safe_name(listed.name)
        watcher.file(name, listed.size, crc32_of(staging / name) if listed.crc32 is None else listed.crc32)
    return done


def _move_away(staging: Path) -> None:
    """What an interrupted call left goes at once, together with a tool that may still be writing in it."""
    if staging.exists():
        old = staging.with_name(f"{staging.name}.{os.getpid()}.old")
        os.replace(staging, old)
        shutil.rmtree(old, ignore_errors=True)


def _look_at_tree(folder: Path) -> Unpacked:
    files = size = 0
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(root, name))
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise ArchiveError(f"holds a link or device, {name!r}")
            files, size = files + 1, size + status.st_size
    return Unpacked(files=files, size=size)


@contextmanager
def _errors(name: str, target: Path) -> Iterator[None]:
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{name} {error}") from None
    except (*_BROKEN, OSError) as error:
        if _is_damage(error):
            raise ArchiveError(f"{name} is broken ({type(error).__name__}: {' '.join(str(error).split())})") from None
        assert isinstance(error, OSError)
        if error.errno == errno.ENOSPC:
            raise UserError(f"{target}: the disk is full, unpacking {name}; free some space and run again") from None
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from None


def _is_damage(error: Exception) -> bool:
    """Of the archive. An OSError without a number is a decoder's, not of the disk."""
    return isinstance(error, (ArchiveError, *_BROKEN)) or (isinstance(error, OSError) and error.errno is None)
