"""A tree of files without a list: folders are classes, files of one stem are one sample, videos are image-audio pairs.

    folder/dog/1.jpg                 a picture with the label "dog"
    folder/dog/2.wav                 a sound with that label
    folder/walks/3.mp4               a picture (its middle frame) and its sound
    folder/4.jpg  folder/4.txt       a picture and its captions, one a line; or a .json, as in shards. img2dataset
                                     writes both, and a text of several lines is one caption where its .json says so

Folders train, val and test at the top are splits; without them 80, 10 and 10 % of the samples by their keys.
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimodal import media
from trimodal.config import Config
from trimodal.data import prepared
from trimodal.data.samples import SPLITS, Sample, SampleTable
from trimodal.data.splits import file_key
from trimodal.errors import UserError, counted
from trimodal.sets import inventory
from trimodal.sets.base import DataSet
from trimodal.sets.columns import SPLIT_NAMES
from trimodal.sets.fields import MAX_TEXT_BYTES, TEXTS, Reading, class_names, field_of, flat, media_of
from trimodal.sets.reading import by_split

NAME = "folder"
FORMAT = 1  # counts up with every change of what is found in a tree

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Found:
    """Files of one stem."""

    stem: str  # below the folder of the set, with "/"
    files: dict[str, str]  # paths by ending, in small letters and without the dot

    @property
    def parts(self) -> list[str]:
        return self.stem.split("/")[:-1]


def find(root: Path) -> list[Found]:
    """What has a picture, sound or video, in the order of folders and stems."""
    found = []
    for folder, names in inventory.walk(root):
        by_stem: dict[str, dict[str, str]] = {}
        for name in names:
            stem, end = os.path.splitext(name)
            if end.lower() in media.SUFFIXES or end[1:].lower() in TEXTS:
                by_stem.setdefault(stem, {}).setdefault(end[1:].lower(), os.path.join(folder, name))
        below = Path(folder).relative_to(root)
        found += [Found((below / stem).as_posix(), files) for stem, files in sorted(by_stem.items()) if media_of(files)]
    return found


def read_folder(root: Path, config: Config) -> tuple[SampleTable, list[str]]:
    """The samples of a tree, with their splits ("" for all: they are to be drawn), and lines for the log.

    Raises:
        UserError: there is no such folder; it holds no picture, sound or video; one file is in two splits.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; make it, or name yours: data.folder=FOLDER")
    found = find(root)
    if not found:
        raise UserError(f"{root}: holds no pictures, sounds or videos; put them there, or name another: "
                        "data.folder=FOLDER")
    reading, lines = Reading(class_names=class_names(str(root))), list[str]()
    splits = _splits(found)
    if splits:
        left_out = Counter(one.stem.split("/")[0] for one in found if one.stem.split("/")[0] not in splits)
        lines += [f"{name} is beside the folders of splits, and left out with its {counted(count, 'sample')}"
                  for name, count in left_out.items()]
        found = [one for one in found if one.stem.split("/")[0] in splits]
    sounding = _videos_with_sound(found, config)
    table = SampleTable.pack(filter(None, (_sample(one, splits, sounding, reading, config) for one in found)))
    if splits:
        _check_sides(table)
    lines += reading.notes.lines(bool(table.has_text.any()))
    if labels := sorted(table.labels.names):
        lines.append(f"{counted(len(labels), 'label')}: {', '.join(labels):.100}")
    return table, lines


def _splits(found: Sequence[Found]) -> dict[str, str]:
    """The folders at the top that are splits, and which: two or more that are named so, or all that there are. A folder
    "train" beside "bus" and "car" is a class."""
    tops = dict.fromkeys(one.parts[0] if one.parts else "" for one in found)
    named = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    return named if len(named) > 1 or len(named) == len(tops) else {}


def _sample(found: Found, splits: dict[str, str], sounding: dict[str, bool], reading: Reading,
            config: Config) -> Sample | None:
    of = media_of(found.files)
    fields = {end: _text(found.files[end], end, reading) for end in TEXTS if end in found.files}
    if isinstance(fields.get("txt"), str) and fields["txt"] not in flat({"json": fields.get("json")}).values():
        fields["txt"] = fields["txt"].splitlines()
    sample = reading.sample(NAME, found.stem, of, fields, sounding.get(of.videos[0]) if of.videos else None)
    if sample is None:
        return None
    parts = found.parts[1:] if splits else found.parts
    # folders of digits alone beside captions are a way to keep many files, without them they are classes
    label = parts[0] if parts and not (sample.captions and parts[0].isdecimal()) else ""
    labels = tuple(dict.fromkeys(filter(None, (label, *sample.labels))))
    captions = sample.captions
    if label and not captions and config.data.folder_caption:
        captions = (config.data.folder_caption.replace("{}", label.replace("_", " ")),)
    return dataclasses.replace(sample, split=splits.get(found.stem.split("/")[0], ""), labels=labels, captions=captions)


def _text(path: str, end: str, reading: Reading) -> Any:
    """The value of a .txt, .json or .cls."""
    if os.path.getsize(path) > MAX_TEXT_BYTES:
        reading.notes.add(f"texts of over {MAX_TEXT_BYTES:,} bytes are left out", path)
        return None
    with open(path, "rb") as file:
        return field_of(end, file.read(), reading.notes, path)


def _videos_with_sound(found: Sequence[Found], config: Config) -> dict[str, bool]:
    """Whether each video has a sound track; kept, since each has to be opened for that."""
    videos = [path for one in found for path in media_of(one.files).videos]

    def look() -> dict[str, np.ndarray]:
        return {"has_sound": np.array([media.has_sound(path) for path in videos], bool)}

    if not videos:
        return {}
    kept = prepared.kept(config, "videos", prepared.digest(map(file_key, videos)), look)
    return dict(zip(videos, kept["has_sound"].tolist(), strict=True))


def _check_sides(table: SampleTable) -> None:
    """Raise UserError where one file, by whatever links, is in two splits."""
    sides: dict[str, tuple[str, str]] = {}
    for row in range(len(table)):
        for path in filter(None, {table.images[row], table.audio[row]}):
            other, split = sides.setdefault(file_key(path), (path, table.splits[row]))
            if split != table.splits[row]:
                raise UserError(f"{path} is in {table.splits[row]!r}, and as {other} in {split!r}; no file may be on "
                                "two sides: take it out of one")


def _root(config: Config) -> Path:
    return Path(config.data.folder or Path(config.paths.data_root) / NAME).absolute()


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    table, lines = read_folder(_root(config), config)
    for line in lines:
        _log.warning("%s: %s", NAME, line)
    yield from by_split(table, splits)


def _state(config: Config) -> str:
    """Names of all files, and of texts and videos what shows a change of them."""
    root = _root(config)
    parts = [f"{FORMAT}", str(root), str(config.data.folder_caption), *class_names(str(root)), *SPLITS]
    for folder, names in inventory.walk(root):
        parts += [folder, *names]
        parts += [file_key(path) for name in names if (path := os.path.join(folder, name)).lower().endswith(
            (*(f".{end}" for end in TEXTS), *media.VIDEO_SUFFIXES))]
    return prepared.digest(parts)


SET = DataSet(
    name=NAME, order=10, licence="the user's own files", read=_read, english=False, reads_at_once=True, state=_state,
    splits="folders train, val and test, else 80, 10 and 10 % by name",
    note="your own files, in data.folder or data_root/folder; there is nothing to download")
