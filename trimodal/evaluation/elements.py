"""HTML from plain calls: whatever is not markup already is escaped, so that no caption becomes a tag.

    element("td", "a < b", class_="number", data_value=3)       # <td class="number" data-value="3">a &lt; b</td>
    words("chance")                                             # the phrase in both languages; the page shows one
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from trimodal.evaluation.phrases import PHRASES

VOID = ("img", "meta", "link", "br")
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # no characters of a page
LANGUAGES = ("en", "zh")


class Html(str):
    """Text that is markup already."""


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name attribute="...">children</name>`. Children that are no Html are escaped, lists are flattened, None is left
    out; of attributes None and False are left out, `class_` is class, and `data_x` is data-x."""
    given = "".join(f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
                    for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Any], between: str = "") -> Html:
    """Children one after another, as `element` takes them."""
    parts = [join(child) if isinstance(child, list | tuple) else
             child if isinstance(child, Html) else escape(child) for child in children if child is not None]
    return Html(between.join(parts))


def escape(value: Any) -> str:
    """Text that stands for itself, within an element or a quoted attribute."""
    return html.escape(CONTROLS.sub("\ufffd", str(value)), quote=True)


def data(text: Any, most: int = 300) -> Html:
    """A caption, name or message from outside, cut off after `most` characters. Its direction does not turn the words
    around it."""
    text = str(text)
    return element("bdi", text if len(text) <= most else text[:most - 1] + "…")


def words(key: str, **values: Any) -> Html:
    """A phrase in both languages."""
    return both({language: PHRASES[key][language].format(**values) for language in LANGUAGES})


def both(texts: dict[str, str]) -> Html:
    """One text in each language, of which the page shows one; `code` between backticks."""
    return join(element("span", _with_code(texts[language]), lang=language) for language in LANGUAGES)


def _with_code(text: str) -> list[Any]:
    return [element("code", part) if n % 2 else part for n, part in enumerate(text.split("`"))]


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = (), class_: str | None = None,
          ) -> Html:
    """A table that scrolls sideways where it is wider than the page; columns `numbers` stand at the right."""
    def cells(name: str, row: Sequence[Any]) -> list[Html]:
        return [element(name, cell, class_="number" if n in numbers else None) for n, cell in enumerate(row)]

    body = element("tbody", [element("tr", cells("td", row)) for row in rows])
    return element("div", element("table", element("thead", element("tr", cells("th", head))), body), tabindex="0",
                   class_=" ".join(filter(None, ("wide", class_))))


def section(key: str, *children: Any) -> Html | None:
    """A section under the heading PHRASES[key]; None without anything in it."""
    given = [child for child in children if child is not None and child != []]
    return element("section", element("h2", words(key)), given, id=key) if given else None
