"""Worker processes that read batches ahead, and what happens to a batch whose worker dies or hangs.

Each worker has a socket of its own and hands a result over as a file in memory, whose descriptor is sent once it is
whole. So a worker that dies never holds up the others or the main process, whatever it was doing. Pools with one pipe
and one lock for all workers (pebble, torch's DataLoader) hang or raise amid a training step when a worker is killed
while it sends: benchmarks/workers.py measures this.

    def work(job, skipped, report):           # in a worker; calls report(item) before it touches an item
        for item in items_of(job): report(item); ...

    for result in Workers(work, range(100), 4, timeout_s=120, name=..., say=print): ...      # in the order of the jobs

A job is the number of a batch; an item is the number of a sample or file, so that a hung or deadly one can be named.
"""

import errno
import gc
import heapq
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch

from trimodal.errors import UserError

NO_ITEM = -1  # reported by a worker that is between two items
AHEAD = 2  # jobs of each worker that are begun or waiting to be taken
TRIES = 3  # deaths in one job without a common item, or items of one job given up, that end the run
STARTING_S = 60.0  # more patience with a worker that has begun nothing yet: a busy machine starts it late
TICK_S = 1.0  # at most so long between two looks at who hangs

# Does one job in a worker: (job, reasons why some items must be skipped, function that reports the current item).
Work = Callable[[int, Mapping[int, str], Callable[[int], None]], Any]


@dataclass(eq=False)
class Worker:
    """A worker process, as the main one sees it."""

    process: Any
    link: socket.socket
    pulse: Any  # shared memory: how often the worker has reported, and the item that it reported last
    jobs: deque[int] = field(default_factory=deque)  # handed to it, the current one first
    reports: int = 0  # at the last look
    idle_s: float = 0.0  # how long the main process has waited since the last report

    def watch(self, waited_s: float) -> float:
        """Seconds without a report while it had a job; a worker that has not started yet gets STARTING_S more."""
        reports = self.pulse[0]
        self.idle_s = self.idle_s + waited_s if self.jobs and reports == self.reports else 0.0
        self.reports = reports
        return self.idle_s if reports else self.idle_s - STARTING_S


