"""Processes that work ahead of the main one, with exact word of what one was at when it died or hung.

Each process has a socket of its own, and hands a result over as a file in memory whose descriptor is sent once it is
whole. So whatever happens to one process, the others and the main one never wait for it, and half a result never
arrives. (The loader of torch.utils.data has one pipe and one lock for all of its processes, and raises what befell one
of them in the middle of whatever the main process does, half an update of the weights included.)

    def work(job, given_up, begin):       # in a process; says begin(place) before each part of the job
        for place in places_of(job): begin(place); ...

    for result in Workers(work, range(100), 4, timeout_s=120, name=..., say=print): ...      # in the order of the jobs
"""

import concurrent.futures
import errno
import gc
import heapq
import io
import math
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
from dataclasses import KW_ONLY, dataclass, field
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch

from trimodal.errors import UserError

NOWHERE = -1  # the place of a process that is between two places
AHEAD = 2  # results of each process that are begun or waiting
TRIES = 3  # deaths at one job without a common place, or places given up of one job, that end the run
STARTING_S = 60.0  # more patience with a process that has begun nothing yet: a busy machine starts it late
TICK_S = 1.0  # at most so long between two looks at who hangs
ALIGNMENT = 64  # bytes, of each array in a result


# One job, within a process. It is shown why some places are not to be touched again, and says the number of each place
# before it works at it, and NOWHERE before what belongs to none.
Work = Callable[[int, Mapping[int, str], Callable[[int], None]], Any]


class Loss(NamedTuple):
    """A process that died, or was killed since it hung."""

    job: int | None  # at which it was; None: it had nothing to do
    place: int
    cause: str
    hung: bool


class Lost(Exception):
    """Processes were lost; others have taken their places and their jobs."""

    def __init__(self, losses: list[Loss]):
        super().__init__(losses)
        self.losses = losses


@dataclass
class Workers:
    """Results of `jobs`, in their order, by `count` processes, whatever happens to some of them.

    A process that dies is replaced, and its job done again. A place at which a process stays longer than `timeout_s`
    (0: any time) while the main one waits, or at which three have died, is given up: its number and the reason are in
    `given_up`, which `work` is shown from then on. `name(job, place)` says in words what a place is, or the whole job.
    `say` hears a line for each loss; `finish` is done to each result in a thread, ahead of time.

    Iterating raises:
        UserError: three processes died at one job, or three of its places were given up.
    """

    work: Work
    jobs: Sequence[int]  # ascending
    count: int
    _: KW_ONLY
    timeout_s: float
    name: Callable[[int, int], str]
    say: Callable[[str], None]
    given_up: dict[int, str] = field(default_factory=dict)
    finish: Callable[[Any], Any] | None = None
    clock: Callable[[], float] = time.monotonic  # seconds

    def __iter__(self) -> Generator[Any, None, None]:
        self._deaths: dict[int, list[int]] = {}
        self._dropped: dict[int, int] = {}
        team = Team(self.work, self.jobs, self.count, self.timeout_s, self.finish, self.clock)
        try:
            if team.shortage:
                self.say(f"data: reading processes: {team.shortage}; data.workers asks for {self.count}")
            for job in self.jobs:
                yield self._result(team, job)
        finally:
            team.end()

    def _result(self, team: "Team", job: int) -> Any:
        while True:
            try:
                return team.take(job, self.given_up)
            except Lost as lost:
                for loss in lost.losses:
                    self._judge(loss)

    def _judge(self, loss: Loss) -> None:
        """Try the job again, give up a place of it, or end."""
        if loss.job is None:
            self.say(f"data: a reading process was lost ({loss.cause}) between two jobs; another one goes on")
            return
        name = self.name(loss.job, loss.place)
        if loss.hung and loss.place != NOWHERE:
            self._give_up(loss, name, f"took longer than data.timeout_s={self.timeout_s:g}")
            return
        places = self._deaths.setdefault(loss.job, [])
        places.append(loss.place)
        if len(places) < TRIES:
            self.say(f"data: a reading process was lost ({loss.cause}) at {name}; another one goes on from there")
        elif set(places) == {loss.place} != {NOWHERE}:
            places.clear()
            self._give_up(loss, name, f"{TRIES} reading processes were lost at it ({loss.cause})")
        else:
            raise UserError(f"data: {TRIES} reading processes were lost in a row ({loss.cause}), at "
                            f"{self.name(loss.job, NOWHERE)}; lower data.workers or give them more memory, then go on "
                            "with --resume auto")

    def _give_up(self, loss: Loss, name: str, reason: str) -> None:
        assert loss.job is not None
        self.given_up[loss.place] = f"{name}: {reason}"
        self._dropped[loss.job] = self._dropped.get(loss.job, 0) + 1
        if self._dropped[loss.job] >= TRIES:
            raise UserError(f"data: {TRIES} files in a row cannot be read, the last one {name}: {reason}; see to the "
                            "disk that holds them (or raise data.timeout_s), then go on with --resume auto")
        self.say(f"data: {name}: {reason}; it is left out")


