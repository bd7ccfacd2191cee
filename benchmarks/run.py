"""Measure figures again and keep them in benchmarks/records.json.

    python benchmarks/run.py                      # the keys, with what stands recorded
    python benchmarks/run.py suite_s suite_tmp_gb # measure these: keys that one run gives together take that run once

A record is {"median", "low", "high", "runs", "limit", "command", "hardware", "commit", "date"}; `limit` is the most
that is allowed, or null; of a figure that must not be too small, `at_least` is the least that is allowed. What cannot
be measured on this machine, or fails, leaves the record of before, and the exit code is 2.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.errors import UserError
from trimodal.files import replacing

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path(__file__).with_name("records.json")


class CannotMeasure(Exception):
    """Why there is no new figure: this machine cannot give it, or what is measured has failed."""


@dataclass(frozen=True)
class Figure:
    """A key of the records: its limit, if it has one, and which measurement gives it."""

    limit: float | None
    measurement: Callable[[], dict[str, float]]  # one run: the value of each key that it gives
    runs: int = 3
    at_least: float | None = None


def suite() -> dict[str, float]:
    """Wall time of one run of the whole suite in seconds, and the most GB that its temporary files took."""
    from benchmarks.suite import run_suite

    found = run_suite()
    if not found.green:
        raise CannotMeasure(f"the suite is not green: {found.counts}")
    return {"suite_s": found.seconds, "suite_tmp_gb": found.tmp_gb}


def busy_machine() -> dict[str, float]:
    """What bounding the waiting of OpenMP's threads costs a step in %, and how much slower it is with busy cores."""
    from benchmarks.busy_machine import measured

    return measured()


def align(*keys: str) -> dict[str, float]:
    """Pairs per CPU second of alignment over those of open_clip, by what is compared."""
    from benchmarks.align_vs_open_clip import measured

    with measurable():
        return measured(keys)


def time_to_quality(name: str) -> dict[str, float]:
    """Our time to the R@5 that open_clip reaches on a set at best, less 5 %, as a part of its time."""
    from benchmarks.time_to_quality import measured

    with measurable():
        return measured(name)


def waiting(key: str) -> dict[str, float]:
    """How long one waits for the slowest plan, for the first step of the demo, and the part of validation in it."""
    from benchmarks.waiting import measured

    with measurable():
        return measured(key)


@contextlib.contextmanager
def measurable() -> Iterator[None]:
    """Whatever a comparison lacks (data, a package, a run that ends well) is why there is no figure."""
    try:
        yield
    except (UserError, RuntimeError, subprocess.CalledProcessError) as error:
        raise CannotMeasure(str(error)) from error


def matmul_share(precision: str) -> dict[str, float]:
    """Share of the peak of matrix products that the blocks of stage align reach in bf16 or fp32."""
    import torch

    from benchmarks.matmul_share import share
    from trimodal.memory import devices

    if precision == "bf16" and devices.choose_precision(torch.device("cpu"), use_amp=True).dtype is None:
        raise CannotMeasure("this CPU has no bf16 units")
    return {f"matmul_share_{precision}": share(precision)}


def finetune() -> dict[str, float]:
    """Samples per second of finetune over those of the last commit of which each objective encoded its own."""
    from benchmarks.finetune import measured

    with measurable():
        return measured()


def million_samples() -> dict[str, float]:
    """Seconds and GB by which a later start with a million samples exceeds one with a thousand."""
    from benchmarks.scaling import measured

    with measurable():
        return measured()


def scratch() -> dict[str, float]:
    """R@5 of the demo's recipe on stamps, over five folds of their captions."""
    from benchmarks.ablation import measured

    with measurable():
        return measured()


def lines() -> dict[str, float]:
    """Lines of all Python files but those of tests, benchmarks and findings."""
    from tests.project import product_files

    return {"python_lines": float(sum(path.read_text("utf-8").count("\n") for path in product_files()))}


def cache() -> dict[str, float]:
    """GB that COCO's pictures would take in the cache, and how fast it is filled beside the decoding alone."""
    from benchmarks.cache import measured

    return measured()


def rerank() -> dict[str, float]:
    """Points of R@1 that re-ranking by the matching head gains."""
    from benchmarks.rerank import gain

    with measurable():
        return gain()


def cached_align() -> dict[str, float]:
    """How many times as long an epoch of alignment takes that encodes with frozen towers as one on kept features."""
    from benchmarks.cached_align import measured

    with measurable():
        return measured()


def pretrained_cache() -> dict[str, float]:
    """Seconds in which the features of the demo's pictures and captions are encoded into the cache."""
    from benchmarks.cached_align import fill_s

    with measurable():
        return {"pretrained_cache_s": fill_s("./data")}


def pretrained() -> dict[str, float]:
    """What the demo on pretrained towers finds, and how long it trains; each run has the next seed."""
    from benchmarks.learning import pretrained

    with measurable():
        return pretrained(next(SEEDS))


def onnx() -> dict[str, float]:
    """The largest difference of the ONNX graphs of all sizes and of the pretrained demo from their models."""
    from benchmarks.export_difference import measured

    with measurable():
        return measured()


def bilingual() -> dict[str, float]:
    """How well the demo in two languages finds pictures by Chinese captions; each run has the next seed."""
    from benchmarks.learning import bilingual

    with measurable():
        return bilingual(next(BILINGUAL_SEEDS))


def search() -> dict[str, float]:
    """Milliseconds from a request to the page's server to its whole answer, of 200 texts and 100,000 entries."""
    from benchmarks.search import measured

    with measurable():
        return measured()


