"""Checks of the doctor: device, data, files, disk and the plan of memory, as a run would find them."""

import dataclasses
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np
import torch

import budget
import memory
import prepare
import resume
import runs
import saving
from batches import one_thread
from budget import Plan
from config import Config, StageConfig, TaskConfig, UserError
from datasets import SPLITS, Data, load_data
from findings import Finding, State, guarded, of_error
from model import TriModalModel
from planning import plan_evaluation, plan_stage
from prepare import GB, BrokenSample
from readers import READERS, download_command, read_split
from runs import Options, Run
from stages import active_tasks
from training import place_of

SAMPLE_FILES = 64  # pictures and sounds of each set that are decoded
NAMED = 3  # broken files that are named


@dataclass
class Case:
    """What the checks have found out so far, each for those after it."""

    config: Config  # as asked for; sets that are not there are taken out
    options: Options
    folder: Path  # for temporary files; `outputs` of all that is tried
    say: Callable[[str], Any] = print
    device: torch.device | None = None
    precision: memory.Precision | None = None
    data: Data | None = None
    tasks: dict[str, tuple[list[TaskConfig], list[str]]] = field(default_factory=dict)  # of `active_tasks`, by stage
    fills_cache: bool = False  # a run would
    run: Run | None = None  # in the temporary folder, of few samples
    plans: dict[str, Plan] = field(default_factory=dict)
    step_s: dict[tuple[str, int], float] = field(default_factory=dict)  # by stage and task

    @property
    def tried(self) -> Config:
        """The configuration, writing to the temporary folder."""
        paths = dataclasses.replace(self.config.paths, output_dir=str(self.folder))
        return dataclasses.replace(self.config, paths=paths)

    @property
    def rows(self) -> list[StageConfig]:
        """Stages that have something to train."""
        return [row for row in self.config.stages if row.name in self.tasks]


# ---- the machine -------------------------------------------------------------------------------------------------


def device(case: Case) -> Iterator[Finding]:
    """What would be computed on, in which numbers, and whether the budget is free there."""
    found = memory.choose_device(case.options.device)
    precision = memory.choose_precision(found, case.config.training.use_amp)
    with torch.autocast(found.type, precision.dtype or torch.bfloat16, enabled=precision.dtype is not None):
        product = torch.ones(8, 8, device=found) @ torch.ones(8, 8, device=found)
    if not bool((product == 8).all()):
        yield Finding("device", "fail", f"{found} multiplies wrongly", "--device cpu")
        return
    case.device, case.precision = found, precision
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("device", "ok", f"{memory.device_name(found)}, {precision.reason}; CPU cores {cores}, threads "
                                  f"{torch.get_num_threads()}")
    free, total = memory.free_gib(found)
    wanted = case.config.budget_gb
    short = free < wanted
    yield Finding("device memory", "warn" if short else "ok",
                  f"{free:.1f} of {total:.1f} GiB are free, the budget is {wanted:g}",
                  f"memory.budget_gb={max(free - 0.5, 0.5):.1f}, or end other programs" if short else "")


def plan(case: Case) -> Iterator[Finding]:
    """Whether every stage fits the budget, and how."""
    assert case.run is not None
    config, place = case.tried, place_of(case.run)
    for row in case.rows:
        yield from guarded(f"memory: {row.name}", _planned, case, row.name,
                           lambda row=row: plan_stage(config, row, case.tasks[row.name][0], place))
    yield from guarded(f"memory: {memory.EVALUATION}", _planned, case, memory.EVALUATION,
                       lambda: plan_evaluation(config, place))


def _planned(case: Case, name: str, search: Callable[[], Plan]) -> Iterator[Finding]:
    case.say(f"memory: {name}")
    found = case.plans[name] = search()
    gib = [figure / memory.GIB for figure in (found.peak_bytes, found.allowance_bytes, found.budget_bytes)]
    is_whole = not found.in_parts and not any(found.recompute.values())
    how = "the whole batch at once" if is_whole else f"micro-batch (of) {budget.describe_towers(found)}"
    yield Finding(f"memory: {name}", "ok", f"{gib[0]:.2f} GiB + {gib[1]:.2f} kept free, of {gib[2]:g}; {how}")


# ---- data --------------------------------------------------------------------------------------------------------