# ---- the main process's side ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Member:
    """A process, as the main one sees it."""

    process: Any
    link: socket.socket
    pulse: Any  # shared: how often the process has begun something, and the place it began last
    jobs: deque[int] = field(default_factory=deque)  # handed to it, the one it is at first
    beats: int = 0
    still_s: float = 0.0  # how long the main process has waited and seen no beat

    def watch(self, waited_s: float) -> float:
        """How long it has not moved though it had a job; what its start may take beside that does not count."""
        beats = self.pulse[0]
        self.still_s = self.still_s + waited_s if self.jobs and beats == self.beats else 0.0
        self.beats = beats
        return self.still_s if beats else self.still_s - STARTING_S


class Team:
    """The processes: hands out jobs, takes in results, replaces who is lost."""

    def __init__(self, work: Work, jobs: Sequence[int], count: int, timeout_s: float,
                 finish: Callable[[Any], Any] | None, clock: Callable[[], float]):
        self.work, self.timeout_s, self.clock = work, timeout_s or math.inf, clock
        self.tick_s = min(TICK_S, timeout_s / 4) if timeout_s else None
        self.waiting = list(jobs)  # a heap: what was lost comes first again
        self.found: dict[int, concurrent.futures.Future[Any]] = {}
        self.finish = finish
        self.finisher = concurrent.futures.ThreadPoolExecutor(1, initializer=_use_device, initargs=(_device(),))
        self.members: list[Member] = []
        self.end = weakref.finalize(self, _end, os.getpid(), self.members, self.finisher)  # at the latest at exit
        self.shortage = ""  # why there are fewer than `count`
        while len(self.members) < count and not self.shortage:
            self.shortage = self._add_member()

    def _add_member(self) -> str:
        """Start a process; why not, where the system gives no more of them and others can go on.

        Raises:
            UserError: there are no others.
        """
        try:
            self.members.append(_start(self.work))
            return ""
        except OSError as error:
            if not self.members:
                raise UserError(f"data: no reading process can be started ({error.strerror}); allow more processes "
                                "(ulimit -u, or the container's limit), or set data.workers=0") from None
            return f"no more than {len(self.members)} can be started ({error.strerror})"

    def take(self, job: int, given_up: Mapping[int, str]) -> Any:
        """The result of `job`, the first one that has not been taken.

        Raises:
            Lost: processes that were lost meanwhile; call it again.
        """
        while True:
            self._hand_out(given_up)
            losses = self._look(0.0 if job in self.found else self.tick_s)
            if losses:
                raise Lost(losses)
            if job in self.found:
                found = self.found.pop(job)
                self._hand_out(given_up)
                return _opened(found.result())

    def _hand_out(self, given_up: Mapping[int, str]) -> None:
        """To who has least to do; never so much that results could fill the memory."""
        room = AHEAD * len(self.members) - len(self.found) - sum(len(member.jobs) for member in self.members)
        for _ in range(min(room, len(self.waiting))):
            member = min(self.members, key=lambda one: len(one.jobs))
            job = heapq.heappop(self.waiting)
            member.jobs.append(job)
            try:
                member.link.sendall(pickle.dumps((job, dict(given_up))))
            except OSError:
                pass  # it is dead, which the next look finds

    def _look(self, patience_s: float | None) -> list[Loss]:
        """Take in what has come, waiting for something to come if need be; who was lost."""
        start_s = self.clock()
        links = {member.link: member for member in self.members}
        ready = wait(list(links), patience_s)
        losses = [loss for link in ready if (loss := self._receive(links[link]))]  # type: ignore[index]
        waited_s = self.clock() - start_s
        if self.tick_s is not None:
            waited_s = min(waited_s, 2 * self.tick_s)  # a run that was stopped and goes on has not waited
            losses += [self._replace(member, hung=True) for member in list(self.members)
                       if member.watch(waited_s) > self.timeout_s]
        return losses

    def _receive(self, member: Member) -> Loss | None:
        try:
            _, files, _, _ = socket.recv_fds(member.link, 1, 1)
        except OSError:
            files = []
        if not files:
            return self._replace(member, hung=False)
        self.found[member.jobs.popleft()] = self.finisher.submit(_finished, files[0], self.finish)
        return None

    def _replace(self, member: Member, *, hung: bool) -> Loss:
        if hung:
            member.process.kill()
        member.process.join(5)
        cause = f"hung for {self.timeout_s:g} s" if hung else _cause(member.process.exitcode)
        for job in member.jobs:
            heapq.heappush(self.waiting, job)
        member.link.close()
        self.members.remove(member)
        cause = "; ".join(filter(None, [cause, self._add_member()]))
        return Loss(member.jobs[0] if member.jobs else None, member.pulse[1], cause, hung)


