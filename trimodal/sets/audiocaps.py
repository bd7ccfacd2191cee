"""AudioCaps: clips of 10 s from YouTube with one caption, or five in val and test; many of them are gone for ever."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample
from trimodal.errors import UserError
from trimodal.media import WITH_SOUND
from trimodal.sets import inventory
from trimodal.sets.base import GB, HF_HOST, Copies, Count, DataSet, File, FileList, Item, Rows, Source
from trimodal.sets.reading import existing, report_absent, rows, worded_captions

VERSIONS = ("dataset", "dataset2.0")  # folders of the lists of version 1 and 2
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
SOUNDS_BYTES = 41 * GB  # all 473 shards; the sounds are FLAC, so they unpack to about as much
OTHER_NAMES = {"valid": "val", "validation": "val"} | {split: split for split in SPLITS}  # of a split's folder
CLIPS = {"train": 49_838, "val": 495, "test": 975}  # that the captions of version 1 name


# ---- where it comes from -----------------------------------------------------------------------------------------

_RAW = "https://raw.githubusercontent.com/cdjkim/audiocaps/d004db3ea1b01cf4fd0347dd8d27db90cadc8809"
_HF = HF_HOST + "/datasets/OpenSound/AudioCaps/resolve/b29b3243d6ce49c2cd0d48d4b5f0701ae7969ded/data"


def _list(name: str, size: int, sha256: str, md5: str, lines: int) -> Item:
    file = File(name=name, urls=(("official", f"{_RAW}/{name}"),), size=size, sha256=sha256, md5=md5, lines=lines)
    return Item(name=name, kind="plain", into=name, files=(file,), subset="v1" if name.startswith("dataset/") else "v2",
                unpacked=size)


_SOUND_SUFFIXES = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}  # by the first bytes


def _sound_of_row(row: dict[str, Any]) -> tuple[str, bytes]:
    """(YOUTUBEID_START.SUFFIX, bytes) of the sound; the mirror has each clip of val and test in five rows."""
    data = row["audio"]["bytes"]
    name = f"{row['youtube_id']}_{int(float(row['start_time']))}"
    if data[:4] not in _SOUND_SUFFIXES:
        raise ValueError(f"a sound of an unknown format, {name!r}")
    return f"{name}.{_SOUND_SUFFIXES[data[:4]]}", data


ROWS = Rows(columns=("youtube_id", "start_time", "audio.bytes"), file_of=_sound_of_row)


def _shards(ours: str, theirs: str, number: int) -> Iterator[Item]:
    """Parquet shards with the bytes of each sound, unpacked to OURS/YOUTUBEID_START.flac; the server names digests."""
    for index in range(number):
        name = f"{theirs}-{index:05d}-of-{number:05d}.parquet"
        yield Item(name=name, kind="parquet", into=ours, subset="sounds", splits=(ours,), rows=ROWS,
                   unpacked=SOUNDS_BYTES // 473,
                   files=(File(name=name, urls=(("hf", f"{_HF}/{name}"),)),))


ITEMS = (
    _list("dataset/train.csv", 3_576_723, "c0c5223db682b3bf724ce7e7ce58d5b36929f74572e8526a7211f92d2eef7c8e",
          "be909c34c4aa154f53acab960a1e998b", 49_838),
    _list("dataset/val.csv", 171_918, "dab1c96641d5f3053ddb99dca3949450da9a75737bda53e11cc0aa8b102be0c3",
          "29adf3a58afc406fa3a9bd785e20db51", 2_475),
    _list("dataset/test.csv", 402_246, "b91c4b7ded2f4f6e7db5b9c4983dc1e1dca3d556f505b61e3fd65cac7e1c638a",
          "9775aec3f52037d12cacda132dd5316d", 4_875),
    _list("dataset2.0/train.csv", 0, "", "", 91_256),
    _list("dataset2.0/val.csv", 169_508, "dfdd0f83c70fb818fbb86dcba42754abfb97f7774d811fff91a1c89d84d868c5",
          "b319beea34769896c80399b14befdf8a", 2_475),
    _list("dataset2.0/test.csv", 397_498, "365c8a8a71c9070a8d5dba5dd44f3a781f906632a49cb82b38bebaaa8f3c5ccb",
          "11f06bd97a512e62d7907d724c76e7c3", 4_875),
    *_shards("test", "test", 41),
    *_shards("val", "validation", 20),
    *_shards("train", "train", 412),
)


# ---- its lists ---------------------------------------------------------------------------------------------------


def names_of_clip(video: str, start: str) -> list[str]:
    """Names without suffix that the clip from second `start` of a video has in people's folders: YOUTUBEID_START first,
    YYOUTUBEID, YOUTUBEID; either with START and END in seconds, also with thousandths or of six digits, or in
    milliseconds."""
    begin_s = int(start) if start.isdigit() else 0
    end_s = begin_s + 10
    spans = (f"_{start}", f"_{begin_s}_{end_s}", f"_{begin_s * 1000}_{end_s * 1000}", f"_{begin_s}.000_{end_s}.000",
             f"_{begin_s:06d}", f"_{begin_s:06d}_{end_s:06d}")
    return [f"{video}_{start}", f"Y{video}", video, *(f"{one}{span}" for one in (video, f"Y{video}") for span in spans)]


def clips_in(path: Path) -> Iterator[str]:
    """YOUTUBEID_START of each clip that the CSV file at `path` names, once."""
    yield from dict.fromkeys(f"{row['youtube_id']}_{row['start_time']}" for row in rows(path, COLUMNS))


def clips(folder: Path, split: str) -> Iterator[str]:
    """YOUTUBEID_START of each clip of a split, once: those of version 1, then those that only version 2 names.

    Where no version's list is there, opening that of version 1 raises FileNotFoundError.
    """
    paths = [path for version in VERSIONS if (path := folder / version / f"{split}.csv").is_file()]
    yield from dict.fromkeys(clip for path in paths or [folder / VERSIONS[0] / f"{split}.csv"]
                             for clip in clips_in(path))


def _clips_not_in_version_1(path: Path) -> Iterator[str]:
    """YOUTUBEID_START of each clip that the CSV file at `path` names and version 1's of the same split does not."""
    version_1 = path.parent.parent / VERSIONS[0] / path.name
    known = set(clips_in(version_1)) if version_1.is_file() else set()
    yield from (clip for clip in clips_in(path) if clip not in known)


