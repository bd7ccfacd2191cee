"""Schedule, weight-decay groups, the update that a bad gradient leaves undone, the moving average."""

import copy
import dataclasses
import io
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import create_model
from tests.narrow import narrow_model
from tests.refusals import refused
from tests.small_runs import float64
from trimodal.config import DEFAULT_STAGES, PRESETS, LrFactor, StageConfig, TrainingConfig
from trimodal.errors import ConfigError
from trimodal.training.optimizer import (
    MovingAverage,
    Muon,
    Optimizer,
    block_matrices,
    layers_above,
    lr_at,
    lr_factors,
    orthogonalise,
    parameter_groups,
)

BAD = [float("nan"), float("inf"), -float("inf")]
SCALERS = pytest.mark.parametrize("scaler", [None, "cpu"], ids=["plain", "scaler"])


class Toy(nn.Module):
    """A table, a matrix, a norm, matrices of blocks, and a branch that may go unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.branch = nn.Linear(4, 4)
        self.tower = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))})

    def forward(self, seed: int, branch: bool = True) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        x = self.norm(self.linear(self.table(torch.randint(0, 7, (5,), generator=g))))
        x = x + self.tower["blocks"](x)
        x = self.branch(x) if branch else x
        return (x - torch.randn(5, 4, generator=g)).square().sum()


@pytest.fixture
def in_float64() -> Iterator[None]:
    with float64():
        yield


def make(scaler: str | None = None, clip: float = 1.0, optimizer: str = "muon") -> tuple[Toy, Optimizer]:
    toy = Toy()
    config = TrainingConfig(optimizer=optimizer, weight_decay=0.1, grad_clip_norm=clip)  # type: ignore[arg-type]
    return toy, Optimizer(toy, config, scaler_device=scaler)


def state_of(toy: Toy, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, both moments and the step count of every parameter."""
    found = {}
    for name, p in toy.named_parameters():
        found[name] = p.detach().clone()
        found |= {f"{name}/{key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(toy: Toy, optimizer: Optimizer, *seeds: int, branch: bool = True) -> None:
    for seed in seeds:
        optimizer.backward(toy(seed, branch))
        optimizer.step(1e-2)


def spoil(toy: Toy, optimizer: Optimizer, bad: float, name: str = "linear.weight") -> tuple[Tensor, Tensor]:
    """A step whose gradient has one bad number."""
    optimizer.backward(toy(99))
    gradient = dict(toy.named_parameters())[name].grad
    assert gradient is not None
    gradient.view(-1)[1] = bad
    return optimizer.step(1e-2)


# ---- schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [
    (0, 0.2), (4, 1.0), (9, 2.0), (10, 2.0), (55, 2.0 * (0.1 + 0.9 / 2)), (40, 2.0 * (0.1 + 0.9 * 0.75)), (100, 0.2)])
def test_schedule_rises_then_falls_along_a_cosine(step: int, expected: float) -> None:
    assert lr_at(step, 100, 2.0, warmup_pct=10, min_pct=10) == pytest.approx(expected)


def test_schedule_at_its_edges() -> None:
    assert lr_at(0, 100, 2.0, 0, 0) == 2.0, "no warm-up"
    assert lr_at(99, 100, 2.0, 10, 0) == pytest.approx(1 - math.cos(math.pi / 90), rel=1e-6), "the last step learns"
    assert lr_at(0, 1, 2.0, 5, 1) == 2.0, "a single step"
    assert lr_at(0, 3, 2.0, 5, 1) == lr_at(1, 3, 2.0, 5, 1) == 2.0, "a warm-up shorter than a step takes one"
    assert [lr_at(step, 4, 2.0, 100, 1) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert max(lr_at(step / 8, 6.5, 2.0, 5, 1) for step in range(52)) == 2.0, "between whole steps, too"
    assert lr_at(500, 100, 2.0, 10, 5) == pytest.approx(0.1), "never below, never up again"
    rates = [lr_at(step, 1000, 2.0, 5, 1) for step in range(1000)]
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert 0 < min(rates) and max(rates) == 2.0


# ---- groups ------------------------------------------------------------------------------------------------------


def test_groups_hold_every_trained_parameter_once() -> None:
    model = narrow_model()
    frozen = {"text.words.weight", "image.embed.weight", "fusion.token"}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert sorted(decayed + kept) == sorted(set(names.values()) - frozen)


def test_matrices_decay_and_nothing_else() -> None:
    model = narrow_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[dict[str, Any]] = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"image.embed.weight", "text.embed.weight", "classifier.weight"} <= decayed
    assert {"text.words.weight", "fusion.token", "fusion.modality.audio", "logit_scale.image_text"} <= kept
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_decay_shrinks_what_decays(in_float64: None) -> None:
    """At a gradient of zero nothing else moves a weight."""
    toy, optimizer = make()
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    for p in toy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    for name, p in toy.named_parameters():
        decays = name in ("linear.weight", "branch.weight") or (name.startswith("tower") and name.endswith("weight"))
        factor = 1 - 0.5 * 0.1 if decays else 1.0
        assert torch.allclose(p, factor * before[name], rtol=1e-12), name


