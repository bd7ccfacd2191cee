"""One display of all that moves: on a terminal a line for each file (bytes, rate, time left) and one for all of them;
elsewhere nothing. Safe to use from several threads."""

import contextlib
import sys
from collections.abc import Iterator
from typing import IO, Any


class Bar:
    """The line of one file, `there` bytes of which were there before, and `overall`, the line of all transfers, which
    moves with it. Either may be missing."""

    def __init__(self, line: Any = None, overall: Any = None, there: int = 0) -> None:
        self._line, self._overall = line, overall
        self._there, self._arrived = there, 0

    def add(self, size: int) -> None:
        self._arrived += size
        for line in (self._line, self._overall):
            if line is not None:
                with line.get_lock():
                    line.update(size)

    def restart(self) -> None:
        """Begin anew: what has arrived, or was there, has to come again."""
        if self._line is not None:
            self._line.reset()
        if self._overall is not None:
            _grow(self._overall, self._there)
            Bar(self._overall).add(-self._arrived)
        self._there = self._arrived = 0


class Progress:
    """`stream` is a terminal or not; notes go through `say`, so that no line is torn. Lines are drawn at most every
    `interval_s`."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 0.1) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._overall: Any = None

    @contextlib.contextmanager
    def overall(self, title: str, total: int) -> Iterator[Bar]:
        """The line of all transfers in the block; `total` bytes are to come, 0 where it is not known."""
        with self._line(title, total) as self._overall:
            try:
                yield Bar(self._overall)
            finally:
                self._overall = None

    @contextlib.contextmanager
    def bar(self, title: str, total: int = 0, there: int = 0, *, transfer: bool = False,
            unit: str = "B") -> Iterator[Bar]:
        """The line of one file, of which `there` bytes are no speed; a `transfer` moves the line of all as well."""
        with self._line(title, total, there, unit) as line:
            if transfer:
                self.already_there(there)
            yield Bar(line, self._overall if transfer else None, there)

    def already_there(self, size: int) -> None:
        """Of what was to come, so much need not."""
        if self._overall is not None:
            _grow(self._overall, -size)

    def say(self, text: str, stream: IO[str] | None = None) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=stream or sys.stderr)
        (stream or sys.stderr).flush()

    def _line(self, title: str, total: int, there: int = 0, unit: str = "B") -> Any:
        from tqdm import tqdm

        return tqdm(total=total or None, initial=there, desc=title, unit=unit, unit_scale=True, leave=False,
                    disable=None, file=self._stream or sys.stderr, dynamic_ncols=True, mininterval=self._interval_s,
                    miniters=1)


def _grow(line: Any, size: int) -> None:
    with line.get_lock():
        line.total = (line.total or 0) + size or None
