"""Checks of the doctor: device, data, files, disk and the plan of memory, as a run would find them."""

import dataclasses
import logging
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets import SPLITS, Data, pool
from model import TriModalModel
from trimodal.config import Config, StageConfig, TaskConfig
from trimodal.data import cache, images, tracks, wording
from trimodal.data.cache import GB
from trimodal.data.workers import cpu_cores
from trimodal.doctor.findings import Finding, guarded, of_error
from trimodal.errors import UserError
from trimodal.evaluation import protocols
from trimodal.files import nearest_existing
from trimodal.memory import devices
from trimodal.sets.readers import READERS, download_command, read_split
from trimodal.training import budget, resume, saving
from trimodal.training import run as run_module
from trimodal.training.budget import Plan
from trimodal.training.fits import place_of, saved_fits, settings_of
from trimodal.training.optimizer import block_matrices
from trimodal.training.planner import plan_evaluation, plan_stage
from trimodal.training.run import Options, Run
from trimodal.training.stage import active_tasks

SAMPLE_FILES = 64  # pictures, and sounds, of each split of a set that are decoded
NAMED = 3  # broken files that are named, of each reason
REASONS = 8
LOUD = 2.0  # full scale is 1; what passes twice that is no overshoot of a coder or a mix
SCALE = "scale sounds of floating-point numbers to -1 to 1 (those of 16 bits by 1/32,768): they are taken as they are"


@dataclass
class Case:
    """What the checks have found out so far, each for those after it."""

    config: Config  # as asked for; sets that are not there are taken out
    options: Options
    folder: Path  # for temporary files; `outputs` of all that is tried
    say: Callable[[str], Any] = print
    device: torch.device | None = None
    precision: devices.Precision | None = None
    state: dict[str, Any] | None = None  # of the checkpoint that the run goes on from
    data: Data | None = None
    tasks: dict[str, tuple[list[TaskConfig], list[str]]] = field(default_factory=dict)  # of `active_tasks`, by stage
    fills_cache: bool = False  # a run would
    run: Run | None = None  # in the temporary folder, of few samples
    plans: dict[str, Plan] = field(default_factory=dict)
    step_s: dict[tuple[str, int], float] = field(default_factory=dict)  # by stage and task

    @property
    def tried(self) -> Config:
        """The configuration, writing to the temporary folder; its broken files end nothing, they are told by `files`,
        and hold up nothing, since other processes read them."""
        paths = dataclasses.replace(self.config.paths, output_dir=str(self.folder))
        data = dataclasses.replace(self.config.data, max_bad_pct=100.0, workers=self.config.data.workers or 1)
        return dataclasses.replace(self.config, paths=paths, data=data)

    @property
    def rows(self) -> list[StageConfig]:
        """Stages that have something to train."""
        return [row for row in self.config.stages if row.name in self.tasks]


def before_download(config: Config, options: Options) -> None:
    """For `run_all.sh`: what training refuses whatever the sets hold, by its own functions: device, list of samples,
    output folder, checkpoint. Takes the folder for that moment, and leaves it as a run would find it.

    Raises:
        UserError: as training would.
    """
    devices.choose_device(options.device)
    if "manifest" in config.data.datasets:
        read_split("manifest", "train", config)
    claim = run_module.claim_folder(Path(config.paths.output_dir), options)
    resume.find_state(config, options)
    if claim.lock:
        claim.lock.close()


# ---- the machine -------------------------------------------------------------------------------------------------


def device(case: Case) -> Iterator[Finding]:
    """What would be computed on, in which numbers, and whether the budget is free there."""
    found = devices.choose_device(case.options.device)
    precision = devices.choose_precision(found, case.config.training.use_amp)
    devices.use_deterministic(case.config.training.deterministic)
    with torch.autocast(found.type, precision.dtype or torch.bfloat16, enabled=precision.dtype is not None):
        product = torch.ones(8, 8, device=found) @ torch.ones(8, 8, device=found)
    if not bool((product == 8).all()):
        yield Finding("device", "fail", f"{found} multiplies wrongly", "--device cpu")
        return
    case.device, case.precision = found, precision
    yield Finding("device", "ok", f"{devices.device_name(found)}, {precision.reason}; CPU cores {cpu_cores()}, threads "
                                  f"{torch.get_num_threads()}")
    free, total = devices.free_gib(found)
    wanted = case.config.budget_gb
    short = free < wanted
    yield Finding("device memory", "warn" if short else "ok",
                  f"{free:.1f} of {total:.1f} GiB are free, the budget is {wanted:g}",
                  f"memory.budget_gb={max(free - 0.5, 0.5):.1f}, or end other programs" if short else "")


