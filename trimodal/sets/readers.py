"""One reader for each official layout on disk: it turns files and lists into `Sample`s, and decodes nothing.

    for sample in read_split("clotho", "train", config): ...

`READERS` names them all, with their splits and licences. No recording or picture is on two sides; where a set brings no
validation split, one is cut from train in a way that is the same on every machine. Files that a list names but that
are not there are left out, and their number is logged.

Adding a set: write `_read_NAME(root, split, config)`, which yields samples, and add a row to `READERS`.
"""

import csv
import difflib
import itertools
import json
import logging
import os
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample, normalise_caption, stable_hash
from trimodal.errors import UserError
from trimodal.media import WITH_SOUND
from trimodal.sets import inventory, synthetic, voxceleb
from trimodal.sets.annotations import AUDIOCAPS_VERSIONS, VOX1_TEST_SPEAKERS, names_of_clip
from trimodal.sets.manifest import MAX_CAPTION_CHARS, read_manifest, worded_captions

SPLIT_SEED = 2017  # of the splits that we draw ourselves; never the training seed, so that everybody has the same

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """`read(root, split, config)` yields the samples of one split of the set that lies in the folder `root`."""

    read: Callable[[Path, str, Config], Iterable[Sample]]
    splits: str  # what train, val and test are, in a line
    licence: str
    downloadable: bool = True
    listed: Callable[[Path, str, Config], int] | None = None  # samples of a split when whole; of sets that never are


def read_split(name: str, split: str, config: Config) -> Iterator[Sample]:
    """The samples of one split ("train", "val", "test") of the set `name`; empty where a set has no such split.

    Raises:
        UserError: unknown set, or missing data, with the command that gets it. Raised by the call itself.
    """
    if name not in READERS:
        close = difflib.get_close_matches(name, READERS, n=1)
        raise UserError(f"data.datasets: {name!r} is unknown; "
                        + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(READERS)}"))
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; known: {', '.join(SPLITS)}")
    root = Path(config.paths.data_root).absolute() / name
    if READERS[name].downloadable and not root.is_dir():
        raise _missing(root, config)
    samples = iter(READERS[name].read(root, split, config))
    return itertools.chain(list(itertools.islice(samples, 1)), samples)  # the first one shows whether there are any


def listed(config: Config) -> dict[str, dict[str, int]]:
    """How many samples the lists name, by set and split, of those sets whose files are in part gone for ever."""
    root = Path(config.paths.data_root).absolute()
    return {name: {split: count(root / name, split, config) for split in SPLITS}
            for name in config.data.datasets if (count := READERS[name].listed)}


def download_command(name: str, config: Config) -> str:
    return f"python download_datasets.py --datasets {name} --data-root {shlex.quote(config.paths.data_root)}"


def draw_splits(units: Iterable[str], test: int, val: int) -> dict[str, str]:
    """Unit -> split, for `test` and `val` units drawn from the distinct `units`, the rest train.

    A shuffle of the sorted units by NumPy's `RandomState`, whose stream is frozen: the same on every machine, for ever.
    """
    ordered = sorted(set(units))
    shuffled = [ordered[i] for i in np.random.RandomState(SPLIT_SEED).permutation(len(ordered))]
    sides = ["test"] * test + ["val"] * val
    return dict(itertools.zip_longest(shuffled, sides[: len(shuffled)], fillvalue="train"))


def _missing(path: Path, config: Config) -> UserError:
    name = path.relative_to(Path(config.paths.data_root).absolute()).parts[0]
    return UserError(f"{path}: not there; get it with: {download_command(name, config)}")


def _limit_pct(root: Path, config: Config) -> float:
    """How many files may be absent from a list: any number where the user fetched a part of the set on purpose."""
    return float("inf") if inventory.read_marker(root).get("limited") else config.data.max_bad_pct


def _report(name: str, split: str, found: int, missing: Sequence[str], config: Config, *, limit_pct: float) -> None:
    """Log how many of the files that a list names are not there, and the first; raise above `limit_pct`, or where none
    is."""
    if not missing:
        return
    total = found + len(missing)
    count = (f"{name} {split}: {len(missing)} of the {total} files in its list are not there (the first: "
             f"{', '.join(missing[:3])})")
    if (not found and limit_pct <= 100) or 100 * len(missing) > limit_pct * total:
        raise UserError(f"{count}; get them with: {download_command(name, config)}"
                        + (f" (or raise data.max_bad_pct, {limit_pct:g})" if found else ""))
    _log.warning("%s and are left out", count)


