"""Pictures of reports: grids frame what is right, words fit, curves stand for any run, long, short or empty."""

import io
import warnings

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


def _green(grid: np.ndarray) -> np.ndarray:
    """Where the colour of a right answer is, without the words at the left."""
    colour = [int(plots.RIGHT[i:i + 2], 16) for i in (1, 3, 5)]
    return (grid == colour).all(2)[:, grid.shape[1] // 4:]


def test_the_grid_frames_the_right_answer_and_no_other() -> None:
    first, last = (np.flatnonzero(_green(plots.retrieval_grid(_rows(right=k))).any(0)) for k in (0, 4))
    assert len(first) and len(last) and first.max() < last.min(), "one column each"
    assert not _green(plots.retrieval_grid(_rows(right=7))).any()


def test_the_grid_shows_the_whole_picture_in_its_shape() -> None:
    grid = plots.retrieval_grid(_rows(count=1))
    filled = (grid == 90).all(2)  # 60 x 100 pixels of grey 90
    height, width = filled.any(1).sum(), filled.any(0).sum()
    assert grid.dtype == np.uint8 and width > 50 and height / width == pytest.approx(0.6, abs=0.05)


def test_the_grid_has_a_line_for_each_query_and_shows_sounds() -> None:
    one, three = (plots.retrieval_grid(_rows("audio", count=count)).shape[0] for count in (1, 3))
    assert three > 2 * one and plots.retrieval_grid([]).shape[2] == 3


def test_a_spectrogram_has_low_tones_at_the_bottom() -> None:
    rows = _rows("audio", count=1)
    mel = np.full((100, 80), -10.0, np.float16)
    mel[:, 5] = 0.0  # a low tone
    rows[0]["answers"] = [{**rows[0]["answers"][0], "picture": mel, "right": False}]
    grid = plots.retrieval_grid(rows).astype(int)[:, -100:]
    dark = np.flatnonzero((grid.sum(2) < 60).sum(1) > 50)  # the ground of the spectrogram
    bright = np.flatnonzero((grid[:, :, 0] > 200).sum(1) > 50)
    tone = [row for row in bright if dark.min() < row < dark.max()]
    assert tone and min(tone) > dark.min() + 0.8 * (dark.max() - dark.min())


@pytest.mark.parametrize("query", ["word " * 60, "x" * 300, "一只红色的猫" * 9, "", "$x$ and $"])
def test_any_words_can_be_drawn(query: str) -> None:
    rows = [{**row, "query": query} for row in _rows(count=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.retrieval_grid(rows).shape == plots.retrieval_grid(_rows(count=1)).shape


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
