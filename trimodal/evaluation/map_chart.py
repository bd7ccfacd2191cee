"""The map of embeddings as a chart: a place for each picture, caption and sound, shown under the pointer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimodal.evaluation.charts import COLOURS
from trimodal.evaluation.elements import Html, data, element, words
from trimodal.evaluation.phrases import percent

SIDE, MARGIN, SIZE = 600, 14, 5.0
GREY = COLOURS  # class c8: what has no colour of its own
BY = ("class", "set", "modality")


def map_figure(found: Mapping[str, Any], media: Mapping[str, str]) -> list[Html]:
    """The map, a choice of what its colours mean, and how it was made."""
    points = found["points"]
    colours = {by: _colours([point[by] for point in points]) for by in BY}
    kinds = [by for by in BY if len(colours[by]) > 1] or ["set"]
    buttons = [element("button", words(f"by_{by}"), type="button", data_by=by, aria_pressed=str(by == kinds[0]).lower())
               for by in kinds]
    legends = [_legend(colours[by], by, hidden=by != kinds[0]) for by in kinds]
    drawn = [_point(point, n, {by: colours[by].get(point[by], GREY) for by in kinds}, kinds[0], media)
             for n, point in enumerate(points)]
    chart = element("svg", element("path", d="", class_="links"), drawn, viewBox=f"0 0 {SIDE} {SIDE}", role="img",
                    class_="chart map", data_by=kinds[0])
    shapes = element("ul", [element("li", shape, " ", words(f"modality_{name}"))
                            for name, shape in (("image", "●"), ("text", "■"), ("audio", "▲"))
                            if any(point["modality"] == name for point in points)], class_="legend")
    how = words("map_how", points=len(points), of=f"{found['of']:,}", kept=percent(found["kept"]),
                kept_pca=percent(found["kept_pca"]), neighbours=found["neighbours"])
    return [element("p", how, class_="faint"), element("div", words("colour_by"), " ", buttons, class_="choice"),
            element("div", chart, element("div", shapes, legends), class_="map-and-legend")]


def _colours(values: Sequence[str | None]) -> dict[str | None, int]:
    """The most frequent values, each with a colour of its own; all others are grey."""
    counts = Counter(value for value in values if value is not None)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: n for n, name in enumerate(ranked[:COLOURS])}


def _legend(colours: Mapping[str | None, int], by: str, hidden: bool) -> Html:
    def name(value: str | None) -> Html:
        return words(f"modality_{value}") if by == "modality" else data(value)

    rows = [element("li", element("i", class_=f"key c{n}"), name(value)) for value, n in colours.items()]
    rest = element("li", element("i", class_=f"key c{GREY}"), words("others")) if len(colours) == COLOURS else None
    return element("ul", rows, rest, class_="legend", data_legend=by, hidden=hidden)


def _point(point: Mapping[str, Any], n: int, colours: Mapping[str, int], by: str, media: Mapping[str, str]) -> Html:
    x, y = (MARGIN + value * (SIDE - 2 * MARGIN) for value in (point["x"], 1 - point["y"]))
    given = {f"data_{name}": colour for name, colour in colours.items()}
    about = " · ".join(filter(None, [point["set"], point["class"]]))
    shared: dict[str, Any] = {"class_": f"point c{colours[by]}", "data_words": point["words"], "data_about": about,
                              "data_sample": point["sample"], "data_at": f"{x:.1f},{y:.1f}",
                              "data_picture": media.get(point.get("picture") or ""), **given}
    if point["modality"] == "image":
        return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=SIZE, **shared)
    if point["modality"] == "text":
        return element("rect", x=f"{x - SIZE + 0.8:.1f}", y=f"{y - SIZE + 0.8:.1f}", width=2 * SIZE - 1.6,
                       height=2 * SIZE - 1.6, **shared)
    corners = ((0, -SIZE - 1), (SIZE + 0.5, SIZE - 1), (-SIZE - 0.5, SIZE - 1))
    return element("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners), **shared)
