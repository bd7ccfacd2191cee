"""Pretrained towers small enough for float64 on a CPU, with all that must not show in training: statistics of a batch,
dropout, padding."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimodal.towers import opening, settings
from trimodal.towers.base import (
    Encoded,
    ImageInput,
    Input,
    PretrainedTower,
    SoundInput,
    TextInput,
    describe,
    sealed,
)
from trimodal.towers.opening import open_tower

FAMILY = "tiny"
SIDE, WORDS = 48, 60
WIDTHS = {"image": 20, "text": 32, "audio": 12}  # of text that of narrow models
TOKENIZER = """{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"}, "pre_tokenizer":
    {"type": "Whitespace"}, "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab":
    {"<unk>": 0, "a": 1, "red": 2, "green": 3, "blue": 4, "circle": 5, "square": 6, "tone": 7, "low": 8, "high": 9}}}"""
INPUTS: dict[str, Input] = {"image": ImageInput(SIDE, (0.5,) * 3, (0.25,) * 3, "crop", 0.875, "bicubic"),
          "text": TextInput(TOKENIZER, 64, None, 1, True),
          "audio": SoundInput(16_000, "log_mel", 80, 100.0, 64, False)}


class TinyTower(PretrainedTower):
    """A table or a projection of patches, two blocks with BatchNorm and dropout, and a pooled feature of its own."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.modality = description["modality"]  # type: ignore[misc]
        D = WIDTHS[self.modality]
        blocks = [nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, D), nn.GELU(), nn.Dropout(0.5)) for _ in range(2)]
        super().__init__(description, D, 2, blocks)
        patches = {"image": lambda: nn.Linear(3 * 16 * 16, D), "text": lambda: nn.Embedding(WORDS, D),
                   "audio": lambda: nn.Linear(16 * 80, D)}
        self.embed: Any = patches[self.modality]()
        self.layers, self.pooler = nn.ModuleList(blocks), nn.Linear(D, D)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        x_BND, valid_BN = self._embedded(inputs, valid)
        for block in self.layers:
            x_BND = x_BND + block(x_BND.flatten(0, 1)).view_as(x_BND)
        weight_BN1 = torch.ones_like(x_BND[:, :, :1]) if valid_BN is None else valid_BN[:, :, None].to(x_BND.dtype)
        return Encoded(x_BND, valid_BN, self.pooler((x_BND * weight_BN1).sum(1) / weight_BN1.sum(1)))

    def _embedded(self, inputs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.modality == "text":
            return self.embed(inputs), valid
        if self.modality == "image":
            grid = self.standardised(inputs).unflatten(3, (-1, 16)).unflatten(2, (-1, 16))
            return self.embed(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)), None
        x_BND = self.embed(inputs.to(self.embed.weight.dtype).unflatten(1, (-1, 16)).flatten(2))
        starts = torch.arange(x_BND.shape[1]) * 16
        return x_BND, None if valid is None else starts < valid[:, None]

    def layer_of(self, parameter_name: str) -> int:
        return 0 if parameter_name.startswith("embed") else 3


def tiny_tower(modality: str, dtype: torch.dtype = torch.float64) -> PretrainedTower:
    """The same weights at every call, with statistics as after training."""
    torch.manual_seed(7)
    tower = build(describe(FAMILY, modality, f"./tiny_{modality}", "MIT", INPUTS[modality]))
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return sealed(tower).to(dtype)


def build(description: Mapping[str, Any]) -> PretrainedTower:
    return TinyTower(description)


@contextlib.contextmanager
def by_name() -> Iterator[None]:
    """Within, `open_tower` and `build_tower` know the tiny towers, in float32."""
    def opened(name: str, modality: str, **options: Any) -> PretrainedTower:
        return tiny_tower(modality, torch.float32) if "tiny" in name else open_tower(name, modality, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "open_tower", opened)
        patch.setitem(opening.FAMILIES, FAMILY, sys.modules[__name__])
        yield


@pytest.fixture
def tiny_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `build_tower` build them again."""
    monkeypatch.setitem(opening.FAMILIES, FAMILY, sys.modules[__name__])
    yield
