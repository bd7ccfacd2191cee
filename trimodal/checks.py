"""What can be wrong with settings: each check gives complaints, of one line, that say where, what and what is allowed.

    found = below("training", config, epochs=1) + twice("data.datasets", config.datasets)
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any


def below(section: str, config: Any, **minimum: float) -> list[str]:
    return [f"{section}.{name}: {getattr(config, name)} is below {low}"
            for name, low in minimum.items() if getattr(config, name) < low]


def above(section: str, config: Any, **maximum: float) -> list[str]:
    return [f"{section}.{name}: {getattr(config, name)} is above {high}"
            for name, high in maximum.items() if getattr(config, name) > high]


def twice(where: str, names: Iterable[str]) -> list[str]:
    return [f"{where}: {name!r} is given {times} times; once is enough"
            for name, times in Counter(names).items() if times > 1]


def blank(section: str, config: Any, *names: str) -> list[str]:
    """Of settings that name a folder or a file."""
    return [f"{section}.{name}: is empty; name a path ('.' is the folder you are in)"
            for name in names if (value := getattr(config, name)) is not None and not value.strip()]


def patterns(where: str, found: Iterable[str]) -> list[str]:
    """Of regular expressions."""
    problems = []
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{where}: {pattern!r:.100} is not a regular expression ({error}); write for example "
                            "'image.*'")
    return problems


def unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
    return f"{name!r} is unknown. {hint}"
