"""7z archives: listed by the Python package, unpacked by a tool of the system where there is one, else by it."""

import errno
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimodal.download.members import ArchiveError
from trimodal.download.progress import Progress
from trimodal.download.remote import RemoteFile
from trimodal.errors import UserError

TOOLS = ("7zz", "7z", "7za", "bsdtar")  # several times as fast as the Python package


@dataclass(frozen=True, slots=True)
class Listed:
    name: str
    size: int  # bytes
    plain: bool  # a regular file
    crc32: int | None


def list_members(part: Path | RemoteFile) -> list[Listed]:
    """All members but folders."""
    py7zr = _py7zr(part)
    try:
        with py7zr.SevenZipFile(_start(part)) as archive:
            if archive.needs_password():
                raise ArchiveError("is encrypted")
            return [Listed(file.filename, file.uncompressed or 0,
                           not (file.is_symlink or file.is_junction or file.is_socket), file.crc32)
                    for file in archive.files if not file.is_directory]
    except (py7zr.exceptions.ArchiveError, TypeError, ValueError, OverflowError) as error:
        raise ArchiveError(f"is not a readable 7z archive ({type(error).__name__})") from None


def extract(part: Path | RemoteFile, staging: Path, size: int, progress: Progress,
            only: list[str] | None = None) -> None:
    """Everything, or `only` these, in one go: these archives are solid, so member by member would be quadratic.

    `size` is what it unpacks to, in bytes.

    Raises:
        ArchiveError: the archive is broken.
        OSError: of the disk; ENOSPC also where a tool failed and less is free than what it has not written yet.
    """
    tool = next(filter(None, map(shutil.which, TOOLS)), None)
    if tool and only is None and isinstance(part, Path):
        _run_tool(tool, part, staging, size)
    else:
        _run_py7zr(part, staging, size, progress, only)


def _start(part: Path | RemoteFile) -> Any:
    if isinstance(part, Path):
        return part
    part.seek(0)
    return io.BufferedReader(part, 1 << 16)


def _run_py7zr(part: Path | RemoteFile, staging: Path, size: int, progress: Progress, only: list[str] | None) -> None:
    py7zr = _py7zr(part)
    with progress.bar(f"unpacking {part.name}", size) as bar:

        class Callback(py7zr.callbacks.ExtractCallback):  # type: ignore[name-defined]
            """Only the end of each member is of interest; the package wants all five."""

            def report_start_preparation(self) -> None: ...
            def report_start(self, processing_file_path: str, processing_bytes: str) -> None: ...
            def report_update(self, decompressed_bytes: str) -> None: ...
            def report_warning(self, message: str) -> None: ...
            def report_postprocess(self) -> None: ...

            def report_end(self, processing_file_path: str, wrote_bytes: str) -> None:
                bar.add(int(wrote_bytes))

        try:
            with py7zr.SevenZipFile(_start(part)) as archive:
                archive.extract(staging, targets=only, callback=Callback())
        except py7zr.exceptions.ArchiveError as error:
            raise ArchiveError(f"cannot be unpacked ({type(error).__name__})") from None


def _run_tool(tool: str, path: Path, staging: Path, size: int) -> None:
    """In its folder, so that a tool that outlives a killed process cannot write into what the next one puts there."""
    command = ([tool, "-x", "--no-same-owner", "--no-same-permissions", "-f", str(path.resolve()), "-C", "."]
               if Path(tool).stem == "bsdtar" else [tool, "x", "-y", "-bd", "-o.", str(path.resolve())])
    result = subprocess.run(command, cwd=staging, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                            errors="replace")
    if result.returncode:
        if shutil.disk_usage(staging).free < size - _written(staging):  # each tool has words of its own for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging))
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise ArchiveError(f"cannot be unpacked by {Path(tool).name} ({lines[-1] if lines else result.returncode})")


def _written(folder: Path) -> int:
    """Bytes that the files below `folder` take on the disk: a tool may give a file its size before it fills it."""
    sizes = (os.lstat(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)
    return sum(min(status.st_size, getattr(status, "st_blocks", sys.maxsize) * 512) for status in sizes)


def _py7zr(part: Path | RemoteFile) -> Any:
    try:
        import py7zr
        import py7zr.callbacks
        import py7zr.exceptions
    except ImportError:
        raise UserError(f"{part.name}: 7z archives need the package py7zr; run: pip install py7zr") from None
    return py7zr
