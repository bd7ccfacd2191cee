"""What every pretrained tower keeps to, and folders of random miniatures that the libraries themselves write."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimodal.memory.tracker import tracing
from trimodal.towers.base import Encoded, PretrainedTower
from trimodal.towers.opening import build_tower, open_tower

transformers: Any = importlib.import_module("transformers")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
GRID = {**TINY, "image_size": 32, "patch_size": 8}


def made(class_name: str, config_name: str, *, spread: float = 0.3, **settings: Any) -> Any:
    """A model of transformers with random weights, biases and scales among them, in eval mode."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(spread * torch.randn_like(value) / max(1.0, value.shape[-1] ** 0.5 if value.ndim else 1.0))
    return with_statistics(model)


@torch.no_grad()
def with_statistics(model: Any) -> Any:
    """`model` in eval mode, as if it had seen batches."""
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    return model.eval()


def close(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    """Equal up to `within` of the largest number expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert (found - expected).abs().max() <= within * expected.abs().max(), (found - expected).abs().max()


def check_protocol(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None = None, **opened: Any) -> None:
    """Rebuilding, planning, training mode, layers and recompute of a tower, on two samples or more. `opened`: what
    `open_tower` was given beside its name."""
    check_outlined(tower, opened)
    check_modes(tower, inputs, valid)
    check_rebuilt(tower, inputs, valid)
    check_planned(tower, inputs, valid)
    check_recompute(tower, inputs, valid)
    assert {tower.layer_of(key) for key, _ in tower.named_parameters()} == set(range(tower.depth + 1))
    with torch.no_grad():
        encoded = tower(inputs, valid)
    assert encoded.pooled_BD.shape == (len(inputs), tower.dim) and encoded.tokens_BND.shape[2] == tower.dim
    assert encoded.valid_BN is None or encoded.valid_BN.shape == encoded.tokens_BND.shape[:2]


def check_outlined(tower: PretrainedTower, opened: dict[str, Any]) -> None:
    """Opened without its weights it is described alike, and has parameters of the same names and sizes."""
    outline = open_tower(tower.source, tower.modality, **opened, load="never")
    assert outline.description == {**tower.description, "digest": ""} and tower.digest and not outline.digest
    assert (outline.dim, outline.depth, outline.input) == (tower.dim, tower.depth, tower.input)
    assert all(value.is_meta for value in outline.parameters())
    shapes, others = ({name: (value.shape, value.dtype, one.layer_of(name)) for name, value in one.named_parameters()}
                      for one in (outline, tower))
    assert shapes == others


@torch.no_grad()
def check_modes(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None) -> None:
    """In train() as in eval(): the same bits, no random number, no running statistics."""
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    expected = tower.eval()(inputs, valid)
    state = torch.get_rng_state()
    parent = torch.nn.ModuleList([tower]).train()
    found = parent[0](inputs, valid)
    assert torch.get_rng_state().equal(state)
    assert found.pooled_BD.equal(expected.pooled_BD) and found.tokens_BND.equal(expected.tokens_BND)
    assert all(value.equal(before[key]) for key, value in tower.state_dict().items())


@torch.no_grad()
def check_rebuilt(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None) -> None:
    again = build_tower(json.loads(json.dumps(tower.description)))
    again.load_state_dict(tower.state_dict())
    found, expected = again(inputs, valid), tower(inputs, valid)
    assert found.pooled_BD.equal(expected.pooled_BD) and found.tokens_BND.equal(expected.tokens_BND)
    assert (again.dim, again.depth, again.input, again.digest) == (tower.dim, tower.depth, tower.input, tower.digest)


def check_planned(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None) -> None:
    """A step on fake tensors, built inside, and one on real tensors after it."""
    with tracing() as tracker:
        fake = build_tower(tower.description)
        found = fake(torch.zeros(inputs.shape, dtype=inputs.dtype),
                     None if valid is None else torch.ones(valid.shape, dtype=valid.dtype))
        (found.pooled_BD.sum() + found.tokens_BND.sum()).backward()
    assert tracker.usage().peak_bytes > sum(value.numel() * 4 for value in fake.parameters())
    with torch.no_grad():
        assert tower(inputs, valid).tokens_BND.shape == found.tokens_BND.shape
    with torch.device("meta"):
        assert next(build_tower(tower.description).parameters()).is_meta


def gradients(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None) -> list[Tensor]:
    tower.zero_grad()
    encoded = tower(inputs, valid)
    weight = torch.linspace(-1, 1, encoded.pooled_BD.numel(), dtype=encoded.pooled_BD.dtype)
    (encoded.pooled_BD.flatten() @ weight + encoded.tokens_BND.square().mean()).backward()
    found = [value.grad for value in tower.parameters() if value.grad is not None]
    tower.zero_grad()
    assert len(found) > tower.depth
    return found


def check_recompute(tower: PretrainedTower, inputs: Tensor, valid: Tensor | None) -> None:
    """Gradients are the same bits, and blocks are run again in the backward pass."""
    runs = list[int]()
    expected = gradients(tower, inputs, valid)
    for every in (1, 2):
        tower.set_recompute(every)
        with tracing_runs(tower, runs):
            found = gradients(tower, inputs, valid)
        assert len(runs) > len(tower.blocks) and len(found) == len(expected)
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
        runs.clear()
    tower.set_recompute(0)


class tracing_runs:
    """Notes in `runs` each run of a block."""

    def __init__(self, tower: PretrainedTower, runs: list[int]) -> None:
        self.hooks = [child.register_forward_pre_hook(lambda *_: runs.append(1))
                      for block in tower.blocks for child in list(block.children())[:1]]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def check_padding(encode: Callable[[int], Encoded], lengths: tuple[int, ...]) -> None:
    """A sample's real tokens and feature whatever the padding behind it; `encode` pads to a length."""
    first, *others = (encode(length) for length in lengths)
    assert first.valid_BN is not None
    for other in others:
        assert other.valid_BN is not None
        close(other.pooled_BD, first.pooled_BD)
        close(other.tokens_BND[other.valid_BN], first.tokens_BND[first.valid_BN])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
