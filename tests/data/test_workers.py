"""Processes that work ahead: results in order, and what becomes of those that die, hang or fail."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_cache import FORK, children_of, is_alive, wait_for
from tests.project import ROOT
from tests.refusals import assert_names, refused
from trimodal.data.workers import NO_ITEM, STARTING_S, Worker, Workers

pytestmark = pytest.mark.timed

Report = Callable[[int], None]


def ours() -> list[int]:
    """Living processes of this one's teams."""
    return sorted(process.pid or 0 for process in multiprocessing.active_children())


def results(work: Any, jobs: int, count: int = 2, timeout_s: float = 0.0,
            say: Callable[[str], None] = print, **more: Any) -> Workers:
    return Workers(work, range(jobs), count, timeout_s=timeout_s, say=say, **more,
                   name=lambda job, place: f"job {job}" if place == NO_ITEM else f"place {place}")


def squares(job: int, skipped: Mapping[int, str], report: Report) -> int:
    report(job)
    return job**2


@pytest.fixture
def once(tmp_path: Path) -> Callable[[str], bool]:
    """True the first time that it is asked about a name, by whichever process."""
    def first(name: str) -> bool:
        try:
            (tmp_path / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
    return first


# ---- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_their_jobs(count: int) -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        time.sleep(0.03 if job % 3 == 0 else 0)  # the first of three is the last to be done
        return job

    assert list(results(work, 9, count)) == list(range(9))


def test_arrays_and_tensors_arrive_as_they_were_and_are_ours_to_change() -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> dict[str, Any]:
        rng = np.random.default_rng(job)
        return {"empty": torch.zeros(0, 3), "half": torch.from_numpy(rng.random((5, 7))).half(), "text": "ä" * job,
                "flags": torch.tensor([True, False]), "array": rng.integers(0, 9, (job, 2)),
                "part": torch.arange(9)[::2]}

    for job, found in enumerate(results(work, 5)):
        expected = work(job, {}, lambda place: None)
        assert found.keys() == expected.keys() and found["text"] == expected["text"]
        for name in ("empty", "half", "flags", "part"):
            assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        assert np.array_equal(found["array"], expected["array"])
        found["half"].add_(1), found["array"].fill(3)


def test_results_that_are_kept_hold_no_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = list(results(lambda job, skipped, report: torch.full((1000,), job), 50))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert [int(tensor[999]) for tensor in kept] == list(range(50))


def test_processes_run_a_bounded_number_of_jobs_ahead(tmp_path: Path) -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        (tmp_path / str(job)).touch()
        return job

    iterator = iter(results(work, 50, count=2))
    assert next(iterator) == 0
    wait_for(lambda: len(os.listdir(tmp_path)) == 5)  # two for each process beyond the one that was taken
    time.sleep(0.2)
    assert len(os.listdir(tmp_path)) == 5
    iterator.close()


def test_a_result_is_finished_ahead_of_its_turn(tmp_path: Path) -> None:
    """Job 0 is done only when the result of job 1 has been finished."""
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        if job == 0:
            wait_for((tmp_path / "1").exists)
        return job

    def finish(found: int) -> int:
        (tmp_path / str(found)).touch()
        return -found

    assert list(results(work, 5, count=2, finish=finish)) == [0, -1, -2, -3, -4]


def test_a_mistake_in_a_process_is_raised_here_with_its_place() -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        return 1 // (3 - job)

    with pytest.raises(RuntimeError) as caught:
        list(results(work, 9))
    assert "test_workers.py" in str(caught.value) and "ZeroDivisionError" in str(caught.value)
    assert ours() == []


# ---- deaths ------------------------------------------------------------------------------------------------------


def die(number: int) -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), number)


def killed_at(place: int, number: int, when: Callable[[], bool]) -> Any:
    """Work that kills its own process at a place."""
    def work(job: int, skipped: Mapping[int, str], report: Report) -> Any:
        report(job)
        if job == place and job not in skipped and when():
            die(number)
        return job, dict(skipped)
    return work


def test_a_process_killed_from_outside_is_replaced_and_nothing_is_lost() -> None:
    said: list[str] = []
    found = []
    for result in results(squares, 30, say=said.append):
        found.append(result)
        if result in (9, 100):
            os.kill(ours()[0], signal.SIGKILL)
    assert found == [job**2 for job in range(30)]
    assert len(said) == 2
    for line in said:
        assert_names(line, "SIGKILL")
    assert ours() == []


