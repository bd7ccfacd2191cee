"""MS-COCO 2017: pictures with five captions each.

The official host answers https with another host's certificate: plain http plus a pinned digest is the official form.
"""

import heapq
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimodal.config import Config
from trimodal.data.samples import Sample
from trimodal.errors import UserError
from trimodal.sets.base import GB, HF_HOST, Choose, Count, DataSet, File, FileList, Item, Source, rank
from trimodal.sets.reading import (
    draw_splits,
    existing,
    is_partial,
    missing,
    names_in,
    report_absent,
    worded_captions,
)

PARTS: tuple[str, ...] = ("train2017", "val2017")  # folders of pictures, and parts of the official lists
KARPATHY = "annotations/dataset_coco.json"
REQUIRED = tuple(f"annotations/{kind}_{part}.json" for kind in ("captions", "instances") for part in PARTS)
MAX_VAL, VAL_SHARE = 5_000, 0.05  # of train2017 without Karpathy's split

Captions = dict[int, list[str]]  # by number of the picture, in the order of the list


# ---- where it comes from -----------------------------------------------------------------------------------------

_MODELSCOPE = "https://www.modelscope.cn/datasets/PAI/COCO2017/resolve/5466a7f1944225fcddb1896006508cad5be27b5b"
_HF = HF_HOST + "/datasets/pcuenq/coco-2017-mirror/resolve/main"
_MIRRORED = ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip")


