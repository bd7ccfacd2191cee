"""Reading processes: ours (trimodal/data/workers.py) or pebble's? Speed side by side, and what a lost process costs.

    python benchmarks/workers.py [--turns 5 --batches 40 --kills 40]

Both read the same jobs with 2 processes: batches of 32 pictures of 224 px, and of 32 log-mels of 5 s, from the cache
and decoded on the spot. Samples/s count from the first batch on; `start and end` is what a whole pass takes beside it.
A turn runs each once, in changing order; the ratio is pebble's samples/s by ours of the same turn: median and range.

Then three promises, for each: batches are those of one process, bit by bit and in order; of a process that hangs the
file is named and only its sample is lost; a process that is killed costs nothing, whenever it is killed: at random
moments (`--kills` runs), and amid handing over a batch. A run that is not done after DEADLINE_S counts as hung.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import pebble
import torch
from PIL import Image

from benchmarks.attention_memory import cpu_name
from datasets import epoch_batches, load_data
from tests import trees
from tests.test_datasets import assert_equal, configured
from trimodal.data import workers
from trimodal.data.batches import BatchReader, pool
from trimodal.data.workers import NO_ITEM, Workers, in_line

COUNT, BATCH = 2, 32
AHEAD = 2  # results of each process that are begun or waiting
DEADLINE_S = 30.0
KINDS = {"pictures": ("image", "text"), "log-mels": ("audio", "text")}


# ---- pebble ---------------------------------------------------------------------------------------------------------

_WORK: Any = None
_PULSE: Any = None


def _begin_process(work: Any, pulse: Any) -> None:
    global _WORK, _PULSE
    _WORK, _PULSE = work, pulse
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


def _do(job: int, slot: int, skipped: Mapping[int, str]) -> Any:
    def report(place: int) -> None:
        _PULSE[2 * slot + 1] = place
        _PULSE[2 * slot] += 1

    report(NO_ITEM)
    return numpy_of(_WORK(job, skipped, report))


def numpy_of(value: Any) -> Any:
    """Tensors as arrays, which pickle as one block of bytes: torch's own way sends descriptors, which die with their
    process."""
    return _mapped(value, torch.Tensor, lambda tensor: tensor.numpy())


def torch_of(value: Any) -> Any:
    return _mapped(value, np.ndarray, torch.from_numpy)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, kind, change) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(one, kind, change) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            setattr(value, name, _mapped(getattr(value, name), kind, change))
    return value


class PebbleWorkers:
    """What `Workers` does, by pebble.ProcessPool: one pickle for a batch, its current place in a shared array."""

    def __init__(self, work: Any, jobs: Sequence[int], count: int, *, timeout_s: float,
                 name: Callable[[int, int], str], say: Callable[[str], None]) -> None:
        self.work, self.jobs, self.count, self.timeout_s, self.name, self.say = work, jobs, count, timeout_s, name, say
        self.skipped: dict[int, str] = {}
        self.slots = AHEAD * count
        self.pulse = multiprocessing.RawArray("q", [0, NO_ITEM] * self.slots)
        self.still: dict[int, tuple[int, float]] = {}  # beats of a slot, and since when

    def __iter__(self) -> Iterator[Any]:
        self.pool = pebble.ProcessPool(self.count, initializer=_begin_process, initargs=(self.work, self.pulse))
        waiting = list(self.jobs)
        running: dict[int, Any] = {}
        try:
            for job in self.jobs:
                while waiting and len(running) < self.slots:
                    self._schedule(waiting.pop(0), running)
                yield self._result(job, running)
        finally:
            self.pool.stop()
            self.pool.join()

    def _schedule(self, job: int, running: dict[int, Any]) -> None:
        running[job] = self.pool.schedule(_do, args=(job, job % self.slots, dict(self.skipped)))

    def _result(self, job: int, running: dict[int, Any]) -> Any:
        while True:
            try:
                found = running[job].result(timeout=0.25)
                del running[job]
                return torch_of(found)
            except pebble.ProcessExpired as error:
                self.say(f"a process was lost (code {error.exitcode}) at {self._where(job)}")
                self._schedule(job, running)
            except TimeoutError:
                self._watch(running)

    def _where(self, job: int) -> str:
        return self.name(job, self.pulse[2 * (job % self.slots) + 1])

    def _watch(self, running: dict[int, Any]) -> None:
        for job, future in list(running.items()):
            slot = job % self.slots
            beats, since_s = self.still.get(slot, (-1, 0.0))
            if beats != self.pulse[2 * slot] or not future.running():
                self.still[slot] = (self.pulse[2 * slot], time.monotonic())
            elif self.timeout_s and time.monotonic() - since_s > self.timeout_s:
                place = self.pulse[2 * slot + 1]
                self.skipped[place] = f"{self._where(job)}: took longer than {self.timeout_s:g} s"
                self.say(self.skipped[place])
                future.cancel()  # kills its process alone
                self._schedule(job, running)


# ---- data -----------------------------------------------------------------------------------------------------------


def make_files(folder: Path, number: int) -> None:
    lines = [json.dumps({"id": "v", "text": "a text alone", "split": "val"})]
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        path = folder / "files" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        wave = trees.sound(folder / "files" / f"{i}.flac", 0.3 * rng.standard_normal(5 * 44_100).astype(np.float32),
                           44_100)
        lines += [json.dumps({"id": f"i{i}", "image": str(path), "text": f"picture {i}", "split": "train"}),
                  json.dumps({"id": f"s{i}", "audio": str(wave), "text": f"sound {i}", "split": "train"})]
    (folder / "manifest.jsonl").write_text("\n".join(lines))


def reader_of(folder: Path, kind: str, batches: int, *, cached: bool) -> BatchReader:
    config = configured(folder, "model.image_size=224", "data.audio_max_s=5", f"data.cache={str(cached).lower()}",
                        "data.workers=2")
    data = load_data(config)
    members = pool(data.tables["train"], KINDS[kind])
    jobs = epoch_batches([members], [batches * BATCH / len(members)], BATCH, seed=0, epoch=1)
    return BatchReader(data.splits["train"], jobs, [KINDS[kind]], config, train=True, epoch=1)


def workers_of(which: str, reader: Any, say: Callable[[str], None] = print, timeout_s: float = 120.0,
               work: Any = None) -> Any:
    new: Any = Workers if which == "ours" else PebbleWorkers
    return new(work or reader.work, range(len(reader)), COUNT, timeout_s=timeout_s, name=reader.name, say=say)


# ---- speed ----------------------------------------------------------------------------------------------------------


def seconds_of(which: str, reader: BatchReader) -> tuple[float, float]:
    """From the first batch to the last, and of all beside."""
    start_s, first_s, last_s = time.perf_counter(), 0.0, 0.0
    for found in workers_of(which, reader):
        assert found[0] is not None
        last_s = time.perf_counter()
        first_s = first_s or last_s
    return last_s - first_s, time.perf_counter() - start_s - (last_s - first_s)


def compare(name: str, reader: BatchReader, turns: int) -> str:
    speeds: dict[str, list[float]] = {"ours": [], "pebble": []}
    beside: dict[str, list[float]] = {"ours": [], "pebble": []}
    for turn in range(turns):
        for which in ("ours", "pebble") if turn % 2 == 0 else ("pebble", "ours"):
            taken_s, rest_s = seconds_of(which, reader)
            speeds[which].append((len(reader) - 1) * BATCH / taken_s)
            beside[which].append(rest_s)
    ratios = [b / a for a, b in zip(speeds["ours"], speeds["pebble"], strict=True)]
    middle = statistics.median
    return (f"{name:20} {middle(speeds['ours']):8.0f} {middle(speeds['pebble']):8.0f}   {middle(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})   {middle(beside['ours']):6.2f} {middle(beside['pebble']):6.2f}")


# ---- promises -------------------------------------------------------------------------------------------------------


def within_deadline(check: Callable[[], str]) -> str:
    """What `check` returns, run in a process group of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        os.setsid()
        with contextlib.suppress(BrokenPipeError):
            try:
                theirs.send(check())
            except BaseException as error:
                theirs.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    found = ours.recv() if ours.poll(DEADLINE_S) else f"hung for {DEADLINE_S:g} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return str(found)