# ---- the update --------------------------------------------------------------------------------------------------


@SCALERS
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_update_is_adamw_of_the_clipped_gradient(in_float64: None, scaler: str | None, clip: float) -> None:
    toy, optimizer = make(scaler, clip, "adamw")
    plain = Toy()
    reference = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for seed in range(5):
        plain(seed).backward()
        norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
        for p in plain.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0  # as torch clips
        reference.step()
        reference.zero_grad()
        optimizer.backward(toy(seed))
        found, finite = optimizer.step(1e-2)
        assert bool(finite) and float(found) == pytest.approx(float(norm), rel=1e-12), "the norm before clipping"
        assert float(norm) > 1.0, "clipping at 1 does something"
        assert all(p.grad is None for p in toy.parameters()), "gradients are freed"
    for p, other in zip(toy.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, other, rtol=0, atol=1e-12)


def test_muon_takes_the_matrices_of_blocks_and_adamw_all_else() -> None:
    model = create_model("nano", word_embeddings="random")
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [names[id(p)] for p in block_matrices(model)]
    size = PRESETS["nano"]
    blocks = size.image_depth + size.text_depth + size.audio_depth + size.fusion_depth
    assert len(matrices) == 4 * blocks, "qkv, out, up, down of each block"
    assert all(name.split(".")[-2] in ("qkv", "out", "up", "down") for name in matrices)
    optimizer = Optimizer(model, TrainingConfig())
    groups = [id(p) for part in optimizer.optimizers.values() for group in part.param_groups for p in group["params"]]
    assert sorted(groups) == sorted(names), "each parameter once"
    assert list(Optimizer(model, TrainingConfig(optimizer="adamw")).optimizers) == ["adamw"]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (2, 40, 5), (2, 96, 288)])
def test_singular_values_become_near_one_and_directions_stay(shape: tuple[int, ...], dtype: torch.dtype,
                                                             rounding: float) -> None:
    """Of a matrix with singular values from 1 to 1/20 of the largest, as a momentum's are."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    spread = torch.logspace(0, -1.3, u.shape[-1], dtype=torch.float64)
    found = orthogonalise(7.0 * (u * spread) @ vh, dtype)
    inner = u.mT @ found @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.25
    assert (inner - torch.diag_embed(values)).abs().max() < rounding, "singular vectors are as they were"


def test_bfloat16_keeps_singular_values_of_a_hundredth() -> None:
    """Of the largest: their squares, in the Gram matrix, stand at the edge of what bfloat16 tells apart."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(4, 192, 576), full_matrices=False)
    found = orthogonalise((u / torch.arange(1, 193)) @ vh, torch.bfloat16)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.25, "0.549 and 1.202 without rounding"


def test_muon_is_its_formula(in_float64: None) -> None:
    """arXiv:2502.16982: W <- (1 - lr wd) W - lr 0.2 sqrt(max side) NS(Nesterov momentum), each matrix by itself."""
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 5)]
    matrices = [nn.Parameter(w.clone()) for w in start]
    muon = Muon(matrices, 0.1, None)
    muon.BATCH_ELEMENTS = 24  # one matrix at a time, then all of a shape
    moments = [torch.zeros_like(w) for w in start]
    for step in range(3):
        for p, w, m in zip(matrices, start, moments, strict=True):
            p.grad = torch.randn_like(p)
            m.copy_(0.95 * m + 0.05 * p.grad)
            x = 0.05 * p.grad + 0.95 * m
            x = x / (x.norm() + 1e-7)
            for _ in range(4):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            w.copy_((1 - 0.5 * 0.1) * w - 0.5 * 0.2 * max(w.shape) ** 0.5 * x)
        muon.param_groups[0]["lr"] = 0.5
        muon.step()
        muon.BATCH_ELEMENTS = 2**24 if step else 24
    for p, w in zip(matrices, start, strict=True):
        assert torch.allclose(p, w, rtol=0, atol=1e-12)