def _cause(code: int | None) -> str:
    """How a process ended."""
    if code == errno.ENOMEM:
        return "out of memory"
    if code is None or code >= 0:
        return f"it ended with code {code}"
    name = signal.Signals(-code).name
    hints = {"SIGKILL": ", perhaps for lack of memory", "SIGBUS": ", as by a file that shrank"}
    return f"killed by {name}{hints.get(name, '')}"


def _start(work: Work) -> Member:
    ours, theirs = socket.socketpair()
    pulse = multiprocessing.RawArray("q", [0, NOWHERE])
    process = multiprocessing.Process(target=_serve, args=(work, theirs, pulse), daemon=True)
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Member(process, ours, pulse)


def _end(owner: int, members: list[Member], finisher: concurrent.futures.ThreadPoolExecutor) -> None:
    if os.getpid() != owner:
        return  # in one of our processes, which has inherited all this
    for member in members:
        member.process.kill()
    for member in members:
        member.process.join(5)
        member.link.close()
    finisher.shutdown()


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


# ---- a process's side -----------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A mistake of ours in a process, to be raised in the main one."""

    text: str


def _serve(work: Work, link: socket.socket, pulse: Any) -> None:
    """Do the jobs that come through `link` until the main process ends this one, or itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the main process decides what they mean
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what the main process has left to be collected is not of this one: FFmpeg's decoders would crash

    def begin(place: int) -> None:
        pulse[1] = place
        pulse[0] += 1

    jobs = link.makefile("rb")
    while True:
        try:
            job, given_up = pickle.load(jobs)
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):  # the last two: killed while it sent a job
            return
        begin(NOWHERE)
        try:
            file = _packed(_attempt(work, job, given_up, begin))
        except (MemoryError, OSError):  # of the file in memory
            os._exit(errno.ENOMEM)
        begin(NOWHERE)
        socket.send_fds(link, [b"\0"], [file])
        os.close(file)


def _attempt(work: Work, job: int, given_up: Mapping[int, str], begin: Callable[[int], None]) -> Any:
    try:
        return work(job, given_up, begin)
    except MemoryError:
        raise
    except Exception:
        return Failure(traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it is gone, even by kill -9
        os._exit(1)


# ---- results in memory files ----------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors on the host out, as numpy does with those of arrays."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _packed(value: Any) -> int:
    """Descriptor of a file in memory: how many parts, where each ends, then the parts, the first one the pickle."""
    head, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [head.getbuffer(), *(buffer.raw() for buffer in buffers)]
    bounds, end = [len(parts)], 8 * (2 * len(parts) + 1)
    for part in parts:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + part.nbytes
        bounds += [start, end]
    file = os.memfd_create("result") if hasattr(os, "memfd_create") else os.dup(tempfile.TemporaryFile().fileno())
    os.truncate(file, max(end, 1))
    for start, content in zip([0, *bounds[1::2]], [np.array(bounds, np.int64).data.cast("B"), *parts],
                              strict=True):
        _write(file, content, start)
    return file


def _write(file: int, content: memoryview, start: int) -> None:
    done = 0
    while done < content.nbytes:
        done += os.pwrite(file, content[done:], start + done)


def _finished(file: int, finish: Callable[[Any], Any] | None) -> Any:
    value = _unpacked(file)
    return value if finish is None or isinstance(value, Failure) else finish(value)


def _unpacked(file: int) -> Any:
    """What `_packed` wrote; its arrays and tensors are the file's own memory, freed with the last of them."""
    content = torch.from_file(f"/dev/fd/{file}", shared=True, size=os.fstat(file).st_size, dtype=torch.uint8)
    os.close(file)
    whole = content.numpy().data
    count = int(np.frombuffer(whole, np.int64, 1)[0])
    bounds = np.frombuffer(whole, np.int64, 2 * count, offset=8).reshape(count, 2).tolist()
    parts = [whole[start:end] for start, end in bounds]
    return pickle.loads(parts[0], buffers=parts[1:])


def _opened(value: Any) -> Any:
    if isinstance(value, Failure):
        raise RuntimeError(f"in a reading process: {value.text}")
    return value


def in_line(work: Work, jobs: Sequence[int], given_up: Mapping[int, str]) -> Generator[Any, None, None]:
    """The same results, worked at by the main process itself, where nothing can be done about what hangs."""
    return (work(job, given_up, tell_nobody) for job in jobs)


def tell_nobody(place: int) -> None: ...


def cpu_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
