"""Loss mathematics against naive formulas. The objectives have a file of their own."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimodal.memory.tracker import PeakMemory
from trimodal.objectives.contrastive import Positives, info_nce, pairwise_sigmoid
from trimodal.objectives.labels import SPEAKER_MARGIN, SPEAKER_SCALE, margin_logits
from trimodal.objectives.masked import patch_error
from trimodal.objectives.matching import hard_negatives

OWNER, IDS = [0, 0, 1, 2, 2, 3], [7, 8, 7, 9, 9, 5]  # samples 0 and 1 share a caption, 2 has the same one twice
RIGHT = [[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


def rows_of(table: Tensor):
    return lambda rows: table[rows]


# ---- InfoNCE -----------------------------------------------------------------------------------------------------


def naive_nce(query: Tensor, key: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    total = query.new_zeros(())
    for i, q in enumerate(query):
        scores = torch.stack([scale * (q * k).sum() for k in key])
        normaliser = scores.exp().sum().log()
        total = total - torch.stack([s - normaliser for s, r in zip(scores, right[i], strict=True) if r]).mean()
    return total


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 6, 11, 1024])
@pytest.mark.parametrize("side", ["samples", "captions"])
def test_info_nce_is_the_mean_log_probability_of_the_positives(chunk: int, side: str) -> None:
    sample, caption = unit(4, 8).requires_grad_(), unit(6, 8, seed=1).requires_grad_()
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=True)
    positives = Positives.of(torch.tensor(OWNER), torch.tensor(IDS), torch.arange(4))
    right = torch.tensor(RIGHT)
    if side == "samples":
        ours = info_nce(sample, caption, scale, positives.of_samples, chunk)
        naive = naive_nce(sample, caption, scale, right)
    else:
        ours = info_nce(caption, sample, scale, positives.of_captions, chunk)
        naive = naive_nce(caption, sample, scale, right.T)
    assert float((ours - naive).detach().abs()) <= 1e-12
    wanted = (sample, caption, scale)
    pairs = zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(naive, wanted), strict=True)
    assert all(float((one - other).abs().max()) <= 1e-12 for one, other in pairs)
    with torch.no_grad():
        assert float((info_nce(sample, caption, scale, positives.of_samples, chunk)
                      - naive_nce(sample, caption, scale, right)).abs()) <= 1e-12


def test_info_nce_in_chunks_saves_memory() -> None:
    def peak(chunk: int) -> int:
        query, key = unit(256, 8).requires_grad_(), unit(256, 8, seed=1).requires_grad_()
        with PeakMemory() as tracker:
            info_nce(query, key, torch.tensor(10.0), rows_of(torch.eye(256).bool()), chunk).backward()
        return tracker.peak_bytes

    assert peak(16) < 0.35 * peak(256), "the scores of a chunk are freed before the next"


def naive_sigmoid(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, right: Tensor) -> Tensor:
    """Algorithm 1 of arXiv:2303.15343, pair by pair, without its mean."""
    total = torch.zeros((), dtype=torch.float64)
    for i, q in enumerate(query):
        for j, k in enumerate(key):
            z = 1.0 if right[i, j] else -1.0
            total = total + (1 + (-z * (scale * (q * k).sum() + bias)).exp()).log()
    return total


@pytest.mark.parametrize("chunk", [1, 3, 4, 1024])
def test_the_sigmoid_loss_judges_every_pair_by_itself(chunk: int) -> None:
    sample, caption = unit(4, 8).requires_grad_(), unit(6, 8, seed=1).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (11.0, -1.5))
    positives, right = Positives.of(torch.tensor(OWNER), torch.tensor(IDS), torch.arange(4)), torch.tensor(RIGHT)
    ours = pairwise_sigmoid(sample, caption, scale, bias, positives.of_samples, chunk)
    naive = naive_sigmoid(sample, caption, scale, bias, right)
    assert float((ours - naive).detach().abs()) <= 1e-12
    wanted = (sample, caption, scale, bias)
    pairs = zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(naive, wanted), strict=True)
    assert all(float((one - other).abs().max()) <= 1e-12 for one, other in pairs)
    turned = pairwise_sigmoid(caption, sample, scale, bias, positives.of_captions, chunk)
    assert float((turned - naive).detach().abs()) <= 1e-12, "the same pairs from the other side"


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_memory_of_a_loss_in_chunks_grows_with_chunk_times_batch(kind: str) -> None:
    """Several captions a sample, with the masks of positives made chunk by chunk: nothing of B x B is ever held."""
    def peak(B: int, chunk: int) -> int:
        query, key = unit(B, 4).requires_grad_(), unit(2 * B, 4, seed=1).requires_grad_()
        ids, samples = torch.arange(2 * B) % (2 * B - 3), torch.arange(B)
        positives = Positives.of(samples.repeat_interleave(2), ids, samples)
        scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
        with PeakMemory() as tracker:
            loss = (info_nce(query, key, scale, positives.of_samples, chunk) if kind == "infonce" else
                    pairwise_sigmoid(query, key, scale, bias, positives.of_samples, chunk))
            loss.backward()
        return tracker.peak_bytes

    assert peak(512, 16) < 2.2 * peak(256, 16), "linear in the batch"
    assert peak(512, 512) > 3.5 * peak(256, 256), "a square without chunks"
    assert peak(512, 16) < 0.1 * peak(512, 512)


# ---- hard negatives ----------------------------------------------------------------------------------------------


def test_hard_negatives_are_drawn_by_similarity() -> None:
    draws = 20_000  # over several chunks of rows
    key = unit(6, 8)
    right = torch.tensor([True, False, False, True, False, False])
    scale = torch.tensor(4.0, dtype=torch.float64)
    query = unit(8, seed=2)
    picks, some = hard_negatives(query.expand(draws, -1), key, scale, lambda rows: right.expand(len(rows), -1),
                                 torch.rand(draws, generator=torch.Generator().manual_seed(3)))
    assert some.all()
    counts = torch.bincount(picks, minlength=6).double()
    assert not counts[right].any()
    expected = draws * (scale * key[~right] @ query).softmax(0)
    assert expected.max() > 2 * expected.min(), "the draws would be uniform anyway"
    chi_square = ((counts[~right] - expected) ** 2 / expected).sum()
    assert chi_square < 16.27, "3 degrees of freedom: one seed in a thousand is beyond this"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_hard_negatives_are_never_positives(uniform: float, scale: float, dtype: torch.dtype) -> None:
    """Positives are the most similar, and stand first, last and between."""
    key, query = unit(50, 8).to(dtype), unit(50, 8).to(dtype)
    right = torch.eye(50).bool() | (torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) < 0.3)
    right[:, [0, -1]] = True
    picks, some = hard_negatives(query, key, torch.tensor(scale), rows_of(right), torch.full((50,), uniform))
    assert some.all() and not right[torch.arange(50), picks].any()


def test_rows_without_wrong_keys_are_marked() -> None:
    right = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    picks, some = hard_negatives(unit(3, 8), unit(3, 8), torch.tensor(5.0), rows_of(right), torch.full((3,), 0.9))
    assert some.tolist() == [False, True, True]
    assert picks[1] == 1 and 0 <= int(picks.min()) and int(picks.max()) <= 2


# ---- patches -----------------------------------------------------------------------------------------------------


def test_patch_error_is_over_hidden_patches_normalised_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(2, 5, 6, generator=g, dtype=torch.float64) for _ in range(2))
    target = 3 * target + 2
    target[0, 1] = 4.0  # a patch of one colour
    hidden = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    total = 0.0
    for b, n in hidden.nonzero().tolist():
        values = target[b, n].tolist()
        mean = sum(values) / 6
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 6 + 1e-3)
        total += sum((p - (v - mean) / spread) ** 2 for p, v in zip(predicted[b, n].tolist(), values, strict=True)) / 6
    assert float(patch_error(predicted, target, hidden)) == pytest.approx(total, abs=1e-12)
    other = predicted.clone()
    other[~hidden] = 1e6
    assert float(patch_error(other, target, hidden)) == pytest.approx(total, abs=1e-12)


# ---- speakers ----------------------------------------------------------------------------------------------------


def test_margin_is_added_to_the_right_angle_alone() -> None:
    features, weight = unit(5, 8), 3 * torch.randn(4, 8, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 1, 2])
    logits = margin_logits(features, weight, labels)
    for b, v in itertools.product(range(5), range(4)):
        cosine = float(features[b] @ weight[v] / weight[v].norm())
        angle = math.acos(cosine) + (SPEAKER_MARGIN if labels[b] == v else 0.0)
        assert float(logits[b, v]) == pytest.approx(SPEAKER_SCALE * math.cos(angle), abs=1e-9)
    assert logits.shape == (5, 4)


def test_margin_at_the_poles_has_finite_gradients() -> None:
    weight = torch.eye(3, requires_grad=True)
    features = torch.stack([torch.eye(3)[0], -torch.eye(3)[1]]).requires_grad_()
    logits = margin_logits(features, weight, torch.tensor([0, 1]))
    assert float(logits[1, 1].detach()) == pytest.approx(-SPEAKER_SCALE, abs=1e-3), "never beyond the pole"
    logits.sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()
