"""The output folder of a run: which of its files are the run's, what --overwrite removes, and where what lies further
on goes when a run goes back to an earlier checkpoint.

A file is the run's where nobody else can have made it: checkpoints hold our digest, event files have a name of ours or
(of earlier releases) our curves alone, metrics.jsonl has our records alone, others are in a ledger by what was written.
All else is the user's: no command deletes it, changes it or writes over it. What is in the way of a file of ours is
kept beside it as NAME.before_DATE_TIME.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trimodal import checkpoint
from trimodal.errors import CheckpointError
from trimodal.files import replacing, set_aside, sha256_of
from trimodal.training.tracking import (
    EVENTS,
    drop_after,
    event_files,
    is_own_log,
    keep_events,
    read_records,
    shows_points,
)

LEDGER = ".written.json"  # digests of files that do not hold their own, by name
GOING_BACK = ".going_back.json"  # what is being moved away, until it is
BOARD = Path("logs", "tensorboard")
LOG = Path("logs", "metrics.jsonl")
MODELS = re.compile(r"checkpoint_epoch_\d+(_step_\d+)?\.pt|(best|final)_model\.pt")
EXPORTS = ("model.safetensors", "config.json")
WRITTEN = "|".join((MODELS.pattern, r"model\.safetensors", r"config(_\d+)?\.(json|yaml)",
                    r"metrics\.jsonl", r"report_\d{8}_\d{6}\w*\.(json|md|png)", r"\.\w+\.json",
                    r"events\.out\.tfevents\..+"))  # names of all that `replacing` writes there
OF_THE_DATA = "bad_samples.jsonl"  # what was found out about the user's files outlives a run
SHOWN = 5  # names in one line


# ---- what is ours ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path, *names: str) -> Iterator[None]:
    """The block writes these files of an output folder. What is there and not ours is set aside before."""
    for path in (folder / name for name in names):
        if os.path.lexists(path) and not is_listed(folder, path):
            set_aside(path)
    yield
    for name in names:
        _list(folder, name, sha256_of(folder / name))


def _list(folder: Path, name: str, digest: str) -> None:
    known = _ledger(folder)
    known[name] = sorted({*known.get(name, []), digest})
    with replacing(folder / LEDGER, "w") as file:
        json.dump(known, file, indent=1)


def is_listed(folder: Path, path: Path) -> bool:
    """Whether a file holds what a run has written there, and is no link."""
    known = _ledger(folder).get(path.relative_to(folder).as_posix(), [])
    return bool(known) and path.is_file() and not path.is_symlink() and sha256_of(path) in known


def write_settings(folder: Path, text: str) -> Path:
    """Write the settings of a run as config.yaml, or as config_2.yaml and so on where that is the user's; its path."""
    number, path = 1, folder / "config.yaml"
    while os.path.lexists(path) and not is_listed(folder, path) and _text(path) != text:
        number += 1
        path = folder / f"config_{number}.yaml"
    if number > 1:
        print(f"{folder / 'config.yaml'}: not written by this run; the settings used are in {path.name}")
    if _text(path) != text:
        _list(folder, path.name, hashlib.sha256(text.encode()).hexdigest())
        with replacing(path, "w") as file:
            file.write(text)
    return path


def adopt(folder: Path, config: Mapping[str, Any]) -> None:
    """Enter in the ledger what an earlier release, which kept none, wrote there: config.yaml where it says just what a
    checkpoint's `config` does, and exports that are just those of final_model.pt."""
    path = folder / "config.yaml"
    if not is_listed(folder, path) and not path.is_symlink() and (text := _text(path)) and _says(text, config):
        _list(folder, path.name, sha256_of(path))
    paths = [folder / "checkpoints" / name for name in EXPORTS]
    final = folder / "checkpoints" / "final_model.pt"
    if checkpoint.is_own(final) and all(path.is_file() and not is_listed(folder, path) for path in paths):
        state = {name: value for name, value in _facts(final).items() if name != "schema"}
        exported = checkpoint.exported(state) if "model_state_dict" in state else ()
        for path, content in zip(paths, exported, strict=False):
            if not path.is_symlink() and path.stat().st_size == len(content) and path.read_bytes() == content:
                _list(folder, path.relative_to(folder).as_posix(), sha256_of(path))


def settings_text(config: Mapping[str, Any]) -> str:
    """Settings as config.yaml holds them."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _says(text: str, config: Mapping[str, Any]) -> bool:
    """Whether it is these settings as they are written down; a checkpoint holds as many words as the model has."""
    try:
        found = yaml.safe_load(text)
        model = {**config["model"], "vocab_size": found["model"]["vocab_size"]}
    except (yaml.YAMLError, LookupError, TypeError, RecursionError):
        return False
    return text == settings_text({**config, "model": model})


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError):
        return None


def _ledger(folder: Path) -> dict[str, list[str]]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / LEDGER).read_text("utf-8"))
        if isinstance(found, dict):
            return {name: digests for name, digests in found.items() if isinstance(digests, list)}
    return {}


def is_model(name: str) -> bool:
    """Whether a run calls its checkpoints so."""
    return MODELS.fullmatch(name) is not None


def own_files(folder: Path) -> list[Path]:
    """Checkpoints and logs that runs have written into an output folder."""
    checkpoints, logs = folder / "checkpoints", folder / "logs"
    found = [path for path in _files(checkpoints) if is_model(path.name) and checkpoint.is_own(path)]
    found += [path for name in EXPORTS if is_listed(folder, path := checkpoints / name)]
    found += event_files(folder / BOARD)
    found += [path for path in logs.glob("bad_step_*.pt") if checkpoint.is_own(path)]  # of earlier releases
    log = folder / LOG
    return found + ([log] if not log.is_symlink() and is_own_log(log) else [])


def _files(folder: Path) -> list[Path]:
    """What is in a folder, or nothing where there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


