"""One list with ten troubles that people report: the doctor names each in a line of its own."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests import trees
from tests.refusals import assert_names
from tests.test_doctor import case_of
from trimodal import doctor
from trimodal.doctor import Finding
from trimodal.errors import counted

RATE_HZ = 16_000
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
CHINESE = "一只狗在草地上奔跑和玩耍"


def troubled(folder: Path) -> Path:
    """A list of 40 good pictures and 20 good sounds, and the troubles."""
    rows = [*_good(folder), *_troubles(folder)]
    with (folder / "own.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "audio", "text", "labels", "split"])
        writer.writerows(rows)
    return folder / "own.csv"


def _picture(folder: Path, name: str) -> str:
    return trees.picture(folder / name, colour=(len(name) * 9, sum(name.encode()) % 250, 90), size=(48, 40)).name


def _good(folder: Path) -> Iterator[list[str]]:
    for i in range(40):
        yield [_picture(folder, f"{i}.png"), "", f"a picture with the number {i}", "thing", "train"]
    for i in range(20):
        yield ["", trees.sound(folder / f"{i}.wav", trees.tone(0.2, hz=300 + 20 * i)).name, f"tone {i}", "", "train"]
    for i in range(6):
        yield [_picture(folder, f"test{i}.png"), "", f"a test picture with the number {i}", "", "test"]


def _troubles(folder: Path) -> Iterator[list[str]]:
    for k in range(5):
        yield ["0.png", "", f"the first picture, said in way {k}", "thing", "train"]
    yield [_picture(folder, "list.png"), "", "['a dog', 'a dog on grass']", "['thing']", "train"]
    tone = trees.tone(0.2)
    soundfile.write(folder / "opposite.wav", np.stack([tone, -tone], 1), RATE_HZ)
    yield ["", "opposite.wav", "a tone in two channels", "", "train"]
    yield [_picture(folder, "val.png"), "", "the only picture to validate on", "", "val"]
    profile = np.random.default_rng(0).bytes(3_000_000)
    Image.new("RGB", (48, 40), (9, 99, 9)).save(folder / "profile.png", icc_profile=profile)
    yield ["profile.png", "", "a photograph from an editor", "", "train"]
    for k in range(2):
        yield [f"gone{k}.png", "", f"picture {k} that did not come", "", "train"]
    yield [_picture(folder, "long.png"), "", " ".join(["word"] * 90), "", "train"]
    for k in range(4):
        yield [_picture(folder, f"chinese{k}.png"), "", CHINESE, "", "train"]
    soundfile.write(folder / "loud.wav", 16_400 * tone / tone.max(), RATE_HZ, subtype="FLOAT")
    yield ["", "loud.wav", "a loud tone", "", "train"]
    (folder / "pointer.jpg").write_text(POINTER)
    (folder / "page.wav").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    (folder / "empty.png").touch()
    (folder / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    yield from ([name, "", "a photograph", "", "train"] for name in ("pointer.jpg", "empty.png", "phone.jpg"))
    yield ["", "page.wav", "a page", "", "train"]
    for k, text in enumerate(("nan", "None", "null")):
        yield [_picture(folder, f"empty_cell{k}.png"), "", text, "", "train"]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    folder = tmp_path_factory.mktemp("troubled")
    case = case_of(folder, "data.datasets=[manifest]", f"data.manifest={troubled(folder)}")
    return [*doctor.check_data(case), *doctor.check_files(case)]


@pytest.mark.parametrize(("check", "words", "names"), [
    ("data: manifest", ("same file", "one sample"), (6, 1)),  # the five lines and the first of this picture
    ("data: manifest", ("a list", "JSON"), (2,)),  # of captions and of labels
    ("files: manifest", ("channels", "cancel"), (1, "opposite.wav")),
    ("data: val", ("no validation", "best"), ()),
    ("files: manifest", ("damage", "metadata"), (1, "profile.png")),
    ("data: manifest", ("not there",), (2, "gone0.png", "gone1.png")),
    ("data: captions", ("longer", "cut"), ()),
    ("data: captions", ("words", "[UNK]"), ()),
    ("files: manifest", ("louder",), (1, "loud.wav", "16,400")),
    ("files: manifest", ("Git LFS",), (1, "pointer.jpg")),
    ("files: manifest", ("web page",), (1, "page.wav")),
    ("files: manifest", ("HEIC",), (1, "phone.jpg")),
    ("files: manifest", ("empty",), (1, "empty.png")),
    ("data: captions", ("empty cells",), (3, "nan", "None", "null")),
])
def test_each_trouble_is_named_in_one_line(
        findings: list[Finding], check: str, words: tuple[str, ...], names: tuple[str | int, ...]) -> None:
    lines = [line for one in findings if one.check == check for line in one.found.splitlines()]
    (line,) = [line for line in lines if all(word.lower() in line.lower() for word in words)]
    assert_names(line, *names)


def test_one_thing_is_no_plural(findings: list[Finding]) -> None:
    said = " ".join(f"{one.found} {one.advice}" for one in findings)
    assert re.search(r"\b1 sound\b", said) and not re.search(r"(?<![\d.,-])1 (?!times)[a-z]+s\b", said)
    assert [counted(n, "entry", "entries") for n in (0, 1, 1200)] == ["0 entries", "1 entry", "1,200 entries"]
