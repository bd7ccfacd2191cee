"""What a check of the doctor finds, and the table that shows it."""

import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimodal.errors import UserError

State = Literal["ok", "warn", "fail", "skipped"]

HEADER = ("check", "state", "what was found", "what to do")
LEAST_FOUND = 60  # width of what was found; a terminal that is too narrow then breaks the lines


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it is, what is there, and a command or setting where it could be better."""

    check: str
    state: State
    found: str
    advice: str = ""


def of_error(check: str, error: Exception) -> Finding:
    """A mistake of the user as it says itself: what it is, then what to do; anything else with its place."""
    if isinstance(error, UserError):
        found, _, advice = str(error).rpartition("; ")
        return Finding(check, "fail", found or advice, advice if found else "")
    if isinstance(error, OSError) and error.filename:
        return Finding(check, "fail", f"{error.filename}: {error.strerror}", "mend the file, the disk or its rights")
    message = " ".join(str(error).split())[:300]
    if _is_out_of_memory(error):
        return Finding(check, "fail", f"out of memory: {message or type(error).__name__}",
                       "end other programs on the device, or a smaller model.size")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(check, "fail", f"{type(error).__name__}: {message} ({place.filename}, line {place.lineno})",
                   "bash setup_environment.sh mends the environment; if it stays, report this row")


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # which is not loaded for this: it may be what is broken
        return isinstance(error, MemoryError)
    from trimodal.memory.devices import is_out_of_memory

    return is_out_of_memory(error)


def guarded(title: str, look: Callable[..., Iterable[Finding]], *given: Any) -> Iterator[Finding]:
    """The rows of a check; whatever it raises is a row as well."""
    try:
        yield from look(*given)
    except Exception as error:
        yield of_error(title, error)


def format_table(findings: Sequence[Finding], width: int) -> str:
    """Aligned columns in `width` characters: what is found is broken into lines where it must. What to do is not, so
    that commands can be copied."""
    rows = [HEADER, *((one.check, one.state, one.found, one.advice) for one in findings)]
    longest = [max(len(line) for row in rows for line in row[i].split("\n")) for i in range(4)]
    room = width - longest[0] - longest[1] - longest[3] - 6
    widths = [longest[0], longest[1], min(longest[2], max(room, LEAST_FOUND)), longest[3]]
    lines = []
    for row in [rows[0], tuple("-" * n for n in [*widths[:3], len(HEADER[3])]), *rows[1:]]:
        cells = [[row[0]], [row[1]], _broken(row[2], widths[2]), [row[3]]]
        for i in range(max(map(len, cells))):
            parts = [(cell[i] if i < len(cell) else "").ljust(n) for cell, n in zip(cells, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _broken(text: str, width: int) -> list[str]:
    """Lines of at most `width` where no word is longer: paths and names stay whole."""
    return [piece for line in text.split("\n")
            for piece in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]]
