"""The one shape of all data sets: `Sample`, and `SampleTable`, which holds millions of them in a dozen numpy arrays.

Loader workers inherit or unpickle the table; arrays stay shared or copy at memory speed, where lists of Python objects
would be copied page by page as their reference counts change.

    table = SampleTable.pack([Sample(key="1", source="coco", split="train", image="/data/1.jpg", captions=("a dog",))])
    table[0].captions, table.has_audio
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trimodal import media, members

SPLITS = ("train", "val", "test")
# An empty cell of a table that was made text before it was saved; in small letters.
EMPTY_CELLS = {"nan", "none", "null", "nil", "n/a", "na", "#n/a", "<na>", "nat", "undefined"}
_PART = 65536  # samples packed at once


class BrokenSample(ValueError):
    """A file that cannot be read; the message is its path and the reason."""


@contextmanager
def decoding(path: str, wanted: str) -> Iterator[None]:
    """Raise what fails within as a BrokenSample that says why `path` is no "picture" or "sound", as `wanted`."""
    if not os.path.isfile(members.file_of(path)):
        is_folder = os.path.isdir(members.file_of(path))
        raise BrokenSample(f"{members.shown(path)}: {'is a folder; name its files' if is_folder else 'no such file'}")
    try:
        yield
    except BrokenSample as error:
        raise BrokenSample(f"{members.shown(path)}: {media.kind_of(path, wanted) or error}") from None
    except Exception as error:  # damaged files make the decoders raise nearly any type
        if isinstance(error, MemoryError) and not type(error).__module__.startswith("av."):
            raise  # FFmpeg's own says that the file asks for absurd sizes
        raise BrokenSample(f"{members.shown(path)}: {media.problem_of(path, error, wanted)}") from None


@dataclass(frozen=True, slots=True)
class Sample:
    """An image, a sound, or both, with captions and labels."""

    key: str  # stable id, unique within (source, split)
    source: str  # name of the set: "coco", "clotho", ...
    split: str  # one of SPLITS
    image: str = ""  # absolute path of an image or video, or of a member of a shard, see members; "" = none;
    audio: str = ""  # "SCHEME:N" = generated. That of a sound or video likewise
    start_s: float = 0.0
    duration_s: float = 0.0  # 0 = to the end
    captions: tuple[str, ...] = ()  # as listed: the table keeps one of those with the same words, and how many they are
    languages: tuple[str, ...] = ()  # of each caption, "en" or "zh"; "" or none at all: not known
    labels: tuple[str, ...] = ()  # names that the set brings: categories, folders, the user's labels
    speaker: str = ""


def normalise_caption(text: str) -> str:
    """Lower case, single blanks, no punctuation at the end: equal results mean the same words."""
    return " ".join(text.split()).lower().rstrip(" .,;:!?。！？，；：…")


def stable_hash(text: str) -> int:
    """63-bit number of `text`, the same in every process (Python's `hash` is salted)."""
    digest = hashlib.blake2b(_encode(text), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def ragged_take(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the flat array of the rows `indices` of a ragged array, and the offsets of the result."""
    lengths = offsets[indices + 1] - offsets[indices]
    taken = offsets_of(lengths)
    positions = np.arange(taken[-1]) + np.repeat(offsets[indices] - taken[:-1], lengths)
    return positions, taken


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1], beginning with 0: row i of a ragged array is flat[offsets[i]:offsets[i + 1]]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths, np.int64), out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Strings:
    """Many strings as one UTF-8 buffer and int64 offsets. Odd bytes of file names survive (surrogateescape)."""

    buffer: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [n + 1]

    @staticmethod
    def pack(texts: Iterable[str]) -> "Strings":
        encoded = [_encode(text) for text in texts]
        buffer = np.frombuffer(b"".join(encoded), np.uint8)
        return Strings(buffer, offsets_of([len(piece) for piece in encoded]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.buffer[self.offsets[index]:self.offsets[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def tolist(self) -> list[str]:
        """All of them; many times as fast as one by one."""
        content, ends = self.buffer.tobytes(), self.offsets.tolist()
        return [content[begin:end].decode("utf-8", "surrogateescape")
                for begin, end in itertools.pairwise(ends)]

    def distinct(self) -> tuple[np.ndarray, list[str]]:
        """The different strings, in the order of their first places, and for each place which one it is, int64 [n]."""
        content, ends, known = self.buffer.tobytes(), self.offsets.tolist(), dict[bytes, int]()
        codes = [known.setdefault(content[begin:end], len(known)) for begin, end in itertools.pairwise(ends)]
        return np.array(codes, np.int64), [text.decode("utf-8", "surrogateescape") for text in known]

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each string, int64 [n]."""
        return np.diff(self.offsets)

    def hashed(self) -> tuple[np.ndarray, ...]:
        """Arrays that are equal for equal strings."""
        return self.offsets, self.buffer

    def select(self, indices: np.ndarray) -> "Strings":
        positions, offsets = ragged_take(self.offsets, indices)
        return Strings(self.buffer[positions], offsets)

    @staticmethod
    def concat(parts: Sequence["Strings"]) -> "Strings":
        lengths = np.concatenate([part.lengths for part in parts])
        return Strings(np.concatenate([part.buffer for part in parts]), offsets_of(lengths))


@dataclass(frozen=True)
class Names:
    """Many strings of few different values: int32 codes into `names`. Iterates and indexes like a list of strings."""

    codes: np.ndarray  # int32 [n]
    names: tuple[str, ...]

    @staticmethod
    def pack(texts: Iterable[str]) -> "Names":
        known: dict[str, int] = {}
        codes = [known.setdefault(text, len(known)) for text in texts]
        return Names(np.array(codes, np.int32), tuple(known))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> str:
        return self.names[self.codes[index]]

    def hashed(self) -> tuple[np.ndarray, ...]:
        """Arrays that are equal for equal strings, whatever codes stand for them."""
        used = sorted({self.names[code] for code in np.unique(self.codes)})
        places = {name: place for place, name in enumerate(used)}
        recoded = np.array([places.get(name, -1) for name in self.names], np.int32)
        return *Strings.pack(used).hashed(), recoded[self.codes]

    def select(self, indices: np.ndarray) -> "Names":
        """The entries at `indices`, in that order; names that none of them uses are dropped."""
        used, codes = np.unique(self.codes[indices], return_inverse=True)
        return Names(codes.astype(np.int32), tuple(self.names[code] for code in used.tolist()))

    @staticmethod
    def concat(parts: Sequence["Names"]) -> "Names":
        known: dict[str, int] = {}
        recoded = []
        for part in parts:
            table = np.array([known.setdefault(name, len(known)) for name in part.names], np.int32)
            recoded.append(table[part.codes] if len(table) else part.codes)
        return Names(np.concatenate(recoded), tuple(known))


@dataclass(frozen=True)
class SampleTable:
    """Samples as columns. Captions and labels of sample i are rows `offsets[i]:offsets[i + 1]` of their columns."""

    keys: Strings
    sources: Names
    splits: Names
    images: Strings
    audio: Strings
    start_s: np.ndarray  # float64 [n]
    duration_s: np.ndarray  # float64 [n]
    captions: Strings  # those of one sample differ in their words, see normalise_caption
    caption_times: np.ndarray  # int64 [captions]: how often the sample's list has the caption; papers count each
    caption_languages: Names  # of each caption, as in Sample
    caption_offsets: np.ndarray  # int64 [n + 1]
    labels: Names
    label_offsets: np.ndarray  # int64 [n + 1]
    speakers: Names

    @staticmethod
    def pack(samples: Iterable[Sample]) -> "SampleTable":
        """Columns of `samples`; captions of blanks alone are dropped, and of equal ones all but the first. Takes an
        iterator in parts, to bound memory."""
        stream = iter(samples)
        parts = [SampleTable._pack(rows) for rows in iter(lambda: list(itertools.islice(stream, _PART)), [])]
        return SampleTable.concat(parts) if len(parts) > 1 else parts[0] if parts else SampleTable._pack([])

    @staticmethod
    def _pack(rows: Sequence[Sample]) -> "SampleTable":
        captions = [_counted(row.captions) for row in rows]
        return SampleTable(
            keys=Strings.pack(row.key for row in rows),
            sources=Names.pack(row.source for row in rows),
            splits=Names.pack(row.split for row in rows),
            images=Strings.pack(row.image for row in rows),
            audio=Strings.pack(row.audio for row in rows),
            start_s=np.array([row.start_s for row in rows], np.float64),
            duration_s=np.array([row.duration_s for row in rows], np.float64),
            captions=Strings.pack(text for texts in captions for text in texts),
            caption_times=np.array([times for texts in captions for times in texts.values()], np.int64),
            caption_languages=Names.pack(itertools.chain.from_iterable(map(_languages, rows, captions))),
            caption_offsets=offsets_of([len(texts) for texts in captions]),
            labels=Names.pack(label for row in rows for label in row.labels),
            label_offsets=offsets_of([len(row.labels) for row in rows]),
            speakers=Names.pack(row.speaker for row in rows),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        labels = range(self.label_offsets[index], self.label_offsets[index + 1])
        return Sample(
            key=self.keys[index], source=self.sources[index], split=self.splits[index],
            image=self.images[index], audio=self.audio[index],
            start_s=float(self.start_s[index]), duration_s=float(self.duration_s[index]),
            captions=self.captions_of(index), languages=self._languages_of(index),
            labels=tuple(self.labels[j] for j in labels),
            speaker=self.speakers[index],
        )

    def captions_of(self, index: int) -> tuple[str, ...]:
        return tuple(self.captions[j] for j in range(self.caption_offsets[index], self.caption_offsets[index + 1]))

    def _languages_of(self, index: int) -> tuple[str, ...]:
        found = tuple(self.caption_languages[j]
                      for j in range(self.caption_offsets[index], self.caption_offsets[index + 1]))
        return found if any(found) else ()

    @property
    def has_image(self) -> np.ndarray:
        return self.images.lengths > 0

    @property
    def has_audio(self) -> np.ndarray:
        return self.audio.lengths > 0

    @property
    def has_text(self) -> np.ndarray:
        return self.caption_count > 0

    @property
    def caption_count(self) -> np.ndarray:
        return np.diff(self.caption_offsets)

    def select(self, indices: Sequence[int] | np.ndarray) -> "SampleTable":
        """The samples at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        caption_rows, caption_offsets = ragged_take(self.caption_offsets, chosen)
        label_rows, label_offsets = ragged_take(self.label_offsets, chosen)
        return SampleTable(
            keys=self.keys.select(chosen), sources=self.sources.select(chosen), splits=self.splits.select(chosen),
            images=self.images.select(chosen), audio=self.audio.select(chosen),
            start_s=self.start_s[chosen], duration_s=self.duration_s[chosen],
            captions=self.captions.select(caption_rows), caption_times=self.caption_times[caption_rows],
            caption_languages=self.caption_languages.select(caption_rows), caption_offsets=caption_offsets,
            labels=self.labels.select(label_rows), label_offsets=label_offsets,
            speakers=self.speakers.select(chosen),
        )

    @staticmethod
    def concat(tables: Sequence["SampleTable"]) -> "SampleTable":
        if not tables:
            return SampleTable.pack([])
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(SampleTable)):
            columns = [getattr(table, name) for table in tables]
            if name.endswith("offsets"):
                joined[name] = offsets_of(np.concatenate([np.diff(column) for column in columns]))
            elif isinstance(columns[0], np.ndarray):
                joined[name] = np.concatenate(columns)
            else:
                joined[name] = type(columns[0]).concat(columns)
        return SampleTable(**joined)

    def digest(self) -> str:
        """SHA-256 over every column in order but what training does not see of captions (how often each is listed, and
        its language, where that is the same for all). File names count without their folders, so that it is the same
        wherever the data lies."""
        state = hashlib.sha256()
        unseen = {"caption_times"} | ({"caption_languages"} if len(self.caption_languages.names) < 2 else set())
        for f in (f for f in fields(self) if f.name not in unseen):
            column = getattr(self, f.name)
            if f.name in ("images", "audio"):
                codes, paths = column.distinct()
                names = [members.name_of(text) for text in paths]
                column = Strings.pack(names[code] for code in codes.tolist())
            for part in [column] if isinstance(column, np.ndarray) else column.hashed():
                state.update(np.ascontiguousarray(part).tobytes())
        return state.hexdigest()

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns as arrays by name, from which `from_arrays` makes the table again."""
        found: dict[str, np.ndarray] = {}
        for f in fields(self):
            column = getattr(self, f.name)
            if isinstance(column, Names):
                found[f"{f.name}.codes"], column = column.codes, Strings.pack(column.names)
            if isinstance(column, Strings):
                found |= {f"{f.name}.buffer": column.buffer, f"{f.name}.offsets": column.offsets}
            else:
                found[f.name] = column
        return found

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "SampleTable":
        """The table of which these are `arrays`. Raises KeyError where one is missing."""
        columns: dict[str, Any] = {}
        for name in (f.name for f in fields(SampleTable)):
            columns[name] = arrays[name] if name in arrays else Strings(
                arrays[f"{name}.buffer"], arrays[f"{name}.offsets"])
            if f"{name}.codes" in arrays:
                columns[name] = Names(arrays[f"{name}.codes"], tuple(columns[name].tolist()))
        return SampleTable(**columns)

    def with_split(self, split: str) -> "SampleTable":
        """The same samples under another split's name."""
        return dataclasses.replace(self, splits=Names(np.zeros(len(self), np.int32), (split,)))


def _counted(texts: Sequence[str]) -> dict[str, int]:
    """The first of each wording, and how many have it."""
    if len(texts) == 1:
        return dict.fromkeys((text for text in texts if text.strip()), 1)
    first: dict[str, str] = {}
    times: dict[str, int] = {}
    for text in texts:
        if text.strip():
            one = first.setdefault(normalise_caption(text), text)
            times[one] = times.get(one, 0) + 1
    return times


def _languages(row: Sample, kept: Mapping[str, int]) -> Iterable[str]:
    """The language of each caption that is kept of a sample."""
    if not row.languages:
        return itertools.repeat("", len(kept))
    of = dict(zip(reversed(row.captions), reversed(row.languages), strict=True))  # of equal texts the first
    return (of[text] for text in kept)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
