"""Figures of a report: curves of training, and grids of retrieval results. Labels are English.

    loss_curves(records), progress_curves(records)     # PNG as bytes, from the records of metrics.jsonl
    retrieval_grid(rows)                               # uint8 (H, W, 3), from protocols.examples

matplotlib loads only when something is drawn; its global state is not touched.
"""

import functools
import io
import itertools
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

INK, FAINT, RIGHT = "#1e1e1e", "#787878", "#14963c"
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei",
             "Droid Sans Fallback")


# ---- curves ------------------------------------------------------------------------------------------------------


def loss_curves(records: Sequence[Record]) -> bytes | None:
    """One panel a stage: every part of the training loss over optimizer steps, raw and smoothed; None without steps."""
    steps = [record for record in records if record.get("kind") == "step"]
    stages = list(dict.fromkeys(record["stage"] for record in steps))
    if not stages:
        return None
    figure = _figure(5.0 * len(stages), 5.0)
    for place, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages), place + 1)
        for name, (x, y) in loss_parts(record for record in steps if record["stage"] == stage).items():
            line, = axes.plot(x, smooth(y), linewidth=1.6, label=name, marker="o" if len(x) == 1 else None)
            axes.plot(x, y, linewidth=0.6, alpha=0.35, color=line.get_color())
        axes.set_title(f"{stage}: training loss by part", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    return _png(figure)


def progress_curves(records: Sequence[Record]) -> bytes | None:
    """Validation loss, validation retrieval, learning rate, and speed; None without any of it."""
    steps = [record for record in records if record.get("kind") == "step"]
    checks = [record for record in records if record.get("kind") == "validation"]
    if not steps and not checks:
        return None
    figure = _figure(11.0, 7.4)
    panels = [figure.add_subplot(2, 2, n + 1) for n in range(4)]
    _by_stage(panels[0], checks, "epoch", "loss", "validation loss by stage")
    _retrieval(panels[1], checks)
    _by_stage(panels[2], steps, "step", "lr", "learning rate")
    _by_stage(panels[3], steps, "step", "samples_per_s", "speed (samples/s) and waiting for data (%, dashed)")
    panels[3].set_ylim(bottom=0)
    x, waiting = _xy(steps, "step", "data_wait_pct")
    twin = panels[3].twinx()
    twin.plot(x, smooth(waiting), linestyle="--", linewidth=0.9, color="grey")
    twin.set_ylim(0, max([10.0, *waiting]) * 1.1)
    twin.set_ylabel("waiting (%)", fontsize=8)
    return _png(figure)


def flat_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Values by metric name, from a flat {name: value} or from {set: {pair: {metric: {"value": ...}}}} (set "all")."""
    if all(isinstance(value, int | float | None) for value in metrics.values()):
        return {name: value for name, value in metrics.items() if value is not None}
    pairs = metrics.get("all") or next(iter(metrics.values()))
    return {name: figure["value"] for pair in pairs.values() for name, figure in pair.items()}


def loss_parts(steps: Iterator[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each part of the loss, told apart by task where two tasks have the same."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in steps:
        task = record.get("task") or ""
        parts = {part: value for part, value in (record.get("parts") or {}).items() if not part.endswith("accuracy")}
        for part, value in (parts or {"loss": record.get("loss")}).items():
            name = part if not task or task in part else f"{part} ({task})"
            if value is not None:
                x, y = found.setdefault(name, ([], []))
                x.append(record["step"])
                y.append(value)
    return found


def _by_stage(axes: Any, records: Sequence[Record], x: str, y: str, title: str) -> None:
    for stage, own in itertools.groupby(records, key=lambda record: record["stage"]):
        places, values = _xy(list(own), x, y)
        shown = smooth(values) if y == "samples_per_s" else values
        axes.plot(places, shown, label=stage, linewidth=1.4, marker="o" if len(places) == 1 else None, markersize=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step" if x == "step" else x)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    if records:
        axes.legend(fontsize=8, framealpha=0.8)


def _retrieval(axes: Any, checks: Sequence[Record]) -> None:
    series, chances = _over_epochs(checks, "metrics"), _over_epochs(checks, "chance")
    colours: dict[str, str] = {}
    for name, (x, y) in series.items():
        direction, _, metric = name.rpartition("_")
        label = None if direction in colours else direction.replace("_", " ")
        colour = colours.setdefault(direction, f"C{len(colours)}")
        axes.plot(x, y, color=colour, linestyle="-" if metric == "R@1" else ":", linewidth=1.4, label=label,
                  marker="o" if len(x) == 1 else None, markersize=3)
        if metric == "R@1" and name in chances:
            axes.plot(*chances[name], color=colour, linestyle="--", linewidth=0.7, alpha=0.7)
    axes.set_title("validation retrieval: R@1 (its chance dashed), and R@5 dotted", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylim(0, 1)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    if series:  # beside the curves, which may be anywhere
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _over_epochs(checks: Sequence[Record], kind: str) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs and values of R@1 and R@5 of each direction."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in checks:
        for name, value in flat_values(record.get(kind) or {}).items():
            if name.endswith(("R@1", "R@5")):
                x, y = series.setdefault(name, ([], []))
                x.append(record["epoch"])
                y.append(value)
    return series


def _xy(records: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    kept = [record for record in records if record.get(y) is not None]
    return [record[x] for record in kept], [record[y] for record in kept]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Running mean over a 20th of the curve, shorter at its ends, so that it starts and stops where the curve does."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.arange(len(values))
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _figure(width_in: float, height_in: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


# ---- grids of answers --------------------------------------------------------------------------------------------


def retrieval_grid(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Draw retrieval results as one image: a row for each text query, with its text at the left, then the images or
    sounds that rank best, best first, those that belong to the query framed in green.

    Args:
        rows: one dict for each query: "query" (text), "rank" (of the first right answer, from 1), "candidates" (how
            many were ranked), "modality" of them, and "answers", each {"picture", "caption", "score", "right"}. A
            picture is an image, uint8 (H, W, 3), or a log-mel (T, 80) at 100 frames a second, with its caption below.

    Returns:
        uint8 (H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    columns = max((len(row["answers"]) for row in rows), default=1)
    figure = _figure(2.2 + 1.35 * columns, 0.4 + 1.75 * max(len(rows), 1))
    kind = {"image": "images", "audio": "sounds"}.get(rows[0]["modality"] if rows else "", "")
    title = f"Best answers among {rows[0]['candidates']} {kind}, cosine below each; right ones in green" if rows else ""
    figure.suptitle(title or "Nothing to show", fontsize=9, color=FAINT)
    cells = figure.subplots(max(len(rows), 1), columns + 1, squeeze=False,
                            gridspec_kw={"width_ratios": [1.8, *[1] * columns]})
    for axes in cells.flat:
        axes.set_axis_off()
    for row, (query_axes, *answer_axes) in zip(rows, cells, strict=False):
        query_axes.text(0, 0.5, f"{_wrapped(row['query'], 30)}\nright one at rank {row['rank']} of {row['candidates']}",
                        fontsize=9, va="center", color=RIGHT if row["rank"] == 1 else INK, family=_fonts())
        for axes, answer in zip(answer_axes, row["answers"], strict=False):
            _draw_answer(axes, answer)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font with Chinese letters here: boxes are drawn
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_answer(axes: Any, answer: Mapping[str, Any]) -> None:
    """Draw one answer of `retrieval_grid`: its image or log-mel, its cosine below, a green frame if it is right."""
    picture, score = answer["picture"], f"{round(answer['score'], 2) + 0.0:.2f}"  # never -0.00
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    if picture.ndim == 3:
        axes.imshow(picture)
        axes.set_xlabel(score, fontsize=8)
    else:  # a log-mel: time to the right, low tones at the bottom
        mel_TM = picture.astype(np.float32)
        axes.imshow(mel_TM.T, origin="lower", aspect="auto", cmap="inferno", vmin=np.percentile(mel_TM, 5))
        axes.set_xlabel(f"{score}   {len(picture) / 100:.1f} s\n{_wrapped(answer['caption'], 22)}", fontsize=7,
                        family=_fonts())
    for side in axes.spines.values():
        side.set(color=RIGHT if answer["right"] else FAINT, linewidth=3 if answer["right"] else 0.6)


def _wrapped(text: str, width: int) -> str:
    """`text` in lines of `width` letters, or half as many Chinese ones; six lines at most."""
    width = width if text.isascii() else width // 2
    return "\n".join(textwrap.wrap(text.replace("$", "\\$"), width, max_lines=6, placeholder="...")) or " "


@functools.cache
def _fonts() -> list[str]:
    """matplotlib's own font, which has the letters of Europe, then those with Chinese ones that are installed."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
