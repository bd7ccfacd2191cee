"""Retrieval, concept, verification and identification metrics, each with its chance level and a 95 % interval.

Every figure is a plain dict:

    {"value": 0.42, "chance": 0.01, "candidates": 100, "queries": 500, "low": 0.38, "high": 0.46}

`chance` is the exact expectation under a random order, `candidates` how many items each query chooses from, `low` and
`high` the 95 % interval of a seeded bootstrap over queries (None without resamples).

One rule decides all ties, so that a collapsed model never scores above chance: an irrelevant item whose score is equal
(to rounding) stands before a relevant one. Features that are not finite score below everything.

No matrix of all scores is ever held: work goes tile by tile.

    figures = retrieval(image_features, caption_features, owners, caption_ids, names=("image", "text"))
    figures["image_to_text_R@1"]["value"]

Shape suffixes: S samples, C captions, Q queries, G gallery (candidates of a query), q and g one tile of them,
F feature width, D depth (relevant items looked at), K first candidates of a query, P pairs of sample and text, N rows,
K classes, T trials, R resamples, M metrics, A groups that are resampled together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)
MAP_DEPTH = 10  # mAP@10, as the DCASE retrieval task reports it
P_TARGET = (0.05, 0.01)  # priors of the two detection costs that VoxCeleb papers report

RERANKED = "_reranked"  # ends the names of figures whose first candidates have been ordered anew

Figure = dict[str, Any]  # numbers; None where there is no interval
Interval = tuple[Any, Any]  # two floats, or None and None without resamples


@dataclass(frozen=True)
class Rerank:
    """Orders the first `depth` candidates of each query anew, by `score`: of pairs given by the rows of their samples,
    of their captions, and their similarity, in this order, each [P]; as many floats."""

    depth: int
    score: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How figures are computed; none of it changes a value, only `resamples` and `seed` the interval."""

    tile: int = 1024  # scores held at once: tile x tile
    resamples: int = 1000  # 0 = no interval
    seed: int = 0


# ---- retrieval ---------------------------------------------------------------------------------------------------


class Relation:
    """Which captions are right for which samples: a sample's own, and any with the same text as one of them."""

    def __init__(self, owners_N: Tensor, texts_N: Tensor, num_samples: int, num_captions: int | None = None):
        """Take the sample (`owners_N`) and an id of the text (`texts_N`) of N captions.

        `num_captions`: only the first so many are columns of a mask; the rest only define, by their texts, which of
        these are right for which sample. None: all N are columns.
        """
        distinct, texts_N = torch.unique(texts_N, return_inverse=True)
        self.texts_C = texts_N[:num_captions]
        self.num_samples = num_samples
        self.keys_P = torch.unique(texts_N * num_samples + owners_N)  # sorted: text first, then sample
        samples_P, texts_P = self.keys_P % num_samples, self.keys_P // num_samples
        captions_of_text = torch.bincount(self.texts_C, minlength=len(distinct))
        self.captions_S = torch.zeros(num_samples, dtype=torch.int64, device=owners_N.device)
        self.captions_S.index_add_(0, samples_P, captions_of_text[texts_P])  # right captions of each sample
        self.samples_C = torch.bincount(texts_P, minlength=len(distinct))[self.texts_C]  # right samples of each caption

    def tile(self, samples: slice, captions: slice) -> Tensor:
        """True where the caption is right for the sample; bool (s, c)."""
        texts_c = self.texts_C[captions] * self.num_samples
        start_c = torch.searchsorted(self.keys_P, texts_c + samples.start)
        length_c = torch.searchsorted(self.keys_P, texts_c + samples.stop) - start_c
        columns = torch.arange(len(texts_c), device=texts_c.device).repeat_interleave(length_c)
        before_c = length_c.cumsum(0) - length_c
        places = torch.arange(len(columns), device=texts_c.device) - before_c[columns] + start_c[columns]
        mask = torch.zeros(samples.stop - samples.start, len(texts_c), dtype=torch.bool, device=texts_c.device)
        mask[self.keys_P[places] % self.num_samples - samples.start, columns] = True
        return mask


