"""Copies of a data set that the user has already: found, linked into the layout that the readers expect, never changed.

`--local FOLDER` names the copy. Archives in it are used by download_datasets as if they had just arrived.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimodal.errors import UserError
from trimodal.media import WITH_SOUND
from trimodal.sets import annotations, inventory
from trimodal.sets.sources import Count, Item, Source

MOSTLY_PCT = 75  # of a split's published clips, where nobody said that they are all: those of the mirror are 91 to 94
LIKELY_PCT = 95  # of a folder's published files: with fewer, training would refuse it by default
_SPEAKER = re.compile(r"id(\d{5})")
_TEST = re.compile(r"(^|[_-])test([_-]|$)")
_DEEPEST = 4  # folders between the given one and those of speakers, pictures, recordings or lists
_VOX_KINDS = {".wav": "wav", ".m4a": "aac", ".mp4": "mp4"}
_WITH_LISTS = {"csv_files_v1": "dataset", "csv_files_v2": "dataset2.0"}  # aac-datasets' folders of AudioCaps' lists


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What a copy has. `links`: (file or folder of the user, its place below the set's folder); `numbers`: how many
    files, clips or speakers by place; `left_out`: what is not linked, and why, a sentence each."""

    links: tuple[tuple[Path, str], ...] = ()
    numbers: Mapping[str, int]
    left_out: tuple[str, ...] = ()


def find(source: Source, items: Iterable[Item], local: Path, lists: Sequence[tuple[str, Path]] = ()) -> Copies:
    """What of the set lies below `local`; nothing is changed. `lists`: (split, path) of AudioCaps', in the order of
    their versions."""
    local = Path(os.path.abspath(local))  # links that the user made inside are kept as they are
    if source.name == "voxceleb":
        return find_voxceleb(local)
    if source.name == "audiocaps":
        return find_audiocaps(local, lists)
    return Copies(numbers={}) if source.one_of else find_folders(items, local)


def link(copies: Copies, folder: Path, earlier: Collection[Path] = ()) -> list[str]:
    """Link what was found into the set's `folder`. A link into an `earlier` folder, which such a call made, is
    replaced; what else is in the way is the user's and stays: the places of these are returned."""
    return [place for source, place in copies.links if not _link(source, folder / place, earlier)]


def _link(source: Path, place: Path, earlier: Collection[Path]) -> bool:
    """Make `place` a link to `source`; whether it leads there now."""
    leads_there = place.exists() and place.samefile(source)
    if place.is_symlink() and not leads_there:
        target = Path(os.path.normpath(place.parent / place.readlink()))
        if not any(target.is_relative_to(folder) for folder in earlier):
            return False
        place.unlink()
    elif os.path.lexists(place):
        return leads_there
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(source, target_is_directory=source.is_dir())
    return True


# --- VoxCeleb --------------------------------------------------------------------------------------------------------


def find_voxceleb(local: Path) -> Copies:
    """Each speaker's folder below `local`, to voxceleb1/wav or voxceleb2/{dev,test}/{aac,wav,mp4}; the number of
    speakers by place. Generation and part follow from the number and what the folders are called."""
    links: dict[str, Path] = {}
    without: Counter[str] = Counter()
    examples: dict[str, Path] = {}
    unread: list[str] = []
    for speakers in _speaker_folders(local, _DEEPEST, unread):
        for speaker in sorted(speakers.iterdir()):
            if _SPEAKER.fullmatch(speaker.name):
                place, why = _voxceleb_place(speaker, local)
                if place:
                    links.setdefault(f"{place}/{speaker.name}", speaker)
                else:
                    without[why] += 1
                    examples.setdefault(why, speaker)
    numbers = sorted(Counter(place.rpartition("/")[0] for place in links).items())
    return Copies(links=tuple((source, place) for place, source in links.items()), numbers=dict(numbers),
                  left_out=(*(f"{number:,} speakers, as {examples[why]}: {why}" for why, number in without.items()),
                            *unread))


def _speaker_folders(folder: Path, depth: int, unread: list[str]) -> Iterator[Path]:
    below = _folders_in(folder, None if depth == _DEEPEST else unread)
    if any(_SPEAKER.fullmatch(entry.name) for entry in below):
        yield folder
    elif depth:
        for entry in below:
            yield from _speaker_folders(entry, depth - 1, unread)


