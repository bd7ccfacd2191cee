"""Emoji: the colour pictures of the font Noto Color Emoji, with the names and keywords that Unicode gives them in
English and Chinese (`data.languages`).

A picture is rendered once, when the set is completed. Which pictures are samples, their order, keys and splits follow
from the English names in either language.
"""

import hashlib
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trimodal.config import Config
from trimodal.data.samples import Sample
from trimodal.errors import UserError
from trimodal.files import remove_left, replacing
from trimodal.sets.base import Count, DataSet, File, Item, Source
from trimodal.sets.reading import download_command, draw_splits, existing, names_in, worded_captions

FONT, PICTURES = "NotoColorEmoji.ttf", "pictures"
FOLDERS = ("annotations", "annotationsDerived")  # lists of single characters, and of sequences
BETWEEN = {"en": ", ", "zh": "\u3001"}  # two keywords, by language
FONT_PX, PICTURE_PX = 109, (136, 128)  # the only size of the font's pictures, and what each then covers
NUMBER = 1_855
HELD_OUT = {"test": 0.1, "val": 0.1}
_SKIN_TONES = re.compile("[\U0001F3FB-\U0001F3FF]")


def lists_of(language: str) -> tuple[str, ...]:
    """The lists of names in `language`, below the set's folder."""
    return tuple(f"{folder}/{language}.xml" for folder in FOLDERS)


ENGLISH, LISTS = lists_of("en"), tuple(path for language in BETWEEN for path in lists_of(language))


def _package(name: str, version: str, size: int, sha256: str, count: Count, *taken: tuple[str, str],
             item: str = "") -> Item:
    file = f"{name}_{version}_all.deb"
    return Item(name=item or file, kind="deb", into="", subset="emoji", unpacked=size, counts=(count,),
                rules=(*taken, (f"usr/share/doc/{name}/copyright", f"COPYRIGHT.{name}")),
                files=(File(name=file, size=size, sha256=sha256, urls=(("official", f"apt:{name}={version}"),)),))


ITEMS = (
    _package("fonts-noto-color-emoji", "2.042-0+deb12u1", 9_893_872,
             "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
             Count(folder=".", suffix=".ttf", number=1), (f"usr/share/fonts/truetype/noto/{FONT}", FONT)),
    _package("unicode-cldr-core", "41-0.1", 16_938_208,
             "35d30d5d3bee4d8244e95236259c4c2a0db06e21bad696515751fcfeee4d0260",
             Count(folder=".", suffix=".xml", number=len(LISTS)),
             *((f"usr/share/unicode/cldr/common/{path}", path) for path in LISTS),
             item="unicode-cldr-core_en_zh"),  # a name of its own: 0.2.0 took the English lists alone
)


class Emoji(NamedTuple):
    text: str  # one character or a sequence
    name: str
    keywords: str  # "face, grin, grinning face" in English

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.text) + ".png"


def emoji_in(folder: Path, language: str = "en") -> list[Emoji]:
    """All emoji that Unicode's English lists name, in the order of these, with names and keywords in `language`;
    without variants of skin tone, but with letters and signs that the font has no image of.

    Raises:
        UserError: a list is damaged, or lacks the name of an emoji.
    """
    texts = [text for text in _annotations(folder, "en")[0] if not _SKIN_TONES.search(text)]
    names, keywords = _annotations(folder, language)
    if unnamed := [text for text in texts if text not in names]:
        raise UserError(f"{folder / lists_of(language)[0]}: no name of {unnamed[0]!r}; rename it and download the set "
                        "again")
    between = BETWEEN[language]
    return [Emoji(text, names[text], between.join(keywords.get(text, "").split(" | "))) for text in texts]


def _annotations(folder: Path, language: str) -> tuple[dict[str, str], dict[str, str]]:
    """The name of each emoji, and its keywords as "face | grin"."""
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for path in (folder / name for name in lists_of(language)):
        try:
            for node in ElementTree.parse(path).getroot().iter("annotation"):
                of_kind = names if node.get("type") == "tts" else keywords
                of_kind[node.attrib["cp"]] = node.text or ""
        except (ElementTree.ParseError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); rename it and download the set again") from None
    return names, keywords