def test_a_death_is_never_raised_in_the_middle_of_what_the_main_process_does() -> None:
    iterator = iter(results(squares, 5, count=1))
    next(iterator)
    [child] = ours()
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not is_alive(child))
    assert sum(range(100_000)) == 4999950000
    assert list(iterator) == [1, 4, 9, 16]


def test_a_job_is_done_again_by_another_process(once: Callable[[str], bool]) -> None:
    said: list[str] = []
    found = list(results(killed_at(3, signal.SIGKILL, lambda: once("died")), 6, say=said.append))
    assert [job for job, _ in found] == list(range(6)) and not any(skipped for _, skipped in found)
    [line] = said
    assert_names(line, "SIGKILL", "place 3")


def test_a_place_at_which_three_processes_died_is_given_up() -> None:
    said: list[str] = []
    workers = results(killed_at(3, signal.SIGSEGV, lambda: True), 6, say=said.append)
    assert [job for job, _ in workers] == list(range(6))
    [(place, reason)] = workers.skipped.items()
    assert place == 3 and len(said) == 3
    for line in (reason, *said):
        assert_names(line, "place 3", "SIGSEGV")


def test_three_deaths_at_other_places_of_one_job_are_an_error_that_names_it(once: Callable[[str], bool]) -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        for place in range(3):
            report(place)
            if job == 2 and once(str(place)):
                os._exit(7)
        return job

    found: Iterator[int] = iter(results(work, 6))
    assert [next(found), next(found)] == [0, 1]
    with refused(3, 7, "job 2", "data.workers", "--resume auto"):
        next(found)
    assert ours() == []


def test_three_places_of_one_job_given_up_are_an_error() -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> None:
        for place in range(9):
            report(place)
            if place not in skipped:
                die(signal.SIGBUS)

    with refused(3, "place 2", "SIGBUS", "data.timeout_s", "--resume auto"):
        list(results(work, 1, count=1))


def test_lack_of_memory_in_a_process_is_a_death(once: Callable[[str], bool]) -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        if job == 0 and once("full"):
            raise MemoryError
        return job

    said: list[str] = []
    assert list(results(work, 3, say=said.append)) == [0, 1, 2]
    [line] = said
    assert_names(line, "memory", "job 0")


# ---- standing still ----------------------------------------------------------------------------------------------


def test_a_place_that_takes_too_long_is_given_up_whether_or_not_it_is_waited_for_alone() -> None:
    def work(job: int, skipped: Mapping[int, str], report: Report) -> tuple[int, int]:
        for place in (10 * job, 10 * job + 1):
            report(place)
            time.sleep(600 if place in (21, 30) and place not in skipped else 0)
        return job, len(skipped)

    said: list[str] = []
    workers = results(work, 6, timeout_s=1.0, say=said.append)
    assert [job for job, _ in workers] == list(range(6))
    assert sorted(workers.skipped) == [21, 30] and len(said) == 2
    for place, line in zip((21, 30), sorted(said), strict=True):
        assert_names(line, f"place {place}", "data.timeout_s=1")
        assert_names(workers.skipped[place], f"place {place}", "data.timeout_s=1")


def worker(beats: int, *jobs: int) -> Worker:
    """A process that has begun something so often, as the main one sees it."""
    seen = Worker(process=None, link=None, pulse=[beats, 0], jobs=deque(jobs))  # type: ignore[arg-type]
    seen.watch(0.0)
    return seen


def test_time_without_a_beat_adds_up_and_each_beat_ends_it() -> None:
    """So many quick places of one job may take longer together than one of them."""
    seen = worker(1, 7)
    assert [seen.watch(0.75), seen.watch(0.75)] == [0.75, 1.5]
    seen.pulse[0] += 1
    assert [seen.watch(0.75), seen.watch(0.75)] == [0, 0.75]


def test_a_process_with_nothing_to_do_stands_not_still() -> None:
    seen = worker(1)
    assert [seen.watch(100.0), seen.watch(100.0)] == [0, 0]
    seen.jobs.append(7)
    assert seen.watch(0.5) == 0.5


def test_a_process_that_starts_late_has_more_time() -> None:
    seen = worker(0, 7)
    assert seen.watch(STARTING_S) == 0 and seen.watch(0.5) == 0.5
    seen.pulse[0] += 1
    assert seen.watch(0.5) == 0 and seen.watch(0.5) == 0.5


def test_a_process_that_stands_still_at_no_place_is_replaced() -> None:
    """It names none, so wherever the signal finds it, it is at none."""
    said: list[str] = []
    iterator = iter(results(lambda job, skipped, report: job**2, 30, count=1, timeout_s=1.0, say=said.append))
    assert next(iterator) == 0
    os.kill(ours()[0], signal.SIGSTOP)
    assert list(iterator) == [job**2 for job in range(1, 30)]
    assert len(said) == 1
    assert_names(said[0], "1 s")
    assert ours() == []


