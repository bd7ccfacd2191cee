"""The user's own data: a JSONL, CSV or TSV file with one sample a line.

    {"image": "photos/1.jpg", "text": ["a dog on grass", "a dog"], "labels": ["dog"], "split": "train"}
    {"audio": "talk.flac", "start": 12.5, "duration": 10, "text": "a door slams", "speaker": "anna", "split": "train"}

Keys (columns of a CSV): image, audio, start and duration (seconds), text, labels, speaker, split, id, or what other
programs call them (see columns.py); all optional, but a line needs an image, an audio file or a text. A text is one
caption, or several as a list, in a cell as JSON, Python or numpy write it: ["a dog", "a dog on grass"]; labels
likewise, in a CSV also parted by ";". Lines that name the same file, and the same stretch of it, are one sample with
all their captions. Relative paths start at the manifest's folder. No path, ".." or link leads out of that folder, or
out of `data.manifest_root` where that is given: a manifest made by somebody else cannot name other files of yours.
"""

import csv
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trimodal.config import Config, DataConfig
from trimodal.data.samples import EMPTY_CELLS, SPLITS, Sample, stable_hash
from trimodal.data.splits import LEAST_VAL, Groups, two_of_each_kind
from trimodal.errors import UserError
from trimodal.sets import columns, written_lists
from trimodal.sets.base import DataSet
from trimodal.sets.columns import Columns
from trimodal.sets.listed_files import File, Files
from trimodal.sets.reading import worded_captions

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS)
# What a file may hold; beyond it, it is not a list of samples, and reading it would fill the memory.
MAX_BYTES = 2_000_000_000  # five million lines of 400
MAX_LINES = 5_000_000  # of CSV rows too: about 1 KB of memory each while the file is checked
MAX_LINE_CHARS = 1_000_000  # of a row; thousands of captions for one picture
MAX_SECONDS = 1e7  # four months: beyond any recording
HELD_OUT = {"test": 0.1, "val": 0.1}  # shares where no line names a split; the rest is train
NO_FILE = File("", -1)

_log = logging.getLogger(__name__)


def read_manifest(path: Path, root: str | None = None, max_missing_pct: float = 0.0) -> Iterator[Sample]:
    """The samples of all splits, in the order of the lines, after the whole file is checked. Its pictures and sounds
    lie in the folder `root` (None: that of the manifest), links followed. What was understood otherwise than it is
    written, or is missing, is logged, a line each.

    Without a `split` column, 10 % of the samples are test and 10 % val, told by their ids alone, so that lines may be
    reordered, and few samples change sides when lines are added; lines that share a picture or a recording stay on one
    side, whichever parts of it they name. Without an `id`, a sample's id is its file name as written, with its start.

    Raises:
        UserError: file and line number, what is wrong there, what is allowed; or more than `max_missing_pct` of the
            files are not there. Those of fewer are samples that cannot be read.
    """
    reading = _Reading(path, Files(path.parent, os.path.join(os.path.realpath(root or path.parent), "")))
    rows = [_Row.parse(where, given, reading) for where, given in _lines(reading)]
    if not rows:
        raise UserError(f"{path}: holds no samples; write one JSON object (or one CSV row below the header) a line")
    lines = _check_missing(reading, max_missing_pct)
    if any(row.split for row in rows):
        _check_splits(rows)
    lines += _notes(reading, rows)  # before lines of one file become one
    samples = _united(rows)
    for line in lines:
        _log.warning("manifest: %s", line)
    _name(samples, {row.key for row in rows})
    if not samples[0].split:
        _draw_splits(samples)
    return (row.sample() for row in samples)


@dataclass
class _Reading:
    """One list, and what is found out about it on the way."""

    path: Path
    files: Files
    between: str = ""  # what parts the labels of a cell
    columns: list[Columns] = field(default_factory=list)
    delimiter: str = ""  # another one than the file's name tells
    lists: int = 0  # cells that another program wrote a list into


