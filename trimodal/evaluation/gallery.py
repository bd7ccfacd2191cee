"""What a report shows of an evaluation beside its figures, from the features that are there: nothing is encoded again.

    rows = examples(encoded, data, "image", queries=8)           # for the grids of PNG
    shown, media = collect(encoded, data, config)                # for the page: similarities, map, retrievals

Everything is drawn by a fixed seed and bounded, whatever the size of the split.

Shape suffixes: Q queries, G gallery (candidates of a query), N items of a first modality, M of a second, F feature
width, T trials.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import Data
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES, Config
from trimodal.evaluation import metrics
from trimodal.evaluation.embedding_map import NEIGHBOURS, lay_out
from trimodal.evaluation.page_media import MOST_BYTES, THUMBNAIL, Media
from trimodal.evaluation.protocols import (
    SAMPLING_SEED,
    Encoded,
    SpeakerTrials,
    first_of_each,
    pair_items,
    speaker_trials,
    take,
)

PAIRS = (("image", "text"), ("audio", "text"), ("image", "audio"))
DIRECTIONS = (("text", "image"), ("text", "audio"), ("image", "audio"))
MOST_QUERIES = 1_000  # among which the best and the worst are looked for
MOST_COMPARED = 1_000  # items of a first modality whose similarities are counted, with all that belongs to them
MAP_POINTS = 400
SHOWN = {"best": 3, "worst": 3, "random": 2}  # retrievals of a direction
ANSWERS = 3  # of each
TRIALS = 2  # of each kind of speaker trial
BINS = 40


@torch.inference_mode()
def collect(encoded: Encoded, data: Data, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page shows of an encoded split, as plain data ("similarities", "map", "retrievals"; see the functions
    below), and its pictures and sounds as data: URIs by key. Without a gallery (report.gallery_queries: 0) there are no
    retrievals, pictures and sounds."""
    table, wanted = data.tables[encoded.split], config.report.gallery_queries > 0
    media = Media(data.splits[encoded.split], MOST_BYTES if wanted else 0)
    tried = {name: made for code, name in enumerate(table.sources.names)
             if (made := speaker_trials(encoded, data, table.sources.codes == code, config))}
    found = retrievals(encoded, data, media) + trials(encoded, data, tried, media) if wanted else []
    shown = {"retrievals": found, "map": embedding_map(encoded, data, media),
             "similarities": similarities(encoded, data, tried)}
    return shown, media.uris


# ---- retrievals --------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """One direction of retrieval: what is looked for, and where. Each file and each wording stands once."""

    direction: tuple[str, str]  # modalities of the queries and of the candidates
    queries_Q: np.ndarray  # indices into the Items of the first
    gallery_G: np.ndarray  # and of the second
    queries_QF: Tensor  # their features
    gallery_GF: Tensor
    right: Callable[[int], Tensor]  # of query q: bool [G], on the CPU


class Result(NamedTuple):
    """What a query finds."""

    rank: int  # of the best right answer, from 1; ties count against the model
    lead: float  # of its score over the best wrong one's
    scores_G: Tensor
    right_G: Tensor


def searching(encoded: Encoded, data: Data, direction: tuple[str, str]) -> Search | None:
    """How `direction` is searched in a split; None where that has not both modalities."""
    first, second = (direction[1], "text") if direction[0] == "text" else direction
    p = pair_items(encoded, (first, second), np.ones(len(data.tables[encoded.split]), bool))
    if not len(p.first_N):
        return None
    relation = metrics.Relation(torch.from_numpy(p.owners_M), torch.from_numpy(p.ids_M), len(p.first_N))
    if direction[0] == "text":
        own = np.unique(p.owners_M, return_index=True)[1]  # one caption a file, and each wording once
        own = own[np.unique(p.ids_M[own], return_index=True)[1]]
        queries_Q, gallery_G = p.second_M[own], p.first_N

        def right(q: int) -> Tensor:
            return relation.tile(slice(0, len(p.first_N)), slice(own[q], own[q] + 1))[:, 0]
    else:
        kept, _ = first_of_each(p.ids_M)
        queries_Q, gallery_G = p.first_N, p.second_M[kept]

        def right(q: int) -> Tensor:
            return relation.tile(slice(q, q + 1), slice(0, len(p.second_M)))[0, torch.from_numpy(kept)]

    queries_QF, gallery_GF = (take(encoded.items[name].features_NF, indices)
                              for name, indices in zip(direction, (queries_Q, gallery_G), strict=True))
    return Search(direction, queries_Q, gallery_G, queries_QF, gallery_GF, right)


