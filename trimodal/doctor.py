"""`run_training.py --doctor`: try what a run with these settings needs before it starts, and print a table of it.

Each check yields rows, and leaves in a `Case` what later ones need. It calls the functions that training calls: nothing
here is a second way to read data, to plan memory or to make a step. Nothing is written outside a temporary folder; only
word embeddings of the hub, and the small files of its towers, are fetched where they are not on this machine. torch and
what needs it are imported within functions, since the doctor has to say so where they cannot be loaded.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimodal.config import Config, StageConfig, TaskConfig
from trimodal.errors import UserError, counted
from trimodal.redaction import without_secrets
from trimodal.training.signals import Interruption

if TYPE_CHECKING:
    from datasets import Data
    from trimodal.towers.base import PretrainedTower
    from trimodal.training.run import Options, Run
    from trimodal.training.stage import Stage

GB = 1e9
SET_UP = "bash setup_environment.sh"
NOT_FOR_TRAINING = ("requests", "py7zr", "pyarrow", "transformers")  # loaded by downloads and hub embeddings alone
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL"}
STEP_SAMPLES = 8  # of the batch that each task is tried on
NO_TERMINAL_WIDTH = 160


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, its state, what was found, and a command or setting where it could be better."""

    check: str
    state: str  # ok, warn, fail or skipped
    found: str
    advice: str = ""


def format_table(findings: Sequence[Finding], width: int) -> str:
    """Check, state and finding in aligned columns, wrapped at `width`; advice below, never wrapped, to be copied."""
    lines, title_width = list[str](), max(len(one.check) for one in findings)
    for one in findings:
        head = f"{one.check:{title_width}}  {one.state:7}  "
        body = [piece for line in one.found.split("\n") for piece in textwrap.wrap(
            line, max(width - len(head), 40), break_long_words=False, break_on_hyphens=False)]
        rows = body + ([f"-> {one.advice}"] if one.advice else [])
        lines += [(head if i == 0 else " " * len(head)) + row for i, row in enumerate(rows)]
    return "\n".join(lines)


def guarded(title: str, check: Callable[..., Iterable[Finding]], *given: Any) -> Iterator[Finding]:
    """Yield the rows of a check, and a failed row for whatever it raises."""
    try:
        yield from check(*given)
    except Exception as error:
        yield _failed(title, error)


def _failed(title: str, error: Exception) -> Finding:
    if isinstance(error, UserError):  # says what is wrong; what to do
        found, _, advice = str(error).rpartition("; ")
        return Finding(title, "fail", found or advice, advice if found else "")
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    devices = sys.modules.get("trimodal.memory.devices")  # not loaded for this: torch may be what is broken
    if devices is not None and devices.is_out_of_memory(error):
        return Finding(title, "fail", f"out of memory: {message}",
                       "end other programs on the device, or a smaller model.size")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(title, "fail", f"{message} ({last.filename}, line {last.lineno})",
                   f"{SET_UP} mends the environment; if it stays, report this row")


def main(config: Config, device: str = "auto", resume: str | None = None, *, overwrite: bool = False,
         init: str | None = None) -> int:
    """Run all checks, print the table, and return 0 if nothing failed, else 1. Interrupted, it prints what it has.

    Raises:
        UserError: under torchrun.
        KeyboardInterrupt: a signal asked to stop.
    """
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        raise UserError("--doctor: looks at one process; start it with python, not with torchrun")
    findings, last = list[Finding](), "interrupted: the rest has not been looked at"
    with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as folder, Interruption():
        try:
            with contextlib.closing(examine(config, Path(folder), device, resume, overwrite, init)) as rows:
                findings.extend(rows)
            last = _summary(findings)
        finally:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL_WIDTH
            encoding = sys.stdout.encoding or "utf-8"  # which may not have all characters of file names
            text = without_secrets(f"{format_table(findings, width)}\n{last}")
            print(text.encode(encoding, "backslashreplace").decode(encoding))
    return int(any(one.state == "fail" for one in findings))


def _summary(findings: Sequence[Finding]) -> str:
    states = Counter(one.state for one in findings)
    advice = ("mend what failed and try again" if states["fail"] else "a run with these settings can start"
              + ("; read the warnings first" if states["warn"] else ""))
    return f"{', '.join(f'{n} {state}' for state, n in states.items())}: {advice}"