def equals(found: Sequence[Any], expected: Sequence[Any]) -> str:
    try:
        assert_equal([batch for batch, _ in found], [batch for batch, _ in expected])
    except AssertionError as error:
        return f"other batches {error}"
    return "yes"


def check_equal(which: str, reader: BatchReader, expected: Sequence[Any]) -> str:
    return equals(list(workers_of(which, reader)), expected)


def check_hang(which: str, reader: BatchReader) -> str:
    row = int(reader.jobs[2][1][7])

    def work(job: int, skipped: Mapping[int, str], report: Any) -> Any:
        def begin_slowly(place: int) -> None:
            report(place)
            time.sleep(600 if place == row and place not in skipped else 0)
        return reader.work(job, skipped, begin_slowly)

    said: list[str] = []
    found = list(workers_of(which, reader, said.append, 2.0, work))
    lost = [record["key"] for _, broken in found for record in broken]
    table = reader.split.table
    named = len(said) == 1 and table.images[row] in said[0]
    return "yes" if named and set(lost) == {f"manifest/{table.keys[row]}"} else f"{lost} {said}"


def check_random_kills(which: str, reader: BatchReader, expected: Sequence[Any], kills: int) -> str:
    found = [within_deadline(partial(_kill_once, which, reader, expected, seed))
             for seed in range(kills)]
    good = found.count("yes")
    return f"{good} of {kills}" + ("" if good == kills else f"; {next(one for one in found if one != 'yes')}")


