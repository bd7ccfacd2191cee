"""Names in the lists of a set against names on the disk."""

from pathlib import Path

import pytest

import annotations
from tests import trees


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


def test_clips_are_counted_once_whatever_their_suffix(tmp_path: Path) -> None:
    root = trees.audiocaps(tmp_path)
    assert rows("audiocaps", root)["val"] == (1, 2), "the other one has a name of its own"
    (root / "val/jK0l1M2n3o4_41.m4a").write_bytes(b"")
    assert rows("audiocaps", root, "val") == {"val": (2, 2)}


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_names_that_a_block_cuts_are_found_once(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_BLOCK_BYTES", block)
    names = [f"{number:012d}.jpg" for number in range(200)]
    path = tmp_path / "list.json"
    path.write_text("".join(f'{{"file_name" : "{name}", "id": 1}}, ' for name in names), "utf-8")
    assert list(annotations._of_json(path)) == names


def test_no_list_and_no_folder_say_nothing(tmp_path: Path) -> None:
    assert rows("coco", tmp_path) == rows("stamps", tmp_path) == rows("imagenet", tmp_path) == {}
