"""Unpack zip, tar, 7z, Debian packages and parquet shards of sounds: beside the target first, then into it by renaming.

Nothing is written outside the staging folder; links, devices and encrypted members are refused; the number of files and
of bytes is bounded while they are written, whatever the archive claims. Names are kept as they are, leading blanks too.
An archive in several parts is read as one file, without a second copy on the disk.
"""

import bz2
import errno
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, Any

from config import UserError

Rules = tuple[tuple[str, str], ...]  # what is taken out, and where it goes: see `destination`
SEVEN_ZIP_TOOLS = ("7zz", "7z", "7za", "bsdtar")  # several times as fast as the Python package
_AR_MAGIC = b"!<arch>\n"
_SOUND_MAGIC = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError,
           NotImplementedError)


class ArchiveError(Exception):
    """The archive is broken, or holds what is never unpacked. One line."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is taken out of an archive (see `destination`), and the most files and bytes that it may come to."""

    files: int
    size: int
    rules: Rules = ()


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    files: int
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive. `open` is called at most once, before the next member is asked for."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(parts: Sequence[Path], kind: str, target: Path, staging: Path, expected: Expected,
           before_renaming: Callable[[Path], Any] = lambda folder: None) -> Unpacked:
    """Unpack the archive (all `parts` of it) into `staging`, which is emptied first, then rename all into `target`.

    `staging` must be on the file system of `target`; `before_renaming` gets it when it is complete. Done twice, or
    after an interruption at any moment, the end is the same.

    Raises:
        ArchiveError: the archive is broken or unsafe; `target` is untouched.
        UserError: the disk is full, a package is missing, or `target` holds something that would be overwritten.
    """
    with _errors(parts[0].name, target):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        try:
            done = (_unpack_7z if kind == "7z" else _unpack_members)(parts, kind, staging, expected)
            before_renaming(staging)
            _merge(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return done


def declared_size(parts: Sequence[Path], kind: str) -> int:
    """Bytes that the archive says it unpacks to; 0 where only unpacking would tell."""
    with _errors(parts[0].name, parts[0].parent), ExitStack() as stack:
        if kind == "zip":
            return sum(info.file_size for info in _open_zip(parts, stack).infolist())
        if kind == "7z":
            return sum(size for _, size, _ in _list_7z(parts[0]))
        return 0


def safe_name(name: str) -> str:
    """The member's path with "/" and without "./", or an ArchiveError where it could lead out of the folder."""
    if "\0" in name or "\\" in name or name.startswith("/") or re.match(r"(\./+)*[A-Za-z]:(/|$)", name):
        raise ArchiveError(f"holds the unsafe name {name!r}")
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if ".." in steps or not steps:
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


def _unpack_members(parts: Sequence[Path], kind: str, staging: Path, expected: Expected) -> Unpacked:
    files = size = 0
    members = {"zip": _zip_members, "tar": _tar_members, "deb": _deb_members, "parquet": _parquet_members}[kind]
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(f"unpacking {parts[0].name}"))
        for member in members(parts, expected.rules, stack):
            place = destination(safe_name(member.name), expected.rules)
            if place is None:
                continue
            files += 1
            if files > expected.files:
                raise ArchiveError(f"holds more than {expected.files:,} files: not what is expected here")
            size += _write(member, staging / place, expected.size - size, bar)
    if not files:
        raise ArchiveError("holds nothing of what is expected in it: another file or release")
    return Unpacked(files=files, size=size)


def _write(member: Member, path: Path, allowed: int, bar: Any) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    try:
        target = path.open("xb")
    except FileExistsError:
        raise ArchiveError(f"holds the name {member.name!r} twice") from None
    with target, member.open() as source:
        while chunk := source.read(1 << 18):
            size += len(chunk)
            if size > allowed:
                raise ArchiveError("unpacks to more bytes than are expected here")
            target.write(chunk)
            bar.update(len(chunk))
    return size


def _merge(staging: Path, target: Path) -> None:
    """Move everything into `target` by renaming, whole folders where the name is free."""
    if target.is_symlink():
        raise UserError(f"{target}: is a link to a folder of yours, which is left alone; remove the link first")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, target)
        return
    for source in sorted(staging.iterdir()):
        place = target / source.name
        if source.is_dir():
            _merge(source, place)
        elif place.is_dir():
            raise UserError(f"{place}: is a folder where a file of the data set belongs; move it away")
        else:
            os.replace(source, place)


