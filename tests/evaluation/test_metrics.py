"""Metrics against naive float64 references, and what they say of collapsed, random and broken features."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trimodal.evaluation import metrics
from trimodal.evaluation.metrics import Options

QUIET = Options(tile=7, resamples=0)


def _naive_direction(scores, relevant, depth=10):
    """Ranks by sorting every query's whole list, the wrong items first among those with equal scores."""
    out: dict[str, list[float]] = {"R@1": [], "R@5": [], "R@10": [], "rank": [], "mAP@10": []}
    for row, right in zip(scores.tolist(), relevant.tolist(), strict=True):
        if not any(right):
            continue
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        places = [place + 1 for place, j in enumerate(order) if right[j]]
        out["rank"].append(places[0])
        for k in (1, 5, 10):
            out[f"R@{k}"].append(places[0] <= k)
        hits = [(found + 1) / place for found, place in enumerate(places) if place <= depth]
        out["mAP@10"].append(sum(hits) / min(len(places), depth))
    means = {name: float(np.mean(values)) for name, values in out.items()}
    return {**means, "median_rank": float(np.median(out["rank"]))}


def _relevance(owners, texts, samples):
    of_sample = [{int(t) for t, o in zip(texts, owners, strict=True) if o == s} for s in range(samples)]
    return torch.tensor([[int(t) in of_sample[s] for t in texts] for s in range(samples)])


def _case(seed, samples=23, captions=61, texts=30, levels=2):
    """Features of small integers: scores are exact, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(-levels, levels + 1, (samples, 4), generator=g).double()
    right = torch.randint(-levels, levels + 1, (captions, 4), generator=g).double()
    owners = torch.cat([torch.arange(samples), torch.randint(samples, (captions - samples,), generator=g)])
    return left, right, owners, torch.randint(texts, (captions,), generator=g)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.repetition) for n in range(2, 6))])
@pytest.mark.parametrize("tile", [4, 13, 1000])
def test_retrieval_equals_the_naive_reference_with_ties_and_duplicates(seed, tile):
    left, right, owners, texts = _case(seed)
    figures = metrics.retrieval(left, right, owners, texts, options=Options(tile=tile, resamples=0))
    relevant = _relevance(owners, texts, len(left))
    for prefix, scores, mask in (("image_to_text", left @ right.T, relevant), ("text_to_image", right @ left.T,
                                                                                relevant.T)):
        expected = _naive_direction(scores, mask)
        for name in ("R@1", "R@5", "R@10", "median_rank", "mAP@10"):
            assert figures[f"{prefix}_{name}"]["value"] == pytest.approx(expected[name], abs=1e-12), (prefix, name)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.repetition) for n in range(2, 6))])
def test_caption_by_caption_equals_the_naive_reference_with_ties(seed):
    """As papers count: equal words are of no interest, and a caption's own sample alone is right for it."""
    left, right, owners, _ = _case(seed)
    figures = metrics.retrieval(left, right, owners, options=QUIET)
    own = owners == torch.arange(len(left))[:, None]
    for prefix, scores, mask in (("image_to_text", left @ right.T, own), ("text_to_image", right @ left.T, own.T)):
        for name, value in _naive_direction(scores, mask).items():
            if name != "rank":
                assert figures[f"{prefix}_{name}"]["value"] == pytest.approx(value, abs=1e-12), name
    assert figures["text_to_image_R@1"]["chance"] == pytest.approx(1 / 23)


# ---- re-ranking --------------------------------------------------------------------------------------------------


def _naive_reranked(scores, relevant, again, depth):
    """Sort each list, wrong before right where equal; then sort its first `depth` in the same way by other scores."""
    order = [sorted(range(len(row)), key=lambda j: (-row[j], right[j])) for row, right in
             zip(scores.tolist(), relevant.tolist(), strict=True)]
    value = torch.full_like(scores, -1e9)
    for q, row in enumerate(order):
        for place, j in enumerate(row):
            value[q, j] = again[q, j] if place < depth else -1e6 - place
    return _naive_direction(value, relevant)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", [1, 3, 16, 1000])
