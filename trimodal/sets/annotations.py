"""The files that a set's own lists name, compared with those on the disk: name by name, not only by their number."""

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trimodal.media import WITH_SOUND

SPLITS = ("train", "val", "test")
AUDIOCAPS_VERSIONS = ("dataset", "dataset2.0")  # folders of the lists of version 1 and 2
VOX1_TEST_SPEAKERS = frozenset(f"id{number}" for number in range(10270, 10310))
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*"([^"\\]+)"')
_KARPATHY = re.compile(rb'"(?:filename"\s*:\s*"[^"\\]*_0*(\d+)\.jpg|split"\s*:\s*"(\w+))"')
BLOCK_BYTES = 1 << 20
_LONGEST_MATCH = 1 << 10  # bytes of one entry that may be cut by a block
_CLOTHO = {"train": "development", "val": "validation", "test": "evaluation"}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many of the files that `source` names are there, and the names of some that are not."""

    place: str
    source: str
    found: int
    listed: int
    absent: tuple[str, ...]


def coverage(name: str, folder: Path, splits: Collection[str] = SPLITS) -> Iterator[Coverage]:
    """For each list of the set `name` that is on the disk, beside a folder that it is of."""
    for place, source, read in LISTS.get(name, lambda splits: [])(splits):
        path = folder / source
        if path.is_file() and (folder / place).is_dir():
            yield _compare(folder / place, place, source, read(path))


def present(name: str, folder: Path, place: str) -> Iterator[str]:
    """The files of the folder `place` that its first list names and that are there; no more is read than is asked."""
    path, read = next((folder / source, read) for where, source, read in LISTS[name](SPLITS) if where == place)
    is_there = _looker(folder / place)
    return (each for each in read(path) if is_there(each))


def _compare(folder: Path, place: str, source: str, names: Iterable[str]) -> Coverage:
    is_there = _looker(folder)
    found = listed = 0
    absent: list[str] = []
    for name in names:
        listed += 1
        if is_there(name):
            found += 1
        elif len(absent) < 10:
            absent.append(name)
    return Coverage(place=place, source=source, found=found, listed=listed, absent=tuple(absent))


def _looker(folder: Path) -> Callable[[str], bool]:
    look = lru_cache(maxsize=64)(lambda parent: frozenset(map(_composed, names_in(folder / parent))))

    def is_there(name: str) -> bool:
        parent, _, last = _composed(name).rpartition("/")
        there = look(parent)
        return last in there or (not os.path.splitext(last)[1] and any(last + end in there for end in WITH_SOUND))

    return is_there


def _composed(name: str) -> str:
    """In the Unicode form that lists are in: a Mac may have unpacked the files under the other one."""
    return unicodedata.normalize("NFC", name)


def names_in(folder: Path) -> frozenset[str]:
    """Of what is in the folder; none where there is no such folder."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def number_of_rows(path: Path) -> int:
    """Lines of a list, rows below the header of a table; 0 where it cannot be read."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            return sum(1 for _ in csv.reader(file)) - 1 if path.suffix == ".csv" else sum(1 for _ in file)
        except csv.Error:
            return 0


def other_rows(path: Path, published: int) -> str:
    """A note where a list has another number of rows than is published (0: not known), else ""."""
    rows = number_of_rows(path) if published else 0
    return f"has {rows:,} rows, {published:,} are published" if rows != published else ""


def _of_json(path: Path) -> Iterator[str]:
    """Every "file_name" of annotations."""
    return (match[1].decode("utf-8", "replace") for match in _matches(_FILE_NAME, path))


def karpathy(path: Path) -> Iterator[tuple[int, str]]:
    """(number of the picture, its split) of each picture of dataset_coco.json, which names both once, in any order."""
    image, split = b"", b""
    for match in _matches(_KARPATHY, path):
        image, split = match[1] or image, match[2] or split
        if image and split:
            yield int(image), split.decode("ascii", "replace")
            image = split = b""


def _matches(pattern: re.Pattern[bytes], path: Path) -> Iterator[re.Match[bytes]]:
    """All of a file of hundreds of megabytes, a block at a time."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            text = rest + block
            end = 0
            for match in pattern.finditer(text):
                end = match.end()
                yield match
            rest = text[max(end, len(text) - _LONGEST_MATCH):]


def _of_table(column: str) -> Callable[[Path], Iterator[str]]:
    def read(path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                yield row.get(column) or ""
    return read


def clip_lists(folder: Path, split: str) -> list[Path]:
    """The lists of AudioCaps in `folder`, one a version, the first version first; where none is there, its name."""
    paths = [folder / version / f"{split}.csv" for version in AUDIOCAPS_VERSIONS]
    return [path for path in paths if path.is_file()] or paths[:1]


def clips(folder: Path, split: str) -> Iterator[str]:
    """YOUTUBEID_START of each clip that any version names, once; no suffix."""
    yield from dict.fromkeys(clip for path in clip_lists(folder, split) for clip in _of_clips(path))


def names_of_clip(video: str, start: str) -> list[str]:
    """Names without suffix that the clip from second `start` of a video has in people's folders: YOUTUBEID_START first,
    YYOUTUBEID, YOUTUBEID; either with START and END in seconds, also with thousandths or of six digits, or in
    milliseconds."""
    begin_s = int(start) if start.isdigit() else 0
    end_s = begin_s + 10
    spans = (f"_{start}", f"_{begin_s}_{end_s}", f"_{begin_s * 1000}_{end_s * 1000}", f"_{begin_s}.000_{end_s}.000",
             f"_{begin_s:06d}", f"_{begin_s:06d}_{end_s:06d}")
    return [f"{video}_{start}", f"Y{video}", video, *(f"{one}{span}" for one in (video, f"Y{video}") for span in spans)]


def _of_clips(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = (f"{row.get('youtube_id')}_{row.get('start_time')}" for row in csv.DictReader(file))
        yield from dict.fromkeys(rows)


def _of_further_clips(path: Path) -> Iterator[str]:
    """Those that the first version does not name."""
    first, *_ = clip_lists(path.parent.parent, path.stem)
    known = set(_of_clips(first)) if first != path else set()
    yield from (clip for clip in _of_clips(path) if clip not in known)


def _of_trials(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line.split(" ", 1)[1].strip() for line in file if " " in line)


Lists = list[tuple[str, str, Callable[[Path], Iterator[str]]]]  # (folder of the files, list, names in the list)
LISTS: dict[str, Callable[[Collection[str]], Lists]] = {
    "coco": lambda splits: [(part, f"annotations/captions_{part}.json", _of_json) for part in ("train2017", "val2017")],
    "clotho": lambda splits: [(ours, f"clotho_captions_{ours}.csv", _of_table("file_name"))
                              for split, ours in _CLOTHO.items() if split in splits],
    "audiocaps": lambda splits: [(split, f"{version}/{split}.csv", read) for version, read in zip(
        AUDIOCAPS_VERSIONS, (_of_clips, _of_further_clips), strict=True) for split in SPLITS if split in splits],
    "voxceleb": lambda splits: ([("voxceleb1/wav", "voxceleb1/iden_split.txt", _of_trials)]
                                if set(SPLITS) <= set(splits) else []),
}
