"""The words of all messages are those of the snapshot: a change of wording is seen in review, in one file."""

import re

import pytest

from tests import messages


def test_every_message_is_as_in_the_snapshot() -> None:
    assert messages.changes() == [], "is this change of wording meant? Then run python tests/messages.py --renew"


def test_no_message_says_of_files_that_may_be_the_users_own_that_they_were_fetched() -> None:
    assert re.findall(r".*\bfetch (?:it|them|\{\}) again.*", messages.messages()) == []


@pytest.mark.parametrize(("source", "found"), [
    ('raise UserError(f"{path}: no such file; name {what!r}")', ["{}: no such file; name {}"]),
    ('"""A module of many words."""\nx = "one two three"', ["one two three"]),
    ('print("a.b")\nopen("data.json")', []),
    ('f"{x}" "the count is " f"{n:,} of {m}"', ["{}the count is {} of {}"]),
])
def test_texts_are_found_and_docstrings_left_out(source: str, found: list[str]) -> None:
    assert list(messages.texts(source)) == found
