"""Which pictures may be mirrored in training: those of which everything that is said stays true.

    may_mirror(table)     # bool [n]

All captions have to be English: only there is it known which words mirroring makes false. A caption counts as English
by its words, which needs no model of languages; where that is not certain, the picture is not mirrored.
"""

import re

import numpy as np

from trimodal.data.samples import SampleTable

ENGLISH_SETS = frozenset({"coco", "clotho", "audiocaps", "stamps", "synthetic"})  # others may be in any language
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

# Words that are English and, as far as they are common there, nothing else that is written in Latin letters.
_ENGLISH = frozenset("""
the and with are from have having her their its this that these those there they them who which what while when where
into onto off out up down by behind beside next near back above below between through around across along against
outside inside together other another some several many few each two three four five seven eight nine ten group bunch
full small little short huge tiny young new white black red blue green yellow brown gray grey purple silver dark
bright colorful colourful wooden empty closed dirty clean cut sliced cooked boy boys girl girls woman women child
children people guy lady mother father family friends crowd player players rider riders skier surfer dog dogs cat cats
puppy kitten bird birds duck horse horses cow cows sheep goat bear bears elephant elephants giraffe giraffes zebra
zebras lion monkey rabbit mouse fish chicken bike bikes bicycle bicycles cars truck trucks plane planes airplane
airplanes boat boats ship motorcycle motorcycles buses road streets sidewalk bridge building buildings house houses
kitchen bathroom bedroom living room school church tower airport beach ocean river field fields grass grassy tree
trees forest mountain mountains hill hills snow snowy rocks sky cloud clouds sun rain surfboard wave waves slope
slopes kite kites game racket skis board boards skating skateboarder snowboarder beds chair chairs couch desk bench
shelf floor wall walls window windows doors mirror sink bathtub oven stove refrigerator fridge microwave keyboard
phone cell screen television remote book books paper bags bottle bottles cup cups glasses bowl plate plates knife fork
spoon food meal breakfast dinner bread cheese cake cakes meat rice salad soup apple apples broccoli carrot carrots
vegetable vegetables donut donuts shirt shirts jacket coat dress shoes hats tie umbrella umbrellas suit toy toys teddy
stuffed clock clocks vase flower flowers plant plants leaf leaves sign signs light lights traffic hydrant fence
picture pictures view background foreground stands standing sits sitting lying laying walks walking runs running rides
riding flies flying holds holding looks looking wears wearing eats eating plays playing drives driving jumps jumping
watches watching swims swimming sleeps sleeping sit lie walk run ride fly hold look wear eat play drive jump watch
swim sleep hanging being shows showing made filled covered topped parked dressed sat very about ready getting trying
using waiting going doing talking taking cutting preparing posing smiling throwing catching hitting swinging skiing
surfing snowboarding skateboarding grazing drinking cooking reading crossing leaning way day night time side middle
head hands feet legs hair eyes body trunk tail wing wings nose mouth circle square triangle star shape drawing
painting cartoon icon symbol photograph stamp squares circles thing things object objects upright sideways somebody
animal animals clothes
""".split())
# Known English words that other languages have as well: they count, but prove nothing.
_SHARED = frozenset("""
a an in on is of at to as or for it be was were he she we i me my you your our us not no so one man men all over under
his him can will do does has hat arm hand ball water park bus train car van door sofa pizza banana orange bar hotel
restaurant table fruit photo image rose long grand top best big high low air land wild zoo baby bat set line lines
ring sport surf ski skate sandwich village cage page couple parent parents video camera winter summer stand start plus
person double old hot post area street color colour wine modern party statue stone steel metal plastic piece piano
guitar large bed stop pole sand wind rock pair lot six front station office jet pink golden open lunch toilet computer
laptop baseball tennis basketball football soccer snowboard skateboard frisbee tv face lies taken meter fire bag tall
sea trains tables oranges bananas fruits sandwiches parking glass end lake
""".split())
_KNOWN = _ENGLISH | _SHARED
# Words that make a caption one of another language.
_FOREIGN = frozenset("""
un une le la les des du et est dans sur avec au aux pour deux chien chat der das den dem ein eine einer einem einen
eines und ist im mit auf von zwei hund el los las una uno del en por para es y dos perro gato il lo gli di che sul
sulla nel nella della due um uma os em com dois ao na da een het op de twee ett och som med og til av pa bir ve ile
iki yang dan dua seekor sebuah jest dwa pies kot si cu doi ang mga ng sa ni hao shi zai zhe zhi ge yi gou mao wo ta ga
wa inu neko egy az mot links rechts pod obok yuu
""".split())


def may_mirror(table: SampleTable) -> np.ndarray:
    """bool [n]: the sample has a picture, all its captions are English and stay true in a mirror, and so do its labels.

    A sample without captions is judged by its labels alone: true where none of them names a side.
    """
    allowed = table.has_image
    rows = np.flatnonzero(allowed & table.has_text)
    english = {name for code, name in enumerate(table.sources.names)
               if name in ENGLISH_SETS and not _is_translated(table, rows[table.sources.codes[rows] == code])}
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
    foreign = sum(not _FOREIGN.isdisjoint(_WORD.findall(text)) for text in texts)
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
    words = _WORD.findall(text)
    if not text.isascii() and _OTHER_CHARACTERS.search(text):
        return False
    if not _FOREIGN.isdisjoint(words) or _ENGLISH.isdisjoint(words):
        return False
    known = [word for word in words if word in _KNOWN or (len(word) > 5 and word.endswith("ing"))]
    return 2 * len(known) >= len(words)
