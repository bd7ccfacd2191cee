"""Names in the lists of a set against names on the disk."""

import unicodedata
from pathlib import Path

import pytest

from tests import trees
from trimodal.data.samples import SPLITS
from trimodal.sets import SOURCES, audiocaps, lists


def rows(name: str, root: Path, *splits: str) -> dict[str, tuple[int, int]]:
    return {row.place: (row.found, row.listed)
            for row in lists.coverage(SOURCES[name], root, splits or SPLITS)}


def test_all_that_is_listed_is_there(tmp_path: Path) -> None:
    assert rows("coco", trees.coco(tmp_path)) == {"train2017": (40, 40), "val2017": (8, 8)}
    assert rows("clotho", trees.clotho(tmp_path)) == {"development": (14, 14), "validation": (3, 3),
                                                     "evaluation": (3, 3)}
    assert rows("voxceleb", trees.voxceleb(tmp_path, video_files=False)) == {"voxceleb1/wav": (15, 15)}


def test_a_file_of_another_name_is_told_though_the_number_is_right(tmp_path: Path) -> None:
    root = trees.clotho(tmp_path)
    (root / "development/ Ambience Birds.wav").rename(root / "development/Ambience Birds.wav")
    (row,) = [row for row in lists.coverage(SOURCES["clotho"], root) if row.absent]
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
    found = [(row.source, row.found, row.listed) for row in lists.coverage(SOURCES["audiocaps"], root, ["val"])]
    assert found == [("dataset/val.csv", 1, 2), ("dataset2.0/val.csv", 0, 1)]
    assert list(audiocaps.clips(root, "val"))[-1] == "newclip0001_7" and len(set(audiocaps.clips(root, "val"))) == 3
    (root / "dataset/val.csv").unlink()
    (row,) = lists.coverage(SOURCES["audiocaps"], root, ["val"])
    assert (row.found, row.listed) == (1, 3)


def test_no_list_and_no_folder_say_nothing(tmp_path: Path) -> None:
    assert rows("coco", tmp_path) == rows("stamps", tmp_path) == {}
