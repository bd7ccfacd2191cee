"""The user's own data: a JSONL, CSV or TSV file with one sample a line.

    {"image": "photos/1.jpg", "text": ["a dog on grass", "a dog"], "labels": ["dog"], "split": "train"}
    {"audio": "talk.flac", "start": 12.5, "duration": 10, "text": "a door slams", "speaker": "anna", "split": "train"}

Keys (columns of a CSV): image, audio, start and duration (seconds), text, language (of the text: en, zh-CN), labels,
speaker, split, id, or what other programs call them (see columns.py); all optional, but a line needs an image, an audio
file or a text. A text is one caption, or several as a list, in a cell as JSON, Python or numpy write it: ["a dog",
"a dog on grass"]; labels likewise, in a CSV also parted by ";". Of texts whose language is told, those are taken whose
language `data.languages` names. Lines that name the same file, and the same stretch of it, are one sample with
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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from trimodal.config import LANGUAGES, Config, DataConfig
from trimodal.data import prepared
from trimodal.data.samples import EMPTY_CELLS, SPLITS, Sample
from trimodal.data.splits import Groups, draw_sides
from trimodal.errors import UserError, counted
from trimodal.files import sha256_of
from trimodal.sets import columns, written_lists
from trimodal.sets.base import DataSet
from trimodal.sets.columns import Columns
from trimodal.sets.listed_files import File, Files
from trimodal.sets.reading import in_languages, worded_captions

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS)
# What a file may hold; beyond it, it is not a list of samples, and reading it would fill the memory.
MAX_BYTES = 2_000_000_000  # five million lines of 400
MAX_LINES = 5_000_000  # of CSV rows too: about 1 KB of memory each while the file is checked
MAX_LINE_CHARS = 1_000_000  # of a row; thousands of captions for one picture
MAX_SECONDS = 1e7  # four months: beyond any recording
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
    rows = list(_rows(reading))
    if not rows:
        raise UserError(f"{path}: holds no samples; write one JSON object (or one CSV row below the header) a line")
    lines = _check_missing(reading, max_missing_pct)
    if any(row.split for row in rows):
        _check_splits(reading, rows)
    lines += _notes(reading, rows)  # before lines of one file become one
    samples = _united(reading, rows)
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
    columns: dict[tuple[str, ...], Columns] = field(default_factory=dict)  # by their names
    delimiter: str = ""  # another one than the file's name tells
    lists: int = 0  # cells that another program wrote a list into

    def error(self, line: int, message: object) -> UserError:
        return UserError(f"{self.path}, line {line}: {message}")

    def understand(self, names: tuple[str, ...], line: int) -> Columns:
        if names not in self.columns:
            self.columns[names] = columns.understand(names, f"{self.path}, line {line}")
        return self.columns[names]


@dataclass(slots=True)
class _Row:
    """One checked line; `key` and `split` are filled in later where the line does not give them."""

    line: int
    key: str
    split: str
    image: File
    audio: File
    start_s: float
    duration_s: float
    captions: tuple[str, ...]
    languages: tuple[str, ...]  # of each caption; "" where the line names none
    labels: tuple[str, ...]
    speaker: str
    name: str  # the default id

    @staticmethod
    def parse(line: int, given: dict[str, Any], reading: _Reading) -> "_Row":
        """The row of these values by meaning; raises ValueError for one that is not allowed."""
        def take(column: str, convert: Callable[[Any], Any], empty: Any) -> Any:
            if column not in given:
                return empty
            try:
                value = convert(given[column])
            except ValueError as error:
                raise ValueError(f"{column}: {error}, got {given[column]!r:.200}") from None
            reading.lists += column in ("text", "labels") and written_lists.is_list(given[column])
            return value

        def file(column: str) -> File:
            return take(column, lambda name: reading.files.find(name, f"line {line}: {column}"), NO_FILE)

        captions = worded_captions(take("text", written_lists.texts, ()), "text")
        image, audio, start_s = file("image"), file("audio"), take("start", _seconds, 0.0)
        if not (image.path or audio.path or captions):
            raise ValueError("nothing to learn from; give an image, an audio file or a text")
        if not audio.path and ("start" in given or "duration" in given):
            raise ValueError("start and duration need an audio file")
        name = str(given.get("image") or given.get("audio") or captions[0])
        return _Row(
            line=line, key=take("id", _word, ""), split=take("split", _split, ""), image=image, audio=audio,
            start_s=start_s, duration_s=take("duration", _seconds, 0.0), captions=captions,
            languages=(take("language", _language, ""),) * len(captions),
            labels=tuple(dict.fromkeys(take("labels", partial(written_lists.texts, between=reading.between), ()))),
            speaker=take("speaker", _word, ""), name=f"{name}@{start_s:g}" if "start" in given else name)

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

    def sample(self) -> Sample:
        return Sample(key=self.key, source="manifest", split=self.split, image=self.image.path, audio=self.audio.path,
                      start_s=self.start_s, duration_s=self.duration_s, captions=self.captions,
                      languages=self.languages if any(self.languages) else (), labels=self.labels,
                      speaker=self.speaker)


# ---- lines -------------------------------------------------------------------------------------------------------


def _rows(reading: _Reading) -> Iterator[_Row]:
    """Read and check the list line by line."""
    path, suffix = reading.path, reading.path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"data.manifest: {path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    read = _json_lines if suffix == ".jsonl" else _csv_lines
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, raw, meant in read(reading, _bounded(file, reading)):
                try:
                    row = _Row.parse(line, meant.given(raw), reading)
                except ValueError as error:
                    raise reading.error(line, error) from None
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"data.manifest: {path}: cannot be read ({error.strerror})") from None


def _bounded(file: TextIO, reading: _Reading) -> Iterator[str]:
    """The lines of `file`, none of which is read further than it may go."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise UserError(f"{reading.path}: is larger than {MAX_BYTES / 1e9:g} GB; split it into several lists")
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_CHARS + 1), ""), 1):
        if len(line) > MAX_LINE_CHARS or number > MAX_LINES:
            raise reading.error(number, f"over {MAX_LINE_CHARS:,} characters in a line, or {MAX_LINES:,} lines; one "
                                        "line is one sample")
        yield line