def plan(case: Case) -> Iterator[Finding]:
    """Whether every stage fits the budget, and how."""
    assert case.run is not None
    config, place = settings_of(case.run, case.tried), place_of(case.run)
    tasks = {row.name: case.tasks[row.name][0] for row in case.rows}
    kept = saved_fits(case.run, config, tasks, case.state)
    for row in case.rows:
        yield from guarded(f"memory: {row.name}", _planned, case, row.name,
                           lambda row=row: plan_stage(config, row, tasks[row.name], place, kept.get(row.name)))
    yield from guarded(f"memory: {devices.EVALUATION}", _planned, case, devices.EVALUATION,
                       lambda: plan_evaluation(config, place, kept.get(devices.EVALUATION)))


def _planned(case: Case, name: str, search: Callable[[], Plan]) -> Iterator[Finding]:
    case.say(f"memory: {name}")
    found = case.plans[name] = search()
    gib = [figure / devices.GIB for figure in (found.peak_bytes, found.allowance_bytes, found.budget_bytes)]
    is_whole = not found.in_parts and not any(found.recompute.values())
    how = "the whole batch at once" if is_whole else f"micro-batch (of) {budget.describe_towers(found)}"
    yield Finding(f"memory: {name}", "ok", f"{gib[0]:.2f} GiB + {gib[1]:.2f} kept free, of {gib[2]:g}; {how}")


# ---- data --------------------------------------------------------------------------------------------------------


def checkpoint(case: Case) -> Iterator[Finding]:
    """The one to go on from, whose words, concepts and speakers the data are then read with."""
    if case.options.resume is None:
        return
    case.state = state = resume.find_state(case.config, case.options)
    yield Finding("resume", "ok", f"after epoch {state['progress']['epoch']} of {case.config.training.epochs}, in the "
                                  f"stage {state['stage']}" if state else "nothing to resume, a fresh start")


def data(case: Case) -> Iterator[Finding]:
    """What each set has, which are missing, and what the stages find in them."""
    with _heard("trimodal.sets.readers", "trimodal.sets.manifest") as said:
        yield from guarded("data", _load, case)
    if case.data is None:
        return
    for name, splits in case.data.counts().items():
        told = [line for line in dict.fromkeys(said) if line.startswith(name)]
        missing = any("not there" in line for line in told)
        with _heard("trimodal.sets.readers", "trimodal.sets.manifest"):  # it was told before
            fault = _fault(name, case.config) if missing else None  # with the limit that a run keeps to
        found = [f"{split}: {_counted(counts)}" for split, counts in splits.items()] + told
        yield Finding(f"data: {name}", "fail" if fault else "warn" if missing else "ok", "\n".join(found),
                      _again(name, case.config) + (", or raise data.max_bad_pct" if fault else "") if missing else "")
    yield from guarded("data: captions", _captions, case.data, case.config)
    val = case.data.tables["val"]
    if alone := [row.name for row in case.config.stages if all(len(pool(val, task.inputs)) < 2 for task in row.tasks)]:
        yield Finding("data: val", "warn", f"{', '.join(alone)}: {run_module.NO_VAL}", run_module.ADD_VAL)
    if not protocols.can_score(case.data, "test"):
        yield Finding("data: test", "warn", run_module.NO_TEST, run_module.ADD_TEST)
    for row in case.config.stages:
        try:
            case.tasks[row.name] = active_tasks(row, case.data)
        except UserError as error:
            yield of_error(f"stage: {row.name}", error)


def _captions(data: Data, config: Config) -> Iterator[Finding]:
    """What strikes about them, and samples that are told apart by nothing but theirs."""
    found = wording.look(data.splits.values(), data.tokenizer, config.model.context_length)
    if lines := found.lines():
        yield Finding("data: captions", "warn" if found.advice() else "ok", "\n".join(lines), found.advice())
    shared = [f"{split}: {count:,} samples share their {kind} with others"
              for split, of in data.splits.items() for kind, ids in (("picture", of.image_ids), ("sound", of.audio_ids))
              if (count := len(ids) - int((np.unique(ids, return_counts=True)[1] == 1).sum()))]
    if shared:
        yield Finding("data: shared files", "ok", "\n".join([*shared, "these are never each other's wrong answers"]))