@pytest.mark.parametrize("tile", [4, 1000])
def test_reranked_figures_equal_the_naive_reference_with_ties_and_duplicates(seed, depth, tile):
    left, right, owners, texts = _case(seed)
    again = torch.randint(-2, 3, (len(left), len(right)), generator=torch.Generator().manual_seed(seed)).double()
    asked: list[int] = []

    def score(samples, captions, similarity):
        assert torch.equal(similarity, (left[samples] * right[captions]).sum(1))
        asked.append(len(samples))
        return again[samples, captions]

    figures = metrics.retrieval(left, right, owners, texts, options=Options(tile=tile, resamples=0),
                                rerank=metrics.Rerank(depth, score))
    plain = metrics.retrieval(left, right, owners, texts, options=Options(tile=tile, resamples=0))
    assert asked == [len(left) * min(depth, len(right)), len(right) * min(depth, len(left))]
    assert {name: figures[name] for name in plain} == plain, "the plain figures stay"
    relevant = _relevance(owners, texts, len(left))
    for prefix, scores, mask, others in (("image_to_text", left @ right.T, relevant, again),
                                         ("text_to_image", right @ left.T, relevant.T, again.T)):
        expected = _naive_reranked(scores, mask, others, depth)
        for name in ("R@1", "R@5", "R@10", "median_rank", "mAP@10"):
            figure = figures[f"{prefix}_{name}_reranked"]
            assert figure["value"] == pytest.approx(expected[name], abs=1e-12), (prefix, name)
            assert figure["chance"] == plain[f"{prefix}_{name}"]["chance"]


def _constant(value, samples, captions, similarity):
    return torch.full_like(similarity, value)


def test_reranking_gives_a_collapsed_or_broken_head_nothing():
    """Scores that are equal or no numbers put every right candidate behind the wrong ones beside it."""
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 8, generator=g), dim=1)
    for value in (0.0, 7.5, math.nan, math.inf):
        rerank = metrics.Rerank(10, functools.partial(_constant, value))
        figures = metrics.retrieval(features, features, torch.arange(40), options=QUIET, rerank=rerank)
        assert figures["image_to_text_R@1"]["value"] == 1.0
        assert figures["image_to_text_R@1_reranked"]["value"] == figures["image_to_text_R@5_reranked"]["value"] == 0.0
        assert figures["text_to_image_median_rank_reranked"]["value"] == 10
    alone = metrics.Rerank(1, functools.partial(_constant, math.nan))
    figures = metrics.retrieval(features, features, torch.arange(40), options=QUIET, rerank=alone)
    assert figures["image_to_text_R@1_reranked"]["value"] == 1.0, "one candidate has nothing to be behind of"


def test_features_that_are_not_finite_gain_nothing_by_reranking():
    features = torch.eye(12)
    features[3] = math.nan
    rerank = metrics.Rerank(5, lambda samples, captions, similarity: similarity + (samples == captions))
    figures = metrics.retrieval(features, torch.eye(12), torch.arange(12), options=QUIET, rerank=rerank)
    for name in ("image_to_text_R@1", "text_to_image_R@1"):
        assert figures[name]["value"] == figures[f"{name}_reranked"]["value"] == 11 / 12


@pytest.mark.parametrize("seed", range(4))
def test_captions_that_are_not_counted_tell_what_is_right(seed):
    """One of each text is a query and a candidate; right for it are the samples of all that carry it."""
    left, right, owners, texts = _case(seed)
    counted = torch.tensor(sorted({int(t): i for i, t in reversed(list(enumerate(texts.tolist())))}.values()))
    order = torch.cat([counted, torch.tensor([i for i in range(len(texts)) if i not in counted.tolist()])])
    figures = metrics.retrieval(left, right[counted], owners[order], texts[order], options=QUIET)
    relevant = _relevance(owners, texts, len(left))[:, counted]
    for prefix, scores, mask in (("image_to_text", left @ right[counted].T, relevant),
                                 ("text_to_image", right[counted] @ left.T, relevant.T)):
        for name, value in _naive_direction(scores, mask).items():
            if name != "rank":
                assert figures[f"{prefix}_{name}"]["value"] == pytest.approx(value, abs=1e-12), name
    assert figures["text_to_image_R@1"]["queries"] == len(counted) == figures["image_to_text_R@1"]["candidates"]


