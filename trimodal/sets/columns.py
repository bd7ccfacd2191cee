"""Names of columns: what the tables of other programs call image, audio, text and so on.

    columns = understand(["filepath", "title"], "pairs.csv, line 1")
    columns.given({"filepath": "1.jpg", "title": "a dog"})     # {"image": "1.jpg", "text": "a dog"}
"""

import csv
import difflib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trimodal.errors import UserError, counted
from trimodal.media import PICTURE_SUFFIXES, SOUND_SUFFIXES

COLUMNS = ("image", "audio", "start", "duration", "text", "language", "labels", "speaker", "split", "id")
DELIMITERS = (",", ";", "\t", "|")

_OTHERS = {
    "image": "images img imgs image_path img_path image_file img_file image_filename image_name image_filepath picture "
             "photo",
    "audio": "wav wavs audio_path wav_path audio_file wav_file audio_filename audio_filepath sound sound_path "
             "sound_file",
    "start": "start_time start_s begin onset",
    "duration": "duration_s dur",
    "text": "texts caption captions title titles sentence sentences prompt prompts transcript transcripts "
            "transcription description descriptions comment",
    "language": "lang locale",
    "labels": "label class classes category categories tag tags",
    "speaker": "speaker_id spk",
    "split": "subset partition",
    "id": "sample_id uid",
}
_MEANINGS = {column: column for column in COLUMNS} | {
    other: column for column, others in _OTHERS.items() for other in others.split()}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}  # "dev" and "evaluation" mean other splits in other data sets
# What the file is tells its name's ending; where that does not (a video), this.
_FILES = {**dict.fromkeys(("file_name", "filename", "filepath", "file_path", "file", "files"), "image"),
          **dict.fromkeys(("path", "paths"), "audio")}
_MEDIA = (*PICTURE_SUFFIXES, *SOUND_SUFFIXES)
_NUMBERED = re.compile(r"(.*?)_?\d+")  # caption_1 to caption_5
_UNNAMED = re.compile(r"(unnamed:_?\d+(\.\d+)?)?")  # an empty name, and what pandas calls it
_NUMBERS = re.compile(r"[-+]?\d+(\.0)?")


