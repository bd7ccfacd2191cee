"""Which images may be flipped horizontally in training: those whose captions and labels stay true of the mirror image.

    may_mirror(table, english_sets)     # bool [n]

All captions have to be English or Chinese, as only for these it is known which words mirroring makes false ("left",
"reads", 左). Lists of words decide whether a caption is English, and its writing whether it is Chinese, without a
language model; in doubt the image is not mirrored.
"""

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from trimodal.data.samples import SampleTable

# There are translations of English data sets under the same names. Of each set some captions are probed, and it counts
# as translated where more than this share of them holds a word of another language.
PROBED_CAPTIONS, FOREIGN_SHARE = 200, 0.2

_WITHIN_NAME = re.compile(r"(?<=[a-z])(?=[A-Z])")  # "armLeft"
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_OTHER_CHARACTERS = re.compile(r"[^\x00-\x7f\u2018\u2019\u201c\u201d\u2010-\u2014\u2026]")  # no English writing

# What mirroring makes false. Sides, alone and in compounds ("left-hand", "topleft", "arm_left"), turning and the
# compass, single letters l and r; writing, numbers and times that a caption quotes; flags.
_SIDE = (r"(?<![a-z])(?:top|bottom|upper|lower|front|rear|back|far|mid)?(?:left|right)(?!overs?(?![a-z])|eous|ful)"
         r"[a-z]*"
         r"|(?<![a-z])(?:(?:counter|anti)?clockwise|starboard|southpaws?|(?:mid)?(?:east|west)(?:ern|wards?)?"
         r"|(?:north|south)(?:east|west)(?:ern)?)(?![a-z])|(?<![a-z0-9])[lr](?![a-z0-9'])")
_FALSE_IN_A_MIRROR = re.compile(
    _SIDE + r"|(?<![a-z])(?:says?|saying|reads|written|writing|handwrit\w+|words?|letter(?:s|ing)?|texts?|alphabets?"
    r"|spell(?:s|ed|ing)|numbers?(?! of )|numbered|numerals?|digits?|initials|logos?|maps?|flags?|o'clock)(?![a-z])"
    r"|[\"\u201c\u201d]|\d:\d\d")
# Nothing but Chinese characters, their signs and digits: kana would make it Japanese, Latin letters may be anything.
_CHINESE = re.compile(r"(?=.*[\u3400-\u9fff])"
                      r"[\u3400-\u9fff\u3000-\u301f\uff00-\uff20\u2010-\u2026\s\d!-/:-@\[-`{-~]+", re.S)
# Sides and the compass (in any word: 东西 too), turning; writing, numbers, signs, maps, flags, times, quotes.
_FALSE_IN_A_CHINESE_MIRROR = re.compile(
    r"[左右东東西字文写寫号號旗]|[时時][针針]|[点點][钟鐘]|[标標商][志誌签籤语語]|商[标標]|地[图圖]|[\u300a-\u300f「」]|\d[:\uff1a]\d\d")
# Labels are single words, which tell no language: left and right, in those that are written most.
_SIDE_ELSEWHERE = re.compile(
    r"[左右]|왼|오른|ซ้าย|ขวา|बाए|दाए|बाय|दाय|يسار|يمين|چپ|راست|שמאל|ימין|лев[аоыу]|прав[аоыу]|слева|справа|αριστερ|δεξι"
    r"|gauche|droite|izquierd|derech|esquerd|direit[ao]|sinistr|destr[ao]|stâng|dreapt|vänster|höger|venstre|højre|høyre"
    r"|(?<![a-z])(?:links?|rechts?|linke[nrs]?|rechte[nrs]?|lew[aeoy]|praw[aeoy]|kiri|kanan|sol|sağ|bal|jobb|vasen"
    r"|oikea|trái|phải|zuo|you)(?![a-z])")


@functools.cache
def _words() -> dict[str, frozenset[str]]:
    """The word lists of mirroring_words.json: "english" words that are common in no other language in Latin letters,
    "shared" ones that other languages have too, and "foreign" ones that no English caption holds."""
    lists = json.loads(Path(__file__).with_name("mirroring_words.json").read_text("utf-8"))
    return {name: frozenset(words) for name, words in lists.items()}


def may_mirror(table: SampleTable, english_sets: Collection[str]) -> np.ndarray:
    """For each sample, bool [n]: it has an image, its captions are English or Chinese and stay true of the mirror
    image, and no label names a side. `english_sets`: names of data sets whose captions are published in English."""
    allowed = table.has_image
    rows = np.flatnonzero(allowed & table.has_text)
    english = {name for code, name in enumerate(table.sources.names)
               if name in english_sets and not _is_translated(table, rows[table.sources.codes[rows] == code])}
    for row in rows.tolist():
        known = table.sources[row] in english
        allowed[row] = all(stays_true(text, known_english=known) for text in table.captions_of(row))
    sided = np.array([not names_no_side(name) for name in table.labels.names], bool)
    if sided.any():
        owners = np.repeat(np.arange(len(table)), np.diff(table.label_offsets))
        allowed[owners[sided[table.labels.codes]]] = False
    return allowed


def _is_translated(table: SampleTable, rows: np.ndarray) -> bool:
    """Whether the captions of these samples (all of one data set) seem to be translated from English.

    Looks at the first captions of evenly spaced samples. About one English caption in a hundred holds a word of
    another language, far below FOREIGN_SHARE.
    """
    probed = rows[:: max(1, len(rows) // PROBED_CAPTIONS)]
    texts = [table.captions[table.caption_offsets[row]].lower() for row in probed.tolist()]
    foreign = sum(not _words()["foreign"].isdisjoint(_WORD.findall(text)) for text in texts)
    return foreign > FOREIGN_SHARE * len(texts)


def stays_true(caption: str, *, known_english: bool = False) -> bool:
    """Whether a caption is English or Chinese, and names nothing that mirroring changes: a side, writing, numbers...

    `known_english`: the caption's data set is English, so an ASCII caption counts as English without a look at its
    words; one with other characters is still checked, as single captions may be translated.
    """
    text = caption.lower()
    if _CHINESE.fullmatch(text):
        return not _FALSE_IN_A_MIRROR.search(text) and not _FALSE_IN_A_CHINESE_MIRROR.search(text)
    return not _FALSE_IN_A_MIRROR.search(text) and ((known_english and text.isascii()) or is_english(text))


def names_no_side(label: str) -> bool:
    """Whether a label, in any common language, names nothing that mirroring changes, such as left or right."""
    text = _WITHIN_NAME.sub(" ", label).lower()
    return not (_FALSE_IN_A_MIRROR.search(text) or _SIDE_ELSEWHERE.search(text))


def is_english(text: str) -> bool:
    """Whether a text looks English: at least half of its words are known to be, one of them is in no other language's
    list, and none is foreign. A character outside ASCII, but for typographic quotes and dashes, makes it foreign."""
    text = text.lower().replace("\u2019", "'")
    words, lists = _WORD.findall(text), _words()
    if not text.isascii() and _OTHER_CHARACTERS.search(text):
        return False
    if not lists["foreign"].isdisjoint(words) or lists["english"].isdisjoint(words):
        return False
    known = [word for word in words if word in lists["english"] or word in lists["shared"]
             or (len(word) > 5 and word.endswith("ing"))]
    return 2 * len(known) >= len(words)
