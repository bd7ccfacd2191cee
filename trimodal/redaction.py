"""Passwords and keys are taken out of what is printed, logged and saved: by the field that holds them, never by value.

    without_secrets("https://anna:pw@host/x?token=abc")   # https://***@host/x?token=***
    command_line(["run.py", "--api-key", "abc"])          # run.py --api-key '***'
    settings(config.to_dict())                            # as it is, but for what is secret in its addresses

A name is a secret's where it ends in key, token, password, secret, credential or signature, in capitals or not.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
_NAME = r"[\w-]*(?:key|token|password|passwd|secret|credentials?|signature)"
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^/?#\s'\"<>]*@", re.IGNORECASE)  # Path("a://b") is a:/b
_ASSIGNED = re.compile(rf"(?<![\w./-])({_NAME})=[^\s&#'\",;<>]+", re.IGNORECASE)  # in a query, of an option


def without_secrets(text: str, keys: Iterable[str] = ()) -> str:
    """`text` without `keys`, users and passwords of addresses, and NAME=VALUE of a secret's name."""
    for key in filter(None, keys):
        text = text.replace(key, HIDDEN).replace(quote(key, safe=""), HIDDEN)
    return _ASSIGNED.sub(rf"\1={HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def command_line(words: Sequence[str]) -> str:
    """`words` as a shell takes them, without the values of secret options."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name = re.fullmatch(rf"((?:--|[\w.]+\.)?{_NAME})=.*", word, re.IGNORECASE | re.DOTALL)
        is_value = re.fullmatch(rf"--{_NAME}", before, re.IGNORECASE)
        shown.append(HIDDEN if is_value else f"{name[1]}={HIDDEN}" if name else without_secrets(word))
    return shlex.join(shown)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's settings whose addresses have no passwords and tokens; all else is as given."""
    return {section: {name: without_secrets(value) if isinstance(value, str) and ":/" in value else value
                      for name, value in values.items()} if isinstance(values, Mapping) else values
            for section, values in config.items()}
