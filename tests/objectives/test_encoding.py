"""A step encodes each sample once: its gradients are those of one plain backward pass over the whole batch, however
towers and fusion are cut, whatever is frozen, and whether tokens are kept or encoded again."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import TriModalModel
from tests.narrow import make_batch, narrow_model, settings_of, step_of
from trimodal.data.batches import Batch
from trimodal.errors import ConfigError
from trimodal.objectives import build_objective
from trimodal.objectives.base import Objective, learn
from trimodal.objectives.step import Rows, Step, Tokens, join, pick

B = 24
CUTS: dict[str, Any] = {
    "whole": 1000, "ragged": {"image": 11, "audio": 5, "text": 7, "fusion": 9},
    "one whole": {"image": 1000, "audio": 5, "text": 7, "fusion": 9}, "sevens": 7}
TASKS = {
    "finetune of images": ("image text", "contrastive matching concepts", "infonce"),
    "finetune of sounds": ("audio text", "contrastive matching concepts", "sigmoid"),
    "images and sounds": ("image audio", "contrastive matching", "infonce"),
    "all three": ("image audio text", "concepts masked speaker", "infonce"),
    "everything of sounds": ("audio text", "contrastive matching concepts masked speaker", "infonce"),
    "pretrain of sounds": ("audio", "masked speaker", "infonce"),
    "fusion alone": ("image text", "concepts", "infonce"),
    "words of images": ("image text", "contrastive masked_words words", "infonce soft"),
    "words of sounds": ("audio text", "contrastive matching masked_words masked words", "sigmoid soft"),
}
FREEZE = {"nothing": "", "image": "image", "text": "text", "both towers": "image text", "a projection": "projections"}


class PlainStep(Step):
    """One graph of the whole batch: every objective reads the towers' outputs themselves."""

    def whole(self, modality: str) -> Tokens:
        return self.encode(modality, slice(0, self.num_rows(modality)))

    def features(self, modality: str) -> Tensor:
        features = self.model.features(modality, self.whole(modality))
        self.known_features[modality] = features.detach()
        return features

    def tokens(self, modality: str, rows: Rows) -> Tokens:
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return pick(self.whole(modality), index)


def parts_of(task: str, frozen: str = "", dtype: torch.dtype = torch.float64) -> tuple[TriModalModel, nn.ModuleList]:
    inputs, names, loss = TASKS[task]
    model = narrow_model().to(dtype)
    for name in frozen.split():
        getattr(model, name).requires_grad_(False)
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, settings_of(loss)) for name in names.split()]
    return model, nn.ModuleList(objectives).to(dtype)


def batch_of(task: str) -> Batch:
    return make_batch(TASKS[task][0].split(), B)


def gradients_of(*modules: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in nn.ModuleList(modules).named_parameters() if p.grad is not None}


@functools.cache
def plain(task: str, frozen: str = "", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of one backward pass through one graph."""
    model, objectives = parts_of(task, frozen, dtype)
    own = step_of(model, batch_of(task))
    step = PlainStep(**{name: value for name, value in vars(own).items() if name not in ("known_features",)
                        and not name.startswith("_")})
    total = torch.zeros((), dtype=dtype)
    for weight, objective in weighted(objectives):
        for micro_batch in objective.micro_batches(step):
            total = total + weight * objective.loss(step, *micro_batch)[0] / objective.count(step)
    total.backward()
    return {"loss": total.detach(), **gradients_of(model, objectives)}


def weighted(objectives: nn.ModuleList) -> Sequence[tuple[float, Objective]]:
    return [(1.0 / (i + 1), objective) for i, objective in enumerate(objectives)]  # type: ignore[misc]


def learnt(task: str, cut: Any, frozen: str = "", dtype: torch.dtype = torch.float64, scale: float = 1.0,
           **settings: Any) -> dict[str, Tensor]:
    """As training computes it; `scale`: of the loss, as with fp16."""
    model, objectives = parts_of(task, frozen, dtype)
    losses = learn(step_of(model, batch_of(task), cut, **settings), weighted(objectives),
                   lambda loss: (scale * loss).backward())
    assert losses.total is not None
    return {"loss": losses.total,
            **{name: gradient / scale for name, gradient in gradients_of(model, objectives).items()}}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Each parameter's gradient, relative to its length."""
    assert found.keys() == expected.keys()
    apart = {name: float((found[name] - value).norm() / (value.norm() + 1e-12)) for name, value in expected.items()}
    assert {name: far for name, far in apart.items() if not far <= limit} == {}


# ---- the same gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "cut", "keep_tokens"), [
    pytest.param(task, cut, kept, marks=() if (kept and cut in ("whole", "ragged")) or task == "finetune of images"
                 else pytest.mark.repetition) for task in TASKS for cut in CUTS for kept in (True, False)])
