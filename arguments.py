"""Command lines: mistakes of the user take one line."""

import argparse
from typing import NoReturn

from redaction import redact


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one line, without the usage; keeps the line breaks of descriptions."""

    def __init__(self, description: str, epilog: str | None = None):
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {redact(message)}; see --help\n")