def _load(case: Case) -> Iterator[Finding]:
    """Read all sets; where that fails, those without a fault."""
    try:
        case.data = run_module.read_data(case.tried, case.state, fill_cache=False)
        return
    except UserError:
        faults = {name: fault for name in case.config.data.datasets if (fault := _fault(name, case.tried))}
        if not faults:
            raise
    for name, fault in faults.items():
        yield of_error(f"data: {name}", fault)
    if rest := tuple(name for name in case.config.data.datasets if name not in faults):
        case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, datasets=rest))
        case.data = run_module.read_data(case.tried, case.state, fill_cache=False)


def _fault(name: str, config: Config) -> UserError | None:
    try:
        for split in SPLITS:
            deque(read_split(name, split, config), maxlen=0)
    except UserError as error:
        return error
    return None


@contextmanager
def _heard(*names: str) -> Iterator[list[str]]:
    """What some modules log, instead of on the screen."""
    handler, said = BufferingHandler(1000), list[str]()
    logs = [logging.getLogger(name) for name in names]
    propagate = [log.propagate for log in logs]
    for log in logs:
        log.propagate = False
        log.addHandler(handler)
    try:
        yield said
    finally:
        said += [record.getMessage() for record in handler.buffer]
        for log, before in zip(logs, propagate, strict=True):
            log.removeHandler(handler)
            log.propagate = before


def _counted(counts: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in counts.items() if kind != "captions")
    return f"{kinds}; {counts['captions']:,} captions" if counts["captions"] else kinds


class Oddity(NamedTuple):
    """What strikes about a file that can be read."""

    peak: float = 0.0  # of a sound that is stored as floating-point numbers
    cancels: bool = False  # a sound whose channels cancel each other: one of them is taken
    flawed: bool = False  # a picture with damage beside its pixels: it is read without what is damaged


def _oddity(kind: cache.Kind, item: cache.Item) -> np.ndarray:
    """float64 [3], as `Oddity`."""
    try:
        odd = (0.0, False, images.has_flawed_metadata(item[0])) if kind == "image" else (*tracks.oddities(*item), False)
        return np.array(odd, np.float64)
    except Exception as error:  # decoders raise whatever they like
        raise cache.BrokenSample(str(error)) from None


def _oddities(kind: cache.Kind, items: Sequence[cache.Item], config: Config) -> list[Oddity]:
    """What strikes about each of the files; nothing about those that cannot be read."""
    every = cache.read_all(partial(_oddity, kind), items, config)
    return [Oddity() if isinstance(odd, str) else Oddity(float(odd[0]), bool(odd[1]), bool(odd[2])) for odd in every]


@dataclass(frozen=True)
class Tried:
    """Pictures or sounds of one split of a set that were read; a run judges each such group by itself."""

    name: str
    number: int
    of: int
    broken: list[tuple[str, str]]  # path and reason
    odd: list[tuple[str, Oddity]]  # path and what strikes about the file; those of nothing are left out

    def is_too_bad(self, limit_pct: float) -> bool:
        return 100 * len(self.broken) > limit_pct * self.number

    def __str__(self) -> str:
        told = f"{self.number:,} of {self.of:,} {self.name} read"
        return told + (f", {len(self.broken)} broken" if self.broken else "")


def files(case: Case) -> Iterator[Finding]:
    """Some pictures and sounds of each set, read as a run reads them."""
    assert case.data is not None
    for name in case.data.names():
        yield from guarded(f"files: {name}", _files_of, case, name)


