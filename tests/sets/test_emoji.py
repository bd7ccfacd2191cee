"""The emoji set: names from Unicode's lists, pictures made once from the font, equal ones on one side."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, features

from tests import miniature
from tests.loopback import Loopback
from tests.refusals import refused
from trimodal.config import Config, load_config
from trimodal.data.samples import SPLITS, Sample
from trimodal.download.acquire import acquire
from trimodal.download.http import Policy
from trimodal.download.selection import Options
from trimodal.sets import SOURCES, emoji, read_splits
from trimodal.sets.base import Source

SYSTEM_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMED = {"\U0001F436": ("dog face", "dog | face | pet"), "\U0001F431": ("cat face", "cat | face | pet"),
         "\U0001F44B": ("waving hand", "hand | wave"), "\U0001F44B\U0001F3FB": ("waving hand: light skin tone", "hand"),
         "_": ("low line", "dash | line")}
CHINESE = {"\U0001F436": ("狗脸", "宠物 | 狗 | 狗脸"), "\U0001F431": ("猫脸", "猫 | 猫脸"),
           "\U0001F44B": ("挥手", "手"), "_": ("低线", "横线")}
CHINESE_FLAGS = {"\U0001F1F3\U0001F1F4": ("旗: 挪威", "旗"), "\U0001F1E7\U0001F1FB": ("旗: 布韦岛", "旗")}
FLAGS = {"\U0001F1F3\U0001F1F4": ("flag: Norway", "flag"), "\U0001F1E7\U0001F1FB": ("flag: Bouvet Island", "flag")}


def xml(named: dict[str, tuple[str, str]]) -> str:
    rows = [f'<annotation cp="{text}">{words}</annotation><annotation cp="{text}" type="tts">{name}</annotation>'
            for text, (name, words) in named.items()]
    return f"<ldml><annotations>{''.join(rows)}</annotations></ldml>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The set with six small pictures, of which the flags are equal, and one that only has a name."""
    folder = tmp_path / "emoji"
    for name, named in zip(emoji.LISTS, (NAMED, FLAGS, CHINESE, CHINESE_FLAGS), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(xml(named), "utf-8")
    (folder / emoji.FONT).write_bytes(b"not read")
    (folder / emoji.PICTURES).mkdir()
    for number, one in enumerate(emoji.emoji_in(folder)):
        if one.text != "_":
            colour = (0, 0, 9) if one.name.startswith("flag") else (20 * number, 200, 0)
            Image.new("RGB", (8, 8), colour).save(folder / emoji.PICTURES / one.file_name)
    return folder


def setting(root: Path, max_bad_pct: float = 100, language: str = "en") -> Config:
    return load_config(None, [f"paths.data_root={str(root.parent)!r}", f"data.max_bad_pct={max_bad_pct}",
                              f"data.emoji_language={language}"])


def read(root: Path, language: str = "en") -> list[Sample]:
    return list(read_splits("emoji", SPLITS, setting(root, language=language)))


def test_names_and_keywords_are_captions_and_shades_of_skin_are_left_out(root: Path) -> None:
    captions = {sample.key: sample.captions for sample in read(root)}
    assert captions == {"1f436": ("dog face", "dog, face, pet"), "1f431": ("cat face", "cat, face, pet"),
                        "1f44b": ("waving hand", "hand, wave"),
                        "1f1f3-1f1f4": ("flag: Norway", "flag", "flag: Bouvet Island", "flag")}


def test_chinese_names_are_captions_of_the_same_samples(root: Path) -> None:
    english, chinese = read(root), read(root, "zh")
    assert [replace(sample, captions=(), languages=()) for sample in chinese] == [
        replace(sample, captions=(), languages=()) for sample in english]
    assert {sample.key: sample.captions for sample in chinese} == {
        "1f436": ("狗脸", "宠物、狗、狗脸"), "1f431": ("猫脸", "猫、猫脸"), "1f44b": ("挥手", "手"),
        "1f1f3-1f1f4": ("旗: 挪威", "旗", "旗: 布韦岛", "旗")}
    with refused("data.emoji_language", "'de'", "'en'", "'zh'"):
        setting(root, language="de")
    (root / "annotations/zh.xml").write_text(xml({"_": CHINESE["_"]}), "utf-8")
    with refused(root / "annotations/zh.xml", repr("\U0001F436")):
        read_splits("emoji", ["train"], setting(root, language="zh"))
    (root / "annotations/zh.xml").unlink()
    assert read(root) == english  # English needs its own lists alone
    with refused(root / "annotations/zh.xml", "--datasets emoji"):
        read_splits("emoji", ["train"], setting(root, language="zh"))


def test_both_languages_are_captions_of_one_picture(root: Path) -> None:
    config = load_config(None, [f"paths.data_root={str(root.parent)!r}", "data.max_bad_pct=100",
                                "data.languages=[en, zh]"])
    found = {sample.key: sample for sample in read_splits("emoji", SPLITS, config)}
    assert found["1f431"].captions == ("cat face", "cat, face, pet", "猫脸", "猫、猫脸")
    assert found["1f431"].languages == ("en", "en", "zh", "zh")
    assert [s.split for s in found.values()] == [s.split for s in read(root)]


def test_sides_follow_from_the_names_alone(root: Path) -> None:
    sides = {sample.key: sample.split for sample in read(root)}
    shutil.copytree(root, root.parent / "other/emoji")
    assert {sample.key: sample.split for sample in read(root.parent / "other/emoji")} == sides
    assert all(Path(sample.image).is_file() for sample in read(root))


def test_missing_pictures_and_damaged_lists_are_told(root: Path) -> None:
    with refused(root / emoji.PICTURES, 5, f"{emoji.NUMBER:,}", "--datasets emoji"):
        read_splits("emoji", ["train"], setting(root, 5))
    (root / emoji.ENGLISH[1]).write_text("<ldml>", "utf-8")
    with refused(root / emoji.ENGLISH[1]):
        read_splits("emoji", ["train"], setting(root))


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def test_what_is_made_of_the_packages_is_made_once_and_again_where_it_is_gone(root: Path, server: Loopback,
                                                                             tmp_path: Path) -> None:
    """The real download, with a stand-in for the drawing."""
    calls = []

    def draw(folder: Path) -> None:
        calls.append(folder)
        shutil.copytree(root / emoji.PICTURES, folder / emoji.PICTURES, dirs_exist_ok=True)

    font, names = SOURCES["emoji"].items
    source, served = miniature.shrink("emoji", {
        font.name: {font.rules[0][0]: b"a font"},
        names.name: {where: (root / name).read_bytes() for where, name in names.rules if name in emoji.LISTS}},
        tmp_path)
    made = replace(source.made[0], number=5)
    source = replace(source, finish=draw, made=(made,))
    server.files |= {f"/{name}": data for name, data in served.items()}
    data = tmp_path / "data"

    def run(source: Source, *, skip_existing: bool = False) -> str:
        return acquire(source, Options(data_root=data, base_urls={"emoji": server.url()}, policy=Policy(failures=1),
                                       skip_existing=skip_existing)).state

    assert run(source) == "done" and len(calls) == 1
    assert run(source, skip_existing=True) == "skipped" and len(calls) == 1
    next((data / "emoji" / emoji.PICTURES).iterdir()).unlink()
    assert run(source, skip_existing=True) == "done" and len(calls) == 2
    assert len(list((data / "emoji" / emoji.PICTURES).iterdir())) == 5


@pytest.mark.skipif(not SYSTEM_FONT.is_file() or not features.check("raqm"), reason="needs fonts-noto-color-emoji")
def test_the_font_draws_what_it_has(root: Path) -> None:
    shutil.copy(SYSTEM_FONT, root / emoji.FONT)
    finish = SOURCES["emoji"].finish
    assert finish
    (root / emoji.PICTURES / "1f44b.png").unlink()
    before = {path.name: path.read_bytes() for path in (root / emoji.PICTURES).iterdir()}
    (root / emoji.PICTURES / "1f44b.png.1.tmp").write_bytes(b"of a run that was killed")
    finish(root)
    after = {path.name: path.read_bytes() for path in (root / emoji.PICTURES).iterdir()}
    assert after.keys() == before.keys() | {"1f44b.png"} and before.items() <= after.items()
    assert Image.open(root / emoji.PICTURES / "1f44b.png").size == emoji.PICTURE_PX
