"""Which pictures may be mirrored in training: those of which everything that is said stays true.

    may_mirror(table, english_sets)     # bool [n]

All captions have to be English: only there is it known which words mirroring makes false. A caption counts as English
by its words, which needs no model of languages; where that is not certain, the picture is not mirrored.
"""

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from trimodal.data.samples import SampleTable

LOOKED_AT, FOREIGN_SHARE = 200, 0.2  # captions of such a set, for there are translations under the same names; and how
# many of them may hold a word of another language

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
# Labels are single words, which tell no language: left and right, in those that are written most.
_SIDE_ELSEWHERE = re.compile(
    r"[左右]|왼|오른|ซ้าย|ขวา|बाए|दाए|बाय|दाय|يسار|يمين|چپ|راست|שמאל|ימין|лев[аоыу]|прав[аоыу]|слева|справа|αριστερ|δεξι"
    r"|gauche|droite|izquierd|derech|esquerd|direit[ao]|sinistr|destr[ao]|stâng|dreapt|vänster|höger|venstre|højre|høyre"
    r"|(?<![a-z])(?:links?|rechts?|linke[nrs]?|rechte[nrs]?|lew[aeoy]|praw[aeoy]|kiri|kanan|sol|sağ|bal|jobb|vasen"
    r"|oikea|trái|phải|zuo|you)(?![a-z])")


@functools.cache
def _words() -> dict[str, frozenset[str]]:
    """Word lists of mirroring_words.json: `english` words that are common in no other language in Latin letters,
    `shared` ones that others have as well, which prove nothing, and `foreign` ones that make a caption another's."""
    lists = json.loads(Path(__file__).with_name("mirroring_words.json").read_text("utf-8"))
    return {name: frozenset(words) for name, words in lists.items()}


def may_mirror(table: SampleTable, english_sets: Collection[str]) -> np.ndarray:
    """bool [n]: the sample has a picture, all its captions are English and stay true in a mirror, and so do its labels.

    A sample without captions is judged by its labels alone: true where none of them names a side.
    """
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
    """Whether many of some captions hold a word of another language; of English captions it is one in a hundred."""
    some = rows[:: max(1, len(rows) // LOOKED_AT)]
    texts = [table.captions[table.caption_offsets[row]].lower() for row in some.tolist()]
    foreign = sum(not _words()["foreign"].isdisjoint(_WORD.findall(text)) for text in texts)
    return foreign > FOREIGN_SHARE * len(texts)


def stays_true(caption: str, *, known_english: bool = False) -> bool:
    """Whether a caption is English, and says nothing that the mirrored picture would not show. `known_english`: the set
    is; of its captions only those with other characters are looked at, for there are translations of such sets."""
    text = caption.lower()
    return not _FALSE_IN_A_MIRROR.search(text) and ((known_english and text.isascii()) or is_english(text))


def names_no_side(label: str) -> bool:
    text = _WITHIN_NAME.sub(" ", label).lower()
    return not (_FALSE_IN_A_MIRROR.search(text) or _SIDE_ELSEWHERE.search(text))


def is_english(text: str) -> bool:
    """Whether half of the words are known to be English, one of them in no other language, and none is another's."""
    text = text.lower().replace("\u2019", "'")
    words, lists = _WORD.findall(text), _words()
    if not text.isascii() and _OTHER_CHARACTERS.search(text):
        return False
    if not lists["foreign"].isdisjoint(words) or lists["english"].isdisjoint(words):
        return False
    known = [word for word in words if word in lists["english"] or word in lists["shared"]
             or (len(word) > 5 and word.endswith("ing"))]
    return 2 * len(known) >= len(words)