def _files_of(case: Case, name: str) -> Iterator[Finding]:
    assert case.data is not None
    groups = [group for split in case.data.splits for kind in cache.KINDS
              if (group := _tried(case, case.data.splits[split].store, name, split, kind)).number]
    lines, broken = list(map(str, groups)), [pair for group in groups for pair in group.broken]
    odd = _odd([pair for group in groups for pair in group.odd])
    if not broken:
        found = "\n".join([*lines, *odd]) or "none: all is drawn or text"
        yield Finding(f"files: {name}", "warn" if odd else "ok", found, "; ".join(odd.values()))
        return
    limit, again = case.config.data.max_bad_pct, _again(name, case.config)
    fails = any(group.is_too_bad(limit) for group in groups)
    told = [*lines, *odd, f"a run allows {limit:g} % of each to be broken; these are:", *_by_reason(broken)]
    advice = "; ".join([f"{again}, or raise data.max_bad_pct" if fails else again, *odd.values()])
    yield Finding(f"files: {name}", "fail" if fails else "warn", "\n".join(told), advice)


def _by_reason(broken: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each reason, the commonest first: how many files, why, and the first of them."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, reason in broken:
        groups.setdefault(re.sub(r"\d+", "0", reason), []).append((path, reason))
    lines = []
    for group in sorted(groups.values(), key=len, reverse=True):
        more = f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
        lines.append(f"{len(group)}: {group[0][1][:200]}: {', '.join(path for path, _ in group[:NAMED])}{more}")
    return lines[:REASONS] + ([f"and {len(lines) - REASONS} further reasons"] if len(lines) > REASONS else [])


def _odd(found: Sequence[tuple[str, Oddity]]) -> dict[str, str]:
    """A line for each thing that strikes about files that can be read, and what to do about it."""
    lines = {}
    if loud := [(path, one.peak) for path, one in found if one.peak > LOUD]:
        lines[f"{_files('sound', loud)} far louder than full scale, which is 1: {loud[0][0]} (peak {loud[0][1]:,.6g})"
              ] = SCALE
    if cancels := [path for path, one in found if one.cancels]:
        lines[f"{_files('sound', cancels)} with channels that cancel each other, of which the loudest is taken: "
              f"{cancels[0]}"] = "save these sounds with one channel"
    if flawed := [path for path, one in found if one.flawed]:
        lines[f"{_files('picture', flawed)} with damage beside the pixels (metadata, end of file), read without: "
              f"{flawed[0]}"] = "save these pictures anew where they stand the wrong way up"
    return lines


def _files(kind: str, found: Sequence[object]) -> str:
    return f"{len(found):,} {kind}{'s' if len(found) > 1 else ''}"


def _tried(case: Case, store: cache.Store, name: str, split: str, kind: cache.Kind) -> Tried:
    """All that the cache knows already, else some that processes decode now."""
    table, title = store.table, f"{split} {kind}s"
    codes = [code for code, known in enumerate(table.sources.names) if known == name]
    has = table.has_image if kind == "image" else table.has_audio
    rows = np.flatnonzero(has & np.isin(table.sources.codes, codes))
    chosen = np.random.default_rng(0).permutation(rows)[:SAMPLE_FILES].tolist()
    paths = table.images if kind == "image" else table.audio
    items = [(paths[row], float(table.start_s[row]), float(table.duration_s[row]))
             for row in chosen if not store.is_drawn(row)]
    if kind in store.places and len(rows) and (store.places[kind][rows, 0] >= 0).all():
        known = zip(rows.tolist(), store.places[kind][rows].tolist(), strict=True)
        broken = [_reason(paths[row], reason) for row, (entry, number) in known
                  if (reason := store.entries[entry].reasons.get(number))]
        reread = items if kind == "sound" else []  # what strikes about pictures harms nothing: not worth their time
        return Tried(title, len(rows), len(rows), broken, _odd_ones(case, kind, reread))
    case.say(f"files: {name}, {len(items)} {title}")
    broken, good = [], []
    for item, found in zip(items, cache.decode_all(kind, items, case.tried), strict=True):
        if isinstance(found, str):
            broken.append(_reason(item[0], found))
        else:
            good.append(item)
    return Tried(title, len(items), len(rows), broken, _odd_ones(case, kind, good))


def _odd_ones(case: Case, kind: cache.Kind, items: Sequence[cache.Item]) -> list[tuple[str, Oddity]]:
    """Path and what strikes about it, of files about which something does."""
    found = _oddities(kind, items, case.tried)
    return [(path, one) for (path, _, _), one in zip(items, found, strict=True) if any(one)]


def _reason(path: str, told: str) -> tuple[str, str]:
    return path, told.removeprefix(f"{path}: ")


def _again(name: str, config: Config) -> str:
    return download_command(name, config) if READERS[name].downloadable else "mend or remove them"


# ---- disk --------------------------------------------------------------------------------------------------------


def disk(case: Case) -> Iterator[Finding]:
    """Whether the output folder can be written and holds what a run saves, and the cache."""
    folder = Path(case.config.paths.output_dir)
    yield from guarded("output folder", _output_folder, case.options, folder)
    yield from guarded("disk: checkpoints", _room_for_checkpoints, case.config, folder)
    if case.data is not None:
        yield from guarded("disk: cache", _cache, case, case.data)


def _output_folder(options: Options, folder: Path) -> Iterator[Finding]:
    """One that is in use is refused, unless the run in it is resumed or thrown away and no process trains there."""
    for part in (folder / name for name in ("", "checkpoints", "logs", "reports")):
        if reason := _unwritable(part):
            yield Finding("output folder", "fail", f"{folder}: cannot be written ({reason})",
                          "choose another --output-dir")
            return
    if (folder / run_module.LOCK).exists():
        with open(folder / run_module.LOCK, "a", encoding="utf-8") as lock:
            run_module.hold(lock, folder)
    used = run_module.parts_in_use(folder)
    if used and not options.overwrite and not run_module.is_within(options.resume, folder):
        yield Finding("output folder", "fail", f"{folder}: holds an earlier run ({', '.join(used)})",
                      "--resume auto goes on with it, --overwrite deletes it; or another --output-dir")
        return
    deletes = ", deletes an earlier run" if used and options.overwrite else ""
    yield Finding("output folder", "ok", f"{folder}: can be written{deletes}")


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or made where it will be."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return None


def checkpoint_bytes(config: Config) -> tuple[int, int, int]:
    """How many checkpoints a run keeps at most, what each takes, and what all take. Weights, their moments and the
    average of each are a checkpoint's largest part; three more hold weights: the best, the final one, and
    model.safetensors."""
    training = config.training
    with torch.device("meta"):
        model = TriModalModel(config.model)
    weights = 4 * sum(p.numel() for p in model.parameters())
    spared = 4 * sum(p.numel() for p in block_matrices(model)) if training.optimizer == "muon" else 0
    each = weights * (3 + (training.ema_decay > 0)) - spared  # of two moments Muon keeps one
    count = training.keep_checkpoints + training.epochs // saving.KEEP_EVERY + 1  # one more while it is written
    return count, each, count * each + 3 * weights


def _room_for_checkpoints(config: Config, folder: Path) -> Iterator[Finding]:
    count, each, needed = checkpoint_bytes(config)
    here = sum(path.stat().st_size for path in folder.glob("checkpoints/*"))
    free = shutil.disk_usage(nearest_existing(folder)).free + here
    yield Finding("disk: checkpoints", "ok" if needed < free else "fail",
                  f"a run keeps up to {count} of {each / GB:.2f} GB and the best: {needed / GB:.1f} GB; free for it "
                  f"{free / GB:.1f} GB", "" if needed < free else
                  "free space, or another --output-dir, or lower training.keep_checkpoints")


def _cache(case: Case, data: Data) -> Iterator[Finding]:
    config = case.tried
    if not config.data.cache:
        yield Finding("disk: cache", "ok", "off (data.cache=false): each use decodes anew")
        return
    case.say("cache: what it would take")
    found = [cache.entries_to_make(table, config) for table in data.tables.values()]
    sizes = [one for entries in found for one in entries.values()]
    files, needed, room = sum(n for n, _ in sizes), sum(size for _, size in sizes), cache.room_for_entries(config)
    if not files:
        yield Finding("disk: cache", "ok", "filled, or nothing to put into it")
        return
    folder = cache.cache_folder(config)
    if reason := _unwritable(folder):
        yield Finding("disk: cache", "warn", f"{folder}: cannot be written ({reason}): each use decodes anew",
                      "data.cache_dir=ANOTHER_DISK")
        return
    case.fills_cache = needed < room
    told = (f"a run first decodes {files:,} files into {folder}: about {needed / GB:.1f} GB; "
            f"free for it {max(room, 0) / GB:.1f} GB")
    yield Finding("disk: cache", "ok" if needed < room else "warn", told, "" if needed < room else
                  "free space, data.cache_dir=ANOTHER_DISK or a larger data.cache_max_gb; else each use decodes anew")
