"""Work in several threads, and one display of it: on a terminal a line for each file (bytes, rate, time left) and one
for all of them; elsewhere nothing."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from typing import IO, Any, TypeVar

K = TypeVar("K")
R = TypeVar("R")


def in_threads(tasks: Iterable[tuple[K, Callable[[], R]]], threads: int) -> Iterator[tuple[K, Future[R]]]:
    """(key, ended call) of each task, as they end. So many run at a time: the next one is taken from `tasks` when the
    result of one is asked for, so that no more than these run ahead."""
    waiting = iter(tasks)
    running = {_begin(call): key for key, call in itertools.islice(waiting, threads)}
    while running:
        ended = next(as_completed(running))
        key = running.pop(ended)
        for next_key, call in itertools.islice(waiting, 1):  # before the result is looked at, which may take long
            running[_begin(call)] = next_key
        yield key, ended


def _begin(call: Callable[[], R]) -> Future[R]:
    """Start the call in a thread that does not keep the program from ending, as those of an Executor would."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


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
        """Take `size` bytes off the total of the overall bar: they are on the disk already."""
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
