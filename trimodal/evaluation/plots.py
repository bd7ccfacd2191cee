"""Pictures of a report: curves of training, and grids of what a query finds. Labels are English: fonts have those.

    loss_curves(records), progress_curves(records)     # PNG as bytes, from the records of metrics.jsonl
    retrieval_grid(rows)                               # uint8 (H, W, 3), from protocols.examples

Grids are drawn by Pillow, since they are made while training: matplotlib would take 40 MB of the budget. matplotlib and
Pillow load only when something is drawn; no global state of either is touched.
"""

import functools
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

INK, FAINT, RIGHT, FRAME = (30, 30, 30), (120, 120, 120), (20, 150, 60), (205, 205, 205)
THUMB, GAP, MARGIN, TEXT_WIDTH, SMALL, LARGE = 132, 14, 16, 230, 12, 15  # pixels
MEL_COLOURS = np.array([(8, 6, 30), (75, 15, 110), (185, 50, 90), (245, 130, 40), (252, 250, 165)], np.float64)
CJK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc",
             "simhei.ttf", "DroidSansFallback.ttf")


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
    places, waiting = _xy(steps, "step", "data_wait_pct")
    twin = panels[3].twinx()
    twin.plot(places, smooth(waiting), linestyle="--", linewidth=0.9, color="grey")
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
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
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
    """One line a query: its words at the left, then its best answers, best first, the right ones framed in green.

    Args:
        rows: {"query", "rank", "candidates", "modality", "answers": [{"picture", "caption", "score", "right"}]}. A
            picture is uint8 (H, W, 3), or a log-mel (T, 80) at 100 frames a second, whose caption is then written
            below.

    Returns:
        uint8 (H, W, 3); a line of words where there are no rows.
    """
    from PIL import Image, ImageDraw

    columns = max((len(row["answers"]) for row in rows), default=0)
    width = 2 * MARGIN + TEXT_WIDTH + columns * (THUMB + GAP)
    heights = [_row_height(row) for row in rows]
    image = Image.new("RGB", (max(width, 420), 2 * MARGIN + 30 + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    kind = {"image": "pictures", "audio": "sounds"}.get(rows[0]["modality"] if rows else "", "")
    title = (f"Best answers among {rows[0]['candidates']} {kind}, cosine below each; a green frame marks a right one"
             if rows else "")
    draw.text((MARGIN, MARGIN), title or "Nothing to show", FAINT, font(SMALL))
    top = MARGIN + 30
    for row, height in zip(rows, heights, strict=True):
        _draw_row(image, draw, row, top)
        top += height
    return np.asarray(image)


def _draw_row(image: Any, draw: Any, row: Mapping[str, Any], top: int) -> None:
    words = wrap(row["query"], LARGE, TEXT_WIDTH - GAP, 6)
    _write(draw, (MARGIN, top), words, INK, LARGE)
    place = f"right one at rank {row['rank']} of {row['candidates']}"
    _write(draw, (MARGIN, top + len(words) * (LARGE + 4) + 4), [place], RIGHT if row["rank"] == 1 else FAINT, SMALL)
    for column, answer in enumerate(row["answers"]):
        left = MARGIN + TEXT_WIDTH + column * (THUMB + GAP)
        picture = _thumb(answer["picture"])
        image.paste(picture, (left, top))
        outline, line = (RIGHT, 4) if answer["right"] else (FRAME, 1)
        draw.rectangle((left - line, top - line, left + picture.width - 1 + line, top + picture.height - 1 + line),
                       outline=outline, width=line)
        _write(draw, (left, top + picture.height + 7), _below(answer), RIGHT if answer["right"] else FAINT, SMALL)


def _row_height(row: Mapping[str, Any]) -> int:
    words = len(wrap(row["query"], LARGE, TEXT_WIDTH - GAP, 6)) * (LARGE + 4) + 4 + SMALL + 4
    answers = [_thumb_size(answer["picture"])[1] + 7 + len(_below(answer)) * (SMALL + 4) for answer in row["answers"]]
    return max([words, *answers]) + GAP


def _below(answer: Mapping[str, Any]) -> list[str]:
    """Lines below an answer: its score, and of a sound its length and caption."""
    score = f"{round(answer['score'], 2) + 0.0:.2f}"  # never -0.00
    if answer["picture"].ndim == 3:
        return [score]
    return [f"{score}   {len(answer['picture']) / 100:.1f} s", *wrap(answer["caption"], SMALL, THUMB, 3)]


def _thumb_size(picture: np.ndarray) -> tuple[int, int]:
    return (THUMB, THUMB) if picture.ndim == 3 else (THUMB, THUMB * 5 // 8)


def _thumb(picture: np.ndarray) -> Any:
    """The whole picture, within a square; of a log-mel its spectrogram, low tones at the bottom."""
    from PIL import Image

    size = _thumb_size(picture)
    if picture.ndim == 2:
        return Image.fromarray(spectrogram(picture)).resize(size, Image.Resampling.BILINEAR)
    scale = THUMB / max(picture.shape[:2])
    shape = tuple(max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    square = Image.new("RGB", size, (245, 245, 245))
    square.paste(Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS),
                 ((THUMB - shape[0]) // 2, (THUMB - shape[1]) // 2))
    return square


def spectrogram(mel_TM: np.ndarray) -> np.ndarray:
    """uint8 (M, T, 3), from dark to bright between its 5th percentile and its maximum."""
    image_MT = np.flipud(mel_TM.astype(np.float64).T)
    low, high = np.percentile(image_MT, 5), image_MT.max()
    level_MT = np.clip((image_MT - low) / max(high - low, 1e-6), 0, 1) * (len(MEL_COLOURS) - 1)
    stops = np.arange(len(MEL_COLOURS))
    return np.stack([np.interp(level_MT, stops, channel) for channel in MEL_COLOURS.T], axis=-1).astype(np.uint8)


# ---- words -------------------------------------------------------------------------------------------------------


def wrap(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between words, Chinese characters, or else anywhere; what does
    not fit in `max_lines` is cut off with dots."""
    shown = font(size, text)
    words = re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+|\s+", text.strip())
    pieces = [piece for word in words for piece in ([word] if shown.getlength(word) <= width else word)]
    lines = [""]
    for piece in (" " if piece.isspace() else piece for piece in pieces):
        if shown.getlength((lines[-1] + piece).rstrip()) <= width:
            lines[-1] += piece
        else:
            lines.append(piece)
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and shown.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[:max_lines - 1], last.rstrip() + "..."]


def _write(draw: Any, place: tuple[int, int], lines: Sequence[str], colour: tuple[int, int, int], size: int) -> None:
    shown = font(size, "".join(lines))
    for n, line in enumerate(lines):
        draw.text((place[0], place[1] + n * (size + 4)), line, colour, shown)


def font(size: int, text: str = "") -> Any:
    """The font that shows `text`."""
    return _font(size, not text.isascii())


@functools.lru_cache(maxsize=8)
def _font(size: int, wide: bool) -> Any:
    """Pillow's own font, which has English letters; for others the first one found with Chinese characters, else
    matplotlib's, which has those of Europe."""
    from PIL import ImageFont

    for name in CJK_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    if not wide:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
