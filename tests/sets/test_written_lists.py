"""A list in a cell is read back as it was before a program wrote it there, or refused: never taken for one text."""

import csv
import io
import json
import random
from collections.abc import Callable

import numpy as np
import pytest

from tests.refusals import refused
from trimodal.sets.written_lists import parse

LISTS = [
    ["a dog", "a dog on grass"], ["a dog"], ["a dog's bone", "two"], ['he says "hi"', "it's \"so\"", "''"],
    ["commas, in, it", "[brackets]", "] and [", "a ] b"], ["back\\slash", "C:\\new", "\\'"],
    ["two\nlines", "tab\there"],
    ["一只狗", "été", "🐶 dog", "a\u2028b"], ["", " "], ["...", "... and more", "a ... b"], ["None", "nan", "1"],
    ["word " * 30, "another " * 20], [f"caption number {i} of a list that numpy breaks over lines" for i in range(40)],
]


def through_pandas(texts: list[str]) -> str:
    """`DataFrame.to_csv` writes str(value) with the csv module, so do the Hub's exports; read back by a reader."""
    file = io.StringIO()
    csv.writer(file).writerow([texts])
    file.seek(0)
    return next(csv.reader(file))[0]


WRITERS: dict[str, Callable[[list[str]], str]] = {
    "JSON": json.dumps,
    "JSON with letters": lambda texts: json.dumps(texts, ensure_ascii=False),
    "JSON with blanks": lambda texts: f" [ {' , '.join(map(json.dumps, texts))} ] ",
    "JSON over lines": lambda texts: json.dumps(texts, indent=2),
    "pandas": through_pandas,
    "a tuple": lambda texts: repr(tuple(texts)),
    "numpy": lambda texts: str(np.array(texts, object)),
    "numpy, texts of its own": lambda texts: str(np.array(texts)) if all(texts) else str(np.array(texts, object)),
    "a list of numpy's texts": lambda texts: f"[{', '.join(f'np.str_({text!r})' for text in texts)}]",
}


@pytest.mark.parametrize("texts", LISTS, ids=lambda texts: texts[0][:20])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_list_is_read_as_it_was_written(writer: str, texts: list[str]) -> None:
    assert parse(WRITERS[writer](texts)) == texts


@pytest.mark.parametrize("writer", WRITERS)
def test_lists_of_any_letters(writer: str) -> None:
    draw = random.Random(writer)
    letters = "ab ,;'\"\\[](){}\n\t.…é狗🐶:-0n"
    for _ in range(200):
        texts = ["a" + "".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(draw.randrange(1, 5))]
        assert parse(WRITERS[writer](texts)) == texts


@pytest.mark.parametrize("text", ["[]", "[ ]", " []", "()", "{}"])
def test_an_empty_list_has_no_texts(text: str) -> None:
    assert parse(text) == []


@pytest.mark.parametrize("text", [
    "[laughter] a man speaks", "[applause]", "[music playing, crowd cheering]", "(a dog)", "{dog}", "a dog ['barks']",
    '("Hello") says the man', "'a dog'", '"a dog"', "[1] a dog", "[no]", "[...]", "[[noise]] of wind", "", " "])
def test_a_caption_with_brackets_is_a_caption(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("text", [
    "['a', 'b", "['a\0', 'b']", "['\\410']", "['\\Uffffffff']",
    "['a', b]", "['it's', 'b']", "['a'; 'b']", "['a''b']", "['a', 'b' 'c']", "['a', None]",
    "['a', nan]",
    '["a", 1]', '["one", ""two]', '["a" "b"] c', "['a'] and more", '["Hello"] a man says', "['\\d']", "[\"a'", "[nan]",
    "[None]", "[1, 2]", "[1.5 2]", "array(['a', 'b'], dtype=object)", "{'en': 'a dog'}", '{"en": "a dog"}',
    "[['a', 'b'], ['c']]", '[["a"]]', "[('a', 1)]", "[ ['a'] ]"])
def test_what_begins_as_a_list_and_is_none_is_refused(text: str) -> None:
    with refused("JSON", '["a dog", "a dog on grass"]', error=ValueError):
        parse(text)


def test_what_numpy_left_out_is_missed() -> None:
    with refused("numpy", "JSON", error=ValueError):
        parse(str(np.array([f"text {i}" for i in range(1_001)], object)))


def test_bytes_are_no_texts() -> None:
    for text in (str(np.array([b"a", b"b"])), repr([b"a"])):
        with refused("bytes", error=ValueError):
            parse(text)
