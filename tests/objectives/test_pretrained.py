"""Steps through pretrained towers, trained or frozen, and through what is kept of frozen ones: one effective batch,
however it is cut and wherever its features come from."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import TriModalModel
from tests.narrow import NarrowConfig, largest_difference, make_batch, part_of, step_of
from tests.objectives.test_exactness import assert_equal
from tests.ranks import in_ranks
from tests.small_runs import float64
from tests.tiny_towers import tiny_tower
from trimodal import distributed
from trimodal.config import TowerConfig, TrainingConfig
from trimodal.data.batches import Batch
from trimodal.distributed import World
from trimodal.objectives import build_objective
from trimodal.objectives.base import learn
from trimodal.objectives.contrastive import loss_parameters
from trimodal.objectives.step import is_trained, shared_batch, uniforms_of
from trimodal.towers.encoder import PretrainedEncoder

B = 24
CUTS: dict[str, int | dict[str, int]] = {
    "whole": 1000, "ragged": {"image": 11, "audio": 7, "text": 17, "fusion": 9}, "singly": 1}
CASES: dict[str, tuple[Any, int]] = {  # kept tokens and depth of the adapter of image, text and audio
    "pooled": (0, 0), "averages, for the fusion": (4, 0), "all tokens, through adapters": ("all", 2)}


def model_of(case: str, *, frozen: bool) -> TriModalModel:
    keep, depth = CASES[case]
    names = ("image", "text", "audio")
    rows: dict[str, Any] = {name: TowerConfig(tower=f"./tiny_{name}", keep_tokens=keep, adapter_depth=depth)
                            for name in names}
    torch.manual_seed(0)
    model = TriModalModel(NarrowConfig(**rows), {name: tiny_tower(name) for name in names}).double()
    for tower in model.towers.values():
        tower.requires_grad_(not frozen)
    return model.train()


def kept(model: TriModalModel, batch: Batch) -> Batch:
    """The batch as it is read where the outputs of frozen towers are kept."""
    given = {"image": (batch.images,), "audio": (batch.audio, batch.audio_lengths),
             "text": (batch.input_ids, batch.attention_mask)}
    tokens = {}
    for name in batch.inputs:
        with torch.no_grad():
            values, valid = getattr(model, name).tower_tokens(*given[name])
        tokens[name] = (values, torch.ones(values.shape[:2], dtype=torch.bool) if valid is None else valid)
    noise = {name: value for name, value in batch.noise.items() if name not in ("image", "audio", "text")}
    return dataclasses.replace(batch, tokens=tokens, images=None, audio=None, audio_lengths=None, input_ids=None,
                               attention_mask=None, noise=noise)


@functools.cache
def gradient(inputs: str, case: str, cut: str, *, frozen: bool = False, from_kept: bool = False,
             keep_tokens: bool = True) -> dict[str, Tensor]:
    """Loss and the gradient of each parameter, with ragged captions and sounds, drop-path in the adapters, dropout of
    features."""
    model, batch = model_of(case, frozen=frozen), make_batch(inputs.split(), B)
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, TrainingConfig()).double()
                  for name in ("contrastive", "matching", "concepts")]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = step_of(model, kept(model, batch) if from_kept else batch, CUTS[cut], keep={}, keep_tokens=keep_tokens,
                   feature_dropout=0.3)
    total = learn(step, [(1.0, objective) for objective in objectives], Tensor.backward).total
    assert total is not None and largest_difference(before, model.state_dict()) == 0, "statistics of batches moved"
    both = nn.ModuleDict({"model": model, "heads": nn.ModuleList(objectives)})
    return {"loss": total, **{name: p.grad for name, p in both.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("inputs", "cut"), [
    ("image text", "ragged"), ("audio text", "ragged"), pytest.param("audio text", "singly",
                                                                     marks=pytest.mark.repetition)])
def test_each_parameters_gradient(inputs: str, case: str, cut: str, frozen: bool) -> None:
    expected = gradient(inputs, case, "whole", frozen=frozen)
    assert_equal(gradient(inputs, case, cut, frozen=frozen), expected)
    assert_equal(gradient(inputs, case, cut, frozen=frozen, keep_tokens=False), expected)
    towers = {name for name in expected if ".tower." in name}
    assert not towers if frozen else {name.split(".")[1] for name in towers} == set(inputs.split())
    assert any("bridge" in name for name in expected)


@pytest.mark.parametrize("cut", ["whole", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_of_a_frozen_tower_trains_as_the_tower_does(case: str, cut: str) -> None:
    for inputs in ("image text", "audio text"):
        assert_equal(gradient(inputs, case, cut, frozen=True, from_kept=True),
                     gradient(inputs, case, "whole", frozen=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", ["whole", "ragged"])
@pytest.mark.parametrize("keep_tokens", [True, False])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_a_frozen_tower_runs_once_for_each_row(case: str, cut: str, keep_tokens: bool, train: bool) -> None:
    """However many objectives read what it makes, and through whichever micro-batches."""
    model, batch = model_of(case, frozen=True), make_batch(["image", "text"], B)
    seen: dict[str, int] = dict.fromkeys(model.towers, 0)
    for name, tower in model.towers.items():
        tower.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: seen[name] + len(given[0])}))
    objectives = [(1.0, build_objective(name, model, ["image", "text"], 3, TrainingConfig()).double())
                  for name in ("contrastive", "matching", "concepts")]
    step = step_of(model, batch, CUTS[cut], keep={}, keep_tokens=keep_tokens, train=train)
    with torch.set_grad_enabled(train):
        learn(step, objectives, Tensor.backward if train else lambda loss: None)
    assert batch.input_ids is not None and seen == {"image": B, "text": len(batch.input_ids), "audio": 0}


def test_drop_path_reaches_the_adapters_alone() -> None:
    step = step_of(model_of("all tokens, through adapters", frozen=True), make_batch(["image", "text"], B))
    scales_BZ = step.path_scales("image", slice(None))
    assert scales_BZ is not None and scales_BZ.shape == (B, 2) and (scales_BZ == 0).any()
    without = step_of(model_of("pooled", frozen=True), make_batch(["image", "text"], B))
    assert without.path_scales("image", slice(None)) is None


def test_a_frozen_tower_builds_no_graph() -> None:
    model = model_of("averages, for the fusion", frozen=True)
    batch = make_batch(["image"], 4)
    assert isinstance(model.image, PretrainedEncoder) and not is_trained(model.image)
    assert not model.image(batch.images).tokens_BND.requires_grad
    model.image.tower.requires_grad_(True)
    assert model.image(batch.images).tokens_BND.requires_grad


def test_features_are_dropped_by_sample_and_place() -> None:
    step = step_of(model_of("averages, for the fusion", frozen=True), make_batch(["image", "text"], 400, captions=1),
                   feature_dropout=0.25)
    scales_BD = step.feature_scales("text", slice(None))
    assert scales_BD is not None and scales_BD.shape == (400, 32)
    assert {0, 4 / 3} == {*scales_BD.double().mul(3).round().div(3).unique().tolist()}
    assert abs(float((scales_BD == 0).float().mean()) - 0.25) < 0.02
    some_BD = step.feature_scales("text", slice(7, 9))
    assert some_BD is not None and torch.equal(some_BD, scales_BD[7:9])
    plain = step_of(step.model, step.batch, train=False, feature_dropout=0.25)
    assert plain.feature_scales("text", slice(None)) is None


def test_uniforms_of_keys() -> None:
    """Pinned: a device or a release with others would train another model from the same seed."""
    keys = torch.tensor([0, 1, 2**47 + 12345])
    found = uniforms_of(keys, 4096)
    expected = [[splitmix(int(key), place) for place in (1, 2, 3)] for key in keys]
    assert found[:, :3].tolist() == expected
    assert float(found.min()) >= 0 and float(found.max()) < 1 and (found.mean(1) - 0.5).abs().max() < 0.02
    assert torch.corrcoef(found).fill_diagonal_(0).abs().max() < 0.06


def splitmix(key: int, place: int) -> float:
    """In Python's unbounded numbers."""
    x = (key + place * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x >> 40) / 2**24