# ---- throwing a run away -----------------------------------------------------------------------------------------


def remove_run(folder: Path) -> None:
    """Delete the checkpoints and logs that runs have written there. What lies among them stays, and is named."""
    newest = checkpoint.find_latest(folder / "checkpoints", say=lambda line: None)
    adopt(folder, _facts(newest).get("config", {}) if newest else {})
    for path in own_files(folder):
        path.unlink(missing_ok=True)
    log = folder / LOG
    if os.path.lexists(log):
        set_aside(log)  # records are added to the file of this name
    left = [path for name in ("checkpoints", "logs", BOARD) for path in _files(folder / name)
            if path.name not in (OF_THE_DATA, BOARD.name)]
    if left:
        print(f"{folder}: kept, since this project did not write it: {shown(folder, left)}")


def shown(folder: Path, paths: list[Path]) -> str:
    """Names within the folder, in one line."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---- going back --------------------------------------------------------------------------------------------------


def go_back(folder: Path, name: str, epoch: int, step: int, now: datetime.datetime | None = None) -> Path | None:
    """Where a run has come further than the checkpoint called `name`, as other ones or its report tell: move these, and
    what else came after its epoch and step, into a new folder abandoned_TIME; its path. Before the first step (`step`
    0) so does a run whose checkpoints are gone. After a kill `finish_going_back` does the rest of it."""
    later = checkpoint.later_than(folder / "checkpoints" / name)
    records = read_records(folder / LOG)
    has_ended = any(record["kind"] == "report" and record["step"] > step for record in records)
    if not later and not has_ended and (step or not _has_results(folder, records)):
        return None
    paths = [*_later_models(folder, epoch, step), *_later_reports(folder, step), *event_files(folder / BOARD)]
    moment = (now or datetime.datetime.now()).replace(microsecond=0)
    while os.path.lexists(place := folder / moment.strftime("abandoned_%Y%m%d_%H%M%S")):
        moment += datetime.timedelta(seconds=1)
    files = [path.relative_to(folder).as_posix() for path in [*paths, *later]]
    with replacing(folder / GOING_BACK, "w") as file:
        json.dump({"place": place.name, "step": step, "files": files}, file)
    return finish_going_back(folder)


def _has_results(folder: Path, records: list[dict[str, Any]]) -> bool:
    """Whether a run was at the end of a stage or has saved its best weights there."""
    return any(checkpoint.is_own(folder / "checkpoints" / name) for name in ("best_model.pt", "final_model.pt")) or any(
        record["kind"] == "stage" for record in records)


def finish_going_back(folder: Path) -> Path | None:
    """Do what is left of moving away what came after a checkpoint, if anything is; the place that it is moved to."""
    try:
        work = json.loads((folder / GOING_BACK).read_text("utf-8"))
    except FileNotFoundError:
        return None
    place, log = folder / work["place"], folder / LOG
    for path in (log, *(path for path in folder.glob("config*.yaml") if is_listed(folder, path))):
        target = place / path.relative_to(folder)
        if path.is_file() and not target.exists():
            _copy(path, target)
    for name in work["files"]:
        _move(folder / name, place / name)
    if log.exists():
        drop_after(log, work["step"])
    if moved := event_files(place / BOARD):
        second = moved[0].name.split(".")[3]
        keep_events(moved, folder / BOARD / f"events.out.tfevents.{second}.{place.name}{EVENTS}", work["step"])
    ours = event_files(folder / BOARD)
    others = [path for path in _files(folder / BOARD) if path not in ours and shows_points(path)]
    if others:
        print(f"{folder}: TensorBoard still shows event files that this project did not write: {shown(folder, others)}")
    (folder / GOING_BACK).unlink()
    return place


def _move(source: Path, target: Path) -> None:
    """Whole, to another disk as well; what has been moved or copied before is not there, or goes."""
    if not os.path.lexists(source):
        return
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(source, target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        _copy(source, target)
    source.unlink()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file)


def _later_models(folder: Path, epoch: int, step: int) -> list[Path]:
    """best_model.pt, the final one and its exports, where they are ours and hold weights of a later time."""
    best, final, export = (folder / "checkpoints" / name for name in ("best_model.pt", "final_model.pt", "config.json"))
    found = [best] if checkpoint.is_own(best) and _facts(best).get("epoch", 0) > epoch else []
    found += [final] if checkpoint.is_own(final) and _step_of(_facts(final)) > step else []
    if is_listed(folder, export) and _step_of(json.loads(export.read_text("utf-8"))) > step:
        found += [path for name in EXPORTS if is_listed(folder, path := folder / "checkpoints" / name)]
    return found


def _facts(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds; nothing where it is damaged."""
    try:
        return checkpoint.load(path)
    except CheckpointError:
        return {}


def _step_of(state: Mapping[str, Any]) -> int:
    return int(state.get("progress", {}).get("step", 0))


def _later_reports(folder: Path, step: int) -> list[Path]:
    stems = {re.escape(Path(record["file"]).stem) for record in read_records(folder / LOG)
             if record["kind"] == "report" and record["step"] > step}
    return [path for path in _files(folder / "reports")
            if any(re.fullmatch(rf"{stem}(_\w+)?\.(json|md|png)", path.name) for stem in stems)]
