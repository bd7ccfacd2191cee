"""Shards as others keep them: webdataset's tars (img2dataset, open_clip, LAION-CLAP) and parquet with the bytes inside.

A shard is looked through once, and what is found there kept: for each sample the place of its picture and sound, its
captions and labels. From then on a sample is read by itself, wherever it stands, so that the order, what resuming gives
and every number are those of files.

    data.shards: null                          all below data_root/shards
    data.shards: /data/cc3m                    a folder, a file, or names with * and {00000..00331}
    data.shards: {train: "a/*.tar", val: b.parquet}

Without such a mapping the split of a shard is a word of its name or of a folder: train/0.tar, cc3m-val-0.tar. Where no
shard has one, 80, 10 and 10 % of the samples by their keys.
"""

import dataclasses
import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trimodal.config import Config
from trimodal.data import prepared
from trimodal.data.samples import Sample, SampleTable
from trimodal.errors import UserError, similar
from trimodal.sets import inventory
from trimodal.sets.base import DataSet
from trimodal.sets.columns import SPLIT_NAMES
from trimodal.sets.fields import Notes, Reading, class_names
from trimodal.sets.reading import by_split
from trimodal.sets.tables import read_table
from trimodal.sets.tars import read_tar

NAME = "shards"
FORMAT = 2  # counts up with every change of what is found in a shard
READERS = {".tar": read_tar, ".parquet": read_table}
COMPRESSED = {".tar.gz": "gunzip", ".tgz": "gunzip -S .tgz", ".tar.bz2": "bunzip2", ".tar.xz": "unxz",
              ".tar.zst": "unzstd"}
MAGIC = {b"\x1f\x8b": ".tar.gz", b"BZh": ".tar.bz2", b"\xfd7zXZ": ".tar.xz", b"\x28\xb5\x2f\xfd": ".tar.zst"}

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_log = logging.getLogger(__name__)


class Shard(NamedTuple):
    path: str  # absolute
    name: str  # below the folder of all shards, without suffix: keys begin with it
    split: str  # "" where nothing says it


def find_shards(root: Path, config: Config) -> tuple[str, list[Shard]]:
    """The folder of the shards that `data.shards` names (None: those below `root`), and these in the order of their
    names.

    Raises:
        UserError: one is not there, is compressed, or stands for two; none are found; some have a split and some none.
    """
    given = config.data.shards
    by_split = dict(given) if isinstance(given, dict) else {"": given or str(root)}
    places = {split: [place for pattern in ([patterns] if isinstance(patterns, str) else patterns)
                      for place in _places(pattern)] for split, patterns in by_split.items()}
    base = os.path.commonpath([folder for found in places.values() for _, folder in found])
    shards = [Shard(path, os.path.splitext(os.path.relpath(path, base))[0], split)
              for split, found in places.items() for path in sorted({path for path, _ in found})]
    if not isinstance(given, dict):
        shards = [one._replace(split=_split_of(one)) for one in shards]
    _check(shards)
    return base, sorted(shards, key=lambda one: one.name)


def _places(pattern: str) -> Iterator[tuple[str, str]]:
    """(path, folder) of each shard that a folder, a file or a pattern stands for; UserError where there is none."""
    path = os.path.abspath(pattern)
    if os.path.isdir(path):
        found = list(_below(path))
        if not found:
            raise UserError(f"{path}: holds no shards (.tar or .parquet); put them there, or name others: "
                            "data.shards=FOLDER_OR_PATTERN")
        yield from ((one, path) for one in found)
        return
    for name in [path] if os.path.exists(path) else _expanded(path):
        matches = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"data.shards: {name}: there is no such file or folder; give a folder, a file, or names "
                            "with * and {00000..00099}")
        for match in matches:
            if os.path.isdir(match):
                yield from _places(match)
            else:
                yield match, os.path.dirname(match)


def _below(folder: str) -> Iterator[str]:
    """The shards in a folder and below it. A table beside a tar of its name is img2dataset's list of that tar."""
    for where, names in inventory.walk(Path(folder)):
        for name in names:
            stem, end = os.path.splitext(name)
            if name.endswith(tuple(COMPRESSED)) or (end in READERS and not (
                    end == ".parquet" and f"{stem}.tar" in names)):
                yield os.path.join(where, name)


