"""From the fields of a sample, as shards and folders hold them, to its captions, labels and speaker.

A field has a name, which is the ending of a file or of a member of a tar (txt, json, cls), a key of a .json, or a
column of a parquet table, and a value. Which names mean what is in `columns`, as for lists.

    reading = Reading(captions=(), class_names=("cat", "dog"))
    reading.sample("shards", "0/7", Media(pictures=["/data/7.jpg"]), {"txt": "a dog", "cls": "1"})
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimodal import media
from trimodal.data.samples import Sample, normalise_caption
from trimodal.sets import columns, written_lists
from trimodal.sets.reading import MAX_CAPTION_CHARS

TEXTS = ("txt", "json", "cls")  # endings of what describes a picture or sound
MAX_TEXT_BYTES = 1_000_000  # of one of them; thousands of captions
AUTO = ()  # captions are of the first of these names that has any, else of the first that columns takes for text
NO_CAPTION = "samples without a caption"
MOST_NAMED = 30  # fields
FIRST = ("txt", "caption", "captions", "text", "texts")


@dataclass
class Notes:
    """What a reader may not expect of a set: how often, and where first."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)  # names: those asked for, as far as there are such, and some others

    def see(self, names: Iterable[str], asked: Sequence[str]) -> None:
        self.fields.update(name for name in names if name in asked or len(self.fields) < MOST_NAMED)

    def add(self, what: str, where: str, times: int = 1) -> None:
        count, first = self.found.get(what, (0, where))
        self.found[what] = count + times, first

    def lines(self, captioned: bool = True) -> list[str]:
        """A line for each; without captions at all (not `captioned`) it is no news that samples have none."""
        return [f"{what}: {count:,} (the first: {first:.200})" for what, (count, first) in self.found.items()
                if captioned or what != NO_CAPTION]


@dataclass
class Media:
    """Paths of what a sample has, best first."""

    pictures: Sequence[str] = ()
    sounds: Sequence[str] = ()
    videos: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.pictures or self.sounds or self.videos)


@dataclass(frozen=True)
class Reading:
    """How the fields of a set are understood, and what was noticed."""

    captions: tuple[str, ...] = AUTO  # names of the fields that hold captions
    class_names: tuple[str, ...] = ()  # by number
    notes: Notes = field(default_factory=Notes)

    def sample(self, source: str, key: str, found: Media, fields: Mapping[str, Any], has_sound: bool | None = None,
               ) -> Sample | None:
        """The sample with these media, of which a video is a picture and, if it has any, a sound; None without media.
        `has_sound`: whether the video has, where that is known."""
        fields = flat(fields)
        if self.captions != AUTO:
            self.notes.see((name for name in fields if f".{name}" not in media.SUFFIXES), self.captions)
        if not found:
            self.notes.add("samples without a picture or sound are left out", key)
            return None
        if len(found.pictures) > 1 or len(found.sounds) > 1:
            self.notes.add("samples have further pictures or sounds, which are left out", key)
        image, audio = ((*paths, "")[0] for paths in (found.pictures, found.sounds))
        if found.videos:
            video = found.videos[0]
            image = image or video
            if not audio and (media.has_sound(video) if has_sound is None else has_sound):
                audio = video
        captions = tuple(self._captions(key, fields))
        if not captions:
            self.notes.add(NO_CAPTION, key)
        return Sample(key=key, source=source, split="", image=image, audio=audio, captions=captions,
                      labels=tuple(dict.fromkeys(self._labels(key, fields))), speaker=_speaker(fields))

    def _captions(self, key: str, fields: Mapping[str, Any]) -> Iterator[str]:
        for text in (text for name in self._names_of_captions(fields) for text in self._texts(key, fields.get(name))):
            if len(text) > MAX_CAPTION_CHARS:
                self.notes.add(f"captions of over {MAX_CAPTION_CHARS:,} characters are left out", key)
            elif normalise_caption(text):
                yield text.strip()

    def _names_of_captions(self, fields: Mapping[str, Any]) -> Sequence[str]:
        if self.captions != AUTO:
            return self.captions
        known = [name for name in fields if name in FIRST or columns.meaning_of(name) == "text"]
        known.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))  # stable
        taken = next((name for name in known if _is_text(fields[name])), "")
        stem = columns.stem_of(taken)  # of caption_1, caption_2 and so on
        return [name for name in known if name == taken or (stem and columns.stem_of(name) == stem)]

    def _texts(self, key: str, value: Any) -> Sequence[str]:
        if value is None or value == "":
            return ()
        try:
            return written_lists.texts(value)
        except ValueError as error:
            self.notes.add(f"samples have captions that cannot be read ({error})", key)
            return ()

    def _labels(self, key: str, fields: Mapping[str, Any]) -> Iterator[str]:
        for name, value in fields.items():
            if name != "cls" and columns.meaning_of(name) != "labels":
                continue
            for one in value if isinstance(value, list) else [value]:
                number = _number(one, of_text=name == "cls")
                if number is not None and 0 <= number < len(self.class_names):
                    yield self.class_names[number]
                elif number is not None:
                    self.notes.add("samples have numbers for labels; write their names, one a line from number 0 on, "
                                   "into classnames.txt beside them", key)
                    yield str(number)
                elif isinstance(one, str) and one.strip():
                    yield one.strip()


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, and the keys of a .json beside them where no field has their name."""
    inner = fields.get("json")
    return {**{name: value for name, value in inner.items() if name not in fields}, **fields} if isinstance(
        inner, dict) else dict(fields)


def class_names(folder: str) -> tuple[str, ...]:
    """The lines of classnames.txt in a folder, as benchmarks of zero-shot classification keep them; () without."""
    path = os.path.join(folder, "classnames.txt")
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_TEXT_BYTES:
        return ()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return tuple(line.strip() for line in file.read().splitlines())


def field_of(ending: str, content: bytes, notes: Notes, where: str) -> Any:
    """The value of a .txt, .json or .cls; None where it cannot be read, which is noted."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-8-sig", "replace")
        notes.add("texts are not UTF-8: what cannot be read of them is replaced", where)
    if ending != "json":
        return text.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        notes.add(".json that cannot be read are left out", where)
        return None


def media_of(fields: Mapping[str, Any]) -> Media:
    """The paths among the values of `fields`, whose names are the endings of their files."""
    return Media(*([fields[end[1:]] for end in ends if end[1:] in fields] for ends in (
        media.PICTURE_SUFFIXES, media.SOUND_SUFFIXES, media.VIDEO_SUFFIXES)))


def _is_text(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _number(value: Any, of_text: bool) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if of_text and isinstance(value, str) and value.strip().isdecimal() else None


def _speaker(fields: Mapping[str, Any]) -> str:
    found = next((value for name, value in fields.items() if columns.meaning_of(name) == "speaker"), "")
    return str(found).strip() if isinstance(found, str | int) and not isinstance(found, bool) else ""
