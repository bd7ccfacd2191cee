"""Splits: no file on two sides, no caption either as far as that is possible, and enough to validate on or nothing."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimodal.data.samples import Sample, SampleTable, normalise_caption
from trimodal.data.splits import audio_ids, carve_val, group_numbers, image_ids


def table(*samples: Sample) -> SampleTable:
    return SampleTable.pack(samples)


def sample(key: int | str, *captions: str, image: str = "", audio: str = "", start_s: float = 0.0,
           speaker: str = "") -> Sample:
    return Sample(key=str(key), source="s", split="train", image=image, audio=audio, start_s=start_s, captions=captions,
                  speaker=speaker)


def keys(part: SampleTable) -> set[str]:
    return {part.keys[row] for row in range(len(part))}


def files(part: SampleTable) -> set[str]:
    return {os.path.realpath(path) for row in range(len(part)) for path in (part.images[row], part.audio[row]) if path}


@pytest.mark.parametrize("kind", ["lines of a picture", "stretches", "links", "video"])
def test_no_file_stands_on_two_sides(tmp_path: Path, kind: str) -> None:
    rows = []
    for i in range(400):
        path = tmp_path / f"{i}.bin"
        path.write_text(str(i))
        (tmp_path / f"link{i}.bin").symlink_to(path)
        for n in range(5):
            own = str(tmp_path / f"link{i}.bin" if kind == "links" and n % 2 else path)
            as_sound = kind == "stretches" or (kind == "video" and n % 2)
            rows.append(sample(f"{n}/{i}", f"caption {n} of {i}", image="" if as_sound else own,
                               audio=own if as_sound else "", start_s=n if kind == "stretches" else 0.0))
    train, val = carve_val(table(*rows))
    assert not files(train) & files(val) and len(train) + len(val) == 2000
    assert 40 <= len(val) <= 160 and len(val) % 5 == 0
    assert set(val.splits.names) == {"val"}


def test_samples_with_a_rare_caption_stay_together_and_a_common_one_does_not_tie_all() -> None:
    rows = [sample(i, f"A dog number {i % 700}.", "a dog barking", *["a bird"] * (i % 90 == 0)) for i in range(2100)]
    train, val = carve_val(table(*rows))
    texts = [{normalise_caption(text) for row in range(len(part)) for text in part.captions_of(row)}
             for part in (train, val)]
    assert texts[0] & texts[1] <= {"a dog barking", "a bird"} and 40 <= len(val) <= 200
    assert len(set(group_numbers(table(*rows)).tolist())) > 500


def test_chains_of_shared_captions_do_not_swallow_the_set() -> None:
    """Each sample shares a caption with its two neighbours: as a chain they would be a single group."""
    rows = [sample(i, f"first {i // 2}", f"second {(i + 1) // 2}") for i in range(4000)]
    groups = np.bincount(group_numbers(table(*rows)))
    assert groups.max() <= 40 and len(groups) >= 100
    _, val = carve_val(table(*rows))
    assert 80 <= len(val) <= 400


def test_held_out_are_two_samples_of_each_kind_or_none() -> None:
    for number in range(25):
        rows = [sample(f"i{i}", f"picture {i}", image=f"/none/{i}.png") for i in range(number)]
        rows += [sample(f"a{i}", f"sound {i}", audio=f"/none/{i}.wav") for i in range(40)]
        train, val = carve_val(table(*rows))
        pictures, sounds = int(val.has_image.sum()), int(val.has_audio.sum())
        assert 2 <= pictures <= number // 5 if number >= 10 else pictures == 0
        assert 2 <= sounds <= 8
        assert len(train) + len(val) == len(rows)
    assert [len(part) for part in carve_val(table())] == [0, 0]
    long = [sample(i, f"line {i}", audio="/none/long.wav", start_s=i) for i in range(100)]
    assert [len(part) for part in carve_val(table(*long))] == [100, 0], "one recording cannot be parted"
    alone = carve_val(table(*long, sample("other", "other", audio="/none/other.wav")))
    assert [len(part) for part in alone] == [101, 0], "a single sample is nothing to validate on"
    more = [sample(f"other {i}", f"other {i}", audio=f"/none/{i}.wav") for i in range(30)]
    train, val = carve_val(table(*long, *more))
    assert 2 <= len(val) <= 26 and not any("long" in path for path in files(val))


def test_what_is_held_out_is_the_same_in_any_order_and_hardly_changes_when_samples_are_added() -> None:
    rows = [sample(i, f"caption {i}", image=f"/none/{i // 2}.png") for i in range(3000)]
    before = keys(carve_val(table(*rows))[1])
    assert keys(carve_val(table(*rows[::-1]))[1]) == before
    rows += [sample(i, f"caption {i}", image=f"/none/{i // 2}.png") for i in range(3000, 3300)]
    after = keys(carve_val(table(*rows))[1])
    assert before <= after and len(after) < len(before) + 60


def test_names_of_samples_that_were_held_out_are_not_those_of_the_rest() -> None:
    rows = [Sample(key=str(i), source="s", split="train", audio=f"/none/{i}.wav", speaker=f"speaker {i}",
                   labels=(f"label {i}",)) for i in range(100)]
    train, val = carve_val(table(*rows))
    assert len(val) >= 2 and set(train.speakers.names) == {f"speaker {key}" for key in keys(train)}
    assert set(train.labels.names) == {f"label {key}" for key in keys(train)}
    assert set(val.speakers.names) == {f"speaker {key}" for key in keys(val)}


# ---- samples of the same file --------------------------------------------------------------------------------------


def rows_of(*samples: dict[str, Any]) -> SampleTable:
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
    found = image_ids(rows_of({"image": str(first)}, {"image": path, "source": "coco"}))
    assert partition(found) == ([[0], [1]] if other in ("copy", "other file") else [[0, 1]])
    assert found.dtype == np.int64


def test_sounds_are_told_by_their_stretch_too(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    (tmp_path / "b.wav").symlink_to("a.wav")
    a, b = str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    found = audio_ids(rows_of({"audio": a}, {"audio": a, "start_s": 1.0}, {"audio": b, "start_s": 1.0},
                            {"audio": a, "start_s": 1.0, "duration_s": 2.0}, {"audio": b, "duration_s": 2.0},
                            {"audio": b, "start_s": 1.0, "duration_s": 2.0}, {"audio": b}))
    assert partition(found) == [[0, 6], [1, 2], [3, 5], [4]]


def test_what_is_missing_or_drawn_equals_no_other(tmp_path: Path) -> None:
    rows = rows_of({"captions": ("a",)}, {"image": "synthetic:3"}, {"captions": ("a",)}, {"image": "synthetic:3"},
                 {"image": str(tmp_path / "gone.png")}, {"image": str(tmp_path / "gone.png")})
    assert partition(image_ids(rows)) == [[0], [1], [2], [3], [4, 5]]
    assert partition(audio_ids(rows)) == [[i] for i in range(6)]
