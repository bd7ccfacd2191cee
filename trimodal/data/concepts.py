"""The classes of the concept classifier: names of labels that the sets bring, then the commonest words of the captions.

    names = concept_names(tables["train"], limit=1000)
    ids, offsets = concepts_of(tables["val"], names)      # concepts of sample i: ids[offsets[i]:offsets[i + 1]]
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trimodal.data.samples import SampleTable, normalise_caption, offsets_of
from trimodal.errors import UserError

# Words of three letters and more that name nothing to see or hear. Short on purpose: frequency decides the rest.
STOP_WORDS = frozenset("""
about after against all along also and another any are around away back because before behind being beside between both
but can could did does doing down during each few for from get gets getting goes going had has have having her here him
his how into its itself just kind made make makes making many more most much near next not off once one onto other
others our out outside over own some someone something she such taken taking than that the their them then there these
they thing things this those three through together too toward towards two under until upon use used using various very
was were what when where which while who whose will with within without you your
""".split())
# Chinese is written without blanks: a run of characters between those that only count, point or join is a word where it
# has one or two, and each two neighbours of a longer one are.
_HAN = "\u3400-\u9fff"
_STOP_CHARACTERS = "一二两三四五六七八九十几个只条张片朵颗棵匹辆架艘座幅位件的在和与了着是有这那些们"
_WORD = re.compile(rf"[^\W\d_{_HAN}]{{3,}}|(?:(?![{_STOP_CHARACTERS}])[{_HAN}])+")


def concept_names(train: SampleTable, limit: int) -> list[str]:
    """Labels that the sets bring, by name, then the commonest content words of the captions, at most `limit`.

    A word counts once per sample and must stand in two samples; ties go by alphabet.

    Raises:
        UserError: more labels than `limit`.
    """
    labels = sorted({name.lower() for name in train.labels.names})
    if len(labels) > limit:
        raise UserError(f"model.num_classes: {limit} is fewer than the {len(labels)} labels that the data sets bring; "
                        f"set it to at least {len(labels)}")
    counts: Counter[str] = Counter()
    captions, offsets = train.captions.tolist(), train.caption_offsets.tolist()
    for begin, end in itertools.pairwise(offsets):
        counts.update({word for text in captions[begin:end] for word in content_words(normalise_caption(text))})
    known = set(labels)
    common = sorted((-count, word) for word, count in counts.items() if count > 1 and word not in known)
    return labels + [word for _, word in common[:limit - len(labels)]]


def content_words(normalised: str) -> list[str]:
    return [word for word in words_in(normalised) if word not in STOP_WORDS]


def words_in(normalised: str) -> list[str]:
    """The words of a caption of three letters and more, and its Chinese ones."""
    found: list[str] = []
    for run in _WORD.findall(normalised):
        is_long = len(run) > 2 and "\u3400" <= run[0] <= "\u9fff"
        found += map("".join, itertools.pairwise(run)) if is_long else [run]
    return found


def concepts_of(table: SampleTable, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Concepts of each sample, by its labels and by the words of all its captions: int32 ids and their offsets."""
    numbers = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    lengths = []
    labels = [name.lower() for name in table.labels.names]
    captions, codes = table.captions.tolist(), table.labels.codes.tolist()
    of_captions, of_labels = table.caption_offsets.tolist(), table.label_offsets.tolist()
    for row in range(len(table)):
        words = {labels[code] for code in codes[of_labels[row]:of_labels[row + 1]]}
        for text in captions[of_captions[row]:of_captions[row + 1]]:
            words.update(words_in(normalise_caption(text)))
        ids = sorted(numbers[word] for word in words if word in numbers)
        found += ids
        lengths.append(len(ids))
    return np.array(found, np.int32), offsets_of(lengths)