def retrieval(samples_SF: Tensor, captions_CF: Tensor, owners_N: Tensor, texts_N: Tensor | None = None, *,
              names: tuple[str, str] = ("image", "text"), options: Options = Options(),
              rerank: Rerank | None = None) -> dict[str, Figure]:
    """R@1/5/10, median rank and mAP@10 of both directions, several captions a sample.

    Sample to caption is a hit if any caption of the sample, or any caption with the same text, ranks high enough;
    for a caption every sample that carries its text is right. This is the protocol of COCO 5k (arXiv:1412.2306) and
    of Clotho with five captions, and equal texts do not count as errors. Without `texts_N` it is the count of papers:
    each caption is a query whose own sample alone is right, and an equal text of another sample an error.

    Args:
        samples_SF, captions_CF: L2-normalised features on one device.
        owners_N: row of each caption's sample, int64; behind the C captions may stand others that have no features and
            only tell what is right for which sample.
        texts_N: an id of each caption's normalised text, int64; None = all differ.
        names: what samples and captions are called in the names of the metrics.
        rerank: adds each figure once more, as `image_to_text_R@1_reranked`.

    Returns:
        Figures by name, such as `image_to_text_R@1` and `text_to_image_median_rank`; empty without captions.
    """
    if not len(samples_SF) or not len(captions_CF):
        return {}
    device = samples_SF.device
    owners_N = owners_N.to(device)
    texts_N = torch.arange(len(owners_N), device=device) if texts_N is None else texts_N.to(device)
    relation, owners_C = Relation(owners_N, texts_N, len(samples_SF), len(captions_CF)), owners_N[:len(captions_CF)]
    first, second = names
    groups_S, groups_C = np.arange(len(samples_SF)), owners_C.cpu().numpy()
    figures: dict[str, Figure] = {}
    for prefix, queries, gallery, relevant, counts_Q, groups in (
            (f"{first}_to_{second}", samples_SF, captions_CF, relation.tile, relation.captions_S, groups_S),
            (f"{second}_to_{first}", captions_CF, samples_SF, lambda c, s: relation.tile(s, c).T, relation.samples_C,
             groups_C)):
        ranks_QD = relevant_ranks(queries, gallery, relevant, counts_Q, options.tile)
        figures |= _direction(prefix, ranks_QD, counts_Q, len(gallery), groups, options)
        if rerank:
            found = first_candidates(queries, gallery, relevant, rerank.depth, options.tile)
            of_captions = queries is captions_CF
            again_QD = reranked(ranks_QD, found, _scores_of_pairs(found, rerank, of_captions=of_captions))
            figures |= {name + RERANKED: figure for name, figure in
                        _direction(prefix, again_QD, counts_Q, len(gallery), groups, options).items()}
    return figures


def relevant_ranks(queries_QF: Tensor, gallery_GF: Tensor, relevant: Callable[[slice, slice], Tensor],
                   counts_Q: Tensor, tile: int) -> Tensor:
    """Ranks of each query's best relevant items, int64 (Q, D), D at most 10; past `counts_Q` they mean nothing.

    The j-th best relevant item ranks at j + the number of irrelevant items that score at least as high.

    Args:
        relevant: gives the bool mask of a tile, from a slice of queries and one of the gallery.
        counts_Q: number of relevant items of each query.
    """
    depth = max(1, min(MAP_DEPTH, int(counts_Q.max())))
    search = _Search(_Rows(queries_QF), _Rows(gallery_GF), relevant, tile)
    place_D = torch.arange(1, depth + 1, device=queries_QF.device)
    return torch.cat([place_D + search.better(q, search.best(q, depth), counts_Q[q])
                      for q in _tiles(len(queries_QF), tile)])


