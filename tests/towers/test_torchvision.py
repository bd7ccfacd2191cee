"""Image towers of torchvision with random weights from files, beside torchvision itself."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.refusals import refused
from tests.test_safety import as_torch_file, unsprung
from tests.towers.checks import check_protocol, close, with_statistics
from trimodal.errors import ConfigError
from trimodal.towers.base import ImageInput, PretrainedTower
from trimodal.towers.opening import open_tower

models: Any = importlib.import_module("torchvision.models")


def saved(name: str, path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = with_statistics(models.get_model(name, weights=None, **options))
    torch.save(model.state_dict(), path)
    return model


def opened(name: str, path: Path, size: int | None = None) -> PretrainedTower:
    return open_tower(f"torchvision:{name}", "image", weights=str(path), size=size)


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "efficientnet_b0"])
def test_it_is_torchvision_s_own_and_keeps_to_the_protocol(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "w.pth")
    tower = opened(name, tmp_path / "w.pth", size=64)
    assert isinstance(tower.input, ImageInput) and tower.input.size == 64
    mean, std = (torch.tensor(value)[:, None, None] for value in (tower.input.mean, tower.input.std))
    with torch.no_grad():
        found, expected = tower(pictures(64)), model((pictures(64) / 255 - mean) / std)
        head = [one for one in model.modules() if isinstance(one, torch.nn.Linear)][-1]
        close(head(found.pooled_BD), expected)
    assert found.tokens_BND.shape == (2, 4, tower.dim)
    check_protocol(tower, pictures(64), weights=str(tmp_path / "w.pth"), size=64)


@pytest.mark.repetition  # its smallest ViT is large
def test_a_vit_of_another_size(tmp_path: Path) -> None:
    saved("vit_b_32", tmp_path / "w.pth")
    tower = opened("vit_b_32", tmp_path / "w.pth", size=96)
    assert isinstance(tower.input, ImageInput)
    assert (tower.input.size, tower.input.fit, tower.input.filter) == (96, "crop", "bilinear")
    assert tower(pictures(96)).tokens_BND.shape == (2, 9, 768)
    assert {tower.layer_of(key) for key, _ in tower.named_parameters()} == set(range(13))


def test_what_is_not_there_or_not_whole_is_refused(tmp_path: Path) -> None:
    with refused("model.image.tower", "torchvision:resnet17", "resnet18", error=ConfigError):
        opened("resnet17", tmp_path)
    with refused("model.image.tower", "IMAGENET1K_V3", "IMAGENET1K_V2", error=ConfigError):
        opened("resnet50.IMAGENET1K_V3", tmp_path)
    path = tmp_path / "w.pth"
    state = saved("resnet18", path).state_dict()
    torch.save({key: value for key, value in state.items() if "layer2.0" not in key}, path)
    with refused("torchvision:resnet18"):
        opened("resnet18", path)
    path.write_bytes(path.read_bytes()[:-1000])
    with refused("torchvision:resnet18", path):
        opened("resnet18", path)
    with refused("torchvision:mobilenet_v3_small", error=ConfigError):
        saved("mobilenet_v3_small", path)
        opened("mobilenet_v3_small", path)
    with unsprung(tmp_path / "SPRUNG", "torchvision:resnet18", path):
        opened("resnet18", as_torch_file(path, tmp_path / "SPRUNG"))