@dataclass
class Workers:
    """Iterates over the results of `jobs`, in their order, computed by `count` worker processes.

    A worker that dies is replaced, and its job done again. An item that takes longer than `timeout_s` (0: any time)
    while the main process waits, or in which three workers died, is given up: its reason goes to `skipped`, which
    `work` receives from then on. `name(job, item)` names an item, or the whole job, in messages; `say` receives a line
    for each loss; `finish` is applied to each result in a thread, ahead of time.

    Iterating raises:
        UserError: three workers died in one job, or three of its items were given up; or none can be started.
    """

    work: Work
    jobs: Sequence[int]  # ascending
    count: int
    _: KW_ONLY
    timeout_s: float
    name: Callable[[int, int], str]
    say: Callable[[str], None]
    skipped: dict[int, str] = field(default_factory=dict)
    finish: Callable[[Any], Any] | None = None
    clock: Callable[[], float] = time.monotonic  # seconds

    def __iter__(self) -> Generator[Any, None, None]:
        self._waiting = list(self.jobs)  # a heap: jobs of lost workers come first again
        self._results: dict[int, Future[Any]] = {}
        self._deaths: dict[int, list[int]] = {}  # items in which workers died, by job
        self._num_given_up: dict[int, int] = {}  # by job
        self._workers: list[Worker] = []
        self._finisher = ThreadPoolExecutor(1)
        end = weakref.finalize(self, _end, os.getpid(), self._workers, self._finisher)  # at the latest at exit
        try:
            shortage = ""
            while len(self._workers) < self.count and not shortage:
                shortage = self._add_worker()
            if shortage:
                self.say(f"data: reading processes: {shortage}; data.workers asks for {self.count}")
            for job in self.jobs:
                yield self._result(job)
        finally:
            end()

    def _add_worker(self) -> str:
        """Start a worker; return why not, where the system allows no more of them and others can go on.

        Raises:
            UserError: there are no others.
        """
        try:
            self._workers.append(_start(self.work))
            return ""
        except OSError as error:
            if not self._workers:
                raise UserError(f"data: no reading process can be started ({error.strerror}); allow more processes "
                                "(ulimit -u, or the container's limit), or set data.workers=0") from None
            return f"no more than {len(self._workers)} can be started ({error.strerror})"

    def _result(self, job: int) -> Any:
        """Wait for the result of `job`, the first that has not been taken."""
        tick_s = min(TICK_S, self.timeout_s / 4) if self.timeout_s else None
        while job not in self._results:
            self._hand_out()
            self._look(tick_s)
        self._look(0.0)
        result = self._results.pop(job)
        self._hand_out()
        found = result.result()
        if isinstance(found, Failure):
            raise found.error
        return found

    def _hand_out(self) -> None:
        """Give waiting jobs to the workers with the fewest; never so many that results could fill the memory."""
        under_way = len(self._results) + sum(len(worker.jobs) for worker in self._workers)
        for _ in range(min(AHEAD * len(self._workers) - under_way, len(self._waiting))):
            worker = min(self._workers, key=lambda one: len(one.jobs))
            job = heapq.heappop(self._waiting)
            worker.jobs.append(job)
            try:
                worker.link.sendall(pickle.dumps((job, dict(self.skipped))))
            except OSError:
                pass  # it is dead, which the next look finds

    def _look(self, patience_s: float | None) -> None:
        """Receive results, waiting for one if need be, and replace workers that died or hang."""
        start_s = self.clock()
        links = {worker.link: worker for worker in self._workers}
        ready = [links[link] for link in wait(list(links), patience_s)]  # type: ignore[index]
        for worker in ready:
            if not self._receive(worker):
                self._replace(worker, hung=False)
        if self.timeout_s:  # a run that was stopped and goes on has not waited
            waited_s = min(self.clock() - start_s, 2 * min(TICK_S, self.timeout_s / 4))
            for worker in [one for one in self._workers if one.watch(waited_s) > self.timeout_s]:
                self._replace(worker, hung=True)

    def _receive(self, worker: Worker) -> bool:
        """Receive one result; False where the worker has died."""
        try:
            _, files, _, _ = socket.recv_fds(worker.link, 1, 1)
        except OSError:
            files = []
        if files:
            self._results[worker.jobs.popleft()] = self._finisher.submit(_finished, files[0], self.finish)
        return bool(files)

    def _replace(self, worker: Worker, *, hung: bool) -> None:
        """End a worker, start another one, and decide what becomes of the job and the item."""
        if hung:
            worker.process.kill()
        worker.process.join(5)
        cause = f"hung for {self.timeout_s:g} s" if hung else _cause(worker.process.exitcode)
        for job in worker.jobs:
            heapq.heappush(self._waiting, job)
        worker.link.close()
        self._workers.remove(worker)
        cause = "; ".join(filter(None, [cause, self._add_worker()]))
        if not worker.jobs:
            self.say(f"data: a reading process was lost ({cause}) between two jobs; another one goes on")
        elif hung and worker.pulse[1] != NO_ITEM:
            self._give_up(worker.jobs[0], worker.pulse[1], f"took longer than data.timeout_s={self.timeout_s:g}")
        else:
            self._count_death(worker.jobs[0], worker.pulse[1], cause)

    def _count_death(self, job: int, item: int, cause: str) -> None:
        """Try the job again, give its item up, or end the run."""
        items = self._deaths.setdefault(job, [])
        items.append(item)
        if len(items) < TRIES:
            self.say(f"data: a reading process was lost ({cause}) at {self.name(job, item)}; another one goes on from "
                     "there")
        elif set(items) == {item} != {NO_ITEM}:
            items.clear()
            self._give_up(job, item, f"{TRIES} reading processes were lost at it ({cause})")
        else:
            raise UserError(f"data: {TRIES} reading processes were lost in a row ({cause}), at "
                            f"{self.name(job, NO_ITEM)}; lower data.workers or give them more memory, then go on "
                            "with --resume auto")

    def _give_up(self, job: int, item: int, reason: str) -> None:
        name = self.name(job, item)
        self.skipped[item] = f"{name}: {reason}"
        self._num_given_up[job] = self._num_given_up.get(job, 0) + 1
        if self._num_given_up[job] >= TRIES:
            raise UserError(f"data: {TRIES} files in a row cannot be read, the last one {name}: {reason}; see to the "
                            "disk that holds them (or raise data.timeout_s), then go on with --resume auto")
        self.say(f"data: {name}: {reason}; it is left out")


