"""What an archive holds, whatever its format: members with safe names, and where each goes."""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

Rules = tuple[tuple[str, str], ...]  # what is taken out, and where it goes: see `destination`


class ArchiveError(Exception):
    """The archive is broken, or holds what is never unpacked. One line."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive. `chunks` is called at most once, before the next member is asked for.

    `crc32` is what the archive says of the contents; None where it says nothing.
    """

    name: str
    size: int
    chunks: Callable[[], Iterable[bytes]]
    crc32: int | None = None


class ByteSource(io.RawIOBase):
    """Bytes to read archives from, `size` of them; whoever inherits gives `readinto`, which reads from `position` and
    moves it on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position


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