def data(case: Case) -> Iterator[Finding]:
    """What each set has, which are missing, and what the stages find in them."""
    with _heard("readers") as said:
        yield from guarded("data", _load, case)
    if case.data is None:
        return
    for name, splits in case.data.counts().items():
        told = [line for line in said if line.startswith(name)]
        missing = any("not there" in line for line in told)
        found = [f"{split}: {_counted(counts)}" for split, counts in splits.items()]
        yield Finding(f"data: {name}", "warn" if missing else "ok", "\n".join(found + told),
                      _again(name, case.config) if missing else "")
    for split in [split for split in SPLITS[1:] if not len(case.data.tables[split])]:
        yield Finding(f"data: {split}", "warn", f"no set has samples for {split}",
                      f"another set (--datasets), or lines of the manifest with the split '{split}'")
    for row in case.config.stages:
        try:
            case.tasks[row.name] = active_tasks(row, case.data)
        except UserError as error:
            yield of_error(f"stage: {row.name}", error)


def _load(case: Case) -> Iterator[Finding]:
    """Read all sets; where that fails, those without a fault."""
    try:
        case.data = load_data(case.tried, fill_cache=False)
        return
    except UserError as error:
        faults = {name: fault for name in case.config.data.datasets if (fault := _fault(name, case.tried))}
        if not faults:
            raise UserError(str(error).replace(str(case.folder), case.config.paths.output_dir)) from None
    for name, fault in faults.items():
        yield of_error(f"data: {name}", fault)
    if rest := tuple(name for name in case.config.data.datasets if name not in faults):
        case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, datasets=rest))
        case.data = load_data(case.tried, fill_cache=False)


def _fault(name: str, config: Config) -> UserError | None:
    try:
        for split in SPLITS:
            deque(read_split(name, split, config), maxlen=0)
    except UserError as error:
        return error
    return None


@contextmanager
def _heard(name: str) -> Iterator[list[str]]:
    """What a module logs, instead of on the screen."""
    log, handler, said = logging.getLogger(name), BufferingHandler(1000), list[str]()
    propagates, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield said
    finally:
        said += [record.getMessage() for record in handler.buffer]
        log.removeHandler(handler)
        log.propagate = propagates


def _counted(counts: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in counts.items() if kind != "captions")
    return f"{kinds}; {counts['captions']:,} captions" if counts["captions"] else kinds


def files(case: Case) -> Iterator[Finding]:
    """Some pictures and sounds of each set, read as a run reads them."""
    assert case.data is not None
    for name in case.data.names():
        lines, broken, tried = [], list[str](), 0
        for kind in prepare.KINDS:
            places = _files_of(case.data, name, kind)
            chosen = np.random.default_rng(0).permutation(len(places))[:SAMPLE_FILES]
            case.say(f"files: {name}, {len(chosen)} {kind}s")
            start_s = time.perf_counter()
            with one_thread():
                broken += [reason for i in chosen if (reason := _broken(case.data, kind, *places[int(i)]))]
            tried += len(chosen)
            each_ms = 1000 * (time.perf_counter() - start_s) / max(len(chosen), 1)
            lines += [f"{len(chosen)} of {len(places):,} {kind}s read, {each_ms:.1f} ms each"] if places else []
        yield _files_found(case, name, lines, broken, tried)


def _files_of(data: Data, name: str, kind: prepare.Kind) -> list[tuple[str, int]]:
    """(split, row) of every sample of a set that has a picture or a sound."""
    return [(split, int(row)) for split, table in data.tables.items()
            for row in np.flatnonzero(table.has_image if kind == "image" else table.has_audio)
            if table.sources[int(row)] == name and not data.splits[split].store.is_drawn(int(row))]


def _broken(data: Data, kind: prepare.Kind, split: str, row: int) -> str | None:
    store = data.splits[split].store
    try:
        store.image(row) if kind == "image" else store.mel(row)
    except BrokenSample as error:
        return str(error)
    return None


def _again(name: str, config: Config) -> str:
    return download_command(name, config) if READERS[name].downloadable else "mend or remove them"


