"""The user's own data: a JSONL, CSV or TSV file with one sample a line.

    {"image": "photos/1.jpg", "text": ["a dog on grass", "a dog"], "labels": ["dog"], "split": "train"}
    {"audio": "talk.flac", "start": 12.5, "duration": 10, "text": "a door slams", "speaker": "anna", "split": "train"}

Keys (columns of a CSV): image, audio, start and duration (seconds), text, labels, speaker, split, id; all optional, but
a line needs an image, an audio file or a text. A text is one caption, or several as a list, in a cell as JSON, Python
or numpy write it: ["a dog", "a dog on grass"]; labels likewise, in a CSV also parted by ";". Relative paths start at
the manifest's folder. No path, ".." or link leads out of that folder, or out of `data.manifest_root` where that is
given: a manifest made by somebody else cannot name other files of yours.
"""

import csv
import difflib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import written_lists
from config import UserError
from samples import SPLITS, Sample, normalise_caption, stable_hash

COLUMNS = ("image", "audio", "start", "duration", "text", "labels", "speaker", "split", "id")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS)
# What a file may hold; beyond it, it is not a list of samples, and reading it would fill the memory.
MAX_BYTES = 2_000_000_000  # five million lines of 400
MAX_LINES = 5_000_000  # of CSV rows too: about 1 KB of memory each while the file is checked
MAX_LINE_CHARS = 1_000_000  # of a row; thousands of captions for one picture
MAX_CAPTION_CHARS = 10_000  # the text encoder reads 64 words; of longer ones this would be all but lost
MAX_SECONDS = 1e7  # four months: beyond any recording
HELD_OUT = {"test": 0.1, "val": 0.1}  # shares where no line names a split; the rest is train


def read_manifest(path: Path, split: str, root: str | None = None) -> Iterator[Sample]:
    """The samples of one split. The whole file is checked first, whichever split is asked for. Its pictures and sounds
    lie in the folder `root` (None: that of the manifest), links followed.

    Without a `split` column, 10 % of the samples are test and 10 % val, told by their ids alone, so that lines may be
    reordered, and few samples change sides when lines are added; lines that share a picture or a recording stay on one
    side, whichever parts of it they name. Without an `id`, a sample's id is its file name as written, with its start.

    Raises:
        UserError: file and line number, what is wrong there, what is allowed.
    """
    folders = _Folders(path.parent, os.path.join(os.path.realpath(root or path.parent), ""))
    between = "" if path.suffix.lower() == ".jsonl" else ";"
    rows = [_Row.parse(where, raw, folders, between) for where, raw in _lines(path)]
    if not rows:
        raise UserError(f"{path}: holds no samples; write one JSON object (or one CSV row below the header) a line")
    _name(rows)
    if any(row.split for row in rows):
        _check_splits(rows)
    else:
        _draw_splits(rows)
    return (row.sample() for row in rows if row.split == split)


