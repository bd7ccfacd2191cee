"""Command lines: mistakes of the user take one line."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from trimodal.errors import UserError
from trimodal.redaction import without_secrets


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one line, without the usage; keeps the line breaks of descriptions."""

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None):
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {without_secrets(message)}; see --help\n")


def folder_name(name: str) -> str:
    """Type of an argument: anything but nothing, which would be the folder that one happens to be in."""
    if not name.strip():
        raise argparse.ArgumentTypeError("is empty; name a path ('.' is the folder you are in)")
    return name


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
def writing_to(folder: Path) -> Iterator[None]:
    """An OSError within becomes one line that says what to do about the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space, or choose another --output-dir"
                        ) from None
