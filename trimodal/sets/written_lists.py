"""Lists of texts as other programs write them into one cell: JSON, Python (so pandas and the Hub's exports), numpy.

    parse("['a dog', \\"a dog's bone\\"]")   # ["a dog", "a dog's bone"]
    parse("[applause] and music")            # None: a text of its own
"""

import ast
import json
import re
from typing import Any

WRITE = 'write it as JSON: ["a dog", "a dog on grass"]'

_QUOTE = r"""(?:np\.|numpy\.)?(?:str_\(\s*)?[bBuU]?["']"""
_BEGINS = re.compile(rf"\s*(?:array\(\s*)?\[[\s\[({{]*{_QUOTE}")
_BEGINS_OTHERWISE = re.compile(rf"\s*(?:[({{]|array\(|frozenset\(|set\()[\s\[({{]*{_QUOTE}")  # a tuple, set, dict
_ENDS = re.compile(r"""["')\]}]\s*[)\]}]\s*$|["']\s*,\s*\)\s*$""")
_EMPTY = re.compile(r"\s*(?:\[\s*\]|\(\s*\)|\{\s*\}|set\(\))\s*")
_NO_TEXT = r"(?:nan|none|null|true|false|[-+]?inf|[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)"
_OF_NO_TEXTS = re.compile(rf"\s*\[[\s\[]*{_NO_TEXT}(?:[\s,\[\]]+{_NO_TEXT})*[\s,\]]*\]\s*", re.IGNORECASE)

_ESCAPE = r"""\\(?:[\\'"abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})"""
_TEXT = re.compile(rf"""'(?:[^'\\\0]|{_ESCAPE})*'|"(?:[^"\\\0]|{_ESCAPE})*\"""")
_ONE = rf"(?:(?:np\.|numpy\.)?str_\(\s*(?:{_TEXT.pattern})\)|{_TEXT.pattern})"
_INSIDE = rf"(?:{_ONE}(?:\s*,\s*{_ONE})*\s*,?|{_ONE}(?:\s+{_ONE})*)"  # commas (Python) or blanks (numpy) between texts
_WHOLE = re.compile(rf"\s*(?:\[\s*{_INSIDE}\s*\]|\(\s*{_INSIDE}\s*\)|\{{\s*{_INSIDE}\s*\}})\s*")


def parse(text: str) -> list[str] | None:
    """The texts of a list; None where `text` is none, as are captions that begin with a word in brackets.

    Whether it is one is told by its first signs alone, so that the cells of a column are all read alike.

    Raises:
        ValueError: it begins as a list of texts does and is none to its end, or holds anything but texts.
    """
    if _EMPTY.fullmatch(text):
        return []
    if _OF_NO_TEXTS.fullmatch(text):
        raise ValueError(f"a list without texts; {WRITE}")
    if not (_BEGINS.match(text) or (_BEGINS_OTHERWISE.match(text) and _ENDS.search(text))):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if not _WHOLE.fullmatch(text):
            raise ValueError(_problem(text)) from None
        # numpy breaks lines within a text, Python never does
        return [str(ast.literal_eval(quoted.replace("\r", "\\r").replace("\n", "\\n")))
                for quoted in _TEXT.findall(text)]
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
    """`text`; raises ValueError where it holds half of a surrogate pair, as JSON can write it ("\\ud800")."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode, not half of a surrogate pair") from None
    return text


def _problem(text: str) -> str:
    unquoted = _TEXT.sub("", text)
    if "..." in unquoted:
        return "numpy has left out texts of this list and written ... for them; write all, as JSON"
    if re.match(r"[\s\[({]*[bB][\s,\])}]", unquoted):
        return f"holds bytes, not text; decode them, and {WRITE}"
    return f"looks like a list of texts, but is none to its end, or one within another; {WRITE}"
