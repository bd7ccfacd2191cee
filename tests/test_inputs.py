"""What the model refuses to be given, by whichever way it is given; and what it takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import TriModalModel
from tests.narrow import narrow_model
from tests.refusals import refused
from trimodal.data.audio import log_mel

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def narrow() -> TriModalModel:
    return narrow_model().float().eval()


def photo() -> Tensor:
    """Floats in 0..1, light and dark, (1, 3, 32, 32)."""
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def label(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else "-".join(map(str, value))


def ways(model: TriModalModel, name: str) -> list[Callable[..., object]]:
    """The whole model and the encoder of the one modality."""
    alone: dict[str, Callable[..., object]] = {
        "images": model.image_features, "input_ids": model.text_features, "audio": model.audio_features}
    return [model, alone[name]]


@pytest.mark.parametrize(("images", "named"), [
    (torch.zeros(2, 3, 40, 40), ("[2, 3, 40, 40]", 16)), (torch.zeros(2, 32, 32), ("[2, 32, 32]",)),
    (torch.zeros(2, 32, 32, 3), ("[2, 32, 32, 3]",)), (torch.zeros(0, 3, 32, 32), ("[0, 3, 32, 32]",)),
    (255 * photo(), ("255", "floats from 0 to 1")), ((photo() - MEAN) / STD, ("standardised",)),
    (2 * photo() - 1, ("floats from 0 to 1",)),
    ((255 * photo()).half(), ("255",)), ((255 * photo()).long(), ("torch.int64", "uint8")),
    (photo() > 0.5, ("torch.bool", "uint8")), (photo().masked_fill(photo() > 0.9, float("nan")), ("nan",)),
    (torch.full((1, 3, 32, 32), float("inf")), ("inf",))], ids=label)
def test_pictures_that_cannot_be_meant(narrow: TriModalModel, images: Tensor, named: tuple) -> None:
    for encode in ways(narrow, "images"):
        with refused("images", *named, error=ValueError):
            encode(images=images)


def test_pictures_that_are_meant(narrow: TriModalModel) -> None:
    """Bytes, floats, and what resizing with overshoot makes of the hardest edges."""
    edges = (torch.arange(48) % 6 < 3).float().expand(1, 3, 48, 48) * (torch.arange(48) % 8 < 4).float()[:, None]
    resized = torch.nn.functional.interpolate(edges, size=(32, 32), mode="bicubic")
    assert resized.min() < -0.05 and resized.max() > 1.05
    for images in (resized, photo(), photo().double().half(), photo().requires_grad_(), (255 * photo()).byte(),
                   torch.zeros(1, 3, 16, 48)):
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert narrow(images=images)["image_features"].isfinite().all()


@pytest.mark.parametrize(("given", "named"), [
    ({"input_ids": torch.zeros(5, dtype=torch.long)}, ("input_ids", "[5]")),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ("input_ids", "[2, 0]")),
    ({"input_ids": torch.zeros(2, 5)}, ("input_ids", "torch.float32", "int64")),
    ({"input_ids": torch.tensor([[1, 30_000]])}, ("input_ids", 30_000, "tokenizer")),
    ({"input_ids": torch.tensor([[1, -100]])}, ("input_ids", -100)),
    ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
     ("attention_mask", "[2, 4]", "[2, 5]"))], ids=label)
def test_texts_that_cannot_be_meant(narrow: TriModalModel, given: dict, named: tuple) -> None:
    for encode in ways(narrow, "input_ids"):
        with refused(*named, error=ValueError):
            encode(**given)


SOUND = torch.from_numpy(log_mel(0.1 * np.sin(np.arange(6400, dtype=np.float32) / 5)))[None]  # (1, 40, 80)


@pytest.mark.parametrize(("given", "named"), [
    ({"audio": torch.zeros(2, 40, 64)}, ("[2, 40, 64]",)), ({"audio": torch.zeros(2, 0, 80)}, ("[2, 0, 80]",)),
    ({"audio": torch.zeros(2, 16_000)}, ("[2, 16000]",)),
    ({"audio": SOUND.clamp(min=-12) * 10 / np.log(10)}, ("decibels",)), ({"audio": SOUND.exp() * 1e4}, ("log_mel",)),
    ({"audio": SOUND.long()}, ("torch.int64", "log_mel")),
    ({"audio": SOUND.masked_fill(SOUND < -9, float("nan"))}, ("nan",)),
    ({"audio": SOUND, "audio_lengths": torch.tensor([6400])}, ("audio_lengths", 6400, 40)),
    ({"audio": SOUND, "audio_lengths": torch.tensor([0])}, ("audio_lengths", 0, 40)),
    ({"audio": SOUND, "audio_lengths": torch.tensor([40, 40])}, ("audio_lengths", "[2]", "[1]"))], ids=label)
def test_sounds_that_cannot_be_meant(narrow: TriModalModel, given: dict, named: tuple) -> None:
    for encode in ways(narrow, "audio"):
        with refused(*named, error=ValueError):
            encode(**given)


def test_sounds_that_are_meant(narrow: TriModalModel) -> None:
    """Silence, the loudest that is read, half precision; what stands behind the length is of no interest."""
    loudest = torch.from_numpy(log_mel(np.sign(np.sin(np.arange(6400) / 5)).astype(np.float32) * 1e6))[None]
    silence = torch.from_numpy(log_mel(np.zeros(6400, np.float32)))[None]
    padded = torch.cat([SOUND, torch.full((1, 40, 80), float("nan"))], dim=1)
    for audio, lengths in ((loudest, None), (silence, None), (SOUND.half(), torch.tensor([40])),
                           (padded, torch.tensor([40], dtype=torch.int32))):
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert narrow(audio=audio, audio_lengths=lengths)["audio_features"].isfinite().all()


def test_nothing_is_looked_at_where_there_are_no_numbers(narrow: TriModalModel) -> None:
    """Exported programs and memory plans, whose tensors are fake."""
    program = torch.export.export(narrow, (), {"images": photo(), "audio": SOUND, "audio_lengths": torch.tensor([40])})
    with torch.no_grad():
        exported, own = (model(images=photo(), audio=SOUND, audio_lengths=torch.tensor([40]))
                         for model in (program.module(), narrow))
    for name, value in own.items():
        assert torch.allclose(exported[name], value, atol=1e-5), name
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert narrow(images=torch.empty(2, 3, 32, 32))["image_features"].shape == (2, 24)
