"""Our metrics against those of scikit-learn and torchmetrics; plain references are in test_metrics.py.

torchmetrics drops right answers whose score is 0 or less, and its EER passes scores outside 0 to 1 through a sigmoid:
scores are given to it shifted into (0, 1). Of equal scores the libraries take an order of their own, and our metrics
the one that is worst for the model: where scores are equal, the libraries are given this order as different scores.
"""

import numpy as np
import pytest
import torch
from sklearn import metrics as learn
from torchmetrics.functional import retrieval

from trimodal.evaluation import metrics
from trimodal.evaluation.metrics import Options

QUIET = Options(tile=5, resamples=0)


def _scores(seed: int, shape: tuple[int, int]) -> torch.Tensor:
    """Different numbers: on ties the libraries take an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape[0] * shape[1], generator=generator).view(shape).float() / (shape[0] * shape[1])


def _worst_first(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Different numbers in (0, 1) in the order of each row's scores, the wrong ones first where these are equal."""
    order = np.lexsort((right.numpy(), -scores.numpy()))
    places = torch.from_numpy(order).argsort(1)
    return 1 - (places.float() + 1) / (scores.shape[1] + 1)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_concepts_of_many_equal_scores_against_scikit_learn(seed: int, steps: int) -> None:
    scores, labels = (_scores(seed, (40, 7)) * steps).floor(), _scores(seed + 9, (40, 7)) < 0.3
    labels[0] = True
    expected = learn.average_precision_score(labels.numpy(), _worst_first(scores.T, labels.T).T.numpy(),
                                             average="macro")
    assert metrics.concept_precision(scores, labels, options=QUIET)["mAP"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_of_equal_vectors_against_torchmetrics(seed: int) -> None:
    """Pictures and captions are a few whole vectors each, so most similarities are equal, and exactly so."""
    rng = np.random.default_rng(seed)
    pictures, captions = (torch.eye(4)[torch.from_numpy(rng.integers(4, size=n))] for n in (12, 30))
    owners = torch.from_numpy(rng.permutation(np.r_[np.arange(12), rng.integers(12, size=18)]))
    found = metrics.retrieval(pictures, captions, owners, options=QUIET)
    scores, right = pictures @ captions.T, owners == torch.arange(12)[:, None]
    for name, given, wanted in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        rows = list(zip(_worst_first(given, wanted), wanted, strict=True))
        for k in (1, 5, 10):
            hits = [float(retrieval.retrieval_hit_rate(row, own, top_k=k)) for row, own in rows]
            assert found[f"{name}_R@{k}"]["value"] == pytest.approx(np.mean(hits)), (name, k)


@pytest.mark.parametrize("seed", range(3))
def test_concepts_against_scikit_learn(seed: int) -> None:
    scores = _scores(seed, (40, 7))
    labels = torch.rand(40, 7, generator=torch.Generator().manual_seed(seed)) < 0.2
    labels[:, 2] = False  # a concept of no sample
    used = labels.any(0)
    expected = learn.average_precision_score(labels[:, used].numpy(), scores[:, used].numpy(), average="macro")
    assert metrics.concept_precision(scores, labels, options=QUIET)["mAP"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_identification_against_scikit_learn(seed: int) -> None:
    scores, classes = _scores(seed, (60, 9)), torch.arange(60) % 9
    found = metrics.identification(scores, classes, options=QUIET)
    for k in (1, 5):
        expected = learn.top_k_accuracy_score(classes.numpy(), scores.numpy(), k=k)
        assert found[f"speaker_top{k}"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_verification_against_the_curve_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    same = rng.random(500) < 0.4
    scores = np.round(rng.normal(same.astype(float), 1.0), 1)  # many are equal: one point of the curve
    accept, hit, _ = learn.roc_curve(same, scores, drop_intermediate=False)
    miss = 1 - hit
    after = int(np.argmax(accept >= miss))
    gap = miss[after - 1] - accept[after - 1]
    part = gap / (gap - (miss[after] - accept[after]))
    expected = accept[after - 1] + part * (accept[after] - accept[after - 1])
    found = metrics.verification(scores, same, rng.integers(9, size=(500, 2)), QUIET)
    assert found["EER"]["value"] == pytest.approx(expected)
    costs = (0.05 * miss + 0.95 * accept).min() / 0.05
    assert found["minDCF@0.05"]["value"] == pytest.approx(costs)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_against_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pictures, captions = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
                          for n in (12, 30))
    owners = torch.arange(30) % 12
    found = metrics.retrieval(pictures, captions, owners, options=QUIET)
    shifted = (pictures @ captions.T + 2) / 4
    for name, scores, right in (("image_to_text", shifted, owners == torch.arange(12)[:, None]),
                                ("text_to_image", shifted.T, (owners == torch.arange(12)[:, None]).T)):
        for k in (1, 5, 10):
            hits = [float(retrieval.retrieval_hit_rate(row, own, top_k=k))
                    for row, own in zip(scores, right, strict=True)]
            assert found[f"{name}_R@{k}"]["value"] == pytest.approx(np.mean(hits)), (name, k)
    first = [float(retrieval.retrieval_reciprocal_rank(row, own)) for row, own in
             zip(shifted.T, (owners == torch.arange(12)[:, None]).T, strict=True)]
    assert found["text_to_image_mAP@10"]["value"] == pytest.approx(
        np.mean([value if value >= 0.1 else 0.0 for value in first])), "one right answer: DCASE's 1/rank within 10"
