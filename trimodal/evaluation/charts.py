"""Charts as inline SVG, with what a few lines of script need to tell the values under the pointer.

    line_chart([Line("loss", steps, losses)])
    histogram(edges, right_counts, wrong_counts)

Text within a chart is numbers and names of the data, the same in every language; captions stand beside it. Colours are
classes, c0 to c7, that page.css defines for light, dark and paper.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimodal.evaluation.elements import Html, data, element, words
from trimodal.evaluation.phrases import duration, number

WIDTH, HEIGHT = 420, 230  # of a chart, in its own units; it is scaled to the page
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
COLOURS = 8
POINTS = 200  # of a curve


@dataclass(frozen=True)
class Line:
    """One curve: its name and its points; dashed for a level to compare with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: int | None = None  # None: the next one


def line_chart(lines: Sequence[Line], *, zero: bool = False, top: float | None = None) -> Html | None:
    """Curves over one axis, with a legend; None without any point. `zero`: the axis begins there."""
    lines = [line for line in lines if line.x]
    if not lines:
        return None
    values = [value for line in lines for value in line.y]
    places = [place for line in lines for place in line.x]
    x = Scale.over(min(places), max(places), LEFT, WIDTH - RIGHT, whole=True)
    y = Scale.over(0.0 if zero else min(values), max(values) if top is None else top, HEIGHT - BOTTOM, TOP)
    colours = [n % COLOURS if line.colour is None else line.colour % COLOURS for n, line in enumerate(lines)]
    drawn = [_curve(line, x, y, colour) for line, colour in zip(lines, colours, strict=True)]
    legend = [element("li", element("i", class_=f"key c{colour}" + (" dashed" if line.dashed else "")), data(line.name))
              for line, colour in zip(lines, colours, strict=True)]
    return element("div", _svg(_axes(x, y), drawn, class_="chart lines"), element("ul", legend, class_="legend"))


def _curve(line: Line, x: "Scale", y: "Scale", colour: int) -> list[Html]:
    points = [(x.at(one), y.at(other)) for one, other in zip(line.x, line.y, strict=True)]
    drawn = [element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points), data_name=line.name,
                     data_x=" ".join(number(one) for one in line.x), data_y=" ".join(number(one) for one in line.y),
                     class_=f"line c{colour}" + (" dashed" if line.dashed else ""))]
    if len(points) == 1:  # a line of one point is nothing to see
        [(a, b)] = points
        drawn.append(element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3, class_=f"dot c{colour}"))
    return drawn


def thinned(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most `most` points, each the mean of as many neighbours."""
    if len(x) <= most:
        return list(x), list(y)
    ends = [round(n * len(x) / most) for n in range(most + 1)]
    parts = list(itertools.pairwise(ends))
    return [x[(a + b - 1) // 2] for a, b in parts], [sum(y[a:b]) / (b - a) for a, b in parts]


# ---- bars --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its name and its parts, laid end to end."""

    name: Any
    parts: Mapping[str, float]  # by key of PHRASES
    text: str  # at its end


def bars(rows: Sequence[Bar]) -> Html | None:
    """Horizontal bars of one scale, with a legend of their parts; None where all are empty."""
    most = max((sum(row.parts.values()) for row in rows), default=0.0)
    if most <= 0:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row.parts))
    drawn = [(element("div", row.name, class_="bar-name"),
              element("div", [element("i", class_=f"bar c{keys.index(key)}", style=f"width:{100 * part / most:.2f}%")
                              for key, part in row.parts.items() if part > 0], class_="bar-track"),
              element("div", row.text, class_="bar-text number")) for row in rows]
    legend = [element("li", element("i", class_=f"key c{n}"), words(key)) for n, key in enumerate(keys)]
    return element("div", element("div", drawn, class_="bars"), element("ul", legend, class_="legend"))


