"""The output folder of a run: which of its files are the run's, what --overwrite removes, and where what lies further
on goes when a run goes back to an earlier checkpoint.

A file is the run's where nobody else can have made it: checkpoints hold our digest, event files have a name of ours,
metrics.jsonl has our records alone, others are in a ledger by what was written. All else is the user's: no command
deletes it, changes it or writes over it. What is in the way of a file of ours is kept as NAME.before_DATE_TIME.
"""

import contextlib
import datetime
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
from trimodal.training.tracking import drop_after, drop_events_after, event_files, is_own_log, read_records

LEDGER = ".written.json"  # digests of files that do not hold their own, by name
GOING_BACK = ".going_back.json"  # what is being moved away, until it is
BOARD = Path("logs", "tensorboard")
LOG = Path("logs", "metrics.jsonl")
PROJECTOR = tuple(BOARD / f"projector_{name}" for name in (
    "tensors.tsv", "centred.tsv", "metadata.tsv", "sprite.png", "config.pbtxt"))
MODELS = re.compile(r"checkpoint_epoch_\d+(_step_\d+)?\.pt|(best|final)_model\.pt")  # names of a run's checkpoints
EXPORTS = ("model.safetensors", "config.json")
WRITTEN = "|".join((MODELS.pattern, r"model\.safetensors", r"config(_\d+)?\.(json|yaml)",
                    r"metrics\.jsonl", r"report_\d{8}_\d{6}\w*\.(json|md|html|png)", r"\.\w+\.json",
                    r"events\.out\.tfevents\..+", r"projector_\w+\.\w+"))  # names of all that `replacing` writes there
OF_THE_DATA = "bad_samples.jsonl"  # what was found out about the user's files outlives a run
SHOWN = 5  # names in one line


# ---- what is ours ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path, *names: str) -> Iterator[None]:
    """Let the block write the files `names` of an output folder, and record their digests in its ledger afterwards.

    Before the block, a file of such a name that the ledger does not list (the user's, say) is renamed by `set_aside`.
    """
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


def write_settings(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write the settings of a run as config.yaml, or as config_2.yaml and so on where that is the user's; its path."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
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


def own_files(folder: Path) -> list[Path]:
    """Checkpoints and logs that runs have written into an output folder."""
    checkpoints, logs = folder / "checkpoints", folder / "logs"
    found = [path for path in _files(checkpoints) if MODELS.fullmatch(path.name) and checkpoint.is_own(path)]
    found += [path for name in EXPORTS if is_listed(folder, path := checkpoints / name)]
    found += event_files(folder / BOARD)
    found += [path for name in PROJECTOR if is_listed(folder, path := folder / name)]
    found += [path for path in logs.glob("bad_step_*.pt") if checkpoint.is_own(path)]  # of earlier releases
    log = folder / LOG
    return found + ([log] if not log.is_symlink() and is_own_log(log) else [])


def _files(folder: Path) -> list[Path]:
    """What is in a folder, or nothing where there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


# ---- throwing a run away -----------------------------------------------------------------------------------------


def remove_run(folder: Path) -> None:
    """Delete the checkpoints and logs that runs have written into `folder` (--overwrite). Other files in the same
    subfolders stay, and a line names them."""
    for path in own_files(folder):
        path.unlink(missing_ok=True)
    log = folder / LOG
    if os.path.lexists(log):
        set_aside(log)  # one that is not ours, or not only ours: the new run would append its records to it
    left = [path.relative_to(folder).as_posix() for name in ("checkpoints", "logs", BOARD)
            for path in _files(folder / name) if path.name not in (OF_THE_DATA, BOARD.name)]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        print(f"{folder}: kept, since this project did not write it: {', '.join(left[:SHOWN])}{more}")


# ---- going back --------------------------------------------------------------------------------------------------


def go_back(folder: Path, name: str, epoch: int, step: int, now: datetime.datetime | None = None) -> Path | None:
    """Move the files that a run wrote after the checkpoint `name` into a new folder abandoned_TIME, before the run
    resumes from that checkpoint.

    Checkpoints, exports and reports are moved; settings and logs are copied, and the logs then cut after `step`.
    Nothing happens unless the run has got further than the checkpoint: there is a later checkpoint or a report of a
    later step, or, where `step` is 0, the run had ended a stage or saved its best or final weights. The work is noted
    in a file first, so that after a kill `finish_going_back` completes it.

    Args:
        folder: the run's output folder.
        name: file name of the checkpoint in folder/checkpoints; `epoch` and `step` are those of its weights.
        now: the time in the new folder's name; a second later where that is taken.

    Returns:
        The new folder, or None where nothing came after the checkpoint.
    """
    checkpoints, records = folder / "checkpoints", read_records(folder / LOG)
    reports = [record["file"] for record in records if record["kind"] == "report" and record["step"] > step]
    later = [*checkpoint.later_than(checkpoints / name), *_later_models(checkpoints, epoch)]
    has_results = any(record["kind"] == "stage" for record in records) or later
    if not (checkpoint.later_than(checkpoints / name) or reports or (has_results and not step)):
        return None
    later += [path for path in (*(checkpoints / name for name in EXPORTS), *(folder / name for name in PROJECTOR))
              if is_listed(folder, path)]
    stems = "|".join(re.escape(Path(file).stem) for file in reports)
    later += [path for path in _files(folder / "reports")
              if reports and re.fullmatch(rf"({stems})(_\w+)?\.(json|md|html|png)", path.name)]
    moment = (now or datetime.datetime.now()).replace(microsecond=0)
    while os.path.lexists(place := folder / moment.strftime("abandoned_%Y%m%d_%H%M%S")):
        moment += datetime.timedelta(seconds=1)
    files = [path.relative_to(folder).as_posix() for path in later]
    with replacing(folder / GOING_BACK, "w") as file:
        json.dump({"place": place.name, "step": step, "files": files}, file)
    return finish_going_back(folder)


def _later_models(checkpoints: Path, epoch: int) -> list[Path]:
    """final_model.pt, and best_model.pt where it holds weights of a later epoch."""
    best, final = checkpoints / "best_model.pt", checkpoints / "final_model.pt"
    found = [final] if checkpoint.is_own(final) else []
    if checkpoint.is_own(best):
        with contextlib.suppress(CheckpointError):  # damaged: it stays
            found += [best] if checkpoint.load(best)["epoch"] > epoch else []
    return found


def finish_going_back(folder: Path) -> Path | None:
    """Complete the move that `go_back` noted in `folder`; returns the folder moved to, or None where none is noted.

    Every part can be repeated after a kill: first logs and settings are copied, then files are moved, then the logs are
    cut, and the note is deleted last.
    """
    try:
        work = json.loads((folder / GOING_BACK).read_text("utf-8"))
    except FileNotFoundError:
        return None
    place, log = folder / work["place"], folder / LOG
    settings = [path for path in folder.glob("config*.yaml") if is_listed(folder, path)]
    for path in (log, *settings, *event_files(folder / BOARD)):
        target = place / path.relative_to(folder)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target)
    for name in work["files"]:
        _move(folder / name, place / name)
    if log.exists():
        drop_after(log, work["step"])
    drop_events_after(folder / BOARD, work["step"])
    (folder / GOING_BACK).unlink()
    return place


def _move(source: Path, target: Path) -> None:
    """Whole, to another disk as well; what has been moved before is not there."""
    if os.path.lexists(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target, copy_function=_copy)


def _copy(source: str | Path, target: str | Path) -> None:
    with replacing(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file)
