"""Lists of texts as other programs write them into one cell: JSON, Python (so pandas and the Hub's exports), numpy.

    parse("['a dog', \\"a dog's bone\\"]")   # ["a dog", "a dog's bone"]
    parse("[applause] and music")            # None: a text of its own
"""

import ast
import json
import re
from typing import Any

WRITE = 'write it as JSON: ["a dog", "a dog on grass"]'

_QUOTED = r"""(?:np\.|numpy\.)?(?:str_\(\s*)?[bBuU]?["']"""
_BEGINS = re.compile(rf"\s*(?:array\(\s*)?\[[\s\[({{]*{_QUOTED}")
_BEGINS_OTHERWISE = re.compile(rf"\s*(?:[({{]|array\(|frozenset\(|set\()[\s\[({{]*{_QUOTED}")  # a tuple, set, dict
_ENDS = re.compile(r"""["')\]}]\s*[)\]}]\s*$|["']\s*,\s*\)\s*$""")
_EMPTY = re.compile(r"\s*(?:\[\s*\]|\(\s*\)|\{\s*\}|set\(\))\s*")
_OF_NO_TEXTS = re.compile(r"\s*\[[\s\d.,+\-\[\]naNonulTruefalsFi]+\]\s*")  # of numbers and of the words below
_NO_TEXTS = {"nan", "none", "null", "true", "false", "inf", "-inf"}

_ESCAPE = r"""\\(?:[\\'"abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})"""
_TEXT = re.compile(rf"""'(?:[^'\\\0]|{_ESCAPE})*'|"(?:[^"\\\0]|{_ESCAPE})*\"""")
_OPEN = re.compile(r"\s*([\[({])\s*")
_CLOSE = {"[": "]", "(": ")", "{": "}"}
_STR = re.compile(r"(?:np\.|numpy\.)?str_\(\s*")
_BETWEEN = re.compile(r"\s*(,?)\s*")


def parse(text: str) -> list[str] | None:
    """The texts of a list; None where `text` is none, as are captions that begin with a word in brackets.

    Whether it is one is told by its first signs alone, so that the cells of a column are all read alike.

    Raises:
        ValueError: it begins as a list of texts does and is none to its end, or holds anything but texts.
    """
    if _EMPTY.fullmatch(text):
        return []
    if _OF_NO_TEXTS.fullmatch(text) and all(map(_is_no_text, re.findall(r"[^\s,\[\]]+", text))):
        raise ValueError(f"a list without texts; {WRITE}")
    if not (_BEGINS.match(text) or (_BEGINS_OTHERWISE.match(text) and _ENDS.search(text))):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _python(text)
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return found
    raise ValueError(f"a list within a list, or of other things than texts alone; {WRITE}")


def texts(value: Any, between: str = "") -> tuple[str, ...]:
    """A text, a list of texts, or a list that another program wrote as one text; a text is parted at `between`."""
    found = parse(value) if isinstance(value, str) else value
    if found is None:
        found = value.split(between) if between else [value]
    elif not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError("expected a text or a list of texts")
    elif any(map(is_list, found)):
        raise ValueError(f"a list within a list; {WRITE}")
    return tuple(encodable(text.strip()) for text in found if text.strip())


def is_list(value: object) -> bool:
    """Whether `value` is one text that another program wrote a list into. Raises as `parse`."""
    return isinstance(value, str) and parse(value) is not None


def encodable(text: str) -> str:
    """`text`; raises ValueError where it holds half of a surrogate pair, as JSON can write it."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write "\ud800"
        raise ValueError("expected Unicode, not half of a surrogate pair") from None
    return text


def _python(text: str) -> list[str]:
    """Quoted texts between brackets, with commas (Python) or blanks (numpy) between them."""
    opened = _OPEN.match(text)
    if not opened:
        raise ValueError(f"looks like the list of another program; {WRITE}")
    found, separators, at = [], set[str](), opened.end()
    while not text.startswith(_CLOSE[opened[1]], at):
        wrapped = _STR.match(text, at)
        quoted = _TEXT.match(text, wrapped.end() if wrapped else at)
        if not quoted:
            raise ValueError(_reason(text, at))
        found.append(_unquoted(quoted[0]))
        between = _BETWEEN.match(text, quoted.end() + text.startswith(")", quoted.end()) * bool(wrapped))
        assert between
        at = between.end()
        if not text.startswith(_CLOSE[opened[1]], at):
            separators.add(between[0].strip() or between[0][:1].replace("\n", " "))
    if separators not in (set(), {","}, {" "}):
        raise ValueError(f"looks like a list, but not all of its texts have a comma between them; {WRITE}")
    if text[at + 1:].strip():
        raise ValueError(f"looks like a list, but goes on behind its {_CLOSE[opened[1]]!r}; {WRITE}")
    return found


def _is_no_text(word: str) -> bool:
    try:
        return word.lower() in _NO_TEXTS or float(word) is not None
    except ValueError:
        return False


def _unquoted(quoted: str) -> str:
    """The text of a literal; numpy breaks lines within it, Python never does."""
    return str(ast.literal_eval(quoted.replace("\r", "\\r").replace("\n", "\\n")))


def _reason(text: str, at: int) -> str:
    if text.startswith("...", at):
        return "numpy has left out texts of this list and written ... for them; write all, as JSON"
    if text[at:at + 2].lower() in ("b'", 'b"'):
        return f"holds bytes, not text; decode them, and {WRITE}"
    if text[at:at + 1] in ("[", "(", "{"):
        return f"a list within a list; {WRITE}"
    near = " ".join(text[at:at + 20].split())
    return f"looks like a list, but is none from {near!r} on; {WRITE}" if near else (
        f"looks like a list, but has no end; {WRITE}")
