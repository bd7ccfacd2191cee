"""What a refusal must be, whatever its words: the error's class, the exit code, one line, and the keys, flags, files
and values that it names. The words themselves stand in tests/messages.txt alone.

    with refused("training.epochs", "0"):
        load_config(path, ["training.epochs=0"])
    assert_told(capsys.readouterr().err, "--epochs")      # what a command printed before it ended with code 2
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimodal.errors import UserError


@contextlib.contextmanager
def refused(*named: str | Path | int | float, error: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo]:
    """The block raises an `error` whose message is one line that names each of `named`."""
    with pytest.raises(error) as caught:
        yield caught
    assert isinstance(caught.value, error)
    assert_names(str(caught.value), *named)


def assert_names(message: str, *named: str | Path | int | float) -> None:
    """`message` is one line, and holds each of `named` as a whole word, each at a place of its own: "epochs" is not in
    "epochs_done", 0 is not in "-1.0", and 1 named twice has to stand there twice."""
    assert message and "\n" not in message, repr(message)
    left = message
    for one in sorted(map(str, named), key=len, reverse=True):
        before, after = (r"(?<![\w.-])", r"(?!\w|\.\d)") if one.isdigit() else (r"(?<!\w)", r"(?!\w)")
        left, found = re.subn(before + re.escape(one) + after, "\0", left, count=1)
        assert found, f"{one!r} is not named in: {message}"


def assert_told(printed: str, *named: str | Path | int | float) -> None:
    """What a command printed on stderr is one line, `error: ...`, that names each of `named`."""
    assert printed.startswith("error: ") and printed.endswith("\n"), printed
    assert_names(printed.removesuffix("\n"), *named)
