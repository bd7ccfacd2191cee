"""The part of a report's page that shows best, worst and random retrievals, with pictures and playable sounds."""

from collections.abc import Mapping
from typing import Any

from trimodal.evaluation.elements import Html, data, element, section, words
from trimodal.evaluation.phrases import number

DIRECTIONS = ("text_to_image", "text_to_audio", "image_to_audio", "speakers")
KINDS = ("best", "worst", "random")


def retrieval_section(report: Mapping[str, Any], media: Mapping[str, str]) -> Html | None:
    """All of them, by direction and kind; None where there are none."""
    rows = report.get("retrievals") or []
    parts = []
    for direction in DIRECTIONS:
        for kind in KINDS:
            own = [row for row in rows if (row["direction"], row["kind"]) == (direction, kind)]
            if own:
                about = words(f"kind_{'trials' if direction == 'speakers' else kind}")
                parts += [element("h3", words(f"direction_{direction}"), ": ", words(f"kind_{kind}_title")),
                          element("p", about, class_="faint"), [_retrieval(row, media) for row in own]]
    return section("retrievals", parts) if parts else None


def _retrieval(row: Mapping[str, Any], media: Mapping[str, str]) -> Html:
    place = (None if row["rank"] is None else
             element("p", words("place", rank=number(row["rank"]), candidates=number(row["candidates"])),
                     class_="good" if row["rank"] == 1 else "faint"))
    query = element("div", _item(row["query"], media), place, element("p", data(row["source"]), class_="faint"),
                    class_="query")
    answers = [element("div", _item(answer, media), _below(answer), class_="card right" if answer["right"] else "card")
               for answer in row["answers"]]
    return element("div", query, element("div", answers, class_="cards"), class_="retrieval")


def _item(item: Mapping[str, Any], media: Mapping[str, str]) -> list[Html | None]:
    """A picture, or a spectrogram above a player, as far as there is room for it in the page, above its caption."""
    caption = item["words"]
    picture, sound = media.get(item.get("picture") or ""), media.get(item.get("sound") or "")
    return [element("img", src=picture, alt=caption[:200]) if picture else None,
            element("audio", src=sound, controls=True, preload="metadata") if sound else None,
            element("p", data(caption)) if caption else None]


def _below(answer: Mapping[str, Any]) -> Html:
    rank = answer.get("rank")
    return element("p", f"{'✓' if answer['right'] else '✗'} ", f"{round(answer['score'], 2) + 0.0:.2f}",  # never -0.00
                   [" · ", words("at_rank", rank=number(rank))] if rank else None,
                   class_="good" if answer["right"] else "faint")
