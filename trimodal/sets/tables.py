"""Parquet tables that hold the bytes of pictures and sounds, as exports of the Hub and of img2dataset do.

A column of media is a struct of `bytes` and `path`, or plain bytes. Rows are read where they stand: a row group at a
time, since a table knows no smaller part.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimodal import media, members
from trimodal.data.samples import Sample
from trimodal.errors import WHOLE, UserError
from trimodal.sets import columns
from trimodal.sets.fields import AUTO, TEXTS, Media, Reading

MAX_GROUP_BYTES = 1_000_000_000  # of one column: each process that reads holds a row group or two in memory
KEYS = ("__key__", "key")  # columns of webdataset and img2dataset
KINDS = {"Image": "picture", "Audio": "sound", "Video": "video"}  # of the Hub's features


@dataclass(frozen=True)
class _Column:
    """A column of media: where its bytes are, where the names of their files are ("" for nowhere), what they are."""

    name: str
    bytes: str
    path: str
    kind: str  # picture, sound or video


def read_table(path: str, prefix: str, source: str, reading: Reading) -> list[Sample]:
    """The samples of a table, by key (that of its column KEYS, else the number of the row); keys begin with `prefix`.

    Raises:
        UserError: it is no parquet table, holds no bytes of media, or in row groups that are too large.
    """
    import pyarrow

    try:
        table = members.open_table(path, os.stat(path).st_mtime_ns)
        found = _columns(table, path)
        if reading.captions != AUTO:
            of_media = {one.name for one in found}
            reading.notes.see((name for name in table.schema_arrow.names if name not in of_media), reading.captions)
        rows = list(_rows(table, path, found, reading))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is no parquet table that can be read ({str(error).splitlines()[0]:.100}); {WHOLE}, "
                        "or take it out of data.shards") from None
    keys = [key for key, _, _ in rows]
    is_named = all(keys) and len(set(keys)) == len(keys)
    samples = [reading.sample(source, prefix + (key if is_named else f"{number:06}"), of_row, fields)
               for number, (key, of_row, fields) in enumerate(rows)]
    return sorted((one for one in samples if one), key=lambda sample: sample.key)


def _columns(table: Any, path: str) -> list[_Column]:
    import pyarrow.types as types

    features, found = _features(table), []
    for one in table.schema_arrow:
        fields = {inner.name: inner.type for inner in one.type} if types.is_struct(one.type) else {}
        own = fields.get("bytes", one.type)
        if types.is_binary(own) or types.is_large_binary(own):
            where = f"{one.name}.bytes" if "bytes" in fields else one.name
            known = features.get(one.name)
            kind = KINDS.get(known.get("_type", "") if isinstance(known, dict) else "") or _kind(table, one.name, where)
            if kind:
                found.append(_Column(one.name, where, f"{one.name}.path" if "path" in fields else "", kind))
    if not found:
        raise UserError(f"{path}: has no column with the bytes of pictures or sounds (its columns: "
                        f"{', '.join(table.schema_arrow.names)[:200]}); where it lists addresses, fetch what they "
                        "name, for example with img2dataset, and give its shards to data.shards")
    return sorted(found, key=lambda one: columns.meaning_of(one.name) not in ("image", "audio"))  # stable


def _kind(table: Any, name: str, where: str) -> str:
    """What a column without a stated type holds, by its name, else by its first bytes; "" for neither."""
    ending = f".{name.lower()}"
    for kind, ends in (("picture", media.PICTURE_SUFFIXES), ("sound", media.SOUND_SUFFIXES),
                       ("video", media.VIDEO_SUFFIXES)):
        if ending in ends:
            return kind
    meaning = columns.meaning_of(name)
    if meaning in ("image", "audio"):
        return "picture" if meaning == "image" else "sound"
    for batch in table.iter_batches(batch_size=1, columns=[where], use_threads=False):
        value = batch.column(0)[0].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value:
            return media.medium_of(value)
    return ""


def _rows(table: Any, path: str, found: Sequence[_Column],
          reading: Reading) -> Iterator[tuple[str, Media, dict[str, Any]]]:
    """Key ("" for none), media and fields of each row."""
    class_names, wanted = _class_names(table), _names_of_fields(table, found, reading)
    names = [one.path for one in found if one.path]
    first = 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, columns=[*wanted, *names], use_threads=False).to_pylist() if (
            wanted or names) else [{}] * table.metadata.row_group(group).num_rows
        there = {one.name: _is_there(table, path, group, one.bytes) for one in found}
        for number, row in enumerate(rows):
            of: dict[str, list[str]] = {"picture": [], "sound": [], "video": []}
            key = next((str(row[name]) for name in KEYS if row.get(name)), "")
            for one in found:
                if there[one.name] is None or there[one.name][number]:
                    file_name = (row.get(one.name) or {}).get("path") if one.path else ""
                    name = f"row {first + number}" + (f", {os.path.basename(file_name)}" if file_name else "")
                    if key and f".{one.name}" in media.SUFFIXES:
                        name = f"{key}.{one.name}"  # as in a tar
                    of[one.kind].append(members.in_parquet(path, group, number, one.bytes, name))
            yield key, Media(of["picture"], of["sound"], of["video"]), {
                name: _named(row[name], class_names.get(name, ())) for name in wanted if name in row}
        first += len(rows)


def _names_of_fields(table: Any, found: Sequence[_Column], reading: Reading) -> list[str]:
    """The columns that describe a sample; others, such as vectors, may be large."""
    media_names = {one.name for one in found}
    return [name for name in table.schema_arrow.names if name not in media_names and (
        name in (*KEYS, *TEXTS) or name in reading.captions
        or (reading.captions == AUTO and columns.meaning_of(name) == "text")
        or columns.meaning_of(name) in ("labels", "speaker"))]


def _is_there(table: Any, path: str, group: int, column: str) -> Any:
    """Which rows of a group have bytes (a list of bool); None: all, as the table's own statistics say."""
    facts = _chunks(table, group)[column]
    if facts.total_uncompressed_size > MAX_GROUP_BYTES:
        raise UserError(f"{path}: row group {group} has {facts.total_uncompressed_size / 1e9:.1f} GB in column "
                        f"{column}, and a row can only be read with its group; write the table anew with "
                        "row_group_size=100")
    if facts.statistics is not None and facts.statistics.has_null_count and not facts.statistics.null_count:
        return None
    values = table.read_row_group(group, columns=[column], use_threads=False).column(0)
    return [bool(value.get("bytes") if isinstance(value, dict) else value)
            for value in (one.as_py() for one in values)]


def _chunks(table: Any, group: int) -> dict[str, Any]:
    facts = table.metadata.row_group(group)
    return {one.path_in_schema: one for one in map(facts.column, range(facts.num_columns))}


def _features(table: Any) -> Mapping[str, Any]:
    """What the Hub's library wrote about the columns; {} where another program wrote the table."""
    try:
        found = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(table: Any) -> dict[str, Sequence[str]]:
    """Names of numbered classes, by column."""
    found: dict[str, Sequence[str]] = {}
    for name, feature in _features(table).items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and isinstance(inner.get("names"), list):
            found[name] = [str(one) for one in inner["names"]]
    return found


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