def test_float32_unit_features_give_the_float64_answer_where_it_is_clear():
    """Rounding moves a score by less than 100 of its last places; where no wrong item is that near, ranks are equal."""
    g = torch.Generator().manual_seed(1)
    left = torch.nn.functional.normalize(torch.randn(200, 64, generator=g, dtype=torch.float64), dim=1)
    noise = torch.randn(600, 64, generator=g, dtype=torch.float64)
    owners = torch.arange(200).repeat_interleave(3)
    right = torch.nn.functional.normalize(left[owners] + 0.35 * noise, dim=1)
    relation = metrics.Relation(owners, torch.arange(600), 200)
    double, single = (metrics.relevant_ranks(left.to(dtype), right.to(dtype), relation.tile, relation.captions_S, 128)
                      for dtype in (torch.float64, torch.float32))
    scores, is_right = left @ right.T, owners == torch.arange(200)[:, None]
    best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
    clear = (scores - best).abs().masked_fill(is_right, torch.inf).amin(1) > 100 * torch.finfo(torch.float32).eps
    assert clear.double().mean() > 0.9 and torch.equal(double[clear, 0], single[clear, 0])
    assert 0.2 < (double[:, 0] == 1).double().mean() < 0.98  # neither trivial nor hopeless


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_matrix_of_all_scores_is_held():
    g = torch.Generator().manual_seed(0)
    left, right, owners = torch.randn(120, 4, generator=g), torch.randn(500, 4, generator=g), torch.arange(500) % 120
    with _Largest() as largest:
        metrics.retrieval(left, right, owners, torch.zeros(500, dtype=torch.int64), options=Options(tile=50))
    assert largest.numel <= max(500 * 10, 50 * 50 * 2)  # features, ranks, tiles; everything is relevant to everything


def test_the_five_caption_rule_by_hand():
    left = torch.eye(3)
    right = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.0, 0.0],  # of sample 0: the second caption is its best
                          [0.0, 0.5, 0.0], [0.0, 0.0, 0.7]])
    owners = torch.tensor([0, 0, 1, 2])
    figures = metrics.retrieval(left, right, owners, options=QUIET)
    assert figures["image_to_text_R@1"]["value"] == pytest.approx(2 / 3)  # sample 1 finds a caption of sample 0 first
    assert figures["text_to_image_R@1"]["value"] == pytest.approx(3 / 4)
    assert figures["image_to_text_R@1"] | {"chance": None} == {
        "value": pytest.approx(2 / 3), "chance": None, "candidates": 4, "queries": 3, "low": None, "high": None}
    assert figures["image_to_text_R@1"]["chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert figures["text_to_image_R@1"]["candidates"] == 3 and figures["text_to_image_R@1"]["queries"] == 4
    same_words = metrics.retrieval(left, right, owners, torch.tensor([7, 8, 7, 9]), options=QUIET)
    assert same_words["image_to_text_R@1"]["value"] == 1.0  # now the caption of sample 0 has the words of sample 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_collapsed_model_never_scores_above_chance(dtype):
    g = torch.Generator().manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(1, 512, generator=g), dim=1).to(dtype)
    owners = torch.arange(50).repeat_interleave(5)
    figures = metrics.retrieval(one.expand(50, -1), one.expand(250, -1), owners, options=Options(tile=17, resamples=0))
    for name, figure in figures.items():
        worse = figure["value"] >= figure["chance"] if "rank" in name else figure["value"] <= figure["chance"]
        assert worse, (name, figure)
    assert figures["image_to_text_R@10"]["value"] == 0.0
    assert figures["text_to_image_median_rank"]["value"] == 50


@pytest.mark.parametrize("lead, expected", [(2.4e-7, 0.0), (1e-5, 1.0)])
def test_ties_to_rounding_count_against_the_model(lead, expected):
    """Scores of a collapsed model may differ in the last bits, since matmul kernels treat edges in their own way."""
    scores = torch.ones(20, 20) + lead * torch.eye(20)
    assert (scores.diag() > 1.0).all()
    figures = metrics.retrieval(torch.eye(20), scores, torch.arange(20), options=QUIET)
    assert figures["image_to_text_R@10"]["value"] == figures["text_to_image_R@10"]["value"] == expected


def test_random_features_score_chance():
    g = torch.Generator().manual_seed(3)
    owners, texts = torch.arange(400).repeat_interleave(3), torch.randint(300, (1200,), generator=g)
    figures = metrics.retrieval(torch.randn(400, 16, generator=g), torch.randn(1200, 16, generator=g), owners, texts,
                                options=Options(resamples=200))
    for name in ("image_to_text_R@10", "text_to_image_R@10", "image_to_text_mAP@10"):
        figure = figures[name]
        assert figure["value"] == pytest.approx(figure["chance"], rel=0.5)
    rank = figures["text_to_image_median_rank"]
    assert rank["value"] == pytest.approx(rank["chance"], rel=0.2)


