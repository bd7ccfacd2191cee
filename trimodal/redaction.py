"""Secrets taken out of what is printed, logged and saved: of addresses, options and, in messages, the environment.

    redact("https://anna:pw@host/x?token=abc")            # https://***@host/x?token=***
    command_line(["run.py", "--api-key", "abc"])          # run.py --api-key '***'
    redacted({"url": "https://anna:pw@host", "n": 3})     # {'url': 'https://***@host', 'n': 3}
    settings(config.to_dict())                            # as it is, but for passwords in the address of a list

What is saved is used again: settings, commands and records never lose a part that only looks like a secret, as a path
does that some variable of the environment holds too.

A name is a secret's where it ends in key, token, password, passwd, secret, credential or signature, in capitals or not.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
ADDRESSES = ("paths.data_root", "paths.output_dir", "data.manifest", "data.manifest_root", "data.cache_dir")
SHORTEST = 8  # shorter values of the environment may be common words, which would then be hidden everywhere

_NAME = r"[\w-]*(?:key|token|password|passwd|secret|credentials?|signature)"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&#'",;<>`]+)"""
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_USER_OF_ADDRESS = re.compile(  # Path("a://b") is a:/b
    r"\b(?!file:)([a-z][a-z0-9+.-]+:/{1,2})[^/?#\s'\"<>]*@", re.IGNORECASE)
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+:/{1,2}\S", re.IGNORECASE)
_IN_QUERY = re.compile(rf"(?<=[?&;#])({_NAME}|sig|auth|authorization)=[^\s&#'\"<>`]*", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?<![\w.-])({_NAME})=(?=\S){_VALUE}", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without `secrets`, values of the environment, users in addresses, and NAME=VALUE of a secret's NAME."""
    known = [value for name, value in os.environ.items() if names_secret(name) and len(value) >= SHORTEST]
    for secret in sorted(filter(None, {*secrets, *known}), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN).replace(quote(secret, safe=""), HIDDEN)
    return hide(text)


def hide(text: str) -> str:
    """`text` without users in addresses and NAME=VALUE of a secret's NAME, whatever the environment holds."""
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
            shown.append(f"{name}={HIDDEN}" if equals and names_secret(name) else hide(word))
    return shlex.join(shown)


def redacted(value: Any) -> Any:
    """A copy of nested dicts and lists whose texts have no secrets, and are hidden under a secret's name."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if isinstance(item, str) and item and names_secret(str(key)) else redacted(item)
                for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return hide(value) if isinstance(value, str) else value


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's settings: those that may be addresses without passwords and tokens, all else as given."""
    return {section: {name: address(value) if f"{section}.{name}" in ADDRESSES else value
                      for name, value in values.items()} if isinstance(values, Mapping) else values
            for section, values in config.items()}


def address(value: Any) -> Any:
    """An address without its user, password and tokens; whatever is none, as it is."""
    if not isinstance(value, str) or not _ADDRESS.match(value):
        return value
    return _IN_QUERY.sub(rf"\1={HIDDEN}", _USER_OF_ADDRESS.sub(rf"\1{HIDDEN}@", value))