def _json_lines(reading: _Reading, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any], Columns]]:
    """Number of each line, its values by column, and what these columns mean."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.rstrip(), object_pairs_hook=_without_twins)
        except json.JSONDecodeError as error:
            raise reading.error(number, f"not valid JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise reading.error(number, "brackets are nested too deeply") from None
        except ValueError as error:
            raise reading.error(number, error) from None
        if not isinstance(raw, dict):
            raise reading.error(number, f'expected an object such as {{"image": "1.jpg"}}, got {line.strip()[:40]}')
        yield number, raw, reading.understand(tuple(raw), number)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`pairs` as a dict; raises ValueError where a key is given twice."""
    if (twin := columns.twin_of(key for key, _ in pairs)) is not None:
        raise ValueError(f"{twin!r:.60} is given twice")
    return dict(pairs)


def _csv_lines(reading: _Reading, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any], Columns]]:
    """Number of each row's first line, its values by column, and what the columns mean."""
    first, usual = next(lines, ""), DELIMITERS[reading.path.suffix.lower()]
    delimiter = columns.delimiter_of(first, usual)
    reading.between, reading.delimiter = ";", delimiter if delimiter != usual else ""
    blanks, sign, row_chars = columns.has_blanks(first, delimiter), re.escape(delimiter), 0
    loose = re.compile(rf'{sign} +"(?!["{sign}\r\n]|$).*')

    def checked() -> Iterator[str]:
        nonlocal row_chars
        for number, line in enumerate(itertools.chain([first], lines), 1):
            if not blanks and (found := loose.search(line)):
                raise reading.error(number, f"blanks before a quote, near {found[0]!r:.40}: it would be part of the "
                                            "text; leave the blanks out, or write them in the first line as well")
            row_chars += len(line)
            if row_chars > MAX_LINE_CHARS:
                raise reading.error(number, f"over {MAX_LINE_CHARS:,} characters in a row; is a quote never closed?")
            yield line

    reader = csv.reader(checked(), delimiter=delimiter, strict=True, skipinitialspace=blanks)
    try:
        header = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(next(reader, []))]
        meant, end = reading.understand(tuple(header), 1), reader.line_num
        for cells in reader:
            number, end, row_chars = end + 1, reader.line_num, 0
            if not cells:
                continue
            if len(cells) != len(header):
                raise reading.error(number, f"{counted(len(cells), 'cell')}, but the header has "
                                            f"{counted(len(header), 'column')} (a text that holds the delimiter needs "
                                            "quotes)")
            if meant.has_swallowed(cells, delimiter):
                raise reading.error(number, "a cell goes on over the lines behind it, which look like samples; is a "
                                            "quote never closed?")
            yield number, dict(zip(header, cells, strict=True)), meant
    except csv.Error as error:
        raise reading.error(reader.line_num, f"not valid CSV: {error}") from None


