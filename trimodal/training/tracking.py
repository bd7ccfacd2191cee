"""What a run writes while it goes: metrics.jsonl, TensorBoard, the progress bar and one printed line an epoch.

`outputs/logs/metrics.jsonl` holds one JSON object a line, told apart by `kind`: "step", "validation", "stage", "event",
and "report" once the run is complete.
`step` is the number of optimizer steps since the start of the run, over all stages.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trimodal.files import back_up, replacing, say_kept
from trimodal.redaction import without_secrets
from trimodal.training.board import LAYOUT, PLANNED, SKIPPED, charts, points_of, step_points, validation_points

EVENTS = ".trimodal"  # ends the names of our event files: others may lie beside them


class Tracker:
    """Writes records of one run; what an earlier attempt left past `last_step` is dropped from both logs. Processes
    beside the main one have a tracker that does not write."""

    def __init__(self, logs: Path, last_step: int = 0, writes: bool = True):
        self.path, self.writes = logs / "metrics.jsonl", writes
        self.bar: Any = None
        self.has_lost = False
        self.tags = set[str]()  # of the curves that there are
        self.skipped = 0
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        logs.mkdir(parents=True, exist_ok=True)
        if last_step or self.path.exists():
            drop_events_after(logs / "tensorboard", last_step)
        if self.path.exists():
            drop_after(self.path, last_step)
        for record in read_records(self.path):
            self.tags |= points_of(record).keys()
            self.skipped += bool(record.get("skipped_step"))
        self.file = open(self.path, "ab")
        self.board = SummaryWriter(str(logs / "tensorboard"), purge_step=last_step + 1, flush_secs=10,
                                   filename_suffix=EVENTS)

    def open_bar(self, total: int, done: int, description: str) -> None:
        self.bar_total = total
        self.bar = tqdm(total=total, initial=done, desc=description, unit="sample", dynamic_ncols=True, smoothing=0.1,
                        disable=None if self.writes else True)  # None: for terminals only

    def resize_bar(self, part: float) -> None:
        """Let the bar, and the time that it foretells, end at a part of the samples that it was opened for."""
        if self.bar is not None:
            self.bar.total = round(part * self.bar_total)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def advance(self, samples: int, loss: float) -> None:
        self.bar.update(samples)
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.writes:
            tqdm.write(without_secrets(message).encode("utf-8", "backslashreplace").decode("utf-8"))

    def event(self, message: str, step: int, *, once: bool = False, **facts: Any) -> None:
        """Something a user should know: printed, and kept in the log, with `facts`, and in the report; `once`: not kept
        again where an earlier start of the run has done so."""
        self.say(message)
        if once and self.writes and any(line.get("message") == without_secrets(message)
                                        for line in read_records(self.path)):
            return
        self.record({"kind": "event", "step": step, "message": without_secrets(message), **facts})

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl as one line. Where the disk is full the record is dropped and the run
        goes on; a line says so once."""
        if not self.writes:
            return
        try:
            self.file.write(_line(_finite(record)))
            self.file.flush()
        except OSError as error:
            self._lost(error)

    def sync(self) -> None:
        """Flush all records to the disk (fsync), so that no checkpoint is newer than its records."""
        if self.writes:
            with contextlib.suppress(OSError):
                os.fsync(self.file.fileno())

    def _show(self, write: Callable[[Any], Any]) -> None:
        """Let `write` use TensorBoard's writer, which has ended for good once it could not write."""
        if self.writes:
            try:
                write(self.board)
            except OSError as error:
                self._lost(error)

    def _lost(self, error: OSError) -> None:
        if not self.has_lost:
            self.has_lost = True
            self.say(f"{self.path.parent}: records are lost ({error.strerror}); training goes on. Free space")

    def step(self, record: Mapping[str, Any], planned_gib: float | None = None) -> None:
        """One training step, in both logs; `planned_gib`: what `memory_gib` was planned to be."""
        self.record({"kind": "step", **record})
        planned = {} if planned_gib is None else {PLANNED: planned_gib}
        self._curves(record["step"], {**step_points(record), **planned, SKIPPED: self.skipped})

    def skipped_step(self, message: str, step: int, **facts: Any) -> None:
        """A step that was not finite, as an event and a curve of their number."""
        self.event(message, step, skipped_step=True, **facts)
        self.skipped += 1
        self._curves(step, {SKIPPED: self.skipped})

    def validation(self, record: Mapping[str, Any]) -> None:
        self.record({"kind": "validation", **record})
        self._curves(record["step"], validation_points(record))

    def memory(self, stage: str, planned_gib: float, measured_gib: float, process_gib: float, at: int) -> None:
        """Add the memory of a stage to TensorBoard at step `at`.

        `measured_gib` is comparable with the plan: without the memory taken before the model was made, which
        `process_gib` includes.
        """
        values = {"planned": planned_gib, "measured": measured_gib, "process": process_gib}
        self._curves(at, {f"memory/{stage}/{name}_gib": value for name, value in values.items()})

    def _curves(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point to each curve; where one is new, the charts are laid out anew."""
        for name, value in points.items():
            self._show(lambda board, name=name, value=value: board.add_scalar(name, value, step))  # type: ignore[misc]
        if self.writes and not points.keys() <= self.tags:
            from torch.utils.tensorboard.summary import custom_scalars

            self.tags |= points.keys()
            summary = custom_scalars(charts(self.tags))  # SummaryWriter.add_custom_scalars knows no step
            self._show(lambda board: board.file_writer.add_summary(summary, step))

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        self._show(lambda board: board.add_image(name, pixels_HWC, step, dataformats="HWC"))

    def sound(self, name: str, wave_S: np.ndarray, rate_hz: int, step: int) -> None:
        """A sound to play; what is beyond -1 to 1 is cut off."""
        self._show(lambda board: board.add_audio(name, np.clip(wave_S, -1, 1)[None], step, rate_hz))

    def text(self, name: str, markdown: str, step: int) -> None:
        self._show(lambda board: board.add_text(name, markdown, step))

    def close(self) -> None:
        """End both logs; what comes later is dropped."""
        self.close_bar()
        if self.writes:
            with contextlib.suppress(OSError):  # a full disk: what ends the run is told, and not this
                self.file.close()
            self._show(lambda board: board.close())
        self.writes = False


# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; a line that was cut off or damaged is left out."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:  # splitlines would split within records
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "kind" in record]


def _line(record: Mapping[str, Any]) -> bytes:
    """Names of files need not be text: their odd bytes become escapes, which JSON reads as they were."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def is_own_log(path: Path) -> bool:
    """Whether all lines of a metrics.jsonl are records of a run, whole or cut off."""
    begin = _line({"kind": ""})[:10]
    return path.is_file() and all(line.startswith(begin) or begin.startswith(line)
                                  for line in path.read_bytes().split(b"\n"))


def drop_after(path: Path, last_step: int) -> None:
    """Leave the records up to a step in a metrics.jsonl, wherever it is linked to. One that holds lines of others is
    kept beside as it was."""
    path = Path(os.path.realpath(path))
    kept = [record for record in read_records(path) if record.get("step", 0) <= last_step]
    if not is_own_log(path):
        back_up(path, partial(say_kept, path))
    with replacing(path) as file:
        file.writelines(map(_line, kept))


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: None stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- event files ---------------------------------------------------------------------------------------------------


def event_files(folder: Path) -> list[Path]:
    """The event files of ours, oldest first, as TensorBoard orders them: by name."""
    return sorted(path for path in folder.glob(f"events.out.tfevents.*{EVENTS}")
                  if path.is_file() and not path.is_symlink())


def drop_events_after(folder: Path, last_step: int) -> None:
    """Leave the points up to a step in our event files of a folder, in one of them, where they hold any others. The
    server behind TensorBoard's page knows no purge_step: it shows all that any file in the folder holds."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    files, count = event_files(folder), 0
    heads: list[Any] = []
    layouts: list[Any] = []  # of which the last one counts
    kept: dict[tuple[int, str], Any] = {}
    for path in files:
        for event in LegacyEventFileLoader(str(path)).Load():  # ends where a record is cut off or damaged
            if event.HasField("file_version"):
                heads.append(event)
            elif event.HasField("session_log"):  # a resumed run's purge_step: what came before it from there on
                kept = {key: one for key, one in kept.items() if key[0] < event.step}
            elif (tags := " ".join(value.tag for value in event.summary.value)) == LAYOUT:
                layouts += [event] if event.step <= last_step else []
            else:
                count += 1
                if event.step <= last_step:
                    kept[event.step, tags] = event
    if len(kept) == count:
        return
    with replacing(files[0]) as file:
        writer = RecordWriter(file)
        for event in (*heads[:1], *(kept[key] for key in sorted(kept)), *layouts[-1:]):
            writer.write(event.SerializeToString())
    for path in files[1:]:
        path.unlink()
