"""Copies of a data set that the user has already: linked into the layout that the readers expect, never changed.

`--local FOLDER` names the copy. Archives in it are used by download_datasets as if they had just arrived.
"""

import csv
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import annotations
from config import UserError

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
_SPEAKER = re.compile(r"id(\d{5})")
_TEST = re.compile(r"(^|[_-])test([_-]|$)")
_DEEPEST = 4  # folders between the given one and those of the speakers


def link_voxceleb(local: Path, folder: Path, earlier: Collection[Path] = ()) -> dict[str, int]:
    """Link each speaker's folder below `local` into `folder`/voxceleb1/wav or voxceleb2/{dev,test}/{aac,mp4}. Links
    into the `earlier` folders are replaced.

    Returns the number of speakers by place. Generation and part follow from the number and what the folders are called.
    """
    places: dict[str, int] = {}
    for speakers in _speaker_folders(local, _DEEPEST):
        for speaker in sorted(speakers.iterdir()):
            place = _voxceleb_place(speaker, local) if _SPEAKER.fullmatch(speaker.name) else None
            if place:
                _link(speaker, folder / place / speaker.name, earlier)
                places[place] = places.get(place, 0) + 1
    return places


def _speaker_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    if any(_SPEAKER.fullmatch(entry.name) for entry in below):
        yield folder
    elif depth:
        for entry in below:
            yield from _speaker_folders(entry, depth - 1)


def _is_hidden(name: str) -> bool:
    """What a download that was stopped left lies in such folders, where the set's own folder is named."""
    return name.startswith(".")


def _voxceleb_place(speaker: Path, local: Path) -> str | None:
    suffix = next((path.suffix for path in speaker.glob("*/*") if path.suffix in (".wav", ".m4a", ".mp4")), "")
    if int(speaker.name[2:]) > 10_000:  # VoxCeleb 1 is id10001 to id11251, VoxCeleb 2 ends at id09272
        return "voxceleb1/wav" if suffix == ".wav" else None
    kind = {".m4a": "aac", ".mp4": "mp4"}.get(suffix)
    part = "test" if any(_TEST.search(step) for step in speaker.relative_to(local.parent).parts) else "dev"
    return f"voxceleb2/{part}/{kind}" if kind else None


def link_audiocaps(local: Path, folder: Path, lists: Path, earlier: Collection[Path] = ()) -> dict[str, int]:
    """Link the sounds below `local` to `folder`/SPLIT/YOUTUBEID_START.SUFFIX, by the lists of all versions that the
    folder `lists` holds. Links into the `earlier` folders are replaced.

    Returns the number of clips by split. Known names: YOUTUBEID, YYOUTUBEID, either with _START (seconds or
    milliseconds) and _END, or the clip's id in the lists.
    """
    known = _audiocaps_names(lists)
    found: dict[str, set[str]] = {split: set() for split in annotations.SPLITS}
    for root, below, names in os.walk(local, followlinks=True):
        below[:] = sorted(name for name in below if not _is_hidden(name))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            for split, clip in known.get(stem, ()) if suffix.lower() in SOUND_SUFFIXES else ():
                if clip not in found[split]:
                    found[split].add(clip)
                    _link(Path(root, name), folder / split / f"{clip}{suffix.lower()}", earlier)
    return {split: len(clips) for split, clips in found.items()}


def _audiocaps_names(lists: Path) -> dict[str, list[tuple[str, str]]]:
    """Name of a sound without suffix -> (split, YOUTUBEID_START) of its clip, which versions may put into two splits.
    Ids have 11 characters: no two forms are alike. What a name means in the first version counts; a number that means
    another clip in each is no name."""
    known: dict[str, list[tuple[str, str]]] = {}
    unclear: set[str] = set()
    paths = [(path, split) for split in annotations.SPLITS for path in annotations.clip_lists(lists, split)]
    for path, split in sorted(paths, key=lambda pair: pair[0].parent):
        for name, clip in _named_clips(path):
            places = known.setdefault(name, [])
            if all(other == clip and where != split for where, other in places):
                places.append((split, clip))
            elif name.isdigit() and places[0][1] != clip:
                unclear.add(name)
    return {name: places for name, places in known.items() if name not in unclear}


def _named_clips(path: Path) -> Iterator[tuple[str, str]]:
    """(name of a sound without suffix, YOUTUBEID_START) of each row of a list."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                video, start_s = row["youtube_id"], int(row["start_time"])
                for name in _names_of_clip(video, start_s, row["audiocap_id"]):
                    yield name, f"{video}_{start_s}"
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({error!r}); rename it, so that the published list is fetched") from None


def _names_of_clip(video: str, start_s: int, number: str) -> list[str]:
    spans = ("", f"_{start_s}", f"_{start_s}_{start_s + 10}", f"_{start_s * 1000}_{start_s * 1000 + 10_000}")
    return [*(name + span for name in (video, f"Y{video}") for span in spans), number]


def _link(source: Path, place: Path, earlier: Collection[Path]) -> None:
    """Make `place` a link to `source`. A link into an `earlier` folder, which such a call made, is replaced; anything
    else that is there is the user's and stays."""
    source = source.resolve()
    if place.is_symlink():
        target = Path(os.path.normpath(place.parent / place.readlink()))
        if place.resolve() == source or not any(target.is_relative_to(folder) for folder in earlier):
            return
        place.unlink()
    elif place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(source, target_is_directory=source.is_dir())
