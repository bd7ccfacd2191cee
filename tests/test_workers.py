"""Processes that work ahead: results in order, and what becomes of those that die, hang or fail."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workers
from config import UserError
from tests.test_prepare import children_of, is_alive, wait_for
from workers import NOWHERE, Workers

ROOT = Path(__file__).resolve().parent.parent

Begin = Callable[[int], None]


def ours() -> list[int]:
    """Living processes of this one's teams."""
    return sorted(process.pid or 0 for process in multiprocessing.active_children())


def results(work: Any, jobs: int, count: int = 2, timeout_s: float = 0.0,
            say: Callable[[str], None] = print, **more: Any) -> Workers:
    return Workers(work, range(jobs), count, timeout_s=timeout_s, say=say, **more,
                   name=lambda job, place: f"job {job}" if place == NOWHERE else f"place {place}")


def squares(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
    begin(job)
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
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        time.sleep(0.05 if job % 3 == 0 else 0)  # the first of three is the last to be done
        return job

    assert list(results(work, 20, count)) == list(range(20))


def test_arrays_and_tensors_arrive_as_they_were_and_are_ours_to_change() -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> dict[str, Any]:
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
        assert found["half"].data_ptr() % 64 == 0


def test_results_that_are_kept_hold_no_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = list(results(lambda job, given_up, begin: torch.full((1000,), job), 50))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert [int(tensor[999]) for tensor in kept] == list(range(50))


def test_processes_run_a_bounded_number_of_jobs_ahead(tmp_path: Path) -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        (tmp_path / str(job)).touch()
        return job

    iterator = iter(results(work, 50, count=2))
    assert next(iterator) == 0
    wait_for(lambda: len(os.listdir(tmp_path)) == 5)  # two for each process beyond the one that was taken
    time.sleep(0.2)
    assert len(os.listdir(tmp_path)) == 5
    iterator.close()


def test_a_result_is_finished_ahead_of_its_turn(tmp_path: Path) -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        (tmp_path / str(job)).touch()
        return job

    def finish(found: int) -> int:
        done.append(found)
        return -found

    done: list[int] = []
    iterator = iter(results(work, 10, count=2, finish=finish))
    next(iterator)
    wait_for(lambda: len(os.listdir(tmp_path)) == 5)
    time.sleep(0.2)  # until they have been handed over as well
    next(iterator)
    wait_for(lambda: 2 in done)
    assert list(iterator) == [-job for job in range(2, 10)]


def test_a_mistake_in_a_process_is_raised_here_with_its_place() -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        return 1 // (3 - job)

    iterator = iter(results(work, 9))
    with pytest.raises(RuntimeError, match=r"(?s)in a reading process.*test_workers\.py.*ZeroDivisionError"):
        list(iterator)
    assert ours() == []


# ---- deaths ------------------------------------------------------------------------------------------------------


def die(number: int) -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), number)


def killed_at(place: int, number: int, when: Callable[[], bool]) -> Any:
    """Work that kills its own process at a place."""
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> Any:
        begin(job)
        if job == place and job not in given_up and when():
            die(number)
        return job, dict(given_up)
    return work


def test_a_process_killed_from_outside_is_replaced_and_nothing_is_lost() -> None:
    said: list[str] = []
    found = []
    for result in results(squares, 30, say=said.append):
        found.append(result)
        if result in (9, 100):
            os.kill(ours()[0], signal.SIGKILL)
    assert found == [job**2 for job in range(30)]
    assert len(said) == 2 and all("was lost (killed by SIGKILL, perhaps for lack of memory)" in line for line in said)
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
    assert [job for job, _ in found] == list(range(6)) and not any(given_up for _, given_up in found)
    assert said == ["data: a reading process was lost (killed by SIGKILL, perhaps for lack of memory) at place 3; "
                    "another one goes on from there"]


def test_a_place_at_which_three_processes_died_is_given_up() -> None:
    said: list[str] = []
    workers = results(killed_at(3, signal.SIGSEGV, lambda: True), 6, say=said.append)
    assert [job for job, _ in workers] == list(range(6))
    assert workers.given_up == {3: "place 3: 3 reading processes were lost at it (killed by SIGSEGV)"}
    assert len(said) == 3 and said[-1] == (
        "data: place 3: 3 reading processes were lost at it (killed by SIGSEGV); it is left out")


def test_three_deaths_at_other_places_of_one_job_are_an_error_that_names_it(once: Callable[[str], bool]) -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        for place in range(3):
            begin(place)
            if job == 2 and once(str(place)):
                os._exit(7)
        return job

    found: Iterator[int] = iter(results(work, 6))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(UserError, match=r"^data: 3 reading processes were lost in a row \(it ended with code 7\), at "
                                        r"job 2; lower data\.workers .* --resume auto$"):
        next(found)
    assert ours() == []