# ---- values: one of a sample's keys each, checked; ValueError says what was expected ---------------------------------


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


def _language(value: Any) -> str:
    """The two or three small letters with which a code of a language begins: "zh" of "zh-CN" or "zh_CN.utf8"."""
    found = re.fullmatch(r"([a-z]{2,3})([-_.@].*)?", value.strip().lower()) if isinstance(value, str) else None
    if not found:
        raise ValueError("expected the code of a language such as en, zh or zh-CN")
    return found[1]


def _split(value: Any) -> str:
    """"train", "val" or "test" for a name of a split, whatever its case, such as "Training" or "validation"."""
    split = columns.SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if not split:
        raise ValueError(f"expected one of {', '.join(SPLITS)}")
    return split


# ---- from lines to samples ---------------------------------------------------------------------------------------


def _check_missing(reading: _Reading, limit_pct: float) -> list[str]:
    """Count the files that the list names and that do not exist; returns lines to log, none if all exist.

    Raises:
        UserError: more than `limit_pct` per cent of the files are missing.
    """
    files = reading.files
    missing, total = len(files.missing), len(files.numbers)
    if not missing:
        return []
    told = f"{missing:,} of {counted(total, 'file')} not there"
    more = f", and {missing - len(files.shown):,} more" if missing > len(files.shown) else ""
    if 100 * missing > limit_pct * total:
        raise UserError(f"{reading.path}: {told}, more than data.max_bad_pct={limit_pct:g} allows: "
                        f"{'; '.join(files.shown)}{more}; get the files, mend the list, or raise data.max_bad_pct")
    return [f"{told}, taken as broken: {'; '.join(files.shown)}{more}"]


def _notes(reading: _Reading, rows: list[_Row]) -> Iterator[str]:
    """Lines to log on what a reader may not expect: delimiters and columns that were guessed, labels that look wrong,
    lines merged into one sample."""
    if reading.delimiter:
        yield f"cells are parted by {reading.delimiter!r}, as the first line shows"
    yield from columns.describe(list(reading.columns.values()))
    yield from reading.files.describe()
    if joined := [label for row in rows for label in row.labels if any(sign in label for sign in ",;|")]:
        yield (f"{counted(len(joined), 'label')} with a comma, a semicolon or a bar, such as {joined[0]!r:.60}: "
               "each is one label; several are a list, or in a CSV have ';' between them")
    if empty := [name for row in rows for name in (*row.labels, row.speaker) if name.lower() in EMPTY_CELLS]:
        yield (f"{counted(len(empty), 'label or speaker', 'labels and speakers')} like empty cells that were saved "
               f"as text, such as {empty[0]!r}: leave these cells empty")
    if shared := [size for unit, size in Counter(row.unit() for row in rows).items() if unit and size > 1]:
        yield (f"{sum(shared):,} lines name {counted(len(shared), 'file')} (or "
               "stretches): those of the same file and stretch are one sample with all their captions")
    if reading.lists:
        yield (f"{counted(reading.lists, 'cell')} with a list, as JSON, Python, "
               "pandas or numpy write it: each of its texts counts")


