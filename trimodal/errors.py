"""Errors that the commands catch, each with an exit code of its own, and wording they share. Never imports torch."""

import difflib
import re
from collections.abc import Iterable

WHOLE = "take a whole copy of it"  # of a damaged file: true of what was fetched and of the user's own
_LINE_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2. Line breaks in the names and values that it
    quotes are shown as escapes."""

    def __str__(self) -> str:
        return _LINE_BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), super().__str__())


class ConfigError(UserError):
    """A key, type or value of the settings that is not allowed."""


class ReportedByMain(UserError):
    """A mistake that ends every process of torchrun and that the main one prints."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or a file that is not a whole checkpoint of ours; one line says which."""


class TrainingError(RuntimeError):
    """The run cannot go on: at which stage and step, why, and which checkpoint is the last good one; exit code 1."""


class Stopped(Exception):
    """The run was asked to stop, and has saved where it is if there was room. Exit code 3."""

    def __init__(self, message: str, is_saved: bool = True):
        super().__init__(message)
        self.is_saved = is_saved


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts, "1 file" or "1,200 files"; `plural` where that is not `noun` and an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def similar(name: str, known: Iterable[str]) -> str:
    """End of a message about a name that is unknown: the known one that is most like it, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}"