class Candidates(NamedTuple):
    """The first K candidates of Q queries: their rows of the gallery, similarities, and whether they are relevant."""

    rows_QK: Tensor
    similarity_QK: Tensor
    right_QK: Tensor


def first_candidates(queries_QF: Tensor, gallery_GF: Tensor, relevant: Callable[[slice, slice], Tensor], depth: int,
                     tile: int) -> Candidates:
    """The `depth` candidates of each query, or all where there are fewer, that score highest; of equal ones those that
    are wrong, as in `relevant_ranks`."""
    search = _Search(_Rows(queries_QF), _Rows(gallery_GF), relevant, tile)
    found = [search.first(q, depth) for q in _tiles(len(queries_QF), tile)]
    return Candidates(*(torch.cat(column) for column in zip(*found, strict=True)))


def _scores_of_pairs(found: Candidates, rerank: Rerank, *, of_captions: bool) -> Tensor:
    """What `rerank` says of each candidate; (Q, K). `of_captions`: the queries are captions."""
    queries_QK = torch.arange(len(found.rows_QK), device=found.rows_QK.device)[:, None].expand_as(found.rows_QK)
    sides = (found.rows_QK, queries_QK) if of_captions else (queries_QK, found.rows_QK)
    scores_P = rerank.score(sides[0].flatten(), sides[1].flatten(), found.similarity_QK.flatten())
    return scores_P.to(found.similarity_QK).view_as(found.similarity_QK)


def reranked(ranks_QD: Tensor, found: Candidates, scores_QK: Tensor) -> Tensor:
    """Ranks of each query's best relevant items once its first candidates are ordered by `scores_QK`; of equal scores
    the wrong ones come first, and one that is not finite is below all. Items behind the first candidates stay where
    `ranks_QD` has them."""
    K, D = scores_QK.shape[1], ranks_QD.shape[1]
    scores_QK = scores_QK.masked_fill(~torch.isfinite(scores_QK), -torch.inf)
    best_QD = F.pad(scores_QK.masked_fill(~found.right_QK, -torch.inf).topk(min(D, K), dim=1).values,
                    (0, D - min(D, K)), value=-torch.inf)
    reached_QD = best_QD - rounding(best_QD.dtype) * best_QD.abs().clamp(min=1)
    wrong_QK = scores_QK.masked_fill(found.right_QK, torch.nan)
    place_D = torch.arange(1, D + 1, device=ranks_QD.device)
    inside_QD = place_D + torch.stack([(wrong_QK >= reached_QD[:, j, None]).sum(1) for j in range(D)], dim=1)
    return torch.where(place_D <= found.right_QK.sum(1, keepdim=True), inside_QD, ranks_QD.clamp(min=K + 1))


class _Rows:
    """Features, at least float32, whose rows that are not finite are zero; `ok_N` is False for those."""

    def __init__(self, features: Tensor):
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        self.ok_N = torch.isfinite(features).all(1)
        self.features = features.masked_fill(~self.ok_N[:, None], 0.0)


