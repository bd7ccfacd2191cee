import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimodal.data.same_files import audio_ids, image_ids
from trimodal.data.samples import Sample, SampleTable


def table(*samples: dict[str, Any]) -> SampleTable:
    return SampleTable.pack(Sample(**{"key": str(i), "source": "manifest", "split": "train", **one})
                            for i, one in enumerate(samples))


def partition(ids: np.ndarray) -> list[list[int]]:
    """Rows that share an id."""
    return [np.flatnonzero(ids == value).tolist() for value in dict.fromkeys(ids.tolist())]


@pytest.mark.parametrize("other", ["same", "dots", "link", "hard link", "link to the folder", "copy", "other file"])
def test_ids_are_equal_exactly_for_one_file(other: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"picture")
    if other == "link":
        second.symlink_to(first)
    elif other == "hard link":
        os.link(first, second)
    elif other == "link to the folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        second = tmp_path / "folder" / "a.png"
    else:
        second.write_bytes(b"picture" if other == "copy" else b"another")
    path = {"same": str(first), "dots": f"{tmp_path}/x/../a.png"}.get(other, str(second))
    (tmp_path / "x").mkdir()
    found = image_ids(table({"image": str(first)}, {"image": path, "source": "coco"}))
    assert partition(found) == ([[0], [1]] if other in ("copy", "other file") else [[0, 1]])
    assert found.dtype == np.int64


def test_sounds_are_told_by_their_stretch_too(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    (tmp_path / "b.wav").symlink_to("a.wav")
    a, b = str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    found = audio_ids(table({"audio": a}, {"audio": a, "start_s": 1.0}, {"audio": b, "start_s": 1.0},
                            {"audio": a, "start_s": 1.0, "duration_s": 2.0}, {"audio": b, "duration_s": 2.0},
                            {"audio": b, "start_s": 1.0, "duration_s": 2.0}, {"audio": b}))
    assert partition(found) == [[0, 6], [1, 2], [3, 5], [4]]


def test_what_is_missing_or_drawn_equals_no_other(tmp_path: Path) -> None:
    rows = table({"captions": ("a",)}, {"image": "synthetic:3"}, {"captions": ("a",)}, {"image": "synthetic:3"},
                 {"image": str(tmp_path / "gone.png")}, {"image": str(tmp_path / "gone.png")})
    assert partition(image_ids(rows)) == [[0], [1], [2], [3], [4, 5]]
    assert partition(audio_ids(rows)) == [[i] for i in range(6)]