def worded_captions(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """`texts` without outer blanks and without those that hold no word; equal ones stay, since papers count them.

    Raises:
        UserError: one of absurd length; begins with `where`.
    """
    found = []
    for text in texts:
        if len(text) > MAX_CAPTION_CHARS:
            raise UserError(f"{where}: a text of {len(text):,} characters, over {MAX_CAPTION_CHARS:,}; shorten it")
        if normalise_caption(text):
            found.append(text.strip())
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Folders:
    base: Path  # where relative paths start
    root: str  # what no path leads out of: without links, with "/" at its end


@dataclass(slots=True)
class _Row:
    """One checked line; `key` and `split` are filled in later where the line does not give them."""

    where: str  # "file, line N", for errors
    key: str
    split: str
    image: str
    audio: str
    start_s: float
    duration_s: float
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    speaker: str
    name: str  # the default id

    @staticmethod
    def parse(where: str, raw: dict[str, Any], folders: _Folders, between: str) -> "_Row":
        for column in raw:
            if column not in COLUMNS:
                close = difflib.get_close_matches(str(column)[:20], COLUMNS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(COLUMNS)}"
                raise UserError(f"{where}: unknown column {column!r:.60}; {hint}")
        given = {column: value for column, value in raw.items() if value is not None and value != ""}

        def take(column: str, convert: Callable[[Any], Any], empty: Any) -> Any:
            if column not in given:
                return empty
            try:
                return convert(given[column])
            except ValueError as error:
                raise UserError(f"{where}: {column}: {error}, got {given[column]!r:.200}") from None

        row = _Row(
            where=where, key=take("id", _word, ""), split=take("split", _split, ""),
            image=take("image", lambda value: _file(value, folders), ""),
            audio=take("audio", lambda value: _file(value, folders), ""),
            start_s=take("start", _seconds, 0.0), duration_s=take("duration", _seconds, 0.0),
            captions=worded_captions(take("text", _texts, ()), where),
            labels=tuple(dict.fromkeys(take("labels", lambda value: _texts(value, between), ()))),
            speaker=take("speaker", _word, ""), name="")
        row._check(given)
        return row

    def _check(self, given: dict[str, Any]) -> None:
        if not (self.image or self.audio or self.captions):
            raise UserError(f"{self.where}: nothing to learn from; give an image, an audio file or a text")
        if not self.audio and ("start" in given or "duration" in given):
            raise UserError(f"{self.where}: start and duration need an audio file")
        self.name = str(given.get("image") or given.get("audio") or self.captions[0])
        if "start" in given:
            self.name += f"@{self.start_s:g}"

    def media(self) -> dict[str, str]:
        """Files that must not stand on two sides, and their column. A whole file, since stretches of one may overlap,
        and a video may be a picture here and a sound there."""
        return {path: column for path, column in ((self.image, "image"), (self.audio, "audio")) if path}

    def sample(self) -> Sample:
        return Sample(key=self.key, source="manifest", split=self.split, image=self.image, audio=self.audio,
                      start_s=self.start_s, duration_s=self.duration_s, captions=self.captions, labels=self.labels,
                      speaker=self.speaker)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"data.manifest: {path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    read = _json_lines if path.suffix.lower() == ".jsonl" else _csv_lines
    try:
        yield from read(path)
    except FileNotFoundError:
        raise UserError(f"data.manifest: {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"data.manifest: {path}: cannot be read ({error.strerror})") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_bounded(file, path), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            raw = _json(where, line.rstrip(), partial(_no_twins, where))
            if not isinstance(raw, dict):
                raise UserError(f'{where}: expected an object such as {{"image": "1.jpg"}}, got {line.strip()[:40]}')
            yield where, raw


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


def _csv_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    row_chars = 0

    def lines(file: TextIO) -> Iterator[str]:
        nonlocal row_chars
        for line in _bounded(file, path):
            row_chars += len(line)
            if row_chars > MAX_LINE_CHARS:
                raise UserError(f"{path}, line {reader.line_num}: over {MAX_LINE_CHARS:,} characters in a row; is a "
                                "quote never closed?")
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(lines(file), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
            _no_twins(f"{path}, line 1", [(column, None) for column in header])
            before = reader.line_num
            for cells in reader:
                where, before, row_chars = f"{path}, line {before + 1}", reader.line_num, 0
                if len(cells) != len(header) and cells:
                    raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)} columns"
                                    " (a text that holds the delimiter needs quotes)")
                if cells:
                    yield where, {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _cell(column: str, cell: str) -> Any:
    """The value of a cell. File names may begin or end with blanks."""
    return cell if column in ("image", "audio", "text") else cell.strip()


def _file(value: Any, folders: _Folders) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a path")
    path = os.path.abspath(os.path.join(folders.base, value))
    if not os.path.isfile(path):
        raise ValueError(f"no such file ({path:.200})")
    if not os.path.realpath(path).startswith(folders.root):
        raise ValueError(f"lies outside {folders.root} (links followed); put it there, or name a folder that holds all "
                         "files: data.manifest_root=FOLDER")
    return path


def _seconds(value: Any) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError("expected seconds, 0 or more" + (f", at most {MAX_SECONDS:g}" if seconds > 0 else ""))
    return seconds


def _texts(value: Any, between: str = "") -> tuple[str, ...]:
    """A text, a list of texts, or a list that another program wrote as one text; a text is parted at `between`."""
    texts = written_lists.parse(value) if isinstance(value, str) else value
    if texts is None:
        texts = value.split(between) if between else [value]
    elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    elif any(written_lists.parse(text) is not None for text in texts):
        raise ValueError(f"a list within a list; {written_lists.WRITE}")
    return tuple(_encodable(text.strip()) for text in texts if text.strip())


def _word(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError("expected a text or a whole number")
    return _encodable(str(value).strip())


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write "\ud800"
        raise ValueError("expected Unicode, not half of a surrogate pair") from None
    return text


def _split(value: Any) -> str:
    if value not in SPLITS:
        raise ValueError(f"expected one of {', '.join(SPLITS)}")
    return value


def _name(rows: list[_Row]) -> None:
    """Give each row an id of its own; raise where two lines give the same one."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.key in seen:
            _clash(row, f"id {row.key!r} is already used on {seen[row.key]}; ids are unique")
        if row.key:
            seen[row.key] = row.where.rpartition(", ")[2]
    times: dict[str, int] = {}
    for row in rows:
        while not row.key:
            times[row.name] = times.get(row.name, 0) + 1
            key = row.name if times[row.name] == 1 else f"{row.name}#{times[row.name]}"
            if key not in seen:
                row.key = key
                seen[key] = row.where


def _check_splits(rows: list[_Row]) -> None:
    side: dict[str, _Row] = {}
    for row in rows:
        if not row.split:
            _clash(row, f"no split, though other lines have one; give {', '.join(SPLITS)}, on all lines or on none")
        for path, column in row.media().items():
            first = side.setdefault(path, row)
            if first.split != row.split:
                _clash(row, f"{column} {path} is in {row.split!r} here and in {first.split!r} on "
                            f"{first.where.rpartition(', ')[2]}; no file, nor parts of one, may be on two sides")


def _clash(row: _Row, message: str) -> NoReturn:
    raise UserError(f"{row.where}: {message}")


def _draw_splits(rows: list[_Row]) -> None:
    """Order the groups of rows that belong together by a hash of their first id, and cut the shares off its head."""
    groups: dict[int, list[_Row]] = {}
    for row, root in zip(rows, _roots(rows), strict=True):
        groups.setdefault(root, []).append(row)
    ordered = sorted(groups.values(), key=lambda group: stable_hash(min(row.key for row in group)))
    ends = [("test", HELD_OUT["test"]), ("val", sum(HELD_OUT.values())), ("train", 1.0)]
    for position, group in enumerate(ordered):
        split = next(name for name, end in ends if position < round(end * len(ordered)))
        for row in group:
            row.split = split


def _roots(rows: list[_Row]) -> list[int]:
    """For each row the number of a row that stands for all rows connected to it by shared media (union-find)."""
    parent = list(range(len(rows)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for path in row.media():
            parent[find(i)] = find(first.setdefault(path, i))
    return [find(i) for i in range(len(rows))]
