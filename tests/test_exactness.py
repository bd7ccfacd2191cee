"""An effective batch of 256 is one batch, however it is cut: the loss and every gradient, with all the randomness on.

Token dropping, drop-path and SpecAugment are in the batch as data. Cuts are 1 x 256, 4 x 64, 16 x 16, and a ragged one
that differs by tower and leaves uneven last parts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batches import spec_augment
from datasets import Batch
from losses import Objective, build_objective
from model import TriModalModel
from steps import accumulate
from tests.narrow import make_batch, narrow_model, part_of, step_of

B = 256
CUTS: dict[str, int | dict[str, int]] = {
    "4 x 64": 64, "16 x 16": 16, "ragged": {"image": 100, "audio": 37, "text": 83, "fusion": 45}}
TASKS = {
    "image text, infonce": ("image text", "contrastive", "infonce"),
    "audio text, infonce": ("audio text", "contrastive", "infonce"),
    "image audio, infonce": ("image audio", "contrastive", "infonce"),
    "image text, sigmoid": ("image text", "contrastive", "sigmoid"),
    "audio text, sigmoid": ("audio text", "contrastive", "sigmoid"),
    "all of finetune": ("image text", "contrastive matching concepts", "infonce"),
    "all of finetune on sounds, sigmoid": ("audio text", "contrastive matching concepts", "sigmoid"),
    "masked": ("image audio text", "masked", "infonce"),
}


def batch_of(inputs: Sequence[str], size: int = B) -> Batch:
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
             device: str = "cpu", **settings: Any) -> dict[str, Tensor]:
    """Loss and the gradient of each parameter, of the whole batch or of some of its samples alone."""
    inputs, names, loss = TASKS[task]
    model = model_of(dtype)
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, loss).to(device, dtype) for name in names.split()]
    batch = batch_of(inputs.split())
    step = step_of(model.to(device), batch if rows is None else part_of(batch, rows), cut,
                   device=torch.device(device), **settings)
    both = nn.ModuleDict({"model": model, "heads": nn.ModuleList(objectives)})
    parts = accumulate(step, (term for objective in objectives for term in terms(objective, step)), Tensor.backward)
    return {"loss": parts["loss"], **{name: p.grad for name, p in both.named_parameters() if p.grad is not None}}


def terms(objective: Objective, step):
    for value, _ in objective.terms(step):
        loss = value / objective.count(step)
        yield loss, {"loss": loss.detach()}


@functools.cache
def whole(task: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return gradient(task, dtype, 1000)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("task", TASKS)
def test_each_parameters_gradient_in_float64(task: str, cut: str) -> None:
    expected, found = whole(task, torch.float64), gradient(task, torch.float64, CUTS[cut])
    assert found.keys() == expected.keys()
    far = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
           if value.norm() > 1e-12 and (found[name] - value).norm() > 1e-9 * value.norm()}
    assert far == {}
    if "contrastive" in TASKS[task][1]:
        pair = {"image text": "image_text", "audio text": "audio_text", "image audio": "image_audio"}[TASKS[task][0]]
        assert expected[f"model.logit_scale.{pair}"].abs() > 1e-6
        if TASKS[task][2] == "sigmoid":
            assert expected[f"model.logit_bias.{pair}"].abs() > 1e-6


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_and_the_whole_gradient_in_float32(task: str, cut: str) -> None:
    expected, found = whole(task, torch.float32), gradient(task, torch.float32, CUTS[cut])
    assert float((found["loss"] - expected["loss"]).abs()) <= 1e-6 * float(expected["loss"].abs())
    one, other = (torch.cat([value.flatten() for name, value in grads.items() if name != "loss"])
                  for grads in (expected, found))
    assert float((one - other).norm()) <= 1e-6 * float(one.norm())


@pytest.mark.parametrize("task", ["image text, infonce", "audio text, sigmoid"])
def test_plain_accumulation_is_another_loss(task: str) -> None:
    """Four losses over 64 samples each: fewer negatives, so another loss and another gradient."""
    expected = whole(task, torch.float64)
    parts = [gradient(task, torch.float64, 1000, rows) for rows in torch.arange(B).split(64)]
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in expected}
    names = [name for name in expected if name != "loss"]
    apart = torch.stack([(expected[name] - mean[name]).norm() for name in names]).norm()
    assert apart > 0.05 * torch.stack([expected[name].norm() for name in names]).norm()
    assert abs(float(expected["loss"] - mean["loss"])) > 0.1