def _render(folder: Path) -> None:
    """Write each picture that the font has, on white, to pictures/CODES.png, unless it is there.

    Raises:
        UserError: this Pillow cannot join the characters of a sequence.
    """
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise UserError("emoji: Pillow cannot draw flags and families here, as it finds no FriBiDi; install the "
                        "system's package libfribidi0")
    font = ImageFont.truetype(str(folder / FONT), FONT_PX)
    (folder / PICTURES).mkdir(exist_ok=True)
    remove_left(folder / PICTURES, r"[-0-9a-f]+\.png")  # of a run that was killed
    there = names_in(folder / PICTURES)
    for emoji in emoji_in(folder):
        if emoji.file_name not in there and font.getbbox(emoji.text) == (0, 0, *PICTURE_PX):
            picture = Image.new("RGB", PICTURE_PX, "white")
            ImageDraw.Draw(picture).text((0, 0), emoji.text, font=font, embedded_color=True)
            with replacing(folder / PICTURES / emoji.file_name) as file:
                picture.save(file, "PNG")


def _training_files(folder: Path) -> Iterator[str]:
    """Names of image files that are there to train on: all but the first 3, as few images may all be val and test."""
    return itertools.islice((name for name in sorted(names_in(folder / PICTURES)) if name.endswith(".png")), 3, None)


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """The captions are the name and all keywords. Of the pictures 10 % are test and 10 % val, drawn by their English
    names; those that look alike, as the flags of some countries do, are one sample with all their names."""
    wanted = ("zh",) if config.data.emoji_language == "zh" else config.data.languages
    for name in dict.fromkeys((FONT, *ENGLISH, *(path for language in wanted for path in lists_of(language)))):
        existing(root / name, config)
    there, alike = names_in(root / PICTURES), dict[str, list[Emoji]]()
    for emoji in emoji_in(root):
        if emoji.file_name in there:
            digest = hashlib.sha256((root / PICTURES / emoji.file_name).read_bytes()).hexdigest()
            alike.setdefault(digest, []).append(emoji)
    sides = draw_splits((same[0].name for same in alike.values()),
                        *(round(share * len(alike)) for share in HELD_OUT.values()))
    words = {language: {one.text: (one.name, one.keywords) for one in emoji_in(root, language)} for language in wanted}
    found = sum(map(len, alike.values()))
    if 100 * (NUMBER - found) > config.data.max_bad_pct * NUMBER:
        raise UserError(f"{root / PICTURES}: holds {found:,} of {NUMBER:,} pictures; get the others with: "
                        f"{download_command('emoji', config)}")
    for split in splits:
        for same in (same for same in alike.values() if sides[same[0].name] == split):
            captions = {language: worded_captions((text for one in same for text in texts[one.text]),
                                                  f"emoji {same[0].name}") for language, texts in words.items()}
            yield Sample(key=same[0].file_name.removesuffix(".png"), source="emoji", split=split,
                         image=str(root / PICTURES / same[0].file_name),
                         captions=tuple(itertools.chain(*captions.values())),
                         languages=tuple(language for language, texts in captions.items() for _ in texts))


_LICENCE = "pictures: SIL Open Font License 1.1, tools Apache-2.0 (Google); names: Unicode licence (Unicode, Inc.)"
SET = DataSet(
    name="emoji", order=6, licence=_LICENCE, also_in=("zh",), read=_read, splits="80, 10 and 10 % of the pictures",
    source=Source(
        name="emoji", title="Noto Color Emoji 2.042 with the English and Chinese names of CLDR 41",
        page="https://github.com/googlefonts/noto-emoji", licence=_LICENCE, items=ITEMS, defaults=("emoji",),
        in_all=False, note="1,855 pictures of one word or a few", required=(FONT, *ENGLISH),
        training_files=_training_files, finish=_render,
        made=(Count(folder=PICTURES, suffix=".png", number=NUMBER),)))