# --- Formats ---------------------------------------------------------------------------------------------------------


class Spans(io.RawIOBase):
    """Pieces of files (path, first byte, length) read as one seekable file."""

    def __init__(self, spans: Sequence[tuple[Path, int, int]]) -> None:
        super().__init__()
        self._files = [path.open("rb", buffering=0) for path, _, _ in spans]
        self._starts = [start for _, start, _ in spans]
        self._lengths = [length for _, _, length in spans]
        self._position = 0

    @classmethod
    def join(cls, parts: Sequence[Path]) -> "Spans":
        return cls([(path, 0, path.stat().st_size) for path in parts])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: sum(self._lengths)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        offset = self._position
        for file, start, length in zip(self._files, self._starts, self._lengths, strict=True):
            if offset < length:
                file.seek(start + offset)
                chunk = file.read(min(len(buffer), length - offset))
                buffer[: len(chunk)] = chunk
                self._position += len(chunk)
                return len(chunk)
            offset -= length
        return 0

    def close(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()
        super().close()


def _open_zip(parts: Sequence[Path], stack: ExitStack) -> zipfile.ZipFile:
    return stack.enter_context(zipfile.ZipFile(stack.enter_context(io.BufferedReader(Spans.join(parts), 1 << 18))))


def _zip_members(parts: Sequence[Path], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    archive = _open_zip(parts, stack)
    for info in archive.infolist():
        if info.is_dir():
            safe_name(info.filename)
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise ArchiveError(f"holds a link or device, {info.filename!r}")
        if info.flag_bits & 1:
            raise ArchiveError(f"is encrypted ({info.filename!r})")
        yield Member(info.filename, info.file_size, partial(archive.open, info))


def _tar_members(parts: Sequence[Path], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    source = stack.enter_context(io.BufferedReader(Spans.join(parts), 1 << 18))
    yield from _tar_stream(source, rules, stack)


def _deb_members(parts: Sequence[Path], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    """A Debian package is an `ar` of three files; the contents are its data.tar.*."""
    (path,) = parts
    for name, start, length in _ar_index(path):
        if name.startswith("data.tar"):
            source = stack.enter_context(io.BufferedReader(Spans([(path, start, length)]), 1 << 18))
            yield from _tar_stream(source, rules, stack)
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


def _tar_stream(source: IO[bytes], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    plain = stack.enter_context(_decompressed(source))
    archive = stack.enter_context(tarfile.open(fileobj=plain, mode="r|"))
    for info in archive:
        if info.isdir():
            continue
        if not info.isreg():
            if destination(safe_name(info.name), rules) is None:
                continue  # is not unpacked anyway
            raise ArchiveError(f"holds a link or device, {info.name!r}")
        yield Member(info.name, info.size, partial(_tar_contents, archive, info))
    while plain.read(1 << 20):
        pass  # the checksum stands at the end


def _decompressed(source: IO[bytes]) -> IO[bytes]:
    """The standard readers, since tarfile's own for streams checks no checksum of gz."""
    magic = source.read(6)
    source.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=source)  # type: ignore[return-value]
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(source)
    return lzma.LZMAFile(source) if magic == b"\xfd7zXZ\0" else source


def _tar_contents(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    contents = archive.extractfile(info)
    assert contents is not None, "only regular files are asked for"
    return contents


def _parquet_members(parts: Sequence[Path], rules: Rules, stack: ExitStack) -> Iterator[Member]:
    """One sound a clip, as YOUTUBEID_START.EXT, from rows of youtube_id, start_time and audio.bytes."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{parts[0].name}: sounds in parquet files need the package pyarrow; run: "
                        "pip install pyarrow") from None
    from pyarrow import ArrowException

    seen: set[str] = set()  # a clip of val and test has five rows
    try:
        table = stack.enter_context(parquet.ParquetFile(parts[0]))
        for batch in table.iter_batches(batch_size=16, columns=["youtube_id", "start_time", "audio"]):
            for row in batch.to_pylist():
                data = row["audio"]["bytes"]
                name = f"{row['youtube_id']}_{int(float(row['start_time']))}.{_sound_suffix(data, row['youtube_id'])}"
                if name not in seen:
                    seen.add(name)
                    yield Member(name, len(data), partial(io.BytesIO, data))
    except (ArrowException, KeyError, TypeError) as error:
        raise ArchiveError(f"is not a readable shard of sounds ({type(error).__name__})") from None


def _sound_suffix(data: bytes, name: str) -> str:
    try:
        return _SOUND_MAGIC[bytes(data[:4])]
    except KeyError:
        raise ArchiveError(f"holds a sound of an unknown format ({name!r})") from None


# --- 7z --------------------------------------------------------------------------------------------------------------


def _unpack_7z(parts: Sequence[Path], kind: str, staging: Path, expected: Expected) -> Unpacked:
    """List and judge the whole archive first, extract it in one go (member by member is quadratic), look again."""
    assert len(parts) == 1 and not expected.rules, "no source needs these for 7z"
    listing = _list_7z(parts[0])
    for name, _, is_plain in listing:
        safe_name(name)
        if not is_plain:
            raise ArchiveError(f"holds a link or device, {name!r}")
    listed = Unpacked(files=len(listing), size=sum(size for _, size, _ in listing))
    if listed.files > expected.files or listed.size > expected.size:
        raise ArchiveError(f"unpacks to {listed.files:,} files and {listed.size:,} bytes: not what is expected here")
    tool = next(filter(None, map(shutil.which, SEVEN_ZIP_TOOLS)), None)
    if tool:
        _run_7z_tool(tool, parts[0], staging)
    else:
        _run_py7zr(parts[0], staging, listed.size)
    found = _look_at_tree(staging)
    if found != listed:
        raise ArchiveError(f"gave {found.files:,} files and {found.size:,} bytes instead of {listed.files:,} and "
                           f"{listed.size:,}")
    return found


def _list_7z(path: Path) -> list[tuple[str, int, bool]]:
    """(name, bytes, is a regular file) of all members but folders."""
    py7zr = _py7zr(path)
    try:
        with py7zr.SevenZipFile(path) as archive:
            if archive.needs_password():
                raise ArchiveError("is encrypted")
            return [(file.filename, file.uncompressed or 0, not (file.is_symlink or file.is_junction or file.is_socket))
                    for file in archive.files if not file.is_directory]
    except (py7zr.exceptions.ArchiveError, TypeError, ValueError, OverflowError) as error:
        raise ArchiveError(f"is not a readable 7z archive ({type(error).__name__})") from None


def _run_py7zr(path: Path, staging: Path, size: int) -> None:
    py7zr = _py7zr(path)
    with _bar(f"unpacking {path.name}", size) as bar:

        class Progress(py7zr.callbacks.ExtractCallback):  # type: ignore[name-defined]
            """Only the end of each member is of interest; the package wants all five."""

            def report_start_preparation(self) -> None: ...
            def report_start(self, processing_file_path: str, processing_bytes: str) -> None: ...
            def report_update(self, decompressed_bytes: str) -> None: ...
            def report_warning(self, message: str) -> None: ...
            def report_postprocess(self) -> None: ...

            def report_end(self, processing_file_path: str, wrote_bytes: str) -> None:
                bar.update(int(wrote_bytes))

        try:
            with py7zr.SevenZipFile(path) as archive:
                archive.extractall(staging, callback=Progress())
        except py7zr.exceptions.ArchiveError as error:
            raise ArchiveError(f"cannot be unpacked ({type(error).__name__})") from None


def _run_7z_tool(tool: str, path: Path, staging: Path) -> None:
    command = ([tool, "-x", "--no-same-owner", "--no-same-permissions", "-f", str(path.resolve()), "-C", str(staging)]
               if Path(tool).stem == "bsdtar" else [tool, "x", "-y", "-bd", f"-o{staging}", str(path.resolve())])
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise ArchiveError(f"cannot be unpacked by {Path(tool).name} ({lines[-1] if lines else result.returncode})")


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


def _py7zr(path: Path) -> Any:
    try:
        import py7zr
        import py7zr.callbacks
        import py7zr.exceptions
    except ImportError:
        raise UserError(f"{path.name}: 7z archives need the package py7zr; run: pip install py7zr") from None
    return py7zr


@contextmanager
def _errors(name: str, target: Path) -> Iterator[None]:
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{name} {error}") from None
    except _BROKEN as error:
        raise ArchiveError(f"{name} is broken ({type(error).__name__}: {' '.join(str(error).split())})") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{target}: the disk is full, unpacking {name}; free some space and run again") from None
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from None


def _bar(text: str, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=text, unit="B", unit_scale=True, leave=False, disable=None)
