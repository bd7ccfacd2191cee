"""Time to quality beside open_clip 3.3.0: minutes from the command until R@5 on held-out pairs is as good as its best.

    python download_datasets.py --datasets stamps
    python benchmarks/time_to_quality.py grid synthetic stamps --folder /tmp/quality   # open_clip; about 40 minutes
    python benchmarks/time_to_quality.py race synthetic stamps --folder /tmp/quality   # 3 turns: about 15 minutes
    python benchmarks/run.py time_to_quality_synthetic time_to_quality_stamps

`grid` trains open_clip at every point of GRID, then at the best of these with half of the patches dropped, and last at
the best of all LONGER times as long; none for more than 20 minutes of two threads (LIMIT_CPU_S). GRID, all pairs of
BATCHES and RATES, was committed before any of its points was run. What open_clip reached is kept in
time_to_quality.json beside this file, point by point, so it may be stopped and started again, and run on a busy
machine: the choice of points goes by CPU seconds. The aim is AIM of the best R@5 (mean of both directions) that any
validation of any point has had.

`race` runs the points of open_clip that came to the aim first, and this project with the settings in CASES, in turns,
each until the aim. Clocks run from the command to the validation that reaches the aim, on prepared data: pictures of
one size in both programs' lists, the cache of this project filled. Both have the same pairs, resolution, sizes of
towers, two threads and one worker (beside_open_clip.py), and validate on the same pairs after each epoch, which is in
the time.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

from benchmarks.beside_open_clip import (
    ROOT,
    Watched,
    environment,
    fill_cache,
    kept_folder,
    machine,
    ours,
    stamps_pairs,
    synthetic_pairs,
    theirs,
    write_lists,
)
from benchmarks.run import commit
from trimodal.files import replacing

AIM, LIMIT_CPU_S, LONGER = 0.95, 2 * 20 * 60.0, 3
BATCHES, RATES = (64, 256), ("5e-4", "1e-3", "2e-3")
GRID = tuple(itertools.product(BATCHES, RATES))
WARMUP_PCT = 5
BEST = 2  # points of open_clip that race
FOUND = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Case:
    """A set: the side of its pictures, passes over the pairs at each point, and words of both programs."""

    pixels: int
    passes: int
    theirs: tuple[str, ...]
    ours: tuple[str, ...]


CASES = {
    "synthetic": Case(64, 6, ("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"), (
        "data.min_crop=1", "data.flip=false", "--epochs", "6", "stages.align.tasks.0.passes=0.25",
        "--batch-size", "32", "--lr", "1e-3", "stages.align.image_keep=1", "stages.align.drop_path=0")),
    "stamps": Case(96, 24, (), ("--epochs", "24", "--batch-size", "32", "--lr", "1e-3")),
}


@dataclass(frozen=True)
class Point:
    """What open_clip reached at a point of the grid: R@5 after each epoch, and when that was known, by both clocks."""

    batch: int
    rate: str
    dropout: str
    passes: int
    recalls: list[float]
    wall_s: list[float]
    cpu_s: list[float]

    @property
    def best(self) -> float:
        return max(self.recalls, default=0.0)

    def cpu_s_to(self, aim: float) -> float:
        """CPU seconds until `aim`, which other work beside it hardly changes; infinite where it was not reached."""
        return next((s for s, recall in zip(self.cpu_s, self.recalls, strict=True) if recall >= aim), math.inf)


def prepare(folder: Path, name: str, data_root: Path) -> tuple[Path, Path]:
    """The Python of the other environment, and the lists of a set, in `folder` unless there."""
    case = CASES[name]
    lists = folder / f"{name}_{case.pixels}"
    if not lists.exists():
        write_lists(lists, synthetic_pairs(case.pixels) if name == "synthetic"
                    else stamps_pairs(case.pixels, data_root))
        fill_cache(lists, f"model.image_size={case.pixels}")
    return environment(folder / "open_clip"), lists


# ---- the grid --------------------------------------------------------------------------------------------------------


def train_theirs(name: str, python: Path, lists: Path, batch: int, rate: str, dropout: str, passes: int,
                 until: float = 2.0) -> Watched:
    case = CASES[name]
    steps = passes * (sum(1 for _ in open(lists / "train.tsv")) // batch)
    words = ["--lr", rate, "--batch-size", str(batch), "--epochs", str(passes), "--precision", "amp_bf16",
             "--warmup", str(round(steps * WARMUP_PCT / 100)), "--force-image-size", str(case.pixels), *case.theirs]
    words += ["--force-patch-dropout", dropout] if float(dropout) else []
    with tempfile.TemporaryDirectory() as folder:
        return theirs(python, lists, Path(folder, "run"), words, until=until, limit_cpu_s=LIMIT_CPU_S)


def found_points(name: str) -> list[Point]:
    found: dict[str, list[dict[str, Any]]] = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    return [Point(**one) for one in found.get(name, [])]


def keep_point(name: str, point: Point) -> None:
    found = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    with replacing(FOUND, "w") as file:
        file.write("{\n" + ",\n".join(
            f' "{key}": [\n  ' + ",\n  ".join(json.dumps(one) for one in points) + "\n ]"
            for key, points in {**found, name: [*found.get(name, []), asdict(point)]}.items()) + "\n}\n")


def next_point(name: str) -> tuple[int, str, str, int] | None:
    """Batch, rate, patch dropout and passes of the next run of the grid; None: all are done."""
    found, passes = found_points(name), CASES[name].passes
    done = {(point.batch, point.rate) for point in found if point.passes == passes and point.dropout == "0"}
    if rest := [(batch, rate) for batch, rate in GRID if (batch, rate) not in done]:
        return *rest[0], "0", passes
    best = max(found, key=lambda point: point.best)
    if all(point.dropout == "0" for point in found):
        return best.batch, best.rate, "0.5", passes
    if all(point.passes == passes for point in found):
        return best.batch, best.rate, best.dropout, LONGER * passes
    return None


def grid(name: str, python: Path, lists: Path, most: int | None) -> None:
    """Train at the points that are missing in the file of what was found, at `most` of them."""
    done = 0
    while (point := next_point(name)) and (most is None or done < most):
        seen = train_theirs(name, python, lists, *point)
        keep_point(name, Point(*point, [round(one.recall, 4) for one in seen.epochs],
                               [round(one.wall_s, 1) for one in seen.epochs],
                               [round(one.cpu_s, 1) for one in seen.epochs]))
        done += 1


def describe(point: Point) -> str:
    return (f"batch {point.batch:>3}, rate {point.rate}, patch dropout {point.dropout:>3}, {point.passes:>3} passes: "
            f"best R@5 {point.best:.3f} in {max(point.wall_s, default=0):.0f} s")


def aim_of(name: str) -> float:
    """R@5 to come to.

    Raises:
        RuntimeError: nothing of the grid has been run yet.
    """
    if not found_points(name):
        raise RuntimeError(f"{name}: no point of open_clip's grid is in {FOUND.name}; run: "
                           f"python benchmarks/time_to_quality.py grid {name}")
    return AIM * max(point.best for point in found_points(name))


# ---- the race --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """Both runs of one turn, each until the aim."""

    theirs: Watched
    ours: Watched

    @property
    def part(self) -> float:
        """Our time as a part of theirs."""
        return self.ours.epochs[-1].wall_s / self.theirs.epochs[-1].wall_s

    @property
    def cpu_part(self) -> float:
        return self.ours.epochs[-1].cpu_s / self.theirs.epochs[-1].cpu_s


def race(name: str, python: Path, lists: Path) -> Race:
    """One turn. open_clip's time is that of the fastest of its BEST fastest points.

    Raises:
        RuntimeError: this project has ended without reaching the aim, or no point of open_clip has reached it.
    """
    case, aim = CASES[name], aim_of(name)
    came = [point for point in found_points(name) if math.isfinite(point.cpu_s_to(aim))]
    fastest = sorted(came, key=lambda point: point.cpu_s_to(aim))[:BEST]
    runs = [train_theirs(name, python, lists, p.batch, p.rate, p.dropout, p.passes, until=aim) for p in fastest]
    reached = [run for run in runs if run.epochs and run.epochs[-1].recall >= aim]
    if not reached:
        raise RuntimeError(f"{name}: no run of open_clip has come to R@5 {aim:.3f} again")
    theirs_run = min(reached, key=lambda run: run.epochs[-1].wall_s)
    with tempfile.TemporaryDirectory() as folder:
        own = ours(lists, Path(folder, "run"), (f"model.image_size={case.pixels}", *case.ours), until=aim,
                   limit_cpu_s=LIMIT_CPU_S)
    if not own.epochs or own.epochs[-1].recall < aim:
        raise RuntimeError(f"{name}: this project has ended at R@5 {own.epochs[-1].recall if own.epochs else 0:.3f}, "
                           f"below {aim:.3f}")
    return Race(theirs_run, own)


def measured(name: str) -> dict[str, float]:
    """One turn, for `benchmarks/run.py`: our time to the aim as a part of theirs."""
    python, lists = prepare(Path(kept_folder().name), name, ROOT / "data")
    return {f"time_to_quality_{name}": race(name, python, lists).part}


def table(name: str, races: Sequence[Race]) -> str:
    def spread(values: Sequence[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"

    def row(label: str, runs: Sequence[Watched]) -> str:
        return (f"{name:10} {label:14} {spread([run.epochs[-1].wall_s for run in runs], 1):>21} s  "
                f"{spread([run.epochs[-1].cpu_s for run in runs], 1):>21} CPU s  "
                f"{max(run.peak_gib for run in runs):.2f} GiB")

    return "\n".join([
        f"{name:10} to R@5 {aim_of(name):.3f} on held-out pairs",
        row("open_clip", [one.theirs for one in races]), row("this project", [one.ours for one in races]),
        f"{name:10} {'part':14} {spread([one.part for one in races], 3):>21}    "
        f"{spread([one.cpu_part for one in races], 3):>21}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "race"])
    parser.add_argument("sets", nargs="+", choices=list(CASES))
    parser.add_argument("--points", type=int, help="of the grid to run now, at most (default all)")
    parser.add_argument("--turns", type=int, default=3, help="of the race (default 3)")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with stamps (default ./data)")
    parser.add_argument("--folder", type=Path, help="keep the environment of open_clip and the lists here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quality_") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        print(f"{date.today().isoformat()}, {commit()}, {machine()}, 2 threads and 1 worker each", flush=True)
        for name in options.sets:
            python, lists = prepare(folder, name, options.data_root)
            if options.what == "grid":
                grid(name, python, lists, options.points)
            for point in found_points(name):
                print(f"{name:10} open_clip, {describe(point)}, aim after {point.cpu_s_to(aim_of(name)):.0f} CPU s")
            if options.what == "race":
                print(table(name, [race(name, python, lists) for _ in range(options.turns)]), flush=True)


if __name__ == "__main__":
    main()