def test_gradients_are_those_of_one_backward_pass(task: str, cut: str, keep_tokens: bool) -> None:
    assert_close(learnt(task, CUTS[cut], keep_tokens=keep_tokens), plain(task), 1e-9)


@pytest.mark.parametrize("cut", ["whole", "ragged"])
@pytest.mark.parametrize("frozen", [name for name in FREEZE if name != "nothing"])
def test_what_is_frozen_changes_nothing_for_the_rest(frozen: str, cut: str) -> None:
    expected = plain("finetune of images", FREEZE[frozen])
    assert not any(name.startswith(f"0.{FREEZE[frozen].split()[0]}.") for name in expected)
    assert_close(learnt("finetune of images", CUTS[cut], FREEZE[frozen]), expected, 1e-9)


@pytest.mark.parametrize("cut", ["whole", "ragged"])
def test_gradients_are_scaled_as_the_loss_is(cut: str) -> None:
    """Those that objectives leave in the step have been scaled already."""
    assert_close(learnt("everything of sounds", CUTS[cut], scale=1024.0), plain("everything of sounds"), 1e-9)


def test_in_float32_they_differ_by_rounding(task: str = "finetune of images") -> None:
    exact = plain(task)

    def far(found: dict[str, Tensor]) -> float:
        one, other = (torch.cat([grads[name].double().flatten() for name in exact if name != "loss"])
                      for grads in (found, exact))
        return float((one - other).norm() / other.norm())

    rounding = far(plain(task, dtype=torch.float32))
    assert rounding < 1e-5
    for cut in ("whole", "ragged"):
        assert far(learnt(task, CUTS[cut], dtype=torch.float32)) <= 2 * rounding + 1e-6


@pytest.mark.parametrize("task", ["finetune of images", "all three", "fusion alone"])
def test_in_bfloat16_no_gradient_is_lost(task: str) -> None:
    """Autocast keeps the weights that it has cast, also those of a pass without gradients."""
    expected = plain(task)
    for cut in ("whole", "ragged"):
        for keep_tokens in (True, False):
            found = learnt(task, CUTS[cut], dtype=torch.float32, keep_tokens=keep_tokens,
                           autocast=lambda: torch.autocast("cpu", torch.bfloat16))
            assert found.keys() == expected.keys()
            one, other = (torch.cat([grads[name].double().flatten() for name in expected if name != "loss"])
                          for grads in (found, expected))
            assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


# ---- once ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counting(model: TriModalModel) -> Iterator[Counter]:
    """Rows that each tower encodes, by name; "NAME, graph": those of them with a graph."""
    rows: Counter = Counter()

    def count(name: str, given: Any) -> None:
        rows[name] += len(given[0])
        rows[f"{name}, graph"] += len(given[0]) if torch.is_grad_enabled() else 0

    hooks = [getattr(model, name).register_forward_pre_hook(lambda _, given, name=name: count(name, given))
             for name in ("image", "audio", "text")]
    yield rows
    for hook in hooks:
        hook.remove()


def rows_encoded(task: str, cut: Any, frozen: str = "", **settings: Any) -> tuple[Counter, int]:
    model, objectives = parts_of(task, frozen)
    step = step_of(model, batch_of(task), cut, **settings)
    with counting(model) as rows, contextlib.nullcontext() if step.train else torch.no_grad():
        learn(step, weighted(objectives), Tensor.backward if step.train else lambda loss: None)
    return rows, len(step.batch.input_ids) if "text" in step.batch.inputs else 0