def _expanded(pattern: str) -> Iterator[str]:
    """{00000..00002} and {a,b} as a shell and webdataset write them out."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    bounds = _RANGE.fullmatch(found[1])
    parts = [f"{number:0{len(bounds[1])}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)] if bounds else (
        found[1].split(","))
    for part in parts:
        yield from _expanded(pattern[: found.start()] + part + pattern[found.end():])


def _split_of(shard: Shard) -> str:
    """The split that the name of a shard, or else of the nearest folder, has among its words."""
    for part in reversed(shard.name.split(os.sep)):
        named = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_NAMES}
        if len(named) > 1:
            raise UserError(f"{shard.path}: {part!r} names {len(named)} splits, {' and '.join(sorted(named))}; say "
                            "which it is: data.shards={train: PATTERN, val: PATTERN, test: PATTERN}")
        if named:
            return named.pop()
    return ""


def _check(shards: Sequence[Shard]) -> None:
    by_name: dict[str, Shard] = {}
    for one in shards:
        ending = next((end for end in COMPRESSED if one.path.endswith(end)), "") or _compression(one.path)
        if ending:
            raise UserError(f"{one.path}: is compressed, so that no sample can be read without all before it, and "
                            f"pictures and sounds do not get smaller by it; unpack it: {COMPRESSED[ending]} {one.path}")
        if os.path.splitext(one.path)[1] not in READERS:
            raise UserError(f"data.shards: {one.path}: is no shard; allowed: {', '.join(READERS)}")
        if (other := by_name.setdefault(one.name, one)) is not one:
            raise UserError(f"data.shards: {other.path} and {one.path} are two shards of one name; leave one out")
    if (without := [one for one in shards if not one.split]) and len(without) < len(shards):
        raise UserError(f"{without[0].path}: neither its name nor a folder's says its split, though those of others "
                        "do; say it for all: data.shards={train: PATTERN, val: PATTERN, test: PATTERN}")


def _compression(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(8)
    return next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), "")


# ---- the index ----------------------------------------------------------------------------------------------------


def _index(shard: Shard, reading: Reading, config: Config) -> SampleTable:
    """The samples of a shard, from an earlier start where shard and settings are the same; adds to its notes."""
    state = prepared.digest([f"{FORMAT} {NAME}", shard.path, shard.name, *_state_of(shard.path), *reading.captions, "",
                             *reading.class_names])
    found = prepared.load(config, "shard", state)
    if found is None:
        own = dataclasses.replace(reading, notes=Notes())
        read = READERS[os.path.splitext(shard.path)[1]]
        table = SampleTable.pack(read(shard.path, f"{shard.name}/", NAME, own))
        noticed = json.dumps([own.notes.found, sorted(own.notes.fields)])
        notes = np.frombuffer(noticed.encode("utf-8", "surrogatepass"), np.uint8)
        found = prepared.keep(config, "shard", state, {**table.arrays(), "notes": notes})
    told, fields = json.loads(found["notes"].tobytes().decode("utf-8", "surrogatepass"))
    for what, (count, first) in told.items():
        reading.notes.add(what, first, count)
    reading.notes.see(fields, reading.captions)
    return SampleTable.from_arrays(found)


def _state_of(path: str) -> Iterator[str]:
    found = os.stat(path)
    yield from (str(found.st_size), str(found.st_mtime_ns))


def read_shards(root: Path, config: Config) -> tuple[list[SampleTable], list[str]]:
    """The samples of each shard, with their splits, and lines for the log.

    Raises:
        UserError: see `find_shards`; or a shard is damaged as a whole, none holds a sample, or none a field that is to
            hold captions.
    """
    from tqdm import tqdm  # here, since download_datasets.py knows all sets and needs none of it

    base, shards = find_shards(root, config)
    captions = () if config.data.shards_captions == "auto" else config.data.shards_captions
    reading = Reading(captions, class_names(base))
    tables = []
    for shard in tqdm(shards, "looking through shards", unit="shard", disable=None if len(shards) > 1 else True):
        tables.append(_index(shard, reading, config).with_split(shard.split))
    if not any(map(len, tables)):
        raise UserError(f"{shards[0].path}: neither this shard nor another ({len(shards):,} in all) holds a picture or "
                        f"sound{''.join(f'; {line}' for line in reading.notes.lines()[:2])}")
    there = sorted(reading.notes.fields)
    if unknown := [name for name in captions if name not in there]:
        raise UserError(f"data.shards_captions: {unknown[0]!r:.60} is no field in {base}. "
                        + (f"{similar(unknown[0], there):.300}" if there else "There are none; leave it at auto"))
    return tables, reading.notes.lines(any(table.has_text.any() for table in tables))


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    tables, lines = read_shards(root, config)
    for line in lines:
        _log.warning("%s: %s", NAME, line)
    yield from by_split(SampleTable.concat(tables), splits)


def _state(config: Config) -> str:
    root = Path(config.paths.data_root).absolute() / NAME
    try:
        base, shards = find_shards(root, config)
    except UserError as error:
        raise OSError(str(error)) from None  # reading the set says it
    return prepared.digest([f"{FORMAT}", str(config.data.shards_captions), *class_names(base),
                            *(text for one in shards for text in (*one, *_state_of(one.path)))])


SET = DataSet(
    name=NAME, order=9, licence="the user's own files", read=_read, english=False, reads_at_once=True, state=_state,
    splits="as the names of shards or folders say, else 80, 10 and 10 % by key",
    note="your own shards, named in data.shards or put into data_root/shards; there is nothing to download")
