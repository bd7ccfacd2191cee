"""An effective batch is one batch, however it is cut: the loss and every gradient, with all the randomness on.

Token dropping, drop-path and SpecAugment are in the batch as data. Cuts are a ragged one that differs by tower and
leaves uneven last parts and, with `--all`, equal parts; one batch is of 256 samples.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import TriModalModel
from tests.narrow import make_batch, narrow_model, part_of, settings_of, step_of
from trimodal.data.batches import Batch, spec_augment
from trimodal.objectives import build_objective
from trimodal.objectives.base import learn

B, LARGE = 48, 256
CUTS: dict[str, int | dict[str, int]] = {
    "ragged": {"image": 19, "audio": 7, "text": 17, "fusion": 9}, "4 x 12": 12, "12 x 4": 4}
TASKS = {
    "image text, infonce": ("image text", "contrastive", "infonce"),
    "audio text, infonce": ("audio text", "contrastive", "infonce"),
    "image text, soft targets": ("image text", "contrastive", "infonce soft"),
    "audio text, soft targets": ("audio text", "contrastive", "sigmoid soft"),
    "image audio, infonce": ("image audio", "contrastive", "infonce"),
    "image text, sigmoid": ("image text", "contrastive", "sigmoid"),
    "audio text, sigmoid": ("audio text", "contrastive", "sigmoid"),
    "all of finetune": ("image text", "contrastive matching concepts", "infonce"),
    "all of finetune on sounds, sigmoid": ("audio text", "contrastive matching concepts", "sigmoid"),
    "masked": ("image audio text", "masked", "infonce"),
    "words": ("image audio text", "words", "infonce"), "masked words": ("audio text", "masked_words", "infonce"),
}
SINGLE = [task for task, (_, names, _) in TASKS.items() if " " not in names]  # none of these draws wrong pairs


def batch_of(inputs: Sequence[str], size: int) -> Batch:
    batch = make_batch(inputs, size)
    if batch.audio is not None:
        assert batch.audio_lengths is not None
        audio = batch.audio.clone()
        for b, length in enumerate(batch.audio_lengths.tolist()):
            audio[b, :length] = torch.from_numpy(spec_augment(audio[b, :length].numpy(), np.random.default_rng(b)))
        assert not torch.equal(audio, batch.audio), "SpecAugment is on"
        batch = dataclasses.replace(batch, audio=audio)
    return batch


def model_of(dtype: torch.dtype) -> TriModalModel:
    model = narrow_model().to(dtype)
    with torch.no_grad():
        for bias in model.logit_bias.values():
            bias.fill_(-3.0)
    return model


def gradient(task: str, dtype: torch.dtype, cut: int | dict[str, int], rows: Tensor | None = None,
             device: str = "cpu", size: int = B, **settings: Any) -> dict[str, Tensor]:
    """Loss and the gradient of each parameter, of a whole batch of `size` or of some of its samples alone."""
    inputs, names, loss = TASKS[task]
    model = model_of(dtype)
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, settings_of(loss)).to(device, dtype)
                  for name in names.split()]
    batch = batch_of(inputs.split(), size)
    step = step_of(model.to(device), batch if rows is None else part_of(batch, rows), cut,
                   device=torch.device(device), **settings)
    both = nn.ModuleDict({"model": model, "heads": nn.ModuleList(objectives)})
    total = learn(step, [(1.0, objective) for objective in objectives], Tensor.backward).total
    assert total is not None
    return {"loss": total, **{name: p.grad for name, p in both.named_parameters() if p.grad is not None}}


@functools.cache
def whole(task: str, dtype: torch.dtype, size: int = B) -> dict[str, Tensor]:
    return gradient(task, dtype, 1000, size=size)


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Distance of two gradients over the length of the second."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([value.cpu().double().flatten() for name, value in sorted(grads.items()) if name != "loss"])
                  for grads in (found, expected))
    return float((one - other).norm() / other.norm())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's own gradient, and the loss, but for the rounding of float64."""
    assert found.keys() == expected.keys()
    apart = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
             if value.norm() > 1e-12 and (found[name] - value).norm() > 1e-9 * value.norm()}
    assert apart == {}


CASES = [pytest.param(task, cut, marks=() if cut == "ragged" else pytest.mark.repetition)
         for task in TASKS for cut in CUTS]


@pytest.mark.parametrize(("task", "cut"), CASES)
def test_each_parameters_gradient(task: str, cut: str) -> None:
    expected = whole(task, torch.float64)
    assert_equal(gradient(task, torch.float64, CUTS[cut]), expected)
    inputs, names, loss = TASKS[task]
    if "contrastive" in names:
        pair = {"image text": "image_text", "audio text": "audio_text", "image audio": "image_audio"}[inputs]
        assert expected[f"model.logit_scale.{pair}"].abs() > 1e-6
        if "sigmoid" in loss:
            assert expected[f"model.logit_bias.{pair}"].abs() > 1e-6


@pytest.mark.parametrize(("task", "cut"), [
    pytest.param(task, cut, marks=() if task == "all of finetune" and cut == "ragged" else pytest.mark.repetition)
    for task in TASKS for cut in ("ragged", "4 x 64")])
def test_each_parameters_gradient_of_256_samples(task: str, cut: str) -> None:
    sizes: dict[str, int | dict[str, int]] = {
        "ragged": {"image": 100, "audio": 37, "text": 83, "fusion": 45}, "4 x 64": 64}
    found = gradient(task, torch.float64, sizes[cut], size=LARGE)
    assert_equal(found, whole(task, torch.float64, LARGE))


@pytest.mark.parametrize(("task", "cut"), [
    pytest.param(task, cut, marks=() if cut == "ragged" else pytest.mark.repetition)
    for task in SINGLE for cut in CUTS])
def test_in_float32_a_cut_changes_no_more_than_rounding_does(task: str, cut: str) -> None:
    """Rounding is how far the whole batch in float32 is from float64: each may be as far, on its own side.
    Nor is it more than rounding: a wrong path would allow itself any other one."""
    exact, expected = whole(task, torch.float64), whole(task, torch.float32)
    found = gradient(task, torch.float32, CUTS[cut])
    rounding = 2 * far(expected, exact)
    assert rounding <= 1000 * torch.finfo(torch.float32).eps
    assert far(found, expected) <= rounding
    assert abs(float(found["loss"] - expected["loss"])) <= rounding * abs(float(expected["loss"]))


@pytest.mark.parametrize("task", ["image text, infonce", "audio text, sigmoid"])
def test_plain_accumulation_is_another_loss(task: str) -> None:
    """Four losses over a quarter of the samples each: fewer negatives, so another loss and another gradient."""
    expected = whole(task, torch.float64)
    parts = [gradient(task, torch.float64, 1000, rows) for rows in torch.arange(B).split(B // 4)]
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in expected}
    assert far(mean, expected) > 0.05
    assert abs(float(expected["loss"] - mean["loss"])) > 0.1