def test_a_sample_is_encoded_once_and_run_again_for_its_backward_pass() -> None:
    """Whatever the number of objectives; where the batch is one micro-batch its graph is kept."""
    rows, captions = rows_encoded("finetune of images", CUTS["whole"])
    assert rows == {"image": B, "image, graph": B, "text": captions, "text, graph": captions}
    rows, captions = rows_encoded("finetune of images", CUTS["ragged"])
    assert rows == {"image": 2 * B, "image, graph": B, "text": 2 * captions, "text, graph": captions}
    rows, _ = rows_encoded("pretrain of sounds", CUTS["ragged"])
    assert rows == {"audio": B, "audio, graph": B}, "masked and speaker share it, and nothing is run again"


def test_a_frozen_tower_is_not_run_again() -> None:
    rows, captions = rows_encoded("finetune of images", CUTS["ragged"], "image projections")
    assert rows["image"] == B and rows["text"] == 2 * captions


@pytest.mark.parametrize("task", ["finetune of images", "finetune of sounds"])
def test_the_graph_of_text_is_freed_first(task: str) -> None:
    """Plans of whole batches count on it: where the blocks of the others are recomputed, theirs is the smaller one."""
    model, objectives = parts_of(task)
    order: list[str] = []
    for name in TASKS[task][0].split():
        getattr(model, name).embed.weight.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    learn(step_of(model, batch_of(task)), weighted(objectives), lambda loss: loss.backward())
    assert len(order) == 2 and order[0] == "text"


def test_without_room_for_tokens_each_objective_encodes_its_own() -> None:
    kept, _ = rows_encoded("finetune of images", CUTS["ragged"])
    again, _ = rows_encoded("finetune of images", CUTS["ragged"], keep_tokens=False)
    assert again["image"] == kept["image"] + 3 * B, "matching its right and wrong ones, concepts the right ones"


def test_evaluation_encodes_a_sample_once() -> None:
    for cut in ("whole", "ragged"):
        rows, captions = rows_encoded("finetune of images", CUTS[cut], train=False)
        assert rows["image"] == B and rows["text"] == captions


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_kept_tokens_are_those_of_the_tower_cut_at_the_longest_row() -> None:
    model, _ = parts_of("finetune of sounds")
    step = replace(step_of(model, batch_of("finetune of sounds"), 5), train=False)
    rows = step.token_counts("audio", torch.arange(B)).argsort()[[2, 0, 2]]
    with torch.no_grad(), step.sharing({"audio", "text"}):
        for modality in ("audio", "text"):
            found = step.tokens(modality, rows)
            batch = step.batch
            tokens, valid = (model.audio(batch.audio[rows], batch.audio_lengths[rows]) if modality == "audio"
                             else model.text(batch.input_ids[rows], batch.attention_mask[rows]))
            longest = int(valid.sum(1).max())
            assert found.tokens_BND.shape[1] == longest and (modality == "text" or longest < valid.shape[1])
            assert found.valid_BN is not None and torch.equal(found.valid_BN, valid[:, :longest])
            assert (found.tokens_BND - tokens[:, :longest])[found.valid_BN].abs().max() < 1e-12


def test_tokens_of_several_lengths_are_joined() -> None:
    one = Tokens(torch.ones(2, 3, 4), torch.ones(2, 3).bool())
    other = Tokens(torch.ones(1, 5, 4), torch.ones(1, 5).bool())
    joined = join([one, other])
    assert joined.tokens_BND.shape == (3, 5, 4) and joined.valid_BN is not None
    assert joined.valid_BN.sum(1).tolist() == [3, 3, 5] and joined.tokens_BND[:2, 3:].eq(0).all()


def test_an_objective_without_trained_parameters_is_refused() -> None:
    model, objectives = parts_of("finetune of images")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="contrastive_image_text"):
        learn(step_of(model, batch_of("finetune of images"), 5), weighted(objectives), Tensor.backward)
