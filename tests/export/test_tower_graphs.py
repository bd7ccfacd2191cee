"""Graphs of pretrained towers: a miniature of each family, and what has no graph."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import TriModalModel
from tests.refusals import refused
from tests.small_runs import RECIPE
from tests.tiny_towers import TinyTower, tiny_tower
from tests.towers import test_hub_images, test_hub_texts, test_timm
from trimodal.config import model_config_from_dict
from trimodal.errors import ConfigError
from trimodal.export import onnx
from trimodal.export.graphs import graphs_of
from trimodal.towers.base import Encoded, PretrainedTower
from trimodal.towers.opening import open_tower


def model_with(*towers: PretrainedTower, **settings: Any) -> TriModalModel:
    rows = {tower.modality: {"tower": "./miniature"} for tower in towers}
    config = model_config_from_dict({**RECIPE["model"], "image_size": "auto", "embed_dim": 64, **rows, **settings})
    torch.manual_seed(0)
    return TriModalModel(config, {tower.modality: tower for tower in towers}).eval()


@pytest.mark.repetition
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_tower_with_statistics_of_batches_and_an_adapter(modality: str, tmp_path: Path) -> None:
    tower = tiny_tower(modality, torch.float32)
    rows = {modality: {"tower": "./miniature", "adapter_depth": 1, "keep_tokens": 4}}
    check(tower, tmp_path / "tower.onnx", vocab_size=60, **({"image_size": 32} if modality == "text" else {}), **rows)


def check(tower: PretrainedTower, path: Path, **settings: Any) -> None:
    graph = graphs_of(model_with(tower, **settings), (tower.modality,), torch.uint8)[0]
    onnx.write_graph(graph, path)
    assert onnx.largest_difference(graph, path) < 1e-4


@pytest.mark.repetition
@pytest.mark.parametrize("family", test_hub_images.FAMILIES)
def test_images_of_transformers(family: str, tmp_path: Path) -> None:
    test_hub_images.saved(tmp_path, family)
    check(test_hub_images.opened(tmp_path), tmp_path / "tower.onnx")


@pytest.mark.repetition
@pytest.mark.parametrize("family", test_hub_texts.FAMILIES)
def test_texts_of_transformers(family: str, tmp_path: Path) -> None:
    test_hub_texts.saved(tmp_path, family)
    tower = test_hub_texts.opened(tmp_path)
    check(tower, tmp_path / "tower.onnx", image_size=32, vocab_size=len(test_hub_texts.WORDS))


@pytest.mark.repetition
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext"])
def test_images_of_timm(name: str, tmp_path: Path) -> None:
    weights = test_timm.weights_of(test_timm.model_of(name), tmp_path)
    check(open_tower(f"timm:{name}", "image", weights=weights), tmp_path / "tower.onnx")


def test_a_tower_that_has_no_graph_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Odd(TinyTower):
        def forward(self, inputs: torch.Tensor, valid: torch.Tensor | None = None) -> Encoded:
            found = super().forward(inputs, valid)
            return found if float(found.pooled_BD.sum()) > 0 else found._replace(pooled_BD=-found.pooled_BD)

    tower = Odd(tiny_tower("text", torch.float32).description)
    graph = graphs_of(model_with(tower, vocab_size=60, image_size=32), ("text",), torch.uint8)[0]
    with refused("text", "--modalities"):
        onnx.write_graph(graph, tmp_path / "tower.onnx")
    assert not list(tmp_path.iterdir())


def test_sounds_of_a_tower_with_a_front_end_of_its_library_are_refused() -> None:
    with refused("audio", "./tiny_audio", "--modalities image text", error=ConfigError):
        graphs_of(model_with(tiny_tower("audio", torch.float32), image_size=32), ("image", "audio"), torch.uint8)