@dataclass(frozen=True)
class _Search:
    """Queries against a gallery, one tile of queries `q` at a time over all tiles `g` of the gallery."""

    queries: _Rows
    gallery: _Rows
    relevant: Callable[[slice, slice], Tensor]
    tile: int

    def best(self, q: slice, depth: int) -> Tensor:
        """Scores of the best relevant items in falling order, minus infinity where there are fewer; (q, D)."""
        best_qD = self.queries.features.new_full((q.stop - q.start, depth), -torch.inf)
        for g in _tiles(len(self.gallery.features), self.tile):
            mask_qg = self.relevant(q, g)
            rows = mask_qg.any(1).nonzero().squeeze(1)  # usually few: the scores of the others are not needed
            right = self._scores(rows + q.start, g).masked_fill_(~mask_qg[rows], -torch.inf)
            best_qD[rows] = torch.cat([best_qD[rows], right], dim=1).topk(depth, dim=1).values
        return best_qD

    def better(self, q: slice, best_qD: Tensor, counts_q: Tensor) -> Tensor:
        """How many irrelevant items score at least as high as each of the best relevant ones; int64 (q, D)."""
        tolerance = rounding(best_qD.dtype)
        found_qD = torch.zeros_like(best_qD, dtype=torch.int64)
        for g in _tiles(len(self.gallery.features), self.tile):
            wrong_qg = self._scores(q, g).masked_fill_(self.relevant(q, g), torch.nan)  # nan >= x is False
            found_qD[:, 0] += (wrong_qg >= best_qD[:, :1] - tolerance).sum(1)
            for j in range(1, best_qD.shape[1]):
                rows = (counts_q > j).nonzero().squeeze(1)
                found_qD[rows, j] += (wrong_qg[rows] >= best_qD[rows, j, None] - tolerance).sum(1)
        return found_qD

    def first(self, q: slice, depth: int) -> Candidates:
        """The candidates of the queries `q` that score highest, of equal ones those that are wrong, then those
        of lower rows: whatever the tiles."""
        found = Candidates(torch.empty(q.stop - q.start, 0, dtype=torch.int64, device=self.queries.features.device),
                           self.queries.features.new_empty(q.stop - q.start, 0),
                           torch.empty(q.stop - q.start, 0, dtype=torch.bool, device=self.queries.features.device))
        for g in _tiles(len(self.gallery.features), self.tile):
            scores_qg = self._scores(q, g)
            rows_qg = torch.arange(g.start, g.stop, device=scores_qg.device).expand_as(scores_qg)
            joined = Candidates(*(torch.cat(both, dim=1) for both in zip(
                found, (rows_qg, scores_qg, self.relevant(q, g)), strict=True)))
            ahead = joined.similarity_QK + rounding(scores_qg.dtype) * ~joined.right_QK
            ahead = ahead.masked_fill(torch.isneginf(ahead) & ~joined.right_QK, torch.finfo(ahead.dtype).min)
            kept = ahead.sort(dim=1, descending=True, stable=True).indices[:, :depth]
            found = Candidates(*(column.gather(1, kept) for column in joined))
        return found

    def _scores(self, rows: slice | Tensor, g: slice) -> Tensor:
        ok_qg = self.queries.ok_N[rows][:, None] & self.gallery.ok_N[g]
        return (self.queries.features[rows] @ self.gallery.features[g].T).masked_fill_(~ok_qg, -torch.inf)


def rounding(dtype: torch.dtype) -> float:
    """The tolerance within which two scores count as equal: the rounding of a dot product of unit vectors."""
    return 8 * torch.finfo(dtype).eps


def count_nonfinite(features: Tensor) -> int:
    """Rows that hold a NaN or an infinity."""
    return int((~torch.isfinite(features).all(1)).sum())


def _tiles(length: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, length)) for start in range(0, length, tile))


def _direction(prefix: str, ranks: Tensor, counts: Tensor, candidates: int, groups: np.ndarray,
               options: Options) -> dict[str, Figure]:
    """Figures of one direction; queries without anything relevant do not count."""
    counts_Q = counts.cpu().numpy()
    asked = counts_Q > 0
    ranks_QD, counts_Q, groups = ranks.cpu().numpy()[asked], counts_Q[asked], groups[asked]
    if not len(counts_Q):
        return {}
    best_Q = ranks_QD[:, 0]
    columns = [best_Q <= k for k in RECALL_AT] + [_average_precision(ranks_QD, counts_Q)]
    chances = [chance_hit(counts_Q, candidates, k).mean() for k in RECALL_AT]
    chances.append(chance_precision(counts_Q, candidates, MAP_DEPTH).mean())
    names = [f"R@{k}" for k in RECALL_AT] + [f"mAP@{MAP_DEPTH}"]
    values_QM = np.stack(columns, axis=1).astype(np.float64)
    intervals = bootstrap_means(values_QM, groups, options)
    size = {"candidates": candidates, "queries": len(best_Q)}
    figures = {f"{prefix}_{name}": _figure(value, chance, interval, **size) for name, value, chance, interval
               in zip(names, values_QM.mean(0), chances, intervals, strict=True)}
    figures[f"{prefix}_median_rank"] = _figure(
        float(np.median(best_Q)), chance_median_rank(counts_Q, candidates),
        bootstrap_median(best_Q, groups, options), **size)
    return figures


