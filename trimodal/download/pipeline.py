"""Calls that run in several threads, their results handed back as they come, so that one thread goes on with these."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

K = TypeVar("K")
R = TypeVar("R")


def results(tasks: Iterable[tuple[K, Callable[[], R]]], threads: int) -> Iterator[tuple[K, R | BaseException]]:
    """(key, what the call gave or raised) of each task. At most so many are at work at a time, the next one is taken
    from `tasks` when one has ended and is asked for. The threads are daemons: a call that hangs never keeps the
    program."""
    todo: queue.SimpleQueue[tuple[K, Callable[[], R]] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[K, R | BaseException]] = queue.SimpleQueue()
    waiting = iter(tasks)
    running = 0
    try:
        for task in itertools.islice(waiting, threads):
            threading.Thread(target=_work, args=(todo, done), daemon=True).start()
            todo.put(task)
            running += 1
        while running:
            ended = done.get()
            running -= 1
            for task in itertools.islice(waiting, 1):  # before the result is looked at, which may take long
                todo.put(task)
                running += 1
            yield ended
    finally:
        for _ in range(threads):
            todo.put(None)


def _work(todo: "queue.SimpleQueue[tuple[K, Callable[[], R]] | None]",
          done: "queue.SimpleQueue[tuple[K, R | BaseException]]") -> None:
    while (task := todo.get()) is not None:
        key, call = task
        try:
            done.put((key, call()))
        except BaseException as error:
            done.put((key, error))