def histogram(low: float, high: float, right: Sequence[int], wrong: Sequence[int]) -> Html:
    """Two histograms over one axis, each as shares of its own sum, so that few right ones are seen beside many."""
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in (wrong, right)]
    x = Scale.over(low, high, LEFT, WIDTH - RIGHT, exact=True)
    y = Scale.over(0.0, max(max(part) for part in shares) * 100, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - RIGHT - LEFT) / len(right)
    drawn = []
    for colour, part in zip((1, 0), shares, strict=True):
        corners = [(LEFT + n * width, y.at(100 * share)) for n, share in enumerate(part)]
        steps = [f"{a:.1f},{b:.1f} {a + width:.1f},{b:.1f}" for a, b in corners]
        drawn.append(element("polygon", points=f"{LEFT},{y.at(0):.1f} {' '.join(steps)} {WIDTH - RIGHT},{y.at(0):.1f}",
                             class_=f"area c{colour}"))
    bands = [element("rect", x=f"{LEFT + n * width:.1f}", y=TOP, width=f"{width:.1f}", height=HEIGHT - BOTTOM - TOP,
                     class_="band", data_tip=f"{low + n * (high - low) / len(right):.2f} … "
                     f"{low + (n + 1) * (high - low) / len(right):.2f}: ✓ {100 * shares[1][n]:.1f} %, "
                     f"✗ {100 * shares[0][n]:.1f} %") for n in range(len(right))]
    legend = [element("li", element("i", class_=f"key c{colour}"), words(key))
              for colour, key in ((0, "right_pairs"), (1, "wrong_pairs"))]
    return element("div", _svg(_axes(x, y), drawn, bands, class_="chart"), element("ul", legend, class_="legend"))


def interval_bar(figure: Mapping[str, Any]) -> Html | None:
    """A share between 0 and 1 with its interval, and a mark at chance; None for what is no share."""
    value, chance, low, high = (figure.get(name) for name in ("value", "chance", "low", "high"))
    if value is None or any(one is not None and not 0 <= one <= 1 for one in (value, chance, low, high)):
        return None
    parts = [element("rect", x=0, y=5, width=100, height=4, class_="track")]
    if low is not None and high is not None:
        parts.append(element("rect", x=f"{100 * low:.1f}", y=3, width=f"{max(100 * (high - low), 0.5):.1f}", height=8,
                             class_="interval"))
    if chance is not None:
        parts.append(element("rect", x=f"{100 * chance - 0.5:.1f}", y=0, width=1, height=14, class_="chance"))
    parts.append(element("circle", cx=f"{100 * value:.1f}", cy=7, r=3.5, class_="value"))
    return element("svg", parts, viewBox="-4 0 108 14", class_="spark", role="presentation")


# ---- axes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Places of values on an axis, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(low: float, high: float, start: float, end: float, *, whole: bool = False, exact: bool = False) -> "Scale":
        """From a round number at or below `low` to one at or above `high`; of `whole` numbers (steps, epochs) and of an
        `exact` range the ends are kept."""
        if high <= low:
            low, high = (low - 1, high + 1) if whole else (low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9)
        raw = (high - low) / 4
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
        step = max(1.0, float(round(step))) if whole else step
        if not whole and not exact:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        ticks = tuple(n * step for n in range(first, math.floor(high / step + 1e-9) + 1))
        return Scale(low, high, start, end, ticks)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(x: Scale, y: Scale) -> list[Html]:
    drawn = [element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y.at(tick):.1f}", y2=f"{y.at(tick):.1f}", class_="grid")
             for tick in y.ticks]
    drawn += [element("text", _tick(tick), x=LEFT - 6, y=f"{y.at(tick) + 4:.1f}", class_="tick end")
              for tick in y.ticks]
    drawn += [element("text", _tick(tick), x=f"{x.at(tick):.1f}", y=HEIGHT - 8, class_="tick middle")
              for tick in x.ticks]
    return drawn


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 6):g}"


def _svg(*children: Any, class_: str) -> Html:
    return element("svg", *children, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_=class_, role="img")


def figure(caption: Any, chart: Html | None, class_: str | None = None) -> Html | None:
    """A chart under its caption; None without a chart."""
    return element("figure", element("figcaption", caption), chart, class_=class_) if chart else None


def seconds(value: float | None) -> str:
    """A time for the end of a bar; short ones with a tenth."""
    if value is None:
        return "-"
    return duration(value) if value >= 60 else f"{value:.1f} s"
