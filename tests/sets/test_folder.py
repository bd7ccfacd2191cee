"""A tree without a list: classes, files of one stem, videos, splits; and what makes a file stand on two sides."""

import json
from collections import Counter
from pathlib import Path

import pytest

from datasets import read_tables
from tests import trees
from tests.refusals import refused
from tests.small_runs import RECIPE
from trimodal import media
from trimodal.config import Config, config_from_dict
from trimodal.data import prepared
from trimodal.data.samples import SPLITS, Sample
from trimodal.errors import ConfigError
from trimodal.sets import read_splits


def config_of(folder: Path, *overrides: str) -> Config:
    return config_from_dict(RECIPE, [f"paths.data_root={folder}", "data.datasets=[folder]", *overrides])


def read(folder: Path, *overrides: str) -> dict[str, Sample]:
    return {one.key: one for one in sorted(read_splits("folder", SPLITS, config_of(folder, *overrides)),
                                           key=lambda one: one.key)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "folder"


def pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        trees.picture(root / name, (number % 256, 9, 9))
    return root


def test_a_tree_of_classes(root: Path) -> None:
    pictures(root, "dog/1.jpg", "dog/deep/er/2.PNG", "golden_dog/1.jpg", "3.webp")
    trees.sound(root / "dog" / "bark.wav", trees.tone(0.2))
    found = read(root.parent)
    assert {key: one.labels for key, one in found.items()} == {
        "3": (), "dog/1": ("dog",), "dog/bark": ("dog",), "dog/deep/er/2": ("dog",), "golden_dog/1": ("golden_dog",)}
    assert not any(one.captions for one in found.values()), "only if asked"
    assert found["dog/bark"].audio == str(root / "dog" / "bark.wav") and not found["dog/bark"].image
    asked = read(root.parent, "data.folder_caption=a photo of a {}")
    assert asked["golden_dog/1"].captions == ("a photo of a golden dog",) and not asked["3"].captions


def test_files_of_one_stem_are_one_sample(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(root, "a.b.jpg", "a.c.jpg", "d/1.jpg", "d/1.png")
    trees.sound(root / "d" / "1.wav", trees.tone(0.2))
    (root / "a.b.txt").write_text("one\n\n two \n")
    (root / "d" / "1.json").write_text(json.dumps({"caption": "three", "speaker": "anna"}))
    (root / "readme.txt").write_text("no sample")
    pictures(root, "e/1.jpg")
    (root / "e" / "1.txt").write_text("four,\nand five")
    (root / "e" / "1.json").write_text(json.dumps({"caption": "four,\nand five"}))  # as img2dataset writes it
    found = read(root.parent)
    assert {key: one.captions for key, one in found.items()} == {
        "a.b": ("one", "two"), "a.c": (), "d/1": ("three",), "e/1": ("four,\nand five",)}
    assert found["d/1"].audio and found["d/1"].image.endswith("1.jpg") and found["d/1"].speaker == "anna"
    assert "d/1" in caplog.text and "a.c" in caplog.text, "what is left out, and what has no caption"


def test_a_tree_of_videos_is_one_of_pairs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = [(200, 20, 20), (20, 200, 20)]
    for name in ("a.mp4", "walks/b.MKV"):
        trees.video(root / name.lower(), colours, trees.tone(0.2)).rename(root / name)
    trees.video(root / "mute.mp4", colours)
    (root / "broken.mp4").write_bytes(b"no video")
    found = read(root.parent)
    assert {key: (bool(one.image), one.audio == one.image) for key, one in found.items()} == {
        "a": (True, True), "broken": (True, False), "mute": (True, False), "walks/b": (True, True)}
    monkeypatch.setattr(media, "has_sound", lambda path: pytest.fail(f"{path} is opened again"))
    assert read(root.parent) == found


@pytest.mark.parametrize(("names", "expected"), [
    (["train/dog/1.jpg", "val/dog/1.jpg", "test/cat/1.jpg"], {"train": 1, "val": 1, "test": 1}),
    (["Training/1.jpg", "validation/1.jpg"], {"train": 1, "val": 1}), (["train/dog/1.jpg"], {"train": 1}),
    (["bus/1.jpg", "car/1.jpg", "train/1.jpg"], {"train": 3}), (["1.jpg", "train/1.jpg"], {"train": 2})])
def test_splits(root: Path, names: list[str], expected: dict[str, int]) -> None:
    found = read(pictures(root, *names).parent)
    assert Counter(one.split for one in found.values()) == expected
    assert {one.labels for key, one in found.items() if "dog" in key} <= {("dog",)}


def test_what_is_beside_the_splits_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read(pictures(root, "train/1.jpg", "test/1.jpg", "more/1.jpg", "more/2.jpg").parent)) == 2
    assert "more" in caplog.text and "2 samples" in caplog.text


def test_splits_are_drawn_where_no_folder_is_one(root: Path) -> None:
    """Links to one file stay on one side, whatever their names."""
    pictures(root, *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(50)))
    for n in range(50):
        (root / "cat" / f"link{n}.png").symlink_to(root / "dog" / f"{n}.png")
    found = read(root.parent)
    assert Counter(found[key].split for key in found if "cat/link" not in key) == {"train": 80, "val": 10, "test": 10}
    assert all(found[f"cat/link{n}"].split == found[f"dog/{n}"].split for n in range(50))


def test_folders_of_digits_are_classes_without_captions_alone(root: Path) -> None:
    pictures(root, "0/1.png", "00001/2.png")
    (root / "00001" / "2.txt").write_text("a caption")
    assert [one.labels for one in read(root.parent).values()] == [("0",), ()]


def test_mistakes_are_one_line_each(root: Path, tmp_path: Path) -> None:
    with refused(root, "data.folder"):
        read(tmp_path)
    root.mkdir()
    (root / "list.csv").touch()
    with refused(root, "data.folder"):
        read(tmp_path)
    pictures(root, "train/1.jpg", "test/2.jpg")
    (root / "test" / "1.jpg").symlink_to(root / "train" / "1.jpg")
    with refused(root / "train" / "1.jpg", root / "test" / "1.jpg", "train", "test"):
        read(tmp_path)
    for wrong in ("a photo", "{} and {}"):
        with refused("data.folder_caption", "{}", error=ConfigError):
            config_of(tmp_path, f"data.folder_caption={json.dumps(wrong)}")


def test_the_tree_is_read_again_where_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MANY", 1)
    pictures(root, *(f"{n}.png" for n in range(20)))
    (root / "1.txt").write_text("one")
    tables = read_tables(config_of(root.parent), SPLITS)
    with monkeypatch.context() as patch:
        patch.setattr("trimodal.sets.folder.read_folder", lambda *_: pytest.fail("read again"))
        assert read_tables(config_of(root.parent), SPLITS)["train"].digest() == tables["train"].digest()
    (root / "1.txt").write_text("another")
    texts = [text for table in read_tables(config_of(root.parent), SPLITS).values() for text in table.captions.tolist()]
    assert texts == ["another"]
