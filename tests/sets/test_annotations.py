"""Names in the lists of a set against names on the disk."""

import json
import tracemalloc
import unicodedata
from pathlib import Path

import pytest

from tests import trees
from trimodal.sets import annotations


def rows(name: str, root: Path, *splits: str) -> dict[str, tuple[int, int]]:
    return {row.place: (row.found, row.listed)
            for row in annotations.coverage(name, root, splits or annotations.SPLITS)}


def test_all_that_is_listed_is_there(tmp_path: Path) -> None:
    assert rows("coco", trees.coco(tmp_path)) == {"train2017": (40, 40), "val2017": (8, 8)}
    assert rows("clotho", trees.clotho(tmp_path)) == {"development": (14, 14), "validation": (3, 3),
                                                     "evaluation": (3, 3)}
    assert rows("voxceleb", trees.voxceleb(tmp_path, video_files=False)) == {"voxceleb1/wav": (15, 15)}


def test_a_file_of_another_name_is_told_though_the_number_is_right(tmp_path: Path) -> None:
    root = trees.clotho(tmp_path)
    (root / "development/ Ambience Birds.wav").rename(root / "development/Ambience Birds.wav")
    (row,) = [row for row in annotations.coverage("clotho", root) if row.absent]
    assert (row.found, row.listed, row.absent) == (13, 14, (" Ambience Birds.wav",))


def test_a_name_in_the_other_unicode_form_is_there(tmp_path: Path) -> None:
    root = trees.clotho(tmp_path)
    row = (root / "clotho_captions_validation.csv").read_text("utf-8").splitlines()[1]
    named = row.split(",")[0]
    other = f"é {named}"
    (root / "clotho_captions_validation.csv").write_text(f"file_name,caption_1\n{other},a\n", "utf-8")
    (root / "validation" / named).rename(root / "validation" / unicodedata.normalize("NFD", other))
    assert rows("clotho", root)["validation"] == (1, 1)


@pytest.mark.parametrize("suffix", [".m4a", ".opus", ".mp4"])
def test_clips_are_counted_once_whatever_their_suffix(tmp_path: Path, suffix: str) -> None:
    root = trees.audiocaps(tmp_path)
    assert rows("audiocaps", root)["val"] == (1, 2), "the other one has a name of its own"
    (root / f"val/jK0l1M2n3o4_41{suffix}").write_bytes(b"")
    assert rows("audiocaps", root, "val") == {"val": (2, 2)}


def test_the_second_version_of_audiocaps_counts_where_it_names_more(tmp_path: Path) -> None:
    root = trees.audiocaps(tmp_path)
    trees.audiocaps(tmp_path, version=2)
    with (root / "dataset2.0/val.csv").open("a", encoding="utf-8") as file:
        file.write("1,newclip0001,7,a\n2,newclip0001,7,b\n")
    found = [(row.source, row.found, row.listed) for row in annotations.coverage("audiocaps", root, ["val"])]
    assert found == [("dataset/val.csv", 1, 2), ("dataset2.0/val.csv", 0, 1)]
    assert list(annotations.clips(root, "val"))[-1] == "newclip0001_7" and len(set(annotations.clips(root, "val"))) == 3
    (root / "dataset/val.csv").unlink()
    (row,) = annotations.coverage("audiocaps", root, ["val"])
    assert (row.found, row.listed) == (1, 3)


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_names_that_a_block_cuts_are_found_once(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "BLOCK_BYTES", block)
    names = [f"{number:012d}.jpg" for number in range(200)]
    path = tmp_path / "annotations/captions_val2017.json"
    path.parent.mkdir()
    path.write_text("".join(f'{{"file_name" : "{name}", "id": 1}}, ' for name in names), "utf-8")
    (tmp_path / "val2017").mkdir()
    assert rows("coco", tmp_path) == {"val2017": (0, 200)}
    for name in names:
        (tmp_path / "val2017" / name).touch()
    assert list(annotations.present("coco", tmp_path, "val2017")) == names


def test_no_list_and_no_folder_say_nothing(tmp_path: Path) -> None:
    assert rows("coco", tmp_path) == rows("stamps", tmp_path) == rows("imagenet", tmp_path) == {}


IMAGE = ('{{"filepath": "val2014", "sentids": [1], "filename": "COCO_val2014_{number:012d}.jpg", "imgid": 0, '
         '"split": "{split}", "sentences": [{{"tokens": ["a"], "raw": "a \\"split\\": \\"x\\" 水"}}], '
         '"cocoid": {number}}}')


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize("turned", [False, True])
def test_pictures_of_karpathy_come_with_their_split(tmp_path: Path, block: int, turned: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "BLOCK_BYTES", block)
    expected = [(number, ("train", "restval", "val", "test")[number % 4]) for number in range(1, 50)]
    images = [IMAGE.format(number=number, split=split) for number, split in expected]
    if turned:
        images = [json.dumps(dict(reversed(json.loads(image).items()))) for image in images]
    path = tmp_path / "dataset_coco.json"
    path.write_text('{"images": [' + ", ".join(images) + '], "dataset": "coco"}', "utf-8")
    assert list(annotations.karpathy(path)) == expected


def test_the_lists_of_karpathy_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dataset_coco.json"
    monkeypatch.setattr(annotations, "BLOCK_BYTES", 1 << 16)
    images = ", ".join(IMAGE.format(number=number, split="val") for number in range(15_000))
    path.write_text(f"[{images}]", "utf-8")
    del images
    tracemalloc.start()
    try:
        assert sum(1 for _ in annotations.karpathy(path)) == 15_000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()
