"""Webdataset's tars: members whose names share a key are one sample, 0007.jpg with 0007.txt and 0007.json.

Nothing is unpacked. Members are found once, by their headers, and read later where they stand.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from trimodal import media, members
from trimodal.data.samples import Sample
from trimodal.errors import WHOLE, UserError
from trimodal.sets.fields import MAX_TEXT_BYTES, TEXTS, Notes, Reading, field_of, media_of

BLOCK = tarfile.BLOCKSIZE
MEDIA = tuple(end[1:] for end in media.SUFFIXES)
# Webdataset's rule: a key ends at the first dot of the name, what follows is the extension; names without either and
# hidden ones (._7.jpg of macOS) are none. Names with two underscores around are its own.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_OF_WEBDATASET = re.compile(r"__[^/]*__($|/)")

Fields = dict[str, Any]  # by extension: the path of a picture, sound or video, else the text


class _Found(NamedTuple):
    name: str
    first: int  # byte of its content
    size: int


def read_tar(path: str, prefix: str, source: str, reading: Reading) -> list[Sample]:
    """The samples of a tar, by key; keys begin with `prefix`. What is lost or left out goes to the notes of `reading`.

    Raises:
        UserError: it is no tar.
    """
    by_key: dict[str, Fields] = {}
    with open(path, "rb") as file:
        for found in _members(file, path, reading.notes):
            name = re.sub(r"^(\./)+", "", found.name)
            named = _KEY_AND_EXTENSION.fullmatch(name)
            if named is None or _OF_WEBDATASET.match(name):
                continue
            key, (part, dot, kind) = named[1], named[2].rpartition(".")
            kind = kind.lower()
            if kind not in TEXTS and kind not in MEDIA:
                reading.notes.add(f"members .{kind} are of a kind that is not read here", f"{path}: {found.name}")
                continue
            fields = by_key.setdefault(key, {})
            if part + dot + kind in fields:
                reading.notes.add("members have the name of one before, and take its place", f"{path}: {found.name}")
            fields[part + dot + kind] = (members.in_tar(path, found.first, found.size, found.name) if kind in MEDIA else
                                         _text(file, found, kind, path, reading.notes))
    samples = [reading.sample(source, prefix + key, media_of(fields), fields)
               for whole, all_fields in by_key.items() for key, fields in parted(whole, all_fields)]
    return sorted((one for one in samples if one), key=lambda sample: sample.key)


def parted(key: str, fields: Fields) -> Iterator[tuple[str, Fields]]:
    """(key, fields) of each sample among the members of one key of webdataset, which cuts names at their first dot.

    "dog. bark 1.flac" and "dog. bark 2.flac" have the key "dog" and the extensions " bark 1.flac" and " bark 2.flac"
    then. They are samples of their own where each has a text of its own, " bark 1.json", or where there is no plain
    "dog.flac"; else they are further files of "dog", as a mask "7.seg.png" is of "7.jpg". What describes a "dog"
    without a picture or sound describes its parts.
    """
    parts: dict[str, Fields] = {}
    for extension, value in fields.items():
        part, _, kind = extension.rpartition(".")
        parts.setdefault(part, {})[kind] = value
    own = parts.pop("", {})
    is_whole, cut_off = bool(media_of(own)), dict[str, Any]()
    for part, found in parts.items():
        if media_of(found) and not (is_whole and found.keys().isdisjoint(TEXTS)):
            yield f"{key}.{part}", found if is_whole else {**own, **found}
        else:
            cut_off |= {f"{part}.{kind}": value for kind, value in found.items()}
    if is_whole or len(cut_off) == len(fields) - len(own):
        yield key, cut_off | own


def _members(file: IO[bytes], path: str, notes: Notes) -> Iterator[_Found]:
    """The plain files of a tar in their order; past a damaged header it goes on with the next whole one."""
    size, end, last = os.fstat(file.fileno()).st_size, 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:
            while (one := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                _note_damage(file, end, one.offset, last, path, notes)
                end, last = one.offset_data + -(-one.size // BLOCK) * BLOCK, one.name
                if one.isreg() and not one.issparse():
                    yield _Found(one.name, one.offset_data, one.size)
                elif not one.isdir():
                    notes.add("links and other special members are left out", f"{path}: {one.name}")
    except tarfile.TarError as error:
        if not last:
            if size:
                raise UserError(f"{path}: is no tar ({media.kind_of(path, '') or error}); {WHOLE}, or take it out "
                                "of data.shards") from None
            notes.add("shards are empty files", path)
            return
        end = size + 1
    if end >= size:
        notes.add("shards end amid their samples or without an end mark, as an unfinished copy does: what would follow "
                  f"is not there ({last} was the last)", path)
    else:
        _note_damage(file, end, size, last, path, notes)


def _note_damage(file: IO[bytes], end: int, begin: int, last: str, path: str, notes: Notes) -> None:
    """Note where there is anything but zeros between the end of a member and the header of the next."""
    if end < begin:
        file.seek(end)
        if any(file.read(BLOCK)):
            notes.add("stretches of shards are damaged, and members within them are not there", f"{path}: after {last}")


def _text(file: IO[bytes], found: _Found, kind: str, path: str, notes: Notes) -> Any:
    if found.size > MAX_TEXT_BYTES:
        notes.add(f"texts of over {MAX_TEXT_BYTES:,} bytes are left out", f"{path}: {found.name}")
        return None
    file.seek(found.first)
    return field_of(kind, file.read(found.size), notes, f"{path}: {found.name}")