def result_of(search: Search, q: int) -> Result:
    """What query q finds, scores that are not finite last."""
    scores_G = (search.gallery_GF @ search.queries_QF[q]).nan_to_num(-2.0, -2.0, -2.0).cpu()
    right_G = search.right(q)
    best = scores_G[right_G].max()
    wrong = scores_G[~right_G]
    rank = 1 + int((wrong >= best - metrics.rounding(scores_G.dtype)).sum())
    return Result(rank, float(best - (wrong.max() if len(wrong) else best)), scores_G, right_G)


def examples(encoded: Encoded, data: Data, modality: str, queries: int, found: int = 5) -> list[dict[str, Any]]:
    """Retrieval results of `queries` captions among all images (`modality` "image") or sounds ("audio") of a split.

    The captions are different, each the first of a file, and chosen at random by a fixed seed.

    Returns:
        For each caption {"query", "source", "modality", "rank" (of the best right answer, from 1, ties counted against
        the model), "candidates", "answers": [{"picture": uint8 (H, W, 3) or log-mel float16 (T, 80), "caption",
        "score", "right"}]}, with the `found` best answers, best first.
    """
    search = searching(encoded, data, ("text", modality))
    if search is None:
        return []
    table, rows_N = data.tables[encoded.split], encoded.items[modality].rows_N
    out = []
    for q in sorted(draw(len(search.queries_Q), queries), key=lambda q: search.queries_Q[q]):
        result = result_of(search, q)
        best = result.scores_G.sort(descending=True, stable=True).indices[:found].tolist()
        rows = [int(rows_N[search.gallery_G[g]]) for g in best]
        out.append({"query": words(encoded, data, "text", int(search.queries_Q[q])),
                    "source": table.sources[encoded.items["text"].rows_N[search.queries_Q[q]]],
                    "modality": modality, "rank": result.rank, "candidates": len(search.gallery_G),
                    "answers": [{"picture": _picture(data, encoded.split, modality, row),
                                 "caption": (table.captions_of(row) or ("",))[0],
                                 "score": float(result.scores_G[g]), "right": bool(result.right_G[g])}
                                for row, g in zip(rows, best, strict=True)]})
    return out


def draw(count: int, most: int) -> list[int]:
    return np.random.default_rng(SAMPLING_SEED).permutation(count)[:most].tolist()


def _picture(data: Data, split: str, modality: str, row: int) -> np.ndarray:
    store = data.splits[split].store
    return store.image(row) if modality == "image" else store.mel(row)[:AUDIO_WINDOW_FRAMES]


def retrievals(encoded: Encoded, data: Data, media: Media) -> list[dict[str, Any]]:
    """The best, the worst and some random queries of each direction, and what they find.

    The best are right at once with the greatest lead over a wrong answer, the worst have their right answer at the
    latest rank, of at most MOST_QUERIES queries.

    Returns:
        [{"direction": "text_to_image", "kind": "best", "worst" or "random", "source", "rank", "candidates", "query":
        item, "answers": [{item, "score", "right", "rank"}]}]: the first answers, and where none of them is right, the
        first right one. An item is {"words", "picture", "sound"}, the last two keys of media, or None.
    """
    found = []
    for search in filter(None, (searching(encoded, data, direction) for direction in DIRECTIONS)):
        if len(search.gallery_G) < 2:
            continue
        drawn = draw(len(search.queries_Q), MOST_QUERIES)
        results = {q: result_of(search, q)[:2] for q in drawn}
        best = sorted((q for q in drawn if results[q][0] == 1), key=lambda q: -results[q][1])[:SHOWN["best"]]
        worst = sorted((q for q in drawn if results[q][0] > 1), key=lambda q: (-results[q][0], results[q][1]))
        worst = worst[:SHOWN["worst"]]
        others = [q for q in drawn if q not in (*best, *worst)][:SHOWN["random"]]
        found += [_retrieval(encoded, data, search, q, kind, media)
                  for kind, chosen in (("best", best), ("worst", worst), ("random", others)) for q in chosen]
    return found


