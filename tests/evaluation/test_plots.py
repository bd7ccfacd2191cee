"""Pictures of reports: grids frame what is right, words fit, curves stand for any run, long, short or empty."""

import io

import numpy as np
import pytest
from PIL import Image

from trimodal.evaluation import plots


def _steps(stage: str, part: str, first: int) -> list[dict]:
    return [{"kind": "step", "stage": stage, "epoch": 1, "step": step, "task": "image_text", "loss": 4.0 / step,
             "parts": {part: 4.0 / step, "matching": 0.5, "matching_accuracy": 0.9}, "lr": 1e-4, "samples_per_s": 50.0,
             "data_wait_pct": 2.0} for step in range(first, first + 40)]


STEPS = _steps("pretrain", "masked_image", 1) + _steps("align", "contrastive_image_text", 41)
CHECKS = [{"kind": "validation", "stage": stage, "epoch": epoch, "step": 40 * epoch, "loss": 1.5,
           "metrics": {"image_to_text_R@1": 0.25} if epoch > 1 else {}}
          for epoch, stage in ((1, "pretrain"), (2, "align"))]


def _rows(modality: str = "image", count: int = 2, right: int = 1) -> list[dict]:
    shape, dtype = ((60, 100, 3), np.uint8) if modality == "image" else ((150, 80), np.float16)
    return [{"query": f"query {n}", "source": "stamps", "modality": modality, "rank": right + 1, "candidates": 20,
             "answers": [{"picture": np.full(shape, 90 + 20 * k, dtype), "caption": f"answer {k}",
                          "score": 0.9 - 0.1 * k, "right": k == right} for k in range(5)]} for n in range(count)]


def _pixels(png: bytes | None) -> np.ndarray:
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_grid_frames_the_right_answer_and_no_other():
    grid = plots.retrieval_grid(_rows(right=2))
    assert grid.dtype == np.uint8 and grid.ndim == 3
    green = (grid == plots.RIGHT).all(2)
    words = plots.MARGIN + plots.TEXT_WIDTH - 5
    columns = np.flatnonzero(green[:, words:].any(0)) + words
    left = plots.MARGIN + plots.TEXT_WIDTH + 2 * (plots.THUMB + plots.GAP)
    assert columns.min() == left - 4 and columns.max() == left + plots.THUMB + 3
    none = plots.retrieval_grid(_rows(right=7))
    assert not (none == plots.RIGHT).all(2)[:, words:].any()


def test_the_grid_shows_the_pictures_in_their_shape():
    grid = plots.retrieval_grid(_rows(count=1))
    top = plots.MARGIN + 30
    left = plots.MARGIN + plots.TEXT_WIDTH
    thumb = grid[top:top + plots.THUMB, left:left + plots.THUMB]
    filled = (thumb == 90).all(2)  # 60 x 100 pixels of grey 90, on a lighter ground
    height = filled.any(1).sum()
    assert height == pytest.approx(plots.THUMB * 0.6, abs=1) and filled.any(0).sum() == plots.THUMB


def test_the_grid_grows_with_long_words_and_shows_sounds():
    short, long = _rows("audio", count=1), _rows("audio", count=1)
    long[0]["answers"][0]["caption"] = "a very long caption that goes on and on " * 9
    assert plots.retrieval_grid(long).shape[0] > plots.retrieval_grid(short).shape[0]
    assert plots.retrieval_grid([]).shape[2] == 3


def test_a_spectrogram_has_low_tones_at_the_bottom():
    rows = _rows("audio", count=1)
    mel = np.full((100, 80), -10.0, np.float16)
    mel[:, 5] = 0.0  # a low tone
    rows[0]["answers"][0]["picture"] = mel
    grid, left, top = plots.retrieval_grid(rows), plots.MARGIN + plots.TEXT_WIDTH, plots.MARGIN + 30
    picture = grid[top:top + plots.THUMB * 5 // 8, left:left + plots.THUMB]
    low, high = int(len(picture) * 74.5 / 80), int(len(picture) * 5.5 / 80)
    assert picture[low].mean() > 150 and picture[high].mean() < 30


@pytest.mark.parametrize("text", ["one two three four five six seven eight nine", "word " * 60, "x" * 300,
                                  "一只红色的猫坐在绿色的草地上看着远处的山和天空" * 3, "", "a " + "y" * 90 + " b"])
def test_wrapped_lines_fit_and_keep_the_words(text):
    lines = plots.wrap(text, 14, 150, 4)
    font = plots.font(14, text)
    assert len(lines) <= 4 and all(font.getlength(line) <= 150 for line in lines)
    joined = "".join(lines).replace(" ", "")
    whole = text.replace(" ", "")
    assert joined == whole or (joined.endswith("...") and whole.startswith(joined[:-3]))


def test_curves_of_runs_long_short_and_empty():
    assert plots.loss_curves([]) is None and plots.progress_curves([]) is None
    assert plots.loss_curves([{"kind": "event", "message": "x"}]) is None
    wide, narrow = _pixels(plots.loss_curves(STEPS)), _pixels(plots.loss_curves(STEPS[:40]))
    assert wide.shape[1] == 2 * narrow.shape[1]  # a panel each stage
    full = _pixels(plots.progress_curves(STEPS + CHECKS))
    assert _pixels(plots.progress_curves(STEPS[:1])).shape == full.shape == _pixels(plots.progress_curves(CHECKS)).shape


def test_parts_of_the_loss_are_told_apart_by_task():
    parts = plots.loss_parts(iter(STEPS))
    assert parts.keys() == {"masked_image (image_text)", "contrastive_image_text", "matching (image_text)"}
    assert parts["contrastive_image_text"][0] == list(range(41, 81))
    unknown = plots.loss_parts(iter([{"step": 1, "loss": None, "parts": {"a": None, "b": 1.0}}]))
    assert unknown == {"b": ([1], [1.0])}


def test_validation_figures_may_be_flat_or_nested():
    nested = {"all": {"image-text": {"image_to_text_R@1": {"value": 0.5}}}, "coco": {"x": {"y": {"value": 0.1}}}}
    assert plots.flat_values(nested) == {"image_to_text_R@1": 0.5}
    assert plots.flat_values({"image_to_text_R@1": 0.5, "x": None}) == {"image_to_text_R@1": 0.5}
    assert plots.flat_values({}) == {}


def test_smoothing_keeps_constants_and_ends():
    assert plots.smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert plots.smooth([1.0, 5.0]) == pytest.approx([1.0, 5.0])
    assert len(plots.smooth([])) == 0
