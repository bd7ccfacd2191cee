"""Command lines: mistakes of the user take one line, and so does an output that cannot be written."""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from trimodal.errors import UserError
from trimodal.redaction import without_secrets


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one line, without the usage; keeps the line breaks of descriptions."""

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None):
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {without_secrets(message)}; see --help\n")


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else not unicodedata.combining(letter)
               for letter in text)


def folder_name(name: str) -> str:
    """Type of an argument: anything but nothing, which would be the folder that one happens to be in."""
    if not name.strip():
        raise argparse.ArgumentTypeError("is empty; name a path ('.' is the folder you are in)")
    return name


class Unwritten(Exception):
    """What was printed could not be written. No OSError, which would be taken for one of the file in hand."""


_unwritten: list[Callable[[str], None]] = []  # who is told, see `telling_of_output`


@contextlib.contextmanager
def telling_of_output(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, no line that cannot be written ends what is being done: `tell` learns why, and it is left out."""
    _unwritten.append(tell)
    try:
        yield
    finally:
        _unwritten.remove(tell)


class _Output:
    """A stream that raises Unwritten for what it cannot write, or tells who wants to know."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._told(self._stream.write, text)

    def flush(self) -> None:
        self._told(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @staticmethod
    def _told(work: Callable[..., Any], *given: str) -> Any:
        try:
            return work(*given)
        except OSError as error:
            if not _unwritten:
                raise Unwritten(error.strerror) from error
            _unwritten[-1](str(error.strerror))
            return 0


def exit_code(main: Callable[[], int]) -> int:
    """Run a command: what its `main` returns; where stdout cannot be written, 2 after one line, or 141 where its reader
    has had enough, as `head` has."""
    if (stream := sys.stdout) is None:  # closed by the caller, who wants nothing printed
        return main()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # names of files have letters that a terminal may lack
    output = _Output(stream)
    try:
        with contextlib.redirect_stdout(cast(TextIO, output)):
            try:
                return main()
            finally:
                output.flush()
    except Unwritten as unwritten:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the end of Python writes what is left
        if isinstance(unwritten.__cause__, BrokenPipeError):
            return 141
        print(f"error: the output cannot be written ({unwritten}); free space, or send it elsewhere", file=sys.stderr)
        return 2


@contextlib.contextmanager
def environment_needed(*loaded_later: str) -> Iterator[None]:
    """For the imports on top of a script: without the environment one line tells how to get it, and the script ends."""
    try:
        yield
        for name in loaded_later:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
    except ModuleNotFoundError as missing:
        print(f"error: the package {missing.name!r} is not there; source venv/bin/activate, or first "
              "bash setup_environment.sh", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """An OSError within, as pathlib raises it in a folder that is closed to the user, becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}); allow it, or name another one") from None


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """An OSError within becomes one line that says what to do about the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space, or choose another --output-dir"
                        ) from None
