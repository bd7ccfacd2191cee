"""Does the suite pass on every kind of CPU, with any number of threads, beside other work? The whole of it, each time.

    python benchmarks/suite.py [--only NUMBER ...]

A CPU stands in for the older ones by taking less of its instructions: ATEN_CPU_CAPABILITY limits torch's own kernels,
ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS the matrix products. `threads` are the compute threads of each of the
two test processes; `beside` is a process that computes all the time. Seconds are those of `bash tests/run.sh`, lint and
types included, `tmp` the most that its temporary files took together. The exit code is 1 if a run was not green.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.attention_memory import cpu_name
from benchmarks.run import commit

ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 0.5  # between two looks at the temporary files
_CLOSING = re.compile(r"^=* ?(?=.*\d (?:passed|failed|error))(.*) in [\d.]+s", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """One run of the whole suite: was it green, pytest's closing counts, seconds, and the peak of its temporary GB."""

    green: bool
    counts: str
    seconds: float
    tmp_gb: float


@dataclass(frozen=True)
class Setting:
    """What a run of the suite is told of the CPU; "" leaves all that it has."""

    aten: str
    onednn: str
    mkl: str
    threads: int
    busy: bool = False

    def environment(self) -> dict[str, str]:
        given = {"ATEN_CPU_CAPABILITY": self.aten, "ONEDNN_MAX_CPU_ISA": self.onednn,
                 "MKL_ENABLE_INSTRUCTIONS": self.mkl, "OMP_NUM_THREADS": str(self.threads)}
        return {name: value for name, value in given.items() if value}


SETTINGS = (
    Setting("default", "SSE41", "SSE4_2", 1),
    Setting("avx2", "AVX2", "AVX2", 1),
    Setting("avx2", "AVX2", "AVX2", 2),
    Setting("avx512", "AVX512_CORE", "AVX512", 4),
    Setting("", "", "", 2),
    Setting("", "", "", 1, busy=True),
)


def run_suite(environment: Mapping[str, str] | None = None) -> Outcome:
    """Run `bash tests/run.sh` once, with its temporary files in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, **(environment or {}), "TMPDIR": folder}
        begin_s = time.perf_counter()
        with _peak_bytes(Path(folder)) as peak:
            found = subprocess.run(["bash", "tests/run.sh"], cwd=ROOT, env=variables, capture_output=True, text=True)
        seconds = time.perf_counter() - begin_s
    closing = _CLOSING.findall(found.stdout)
    if found.returncode:
        print(found.stdout[-4000:] + found.stderr[-2000:], file=sys.stderr, flush=True)
    return Outcome(found.returncode == 0, closing[-1] if closing else "did not come to its tests", seconds,
                   peak[0] / 1e9)


@contextlib.contextmanager
def _peak_bytes(folder: Path) -> Iterator[list[int]]:
    """The most bytes on disk below `folder` so far, in a list of one, while the block runs."""
    peak, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            peak[0] = max(peak[0], _bytes_below(folder))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it has gone meanwhile
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


@contextlib.contextmanager
def beside(busy: bool) -> Iterator[None]:
    """A process that computes all the time while the block runs, if asked for."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", default=range(1, len(SETTINGS) + 1),
                        help="rows of the table, counted from 1")
    wanted = parser.parse_args(argv).only
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {cpu_name()} "
          f"({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores")
    print("row  ATen     oneDNN       MKL     threads  beside  green  seconds  tmp GB  counts")
    green = True
    for number, setting in enumerate(SETTINGS, start=1):
        if number in wanted:
            with beside(setting.busy):
                found = run_suite(setting.environment())
            green &= found.green
            print(f"{number:3}  {setting.aten or 'all':7}  {setting.onednn or 'all':11}  {setting.mkl or 'all':6}  "
                  f"{setting.threads:7}  {'busy' if setting.busy else '-':6}  {'yes' if found.green else 'NO':5}  "
                  f"{found.seconds:7.0f}  {found.tmp_gb:6.2f}  {found.counts}", flush=True)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
