"""YAML of settings gives plain values, or one line that says why not, and takes no more memory than it should."""

import datetime

import pytest
import yaml

from tests.project import ROOT
from tests.refusals import refused
from trimodal import strict_yaml
from trimodal.strict_yaml import parse


def test_plain_values() -> None:
    text = "a: {b: [1, 2.5, yes, null, x], d: 2026-01-02}\ne: &one {f: 1}\ng: {<<: *one, f: 2}\nh: *one\n"
    assert parse(text) == {"a": {"b": [1, 2.5, True, None, "x"], "d": datetime.date(2026, 1, 2)}, "e": {"f": 1},
                           "g": {"f": 2}, "h": {"f": 1}}
    assert parse("") is None


def laughs(line: str, last: str) -> str:
    """Nine levels of nine: 387,420,489 values, or as many pairs of merged keys."""
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {line.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 10)) + last


@pytest.mark.parametrize(("text", "named"), [
    (laughs("[{}]", "b: *a9"), ["10,000"]),
    (laughs("{{<<: [{}]}}", ""), ["10,000"]),
    ("a: &a [1, *a]", ["10,000"]),
    ("a: &a {b: *a}", ["10,000"]),
    ("[" + "1," * 10_000 + "]", ["10,000"]),
    ("a: " + "9" * 5_000, ["3,000"]),
    ("a: 0x" + "f" * 5_000, ["3,000"]),
    ("x" * 100_001, ["100,000"]),
    ("[" * 5_000, []),  # deeper than Python's stack
    ("a: 2001-99-99", []),
    ("a: !!timestamp x", []), ("a: !!int x", []), ("a: !!binary x", []), ("? [1]\n: 2", []),
    ("a: !!python/name:os.system", ["os.system"]),
    ("a: 1\nb: 2\na: 3", ["line 3", "a"]),
    ("a: [1", ["line 1"]), ("a: \0", []),
])
def test_what_is_refused_in_one_line(text: str, named: list[str]) -> None:
    with refused(*named, error=yaml.YAMLError) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


def test_the_bounds_are_far_above_our_own_settings() -> None:
    path = ROOT / "config.yaml"
    assert 5 * len(path.read_text("utf-8")) < strict_yaml.MAX_CHARS