def _average_precision(ranks_QD: np.ndarray, counts_Q: np.ndarray) -> np.ndarray:
    """AP@10 of each query: mean over its relevant items, at most 10, of the precision at their ranks up to 10."""
    place_D = np.arange(1, ranks_QD.shape[1] + 1)
    counts = (place_D <= counts_Q[:, None]) & (ranks_QD <= MAP_DEPTH)
    return np.where(counts, place_D / ranks_QD, 0.0).sum(1) / np.minimum(counts_Q, MAP_DEPTH)


# ---- chance ------------------------------------------------------------------------------------------------------


def chance_hit(relevant: np.ndarray, candidates: int, k: int) -> np.ndarray:
    """P(one of `relevant` items is among the first k of `candidates` in random order), hypergeometric:
    1 - C(n - r, k) / C(n, k)."""
    taken = np.arange(min(k, candidates))
    misses = np.clip(candidates - np.asarray(relevant)[..., None] - taken, 0, None) / (candidates - taken)
    return 1.0 - misses.prod(-1)


def chance_median_rank(relevant: np.ndarray, candidates: int) -> float:
    """Median of the best relevant item's rank in random order, over queries with these numbers of relevant items."""
    kinds, weights = np.unique(relevant, return_counts=True)
    places = np.arange(candidates)
    above = np.zeros(candidates)  # P(rank > place + 1), averaged over queries
    for r, weight in zip(kinds, weights / weights.sum(), strict=True):
        above += weight * np.cumprod(np.clip(candidates - r - places, 0, None) / (candidates - places))
    low = int((above > 0.5 + 1e-9).sum()) + 1
    high = int((above > 0.5 - 1e-9).sum()) + 1
    return (low + high) / 2


def chance_precision(relevant: np.ndarray, candidates: int, depth: int) -> np.ndarray:
    """Expected average precision at `depth` in random order.

    The item at place k is right with probability r / n; the precision there is then (1 + (k - 1)(r - 1)/(n - 1)) / k.
    """
    r = np.asarray(relevant, np.float64)
    depth = min(depth, candidates)
    harmonic = (1.0 / np.arange(1, depth + 1)).sum()
    rest = (r - 1) / max(candidates - 1, 1)
    return r / candidates * (harmonic + rest * (depth - harmonic)) / np.minimum(r, depth)


# ---- intervals ---------------------------------------------------------------------------------------------------


def bootstrap_means(values_QM: np.ndarray, groups_Q: np.ndarray, options: Options) -> list[Interval]:
    """95 % percentile intervals of the column means; queries of one group (captions of one picture, which err
    together) are drawn together."""
    group_Q, size_A = _groups(groups_Q)
    sums_AM = np.stack([np.bincount(group_Q, column, len(size_A)) for column in values_QM.T], axis=1)
    drawn = [draws_RA @ sums_AM / (draws_RA @ size_A)[:, None] for draws_RA in draws(len(size_A), options)]
    return [_percentiles(column) for column in np.concatenate(drawn).T] if drawn else [(None, None)] * len(sums_AM.T)