@dataclass
class Columns:
    """The columns of a list, and the meaning of each; counts which names were taken for which meaning."""

    names: tuple[str, ...]
    meanings: tuple[str, ...]  # of COLUMNS; "file": image or audio, by the ending of each cell; "": left out
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)  # lines, by name and what it was taken for
    left_out: Counter[str] = field(default_factory=Counter)  # cells that hold something, by name

    def given(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Values by meaning, without empty ones; captions of numbered columns as one list.

        Raises:
            ValueError: two columns give one meaning; a column without a name holds more than an index.
        """
        found: dict[str, Any] = {}
        names: dict[str, str] = {}
        for (name, value), meaning in zip(raw.items(), self.meanings, strict=True):
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            if not meaning:
                self._check_index(name, value)
                continue
            column = _kind_of(name, value) if meaning == "file" else meaning
            if column == "labels" and column != _key(name):
                _check_labels(name, value)
            if column == "text" and column in found and stem_of(name) and stem_of(name) == stem_of(names[column]):
                found[column] = [*(found[column] if isinstance(found[column], list) else [found[column]]), value]
            elif column in found:
                raise ValueError(f"two columns for {column}: {names[column]!r} and {name!r}; leave one out")
            else:
                found[column], names[column] = value, name
            if column != _key(name):
                self.taken[name, column] += 1
        return found

    def has_swallowed(self, cells: Sequence[str], delimiter: str) -> bool:
        """Whether a cell holds a whole line with the name of a file: the quote before it was never closed."""
        broken = [cell for cell in cells if "\n" in cell or "\r" in cell]
        if not broken:
            return False
        files = [place for place, meaning in enumerate(self.meanings) if meaning in ("image", "audio", "file")]
        lines = (line.split(delimiter) for cell in broken for line in cell.splitlines()[1:])
        return any(len(line) == len(self.names) and any(_suffix(line[place]) in _MEDIA for place in files)
                   for line in lines)

    def _check_index(self, name: str, value: Any) -> None:
        if not _NUMBERS.fullmatch(str(value).strip()):
            raise ValueError(f"a column without a name holds {value!r:.60}; give it a name, or where it is pandas' "
                             "index write the list with index=False")
        self.left_out[name] += 1


def understand(names: Sequence[str], where: str) -> Columns:
    """Raises UserError, which begins with `where`, for an unknown name, and for two names of one meaning."""
    if (twin := twin_of(names)) is not None:
        raise UserError(f"{where}: {twin!r:.60} is given twice")
    meanings = []
    of: dict[str, str] = {}
    for name in names:
        meaning = meaning_of(name)
        if meaning is None:
            raise UserError(f"{where}: unknown column {name!r:.60}; {_hint(name)}")
        other = of.setdefault(meaning, name)
        if meaning not in ("", "file") and other is not name and not (
                meaning == "text" and stem_of(name) and stem_of(name) == stem_of(other)):
            raise UserError(f"{where}: {other!r:.60} and {name!r:.60} are two columns for {meaning}; leave one out")
        meanings.append(meaning)
    return Columns(tuple(names), tuple(meanings))


def twin_of(names: Iterable[str]) -> str | None:
    """A name that is given twice, if any is."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def meaning_of(name: str) -> str | None:
    """One of COLUMNS, "file", "" for a column without a name; None for an unknown one."""
    key = _key(name)
    if _UNNAMED.fullmatch(key):
        return ""
    if key in _FILES:
        return "file"
    return _MEANINGS.get(key) or ("text" if stem_of(name) else None)


def delimiter_of(header: str, usual: str) -> str:
    """The delimiter of the cells in the line `header`.

    It is `usual`, unless no name that this gives is known, while another of DELIMITERS gives several, all known.
    """
    if any(map(meaning_of, _cells(header, usual))):
        return usual
    for other in DELIMITERS:
        names = _cells(header, other)
        if len(names) > 1 and any(map(meaning_of, names)) and None not in map(meaning_of, names):
            return other
    return usual


def has_blanks(header: str, delimiter: str) -> bool:
    """Whether a blank stands behind each delimiter, as people write lists by hand: it belongs to no cell then."""
    cells = header.split(delimiter)[1:]
    return bool(cells) and all(cell.startswith(" ") and cell.strip() for cell in cells)


def describe(columns: Sequence[Columns]) -> list[str]:
    """Lines that say what was taken for what, and what was left out."""
    taken: Counter[tuple[str, str]] = sum((one.taken for one in columns), Counter())
    left_out: Counter[str] = sum((one.left_out for one in columns), Counter())
    of = Counter(name for name, _ in taken)
    told = [f"{name!r:.60} as {column}" + (f" ({counted(count, 'line')})" if of[name] > 1 else "")
            for (name, column), count in taken.items()]
    more = [f"and {len(told) - 8} more"] if len(told) > 8 else []
    return ([f"columns: {', '.join(told[:8] + more)}"] if told else []) + (
        ["a column without a name holds whole numbers: taken for pandas' index and left out"] if left_out else [])


@lru_cache(1024)
def _key(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name[:100].strip().lower())


def stem_of(name: str) -> str:
    """ "caption" of "caption_1"; "" where the column is none of several captions."""
    numbered = _NUMBERED.fullmatch(_key(name))
    return numbered[1] if numbered and _MEANINGS.get(numbered[1]) == "text" else ""


def _kind_of(name: str, value: Any) -> str:
    suffix = _suffix(str(value))
    return "image" if suffix in PICTURE_SUFFIXES else "audio" if suffix in SOUND_SUFFIXES else _FILES[_key(name)]


def _suffix(name: str) -> str:
    return os.path.splitext(name.strip())[1].lower()


def _check_labels(name: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if all(isinstance(one, int | float) or _NUMBERS.fullmatch(str(one).strip()) for one in values):
        raise ValueError(f"{name!r:.60} holds numbers, not names; call the column labels if these are the names, or "
                         "leave it out")


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _hint(name: str) -> str:
    parted = next((other for other in DELIMITERS if other in name and any(map(meaning_of, _cells(name, other)))), None)
    if parted:
        return f"are the columns parted by {parted!r}? save the list with commas, or as .tsv with tabs"
    if os.path.splitext(_key(name))[1] in _MEDIA:
        return "the first line has to name the columns, such as image,text"
    if _key(name) in ("end", "end_time", "end_s", "stop", "offset"):
        return "a stretch is told by start and duration, in seconds"
    close = difflib.get_close_matches(_key(name)[:20], [*COLUMNS, *itertools.chain(_MEANINGS, _FILES)], n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(COLUMNS)}; leave out the others"