def _folders_in(folder: Path, unread: list[str] | None = None) -> list[Path]:
    """The folders in a folder; where it cannot be read, none, and a sentence in `unread`, or an error without that."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not inventory.is_hidden(entry.name) and entry.is_dir())
    except OSError as error:
        sentence = f"{folder}: cannot be read ({error.strerror})"
        if unread is None:
            raise UserError(sentence) from None
        unread.append(sentence)
        return []
    return [folder / name for name in names]


def _voxceleb_place(speaker: Path, local: Path) -> tuple[str, str]:
    """(place of the speaker's folder, ""), or ("", why it is left out), by the first video that has any sound."""
    is_first = int(speaker.name[2:]) > 10_000  # VoxCeleb 1 is id10001 to id11251, VoxCeleb 2 ends at id09272
    suffixes = next((found for video in _folders_in(speaker) if (found := _suffixes(video))), Counter[str]())
    if is_first:
        return ("voxceleb1/wav", "") if suffixes[".wav"] else ("", "of VoxCeleb 1 only SPEAKER/VIDEO/FILE.wav is read")
    if not suffixes:
        return "", "no SPEAKER/VIDEO/FILE that ends in .wav, .m4a or .mp4"
    kind = max(_VOX_KINDS, key=lambda suffix: suffixes[suffix])  # of equally many the first: wav
    part = "test" if any(_TEST.search(step) for step in speaker.relative_to(local.parent).parts) else "dev"
    return f"voxceleb2/{part}/{_VOX_KINDS[kind]}", ""


def _suffixes(video: Path) -> Counter[str]:
    names = (name for name in os.listdir(video) if not inventory.is_hidden(name))
    return Counter(suffix for name in names if (suffix := os.path.splitext(name)[1]) in _VOX_KINDS)


# --- AudioCaps -------------------------------------------------------------------------------------------------------


def find_audiocaps(local: Path, lists: Sequence[tuple[str, Path]]) -> Copies:
    """The sounds below `local` that the `lists` name, to SPLIT/YOUTUBEID_START.SUFFIX; the number of clips by split.

    Known names: see `annotations.names_of_clip`."""
    known = _audiocaps_names(lists)
    links: list[tuple[Path, str]] = []
    found: dict[str, set[str]] = {split: set() for split in annotations.SPLITS}
    for root, names in inventory.walk(local):
        for name in names:
            stem, suffix = os.path.splitext(name)
            for split, clip in known.get(stem, ()) if suffix.lower() in WITH_SOUND else ():
                if clip not in found[split]:
                    found[split].add(clip)
                    links.append((Path(root, name), f"{split}/{clip}{suffix.lower()}"))
    return Copies(links=tuple(links), numbers={split: len(clips) for split, clips in found.items()} if links else {})


def has_sounds(folder: Path) -> bool:
    """Whether a sound or video lies in the folder, or in one below it."""
    return any(name.lower().endswith(WITH_SOUND) for _, names in inventory.walk(folder) for name in names)


def mostly(copies: Copies, published: Iterable[Count], local: Path | None) -> Copies:
    """Of clips that nobody named: the splits of which MOSTLY_PCT are there. Of others it tells how to take them."""
    numbers = {count.folder: copies.numbers.get(count.folder, 0) for count in published}
    wanted = {count.folder: count.number for count in published}
    few = [split for split, number in numbers.items() if 100 * number < MOSTLY_PCT * wanted[split]]
    left_out = [f"{numbers[split]:,} of the {wanted[split]:,} clips of {split}: fewer than {MOSTLY_PCT} %, so the "
                f"published sounds are fetched; to use these alone: --local {local}"
                for split in few if numbers[split]]
    return Copies(links=tuple(link for link in copies.links if link[1].partition("/")[0] not in few),
                  numbers={split: number for split, number in numbers.items() if split not in few},
                  left_out=(*copies.left_out, *left_out))


def _audiocaps_names(lists: Sequence[tuple[str, Path]]) -> dict[str, list[tuple[str, str]]]:
    """Name of a sound without suffix -> (split, YOUTUBEID_START) of its clip, which versions may put into two splits.
    Ids have 11 characters: no two forms are alike. What a name means in the first version counts; a number that means
    another clip in each is no name."""
    known: dict[str, list[tuple[str, str]]] = {}
    unclear: set[str] = set()
    for split, path in lists:
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
                for name in (*annotations.names_of_clip(video, str(start_s)), row["audiocap_id"]):
                    yield name, f"{video}_{start_s}"
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({error!r}); rename it, so that the published list is fetched") from None


# --- Folders of pictures and of recordings ---------------------------------------------------------------------------


def find_folders(items: Iterable[Item], local: Path) -> Copies:
    """The unpacked folders of these archives below `local`, whatever case their names are in; of folders that hold
    lists the single files, so that more lists may come beside them. The number of files by place."""
    left_out: list[str] = []
    below = [*_below(local, _DEEPEST, left_out)]
    links: list[tuple[Path, str]] = []
    numbers: dict[str, int] = {}
    for item in items:
        if item.needed:
            files = _lists(item, below)
            links += files
            numbers |= {place: 1 for _, place in files}
        for count in item.counts if item.kind != "plain" and not item.needed else ():
            found, number, why = _fullest(count, item, below)
            if found and not why:
                links.append((found, count.folder))
                numbers[count.folder] = number
            elif found:
                left_out.append(f"{found}: {why}")
    return Copies(links=tuple(links), numbers=numbers, left_out=tuple(left_out))


def _below(folder: Path, depth: int, unread: list[str]) -> Iterator[Path]:
    """The folder and those below it that can be read, folders of speakers left out."""
    problems = len(unread)
    entries = _folders_in(folder, None if depth == _DEEPEST else unread)
    if len(unread) == problems:
        yield folder
    for entry in entries if depth else ():
        if not _SPEAKER.fullmatch(entry.name):
            yield from _below(entry, depth - 1, unread)


def _lists(item: Item, below: Iterable[Path]) -> list[tuple[Path, str]]:
    """All that the first folder has of the item which has what is needed of it."""
    for folder in below:
        if all(inventory.size_of(folder / Path(place).name) for place in item.needed):
            names = {Path(place).name for place in item.needed} | {
                name for name in os.listdir(folder) if not inventory.is_hidden(name)
                for count in item.counts if name.endswith(count.suffix)}
            if 2 * sum(inventory.size_of(folder / name) for name in names) >= item.unpacked:
                parent = Path(item.needed[0]).parent
                return [(folder / name, (parent / name).as_posix()) for name in sorted(names)]
    return []


def _fullest(count: Count, item: Item, below: Iterable[Path]) -> tuple[Path | None, int, str]:
    """(folder that holds most of these files, how many, why it is not linked or "")."""
    named = Path(count.folder).name.lower()
    best: tuple[int, int, Path | None] = (0, 0, None)
    for folder in below:
        if folder.name.lower() == named:
            sizes = [size for name in os.listdir(folder) if name.endswith(count.suffix) and not
                     inventory.is_hidden(name) and (size := inventory.size_of(folder / name))]
            best = max(best, (len(sizes), sum(sizes), folder), key=lambda found: found[0])
    number, size, path = best
    if 100 * number < LIKELY_PCT * count.number:
        return path, number, f"holds {number:,} of the {count.number:,} {count.suffix} files: not linked"
    if 2 * size < item.unpacked:
        return path, number, (f"its {count.suffix} files have {size / 1e9:,.2f} GB in all, not about "
                              f"{item.unpacked / 1e9:,.2f} GB: another edition, not linked")
    return path, number, ""


# --- Lists and archives ----------------------------------------------------------------------------------------------


def files_named(local: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """Name in lower case -> the files below `local` that have it, whatever the case; the least deep first."""
    wanted = {name.lower() for name in names}
    found: dict[str, list[Path]] = {}
    for folder in sorted(_below(local, _DEEPEST, []), key=lambda folder: len(folder.parts)):
        for name in sorted(os.listdir(folder)):
            if name.lower() in wanted and (folder / name).is_file():
                found.setdefault(name.lower(), []).append(folder / name)
    return found


def holds_lists_of(path: Path, version: str) -> bool:
    """Whether the folder of a list is named as the folder `version`, by us or by aac-datasets."""
    return _WITH_LISTS.get(path.parent.name.lower(), path.parent.name.lower()) == version