def test_three_places_of_one_job_given_up_are_an_error() -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> None:
        for place in range(9):
            begin(place)
            if place not in given_up:
                die(signal.SIGBUS)

    with pytest.raises(UserError, match=r"^data: 3 files in a row cannot be read, the last one place 2: 3 reading "
                                        r"processes were lost at it \(killed by SIGBUS, as by a file that shrank\)"):
        list(results(work, 1, count=1))


def test_lack_of_memory_in_a_process_is_a_death(once: Callable[[str], bool]) -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        if job == 0 and once("full"):
            raise MemoryError
        return job

    said: list[str] = []
    assert list(results(work, 3, say=said.append)) == [0, 1, 2]
    assert len(said) == 1 and "was lost (out of memory) at job 0" in said[0]


# ---- standing still ----------------------------------------------------------------------------------------------


def test_a_place_that_takes_too_long_is_given_up_whether_or_not_it_is_waited_for_alone() -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> tuple[int, int]:
        for place in (10 * job, 10 * job + 1):
            begin(place)
            time.sleep(0.01 if place not in (21, 30) or place in given_up else 600)
        return job, len(given_up)

    said: list[str] = []
    workers = results(work, 6, timeout_s=1.0, say=said.append)
    assert [job for job, _ in workers] == list(range(6))
    assert workers.given_up == {place: f"place {place}: took longer than data.timeout_s=1" for place in (21, 30)}
    assert sorted(said) == [f"data: place {place}: took longer than data.timeout_s=1; it is left out"
                            for place in (21, 30)]


def test_many_quick_places_of_one_job_may_take_longer_together_than_one_of_them() -> None:
    def work(job: int, given_up: Mapping[int, str], begin: Begin) -> int:
        for place in range(12):
            begin(place)
            time.sleep(0.2)
        return job

    assert list(results(work, 1, count=1, timeout_s=1.5)) == [0]


def test_a_process_that_stands_still_at_no_place_is_replaced() -> None:
    said: list[str] = []
    iterator = iter(results(squares, 30, count=1, timeout_s=1.0, say=said.append))
    assert next(iterator) == 0
    os.kill(ours()[0], signal.SIGSTOP)
    assert list(iterator) == [job**2 for job in range(1, 30)]
    assert len(said) == 1 and "was lost (hung for 1 s) at " in said[0]
    assert ours() == []


def test_a_process_that_starts_late_has_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, said = workers._serve, list[str]()

    def late(*given: Any) -> None:
        time.sleep(1.5)
        serve(*given)

    monkeypatch.setattr(workers, "_serve", late)
    assert list(results(squares, 9, timeout_s=0.5, say=said.append)) == [job**2 for job in range(9)]
    assert said == []
    monkeypatch.setattr(workers, "STARTING_S", 0.1)
    with pytest.raises(UserError, match=r"3 reading processes were lost in a row \(hung for 0\.5 s\)"):
        list(results(squares, 9, timeout_s=0.5))


def test_a_slow_main_process_takes_nobody_for_hung(once: Callable[[str], bool]) -> None:
    said: list[str] = []
    for _ in results(lambda job, given_up, begin: time.sleep(0.3), 4, count=1, timeout_s=0.9, say=said.append):
        time.sleep(1.2)
    assert said == []


# ---- the end -----------------------------------------------------------------------------------------------------


def test_fewer_processes_go_on_where_the_system_gives_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    start, given = workers._start, iter([True, True, False, False])

    def limited(work: Any) -> Any:
        if not next(given):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(work)

    monkeypatch.setattr(workers, "_start", limited)
    said: list[str] = []
    assert list(results(squares, 20, count=3, say=said.append)) == [job * job for job in range(20)]
    assert said == ["data: reading processes: no more than 2 can be started (Resource temporarily unavailable); "
                    "data.workers asks for 3"]
    with pytest.raises(UserError, match=r"no reading process can be started \(Resource .*data\.workers=0"):
        list(results(squares, 20))


def test_leaving_early_ends_the_processes_even_those_that_hang() -> None:
    iterator = iter(results(lambda job, given_up, begin: time.sleep(600 * (job > 0)), 9, count=3))
    next(iterator)
    assert len(ours()) == 3
    iterator.close()
    assert ours() == []


HANG = """
import os, sys, time
from workers import Workers
def work(job, given_up, begin):
    begin(job)
    time.sleep(600 * (job > 0))
reads = iter(Workers(work, range(9), 2, timeout_s=0, name=lambda *_: "", say=print))
next(reads)
print("here", flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_processes_end_with_the_main_one(how: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANG], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    children = children_of(process.pid)
    assert len(children) == 2
    if how == "killed":
        process.kill()
    process.stdin.close()
    process.wait(timeout=60)
    wait_for(lambda: not any(is_alive(child) for child in children))