def _united(reading: _Reading, rows: list[_Row]) -> list[_Row]:
    """Merge the rows that name the same files and stretch into the first of them.

    Raises:
        UserError: rows that differ in these have the same id, or rows that do not have two speakers.
    """
    first: dict[tuple[int, int, float, float], _Row] = {}
    ids: dict[str, tuple[_Row, int]] = {}
    united = []
    for row in rows:
        unit = row.unit()
        one = first.setdefault(unit, row) if unit else row
        if row.key and (other := ids.setdefault(row.key, (one, row.line)))[0] is not one:
            raise reading.error(row.line, f"id {row.key!r} is already used on line {other[1]}; ids are unique")
        if one is row:
            united.append(row)
            continue
        if one.speaker and row.speaker and one.speaker != row.speaker:
            raise reading.error(row.line, f"speaker {row.speaker!r}, but {one.speaker!r} on line {one.line}, which "
                                          "names the same file and stretch")
        one.key, one.speaker = one.key or row.key, one.speaker or row.speaker
        one.captions += row.captions
        one.languages += row.languages
        one.labels = tuple(dict.fromkeys((*one.labels, *row.labels)))
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


def _check_splits(reading: _Reading, rows: list[_Row]) -> None:
    side: dict[int, _Row] = {}
    for row in rows:
        if not row.split:
            raise reading.error(row.line, f"no split, though other lines have one; give {', '.join(SPLITS)}, on all "
                                          "lines or on none")
        for file, column in row.media().items():
            first = side.setdefault(file.number, row)
            if first.split != row.split:
                raise reading.error(row.line, f"{column} {file.path} is in {row.split!r} here and in {first.split!r} "
                                              f"on line {first.line}; no file, nor parts of one, may be on two sides")


def _draw_splits(rows: list[_Row]) -> None:
    groups = list(_connected(rows))
    sides = draw_sides([min(row.key for row in group) for group in groups],
                       [Counter(kind for row in group for kind in row.kinds()) for group in groups])
    for group, split in zip(groups, sides, strict=True):
        for row in group:
            row.split = split


def _connected(rows: list[_Row]) -> Collection[list[_Row]]:
    """Groups of rows that shared media connect."""
    joined, first = Groups(len(rows)), dict[int, int]()
    for i, row in enumerate(rows):
        for file in row.media():
            joined.join((first.setdefault(file.number, i), i))
    groups: dict[int, list[_Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(joined.root(i), []).append(row)
    return groups.values()


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    settings = config.data
    if not settings.manifest:
        raise UserError(_NO_LIST)
    found = list(read_manifest(Path(settings.manifest).absolute(), settings.manifest_root, settings.max_bad_pct))
    found = _in_wanted_languages(found, settings)
    for split in splits:
        yield from (sample for sample in found if sample.split == split)


def _in_wanted_languages(samples: Sequence[Sample], settings: DataConfig) -> list[Sample]:
    """The samples without captions in languages that are not wanted; those that were such a caption alone are gone.

    Raises:
        UserError: no caption is left.
    """
    found = [in_languages(sample, settings.languages) for sample in samples]
    others = Counter(language for sample in samples for language in sample.languages
                     if language and language not in settings.languages)
    if others:
        told = (f"left out, as data.languages is {', '.join(settings.languages)}: "
                f"{counted(others.total(), 'caption')} in {', '.join(sorted(others))}")
        if not any(sample.captions for sample in found):
            raise UserError(f"data.manifest: {settings.manifest}: {told}, and no other is there; name the language of "
                            f"the captions there ({', '.join(LANGUAGES)}), or leave out the column language")
        _log.warning("manifest: %s", told)
    return [sample for sample in found if sample.captions or sample.image or sample.audio]


def _state(config: Config) -> str:
    settings = config.data
    path = Path(settings.manifest or "").absolute()
    return prepared.digest([str(path), sha256_of(path), str(settings.manifest_root), str(settings.max_bad_pct),
                            *settings.languages])


def _problems(settings: DataConfig) -> list[str]:
    return [_NO_LIST] if "manifest" in settings.datasets and not settings.manifest else []


_NO_LIST = "data.manifest: the set 'manifest' needs the path of your JSONL or CSV file here"
SET = DataSet(
    name="manifest", order=8, licence="the user's own files", read=_read, problems=_problems, english=False,
    splits="as the manifest says, else 80, 10 and 10 % by id", reads_at_once=True, state=_state,
    note="your own files, listed in data.manifest; there is nothing to download")