def _files_found(case: Case, name: str, lines: list[str], broken: list[str], tried: int) -> Finding:
    if not broken:
        return Finding(f"files: {name}", "ok", "\n".join(lines) or "none: all is drawn or text")
    limit = case.config.data.max_bad_pct
    state: State = "fail" if 100 * len(broken) > limit * tried else "warn"
    more = [f"and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
    again = _again(name, case.config)
    return Finding(f"files: {name}", state, "\n".join(
        [*lines, f"{len(broken)} of these are broken, a run allows {limit:g} %:",
         *(reason[:200] for reason in broken[:NAMED]), *more]),
        again if state == "warn" else f"{again}, or raise data.max_bad_pct")


# ---- disk --------------------------------------------------------------------------------------------------------


def disk(case: Case) -> Iterator[Finding]:
    """Whether the output folder can be written and holds what a run saves, the cache, and shared memory."""
    folder = Path(case.config.paths.output_dir)
    parts = [folder / name for name in ("", "checkpoints", "logs", "reports")]
    for part in {_existing(part) for part in parts}:
        try:
            with tempfile.TemporaryFile(dir=part) as file:
                file.write(b"x")
        except OSError as error:
            yield Finding("output folder", "fail", f"{folder}: cannot be written ({error.strerror})",
                          "choose another --output-dir")
            break
    else:
        yield _earlier_run(case, folder)
    yield _room_for_checkpoints(case, folder)
    if case.data is not None:
        yield from _cache(case, case.data)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def _earlier_run(case: Case, folder: Path) -> Finding:
    """A folder in use is refused unless the run in it is resumed or thrown away."""
    used, options = runs.parts_in_use(folder), case.options
    if options.resume is not None:
        state = resume.find_state(case.config, options)
        return Finding("output folder", "ok", f"{folder}: goes on after epoch {state['progress']['epoch']} of "
                       f"{case.config.training.epochs}" if state else f"{folder}: nothing to resume, a fresh start")
    if used and not options.overwrite:
        return Finding("output folder", "warn", f"{folder}: holds an earlier run ({', '.join(used)})",
                       "--resume auto goes on with it, --overwrite deletes it; or another --output-dir")
    return Finding("output folder", "ok", f"{folder}: can be written" + (", deletes an earlier run" if used else ""))


def _room_for_checkpoints(case: Case, folder: Path) -> Finding:
    """Weights, two moments and the average of each are a checkpoint's largest part; best and final hold weights."""
    training = case.config.training
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in TriModalModel(case.config.model).parameters())
    each = weights * (3 + (training.ema_decay > 0))
    count = training.keep_checkpoints + training.epochs // saving.KEEP_EVERY + 1  # one more while it is written
    here = sum(path.stat().st_size for path in folder.glob("checkpoints/*"))
    free = _free(folder) + here
    needed = count * each + 2 * weights
    return Finding("disk: checkpoints", "ok" if needed < free else "fail",
                   f"a run keeps up to {count} of {each / GB:.2f} GB and the best: {needed / GB:.1f} GB; free for it "
                   f"{free / GB:.1f} GB", "" if needed < free else
                   "free space, or another --output-dir, or lower training.keep_checkpoints")


def _free(folder: Path) -> float:
    found = os.statvfs(_existing(folder))
    return found.f_bavail * found.f_frsize


def _cache(case: Case, data: Data) -> Iterator[Finding]:
    config = case.config
    if not config.data.cache:
        yield Finding("disk: cache", "ok", "off (data.cache=false): each use decodes anew")
        return
    case.say("cache: what it would take")
    found = [prepare.entries_to_make(table, config) for table in data.tables.values()]
    sizes = [one for entries in found for one in entries.values()]
    files, needed, room = sum(n for n, _ in sizes), sum(size for _, size in sizes), prepare.room_for_entries(config)
    case.fills_cache = needed < room
    if not files:
        yield Finding("disk: cache", "ok", "filled, or nothing to put into it")
        return
    told = (f"a run first decodes {files:,} files into {prepare.cache_folder(config)}: about {needed / GB:.1f} GB; "
            f"free for it {max(room, 0) / GB:.1f} GB")
    yield Finding("disk: cache", "ok" if needed < room else "warn", told, "" if needed < room else
                  "free space, data.cache_dir=ANOTHER_DISK or a larger data.cache_max_gb; else each use decodes anew")
