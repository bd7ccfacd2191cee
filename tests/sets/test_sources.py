"""The table of sources agrees with itself, and with sums that the sets publish independently of it."""

import re
from pathlib import PurePosixPath

import pytest

from trimodal.download.unpack import safe_name
from trimodal.sets import ALL, NEEDS_NOTHING, SOURCES
from trimodal.sets.base import HF_HOST, MIRRORS, File, Item, Source

# No digest of these is published; they are told by counts, CRCs, or the digest that their server announces.
UNPINNED = re.compile(r"dataset2\.0/train\.csv|iden_split\.txt|vox2_(test|dev)_mp4.*|.*\.parquet")

ITEMS = [(source, item) for source in SOURCES.values() for item in source.items]
FILES = [file for _, item in ITEMS for file in item.files]
TYPICAL = [file for file in FILES if not file.name.endswith(".parquet") or "-00000-" in file.name]


def item_named(name: str) -> Item:
    (item,) = [item for _, item in ITEMS if item.name == name]
    return item


@pytest.mark.parametrize("file", TYPICAL, ids=lambda file: file.name)
def test_digests_are_digests_and_only_the_known_few_lack_one(file: File) -> None:
    assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256) and re.fullmatch(r"([0-9a-f]{32})?", file.md5)
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", digest) for digest in file.also_good)
    assert bool(file.sha256 or file.md5) != bool(UNPINNED.fullmatch(file.name))
    assert file.size >= 0 and file.lines >= 0


def test_no_digest_stands_twice() -> None:
    digests = [digest for file in FILES for digest in (file.sha256, file.md5) if digest]
    assert len(digests) == len(set(digests)) > 50


@pytest.mark.parametrize("file", TYPICAL, ids=lambda file: file.name)
def test_addresses_are_encrypted_or_pinned(file: File) -> None:
    assert file.urls
    for mirror, url in file.urls:
        assert mirror in MIRRORS and mirror not in ("auto", "hf-mirror")
        plain = url.startswith("http://images.cocodataset.org/") and (file.md5 or file.sha256)
        assert url.startswith(("https://", "apt:")) or plain
        assert (mirror == "hf") == url.startswith(HF_HOST)


@pytest.mark.parametrize("source", SOURCES.values(), ids=lambda source: source.name)
def test_items_have_names_and_places_of_their_own(source: Source) -> None:
    names = [item.name for item in source.items]
    files = [file.name for item in source.items for file in item.files]
    assert len(set(names)) == len(names) and len(set(files)) == len(files)
    assert set(source.defaults) <= set(source.subsets) and source.licence and source.page.startswith("https://")
    for item in source.items:
        assert item.kind in ("plain", "zip", "tar", "deb", "7z", "parquet")
        assert len(item.files) == 1 or item.kind == "zip"
        for path in filter(None, [item.into, *(count.folder for count in item.counts if count.folder != ".")]):
            assert safe_name(path) == path
        for count in item.counts:
            assert PurePosixPath(count.folder).is_relative_to(item.into or ".")


def test_all_means_the_four_sets() -> None:
    assert ALL == ("coco", "clotho", "audiocaps", "voxceleb")
    assert set(SOURCES) == {*ALL, "stamps", "emoji"}
    assert set(NEEDS_NOTHING) == {"synthetic", "manifest", "shards", "folder"}


def test_defaults_select_what_training_reads() -> None:
    def names(source: str, *also: str) -> set[str]:
        return {item.name for item in SOURCES[source].select(also)}

    assert names("coco") == {"annotations_trainval2017.zip", "caption_datasets.zip", "val2017.zip", "train2017.zip"}
    assert len(names("clotho")) == 9 and len(names("audiocaps")) == 6 + 412 + 20 + 41
    assert not {name for name in names("voxceleb") if "vox2" in name}
    assert {"vox2_dev_aac.zip", "vox2_meta.csv", "vox1_dev_wav.zip"} <= names("voxceleb", "vox2-aac")


def test_sums_published_elsewhere() -> None:
    """Identification splits 138,361 + 6,904 + 8,251 recordings; 19.8 GB and 77 GB are the published totals."""
    wavs = sum(item_named(name).counts[0].number for name in ("vox1_dev_wav.zip", "vox1_test_wav.zip"))
    assert wavs == 138_361 + 6_904 + 8_251 == item_named("iden_split.txt").files[0].lines
    assert item_named("vox2_dev_aac.zip").size == 77_477_283_208
    assert item_named("vox1_meta.csv").files[0].lines == 1_211 + 40
    assert sum(item_named(f"clotho_audio_{split}.7z").counts[0].number
               for split in ("development", "validation", "evaluation")) == 5_929
    assert sum(item_named(f"{split}2017.zip").counts[0].number for split in ("train", "val")) == 123_287  # all of 2014
    rows = {split: item_named(f"dataset/{split}.csv").files[0].lines for split in ("train", "val", "test")}
    clips = {count.folder: count.number for count in SOURCES["audiocaps"].partly}
    assert clips == {"train": rows["train"], "val": rows["val"] // 5, "test": rows["test"] // 5}


def test_no_key_is_in_the_table() -> None:
    assert [url for file in FILES for _, url in file.urls if re.search(r"(key|token|password)=(?!\{key\})", url)] == []