def _cause(code: int | None) -> str:
    """Words for the exit code of a worker."""
    if code == errno.ENOMEM:
        return "out of memory"
    if code is None or code >= 0:
        return f"it ended with code {code}"
    name = signal.Signals(-code).name
    hints = {"SIGKILL": ", perhaps for lack of memory", "SIGBUS": ", as by a file that shrank"}
    return f"killed by {name}{hints.get(name, '')}"


def _start(work: Work) -> Worker:
    ours, theirs = socket.socketpair()
    pulse = multiprocessing.RawArray("q", [0, NO_ITEM])
    process = multiprocessing.Process(target=_serve, args=(work, theirs, pulse), daemon=True)
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Worker(process, ours, pulse)


def _end(owner: int, workers: list[Worker], finisher: ThreadPoolExecutor) -> None:
    if os.getpid() != owner:
        return  # in a worker, which has inherited all this
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(5)
        worker.link.close()
    finisher.shutdown()


def _finished(file: int, finish: Callable[[Any], Any] | None) -> Any:
    """Read a result from its file, in the main process's thread."""
    with open(file, "rb") as content:
        content.seek(0)
        found = pickle.load(content)
    return found if finish is None or isinstance(found, Failure) else finish(found)


# ---- within a worker ------------------------------------------------------------------------------------------------


def prepare_worker() -> None:
    """In a new worker process: one thread, signals are left to the main process, and it ends when that does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # garbage of the main process must not be collected here: FFmpeg's decoders would crash


class Failure(NamedTuple):
    """Returned by a worker, in place of a result, if its job raised an exception."""

    error: Exception  # to be raised in the main process


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays: one block of bytes each."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _serve(work: Work, link: socket.socket, pulse: Any) -> None:
    """Do the jobs that come through `link` until the main process ends this one, or itself."""
    prepare_worker()

    def report(item: int) -> None:
        pulse[1] = item
        pulse[0] += 1

    jobs = link.makefile("rb")
    while True:
        try:
            job, skipped = pickle.load(jobs)
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):  # the main process was killed
            return
        report(NO_ITEM)
        try:
            file = _pickled(_attempt(work, job, skipped, report))
        except (MemoryError, OSError):  # the second where the file in memory finds no room
            os._exit(errno.ENOMEM)
        report(NO_ITEM)
        socket.send_fds(link, [b"\0"], [file])
        os.close(file)


def _attempt(work: Work, job: int, skipped: Mapping[int, str], report: Callable[[int], None]) -> Any:
    try:
        return work(job, skipped, report)
    except MemoryError:
        raise
    except UserError as error:
        return Failure(UserError(str(error)))
    except Exception:
        return Failure(RuntimeError(f"in a reading process: {traceback.format_exc()}"))


def _pickled(value: Any) -> int:
    """Descriptor of a file in memory that holds `value`."""
    file = os.memfd_create("result") if hasattr(os, "memfd_create") else os.dup(tempfile.TemporaryFile().fileno())
    with open(file, "wb", closefd=False) as content:
        _Pickler(content, protocol=5).dump(value)
    return file


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it is gone, even by kill -9
        os._exit(1)


# ---- without workers ------------------------------------------------------------------------------------------------


def in_line(work: Work, jobs: Sequence[int], skipped: Mapping[int, str]) -> Generator[Any, None, None]:
    """The same results, computed by the main process itself, which cannot help a file that hangs."""
    return (work(job, skipped, report_nothing) for job in jobs)


def report_nothing(item: int) -> None: ...


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
