"""YAML of settings gives plain values, or one line that says why not, and takes no more memory than it should."""

import datetime
from pathlib import Path

import pytest
import yaml

import strict_yaml
from strict_yaml import parse


def test_plain_values() -> None:
    text = "a: {b: [1, 2.5, yes, null, x], d: 2026-01-02}\ne: &one {f: 1}\ng: {<<: *one, f: 2}\nh: *one\n"
    assert parse(text) == {"a": {"b": [1, 2.5, True, None, "x"], "d": datetime.date(2026, 1, 2)}, "e": {"f": 1},
                           "g": {"f": 2}, "h": {"f": 1}}
    assert parse("") is None


def laughs(line: str, last: str) -> str:
    """Nine levels of nine: 387,420,489 values, or as many pairs of merged keys."""
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {line.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 10)) + last


@pytest.mark.parametrize(("text", "said"), [
    (laughs("[{}]", "b: *a9"), "over 10,000 values"),
    (laughs("{{<<: [{}]}}", ""), "over 10,000 values"),
    ("a: &a [1, *a]", "over 10,000 values"),
    ("a: &a {b: *a}", "over 10,000 values"),
    ("[" + "1," * 10_000 + "]", "over 10,000 values"),
    ("a: " + "9" * 5_000, "over 3,000 characters"),
    ("a: 0x" + "f" * 5_000, "over 3,000 characters"),
    ("x" * 100_001, "over 100,000 characters"),
    ("[" * 20_000, "recursion"),
    ("a: 2001-99-99", "month must be in 1..12"),
    ("a: !!timestamp x", ""), ("a: !!int x", ""), ("a: !!binary x", ""), ("? [1]\n: 2", "unhashable"),
    ("a: !!python/name:os.system", "could not determine a constructor"),
    ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
    ("a: [1", "line 1"), ("a: \0", "special characters"),
])
def test_what_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        parse(text)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_bounds_are_far_above_our_own_settings() -> None:
    path = Path(strict_yaml.__file__).with_name("config.yaml")
    assert 5 * len(path.read_text("utf-8")) < strict_yaml.MAX_CHARS