def _item(path: str, subset: str, size: int, sha256: str, md5: str, *counts: tuple[str, str, int],
          unpacked: int = 0) -> Item:
    name = path.rsplit("/", 1)[-1]
    urls = [("official", f"http://images.cocodataset.org/{path}"),
            ("official", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")]
    if name in _MIRRORED:
        urls += [("hf", f"{_HF}/{name}"), ("modelscope", f"{_MODELSCOPE}/{name}")]
    if name == "train2017.zip":
        urls.append(("hf", f"{HF_HOST}/datasets/BoyangZ/coco_train_2017/resolve/main/{name}"))
    file = File(name=name, urls=tuple(urls), size=size, sha256=sha256, md5=md5)
    return Item(name=name, kind="zip", into="", files=(file,), subset=subset, unpacked=unpacked or size,
                counts=tuple(Count(folder=f, suffix=s, number=n) for f, s, n in counts))


ITEMS = (
    replace(_item(
        "annotations/annotations_trainval2017.zip", "2017", 252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", "f4bbac642086de4f52a3fdda2de5fa2c",
        ("annotations", "_train2017.json", 3), ("annotations", "_val2017.json", 3), unpacked=850_000_000),
        needed=REQUIRED),
    Item(
        name="caption_datasets.zip", kind="zip", into="annotations", subset="karpathy", unpacked=150_000_000,
        needed=(KARPATHY,),
        rules=(("dataset_coco.json", "dataset_coco.json"), ("*/dataset_coco.json", "dataset_coco.json")),
        files=(File(
            name="caption_datasets.zip", size=36_745_453,
            sha256="4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
            urls=(("official", "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"),
                  ("hf", HF_HOST + "/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip"))),)),
    _item("zips/val2017.zip", "2017", 815_585_330,
          "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", "442b8da7639aecaf257c1dceb8ba8c80",
          ("val2017", ".jpg", 5_000)),
    _item("zips/train2017.zip", "2017", 19_336_861_798,
          "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", "cced6f7f71b7629ddf16f17bbcfab6b2",
          ("train2017", ".jpg", 118_287)),
    _item("zips/test2017.zip", "test2017", 6_646_970_404,
          "c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba", "77ad2c53ac5d0aea611d422c0938fb35"),
    _item("annotations/image_info_test2017.zip", "test2017", 1_144_034,
          "e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8", "85da7065e5e600ebfee8af1edb634eb5",
          unpacked=10_000_000),
    _item("zips/unlabeled2017.zip", "unlabeled2017", 0, "", "7ebc562819fdb32847aab79530457326",
          unpacked=20 * GB),
    _item("annotations/panoptic_annotations_trainval2017.zip", "panoptic", 860_725_834,
          "c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370", "", unpacked=1_500_000_000),
    _item("annotations/annotations_trainval2014.zip", "2014", 252_872_794,
          "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", "0a379cfc70b0e71301e0f377548639bd",
          unpacked=850_000_000),
    _item("zips/val2014.zip", "2014", 6_645_013_297,
          "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0", "a3d79f5ed8d289b7a7554ce06a5782b3"),
    _item("zips/train2014.zip", "2014", 13_510_573_713,
          "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775", "0da8c0bd3d6becc4dcb32757491aca88"),
    _item("zips/test2014.zip", "2014", 6_660_437_059,
          "ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf", "04127eef689ceac55e3a572c2c92f264"),
)


# ---- its lists ---------------------------------------------------------------------------------------------------


def file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _parse(path: Path, shrink: Callable[[dict[str, Any]], Any]) -> Any:
    """A JSON file, whose objects `shrink` makes smaller while it is parsed: outlines would take gigabytes."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, object_hook=shrink)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers too long; nested too deeply
        raise UserError(f"{path}: damaged ({error}); rename it and download the set again") from None


def karpathy_captions(path: Path) -> dict[str, Captions]:
    """Captions by split, of which train has restval as well."""
    def shrink(node: dict[str, Any]) -> Any:
        if "raw" in node:
            return node["raw"]
        return (node["split"], node["cocoid"], node["sentences"]) if "cocoid" in node else node

    found: dict[str, Captions] = {"train": {}, "val": {}, "test": {}}
    for split, image_id, sentences in _parse(path, shrink)["images"]:
        found.setdefault("train" if split == "restval" else split, {})[image_id] = sentences
    return found


def official_captions(path: Path) -> Captions:
    """Captions of one part, in the order of their pictures' numbers."""
    def shrink(node: dict[str, Any]) -> Any:
        if "caption" in node:
            return node["image_id"], node["caption"]
        return node["id"] if "file_name" in node else node

    listed = _parse(path, shrink)
    captions: Captions = {image_id: [] for image_id in sorted(listed["images"])}
    for image_id, text in listed["annotations"]:
        captions[image_id].append(text)
    return captions


def _labels(path: Path) -> dict[int, tuple[str, ...]]:
    """Names of the categories in each image that has any, in the order of their ids (which have gaps). A crowd
    counts."""
    def shrink(node: dict[str, Any]) -> Any:
        if "category_id" in node:
            return node["image_id"], node["category_id"]
        return (node["id"], node["name"]) if "supercategory" in node else node

    listed = _parse(path, shrink)
    names = dict(listed["categories"])
    return {image_id: tuple(names[number] for _, number in pairs)
            for image_id, pairs in itertools.groupby(sorted(set(listed["annotations"])), key=lambda pair: pair[0])}


def _list_of(part: str) -> str:
    return f"annotations/captions_{part}.json"


def _lists(splits: Collection[str]) -> list[FileList]:
    return [FileList(place=part, path=_list_of(part), names=lambda path: map(file_name, official_captions(path)))
            for part in PARTS]


def training_files(folder: Path) -> Iterable[str]:
    """File names of the training images that are on the disk: of Karpathy's training split where its list is there,
    whose images lie in train2017 and val2017, else of train2017."""
    if (folder / KARPATHY).is_file():
        listed = karpathy_captions(folder / KARPATHY)["train"]
    else:
        listed = official_captions(folder / _list_of(PARTS[0]))
    parts = PARTS if (folder / KARPATHY).is_file() else PARTS[:1]
    there = {name for part in parts for name in names_in(folder / part)}
    return filter(there.__contains__, map(file_name, listed))


def _sample(folder: Path, number: int) -> Choose | None:
    """`number` pictures of each of Karpathy's splits."""
    if not (folder / KARPATHY).is_file():
        return None
    wanted = {file_name(image_id) for captions in karpathy_captions(folder / KARPATHY).values()
              for image_id in heapq.nsmallest(number, captions, key=lambda image_id: rank(str(image_id)))}
    return lambda names: {name for name in names if name.rpartition("/")[2] in wanted}


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """Karpathy's split where its list is there (or asked for), else that of 2017. Pictures lie in train2017 and val2017
    whatever split is used."""
    karpathy = root / KARPATHY
    if config.data.coco_split == "karpathy":
        existing(karpathy, config)
    if config.data.coco_split != "2017" and karpathy.is_file():
        parts, captions = PARTS, karpathy_captions(karpathy)
    else:
        parts = tuple(part for part, its in zip(PARTS, ({"train", "val"}, {"test"}), strict=True) if its & {*splits})
        captions = _captions_of_2017(root, parts, config)
    labels: dict[int, tuple[str, ...]] = {}
    folders: dict[str, str] = {}
    for part in parts:
        if not (root / part).is_dir() and not is_partial(root):
            raise missing(root / part, config)
        labels |= _labels(existing(root / f"annotations/instances_{part}.json", config))
        folders |= dict.fromkeys(names_in(root / part), os.path.join(root, part, ""))
    for split in splits:
        absent = []
        for image_id, texts in captions[split].items():
            name = file_name(image_id)
            if name in folders:
                yield Sample(key=str(image_id), source="coco", split=split, image=folders[name] + name,
                             captions=worded_captions(texts, f"coco {image_id}"), labels=labels.get(image_id, ()))
            else:
                absent.append(name)
        report_absent(root, split, len(captions[split]) - len(absent), absent, config)


def _captions_of_2017(root: Path, parts: Sequence[str], config: Config) -> dict[str, Captions]:
    """Captions by split and image id, without Karpathy's list: val2017 is test, and 5 % of train2017, at most 5,000
    images, are val.

    Val is chosen among the image ids of the list, not the files on the disk, so an incomplete folder changes no split.
    """
    found: dict[str, Captions] = {"train": {}, "val": {}, "test": {}}
    for part in parts:
        captions = official_captions(existing(root / _list_of(part), config))
        if part == "val2017":
            found["test"] = captions
            continue
        sides = draw_splits((f"{image_id:012d}" for image_id in captions), 0,
                            min(MAX_VAL, round(VAL_SHARE * len(captions))))
        for image_id, texts in captions.items():
            found[sides[f"{image_id:012d}"]][image_id] = texts
    return found


_LICENCE = "annotations CC BY 4.0; each picture keeps its own Flickr licence (named in the annotations)"
SET = DataSet(
    name="coco", order=1, licence=_LICENCE, read=_read, folds=(5, 1000),
    splits="Karpathy's train + restval, val, test where dataset_coco.json is there; else train2017 less 5 % val, and "
           "val2017 as test",
    source=Source(
        name="coco", title="MS-COCO 2017", page="https://cocodataset.org", licence=_LICENCE, items=ITEMS,
        defaults=("2017", "karpathy"),
        note="the 2017 zips hold every picture of 2014 as well, so the Karpathy split needs no other",
        required=REQUIRED,
        lists=_lists, training_files=training_files, sample=_sample))
