"""Tux Paint stamps: drawings and photographs with captions, sound effects and spoken captions; the set of the demo."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from trimodal.config import FOLDS, Config, DataConfig
from trimodal.data.samples import Sample, normalise_caption
from trimodal.errors import UserError
from trimodal.sets import inventory
from trimodal.sets.base import Count, DataSet, File, Item, Source
from trimodal.sets.reading import (
    MAX_CAPTION_CHARS,
    download_command,
    draw_fold,
    in_languages,
    on_one_side,
    worded_captions,
)

_log = logging.getLogger(__name__)
VERSION = "2022.06.04"
PACKAGE = f"tuxpaint-stamps-default_{VERSION}-1_all.deb"
TARBALL = f"tuxpaint-stamps-{VERSION}.tar.gz"
CHINESE = "zh_CN.utf8="  # begins the line of a caption in simplified characters
MAX_LINES = 1_000  # of X.txt; the real ones have some 80, a language each
SYMBOLS = "symbols"  # the folder of letters, digits and signs, the easy part of the set
VAL = 0.1  # of the distinct captions; test is one of FOLDS parts of them

ITEMS = (
    Item(name=PACKAGE, kind="deb", into="", subset="stamps", unpacked=220_000_000,
         counts=tuple(Count(folder=".", suffix=suffix, number=number) for suffix, number in (
             (".png", 796), (".svg", 248), (".ogg", 7_858), (".wav", 15), (".dat", 528))),
         rules=(("usr/share/tuxpaint/stamps/", ""), ("usr/share/doc/tuxpaint-stamps-default/copyright", "COPYRIGHT")),
         files=(File(name=PACKAGE, size=160_880_444,
                     sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                     urls=(("official", f"apt:tuxpaint-stamps-default={VERSION}-1"),)),)),
    Item(name=TARBALL, kind="tar", into="", subset="stamps", unpacked=220_000_000,
         rules=(("*/stamps/", ""), ("*/docs/COPYING.txt", "COPYRIGHT")),
         files=(File(name=TARBALL, size=215_615_180,
                     sha256="842065576fae554358e00e51d71a492616a6490b12b592228067477c287a0bf8",
                     urls=(("official", "https://downloads.sourceforge.net/project/tuxpaint/tuxpaint-stamps/"
                                        f"{VERSION.replace('.', '-')}/{TARBALL}"),)),)),
)


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """Stamps with an English caption (line 1 of X.txt) and a picture X.png, a sound effect X.ogg or X.wav, or both.
    A few are drawn as X.svg alone, which nothing here renders: these give their sound. Nine in ten have a Chinese
    caption as well (the line zh_CN.utf8=...).

    The label is the top folder. Equal captions stand on one side: of the distinct captions of the whole set 20 % are
    test (`data.fold` says which) and 10 % val, so leaving out symbols/ (`data.stamps_symbols: false`) moves no stamp to
    another side. The English captions alone decide, whatever `data.languages` says, so that a stamp of test is one in
    each language; a Chinese caption that stands on several sides ("a mouse", "a rat") is left out of all but one.
    """
    found = list(_stamps(root))
    if not found:
        raise UserError(f"{root}: holds no captioned stamp; get them with: {download_command('stamps', config)}")
    english = [normalise_caption(stamp.captions[0]) for stamp in found]
    sides = draw_fold(english, config.data.fold, FOLDS, VAL)
    found = on_one_side(replace(stamp, split=sides[text]) for stamp, text in zip(found, english, strict=True))
    found = [in_languages(stamp, config.data.languages) for stamp in found]
    _say_lacking(found, config.data.languages)
    for split, stamp in itertools.product(splits, found):
        if stamp.split != split:
            continue
        if stamp.labels == (SYMBOLS,) and not config.data.stamps_symbols:
            continue
        audio = stamp.audio if stamp.audio and _audible(stamp.audio) else ""
        if stamp.image or audio:
            yield replace(stamp, audio=audio)


def _say_lacking(stamps: Sequence[Sample], wanted: Sequence[str]) -> None:
    """A line on the stamps that have no caption in a language that is wanted."""
    for language in wanted:
        if lacking := sum(language not in stamp.languages for stamp in stamps):
            _log.warning("stamps: %d of %d have no caption in %s", lacking, len(stamps), language)


def _stamps(root: Path) -> Iterator[Sample]:
    for folder, names in inventory.walk(root):
        there = set(names)

        def first_of(stem: str, *suffixes: str, folder: str = folder, there: set[str] = there) -> str:
            return next((os.path.join(folder, stem + suffix) for suffix in suffixes if stem + suffix in there), "")

        for stem in sorted(name[:-4] for name in names if name.endswith(".txt")):
            image, audio = first_of(stem, ".png"), first_of(stem, ".ogg", ".wav")
            if not image and not (audio and first_of(stem, ".svg")):
                continue
            captions = _captions(os.path.join(folder, stem + ".txt"))
            if "en" in captions:
                path = Path(folder, stem).relative_to(root)
                yield Sample(key=path.as_posix(), source="stamps", split="", image=image, audio=audio,
                             captions=tuple(captions.values()), languages=tuple(captions), labels=path.parts[:-1][:1])


def _captions(path: str) -> dict[str, str]:
    """The captions of X.txt by language: English in the first line, the first Chinese one further below."""
    found = dict[str, str]()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = iter(lambda: file.readline(MAX_CAPTION_CHARS + 1), "")
        for number, line in enumerate(itertools.islice(lines, MAX_LINES)):
            language, text = ("en", line) if number == 0 else ("zh", line.removeprefix(CHINESE))
            captions = worded_captions([text], path) if number == 0 or text != line else ()
            if captions:
                found.setdefault(language, captions[0])
    return found


def _audible(path: str) -> bool:
    """Whether a sound effect can be decoded and is not pure silence; four of the real ones are."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            return any(block.any() for block in file.blocks(1 << 14, dtype="float32"))
    except soundfile.LibsndfileError:
        return False


def _training_files(folder: Path) -> Iterator[str]:
    """Keys of stamps that are there to train on: all but the first 3, as few stamps may all be val and test."""
    return itertools.islice((stamp.key for stamp in _stamps(folder)), 3, None)


_LICENCE = "GPL-2, copyright 2002-2022 Bill Kendrick and the Tux Paint contributors"
def _problems(settings: DataConfig) -> list[str]:
    if not settings.fold or settings.datasets == ("stamps",):
        return []
    return [f"data.fold: {settings.fold} is a split of stamps alone, and datasets are {', '.join(settings.datasets)}; "
            "leave it out, or train on stamps"]


SET = DataSet(
    name="stamps", order=5, licence=_LICENCE, also_in=("zh",), read=_read, problems=_problems,
    splits="70, 10 and 20 % of the distinct captions",
    without_label={"stamps_without_symbols": SYMBOLS},
    source=Source(
        name="stamps", title=f"Tux Paint stamps {VERSION}-1", page="https://sourceforge.net/projects/tuxpaint",
        licence=_LICENCE, items=ITEMS, defaults=("stamps",), in_all=False, one_of=True,
        note="785 captioned pictures, 134 sound effects, spoken captions in many languages",
        training_files=_training_files))