def examine(config: Config, folder: Path, device: str, resume: str | None, overwrite: bool,
            init: str | None = None) -> Generator[Finding, None, None]:
    """Yield all rows. What the project prints meanwhile is dropped; `folder` takes temporary files."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(guarded("packages", check_packages))
        yield from found
        if any(one.state == "fail" for one in found):
            yield Finding("all else", "skipped", "needs all packages; see above")
            return
        from tqdm import tqdm

        from trimodal.training.run import Options

        case = Case(config, Options(device, resume, overwrite, init), folder)
        with tqdm(CHECKS, "Doctor", disable=None, leave=False, bar_format="{desc} {n}/{total} {postfix}") as bar:
            case.show = bar.set_postfix_str
            for title, check, needs in bar:
                case.show(title)
                if missing := [need for need in needs.split() if getattr(case, need) is None]:
                    yield Finding(title, "skipped", f"needs {' and '.join(missing)}; see above")
                else:
                    yield from guarded(title, check, case)


@dataclass
class Case:
    """What the checks share: options, and what earlier checks have loaded for the later ones."""

    config: Config  # as asked for, without the data sets that cannot be read
    options: "Options"
    folder: Path  # for temporary files
    show: Callable[[str], Any] = print  # what is being looked at
    device: Any = None  # torch.device
    state: dict[str, Any] | None = None  # the checkpoint that the run goes on from
    towers: "dict[str, PretrainedTower] | None" = field(default_factory=dict)  # None: they cannot be had
    data: "Data | None" = None
    tasks: dict[str, tuple[list[TaskConfig], list[str]]] = field(default_factory=dict)  # of `active_tasks`, by stage
    run: "Run | None" = None  # in the temporary folder, with few samples in a batch

    @property
    def trial(self) -> Config:
        """The configuration that writes to the temporary folder; broken files do not end it, `check_files` counts
        them, and reading happens in other processes, so that a file that hangs holds nothing up."""
        paths = dataclasses.replace(self.config.paths, output_dir=str(self.folder))
        data = dataclasses.replace(self.config.data, max_bad_pct=100.0, workers=self.config.data.workers or 1)
        return dataclasses.replace(self.config, paths=paths, data=data)


def check_packages() -> Iterator[Finding]:
    """Whether Python and all packages of requirements.txt are here, work, and are of the versions that were tested."""
    from packaging.requirements import Requirement

    is_tested = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", "ok" if is_tested else "warn", f"Python {platform.python_version()}",
                  "" if is_tested else f"tested with 3.10 to 3.13; PYTHON=python3.12 {SET_UP}")
    text = (Path(__file__).resolve().parents[1] / "requirements.txt").read_text(encoding="utf-8")
    wanted = [Requirement(line) for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    faults = [fault for one in wanted if (fault := _package_fault(one.name))]
    if faults:
        yield Finding("packages", "fail", "\n".join(faults), SET_UP)
        return
    versions = {one.name: importlib.metadata.version(one.name) for one in wanted}
    other = [f"{one.name} {versions[one.name]}, not {one.specifier}" for one in wanted
             if not one.specifier.contains(versions[one.name], prereleases=True)]
    found = f"other versions than were tested: {'; '.join(other)}" if other else f"{len(wanted)} in their tested ranges"
    yield Finding("packages", "warn" if other else "ok", f"torch {versions['torch']}, {found}", SET_UP if other else "")


def _package_fault(name: str) -> str | None:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    if name not in NOT_FOR_TRAINING:
        try:
            importlib.import_module(IMPORTED_AS.get(name, name))
        except Exception as error:  # a binary of another build raises nearly anything
            return f"{name} cannot be imported: {' '.join(str(error).split())[:120]}"
    return None


def check_word_embeddings(case: Case) -> Iterator[Finding]:
    from trimodal.data.tokenizer import needs_network

    missing = needs_network(case.config.model)
    yield Finding("word embeddings", "warn" if missing else "ok", f"{case.config.model.word_embeddings} "
                  + ("is not on this machine yet: it is fetched from the hub" if missing else "needs no network"),
                  "reach the hub once (HF_ENDPOINT names a mirror), or model.word_embeddings=minilm" if missing else "")


def check_device(case: Case) -> Iterator[Finding]:
    """The device and precision that a run will use, and whether as much memory as its budget is free."""
    import torch

    from trimodal.data.workers import cpu_cores
    from trimodal.memory import devices

    device = devices.choose_device(case.options.device)
    precision = devices.choose_precision(device, case.config.training.use_amp)
    devices.use_deterministic(case.config.training.deterministic)
    (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()  # raises where it cannot compute
    case.device = device
    yield Finding("device", "ok", f"{devices.device_name(device)}, {precision.reason}; "
                                  f"{counted(cpu_cores(), 'CPU core')}, {counted(torch.get_num_threads(), 'thread')}")
    free, total = devices.free_and_total_gib(device)
    short = free < case.config.budget_gb
    yield Finding("device memory", "warn" if short else "ok",
                  f"{free:.1f} of {total:.1f} GiB are free, the budget is {case.config.budget_gb:g}",
                  f"memory.budget_gb={max(free - 0.5, 0.5):.1f}, or end other programs" if short else "")


def check_resume(case: Case) -> Iterator[Finding]:
    """The checkpoint that --resume names: the data are read with its vocabulary, concepts and speakers."""
    from trimodal.training.resume import find_state

    if case.options.resume is not None:
        case.state = state = find_state(case.config, case.options)
        yield Finding("resume", "ok", f"after epoch {state['progress']['epoch']} of {case.config.training.epochs}, in "
                                      f"the stage {state['stage']}" if state else "nothing to resume, a fresh start")


def check_init(case: Case) -> Iterator[Finding]:
    """The checkpoint that --init names; how much of it fits is known with the model."""
    from trimodal.training.initial import read_source

    if case.options.init is not None:
        yield Finding("init", "ok", f"{read_source(case.options.init).path}: can be read")


def check_towers(case: Case) -> Iterator[Finding]:
    """The pretrained towers that the configuration names: opened with their weights, if these are on this machine."""
    from trimodal.towers.settings import with_towers
    from trimodal.training.run import towers_of

    case.towers = None
    towers = towers_of(case.config, case.state, "if here")
    case.config = dataclasses.replace(case.config, model=with_towers(case.config.model, towers))
    case.towers = towers
    for name, tower in towers.items():
        count = sum(p.numel() for p in tower.parameters())
        found = f"{tower.source}, {count / 1e6:.1f} M parameters, width {tower.dim}, licence {tower.licence}"
        yield Finding(f"tower: {name}", "ok", found) if tower.digest else Finding(
            f"tower: {name}", "warn", f"{found}; its weights ({4 * count / GB:.2g} GB in float32) are not on this "
            "machine yet: a run fetches them, and random ones stand in for them here",
            "reach the hub or address that has them (HF_ENDPOINT names a mirror) when the run starts")


def check_data(case: Case) -> Iterator[Finding]:
    """The samples of each data set, files missing from its lists, and whether each stage has samples to train on."""
    from trimodal.data.batches import pool
    from trimodal.evaluation import protocols
    from trimodal.training import validation
    from trimodal.training.stage import active_tasks

    with _logged("trimodal.sets") as said:
        faults = _load(case)
    yield from (_failed(f"data: {name}", fault) for name, fault in faults.items())
    if case.data is None:
        return
    for name, splits in case.data.counts().items():
        lines = [f"{split}: " + ", ".join(counted(n, "caption") if kind == "captions" else f"{n:,} {kind}"
                                          for kind, n in counts.items() if n or kind != "captions")
                 for split, counts in splits.items()]
        lines += [line for line in dict.fromkeys(said) if line.startswith(name)]
        missing = any("not there" in line for line in lines)
        yield Finding(f"data: {name}", "warn" if missing else "ok", "\n".join(lines),
                      _how_to_mend(name, case.config) if missing else "")
    yield from guarded("data: captions", _captions, case.data, case.config)
    yield from guarded("data: near-equal files", _near_files, case.data, case.config)
    val = case.data.tables["val"]
    if alone := [row.name for row in case.config.stages if all(len(pool(val, task.inputs)) < 2 for task in row.tasks)]:
        yield Finding("data: val", "warn", f"{', '.join(alone)}: {validation.NO_VAL}", validation.ADD_VAL)
    if not protocols.can_score(case.data, "test"):
        yield Finding("data: test", "warn", validation.NO_TEST, validation.ADD_TEST)
    for row in case.config.stages:
        try:
            case.tasks[row.name] = active_tasks(row, case.data)
        except UserError as error:
            yield _failed(f"stage: {row.name}", error)


def _load(case: Case) -> dict[str, UserError]:
    """Read the sets that can be read; return why a run cannot read the others, by name of the set."""
    from datasets import read_tables
    from trimodal.data.samples import SPLITS
    from trimodal.training.run import read_data

    def fault(name: str, config: Config) -> UserError | None:
        try:
            read_tables(dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=(name,))), SPLITS)
        except UserError as error:
            return error
        return None

    names = case.config.data.datasets
    faults = {name: error for name in names if (error := fault(name, case.config))}
    if rest := tuple(name for name in names if name not in faults or not fault(name, case.trial)):
        case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, datasets=rest))
        case.data = read_data(case.trial, case.state, towers=case.towers, fill_cache=())
    return faults


@contextlib.contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """Collect what the loggers below `name` say instead of printing it."""
    logger, handler, said = logging.getLogger(name), BufferingHandler(1000), list[str]()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        said += [record.getMessage() for record in handler.buffer]
        logger.removeHandler(handler)
        logger.propagate = True


def _captions(data: "Data", config: Config) -> Iterator[Finding]:
    """Captions that look wrong, and how many samples share a file."""
    import numpy as np

    from trimodal.data import wording

    found = wording.look(data.splits.values(), data.tokenizer, config.model.context_length)
    shared = [f"{name}: {count:,} samples share their {kind} with others, and are no wrong answers of each other"
              for name, split in data.splits.items()
              for kind, ids in (("image", split.image_ids), ("sound", split.audio_ids))
              if (count := len(ids) - int((np.unique(ids, return_counts=True)[1] == 1).sum()))]
    if lines := found.lines() + shared:
        yield Finding("data: captions", "warn" if found.advice() else "ok", "\n".join(lines), found.advice())


def _near_files(data: "Data", config: Config) -> Iterator[Finding]:
    """Held-out files that are near-equal to one of the training split, of those that the cache holds."""
    from trimodal.data.near import near_files

    reading = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=False))  # nothing is kept
    lines = []
    for split in ("val", "test"):
        for modality, pairs in near_files(data.splits[split], data.splits["train"], reading).items():
            for row, other in pairs[:1].tolist():
                lines.append(f"{split}: {counted(len(pairs), f'{modality} file')}, such as "
                             f"{data.tables[split].keys[row]} and {data.tables['train'].keys[other]}")
    if lines:
        yield Finding("data: near-equal files", "warn", "\n".join(lines),
                      "look at them; what was copied belongs on one side of the split")


def _how_to_mend(name: str, config: Config) -> str:
    from trimodal.sets import SETS, download_command

    return download_command(name, config) if SETS[name].source else "mend or remove them"


def check_files(case: Case) -> Iterator[Finding]:
    """Decode some images and sounds of each split of each set, as a run does."""
    assert case.data is not None
    for name in case.data.names():
        yield from guarded(f"files: {name}", _files, case, name)


def _files(case: Case, name: str) -> Iterator[Finding]:
    from trimodal.data.probe import probe

    assert case.data is not None
    found = probe(case.data.splits, name, case.trial, lambda what: case.show(f"files: {name}, {what}"))
    fails, advice = found.worst_pct > case.config.data.max_bad_pct, found.advice()
    if found.broken:
        advice.insert(0, _how_to_mend(name, case.config) + (", or raise data.max_bad_pct" if fails else ""))
    lines = found.lines(case.config.data.max_bad_pct) or ["none: all is generated or text"]
    state = "fail" if fails else "warn" if advice else "ok"
    yield Finding(f"files: {name}", state, "\n".join(lines), "; ".join(advice))


def check_disk(case: Case) -> Iterator[Finding]:
    """Whether the output folder can be written and holds what a run saves, and the cache."""
    folder = Path(case.config.paths.output_dir)
    yield from guarded("output folder", _output_folder, case.options, folder)
    if case.towers is not None:
        yield from guarded("disk: checkpoints", _room_for_checkpoints, case.config, folder, case.towers)
        if case.data is not None:
            yield from guarded("disk: cache", _room_for_cache, case.data, case.trial, case.towers)


def _output_folder(options: "Options", folder: Path) -> Iterator[Finding]:
    """A folder in use is refused, unless the run in it is resumed or deleted and no process trains there."""
    from trimodal.training import run

    for part in (folder / name for name in ("", "checkpoints", "logs", "reports")):
        if reason := _why_not_writable(part):
            yield Finding("output folder", "fail", f"{folder}: cannot be written ({reason})",
                          "choose another --output-dir")
            return
    if (folder / run.LOCK).exists():
        if lock := run.hold(folder):
            lock.release()
    used = ", ".join(run.parts_in_use(folder))
    if used and not options.overwrite and not run.is_within(options.resume, folder):
        yield Finding("output folder", "fail", f"{folder}: holds an earlier run ({used})",
                      "--resume auto goes on with it, --overwrite deletes it; or another --output-dir")
    else:
        deletes = ", deletes an earlier run" if used and options.overwrite else ""
        yield Finding("output folder", "ok", f"{folder}: can be written{deletes}")


def _why_not_writable(folder: Path) -> str | None:
    from trimodal.files import nearest_existing

    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _room_for_checkpoints(config: Config, folder: Path, towers: "dict[str, PretrainedTower]") -> Iterator[Finding]:
    from trimodal.files import nearest_existing
    from trimodal.training.saving import checkpoint_bytes

    count, each, needed = checkpoint_bytes(config, towers)
    here = sum(path.stat().st_size for path in folder.glob("checkpoints/*"))
    free = shutil.disk_usage(nearest_existing(folder)).free + here
    yield Finding("disk: checkpoints", "ok" if needed < free else "fail",
                  f"a run keeps up to {count} of {each / GB:.2f} GB and the best: {needed / GB:.1f} GB; free for it "
                  f"{free / GB:.1f} GB", "" if needed < free else
                  "free space, or another --output-dir, or lower training.keep_checkpoints")


def _room_for_cache(data: "Data", config: Config, towers: "dict[str, PretrainedTower]") -> Iterator[Finding]:
    from trimodal.data import cache, store
    from trimodal.towers.settings import decoded_kinds

    folder, kinds = cache.cache_folder(config), decoded_kinds(config, towers)
    sizes = [size for table in data.tables.values() for size in store.entries_to_make(table, config, kinds).values()]
    files, needed, room = sum(n for n, _ in sizes), sum(size for _, size in sizes), cache.room_for_entries(config)
    if not config.data.cache or not files:
        yield Finding("disk: cache", "ok", "filled, or nothing to put into it" if config.data.cache else
                      "off (data.cache=false): each use decodes anew")
    elif reason := _why_not_writable(folder):
        yield Finding("disk: cache", "warn", f"{folder}: cannot be written ({reason}): each use decodes anew",
                      "data.cache_dir=ANOTHER_DISK")
    else:
        yield Finding("disk: cache", "ok" if needed < room else "warn",
                      f"a run first decodes {counted(files, 'file')} into {folder}: about {needed / GB:.1f} GB; free "
                      f"for it {max(room, 0) / GB:.1f} GB", "" if needed < room else "free space, "
                      "data.cache_dir=ANOTHER_DISK or a larger data.cache_max_gb; else each use decodes anew")


def check_memory(case: Case) -> Iterator[Finding]:
    """Open the run, with few samples in a batch, and plan the memory of each stage as it will be asked of the run."""
    from trimodal.memory.devices import GIB
    from trimodal.training.initial import format_table, headline
    from trimodal.training.planner import plan_stages
    from trimodal.training.plans import describe_towers, saved_fits, settings_of, setup_of
    from trimodal.training.run import open_run

    with contextlib.suppress(OSError):  # what was planned before need not be planned again
        shutil.copytree(Path(case.config.paths.output_dir) / "plans", case.folder / "plans")
    options = dataclasses.replace(case.options, resume=None, overwrite=False)
    run = open_run(case.trial, options, case.state, data=case.data, towers=case.towers)
    run.tracker.close()
    config, tasks = settings_of(run, case.trial), {name: tasks for name, (tasks, _) in case.tasks.items()}
    case.run = run
    yield Finding("model", "ok", f"{config.model.size}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M "
                                 f"parameters; {counted(len(run.data.concepts), 'concept')}, "
                                 f"{counted(len(run.data.speakers), 'speaker')}")
    if taken := run.initialised_from:
        yield Finding("initial weights", "ok", f"{headline(taken)}\n{format_table(taken)}")
    yield from guarded("disk: features", _room_for_features, run)
    plans = plan_stages(config, tasks, setup_of(run), saved_fits(run, config, tasks, case.state))
    for name, plan in plans.items():
        yield Finding(f"memory: {name}", "ok", f"{plan.peak_bytes / GIB:.2f} GiB + {plan.allowance_bytes / GIB:.2f} "
                      f"kept free, of {plan.budget_bytes / GIB:g}; micro-batch (of) {describe_towers(plan)}")
    if (hours := config.training.max_hours) is not None:
        yield Finding("training.max_hours", "ok", f"{hours:g} h for at most "
                      f"{counted(config.training.epochs, 'epoch')}; how many fit is known once steps have been timed")


def _room_for_features(run: "Run") -> Iterator[Finding]:
    """What features of frozen towers take on the disk, and how long encoding takes, both from a batch of each."""
    from trimodal.data import cache
    from trimodal.towers.features import missing
    from trimodal.towers.settings import frozen_until

    names = set.union(*frozen_until(run.config, run.model.towers).values())
    if not run.config.data.cache or not names:
        return
    encoders = {name: getattr(run.model.eval(), name) for name in sorted(names)}
    todo = missing(run.data.splits.values(), encoders, run.config)
    needed, seconds = sum(one.bytes for one in todo), sum(one.seconds for one in todo)
    room = cache.room_for_entries(run.config)
    yield Finding("disk: features", "ok" if needed < room else "warn", "all are in the cache" if not todo else
                  f"a run first encodes {sum(one.items for one in todo):,} images, sounds and captions: about "
                  f"{needed / GB:.2g} GB and {seconds / 60:.1f} minutes; free for it {max(room, 0) / GB:.1f} GB",
                  "" if needed < room else "free space, data.cache_dir=ANOTHER_DISK, a larger data.cache_max_gb or a "
                  "smaller keep_tokens; else each step encodes anew")


def check_steps(case: Case) -> Iterator[Finding]:
    """One optimizer step of each task of each stage on a few real samples."""
    for row in case.config.stages:
        if row.name in case.tasks:  # else it has nothing to train, as a row says
            yield from guarded(f"step: {row.name}", _stage_steps, case, row)


def _stage_steps(case: Case, row: StageConfig) -> Iterator[Finding]:
    from trimodal.memory.devices import Fit
    from trimodal.training.planner import TOWERS
    from trimodal.training.stage import build_stage

    assert case.run is not None
    tasks, skipped = case.tasks[row.name]
    size = STEP_SAMPLES * case.config.training.captions_per_visit
    case.run.fits[row.name] = Fit(dict.fromkeys(TOWERS, size), dict.fromkeys(TOWERS, 0))
    stage = build_stage(case.run, row, tasks, 1)
    for number, task in enumerate(tasks):
        title = f"step: {row.name} {'-'.join(task.inputs)}"
        case.show(title)
        yield from guarded(title, _step, title, case.run, stage, number)
    for line in skipped:
        yield Finding(f"step: {row.name}", "skipped", line.partition("] ")[2])


def _step(title: str, run: "Run", stage: "Stage", number: int) -> Iterator[Finding]:
    import numpy as np

    from datasets import Loader
    from trimodal.data.batches import pool
    from trimodal.training.loop import train_step

    task = stage.tasks[number]
    rows = np.random.default_rng(0).permutation(pool(run.data.tables["train"], task.inputs))[:STEP_SAMPLES]
    run.model.train()
    # one worker process: a file that hangs or crashes its reader does so there
    batch = next(iter(Loader(run.data, "train", [(0, rows)], run.config, inputs=[task.inputs], train=True, epoch=1,
                             workers=1)))
    loss, parts, norm, finite = train_step(run, stage, number, batch).read()
    if finite and math.isfinite(loss):
        yield Finding(title, "ok", f"{', '.join(task.objectives)}: loss {loss:.3f}, gradient norm {norm:.3g}, finite")
        return
    bad = ", ".join(name for name, value in parts.items() if not math.isfinite(value)) or "the gradient"
    yield Finding(title, "fail", f"not finite: {bad}", "training.use_amp=false" if run.precision.dtype is not None else
                  f"look at the samples' values, or leave this objective out of stages.{stage.row.name}")


CHECKS: tuple[tuple[str, Callable[[Case], Iterator[Finding]], str], ...] = (  # the attributes of a case that each needs
    ("device", check_device, ""), ("word embeddings", check_word_embeddings, ""), ("resume", check_resume, ""),
    ("init", check_init, ""), ("towers", check_towers, ""), ("data", check_data, "towers"),
    ("files", check_files, "data"), ("disk", check_disk, ""), ("memory", check_memory, "device data"),
    ("step", check_steps, "run"))
