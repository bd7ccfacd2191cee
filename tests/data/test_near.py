"""Near-equal files: copies are found whatever encoded them, others are not, and what is found is told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from benchmarks.near import PICTURES, SOUNDS
from datasets import Data, load_data
from trimodal import doctor
from trimodal.config import Config, config_from_dict
from trimodal.data.audio import log_mel
from trimodal.data.near import NEAR, image_print, near_files, nearest, sound_print
from trimodal.evaluation import protocols, report


def _picture(number: int, size: int = 160) -> np.ndarray:
    """Twelve ellipses of random places and colours."""
    rng, picture = np.random.default_rng(number), Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        left, top, width, height = (*rng.integers(0, size * 3 // 4, 2), *rng.integers(9, 60, 2))
        draw.ellipse((left, top, left + width, top + height), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return np.asarray(picture)


def _sound(number: int, seconds: float = 2.0) -> np.ndarray:
    """Six notes of random pitch and length."""
    rng, t = np.random.default_rng(number), np.arange(int(16_000 * seconds)) / 16_000
    wave = np.zeros(len(t))
    for _ in range(6):
        start, pitch = rng.uniform(0, seconds * 0.8), rng.uniform(150, 3_000)
        wave += np.where(t > start, np.sin(2 * np.pi * pitch * t) * np.exp(-4 * (t - start).clip(0)), 0)
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_copy_of_a_picture_is_near_and_another_is_not(kind: str) -> None:
    prints = np.stack([image_print(_picture(n)) for n in range(12)])
    copies = np.stack([image_print(PICTURES[kind](_picture(n))) for n in range(12)])
    cosine, which = nearest(copies, prints)
    assert which.tolist() == list(range(12)) and cosine.min() >= NEAR["image"]
    assert (prints @ prints.T - 2 * np.eye(12)).max() < NEAR["image"]


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_copy_of_a_sound_is_near_and_another_is_not(kind: str) -> None:
    prints = np.stack([sound_print(log_mel(_sound(n))) for n in range(12)])
    copies = np.stack([sound_print(log_mel(SOUNDS[kind](_sound(n)))) for n in range(12)])
    cosine, which = nearest(copies, prints)
    assert which.tolist() == list(range(12)) and cosine.min() >= NEAR["audio"]
    assert (prints @ prints.T - 2 * np.eye(12)).max() < NEAR["audio"]


def test_what_has_no_contents_is_near_to_nothing() -> None:
    white = image_print(np.full((50, 40, 3), 255, np.uint8))
    assert not white.any() and not sound_print(np.full((70, 80), -13.8, np.float16)).any()
    assert nearest(white[None], white[None])[0][0] < NEAR["image"]
    cosine, which = nearest(np.eye(3, 5, dtype=np.float32), np.empty((0, 5), np.float32))
    assert cosine.tolist() == [-1.0] * 3 and which.tolist() == [0] * 3


@pytest.fixture
def own(tmp_path: Path) -> tuple[Config, Data]:
    """Six pictures and six sounds to train on; of two pictures and a sound the test split has copies."""
    lines = []
    for n in range(6):
        for split, offset in (("train", 0), ("test", 100)):
            is_copy = split == "test" and n < 2
            Image.fromarray(_picture(n if is_copy else n + offset)).save(
                tmp_path / f"{split}{n}.jpg", quality=60 if is_copy else 95)
            wave = _sound(n if split == "test" and n < 1 else n + offset)
            soundfile.write(tmp_path / f"{split}{n}.ogg", wave, 16_000)
            lines += [{"image": f"{split}{n}.jpg", "text": f"picture {n} of {split}", "split": split},
                      {"audio": f"{split}{n}.ogg", "text": f"sound {n} of {split}", "split": split}]
    lines += [{"text": f"words {n}", "split": "val"} for n in range(2)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_from_dict({"data": {"datasets": ["manifest"], "manifest": str(tmp_path / "own.jsonl"),
                                        "workers": 0, "cache_dir": str(tmp_path / "cache")},
                               "paths": {"data_root": str(tmp_path / "data")}})
    return config, load_data(config)


def test_copies_across_splits_are_counted_and_told(own: tuple[Config, Data]) -> None:
    config, data = own
    found = near_files(data.splits["test"], data.splits["train"], config)
    assert [len(found["image"]), len(found["audio"])] == [2, 1]
    for modality, pairs in found.items():
        name = "images" if modality == "image" else "audio"
        paths = [getattr(data.tables[split], name) for split in ("test", "train")]
        for row, other in pairs.tolist():
            assert Path(paths[0][row]).name.replace("test", "train") == Path(paths[1][other]).name
    again = near_files(data.splits["test"], data.splits["train"], config)  # from what was kept
    assert all(np.array_equal(again[name], found[name]) for name in found)
    facts = {"manifest": {"samples": 12, "of": 12, "subset_seed": None}}
    encoded = protocols.Encoded("test", {}, {}, np.empty(0, np.int64), facts)
    protocols.mark_near(encoded, data, config)
    assert facts["manifest"]["near"] == {"image": 2, "audio": 1}
    assert "image 2, audio 1" in report.format_notes({"manifest": {}}, facts)
    (row,) = doctor._near_files(data, config)
    assert row.state == "warn" and [line[:8] for line in row.found.splitlines()] == ["test: 2 ", "test: 1 "]


def test_without_a_cache_nothing_is_read(own: tuple[Config, Data]) -> None:
    config = dataclasses.replace(own[0], data=dataclasses.replace(own[0].data, cache=False))
    data = load_data(config)
    assert near_files(data.splits["test"], data.splits["train"], config) == {}
    assert list(doctor._near_files(data, config)) == []


def test_the_copies_of_the_benchmark_are_encoded() -> None:
    wave, picture = _sound(0), _picture(0)
    assert not np.array_equal(SOUNDS["MP3, 64 kbit/s"](wave)[:len(wave)], wave)
    assert not np.array_equal(PICTURES["JPEG, quality 50"](picture), picture)
