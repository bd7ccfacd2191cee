"""Contrast that looks at how alike captions are: its targets, what it leaves out, and the vectors that a run takes."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import TriModalModel
from tests.narrow import make_batch, narrow_model, plainly
from tests.small_runs import SmallRuns, batches, differing, step, weights
from trimodal.config import TrainingConfig, load_config
from trimodal.objectives.contrastive import (
    LIKENESS_TEMPERATURE,
    Contrastive,
    Likeness,
    Positives,
    SigmoidContrastive,
    info_nce,
    pairwise_sigmoid,
    positives_of,
)
from trimodal.towers.captions import caption_vectors, model_for
from trimodal.training import planner
from trimodal.training.run import with_caption_vectors

OWNER, IDS = [0, 0, 1, 2, 2, 3], [7, 8, 7, 9, 9, 5]
RIGHT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
POSITIVES = Positives.of(torch.tensor(OWNER), torch.tensor(IDS), torch.arange(4))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


SAMPLE, CAPTION = unit(4, 8), unit(6, 8, seed=1)
COSINES = unit(4, 5, seed=2) @ unit(6, 5, seed=3).T


def targets_of(right: Tensor, cosines: Tensor, share: float, limit: float | None) -> tuple[list[dict], list[set[int]]]:
    """Of each query the target of its keys, the right ones together 1 less what goes to others, and those left out."""
    targets, left_out = [], []
    for row, cosine in zip(right.tolist(), cosines.tolist(), strict=True):
        out = {k for k, is_right in enumerate(row) if not is_right and limit is not None and cosine[k] > limit}
        others = [k for k, is_right in enumerate(row) if not is_right and k not in out]
        whole = sum(math.exp(cosine[k] / LIKENESS_TEMPERATURE) for k in others)
        target = {k: (1 - share * bool(others)) / sum(row) for k, is_right in enumerate(row) if is_right}
        targets.append(target | {k: share * math.exp(cosine[k] / LIKENESS_TEMPERATURE) / whole for k in others})
        left_out.append(out)
    return targets, left_out


def likeness(share: float, limit: float | None) -> Likeness:
    """Whose cosines of samples and captions are COSINES."""
    return Likeness(unit(4, 5, seed=2), unit(6, 5, seed=3), share, limit)


CASES = [(0.3, None), (0.0, 0.2), (0.3, 0.2), (0.5, -1.0)]  # the last one leaves all out that is wrong


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize(("share", "limit"), CASES)
@pytest.mark.parametrize("side", ["samples", "captions"])
def test_info_nce_with_soft_targets_is_their_cross_entropy(side: str, share: float, limit: float | None,
                                                           chunk: int) -> None:
    query, key = (SAMPLE, CAPTION) if side == "samples" else (CAPTION, SAMPLE)
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    right, cosines = (RIGHT, COSINES) if side == "samples" else (RIGHT.T, COSINES.T)
    scale, own = torch.tensor(7.0, dtype=torch.float64), likeness(share, limit)
    ours = info_nce(query, key, scale, getattr(POSITIVES, f"of_{side}"), chunk, getattr(own, f"of_{side}"))
    naive = query.new_zeros(())
    for i, (target, out) in enumerate(zip(*targets_of(right, cosines, share, limit), strict=True)):
        assert sum(target.values()) == pytest.approx(1.0)
        scores = {k: scale * (query[i] * key[k]).sum() for k in range(len(key)) if k not in out}
        normaliser = torch.stack(list(scores.values())).exp().sum().log()
        naive = naive - sum(part * (scores[k] - normaliser) for k, part in target.items())
    assert float((ours - naive).detach().abs()) <= 1e-12
    pairs = zip(torch.autograd.grad(ours, (query, key)), torch.autograd.grad(naive, (query, key)), strict=True)
    assert all(float((one - other).abs().max()) <= 1e-12 for one, other in pairs)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize(("share", "limit"), CASES)
def test_the_sigmoid_loss_with_soft_targets_judges_each_pair_by_its_own(share: float, limit: float | None,
                                                                        chunk: int) -> None:
    query, key = SAMPLE.clone().requires_grad_(), CAPTION.clone().requires_grad_()
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    ours = pairwise_sigmoid(query, key, scale, bias, POSITIVES.of_samples, chunk, likeness(share, limit).of_samples)
    naive = query.new_zeros(())
    targets, left_out = targets_of(RIGHT, COSINES, share, limit)
    for i, k in itertools.product(range(4), range(6)):
        if k not in left_out[i]:
            target = targets[i].get(k, 0.0) * (int(RIGHT[i].sum()) if RIGHT[i, k] else 1)  # not shared
            p = (scale * (query[i] * key[k]).sum() + bias).sigmoid()
            naive = naive - target * p.log() - (1 - target) * (1 - p).log()
    assert float((ours - naive).detach().abs()) <= 1e-12
    pairs = zip(torch.autograd.grad(ours, (query, key)), torch.autograd.grad(naive, (query, key)), strict=True)
    assert all(float((one - other).abs().max()) <= 1e-12 for one, other in pairs)


@pytest.mark.parametrize("kind", [Contrastive, SigmoidContrastive])
def test_both_losses_take_what_the_settings_say(kind: Any) -> None:
    """A sample is as alike as the mean of its captions. Without captions nothing is compared by them."""
    model, batch = narrow_model(), make_batch(("image", "text"), 8)

    def loss(batch: Any = batch, **settings: Any) -> float:
        with torch.no_grad():
            inputs = batch.inputs
            return float(kind(model, inputs, 0, TrainingConfig(**settings)).loss(plainly(model, batch))[0])

    assert len({loss(), loss(soft_targets=0.3), loss(false_negatives=0.9), loss(soft_targets=0.3, false_negatives=0.9),
                loss(soft_targets=0.2)}) == 5
    other = make_batch(("image", "audio"), 8)
    assert loss(other, soft_targets=0.3, false_negatives=0.5) == loss(other)
    found = Likeness.of(batch, TrainingConfig(soft_targets=0.3))
    assert found is not None and batch.caption_vectors is not None and batch.caption_owner is not None
    for b in range(8):
        mean = batch.caption_vectors[batch.caption_owner == b].float().mean(0)
        assert torch.allclose(found.sample_BW[b], mean / mean.norm(), atol=1e-6)


def test_right_pairs_stay_right_however_alike_others_are() -> None:
    batch = make_batch(("image", "text"), 8)
    assert batch.caption_vectors is not None
    found = Likeness.of(dataclasses.replace(batch, caption_vectors=batch.caption_vectors * 0 + 0.5),
                        TrainingConfig(false_negatives=0.9))
    assert found is not None
    right = positives_of(batch, ("image", "text")).of_samples(torch.arange(8))
    assert torch.equal(found.of_samples(torch.arange(8), right).left_out_QK, ~right)


# ---- a run -----------------------------------------------------------------------------------------------------------

SOFT = ("training.soft_targets=0.3", "training.false_negatives=0.95")


def test_chinese_captions_are_compared_by_a_model_that_reads_them(tmp_path: Path) -> None:
    config = load_config(None, [f"paths.data_root={str(tmp_path)!r}", "data.languages=[en, zh]"])
    texts = ["a dog", "一只狗", "a red car", "一辆红色的汽车"]
    dog, same, car, other = caption_vectors(texts, config).astype(np.float32)
    assert min(dog @ same, car @ other) > 0.5 > max(dog @ other, car @ same, same @ other)
    assert len(dog) == model_for(config.data.languages).width


def test_captions_of_one_meaning_are_alike(small: SmallRuns, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = small.open(tmp_path, *SOFT)
    train = run.data.splits["train"]
    assert train.caption_vectors is not None and train.caption_vectors.dtype == np.float16
    vectors, captions = train.caption_vectors.astype(np.float32), train.table.captions.tolist()
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=2e-3) and len(vectors) == len(captions)
    first = captions.index(next(text for text in captions if text.startswith("a small")))
    cosines = vectors @ vectors[first]
    other = next(i for i, text in enumerate(captions) if "melody" in text)
    assert cosines[first + 1] > 0.9 > 0.5 > cosines[other], "another phrasing, and a sound"
    assert run.data.splits["test"].caption_vectors is None, "no loss looks at it"
    stage = small.stage(run, "align")
    batch = batches(run, stage)[0]
    assert batch.caption_vectors is not None and len(batch.caption_vectors) == len(batch.caption_owner)  # type: ignore[arg-type]
    rows = [np.flatnonzero(train.caption_ids == number)[0] for number in batch.caption_ids[:3].tolist()]  # type: ignore[index]
    assert np.array_equal(batch.caption_vectors[:3].numpy(), train.caption_vectors[rows])


def test_vectors_are_kept_and_a_run_takes_them(small: SmallRuns, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    run = small.open(tmp_path / "run", *SOFT)

    def no_more(*_: Any) -> Any:
        raise AssertionError("worked out again")

    monkeypatch.setattr("trimodal.towers.captions._encoded", no_more)
    again = small.open(tmp_path / "again", *SOFT)
    for name in ("train", "val"):
        assert np.array_equal(again.data.splits[name].caption_vectors, run.data.splits[name].caption_vectors)  # type: ignore[arg-type]
    plain = small.open(tmp_path / "plain")
    assert with_caption_vectors(plain.data, plain.config) is plain.data
    found = [weights(one.model) for one in (run, again, plain)
             for stage in [small.stage(one, "align")] if step(one, stage, batches(one, stage)[0])]
    assert differing(found[0], found[1]) == [] and differing(found[0], found[2]), "the loss is another one"


def test_plans_of_before_stay_where_nothing_is_compared_by_captions(small: SmallRuns, tmp_path: Path) -> None:
    config, soft = small.config(tmp_path), small.config(tmp_path, *SOFT)
    row = config.stages[1]
    plain, other = (planner.stage_facts(one, row, row.tasks) for one in (config, soft))
    assert "likeness" not in plain and other == plain | {"likeness": (True, True)}
    model = TriModalModel(config.model)
    batch = planner.largest_batch(soft, row, row.tasks[0], model)
    assert batch.caption_vectors is not None and batch.caption_vectors.shape == (32, 384)
    assert planner.largest_batch(config, row, row.tasks[0], model).caption_vectors is None
