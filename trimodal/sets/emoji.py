"""Emoji: the colour pictures of the font Noto Color Emoji, with the English names and keywords that Unicode gives them.

A picture is rendered once, when the set is completed. Chinese names come with the same package and are no captions: of
the 1,855 only 36 can be written with the default vocabulary, and 774 would be told apart.
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
NAMES = ("annotations/en.xml", "annotationsDerived/en.xml")  # single characters and sequences
FONT_PX, PICTURE_PX = 109, (136, 128)  # the only size of the font's pictures, and what each then covers
NUMBER = 1_855
HELD_OUT = {"test": 0.1, "val": 0.1}
_SKIN_TONES = re.compile("[\U0001F3FB-\U0001F3FF]")


def _package(name: str, version: str, size: int, sha256: str, count: Count, *taken: tuple[str, str]) -> Item:
    file = f"{name}_{version}_all.deb"
    return Item(name=file, kind="deb", into="", subset="emoji", unpacked=size, counts=(count,),
                rules=(*taken, (f"usr/share/doc/{name}/copyright", f"COPYRIGHT.{name}")),
                files=(File(name=file, size=size, sha256=sha256, urls=(("official", f"apt:{name}={version}"),)),))


ITEMS = (
    _package("fonts-noto-color-emoji", "2.042-0+deb12u1", 9_893_872,
             "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
             Count(folder=".", suffix=".ttf", number=1), (f"usr/share/fonts/truetype/noto/{FONT}", FONT)),
    _package("unicode-cldr-core", "41-0.1", 16_938_208,
             "35d30d5d3bee4d8244e95236259c4c2a0db06e21bad696515751fcfeee4d0260",
             Count(folder=".", suffix=".xml", number=len(NAMES)),
             *((f"usr/share/unicode/cldr/common/{name}", name) for name in NAMES)),
)


class Emoji(NamedTuple):
    text: str  # one character or a sequence
    name: str
    keywords: str  # "face, grin, grinning face"

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.text) + ".png"


def emoji_in(folder: Path) -> list[Emoji]:
    """All emoji that Unicode's lists name, in the order of the lists, with their names and keywords; without variants
    of skin tone, but with letters and signs that the font has no image of.

    Raises:
        UserError: a list is damaged.
    """
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for path in (folder / name for name in NAMES):
        try:
            for node in ElementTree.parse(path).getroot().iter("annotation"):
                text, description = node.attrib["cp"], node.text or ""
                if node.get("type") == "tts":
                    names[text] = description
                else:
                    keywords[text] = description.replace(" | ", ", ")
        except (ElementTree.ParseError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); rename it and download the set again") from None
    return [Emoji(text, name, keywords.get(text, "")) for text, name in names.items() if not _SKIN_TONES.search(text)]


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
    """The captions are the name and all keywords. Of the pictures 10 % are test and 10 % val, drawn by their names;
    those that look alike, as the flags of some countries do, are one sample with all their names."""
    for name in (FONT, *NAMES):
        existing(root / name, config)
    there, alike = names_in(root / PICTURES), dict[str, list[Emoji]]()
    for emoji in emoji_in(root):
        if emoji.file_name in there:
            digest = hashlib.sha256((root / PICTURES / emoji.file_name).read_bytes()).hexdigest()
            alike.setdefault(digest, []).append(emoji)
    sides = draw_splits((same[0].name for same in alike.values()),
                        *(round(share * len(alike)) for share in HELD_OUT.values()))
    found = sum(map(len, alike.values()))
    if 100 * (NUMBER - found) > config.data.max_bad_pct * NUMBER:
        raise UserError(f"{root / PICTURES}: holds {found:,} of {NUMBER:,} pictures; get the others with: "
                        f"{download_command('emoji', config)}")
    for split in splits:
        for first, *others in alike.values():
            if sides[first.name] == split:
                texts = (text for one in (first, *others) for text in (one.name, one.keywords))
                yield Sample(key=first.file_name.removesuffix(".png"), source="emoji", split=split,
                             image=str(root / PICTURES / first.file_name),
                             captions=worded_captions(texts, f"emoji {first.name}"))


_LICENCE = "pictures: SIL Open Font License 1.1, tools Apache-2.0 (Google); names: Unicode licence (Unicode, Inc.)"
SET = DataSet(
    name="emoji", order=6, licence=_LICENCE, read=_read, splits="80, 10 and 10 % of the pictures",
    source=Source(
        name="emoji", title="Noto Color Emoji 2.042 with the names of CLDR 41",
        page="https://github.com/googlefonts/noto-emoji", licence=_LICENCE, items=ITEMS, defaults=("emoji",),
        in_all=False, note="1,855 pictures of one word or a few", required=(FONT, *NAMES),
        training_files=_training_files, finish=_render,
        made=(Count(folder=PICTURES, suffix=".png", number=NUMBER),)))