def test_a_slow_main_process_takes_nobody_for_hung(tmp_path: Path) -> None:
    """An hour passes after each of the first three results, while a process is at job 3: begun before the first result,
    and ended after the main one has looked at it once in each of these hours."""
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        report(job)
        (tmp_path / f"begun {job}").touch()
        if job in (0, 3):
            wait_for((tmp_path / ("begun 3" if job == 0 else "looked at")).exists)
        return job

    def clock() -> float:
        """It is asked as a look begins and as it ends."""
        asked.append(len(taken))
        if asked.count(3) == 3:
            (tmp_path / "looked at").touch()
        return 3600.0 * min(len(taken), 3)

    asked, taken, said = list[int](), list[int](), list[str]()
    for found in results(work, 6, timeout_s=0.9, say=said.append, clock=clock):
        taken.append(found)
    assert taken == list(range(6)) and said == []


def test_a_run_that_was_stopped_has_not_waited(tmp_path: Path) -> None:
    """A thousand seconds pass within each wait of the main one for a result, which lasts a second at most. One process
    is at job 0 meanwhile, begun before the other one ends job 1, and ends it after two results have been waited for."""
    def work(job: int, skipped: Mapping[int, str], report: Report) -> int:
        report(job)
        if job < 2:
            (tmp_path / f"begun {job}").touch()
            wait_for((tmp_path / ("third wait" if job == 0 else "begun 0")).exists)
        return job

    def clock() -> float:
        times.append(1000.0 * len(times))
        if len(times) == 5:
            (tmp_path / "third wait").touch()
        return times[-1]

    times, said = list[float](), list[str]()
    assert list(results(work, 6, timeout_s=400, say=said.append, clock=clock)) == list(range(6))
    assert said == []


# ---- the end -----------------------------------------------------------------------------------------------------


def test_fewer_processes_go_on_where_the_system_gives_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, given = os.fork, iter([True, True, False, False])

    def limited() -> int:
        if not next(given):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    said: list[str] = []
    assert list(results(squares, 20, count=3, say=said.append)) == [job * job for job in range(20)]
    [line] = said
    assert_names(line, 2, 3, "data.workers", "Resource temporarily unavailable")
    with refused("data", "Resource temporarily unavailable", "ulimit -u", "data.workers=0"):
        list(results(squares, 20))


def test_leaving_early_ends_the_processes_even_those_that_hang() -> None:
    iterator = iter(results(asleep, 9, count=3))
    next(iterator)
    assert len(ours()) == 3
    iterator.close()
    assert ours() == []


def asleep(job: int, skipped: Mapping[int, str], report: Report) -> None:
    time.sleep(600 * (job > 0))


def start_and_wait() -> None:
    """In a process of its own: two others that hang, as this one does."""
    next(reads := iter(results(asleep, 9)))
    signal.pause()
    reads.close()


def test_processes_end_with_the_main_one_that_is_killed() -> None:
    process = FORK.Process(target=start_and_wait)
    process.start()
    wait_for(lambda: len(children_of(process.pid)) == 2)
    children = children_of(process.pid)
    process.kill()
    process.join()
    wait_for(lambda: not any(is_alive(child) for child in children))


LEAVES = """
import multiprocessing
from tests.data.test_workers import asleep, results
reads = iter(results(asleep, 9))
next(reads)
print(*[process.pid for process in multiprocessing.active_children()])
"""


def test_processes_end_with_the_main_one_that_leaves_them() -> None:
    """An interpreter that comes to its end in the middle of an iteration does not wait for them."""
    found = subprocess.run([sys.executable, "-c", LEAVES], cwd=ROOT, capture_output=True, text=True, check=True)
    children = [int(pid) for pid in found.stdout.split()]
    assert len(children) == 2 and not any(is_alive(child) for child in children)


class Left:
    """Garbage of the main process, in a cycle, that ends any other which collects it."""

    def __init__(self) -> None:
        self.itself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(11)


def test_garbage_of_the_main_process_is_not_collected_by_others() -> None:
    def work(job: int, skipped: Mapping[int, str], report: Callable[[int], None]) -> int:
        gc.collect()
        return len(skipped)

    gc.disable()
    try:
        Left()
        assert list(Workers(work, range(2), 1, timeout_s=30, name=lambda job, place: "", say=print)) == [0, 0]
    finally:
        gc.enable()
