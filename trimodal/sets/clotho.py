"""Clotho v2.1: sounds of 15 to 30 s with five captions each.

Names with leading blanks are real (" Ambience Birds.wav"); the metadata csv files are ISO-8859-1.
"""

import logging
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample
from trimodal.sets.base import Count, DataSet, File, FileList, Item, Source
from trimodal.sets.reading import existing, names_in, report_absent, rows, worded_captions

FOLDERS = {"train": "development", "val": "validation", "test": "evaluation"}
CAPTIONS = tuple(f"caption_{i}" for i in range(1, 6))

_log = logging.getLogger(__name__)


# ---- where it comes from -----------------------------------------------------------------------------------------


def _zenodo(record: int, name: str, size: int, md5: str, sha256: str = "") -> File:
    base = "https://zenodo.org"
    return File(name=name, size=size, md5=md5, sha256=sha256, urls=(
        ("official", f"{base}/records/{record}/files/{name}?download=1"),
        ("official", f"{base}/api/records/{record}/files/{name}/content")))


def _audio(split: str, number: int, size: int, md5: str, unpacked: int) -> Item:
    file = _zenodo(4783391, f"clotho_audio_{FOLDERS[split]}.7z", size, md5)
    return Item(name=file.name, kind="7z", into="", files=(file,), subset="v2.1", splits=(split,), unpacked=unpacked,
                counts=(Count(folder=FOLDERS[split], suffix=".wav", number=number),))


def _list(name: str, size: int, md5: str, sha256: str = "", *, record: int = 4783391, subset: str = "v2.1") -> Item:
    return Item(name=name, kind="plain", into=name, subset=subset, unpacked=size,
                files=(_zenodo(record, name, size, md5, sha256),))


ITEMS = (
    _list("clotho_captions_development.csv", 1_336_762, "d4090b39ce9f2491908eebf4d5b09bae",
          "df2e5b92060b4bb23311f8b3a7f82241d900b9c4f62b0cc467ac2ce5e9c52886"),
    _list("clotho_captions_validation.csv", 367_649, "5879e023032b22a2c930aaa0528bead4",
          "fb0365506fe2dfcba9b7299daf7623a795abbd6ab9997a88ab0308e2fdfdbb88"),
    _list("clotho_captions_evaluation.csv", 361_995, "1b16b9e57cf7bdb7f13a13802aeb57e2",
          "0e116233909a57449572b2d67d4c7a2f7df5b7a88c918f3697e61f684e664e84"),
    _list("clotho_metadata_development.csv", 830_797, "170d20935ecfdf161ce1bb154118cda5",
          "b054a8d9d0f88436e7cf6341c82a70e9e975c3b3ddd560d9b04f2cd5fdc75949"),
    _list("clotho_metadata_validation.csv", 224_803, "2e010427c56b1ce6008b0f03f41048ce",
          "066026ae1bc20277614ae9d4fffea085d959f0b5e40120751b8d3e717f5faa97"),
    _list("clotho_metadata_evaluation.csv", 0, "13946f054d4e1bf48079813aac61bf77"),
    _audio("val", 1_045, 1_260_701_425, "7dba730be08bada48bd15dc4e668df59", 2_100_000_000),
    _audio("test", 1_045, 0, "4569624ccadf96223f19cb59fe4f849f", 2_100_000_000),
    _audio("train", 3_839, 4_541_582_263, "c8b05bc7acdb13895bb3c6a29608667e", 7_600_000_000),
    _list("clotho_metadata_test.csv", 0, "52f8ad01c229a310a0ff8043df480e21", record=3865658, subset="test"),
    Item(name="clotho_audio_test.7z", kind="7z", into="", subset="test", unpacked=2_100_000_000,
         files=(_zenodo(3865658, "clotho_audio_test.7z", 0, "9b3fe72560a621641ff4351ba1154349"),)),
)


# ---- its lists ---------------------------------------------------------------------------------------------------


def _captions_of(split: str) -> str:
    return f"clotho_captions_{FOLDERS[split]}.csv"


def _metadata_of(split: str) -> str:
    return f"clotho_metadata_{FOLDERS[split]}.csv"


def _names(path: Path) -> Iterator[str]:
    return (row["file_name"] for row in rows(path, ("file_name",)))


def _lists(splits: Collection[str]) -> list[FileList]:
    return [FileList(place=FOLDERS[split], path=_captions_of(split), names=_names)
            for split in SPLITS if split in splits]


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """The samples of `splits`, each with a recording and its captions.

    The release has a few recordings in two splits (the same name or Freesound id). They stay in the later one, of
    train, val, test, and are left out of the earlier.
    """
    first = min(map(SPLITS.index, splits))
    captions = {split: list(rows(existing(root / _captions_of(split), config), ("file_name", *CAPTIONS)))
                for split in splits}
    recordings = {split: _recordings(existing(root / _metadata_of(split), config)) for split in SPLITS[first:]}
    for split in splits:
        folder = root / FOLDERS[split]
        later = {name for other in SPLITS[SPLITS.index(split) + 1:] for pair in recordings[other].items()
                 for name in pair}
        there = {unicodedata.normalize("NFC", name): name for name in sorted(names_in(folder))}  # a Mac writes NFD
        shared, absent = [], []
        for row in captions[split]:
            name = row["file_name"]  # blanks at its beginning are real
            if name in later or recordings[split].get(name) in later:
                shared.append(name)
            elif path := there.get(unicodedata.normalize("NFC", name)):
                yield Sample(key=name, source="clotho", split=split, audio=os.path.join(folder, path),
                             captions=worded_captions((row[column] for column in CAPTIONS), f"clotho {name}"))
            else:
                absent.append(name)
        if shared:
            _log.warning("clotho %s: left out, since a later split has the same recording: %s", split,
                         ", ".join(shared))
        report_absent(root, split, len(captions[split]) - len(shared) - len(absent), absent, config)


def _recordings(path: Path) -> dict[str, str]:
    """File name -> Freesound id, or the name again where the metadata do not know the id."""
    return {row["file_name"]: row["sound_id"] if row["sound_id"].isdigit() else row["file_name"]
            for row in rows(path, ("file_name", "sound_id"), encoding="iso-8859-1")}


_LICENCE = ("captions: Tampere University licence (non-commercial, attribution); each sound keeps its Freesound "
            "licence (named in the metadata)")
SET = DataSet(
    name="clotho", order=2, licence=_LICENCE, read=_read, splits="development, validation, evaluation",
    source=Source(
        name="clotho", title="Clotho v2.1", page="https://zenodo.org/records/4783391", licence=_LICENCE, items=ITEMS,
        defaults=("v2.1",), at_once=1,  # the host counts requests, and turns away who asks too often
        required=tuple(name(split) for name in (_captions_of, _metadata_of) for split in SPLITS),
        lists=_lists))