def bootstrap_median(values_Q: np.ndarray, groups_Q: np.ndarray, options: Options) -> Interval:
    """95 % percentile interval of the median."""
    group_Q, size_A = _groups(groups_Q)
    order = np.argsort(values_Q, kind="stable")
    drawn = []
    for draws_RA in draws(len(size_A), options, width=len(values_Q)):
        cumulated = np.cumsum(draws_RA[:, group_Q[order]], axis=1)
        half = cumulated[:, -1:] / 2
        low = values_Q[order[(cumulated < half).sum(1)]]
        high = values_Q[order[(cumulated <= half).sum(1)]]
        drawn.append((low + high) / 2)
    return _percentiles(np.concatenate(drawn)) if drawn else (None, None)


def _groups(groups_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, group_Q, size_A = np.unique(groups_Q, return_inverse=True, return_counts=True)
    return group_Q, size_A


def draws(num_groups: int, options: Options, width: int = 0) -> Iterator[np.ndarray]:
    """How often each resample draws each group, float64 (R, A), some resamples at a time."""
    rng = np.random.default_rng(options.seed)
    at_once = max(1, 4_000_000 // max(num_groups, width))
    for start in range(0, options.resamples, at_once):
        rows = min(at_once, options.resamples - start)
        chosen = rng.integers(num_groups, size=(rows, num_groups)) + np.arange(rows)[:, None] * num_groups
        yield np.bincount(chosen.ravel(), minlength=rows * num_groups).reshape(rows, num_groups).astype(np.float64)


def _percentiles(values: np.ndarray) -> Interval:
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _figure(value: float, chance: float, interval: Interval, *, candidates: int, queries: int) -> Figure:
    return {"value": float(value), "chance": float(chance), "candidates": candidates, "queries": queries,
            "low": interval[0], "high": interval[1]}


# ---- concepts and speakers ---------------------------------------------------------------------------------------


def concept_precision(scores_NK: Tensor, labels_NK: Tensor, *, name: str = "mAP",
                      options: Options = Options()) -> dict[str, Figure]:
    """Mean over concepts of the average precision with which each ranks the samples.

    A concept is a query here and the samples are its candidates; those that no sample has are left out. Equal scores
    count against the model, so without ties this is the usual multi-label mAP.
    """
    labels_NK = labels_NK.bool()
    used = labels_NK.any(0)
    if not bool(used.any()):
        return {}
    scores_NK = scores_NK[:, used].float().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    labels_NK, places_N = labels_NK[:, used], torch.arange(1, len(scores_NK) + 1, device=scores_NK.device)
    precisions = []
    for k in _tiles(scores_NK.shape[1], max(1, options.tile**2 // len(scores_NK))):
        wrong_first = labels_NK[:, k].to(torch.int8).sort(dim=0, stable=True).indices
        order = scores_NK[:, k].gather(0, wrong_first).sort(dim=0, descending=True, stable=True).indices
        right_Nk = labels_NK[:, k].gather(0, wrong_first.gather(0, order)).double()
        precisions.append((right_Nk.cumsum(0) / places_N[:, None] * right_Nk).sum(0) / right_Nk.sum(0))
    values_K = torch.cat(precisions).cpu().numpy()
    n = len(scores_NK)
    chance = chance_precision(labels_NK.sum(0).cpu().numpy(), n, n).mean()
    interval = bootstrap_means(values_K[:, None], np.arange(len(values_K)), options)[0]
    return {name: _figure(values_K.mean(), chance, interval, candidates=n, queries=len(values_K))}


def verification(scores_T: np.ndarray, same_T: np.ndarray, speakers_T2: np.ndarray,
                 options: Options = Options()) -> dict[str, Figure]:
    """Equal error rate and normalised minimum detection costs (p_target 0.05 and 0.01) of speaker verification.

    The equal error rate is read off the ROC line, with equal scores accepted together: a constant score gives 0.5.
    A score that is not finite is an error, whichever the trial. The interval draws speakers, since trials that share
    one err together: a trial counts as often as its speakers were drawn (their product where they differ).

    Args:
        scores_T: similarity of each trial. same_T: whether it is one speaker. speakers_T2: ids of the two speakers.

    Returns:
        `EER`, `minDCF@0.05`, `minDCF@0.01`; empty unless there are trials of both kinds.
    """
    same_T = np.asarray(same_T, bool)
    if same_T.all() or not same_T.any():
        return {}
    scores_T = np.where(np.isfinite(scores_T), scores_T, np.where(same_T, -np.inf, np.inf))
    order = np.argsort(-scores_T, kind="stable")
    scores_T, same_T = scores_T[order], same_T[order]
    ends = np.append(np.flatnonzero(scores_T[1:] != scores_T[:-1]), len(scores_T) - 1)  # last trial of each tie
    values = _detection_errors(np.ones(len(scores_T)), same_T, ends)
    _, ids_T2 = np.unique(np.asarray(speakers_T2)[order], return_inverse=True)
    ids_T2 = ids_T2.reshape(-1, 2)
    drawn = []
    for draws_RA in draws(int(ids_T2.max()) + 1, options, width=len(scores_T)):
        for draws_A in draws_RA:
            first, second = draws_A[ids_T2].T
            drawn.append(_detection_errors(np.where(same_T, first, first * second), same_T, ends))
    intervals = [_percentiles(column) for column in np.array(drawn).T] if drawn else [(None, None)] * len(values)
    names = ["EER"] + [f"minDCF@{p}" for p in P_TARGET]
    chances = [0.5] + [1.0] * len(P_TARGET)
    return {name: _figure(value, chance, interval, candidates=2, queries=len(scores_T))
            for name, value, chance, interval in zip(names, values, chances, intervals, strict=True)}


def _detection_errors(weights_T: np.ndarray, same_T: np.ndarray, ends: np.ndarray) -> list[float]:
    """EER and the minimum costs of weighted trials in order of falling score; nan where one kind has no weight."""
    targets = np.concatenate([[0.0], np.cumsum(weights_T * same_T)[ends]])
    others = np.concatenate([[0.0], np.cumsum(weights_T * ~same_T)[ends]])
    if not targets[-1] or not others[-1]:
        return [np.nan] * (1 + len(P_TARGET))
    miss, accept = 1 - targets / targets[-1], others / others[-1]
    after = int(np.argmax(accept >= miss))  # the first point past the diagonal; never 0, where miss is 1 and accept 0
    gap_before, gap_after = miss[after - 1] - accept[after - 1], miss[after] - accept[after]
    part = gap_before / (gap_before - gap_after)
    rate = accept[after - 1] + part * (accept[after] - accept[after - 1])
    costs = [float((p * miss + (1 - p) * accept).min() / min(p, 1 - p)) for p in P_TARGET]
    return [float(rate), *costs]


def identification(logits_NK: Tensor, classes_N: Tensor, *, prefix: str = "speaker",
                   options: Options = Options()) -> dict[str, Figure]:
    """Top-1 and top-5 accuracy over K classes; equal logits count against the model, non-finite rows are wrong."""
    if not len(logits_NK):
        return {}
    ok_N = torch.isfinite(logits_NK).all(1)
    own_N1 = logits_NK.gather(1, classes_N[:, None])
    rank_N = (logits_NK >= own_N1).sum(1).masked_fill(~ok_N, logits_NK.shape[1] + 5)
    k_M = (1, 5)
    values_NM = np.stack([(rank_N <= k).cpu().numpy() for k in k_M], axis=1).astype(np.float64)
    intervals = bootstrap_means(values_NM, np.arange(len(values_NM)), options)
    size = {"candidates": logits_NK.shape[1], "queries": len(values_NM)}
    return {f"{prefix}_top{k}": _figure(value, min(k / size["candidates"], 1.0), interval, **size)
            for k, value, interval in zip(k_M, values_NM.mean(0), intervals, strict=True)}