def test_an_update_is_as_large_as_adamws() -> None:
    """Root mean square of 0.2 times the rate, so that one learning rate serves both."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(192, 768))
    muon = Muon([p], 0.0, torch.float32)
    p.grad = torch.randn_like(p)
    muon.param_groups[0]["lr"] = 1.0
    muon.step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_other_parts_or_fewer_parameters_do_not_fit() -> None:
    _, muon = make()
    _, adamw = make(optimizer="adamw")
    toy = Toy()
    toy.branch.requires_grad_(False)
    fewer = Optimizer(toy, TrainingConfig())
    assert muon.fits(make()[1].state_dict())
    assert not muon.fits(adamw.state_dict()) and not adamw.fits(muon.state_dict()) and not muon.fits(fewer.state_dict())


def test_rate_is_the_one_given() -> None:
    toy, optimizer = make()
    before = state_of(toy, optimizer)
    optimizer.backward(toy(0))
    optimizer.step(0.0)
    assert optimizer.lr == 0.0
    assert all(torch.equal(p, before[name]) for name, p in toy.named_parameters())


@SCALERS
@pytest.mark.parametrize("name", ["linear.weight", "norm.bias", "tower.blocks.0.weight"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_changes_nothing(scaler: str | None, bad: float, name: str) -> None:
    toy, optimizer = make(scaler)
    train(toy, optimizer, 0, 1)
    before = state_of(toy, optimizer)
    norm, finite = spoil(toy, optimizer, bad, name)
    assert not bool(finite) and not bool(norm.isfinite())
    assert same(state_of(toy, optimizer), before)
    assert all(p.grad is None for p in toy.parameters())


@SCALERS
def test_a_bad_loss_with_good_gradients_changes_nothing(scaler: str | None) -> None:
    toy, optimizer = make(scaler)
    train(toy, optimizer, 0, 1)
    before = state_of(toy, optimizer)
    optimizer.backward(toy(99))
    norm, finite = optimizer.step(1e-2, torch.tensor(float("nan")).isfinite())
    assert not bool(finite) and bool(norm.isfinite())
    assert same(state_of(toy, optimizer), before)


@SCALERS
def test_a_step_without_any_gradient_changes_nothing_and_the_next_one_does(scaler: str | None) -> None:
    """Of a batch with nothing to learn: clips without speakers, say."""
    toy, optimizer = make(scaler)
    before = state_of(toy, optimizer)
    norm, finite = optimizer.step(1e-3)
    assert float(norm) == 0.0 and bool(finite) and same(state_of(toy, optimizer), before)
    train(toy, optimizer, 0, 1)
    assert not same(state_of(toy, optimizer), before)


@SCALERS
@pytest.mark.parametrize("bad", BAD)
def test_training_goes_on_as_if_the_bad_step_had_not_happened(scaler: str | None, bad: float) -> None:
    toy, optimizer = make(scaler)
    other, its = make(scaler)
    spoil(toy, optimizer, bad)  # before any moments exist
    train(toy, optimizer, 0, 1)
    spoil(toy, optimizer, bad)
    spoil(toy, optimizer, bad)
    train(toy, optimizer, 2, 3)
    train(other, its, 0, 1, 2, 3)
    assert same(state_of(toy, optimizer), state_of(other, its))


def test_scaler_backs_off_after_a_bad_step_alone() -> None:
    toy, optimizer = make("cpu")
    assert optimizer.scaler is not None
    train(toy, optimizer, 0)
    start = optimizer.scaler.get_scale()
    spoil(toy, optimizer, float("inf"))
    assert optimizer.scaler.get_scale() == start / 2
    train(toy, optimizer, 1)
    assert optimizer.scaler.get_scale() == start / 2


def test_gradients_too_small_for_half_precision_are_learnt_from() -> None:
    moved = []
    for scaler in ("cpu", None):
        toy, optimizer = make(scaler, clip=0.0)
        before = toy.norm.bias.detach().clone()
        optimizer.backward(toy(0).half().float() * 1e-9)  # backward passes through half precision
        _, finite = optimizer.step(1e-2)
        assert bool(finite)
        moved.append(bool((toy.norm.bias != before).all()))
    assert moved == [True, False], "without a scaler they are flushed to zero"


@SCALERS
def test_a_norm_that_overflows_changes_nothing(scaler: str | None) -> None:
    toy, optimizer = make(scaler)
    train(toy, optimizer, 0)
    before = state_of(toy, optimizer)
    optimizer.backward(toy(1))
    for p in toy.parameters():
        p.grad = torch.full_like(p, 1e30)
    _, finite = optimizer.step(1e-2)
    assert not bool(finite) and same(state_of(toy, optimizer), before)


@SCALERS
def test_parameters_without_a_gradient_stay(scaler: str | None) -> None:
    """No decay, no momentum of earlier steps: a step that lacks a modality does not move its tower."""
    toy, optimizer = make(scaler)
    optimizer.allocate()
    train(toy, optimizer, 0, 1)
    before = state_of(toy, optimizer)
    train(toy, optimizer, 2, 3, branch=False)
    moved = [name for name, value in state_of(toy, optimizer).items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in moved} == {"table", "linear", "norm", "tower"}


def test_state_is_allocated_before_the_first_step() -> None:
    toy, optimizer = make()
    optimizer.allocate()
    assert [len(optimizer.state[p]) for p in toy.parameters()] == [
        1 if p.ndim == 2 and name.startswith("tower") else 3 for name, p in toy.named_parameters()]
    held = [value for p in toy.parameters() for value in optimizer.state[p].values()]
    addresses = [value.data_ptr() for value in held]
    other, its = make()
    train(toy, optimizer, 0, 1)
    train(other, its, 0, 1)
    assert same(state_of(toy, optimizer), state_of(other, its)), "the update is that of an optimizer left to itself"
    now = [value for p in toy.parameters() for value in optimizer.state[p].values()]
    assert [value.data_ptr() for value in now] == addresses, "nothing is allocated later"
    optimizer.allocate()
    assert same(state_of(toy, optimizer), state_of(other, its)), "a second call resets nothing"


@SCALERS
def test_state_round_trip_continues_bit_by_bit(scaler: str | None) -> None:
    toy, optimizer = make(scaler)
    train(toy, optimizer, 0, 1)
    spoil(toy, optimizer, float("nan"))
    file = io.BytesIO()
    torch.save({"weights": toy.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    other, its = make(scaler)
    its.allocate()
    other.load_state_dict(saved["weights"])
    its.load_state_dict(saved["optimizer"])
    train(toy, optimizer, 2, 3)
    train(other, its, 2, 3)
    assert same(state_of(toy, optimizer), state_of(other, its))
    if optimizer.scaler is not None and its.scaler is not None:
        assert its.scaler.state_dict() == optimizer.scaler.state_dict() != torch.amp.GradScaler("cpu").state_dict()


def test_settings_given_now_win_over_those_of_a_saved_state() -> None:
    toy, before = make()
    train(toy, before, 0)
    now = Optimizer(toy, TrainingConfig(weight_decay=0.3, grad_clip_norm=0.5))
    now.load_state_dict(before.state_dict())
    decays = {name: {group["weight_decay"] for group in part.param_groups} for name, part in now.optimizers.items()}
    assert decays == {"adamw": {0.3, 0.0}, "muon": {0.3}} and now.clip == 0.5
    assert now.state_dict()["adamw"]["state"][0]["step"] == 1, "but the moments are the saved ones"


# ---- learning-rate factors -----------------------------------------------------------------------------------------


def row_of(**given: LrFactor) -> StageConfig:
    return dataclasses.replace(DEFAULT_STAGES[1], lr_factors=given)


def test_factors_are_by_pattern_and_by_depth() -> None:
    model = create_model("nano", word_embeddings="random")  # two blocks in each encoder, one in the fusion
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    row = row_of(**{"image.*": LrFactor(factor=0.8, layer_decay=0.5), ".*norm.*": LrFactor(factor=3.0),
                    "text.*|fusion.*|projections.text.*": LrFactor(layer_decay=0.1)})
    by_pattern = lr_factors(model, row)
    found = {names[p]: factor for factors in by_pattern.values() for p, factor in factors.items()}
    assert list(by_pattern) == list(row.lr_factors)
    assert {names[p] for p in by_pattern["image.*"]} == {name for name in names.values() if name.startswith("image.")}
    for name, expected in {
            "image.embed.weight": 0.2, "image.blocks.blocks.0.qkv.weight": 0.4, "image.blocks.blocks.1.norm1.bias": 0.8,
            "image.blocks.norm.weight": 0.8, "text.words.weight": 0.01, "text.embed.bias": 0.01,
            "text.blocks.blocks.0.up.weight": 0.1, "text.blocks.blocks.1.down.weight": 1.0, "fusion.token": 0.1,
            "fusion.modality.audio": 0.1, "fusion.blocks.blocks.0.out.weight": 1.0, "projections.text.weight": 1.0,
            "text.norm.weight": 3.0, "audio.blocks.blocks.0.norm1.weight": 3.0}.items():
        assert found[name] == pytest.approx(expected, rel=1e-12), name
    assert not any(name.startswith(("audio.embed", "classifier", "logit", "projections.image")) for name in found)


def test_a_pretrained_tower_says_its_layers_and_what_stands_on_it_is_the_last() -> None:
    model = nn.ModuleDict({"image": nn.ModuleDict({
        "tower": nn.ModuleDict({"stem": nn.Linear(1, 1), "stages": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))}),
        "bridge": nn.Linear(1, 1)})})
    encoder: Any = SimpleNamespace(tower=SimpleNamespace(
        depth=2, layer_of=lambda name: 0 if name.startswith("stem.") else 1 + int(name.split(".")[1])))
    found = {name: layers_above(SimpleNamespace(image=encoder), name) for name, _ in model.named_parameters()}  # type: ignore[arg-type]
    assert found == {f"image.{name}.{kind}": layers for kind in ("weight", "bias") for name, layers in (
        ("tower.stem", 2), ("tower.stages.0", 1), ("tower.stages.1", 0), ("bridge", 0))}


def test_a_pattern_that_changes_nothing_is_refused() -> None:
    model = create_model("nano", word_embeddings="random")
    for pattern in ("imag", "image.block", "vision.*"):
        with refused("stages.align.lr_factors", pattern, "logit_bias", error=ConfigError):
            lr_factors(model, row_of(**{"image.*": LrFactor(), pattern: LrFactor()}))
    with refused("stages.align.lr_factors", "image.embed.*", "first", error=ConfigError):
        lr_factors(model, row_of(**{"image.*": LrFactor(), "image.embed.*": LrFactor(factor=0.1)}))


@SCALERS
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_factor_multiplies_the_rate_of_an_update_and_its_decay(in_float64: None, optimizer: str,
                                                                 scaler: str | None) -> None:
    factors = {"table.weight": 0.1, "linear.weight": 0.1, "tower.blocks.0.weight": 0.1, "tower.blocks.0.bias": 0.1,
               "tower.blocks.2.weight": 2.0, "norm.weight": 2.0}
    plain = {}
    for times in (0.1, 1.0, 2.0):
        toy, whole = make(scaler, optimizer=optimizer)
        whole.backward(toy(0))
        whole.step(1e-2 * times)
        plain[times] = dict(toy.named_parameters())
    toy = Toy()
    own = Optimizer(toy, TrainingConfig(optimizer=optimizer, weight_decay=0.1),  # type: ignore[arg-type]
                    scaler_device=scaler, factors={p: factors.get(name, 1.0) for name, p in toy.named_parameters()})
    own.backward(toy(0))
    own.step(1e-2)
    assert own.lr == 1e-2, "what is logged is the schedule's"
    for name, p in toy.named_parameters():
        assert torch.allclose(p, plain[factors.get(name, 1.0)][name], rtol=0, atol=1e-15), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_saved_state_goes_on_with_other_factors(in_float64: None, optimizer: str) -> None:
    """Checkpoints hold the groups that there are without factors, in one order of parameters."""
    def made(*names: str) -> tuple[Toy, Optimizer]:
        toy = Toy()
        factors = {p: 0.5 ** (1 + names.index(name)) for name, p in toy.named_parameters() if name in names}
        return toy, Optimizer(toy, TrainingConfig(optimizer=optimizer), factors=factors)  # type: ignore[arg-type]

    all_of_them = ["tower.blocks.2.weight", "branch.weight", "norm.bias", "tower.blocks.0.weight"]
    for before, now in ((all_of_them, []), ([], all_of_them), (all_of_them, all_of_them[2:])):
        toy, saved_by = made(*before)
        train(toy, saved_by, 0, 1)
        other, goes_on = made(*now)
        other.load_state_dict(toy.state_dict())
        assert goes_on.fits(saved_by.state_dict())
        goes_on.load_state_dict(copy.deepcopy(saved_by.state_dict()))
        assert same(state_of(other, goes_on), state_of(toy, saved_by)), "each moment is that of its parameter"
        expected, never_saved = made(*now)
        train(expected, never_saved, 5)  # makes the moments
        for name, p in expected.named_parameters():
            p.data.copy_(dict(toy.named_parameters())[name])
            for key, value in never_saved.state[p].items():
                value.copy_(saved_by.state[dict(toy.named_parameters())[name]][key])
        for one, optimizer_of_it in ((other, goes_on), (expected, never_saved)):
            train(one, optimizer_of_it, 2)
        assert same(state_of(other, goes_on), state_of(expected, never_saved))
        held, usual = saved_by.state_dict(), made()[1].state_dict()
        for name in saved_by.optimizers:
            assert [group.keys() for group in held[name]["param_groups"]] == [
                group.keys() for group in usual[name]["param_groups"]]


# ---- moving average ----------------------------------------------------------------------------------------------

DONE = torch.tensor(True)


def test_average_warms_up_and_then_decays_as_said(in_float64: None) -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 8.0)
    average = MovingAverage(module, decay=0.5)
    expected = 8.0
    for n in range(1, 12):
        nn.init.constant_(module.weight, float(n))
        average.update(module.parameters(), DONE)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(average.values[0]) == pytest.approx(expected, rel=1e-12)
    assert decay == 0.5 and (1 + 1) / (10 + 1) < 0.5, "both regimes are passed"


def test_average_is_a_copy_and_keeps_a_resting_weight() -> None:
    toy = Toy()
    average = MovingAverage(toy, 0.99)
    before = [value.clone() for value in average.values]
    for _ in range(20):
        average.update(toy.parameters(), DONE)
    assert all(torch.equal(value, old) for value, old in zip(average.values, before, strict=True))
    with torch.no_grad():
        toy.linear.weight.add_(1.0)
    assert all(torch.equal(value, old) for value, old in zip(average.values, before, strict=True))
    assert not any(value.requires_grad for value in average.values)


def test_swapping_twice_restores_every_bit() -> None:
    toy, optimizer = make()
    average = MovingAverage(toy, 0.9)
    train(toy, optimizer, 0, 1)
    average.update(toy.parameters(), DONE)
    train(toy, optimizer, 2)
    weights, averaged = copy.deepcopy(toy.state_dict()), [value.clone() for value in average.values]
    pointers = [p.data_ptr() for p in toy.parameters()]
    average.swap(toy)
    assert all(torch.equal(p, value) for p, value in zip(toy.parameters(), averaged, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in zip(average.names, average.values, strict=True))
    average.swap(toy)
    assert same(toy.state_dict(), weights)
    assert all(torch.equal(value, old) for value, old in zip(average.values, averaged, strict=True))
    assert [p.data_ptr() for p in toy.parameters()] == pointers, "the optimizer's parameters are still these"


def test_average_round_trip() -> None:
    toy, optimizer = make()
    average = MovingAverage(toy, 0.9)
    for seed in range(3):
        train(toy, optimizer, seed)
        average.update(toy.parameters(), DONE)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other = MovingAverage(Toy(), 0.9)
    other.load_state_dict(torch.load(file))
    train(toy, optimizer, 3)
    average.update(toy.parameters(), DONE)
    other.update(toy.parameters(), DONE)
    assert other.updates == 4
    assert all(torch.equal(one, two) for one, two in zip(average.values, other.values, strict=True))


@SCALERS
def test_average_leaves_out_the_steps_that_were_left_undone(scaler: str | None) -> None:
    """Not even their number counts, which the decay depends on."""
    (toy, optimizer), (other, its) = make(scaler), make(scaler)
    average, expected = MovingAverage(toy, 0.99), MovingAverage(other, 0.99)
    for seed in range(3):
        average.update(toy.parameters(), spoil(toy, optimizer, BAD[seed])[1])
        for one, optimizer_of_it, mean in ((toy, optimizer, average), (other, its, expected)):
            train(one, optimizer_of_it, seed)
            mean.update(one.parameters(), DONE)
        average.update(toy.parameters(), spoil(toy, optimizer, BAD[seed])[1])
        assert all(torch.equal(mine, yours) for mine, yours in zip(average.values, expected.values, strict=True))
    assert average.updates == 3