def _retrieval(encoded: Encoded, data: Data, search: Search, q: int, kind: str, media: Media) -> dict[str, Any]:
    result = result_of(search, q)
    order = result.scores_G.sort(descending=True, stable=True).indices
    shown = order[:ANSWERS].tolist()
    if not result.right_G[shown].any():
        shown.append(int(order[result.right_G[order]][0]))
    places = {g: n for n, g in enumerate(order.tolist(), start=1)}
    asked, given = search.direction
    answers = [{**item(encoded, data, given, int(search.gallery_G[g]), media), "score": float(result.scores_G[g]),
                "right": bool(result.right_G[g]), "rank": places[g]} for g in shown]
    row = encoded.items[asked].rows_N[search.queries_Q[q]]
    return {"direction": f"{asked}_to_{given}", "kind": kind, "source": data.tables[encoded.split].sources[row],
            "rank": result.rank, "candidates": len(search.gallery_G),
            "query": item(encoded, data, asked, int(search.queries_Q[q]), media), "answers": answers}


def item(encoded: Encoded, data: Data, modality: str, index: int, media: Media) -> dict[str, Any]:
    """A picture, caption or sound as the page shows it."""
    row = int(encoded.items[modality].rows_N[index])
    picture = media.picture(row) if modality == "image" else media.spectrogram(row) if modality == "audio" else None
    return {"words": words(encoded, data, modality, index), "picture": picture,
            "sound": media.sound(row) if modality == "audio" else None}


def words(encoded: Encoded, data: Data, modality: str, index: int) -> str:
    """The caption itself, or the first one of a picture or sound, or who speaks."""
    table = data.tables[encoded.split]
    if modality == "text":
        return table.captions[encoded.captions_C[index]]
    row = int(encoded.items[modality].rows_N[index])
    return (table.captions_of(row) or (table.speakers[row],))[0]


def trials(encoded: Encoded, data: Data, tried: Mapping[str, SpeakerTrials], media: Media) -> list[dict[str, Any]]:
    """Speaker trials, by set, as `retrievals` has them: the clearest, and those in which the model errs most: one
    speaker whose sounds differ, two speakers whose sounds are alike."""
    found: list[dict[str, Any]] = []
    for source, made in tried.items():
        pairs_T2, scores_T, same_T = made.items_T2, made.scores_T, made.same_T
        order_T = np.argsort(np.where(np.isfinite(scores_T), scores_T, -2.0), kind="stable")
        alike, unlike = order_T[same_T[order_T]], order_T[~same_T[order_T]]
        for kind, chosen in (("best", [*alike[::-1][:TRIALS], *unlike[:TRIALS]]),
                             ("worst", [*alike[:TRIALS], *unlike[::-1][:TRIALS]])):
            for t in chosen:
                one, other = (item(encoded, data, "audio", int(index), media) for index in pairs_T2[t])
                found.append({"direction": "speakers", "kind": kind, "source": source, "rank": None, "candidates": None,
                              "query": one, "answers": [{**other, "score": float(scores_T[t]),
                                                         "right": bool(same_T[t]), "rank": None}]})
    return found


# ---- similarities ------------------------------------------------------------------------------------------------


def similarities(encoded: Encoded, data: Data, tried: Mapping[str, SpeakerTrials]) -> dict[str, dict[str, Any]]:
    """Histograms of the cosines of what belongs together, and of what does not, by pair of modalities, and of the
    speaker trials of each set.

    Of at most MOST_COMPARED files of the first modality, with all that belongs to them.

    Returns:
        {pair: {"low", "high", "right": [counts in BINS bins of equal width], "wrong": [counts], "separation": how
        likely a right pair is more alike than a wrong one, equal ones counted half}}.
    """
    found = {}
    for pair in PAIRS:
        scores, right = _compared(encoded, data, pair)
        if right.any() and not right.all():
            found["-".join(pair)] = _histograms(scores, right)
    for source, made in tried.items():
        if made.same_T.any() and not made.same_T.all():
            found[f"speakers ({source})"] = _histograms(made.scores_T, made.same_T)
    return found


