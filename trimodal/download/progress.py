"""One display of everything that moves: on a terminal a line for each file (bytes, rate, time left) and one for all of
them; elsewhere nothing. Safe to use from several threads."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any


class Bar:
    """The line of one file. `move_to` takes the bytes that are there now, also when a transfer begins anew."""

    def __init__(self, line: Any, position: int, overall: Callable[[int, bool], None] | None) -> None:
        self._line = line
        self._position = position
        self._overall = overall

    @property
    def shown(self) -> tuple[int, int]:
        """Bytes that the line shows, and how many of them were there already and are no speed."""
        return self._line.n, self._line.initial

    def move_to(self, position: int, *, arrived: bool = True) -> None:
        """`arrived` is false for bytes that were there already: they count, but not as speed."""
        step, self._position = position - self._position, position
        _advance(self._line, step, arrived and step > 0)
        if self._overall:
            self._overall(step, arrived and step > 0)

    def add(self, size: int) -> None:
        self.move_to(self._position + size)

    def expect(self, total: int) -> None:
        """The size, where it is known only now."""
        self._line.total = total or None


class Progress:
    """`stream` is a terminal or not; errors of people and notes go through `say`, so that no line is torn. A line is
    drawn every `interval_s` at most."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 0.1) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._all: Any = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def overall(self, title: str, total: int) -> Iterator[Bar]:
        """The line for all transfers in the block; `total` is in bytes, 0 where it is not known."""
        with self._line(title, total, 0) as self._all:
            try:
                yield Bar(self._all, 0, None)
            finally:
                self._all = None

    @contextlib.contextmanager
    def bar(self, title: str, total: int = 0, position: int = 0, *, transfer: bool = False,
            unit: str = "B") -> Iterator[Bar]:
        """The line of one file; a `transfer` moves the line of all as well."""
        with self._line(title, total, position, unit) as line:
            counts = transfer and self._all is not None
            # The line of now: a thread that ends late adds nothing to the next one.
            yield Bar(line, position, partial(self._add_to, self._all) if counts else None)

    def add(self, size: int, *, arrived: bool = True) -> None:
        """To the line of all, what no bar shows."""
        if self._all is not None:
            self._add_to(self._all, size, arrived)

    def _add_to(self, line: Any, size: int, arrived: bool) -> None:
        with self._lock:
            _advance(line, size, arrived)

    def say(self, text: str, stream: IO[str] | None = None) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=stream or sys.stderr)
        (stream or sys.stderr).flush()

    def _line(self, title: str, total: int, position: int, unit: str = "B") -> Any:
        from tqdm import tqdm

        return tqdm(total=total or None, initial=position, desc=title, unit=unit, unit_scale=True, leave=False,
                    disable=None, file=self._stream or sys.stderr, dynamic_ncols=True, mininterval=self._interval_s,
                    miniters=1)


def _advance(line: Any, step: int, arrived: bool) -> None:
    if line.disable:
        return
    if arrived:
        line.update(step)
        return
    line.n += step  # no speed: neither the average since the start nor the recent one may see it
    line.initial += step
    line.last_print_n += step
    if time.time() - line.last_print_t >= line.mininterval:  # a disk gives hundreds of pieces a second
        line.refresh()
        line.last_print_t = time.time()