@dataclass(slots=True)
class _Row:
    """One checked line; `key` and `split` are filled in later where the line does not give them."""

    where: str  # "file, line N", for errors
    key: str
    split: str
    image: File
    audio: File
    start_s: float
    duration_s: float
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    speaker: str
    name: str  # the default id

    @staticmethod
    def parse(where: str, given: dict[str, Any], reading: _Reading) -> "_Row":
        def take(column: str, convert: Callable[[Any], Any], empty: Any) -> Any:
            if column not in given:
                return empty
            try:
                value = convert(given[column])
            except ValueError as error:
                raise UserError(f"{where}: {column}: {error}, got {given[column]!r:.200}") from None
            reading.lists += column in ("text", "labels") and written_lists.is_list(given[column])
            return value

        def file(column: str) -> File:
            return take(column, lambda name: _file(name, f"{_line(where)}: {column}", reading.files), NO_FILE)

        row = _Row(
            where=where, key=take("id", _word, ""), split=take("split", _split, ""),
            image=file("image"), audio=file("audio"),
            start_s=take("start", _seconds, 0.0), duration_s=take("duration", _seconds, 0.0),
            captions=worded_captions(take("text", written_lists.texts, ()), where),
            labels=tuple(dict.fromkeys(take("labels", partial(written_lists.texts, between=reading.between), ()))),
            speaker=take("speaker", _word, ""), name="")
        row._check(given)
        return row

    def _check(self, given: dict[str, Any]) -> None:
        if not (self.image.path or self.audio.path or self.captions):
            raise UserError(f"{self.where}: nothing to learn from; give an image, an audio file or a text")
        if not self.audio.path and ("start" in given or "duration" in given):
            raise UserError(f"{self.where}: start and duration need an audio file")
        self.name = str(given.get("image") or given.get("audio") or self.captions[0])
        if "start" in given:
            self.name += f"@{self.start_s:g}"

    def media(self) -> dict[File, str]:
        """Files that must not stand on two sides, and their column. A whole file, since stretches of one may overlap,
        and a video may be a picture here and a sound there."""
        return {file: column for file, column in ((self.image, "image"), (self.audio, "audio")) if file.path}

    def kinds(self) -> list[tuple[str, ...]]:
        """The pairs of modalities that it has; else its one."""
        values = {"image": self.image.path, "audio": self.audio.path, "text": self.captions}
        there = [name for name, value in values.items() if value]
        return list(itertools.combinations(there, 2)) or [tuple(there)]

    def unit(self) -> tuple[int, int, float, float] | None:
        """Equal for lines that name the same picture and the same stretch of sound; None for a text alone."""
        files = self.image.number, self.audio.number
        return (*files, self.start_s, self.duration_s) if max(files) >= 0 else None

    def add(self, other: "_Row") -> None:
        """Add the captions, labels, speaker and id of another line on the same files. Raises where speakers differ."""
        if self.speaker and other.speaker and self.speaker != other.speaker:
            _clash(other, f"speaker {other.speaker!r}, but {self.speaker!r} on {_line(self.where)}, which names the "
                          "same file and stretch")
        self.key, self.speaker = self.key or other.key, self.speaker or other.speaker
        self.captions += other.captions
        self.labels = tuple(dict.fromkeys((*self.labels, *other.labels)))

    def sample(self) -> Sample:
        return Sample(key=self.key, source="manifest", split=self.split, image=self.image.path, audio=self.audio.path,
                      start_s=self.start_s, duration_s=self.duration_s, captions=self.captions, labels=self.labels,
                      speaker=self.speaker)


def _line(where: str) -> str:
    return where.rpartition(", ")[2]


# ---- lines -------------------------------------------------------------------------------------------------------