def test_features_that_are_not_finite_score_worst_and_are_counted():
    left, owners = torch.eye(20), torch.arange(20)
    broken = left.clone()
    broken[3], broken[4, 2] = math.nan, math.inf
    figures = metrics.retrieval(broken, left, owners, options=QUIET)
    assert metrics.count_nonfinite(broken) == 2 and metrics.count_nonfinite(left) == 0
    assert figures["image_to_text_R@10"]["value"] == pytest.approx(18 / 20)
    assert figures["text_to_image_R@10"]["value"] == pytest.approx(18 / 20)
    everything = metrics.retrieval(torch.full((20, 20), math.nan), left, owners, options=QUIET)
    assert everything["image_to_text_R@10"]["value"] == 0.0
    assert everything["image_to_text_median_rank"]["value"] == 20


def test_a_broken_candidate_does_not_win_where_all_scores_are_negative():
    left, right = torch.eye(20), -torch.ones(20, 20) + 0.5 * torch.eye(20)
    left[3] = math.nan
    figures = metrics.retrieval(left, right, torch.arange(20), options=QUIET)
    assert figures["text_to_image_R@1"]["value"] == pytest.approx(19 / 20)


def test_no_captions_or_a_sample_without_one():
    assert metrics.retrieval(torch.eye(3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == {}
    figures = metrics.retrieval(torch.eye(3), torch.eye(3)[:2], torch.arange(2), options=QUIET)
    assert figures["image_to_text_R@1"]["queries"] == 2  # nothing is right for the third picture
    assert figures["text_to_image_R@1"]["candidates"] == 3  # but it can be found in error


def _orders(n, relevant):
    """Places (1-based) of the relevant items in every order of n items."""
    return [[place + 1 for place, item in enumerate(order) if item < relevant]
            for order in itertools.permutations(range(n))]


@pytest.mark.parametrize("n, relevant", [(6, 1), (6, 2), (7, 3), (5, 5)])
def test_chance_is_the_mean_over_every_order(n, relevant):
    orders, count = _orders(n, relevant), np.array([relevant])
    for k in (1, 2, 5, 10):
        exact = np.mean([places[0] <= k for places in orders])
        assert metrics.chance_hit(count, n, k)[0] == pytest.approx(exact)
        precision = np.mean([sum((j + 1) / p for j, p in enumerate(places) if p <= k) / min(relevant, k)
                             for places in orders])
        assert metrics.chance_precision(count, n, k)[0] == pytest.approx(precision)
    assert metrics.chance_median_rank(count, n) == np.median([places[0] for places in orders])


def test_chance_median_rank_mixes_queries():
    orders = _orders(6, 1) + _orders(6, 3)
    assert metrics.chance_median_rank(np.array([1, 3]), 6) == np.median([places[0] for places in orders])


def test_intervals_cover_the_truth_about_95_times_in_100_and_repeat():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        hits = (rng.random(150) < 0.3).astype(float)
        (low, high), = metrics.bootstrap_means(hits[:, None], np.arange(150), Options(resamples=300))
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199
    same = [metrics.bootstrap_means(hits[:, None], np.arange(150), Options(resamples=50, seed=4)) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != metrics.bootstrap_means(hits[:, None], np.arange(150), Options(resamples=50, seed=5))


def test_captions_of_one_picture_are_drawn_together():
    values = np.repeat(np.arange(40) % 2, 25).astype(float)
    alone, = metrics.bootstrap_means(values[:, None], np.arange(1000), Options())
    together, = metrics.bootstrap_means(values[:, None], np.repeat(np.arange(40), 25), Options())
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])  # 5 times as wide for groups of 25


def test_the_interval_of_the_median_holds_its_quantiles():
    values = np.random.default_rng(0).integers(1, 1000, 401)
    low, high = metrics.bootstrap_median(values, np.arange(401), Options())
    draws = np.random.default_rng(9).choice(values, (2000, 401))
    expected = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    assert low == pytest.approx(expected[0], rel=0.05) and high == pytest.approx(expected[1], rel=0.05)


@pytest.mark.parametrize("tile", [1, 1024])
def test_concept_precision_equals_the_naive_reference(tile):
    g = torch.Generator().manual_seed(5)
    scores, labels = torch.randint(0, 4, (40, 9), generator=g).float(), torch.rand(40, 9, generator=g) < 0.3
    labels[:, 4] = False  # a concept that no sample has
    figure = metrics.concept_precision(scores, labels, options=Options(tile=tile, resamples=0))["mAP"]
    precisions = []
    for k in (k for k in range(9) if labels[:, k].any()):
        order = sorted(range(40), key=lambda i: (-scores[i, k].item(), labels[i, k].item()))
        places = [place + 1 for place, i in enumerate(order) if labels[i, k]]
        precisions.append(np.mean([(j + 1) / place for j, place in enumerate(places)]))
    assert figure["value"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert figure["queries"] == 8 and figure["candidates"] == 40


def test_concept_precision_of_constant_and_nan_scores_is_at_most_chance():
    labels = torch.rand(60, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    for scores in (torch.zeros(60, 5), torch.full((60, 5), math.nan)):
        figure = metrics.concept_precision(scores, labels)["mAP"]
        assert figure["value"] <= figure["chance"]
    assert metrics.concept_precision(torch.zeros(60, 5), torch.zeros(60, 5)) == {}


def test_a_score_of_infinity_wins_nothing():
    labels = torch.eye(20, dtype=torch.bool)
    scores = torch.zeros(20, 20).masked_fill(labels, math.inf)
    assert metrics.concept_precision(scores, labels)["mAP"]["value"] == pytest.approx(1 / 20)


def _naive_detection(scores, same, p):
    """EER by a fine walk along the ROC line and the minimum cost over every threshold."""
    points = []
    for threshold in [math.inf, *sorted(set(scores), reverse=True)]:
        accepted = scores >= threshold
        points.append((np.mean(accepted[~same]), np.mean(~accepted[same])))
    cost = min(p * miss + (1 - p) * accept for accept, miss in points) / min(p, 1 - p)
    line = np.concatenate([np.linspace(a, b, 2001) for a, b in itertools.pairwise(points)])
    accept, miss = line[np.argmin(np.abs(line[:, 0] - line[:, 1]))]
    return (accept + miss) / 2, cost


@pytest.mark.parametrize("seed", range(4))
def test_verification_equals_the_naive_reference(seed):
    rng = np.random.default_rng(seed)
    same = rng.random(300) < 0.3
    scores = np.round(rng.normal(same * 1.5, 1.0), 1)  # with ties
    figures = metrics.verification(scores, same, rng.integers(8, size=(300, 2)), QUIET)
    for p in (0.05, 0.01):
        rate, cost = _naive_detection(scores, same, p)
        assert figures["EER"]["value"] == pytest.approx(rate, abs=1e-3)
        assert figures[f"minDCF@{p}"]["value"] == pytest.approx(cost, abs=1e-12)


def test_verification_of_perfect_constant_and_broken_scores():
    same = np.arange(40) % 2 == 0
    speakers = np.stack([np.arange(40) % 5, np.where(same, np.arange(40) % 5, (np.arange(40) + 1) % 5)], axis=1)
    perfect = metrics.verification(same.astype(float), same, speakers)
    assert perfect["EER"]["value"] == 0.0 and perfect["minDCF@0.01"]["value"] == 0.0 and perfect["EER"]["high"] == 0.0
    constant = metrics.verification(np.zeros(40), same, speakers)
    assert constant["EER"]["value"] == constant["EER"]["chance"] == 0.5 and constant["minDCF@0.05"]["value"] == 1.0
    broken = metrics.verification(np.full(40, np.nan), same, speakers)
    assert broken["EER"]["value"] == 1.0
    assert metrics.verification(np.zeros(3), np.ones(3, bool), np.zeros((3, 2))) == {}


def test_the_interval_of_the_error_rate_draws_speakers():
    rng, options = np.random.default_rng(0), Options(resamples=40)
    speakers = np.array([(a, b) for a in range(6) for b in range(6) for _ in range(3)])
    same = speakers[:, 0] == speakers[:, 1]
    scores = rng.normal(same * 2.0, 1.0)
    rates = []
    for draw in np.concatenate(list(metrics.draws(6, options))).astype(int):
        times = np.where(same, draw[speakers[:, 0]], draw[speakers[:, 0]] * draw[speakers[:, 1]])
        if times[same].any() and times[~same].any():
            rates.append(_naive_detection(scores.repeat(times), same.repeat(times), 0.05)[0])
    figure = metrics.verification(scores, same, speakers, options)["EER"]
    assert (figure["low"], figure["high"]) == pytest.approx(tuple(np.percentile(rates, [2.5, 97.5])), abs=2e-3)


def test_identification_counts_ties_and_nan_as_wrong():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [math.nan] * 7])
    figures = metrics.identification(logits, torch.tensor([0, 0, 0, 0]), options=QUIET)
    assert figures["speaker_top1"]["value"] == 0.25 and figures["speaker_top5"]["value"] == 0.5
    assert figures["speaker_top1"]["chance"] == pytest.approx(1 / 7) and figures["speaker_top5"]["candidates"] == 7
