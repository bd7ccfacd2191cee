"""Calls in several threads: as many as told, results as they come, the next begun before a result is looked at."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from tests.project import ROOT
from trimodal.download import pipeline


def test_results_and_errors_come_with_their_keys() -> None:
    def call(number: int) -> int:
        return 12 // number

    found = dict(pipeline.results(((n, partial(call, n)) for n in range(4)), 2))
    assert [found[n] for n in (1, 2, 3)] == [12, 6, 4] and isinstance(found[0], ZeroDivisionError)
    assert list(pipeline.results([], 3)) == []


def test_so_many_run_at_a_time_and_no_more() -> None:
    lock, meeting = threading.Lock(), threading.Barrier(3)
    running: list[int] = [0, 0]

    def call() -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
        meeting.wait(60)
        with lock:
            running[0] -= 1

    assert [result for _, result in pipeline.results(((n, call) for n in range(6)), 3)] == [None] * 6
    assert running == [0, 3]


def test_the_next_call_has_begun_before_a_result_is_worked_on() -> None:
    begun = [threading.Event() for _ in range(4)]
    for number, _ in pipeline.results(((n, begun[n].set) for n in range(4)), 1):
        if number < 3:
            assert begun[number + 1].wait(60)


def test_tasks_are_taken_only_when_there_is_room() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[tuple[int, object]]:
        for number in range(100):
            taken.append(number)
            yield number, partial(int, number)

    for count, _ in enumerate(pipeline.results(tasks(), 2), 1):  # type: ignore[arg-type]
        assert len(taken) == count + 2
        if count == 5:
            break
    assert len(taken) == 7


def test_there_are_no_more_threads_than_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def counted(self: threading.Thread) -> None:
        begun.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", counted)
    assert len(list(pipeline.results(((n, int) for n in range(2)), 100_000))) == 2
    assert len(begun) == 2


def test_a_call_that_hangs_does_not_keep_the_program_from_ending() -> None:
    code = ("import time; from trimodal.download import pipeline\n"
            "for _ in pipeline.results([(1, lambda: time.sleep(10**6)), (2, lambda: 5)], 2): break")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)