SEEDS, BILINGUAL_SEEDS = itertools.count(), itertools.count()
ALIGN_BF16 = partial(align, "align_same_bf16", "align_default_bf16", "align_dropped_bf16")
FIGURES = {"suite_s": Figure(720.0, suite), "suite_tmp_gb": Figure(1.0, suite),
           "python_lines": Figure(13_000.0, lines, runs=1),
           "cache_coco_gb": Figure(9.0, cache, runs=5),
           "cache_fill_share": Figure(None, cache, runs=5, at_least=0.9),
           "free_machine_cost": Figure(3.0, busy_machine, runs=5),
           "busy_machine_slowdown": Figure(2.5, busy_machine, runs=5),
           "cached_align_speedup": Figure(None, cached_align, runs=5, at_least=20.0),
           "onnx_largest_difference": Figure(1e-4, onnx, runs=1),
           "pretrained_cache_s": Figure(60.0, pretrained_cache),
           "pretrained_stamps_r5": Figure(None, pretrained, at_least=0.55),
           "pretrained_stamps_without_symbols_r5": Figure(None, pretrained, at_least=0.45),
           "pretrained_train_s": Figure(90.0, pretrained),
           "chinese_r5_over_chance": Figure(None, bilingual, at_least=5.0),
           "chinese_over_english": Figure(None, bilingual, at_least=0.8),
           "million_samples_start_s": Figure(20.0, million_samples, runs=5),
           "million_samples_memory_gb": Figure(1.0, million_samples, runs=5),
           "rerank_gain_r1": Figure(None, rerank, runs=1, at_least=2.0),
           "align_same_bf16": Figure(None, ALIGN_BF16, runs=5, at_least=1.4),
           "align_default_bf16": Figure(None, ALIGN_BF16, runs=5, at_least=3.0),
           "align_dropped_bf16": Figure(None, ALIGN_BF16, runs=5, at_least=2.0),
           "align_same_fp32": Figure(None, partial(align, "align_same_fp32"), runs=5, at_least=1.1),
           "matmul_share_bf16": Figure(None, partial(matmul_share, "bf16"), runs=5, at_least=0.40),
           "matmul_share_fp32": Figure(None, partial(matmul_share, "fp32"), runs=5, at_least=0.75),
           "finetune_micro_batches": Figure(None, finetune, runs=5, at_least=2.5),
           "finetune_whole": Figure(None, finetune, runs=5, at_least=2.5),
           "scratch_stamps_r5": Figure(None, scratch, runs=1, at_least=0.36),
           "scratch_stamps_audio_r5": Figure(None, scratch, runs=1, at_least=0.60),
           "plan_slowest_s": Figure(10.0, partial(waiting, "plan_slowest_s")),
           "first_step_s": Figure(12.0, partial(waiting, "first_step_s")),
           "search_100k_ms": Figure(50.0, search), "search_100k_p95_ms": Figure(None, search),
           "validation_share_pct": Figure(10.0, partial(waiting, "validation_share_pct")),
           **{f"time_to_quality_{name}": Figure(0.3333, partial(time_to_quality, name))
              for name in ("synthetic", "stamps")}}


def measure(keys: Iterable[str], figures: dict[str, Figure], records: Path) -> list[str]:
    """Measure `keys` and write their records; what could not be measured, and why, by line."""
    problems, keys = [], list(keys)
    for measurement in dict.fromkeys(figures[key].measurement for key in keys):
        together = [key for key in keys if figures[key].measurement is measurement]
        machine = hardware()
        try:
            found = [measurement() for _ in range(max(figures[key].runs for key in together))]
        except CannotMeasure as reason:
            problems.append(f"{', '.join(together)}: {reason}; the record of before stands")
            continue
        write({key: record(key, [one[key] for one in found], figures[key], machine) for key in together}, records)
    return problems


def record(key: str, values: list[float], figure: Figure, machine: str) -> dict[str, Any]:
    """The record of one key, from its value in each run."""
    at_least = {} if figure.at_least is None else {"at_least": figure.at_least}
    digits = [float(f"{value:.5g}") for value in (statistics.median(values), min(values), max(values))]
    return {**dict(zip(("median", "low", "high"), digits, strict=True)), "runs": len(values),
            "limit": figure.limit, **at_least, "command": f"python benchmarks/run.py {key}", "hardware": machine,
            "commit": commit(), "date": date.today().isoformat()}


def hardware() -> str:
    """Name and kind of the CPU, its cores, the GPU, and the load of the last minute, which is that of other work."""
    import torch

    from benchmarks.attention_memory import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {gpu}, "
            f"load {os.getloadavg()[0]:.1f} before")


def commit() -> str:
    """The commit measured; with a plus if files of it were changed."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RECORDS.relative_to(ROOT)}")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def read(records: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """All records by key."""
    return json.loads(records.read_text("utf-8")) if records.exists() else {}


def write(new: dict[str, dict[str, Any]], records: Path) -> None:
    """Put `new` in the place of the records of the same keys; the others stay as they are."""
    with replacing(records, "w") as file:
        json.dump(dict(sorted({**read(records), **new}.items())), file, indent=1)
        file.write("\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="figures to measure; none: show what is recorded")
    keys = parser.parse_args(argv).keys
    unknown = [key for key in keys if key not in FIGURES]
    if unknown:
        print(f"error: unknown key {unknown[0]!r}; have {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    problems = measure(keys, FIGURES, RECORDS)
    for key, one in read().items():
        if key in keys or not keys:
            bound = f"at least {one['at_least']}" if "at_least" in one else f"limit {one['limit']}"
            print(f"{key}: {one['median']} ({one['low']} to {one['high']}, {one['runs']} runs, {bound}), "
                  f"{one['hardware']}, {one['commit']}, {one['date']}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