# ---- several processes -------------------------------------------------------------------------------------------

SHARES = [15, 9]  # rows of each
SHARED = [(inputs, names, towers) for inputs in ("image text", "audio text")
          for names in ("contrastive concepts", "contrastive matching concepts")
          for towers in ("trained", "frozen", "frozen, no tokens kept", "frozen, in the cache")]


def of_process(world: World, inputs: str, names: str, towers: str) -> dict[str, Tensor]:
    """Loss and all gradients of one effective batch, of which each process has read a share."""
    model, batch = model_of("averages, for the fusion", frozen="frozen" in towers), make_batch(inputs.split(), B)
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, TrainingConfig()).double() for name in names.split()]
    if world.size > 1:
        batch = part_of(batch, torch.arange(B).split(SHARES)[world.rank])
    batch = kept(model, batch) if "cache" in towers else batch
    whole, share = shared_batch(world, batch, with_media="matching" in names)
    step = step_of(model, whole, CUTS["ragged"], keep={}, feature_dropout=0.3, world=world, share=share,
                   keep_tokens="no tokens" not in towers)
    total = learn(step, [(1.0, objective) for objective in objectives], Tensor.backward).total
    both = nn.ModuleDict({"model": model, "heads": nn.ModuleList(objectives)})
    of_losses = loss_parameters(model)
    world.reduce_gradients([p for p in both.parameters() if p.requires_grad and not any(p is q for q in of_losses)],
                           of_losses)
    return {"loss": world.sum_scalars({"loss": float(total or 0)})["loss"] * torch.ones((), dtype=torch.float64),
            **{name: p.grad for name, p in both.named_parameters() if p.grad is not None}}


def work() -> list[dict[str, Tensor]]:
    world = distributed.start()
    with float64(), world.quiet():
        found = [of_process(world, *case) for case in SHARED]
    world.stop()
    return found


def test_uneven_shares_give_the_gradient_of_one_process() -> None:
    with float64():
        for number, rank in enumerate(in_ranks(len(SHARES), work)):
            for case, found in zip(SHARED, rank.value, strict=True):
                expected = of_process(World(), *case)
                assert found.keys() == expected.keys(), (number, case)
                assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-9, case
