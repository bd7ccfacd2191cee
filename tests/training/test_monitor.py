"""What the figures of a stage must look like for a line to be said, and that a resumed stage says the same lines."""

import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.narrow import make_batch
from tests.refusals import assert_names
from trimodal.objectives.contrastive import info_nce, pairwise_sigmoid, positives_of
from trimodal.training.diagnostics import CHANCE_STEPS, LEAST, WINDOW, Figures, Monitor, guessing_loss


def reported(monitor: Monitor, losses: Iterable[float], norms: Iterable[float] | None = None, task: str = "image_text",
          start: int = 1) -> list[tuple[int, str]]:
    """At which steps something is said, and what."""
    values = list(losses)
    norms = [1.0] * len(values) if norms is None else norms
    return [(step, line) for step, (loss, norm) in enumerate(zip(values, norms, strict=True), start)
            for line in monitor.observe(step, task, Figures(loss, norm, {}))]


def noisy(count: int, seed: int = 0) -> np.ndarray:
    """A loss about 2."""
    return 2 + 0.1 * np.random.default_rng(seed).standard_normal(count)


# ---- spikes ------------------------------------------------------------------------------------------------------


def test_a_loss_far_above_its_median_is_said_with_stage_step_figures_and_what_to_do() -> None:
    monitor = Monitor("align", 0)
    assert reported(monitor, [2.0, 2.2] * 50) == []
    [(_, line)] = reported(monitor, [7.3], start=101)
    assert_names(line, "align", 101, "image_text", 7.3, 2.1, "--lr")
    assert line.index("7.3") < line.index("2.1"), "the value, then the usual one"


def test_a_gradient_far_above_its_median_is_said() -> None:
    monitor = Monitor("align", 0)
    [(step, line)] = reported(monitor, [2.0] * 101, [1.0, 1.5] * 50 + [40.0])
    assert step == 101
    assert_names(line, "align", 101, "gradient", "image_text", 40, 1.25)
    assert line.index("40") < line.index("1.25"), "the value, then the usual one"


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_falling_losses_say_nothing(seed: int) -> None:
    """Normal noise on a loss that falls from 3.4 to 0.3, and gradients whose logarithm is normal."""
    rng = np.random.default_rng(seed)
    losses = 0.3 + 3.1 * np.exp(-np.arange(5000) / 900) + 0.05 * rng.standard_normal(5000)
    norms = np.exp(0.35 * rng.standard_normal(5000)) * np.linspace(5, 0.5, 5000)
    assert reported(Monitor("align", 0), losses.tolist(), norms.tolist()) == []


def test_a_spike_is_said_once_however_long_it_is_and_the_next_one_not_at_once() -> None:
    monitor = Monitor("s", 0)
    usual = noisy(WINDOW).tolist()
    lines = reported(monitor, [*usual, *[9.0] * 20, *usual[:10], 9.0, *usual, 9.0])
    assert [step for step, _ in lines] == [101, 232]


def test_a_new_level_becomes_the_usual_one() -> None:
    assert len(reported(Monitor("s", 0), [*noisy(200), *(4 * noisy(1000, 1))])) == 1


def test_a_few_steps_say_nothing_and_tasks_have_medians_of_their_own() -> None:
    assert reported(Monitor("s", 0), [1.0] * (LEAST - 1) + [99.0]) == []
    assert len(reported(Monitor("s", 0), [1.0] * LEAST + [99.0])) == 1
    monitor = Monitor("s", 0)
    both = [reported(monitor, [value], task=task, start=step) for step in range(200)
            for task, value in (("image_text", 1.0), ("audio_text", 50.0))]
    assert not any(both)


# ---- a contrast that learns nothing ------------------------------------------------------------------------------


def contrast(monitor: Monitor, parts: Sequence[float], sizes: Sequence[int] = (32,), start: int = 1) -> list[str]:
    """Losses as parts of that of guessing, on batches of `sizes` in turn."""
    lines = []
    for step, part in enumerate(parts, start):
        guess = math.log(sizes[step % len(sizes)])  # of as many captions
        lines += monitor.observe(step, "image_text", Figures(1.0, 1.0, {"image_text": (part * guess, guess)}))
    return lines


def test_a_contrast_at_the_loss_of_guessing_is_said_once_a_stage_after_warm_up() -> None:
    monitor = Monitor("align", 40)
    assert contrast(monitor, [1.001] * (39 + CHANCE_STEPS), (32, 31)) == []
    [line] = contrast(monitor, [1.001] * 2000, (32, 31), start=40 + CHANCE_STEPS)
    assert_names(line, "align", 40 + CHANCE_STEPS, "image_text", CHANCE_STEPS, 3.469, 3.466)
    assert line.index("3.469") < line.index("3.466"), "the loss, then that of guessing"


def test_a_contrast_that_has_learnt_anything_is_left_alone_until_it_collapses() -> None:
    monitor = Monitor("align", 0)
    assert contrast(monitor, [*np.linspace(1, 0.9, CHANCE_STEPS), *[0.9] * 1000]) == []
    assert len(contrast(monitor, [1.0] * 300, start=2001)) == 1


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("inputs", ["image text", "image audio"])
@pytest.mark.parametrize("size", [2, 13])
def test_guessing_is_the_loss_of_features_that_are_all_alike(kind: str, inputs: str, size: int) -> None:
    """With several captions a sample, some worded alike, two visits of one sample, and two samples with one file."""
    batch = make_batch(inputs.split(), size)
    keys = size if batch.caption_owner is None else len(batch.caption_owner)
    positives = positives_of(batch, inputs.split())
    query = F.normalize(torch.ones(size, 4, dtype=torch.float64), dim=1)
    key = F.normalize(torch.ones(keys, 4, dtype=torch.float64), dim=1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    if kind == "infonce":
        loss = (info_nce(query, key, scale, positives.of_samples) / size
                + info_nce(key, query, scale, positives.of_captions) / len(key)) / 2
    else:
        share = float(positives.of_samples(torch.arange(size)).double().mean())
        bias = torch.tensor(math.log(share / (1 - share)) if share < 1 else 60.0, dtype=torch.float64) - 1
        loss = pairwise_sigmoid(query, key, scale, bias, positives.of_samples) / len(key)
    assert guessing_loss(batch, inputs.split(), kind) == pytest.approx(float(loss), abs=1e-9)


# ---- across a resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 50, 130, 131, 140, 700])
def test_a_resumed_stage_says_what_an_undisturbed_one_says(stop: int) -> None:
    rng = np.random.default_rng(0)
    losses = (2 + 0.1 * rng.standard_normal(900)).tolist()
    for step in (130, 131, 132, 400, 790):
        losses[step] = 9.0

    def lines(monitor: Monitor, first: int, last: int) -> list[str]:
        return [line for step in range(first, last) for task in ("image_text", "audio_text")
                for line in monitor.observe(step, task, Figures(losses[step], 1.0, {task: (3.5, 3.466)}))]

    whole = lines(Monitor("align", 100), 0, 900)
    assert len(whole) == 8, "three spikes and one contrast of each task"
    before, after = Monitor("align", 100), Monitor("align", 100)
    found = lines(before, 0, stop)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert found + lines(after, stop, 900) == whole
    assert after.state_dict()["series"].keys() == {f"{figure} {task}" for figure in ("loss", "gradient")
                                                   for task in ("image_text", "audio_text")}