def _lines(reading: _Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the list line by line: (file and line for messages, values by the meaning of their column or key)."""
    path = reading.path
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"data.manifest: {path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _json_lines(reading)
        else:
            yield from _csv_lines(reading)
    except FileNotFoundError:
        raise UserError(f"data.manifest: {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"data.manifest: {path}: cannot be read ({error.strerror})") from None


def _given(where: str, raw: dict[str, Any], meant: Columns) -> dict[str, Any]:
    try:
        return meant.given(raw)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _json_lines(reading: _Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    meant: dict[tuple[str, ...], Columns] = {}
    with reading.path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_bounded(file, reading.path), 1):
            where = f"{reading.path}, line {number}"
            if not line.strip():
                continue
            raw = _json(where, line.rstrip(), partial(_no_twins, where))
            if not isinstance(raw, dict):
                raise UserError(f'{where}: expected an object such as {{"image": "1.jpg"}}, got {line.strip()[:40]}')
            names = tuple(raw)
            if names not in meant:
                meant[names] = columns.understand(names, where)
                reading.columns.append(meant[names])
            yield where, _given(where, raw, meant[names])


def _bounded(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of `file`, none of which is read further than it may go."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES / 1e9:g} GB; split it into several lists")
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_CHARS + 1)
        if not line:
            return
        if len(line) > MAX_LINE_CHARS or number > MAX_LINES:
            raise UserError(f"{path}, line {number}: over {MAX_LINE_CHARS:,} characters in a line, or {MAX_LINES:,} "
                            "lines; one line is one sample")
        yield line


def _json(where: str, text: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: brackets are nested too deeply") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{where}: a whole number of thousands of digits") from None


def _no_twins(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"{where}: {twin!r} is given twice")
    return found


def _csv_lines(reading: _Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    path, row_chars, number = reading.path, 0, 0

    def lines(first: list[str], file: Iterator[str]) -> Iterator[str]:
        nonlocal row_chars, number
        for line in itertools.chain(first, file):
            if loose and (found := loose.search(line)):
                raise UserError(f"{path}, line {number + 1}: blanks before a quote, near {found[0]!r:.40}: it would be "
                                "part of the text; leave the blanks out, or write them in the first line as well")
            row_chars += len(line)
            if row_chars > MAX_LINE_CHARS:
                raise UserError(f"{path}, line {number}: over {MAX_LINE_CHARS:,} characters in a row; is a quote never "
                                "closed?")
            number += 1
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:
        every = _bounded(file, path)
        first = next(every, "")
        usual = DELIMITERS[path.suffix.lower()]
        delimiter = columns.delimiter_of(first, usual)
        reading.between, reading.delimiter = ";", delimiter if delimiter != usual else ""
        blanks = columns.has_blanks(first, delimiter)
        sign = re.escape(delimiter)
        loose = None if blanks else re.compile(rf'{sign} +"(?!["{sign}\r\n]|$).*')
        reader = csv.reader(lines([first], every), delimiter=delimiter, strict=True, skipinitialspace=blanks)
        try:
            meant = _header(reading, next(reader, []))
            before = number
            for cells in reader:
                where, before, row_chars = f"{path}, line {before + 1}", number, 0
                if len(cells) != len(meant.names) and cells:
                    raise UserError(f"{where}: {len(cells)} cells, but the header has {len(meant.names)} columns"
                                    " (a text that holds the delimiter needs quotes)")
                if meant.has_swallowed(cells, delimiter):
                    raise UserError(f"{where}: a cell goes on over the lines behind it, which look like samples; is a "
                                    "quote never closed?")
                if cells:
                    yield where, _given(where, {name: _cell(meaning, cell) for name, meaning, cell in zip(
                        meant.names, meant.meanings, cells, strict=True)}, meant)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: not valid CSV: {error}") from None


def _header(reading: _Reading, names: list[str]) -> Columns:
    where = f"{reading.path}, line 1"
    stripped = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(names)]
    _no_twins(where, [(name, None) for name in stripped])
    reading.columns.append(columns.understand(stripped, where))
    return reading.columns[0]


def _cell(meaning: str, cell: str) -> str:
    """The value of a cell. File names may begin or end with blanks."""
    return cell if meaning in ("image", "audio", "file", "text") else cell.strip()


# ---- values: one of a sample's keys each, checked; ValueError says what was expected ---------------------------------


def _file(name: Any, where: str, files: Files) -> File:
    """The image or sound file of this path; `where` (file and line) names it in messages."""
    if not isinstance(name, str):
        raise ValueError("expected a path")
    return files.find(name, where)


def _seconds(value: Any) -> float:
    """A start or a duration: a number, or a text of one, from 0 to MAX_SECONDS."""
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError("expected seconds, 0 or more" + (f", at most {MAX_SECONDS:g}" if seconds > 0 else ""))
    return seconds


def _word(value: Any) -> str:
    """A label, a speaker or an id: a text that is not blank, or a whole number, as text without blanks around it."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError("expected a text or a whole number")
    return written_lists.encodable(str(value).strip())


def _split(value: Any) -> str:
    """"train", "val" or "test" for a name of a split, whatever its case, such as "Training" or "validation"."""
    split = columns.SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if not split:
        raise ValueError(f"expected one of {', '.join(SPLITS)}")
    return split


# ---- from lines to samples ---------------------------------------------------------------------------------------


def _check_missing(reading: _Reading, limit_pct: float) -> list[str]:
    """What to log of missing files; raises where they are more than `limit_pct` allows."""
    files = reading.files
    missing, total = len(files.missing), len(files.numbers)
    if not missing:
        return []
    told = f"{missing:,} of {total:,} files are not there"
    more = f", and {missing - len(files.shown):,} more" if missing > len(files.shown) else ""
    if 100 * missing > limit_pct * total:
        raise UserError(f"{reading.path}: {told}, more than data.max_bad_pct={limit_pct:g} allows: "
                        f"{'; '.join(files.shown)}{more}; get the files, mend the list, or raise data.max_bad_pct")
    return [f"{told} and count as broken: {'; '.join(files.shown)}{more}"]


def _notes(reading: _Reading, rows: list[_Row]) -> Iterator[str]:
    """What was understood otherwise than it is written."""
    if reading.delimiter:
        yield f"cells are parted by {reading.delimiter!r}, as the first line shows"
    yield from columns.describe(reading.columns)
    yield from reading.files.describe()
    if joined := [label for row in rows for label in row.labels if any(sign in label for sign in ",;|")]:
        yield (f"{len(joined):,} labels hold a comma, a semicolon or a bar, such as {joined[0]!r:.60}: "
               "each is one label; several are a list, or in a CSV have ';' between them")
    if empty := [name for row in rows for name in (*row.labels, row.speaker) if name.lower() in EMPTY_CELLS]:
        yield (f"{len(empty):,} labels and speakers look like empty cells that were saved as text, such as "
               f"{empty[0]!r}: leave these cells empty")
    if shared := [size for unit, size in Counter(row.unit() for row in rows).items() if unit and size > 1]:
        yield (f"{sum(shared):,} lines name {len(shared):,} file{'s' if len(shared) > 1 else ''} (or "
               "stretches): those of the same file and stretch are one sample with all their captions")
    if reading.lists:
        yield (f"{reading.lists:,} cell{'s' if reading.lists > 1 else ''} with a list, as JSON, Python, "
               "pandas or numpy write it: each of its texts counts")


def _united(rows: list[_Row]) -> list[_Row]:
    """Merge the rows that name the same files and stretch into the first of them. Raises UserError where rows that
    differ in these have the same id."""
    first: dict[tuple[int, int, float, float], _Row] = {}
    ids: dict[str, tuple[_Row, str]] = {}
    united = []
    for row in rows:
        unit = row.unit()
        one = first.setdefault(unit, row) if unit else row
        if row.key and (other := ids.setdefault(row.key, (one, row.where)))[0] is not one:
            _clash(row, f"id {row.key!r} is already used on {_line(other[1])}; ids are unique")
        if one is row:
            united.append(row)
        else:
            one.add(row)
    return united


def _name(rows: list[_Row], taken: set[str]) -> None:
    """Give each row without an id its default one, or one that is not `taken`."""
    times: dict[str, int] = {}
    for row in rows:
        while not row.key:
            times[row.name] = times.get(row.name, 0) + 1
            key = row.name if times[row.name] == 1 else f"{row.name}#{times[row.name]}"
            if key not in taken:
                row.key = key
                taken.add(key)


def _check_splits(rows: list[_Row]) -> None:
    side: dict[int, _Row] = {}
    for row in rows:
        if not row.split:
            _clash(row, f"no split, though other lines have one; give {', '.join(SPLITS)}, on all lines or on none")
        for file, column in row.media().items():
            first = side.setdefault(file.number, row)
            if first.split != row.split:
                _clash(row, f"{column} {file.path} is in {row.split!r} here and in {first.split!r} on "
                            f"{_line(first.where)}; no file, nor parts of one, may be on two sides")


def _clash(row: _Row, message: str) -> NoReturn:
    raise UserError(f"{row.where}: {message}")


def _draw_splits(rows: list[_Row]) -> None:
    """Order the groups of rows that belong together by a hash of their first id, and cut the shares off its head; of
    few rows as many as can be compared, or none."""
    groups: dict[int, list[_Row]] = {}
    for row, root in zip(rows, _roots(rows), strict=True):
        groups.setdefault(root, []).append(row)
    ordered = sorted(groups.values(), key=lambda group: stable_hash(min(row.key for row in group)))
    ends = [("test", HELD_OUT["test"]), ("val", sum(HELD_OUT.values())), ("train", 1.0)]
    sides = [next(name for name, end in ends if place < round(end * len(ordered))) for place in range(len(ordered))]
    counts = Counter((side, kind) for side, group in zip(sides, ordered, strict=True) for row in group
                     for kind in row.kinds())
    if any(counts[side, kind] < LEAST_VAL for side in HELD_OUT for _, kind in list(counts)):
        sides = two_of_each_kind(sides, [Counter(kind for row in group for kind in row.kinds()) for group in ordered])
    for group, split in zip(ordered, sides, strict=True):
        for row in group:
            row.split = split


def _roots(rows: list[_Row]) -> list[int]:
    """For each row the number of a row that stands for all rows connected to it by shared media."""
    groups, first = Groups(len(rows)), dict[int, int]()
    for i, row in enumerate(rows):
        for file in row.media():
            groups.join((first.setdefault(file.number, i), i))
    return [groups.root(i) for i in range(len(rows))]


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    settings = config.data
    if not settings.manifest:
        raise UserError(_NO_LIST)
    found = list(read_manifest(Path(settings.manifest).absolute(), settings.manifest_root, settings.max_bad_pct))
    for split in splits:
        yield from (sample for sample in found if sample.split == split)


def _problems(settings: DataConfig) -> list[str]:
    return [_NO_LIST] if "manifest" in settings.datasets and not settings.manifest else []


_NO_LIST = "data.manifest: the set 'manifest' needs the path of your JSONL or CSV file here"
SET = DataSet(
    name="manifest", order=8, licence="the user's own files", read=_read, problems=_problems, english=False,
    splits="as the manifest says, else 80, 10 and 10 % by id", reads_at_once=True,
    note="your own files, listed in data.manifest; there is nothing to download")
