"""Secrets taken out of what is printed, logged and saved: of addresses, options and the environment.

    redact("https://anna:pw@host/x?token=abc")            # https://***@host/x?token=***
    command_line(["run.py", "--api-key", "abc"])          # run.py --api-key '***'
    redacted({"url": "https://anna:pw@host", "n": 3})     # {'url': 'https://***@host', 'n': 3}

A name is a secret's where it ends in key, token, password, passwd, secret, credential or signature, in capitals or not.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8  # shorter values of the environment may be common words, which would then be hidden everywhere

_NAME = r"[\w-]*(?:key|token|password|passwd|secret|credentials?|signature)"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&#'",;<>`]+)"""
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_USER_OF_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]+:/{1,2})[^/?#\s'\"<>]*@", re.IGNORECASE)  # Path("a://b") is a:/b
_IN_QUERY = re.compile(rf"(?<=[?&;#])({_NAME}|sig|auth|authorization)=[^\s&#'\"<>`]*", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?<![\w.-])({_NAME})=(?=\S){_VALUE}", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, values of the environment, users in addresses, and NAME=VALUE of a secret's NAME."""
    known = [value for name, value in os.environ.items() if names_secret(name) and len(value) >= SHORTEST]
    for secret in sorted(filter(None, {*secrets, *known}), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN).replace(quote(secret, safe=""), HIDDEN)
    text = _USER_OF_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    return _ASSIGNED.sub(rf"\1={HIDDEN}", _IN_QUERY.sub(rf"\1={HIDDEN}", text))


def names_secret(name: str) -> bool:
    return _SECRET_NAME.fullmatch(name.lstrip("-").rpartition(".")[2]) is not None


def command_line(words: Sequence[str]) -> str:
    """`words` as a shell takes them, with the values of secret options hidden: `--x-key VALUE`, `a.x_key=VALUE`."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if before.startswith("--") and "=" not in before and names_secret(before):
            shown.append(HIDDEN)
        else:
            shown.append(f"{name}={HIDDEN}" if equals and names_secret(name) else redact(word))
    return shlex.join(shown)


def redacted(value: Any) -> Any:
    """A copy of nested dicts and lists whose texts are redacted, and hidden under a secret's name."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if isinstance(item, str) and item and names_secret(str(key)) else redacted(item)
                for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