def _compared(encoded: Encoded, data: Data, pair: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of a part of a pair's items, and which of them are right; each wording once, one beside another."""
    p = pair_items(encoded, pair, np.ones(len(data.tables[encoded.split]), bool))
    if len(p.first_N) < 2:
        return np.empty(0), np.empty(0, bool)
    chosen = np.sort(draw(len(p.first_N), MOST_COMPARED))
    own = np.flatnonzero(np.isin(p.owners_M, chosen))
    own = own[first_of_each(p.ids_M[own])[0]]
    relation = metrics.Relation(torch.from_numpy(p.owners_M), torch.from_numpy(p.ids_M), len(p.first_N))
    right = torch.cat([relation.tile(slice(n, n + 1), slice(0, len(p.owners_M)))[:, torch.from_numpy(own)]
                       for n in chosen.tolist()])
    first, second = (take(encoded.items[name].features_NF, indices)
                     for name, indices in zip(pair, (p.first_N[chosen], p.second_M[own]), strict=True))
    return (first @ second.T).cpu().numpy().ravel(), right.numpy().ravel()


def _histograms(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(scores)
    scores, right = scores[finite].astype(np.float64), right[finite]
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    high = high if high > low else low + 1e-6
    counts = [np.histogram(part, BINS, (low, high))[0].tolist() for part in (scores[right], scores[~right])]
    return {"low": low, "high": high, "right": counts[0], "wrong": counts[1],
            "separation": _separation(scores[right], scores[~right])}


def _separation(right: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the ROC line: the share of (right, wrong) with the right one more alike, equal ones counted half."""
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")
    return float(below.mean() / 2 / len(wrong)) if len(right) and len(wrong) else 0.5


# ---- the map -----------------------------------------------------------------------------------------------------


def embedding_map(encoded: Encoded, data: Data, media: Media) -> dict[str, Any] | None:
    """The map of at most MAP_POINTS embeddings, whole samples drawn by a fixed seed; None with fewer than three.

    The mean of each modality is taken off first: modalities lie apart, which would be all that one sees.

    Returns:
        {"points": [{"x", "y" between 0 and 1, "modality", "set", "class": first label, else the speaker, or None,
        "words", "sample", "picture": key of media or None}], "of": embeddings that there are, "neighbours": N, "kept":
        share of a point's N nearest neighbours that are its nearest on the map, "kept_pca": on that of the
        principal components alone}
    """
    chosen = map_items(encoded)
    if len(chosen) < 3:
        return None
    parts = []
    for name in MODALITIES:
        if own := [index for modality, index in chosen if modality == name]:
            features_NF = take(encoded.items[name].features_NF, np.array(own)).cpu().double().numpy()
            features_NF = np.nan_to_num(features_NF, nan=0.0, posinf=0.0, neginf=0.0)
            parts.append(features_NF - features_NF.mean(0))
    layout = lay_out(np.concatenate(parts))
    points = [{"x": round(float(x), 4), "y": round(float(y), 4), **_about(encoded, data, name, index, media)}
              for (x, y), (name, index) in zip(layout.places_N2, chosen, strict=True)]
    return {"points": points, "of": sum(len(items.rows_N) for items in encoded.items.values()),
            "neighbours": min(NEIGHBOURS, len(chosen) - 1), "kept": layout.kept, "kept_pca": layout.kept_pca}


def map_items(encoded: Encoded) -> list[tuple[str, int]]:
    """Modality and index of the items of randomly drawn samples, one of each modality that the sample has; images
    first, then texts, then sounds."""
    firsts = {name: dict(zip(*np.unique(items.rows_N, return_index=True), strict=True))
              for name, items in encoded.items.items()}
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *(items.rows_N for items in encoded.items.values())]))
    chosen: list[tuple[str, int]] = []
    for row in rows[draw(len(rows), MAP_POINTS)].tolist():
        own = [(name, int(firsts[name][row])) for name in encoded.items if row in firsts[name]]
        if len(chosen) + len(own) > MAP_POINTS:
            break
        chosen += own
    return sorted(chosen, key=lambda one: MODALITIES.index(one[0]))


def _about(encoded: Encoded, data: Data, modality: str, index: int, media: Media) -> dict[str, Any]:
    table, row = data.tables[encoded.split], int(encoded.items[modality].rows_N[index])
    sample = table[row]
    return {"modality": modality, "set": sample.source, "class": next(iter(sample.labels), sample.speaker) or None,
            "words": words(encoded, data, modality, index)[:200], "sample": row,
            "picture": media.picture(row, THUMBNAIL) if modality == "image" else None}