def _kill_once(which: str, reader: BatchReader, expected: Sequence[Any], seed: int) -> str:
    rng = random.Random(seed)
    found, at_s = [], time.monotonic() + rng.uniform(0.05, 0.5)
    for one in workers_of(which, reader, lambda line: None):
        found.append(one)
        if at_s and time.monotonic() > at_s:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(rng.choice(multiprocessing.active_children()).pid or 0, signal.SIGKILL)
            at_s = 0.0
    return equals(found, expected)


def check_kill_amid_handing_over(which: str, reader: BatchReader, expected: Sequence[Any], folder: Path) -> str:
    mark = folder / f"{which}.killed"
    mark.unlink(missing_ok=True)

    def work(job: int, skipped: Mapping[int, str], report: Any) -> Any:
        found = reader.work(job, skipped, report)
        if job == 3 and not mark.exists():
            mark.touch()
            _die_amid_handing_over()
        return found

    return equals(list(workers_of(which, reader, lambda line: None, work=work)), expected)


def _die_amid_handing_over() -> None:
    """Kill this process when it has written half of a batch: to its memory file (ours), to the pipe (pebble's)."""
    class HalfPickler:
        def __init__(self, file: Any, protocol: int) -> None:
            self.file = file

        def dump(self, value: Any) -> None:
            self.file.write(bytes(1 << 20))
            os.kill(os.getpid(), signal.SIGKILL)

    def half_send(self: Any, content: Any, write: Any = os.write) -> None:
        if len(content) > 1 << 20:
            os.write(self.fileno(), bytes(content[: len(content) // 2]))
            os.kill(os.getpid(), signal.SIGKILL)
        while content:
            content = content[write(self.fileno(), content):]

    workers._Pickler = HalfPickler  # type: ignore[assignment,misc]
    Connection._send = half_send  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--kills", type=int, default=40)
    args = parser.parse_args()
    print(f"{date.today()}, pebble {pebble.__version__ if hasattr(pebble, '__version__') else '5.2'}, torch "
          f"{torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {COUNT} processes, {args.turns} turns")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, 256)
        print(f"{'samples/s':20} {'ours':>8} {'pebble':>8}   {'ratio (range)':20}   start and end s: ours, pebble")
        for kind in KINDS:
            for cached in (True, False):
                reader = reader_of(folder, kind, args.batches if cached else args.batches // 2, cached=cached)
                title = f"{kind}, {'cached' if cached else 'decoded'}"
                print(compare(title, reader, args.turns), flush=True)
        reader = reader_of(folder, "pictures", 16, cached=False)
        expected = list(in_line(reader.work, range(len(reader)), {}))
        for which in ("ours", "pebble"):
            checks: dict[str, Callable[[], str]] = {
                "equal batches in order": partial(check_equal, which, reader, expected),
                "a hung file is named, it alone is lost": partial(check_hang, which, reader),
                "nothing lost, killed amid handing over": partial(check_kill_amid_handing_over, which, reader, expected,
                                                                  folder)}
            for name, check in checks.items():
                print(f"{which}: {name}: {within_deadline(check)}", flush=True)
            found = check_random_kills(which, reader, expected, args.kills)
            print(f"{which}: nothing lost, killed at random moments: {found}", flush=True)


if __name__ == "__main__":
    main()