def _lists(splits: Collection[str]) -> list[FileList]:
    return [FileList(place=split, path=f"{version}/{split}.csv", names=names)
            for version, names in zip(VERSIONS, (clips_in, _clips_not_in_version_1), strict=True)
            for split in SPLITS if split in splits]


# ---- copies of other tools ---------------------------------------------------------------------------------------


def _find_copies(local: Path, lists: Sequence[tuple[str, Path]]) -> Copies:
    """The sounds below `local` that the lists (by split, earlier versions first) name, to SPLIT/YOUTUBEID_START.SUFFIX;
    the number of clips by split."""
    known = _clips_by_name(lists)
    links: dict[tuple[str, str], tuple[Path, str]] = {}
    for root, names in inventory.walk(local):
        for name in names:
            stem, suffix = os.path.splitext(name)
            for split, clip in known.get(stem, ()) if suffix.lower() in WITH_SOUND else ():
                links.setdefault((split, clip), (Path(root, name), f"{split}/{clip}{suffix.lower()}"))
    found = Counter(split for split, _ in links)
    return Copies(links=tuple(links.values()), numbers={split: found[split] for split in SPLITS} if links else {})


def _clips_by_name(lists: Iterable[tuple[str, Path]]) -> Mapping[str, list[tuple[str, str]]]:
    """Name of a sound without suffix -> (split, YOUTUBEID_START) of its clip, which versions may put into two splits.

    Ids have 11 characters: no two forms are alike. What a name means in the first version counts; a number that means
    another clip in each is no name.
    """
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
        for row in rows(path, COLUMNS):
            video, start_s = row["youtube_id"], int(row["start_time"])
            for name in (*names_of_clip(video, str(start_s)), row["audiocap_id"]):
                yield name, f"{video}_{start_s}"
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error!r}); rename it, so that the published list is fetched") from None


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """One sample a clip, with all its captions; no video of a later split. A clip is named as `names_of_clip` says, or
    AUDIOCAPID, with any suffix of WITH_SOUND, anywhere below `root` but in another split's folder."""
    folder = root / VERSIONS[config.data.audiocaps_version - 1]
    first = min(map(SPLITS.index, splits))
    listed = {split: list(rows(existing(folder / f"{split}.csv", config), COLUMNS)) for split in SPLITS[first:]}
    for split in splits:
        later = {row["youtube_id"] for other in SPLITS[SPLITS.index(split) + 1:] for row in listed[other]}
        captioned: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in listed[split]:
            if row["youtube_id"] not in later:
                captioned.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
        sounds, absent = _sounds_by_name(root, split), []
        for (video, start), its in captioned.items():
            names = (*names_of_clip(video, start), *(row["audiocap_id"] for row in its))
            if path := next((sounds[name] for name in names if name in sounds), ""):
                yield Sample(key=f"{video}_{start}", source="audiocaps", split=split, audio=path,
                             captions=worded_captions((row["caption"] for row in its), f"audiocaps {video}"))
            else:
                absent.append(f"{video}_{start}")
        report_absent(root, split, len(captioned) - len(absent), absent, config, never_whole=True)


def _sounds_by_name(root: Path, split: str) -> dict[str, str]:
    """Path of each sound below `root` by its name without suffix."""
    found: dict[str, str] = {}
    for folder, names in inventory.walk(root):
        steps = Path(folder).relative_to(root).parts
        if any(OTHER_NAMES.get(step.lower(), split) != split for step in steps):
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            if suffix.lower() in WITH_SOUND and (stem not in found or _preference(path) < _preference(found[stem])):
                found[stem] = path
    return found


def _preference(path: str) -> int:
    return WITH_SOUND.index(os.path.splitext(path)[1].lower())


def _listed(root: Path, split: str, config: Config) -> int:
    return sum(1 for _ in clips_in(existing(root / VERSIONS[config.data.audiocaps_version - 1] / f"{split}.csv",
                                            config)))


_LICENCE = ("captions for academic use (MIT in the upstream repository); the mirrored sounds CC BY-NC 4.0, their "
            "copyright stays with the uploaders")
SET = DataSet(
    name="audiocaps", order=3, licence=_LICENCE, read=_read, listed=_listed,
    splits="train, val, test, as far as the clips still exist",
    source=Source(
        name="audiocaps", title="AudioCaps", page="https://github.com/cdjkim/audiocaps", licence=_LICENCE, items=ITEMS,
        defaults=("v1", "v2", "sounds"),
        partly=tuple(Count(folder=split, suffix="", number=number) for split, number in CLIPS.items()),
        note="the sounds are those that still exist: about 92 % of train and 883 of 975 test clips in the pinned "
             "mirror; the complete set is granted by hand at https://forms.gle/2wF54Y1Ft2LtPdhW8 (then --local FOLDER)",
        required=tuple(f"{VERSIONS[0]}/{split}.csv" for split in SPLITS),
        lists=_lists, find_copies=_find_copies, clips=clips))