def _table(path: Path, columns: tuple[str, ...], config: Config, *, encoding: str = "utf-8-sig",
           delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Rows of a CSV file as dicts. Blanks around the names of columns are dropped, never those around values."""
    if not path.is_file():
        raise _missing(path, config)
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = [column.strip() for column in next(reader, [])]
            if absent := [column for column in columns if column not in header]:
                raise UserError(f"{path}: no column {absent[0]!r} in its first line, {','.join(header)[:80]!r}")
            for cells in reader:
                if len(cells) >= len(header):
                    yield dict(zip(header, cells, strict=False))
                elif cells:
                    raise UserError(f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num}: damaged ({error}); rename it and download the set again"
                            ) from None


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


# --- COCO ------------------------------------------------------------------------------------------------------------


def _read_coco(root: Path, split: str, config: Config) -> Iterator[Sample]:
    """Karpathy's split where its list is there (or asked for): train and restval, val, test; else 2017's, with val cut
    from train2017 and val2017 as test. Pictures lie in train2017 and val2017 whatever split is used."""
    karpathy = root / "annotations" / "dataset_coco.json"
    if config.data.coco_split == "karpathy" and not karpathy.is_file():
        raise _missing(karpathy, config)
    if config.data.coco_split != "2017" and karpathy.is_file():
        parts = ["train2017", "val2017"]
        captions = _karpathy_captions(karpathy, split)
    else:
        parts = ["val2017" if split == "test" else "train2017"]
        captions = _coco_captions(root, parts[0], split, config)
    limit_pct = _limit_pct(root, config)
    labels: dict[int, tuple[str, ...]] = {}
    files: dict[str, str] = {}
    for part in parts:
        if not (root / part).is_dir() and limit_pct <= 100:
            raise _missing(root / part, config)
        labels |= _coco_labels(root, part, config)
        files |= dict.fromkeys(_names(root / part), os.path.join(root, part, ""))
    missing = []
    for image_id, texts in captions.items():
        name = f"{image_id:012d}.jpg"
        if name in files:
            yield Sample(key=str(image_id), source="coco", split=split, image=files[name] + name,
                         captions=worded_captions(texts, f"coco {image_id}"), labels=labels.get(image_id, ()))
        else:
            missing.append(name)
    _report("coco", split, len(captions) - len(missing), missing, config, limit_pct=limit_pct)


def _karpathy_captions(path: Path, split: str) -> dict[int, list[str]]:
    def slim(node: dict[str, Any]) -> Any:
        return node["raw"] if "raw" in node else node

    listed = _json(path, slim)["images"]
    wanted = ("train", "restval") if split == "train" else (split,)
    return {image["cocoid"]: image["sentences"] for image in listed if image["split"] in wanted}


def _coco_captions(root: Path, part: str, split: str, config: Config) -> dict[int, list[str]]:
    """Captions by image id; of train2017 either the part that is kept for validation (5 %, at most 5,000) or the rest.

    Image ids are drawn, not files on disk, so a half-copied folder changes no side.
    """
    def slim(node: dict[str, Any]) -> Any:
        if "caption" in node:
            return node["image_id"], node["caption"]
        return node["id"] if "file_name" in node else node

    path = root / "annotations" / f"captions_{part}.json"
    if not path.is_file():
        raise _missing(path, config)
    listed = _json(path, slim)
    captions: dict[int, list[str]] = {image_id: [] for image_id in sorted(listed["images"])}
    for image_id, text in listed["annotations"]:
        captions[image_id].append(text)
    if split == "test":
        return captions
    sides = draw_splits((f"{image_id:012d}" for image_id in captions), 0, min(5_000, round(0.05 * len(captions))))
    return {image_id: texts for image_id, texts in captions.items() if sides[f"{image_id:012d}"] == split}


def _coco_labels(root: Path, part: str, config: Config) -> dict[int, tuple[str, ...]]:
    path = root / "annotations" / f"instances_{part}.json"
    if not path.is_file():
        raise _missing(path, config)
    return _labels_of_instances(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # train2017's is 450 MB of text, and each split of Karpathy's needs it
def _labels_of_instances(path: Path, changed_ns: int) -> dict[int, tuple[str, ...]]:
    """Names of the categories in each image that has any, in the order of their ids (which have gaps). A crowd counts.

    Each annotation shrinks to two numbers while the text is parsed: outlines would take gigabytes.
    """
    def slim(node: dict[str, Any]) -> Any:
        if "category_id" in node:
            return node["image_id"], node["category_id"]
        return (node["id"], node["name"]) if "supercategory" in node else node

    listed = _json(path, slim)
    names = dict(listed["categories"])
    return {image_id: tuple(names[number] for _, number in pairs)
            for image_id, pairs in itertools.groupby(sorted(set(listed["annotations"])), key=lambda pair: pair[0])}


def _json(path: Path, slim: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, object_hook=slim)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers too long; nested too deeply
        raise UserError(f"{path}: damaged ({error}); rename it and download the set again") from None


# --- Clotho ----------------------------------------------------------------------------------------------------------

_CLOTHO_FOLDERS = {"train": "development", "val": "validation", "test": "evaluation"}


def _read_clotho(root: Path, split: str, config: Config) -> Iterator[Sample]:
    """The release has a few recordings on two sides, told by their names or Freesound ids: they are left out of the
    earlier of train, val, test."""
    folder = root / _CLOTHO_FOLDERS[split]
    columns = ("file_name", *(f"caption_{i}" for i in range(1, 6)))
    rows = list(_table(root / f"clotho_captions_{folder.name}.csv", columns, config))
    later: set[str] = set()
    for other in SPLITS[SPLITS.index(split) + 1:]:
        later.update(*_recordings(root, _CLOTHO_FOLDERS[other], config).items())
    recordings = _recordings(root, folder.name, config)
    names = {unicodedata.normalize("NFC", name): name for name in sorted(_names(folder))}  # a Mac unpacks them as NFD
    found = 0
    shared, missing = [], []
    for row in rows:
        name = row["file_name"]  # blanks at its beginning are real
        if name in later or recordings.get(name) in later:
            shared.append(name)
        elif path := names.get(unicodedata.normalize("NFC", name)):
            found += 1
            yield Sample(key=name, source="clotho", split=split, audio=os.path.join(folder, path),
                         captions=worded_captions((row[column] for column in columns[1:]), f"clotho {name}"))
        else:
            missing.append(name)
    if shared:
        _log.warning("clotho %s: left out, since a later split has the same recording: %s", split, ", ".join(shared))
    _report("clotho", split, found, missing, config, limit_pct=_limit_pct(root, config))


def _recordings(root: Path, folder: str, config: Config) -> dict[str, str]:
    """File name -> Freesound id, or the name again where the metadata do not know the id."""
    path = root / f"clotho_metadata_{folder}.csv"
    rows = _table(path, ("file_name", "sound_id"), config, encoding="iso-8859-1")
    return {row["file_name"]: row["sound_id"] if row["sound_id"].isdigit() else row["file_name"] for row in rows}


# --- AudioCaps -------------------------------------------------------------------------------------------------------


def _read_audiocaps(root: Path, split: str, config: Config) -> Iterator[Sample]:
    """One sample a clip, with all its captions; no video of a later split. A clip is named as `names_of_clip` says, or
    AUDIOCAPID, with any suffix of WITH_SOUND, anywhere below `root` but in another split's folder."""
    folder = root / AUDIOCAPS_VERSIONS[config.data.audiocaps_version - 1]
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    later = {row["youtube_id"] for other in SPLITS[SPLITS.index(split) + 1:]
             for row in _table(folder / f"{other}.csv", columns, config)}
    clips: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _table(folder / f"{split}.csv", columns, config):
        if row["youtube_id"] not in later:
            clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
    sounds = _sounds_by_name(root, split)
    missing = []
    for (video, start), rows in clips.items():
        names = (*names_of_clip(video, start), *(row["audiocap_id"] for row in rows))
        path = next((sounds[name] for name in names if name in sounds), None)
        if path:
            yield Sample(key=f"{video}_{start}", source="audiocaps", split=split, audio=path,
                         captions=worded_captions((row["caption"] for row in rows), f"audiocaps {video}"))
        else:
            missing.append(f"{video}_{start}")
    _report("audiocaps", split, len(clips) - len(missing), missing, config,
            limit_pct=max(100.0, _limit_pct(root, config)))  # many are gone for ever


def _listed_audiocaps(root: Path, split: str, config: Config) -> int:
    folder = root / AUDIOCAPS_VERSIONS[config.data.audiocaps_version - 1]
    rows = _table(folder / f"{split}.csv", ("youtube_id", "start_time"), config)
    return len({(row["youtube_id"], row["start_time"]) for row in rows})


def _sounds_by_name(root: Path, split: str) -> dict[str, str]:
    """Path of each sound below `root` by its name without suffix."""
    others = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    found: dict[str, str] = {}
    for folder, names in inventory.walk(root):
        steps = Path(folder).relative_to(root).parts
        if any(others.get(step.lower(), split) != split for step in steps):
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in WITH_SOUND:
                continue
            path = os.path.join(folder, name)
            if stem not in found or _preference(path) < _preference(found[stem]):
                found[stem] = path
    return found


def _preference(path: str) -> int:
    return WITH_SOUND.index(os.path.splitext(path)[1].lower())


# --- VoxCeleb --------------------------------------------------------------------------------------------------------

_IDEN_SIDES = {"1": "train", "2": "val"}  # "3" tests identification of known speakers: on no side here


def _read_voxceleb(root: Path, split: str, config: Config) -> Iterator[Sample]:
    """Speech by speaker, without captions. Test is every recording of the test speakers (verification: Vox1-O of
    VoxCeleb 1, the test set of VoxCeleb 2), whom train and val never hear. Val is the second part of iden_split.txt
    (VoxCeleb 1) or 5 % of the videos (VoxCeleb 2, or where that list is missing), of speakers known from train.
    Video gives a picture as well as the sound; of what is there the sound is taken from wav, else m4a, else mp4."""
    empty = True
    for sample in itertools.chain(_read_vox1(root / "voxceleb1", split, config),
                                  _read_vox2(root / "voxceleb2", split, config)):
        empty = False
        yield sample
    if empty and split == "train":
        raise UserError(f"{root}: no voxceleb1/wav/ID/VIDEO/*.wav nor voxceleb2/dev/{{aac,wav,mp4}}/ID/VIDEO/* of "
                        f"training speakers; get them with: {download_command('voxceleb', config)}")


def _read_vox1(root: Path, split: str, config: Config) -> Iterator[Sample]:
    if not (root / "wav").is_dir():
        return
    listed: dict[str, str] = {}
    if (root / "iden_split.txt").is_file():
        lines = (root / "iden_split.txt").read_text(encoding="utf-8").splitlines()
        listed = {path: _IDEN_SIDES.get(number, "") for number, _, path in (line.partition(" ") for line in lines)}
    else:
        _log.warning("voxceleb: %s is not there; 5 %% of the videos are val instead", root / "iden_split.txt")
    testers = VOX1_TEST_SPEAKERS | _test_speakers(root / "vox1_meta.csv", "\t", config)
    for speaker, name in voxceleb.utterances(root / "wav", (".wav",)):
        side = "test" if speaker in testers else listed.get(name, "") if listed else _side_of_video(name)
        if side == split:
            yield Sample(key=f"vox1/{os.path.splitext(name)[0]}", source="voxceleb", split=split, speaker=speaker,
                         audio=os.path.join(root, "wav", name))


def _read_vox2(root: Path, split: str, config: Config) -> Iterator[Sample]:
    testers = _test_speakers(root / "vox2_meta.csv", ",", config)
    for part in ("dev", "test" if (root / "test").is_dir() else ""):  # the test archives lack a folder test/
        for speaker, stem, image, audio in voxceleb.recordings(root / part):
            side = "test" if part != "dev" or speaker in testers else _side_of_video(stem)
            if side == split:
                yield Sample(key=f"vox2/{stem}", source="voxceleb", split=split, image=image, audio=audio,
                             speaker=speaker)


def _side_of_video(name: str) -> str:
    return "val" if stable_hash(name.rpartition("/")[0]) % 20 == 0 else "train"


def _test_speakers(path: Path, delimiter: str, config: Config) -> frozenset[str]:
    """Speakers (first column) whose set is test. Values are padded in one edition, and one copy says "testo"."""
    if not path.is_file():
        return frozenset()
    rows = _table(path, ("Set",), config, delimiter=delimiter)
    return frozenset(next(iter(row.values())).strip() for row in rows if row["Set"].strip().startswith("test"))


# --- Tux Paint stamps ------------------------------------------------------------------------------------------------


def _read_stamps(root: Path, split: str, config: Config) -> Iterator[Sample]:
    """Stamps with an English caption (line 1 of X.txt) and a picture X.png, a sound effect X.ogg or X.wav, or both.
    A few are drawn as X.svg alone, which nothing here renders: these give their sound.

    The label is the top folder. Equal captions stand on one side: of the distinct captions of the whole set 20 % are
    test and 10 % val, so leaving out symbols/ (`data.stamps_symbols: false`) moves no stamp to another side.
    """
    found = list(_stamps(root))
    if not found:
        raise UserError(f"{root}: holds no captioned stamp; get them with: {download_command('stamps', config)}")
    units = {normalise_caption(stamp.captions[0]) for stamp in found}
    sides = draw_splits(units, round(0.2 * len(units)), round(0.1 * len(units)))
    for stamp in found:
        if sides[normalise_caption(stamp.captions[0])] != split:
            continue
        if stamp.labels == ("symbols",) and not config.data.stamps_symbols:
            continue
        if stamp.audio and not _audible(stamp.audio):
            stamp = replace(stamp, audio="")
        if stamp.image or stamp.audio:
            yield replace(stamp, split=split)


def _stamps(root: Path) -> Iterator[Sample]:
    for folder, names in inventory.walk(root):
        there = set(names)

        def first_of(stem: str, *suffixes: str, folder: str = folder, there: set[str] = there) -> str:
            return next((os.path.join(folder, stem + suffix) for suffix in suffixes if stem + suffix in there), "")

        for stem in sorted(name[:-4] for name in names if name.endswith(".txt")):
            image, audio = first_of(stem, ".png"), first_of(stem, ".ogg", ".wav")
            if not image and not (audio and first_of(stem, ".svg")):
                continue
            with open(os.path.join(folder, stem + ".txt"), encoding="utf-8-sig", errors="replace") as file:
                captions = worded_captions([file.readline(MAX_CAPTION_CHARS + 1)], file.name)
            if captions:
                path = Path(folder, stem).relative_to(root)
                yield Sample(key=path.as_posix(), source="stamps", split="", image=image, audio=audio,
                             captions=captions, labels=path.parts[:-1][:1])


def _audible(path: str) -> bool:
    """Whether a sound effect can be decoded and is not pure silence; four of the real ones are."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            return any(block.any() for block in file.blocks(1 << 14, dtype="float32"))
    except soundfile.LibsndfileError:
        return False


# --- Drawn and own data ----------------------------------------------------------------------------------------------


def _read_synthetic(root: Path, split: str, config: Config) -> Iterable[Sample]:
    return synthetic.read(split, config.data.synthetic_images, config.data.synthetic_sounds)


def _read_manifest(root: Path, split: str, config: Config) -> Iterable[Sample]:
    if not config.data.manifest:
        raise UserError("data.manifest: the set 'manifest' needs the path of your JSONL or CSV file here")
    return read_manifest(Path(config.data.manifest).absolute(), split, config.data.manifest_root,
                         config.data.max_bad_pct)


READERS: dict[str, Reader] = {
    "coco": Reader(
        _read_coco, "Karpathy's train + restval, val, test where dataset_coco.json is there; else train2017 less 5 % "
        "val, and val2017 as test", "annotations CC BY 4.0; each picture under its own Flickr licence"),
    "clotho": Reader(
        _read_clotho, "development, validation, evaluation",
        "captions under the Tampere University licence (non-commercial, attribution); each sound under its Freesound "
        "licence"),
    "audiocaps": Reader(
        _read_audiocaps, "train, val, test, as far as the clips still exist",
        "captions for academic use; the copyright of the sounds stays with the uploaders", listed=_listed_audiocaps),
    "voxceleb": Reader(
        _read_voxceleb, "development speakers, recordings of the same speakers kept back, test speakers",
        "metadata CC BY-SA 4.0, recordings CC BY 4.0; their copyright stays with the owners of the videos"),
    "stamps": Reader(
        _read_stamps, "70, 10 and 20 % of the distinct captions",
        "GPL-2, copyright Bill Kendrick and the Tux Paint contributors"),
    "synthetic": Reader(
        _read_synthetic, "64 combinations of attributes for test, 64 for val, the rest",
        "drawn by this program, free of rights", downloadable=False),
    "manifest": Reader(
        _read_manifest, "as the manifest says, else 80, 10 and 10 % by id",
        "the user's own files", downloadable=False),
}
