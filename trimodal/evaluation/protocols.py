"""Evaluation protocols: encode a split once per modality, then every figure that its data allow.

    encoded = encode_split(model, data, "test", config, Setting(device=device, amp=torch.bfloat16))
    figures = score(encoded, data, config)
    figures["coco"]["image-text"]["image_to_text_R@1"]["value"]

`score` gives {set: {pair: {metric: figure}}} (a figure: see metrics). Pairs: "image-text", "audio-text",
"image-audio", "image-concepts" and "audio-concepts" (what the classifier says of a picture or a sound alone, through
the fusion), "speakers" (verification). The set "all" holds the samples of all sets together; with several sets its
candidates come from all of them. "coco_1k" are
the means of the five folds of 1,000 pictures of COCO's 5,000. "stamps" stands a second time as
"stamps_without_symbols": letters and digits are told apart by their shapes alone. Where a set has captions in several
languages, all are right answers of their file, and "stamps_en", "stamps_zh" are retrieval with those of one language
alone, each of the same files: those that have captions in all of them.

Retrieval is over all captions of each sample, and counts each file once, however many samples have it. R@K and the
other figures of captions stand twice: `R@K` counts equal captions of a file once, and every file that has the words is
right; `R@K_per_caption` counts as papers do: each caption of each file is a query, equal ones too, and its own file
alone is right (an equal caption that the list repeats has the features of the first). Equal scores count against the
model in both. Speakers are verified (cosines of audio_features) on the trials of `trials`.

Shape suffixes: N encoded items of one modality, F feature width, K classes, C captions, T trials.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets import Data, Loader
from trimodal.config import MODALITIES, Config
from trimodal.data.batches import Batch, Split
from trimodal.data.near import near_files
from trimodal.data.splits import has_known_file
from trimodal.evaluation import metrics, trials
from trimodal.evaluation.metrics import Figure
from trimodal.evaluation.micro_batches import Setting, encode, inputs_of, windows_of
from trimodal.evaluation.rerank import Heads, PairScores
from trimodal.sets import SETS

ALL = "all"
SAMPLING_SEED = 0  # of the parts of a split that are used; never the training seed, so that runs compare
PER_CAPTION = "_per_caption"  # ends the names of retrieval figures as papers count them

Figures = dict[str, dict[str, dict[str, Figure]]]
Known = dict[str, dict[int, Tensor]]  # features by modality and row of the table: (1, F), of text (captions, F)


@dataclass(frozen=True)
class Items:
    """The features of N items of one modality, and the samples that they belong to."""

    features_NF: Tensor
    rows_N: np.ndarray  # row of each item's sample in the split's table, ascending
    ids_N: np.ndarray  # int64, equal for the same file (and stretch of a sound), or for captions of equal text


@dataclass(frozen=True)
class Answers:
    """Logits of the concept classifier, given one modality alone, for N items whose concepts are known; on the CPU."""

    logits_NK: Tensor
    concepts_NK: Tensor  # bool, the right answers
    rows_N: np.ndarray  # as in Items


@dataclass(frozen=True)
class Encoded:
    """The features of a split, and facts on how many of its samples were encoded."""

    split: str
    items: dict[str, Items]  # by modality; of text, one item a caption
    answers: dict[str, Answers]  # by modality
    captions_C: np.ndarray  # row of each caption in the table's captions
    facts: dict[str, dict[str, Any]]  # by set, as plain JSON; `score` adds the speaker trials used


# ---- encoding ----------------------------------------------------------------------------------------------------


def encode_split(model: Any, data: Data, split: str, config: Config, setting: Setting,
                 known: Known | None = None) -> Encoded:
    """Encode each picture, caption and sound of `split` once, in eval mode, `evaluation.batch_size` at a time, save
    those whose features are `known`.

    Features stay on the device. Out of memory halves the parts from there on, which changes nothing else. Samples
    whose file is broken are left out and counted.

    Raises:
        UserError: too many broken files, or out of memory with one sample at a time.
    """
    table = data.tables[split]
    rows_by_kind = chosen_rows(data, split, setting.limit)
    size = config.evaluation.batch_size
    gathered = _Gathered(model, setting, size)
    gathered.take(known or {}, _all_rows(rows_by_kind), table.caption_offsets)
    unknown = _unknown(rows_by_kind, known or {})
    jobs = [(task, part) for task, rows in enumerate(unknown.values())
            for part in np.array_split(rows, -(-len(rows) // size))]
    inputs, missing = [kind for kind, _ in unknown], [names for _, names in unknown]
    was_training = model.training
    model.eval()
    try:
        batches = Loader(data, split, jobs, config, inputs=inputs, train=False, epoch=0) if jobs else iter(())
        with torch.inference_mode():
            for batch in tqdm(batches, total=len(jobs), desc=f"evaluating {split}", unit="batch", disable=None):
                gathered.add(batch, missing[batch.task], table.caption_offsets)
    finally:
        model.train(was_training)
    return gathered.result(data.splits[split], split, _facts(data, split, config, setting.limit, gathered))


def encode_known(known: Known, data: Data, split: str, config: Config, setting: Setting,
                 modalities: Sequence[str]) -> Encoded:
    """What `encode_split` gives of a model that reads `modalities` alone, whose features are known. Samples without
    any are those whose file is broken."""
    rows = _all_rows(chosen_rows(data, split, setting.limit, modalities))
    gathered = _Gathered(None, setting, config.evaluation.batch_size)
    gathered.take(known, rows, data.tables[split].caption_offsets)
    return gathered.result(data.splits[split], split, _facts(data, split, config, setting.limit, gathered, modalities))


def _all_rows(rows_by_kind: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *rows_by_kind.values()])


def chosen_rows(data: Data, split: str, limit: int | None,
                modalities: Sequence[str] = MODALITIES) -> dict[tuple[str, ...], np.ndarray]:
    """Rows to encode by which of `modalities` their samples have, ascending.

    Samples with one modality alone only count where they have labels or a speaker. With a limit, a fixed random part
    of each set and kind.
    """
    table = data.tables[split]
    has = np.stack([table.has_image, table.has_text, table.has_audio], axis=1)
    has &= np.array([name in modalities for name in MODALITIES])
    labelled = (np.diff(table.label_offsets) > 0) | (np.array([bool(name) for name in table.speakers.names], bool)[
        table.speakers.codes] & table.has_audio)
    useful = (has.sum(1) > 1) | (labelled & (has[:, 0] | has[:, 2]))
    chosen: dict[tuple[str, ...], np.ndarray] = {}
    for kind in np.unique(has[useful], axis=0):
        parts = []
        for code in range(len(table.sources.names)):
            rows = np.flatnonzero(useful & (has == kind).all(1) & (table.sources.codes == code))
            if limit is not None and len(rows) > limit:
                rows = np.sort(np.random.default_rng(SAMPLING_SEED).choice(rows, limit, replace=False))
            parts.append(rows)
        chosen[tuple(name for name, there in zip(MODALITIES, kind, strict=True) if there)] = np.sort(
            np.concatenate(parts))
    return chosen


def _unknown(rows_by_kind: Mapping[tuple[str, ...], np.ndarray],
             known: Known) -> dict[tuple[tuple[str, ...], tuple[str, ...]], np.ndarray]:
    """Rows to be read, by (their modalities, those of them whose features are not known)."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for kind, rows in rows_by_kind.items():
        for row in rows.tolist():
            if missing := tuple(name for name in kind if row not in known.get(name, ())):
                found.setdefault((kind, missing), []).append(row)
    return {key: np.array(rows, np.int64) for key, rows in found.items()}


def can_score(data: Data, split: str) -> bool:
    """Whether the samples of a split give any metric: each metric needs at least two different images or sounds."""
    kinds, own = chosen_rows(data, split, None), data.splits[split]
    return any(len(np.unique(np.concatenate([[], *(ids[rows] for kind, rows in kinds.items() if name in kind)]))) > 1
               for name, ids in (("image", own.image_ids), ("audio", own.audio_ids)))


def _facts(data: Data, split: str, config: Config, limit: int | None, gathered: "_Gathered",
           modalities: Sequence[str] = MODALITIES) -> dict[str, dict[str, Any]]:
    """Count for each data set the samples used, all samples, the broken ones, and the features that are not finite."""
    nothing: dict[str, Any] = {"samples": 0, "of": 0, "broken": 0, "subset_seed": None, "nonfinite": {}}
    table, facts = data.tables[split], {name: dict(nothing) for name in config.data.datasets}
    part, whole = (_all_rows(chosen_rows(data, split, most, modalities)) for most in (limit, None))
    for code, source in enumerate(table.sources.names):
        there = table.sources.codes == code
        used = int(there[part].sum())
        seen = int(there[np.array(sorted(gathered.seen), np.int64)].sum())
        facts[source] = {"samples": used, "of": int(there.sum()), "broken": used - seen,
                         "subset_seed": SAMPLING_SEED if used < there[whole].sum() else None,
                         "nonfinite": gathered.nonfinite(there)}
    return facts


class _Gathered:
    """Encodes batches and keeps what they give."""

    def __init__(self, model: Any, setting: Setting, size: int):
        self.model, self.setting = model, setting
        self.micro_batches = setting.micro_batches(size)
        self.seen: set[int] = set()
        self.features: dict[str, list[Tensor]] = {name: [] for name in MODALITIES}
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in MODALITIES}
        self.answers: dict[str, list[Answers]] = {name: [] for name in MODALITIES}
        self.captions: list[np.ndarray] = []

    def take(self, known: Known, rows: np.ndarray, caption_offsets: np.ndarray) -> None:
        """Keep the features of `rows` that are known already."""
        for name, features in known.items():
            own = [row for row in rows.tolist() if row in features]
            if not own:
                continue
            self.seen.update(own)
            self.features[name] += [features[row].float() for row in own]
            self.rows[name].append(np.repeat(own, [len(features[row]) for row in own]))
            if name == "text":
                self.captions.append(np.concatenate([np.arange(*caption_offsets[row:row + 2]) for row in own]))

    def add(self, batch: Batch, names: Sequence[str], caption_offsets: np.ndarray) -> None:
        """Encode these modalities of a batch."""
        rows = batch.sample_ids.numpy()
        self.seen.update(rows.tolist())
        classify = self.setting.concepts and batch.concepts is not None and bool(batch.concepts.any())
        for name in (name for name in MODALITIES if name in names and inputs_of(batch, name)):
            found = self._in_micro_batches(name, batch, classify and name != "text")
            owners = batch.caption_owner.numpy() if name == "text" else slice(None)  # type: ignore[union-attr]
            self._keep(name, rows[owners], batch, found)
        if "text" in names:
            self.captions.append(np.concatenate([np.arange(*caption_offsets[row:row + 2]) for row in rows]))

    def _in_micro_batches(self, name: str, batch: Batch, classify: bool) -> list[dict[str, Tensor]]:
        inputs = inputs_of(batch, name)
        return self.micro_batches.of((name,), len(inputs[0]), weight=windows_of(self.model, batch, name),
                                     work=lambda rows: self._encode(name, batch, [x[rows] for x in inputs], classify))

    def _encode(self, name: str, batch: Batch, inputs: list[Tensor], classify: bool) -> dict[str, Tensor]:
        """Features of one micro-batch, and with `classify` what the fusion says of this modality alone."""
        are_kept = name in batch.tokens
        if name == "audio" and not are_kept and name not in self.model.towers:
            frames = -(-int(inputs[1].max()) // 16) * 16  # no more padding than this micro-batch needs
            inputs = [inputs[0][:, :frames], inputs[1]]
        inputs = [x.to(self.setting.device) for x in inputs]
        if not (classify or are_kept):
            return {f"{name}_features": getattr(self.model, f"{name}_features")(*inputs)}
        encoded = encode(self.model, batch, name, inputs)
        found = {f"{name}_features": self.model.features(name, encoded)}
        return {**found, "logits": self.model.fuse({name: encoded})[2]} if classify else found

    def _keep(self, name: str, rows: np.ndarray, batch: Batch, found: list[dict[str, Tensor]]) -> None:
        self.rows[name].append(rows)
        self.features[name] += [part[f"{name}_features"].float() for part in found]
        if "logits" in found[0]:
            assert batch.concepts is not None
            known = batch.concepts.any(1)  # of a sample without any nobody knows which ones it lacks
            logits = torch.cat([part["logits"].float().cpu() for part in found])
            self.answers[name].append(Answers(logits[known], batch.concepts[known], rows[known.numpy()]))

    def nonfinite(self, members: np.ndarray) -> dict[str, int]:
        """Items of `members` (bool, by row) whose features are not finite, by modality, where there are any."""
        counts = {}
        for name in (name for name in MODALITIES if self.rows[name]):
            own = torch.from_numpy(members[np.concatenate(self.rows[name])])
            features = torch.cat(self.features[name])
            counts[name] = metrics.count_nonfinite(features[own.to(features.device)])
        return {name: count for name, count in counts.items() if count}

    def result(self, own: Split, name: str, facts: dict[str, dict[str, Any]]) -> Encoded:
        """Everything in order of rows, so that sets and pairs can be picked out by searching."""
        items, captions = {}, np.empty(0, np.int64)
        for modality in (modality for modality in MODALITIES if self.rows[modality]):
            rows = np.concatenate(self.rows[modality])
            order = np.argsort(rows, kind="stable")
            if modality == "text":
                captions = np.concatenate(self.captions)[order]
                ids = own.caption_ids[captions]
            else:
                ids = (own.image_ids if modality == "image" else own.audio_ids)[rows[order]]
            items[modality] = Items(take(torch.cat(self.features[modality]), order), rows[order], ids)
        answers = {modality: Answers(torch.cat([p.logits_NK for p in parts]), torch.cat([p.concepts_NK for p in parts]),
                                     np.concatenate([p.rows_N for p in parts]))
                   for modality, parts in self.answers.items() if parts}
        return Encoded(name, items, answers, captions, facts)


# ---- scoring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score(encoded: Encoded, data: Data, config: Config, scores: PairScores | None = None) -> Figures:
    """All figures of an encoded split: {set: {pair: {metric: figure}}}; pairs without two samples are left out. With
    `scores`, those of retrieval with captions also after the first candidates have been ordered by these."""
    options = metrics.Options(tile=config.evaluation.tile, resamples=config.evaluation.resamples)
    figures: Figures = {}
    for name, members in _sets(data, encoded.split):
        pairs = {"image-text": _retrieval(encoded, data, ("image", "text"), members, options, scores)}
        if name == ALL or name in SETS:
            pairs["audio-text"] = _retrieval(encoded, data, ("audio", "text"), members, options, scores)
            pairs["image-audio"] = _retrieval(encoded, data, ("image", "audio"), members, options)
            for modality in ("image", "audio"):
                pairs[f"{modality}-concepts"] = _concepts(encoded, modality, members, options)
            if name != ALL:
                pairs["speakers"] = _speakers(encoded, data, members, config, options)
        figures[name] = {pair: found for pair, found in pairs.items() if found}
        figures |= _in_folds(encoded, data, name, members, options)
        figures |= _by_language(encoded, data, name, members, options, scores)
    if len(data.tables[encoded.split].sources.names) == 1:
        figures[ALL] = figures[data.tables[encoded.split].sources.names[0]]
    return {name: pairs for name, pairs in figures.items() if pairs}


def _in_folds(encoded: Encoded, data: Data, name: str, members: np.ndarray, options: metrics.Options) -> Figures:
    """Retrieval of pictures and captions in the folds of a set, in the order of its list: {"coco_1k": means over them};
    {} where the set has none, or the split another number of samples."""
    folds, table = SETS[name].folds if name in SETS else None, data.tables[encoded.split]
    rows = np.flatnonzero(members & table.has_image & table.has_text)
    if folds is None or len(rows) != folds[0] * folds[1]:
        return {}
    quick, parts = dataclasses.replace(options, resamples=0), []
    for fold in rows.reshape(folds):
        within = np.zeros_like(members)
        within[fold] = True
        parts.append(_retrieval(encoded, data, ("image", "text"), within, quick))
    if not all(parts):
        return {}
    label = f"{name}_{folds[1] // 1000}k" if folds[1] % 1000 == 0 else f"{name}_{folds[1]}"
    means = {metric: {**figure, "queries": sum(part[metric]["queries"] for part in parts),
                      **{key: float(np.mean([part[metric][key] for part in parts])) for key in ("value", "chance")},
                      "candidates": round(float(np.mean([part[metric]["candidates"] for part in parts])))}
             for metric, figure in parts[0].items()}
    return {label: {"image-text": means}}


def _by_language(encoded: Encoded, data: Data, name: str, members: np.ndarray, options: metrics.Options,
                 scores: PairScores | None) -> Figures:
    """Retrieval with the captions of one language alone, for each in which a set has some, of the samples that have all
    of them: {"stamps_zh": ...}; {} where they are all in one, or it is not known in which."""
    table = data.tables[encoded.split]
    languages = table.caption_languages
    owners_C = np.repeat(np.arange(len(table)), table.caption_count)
    captions = {language: (languages.codes == code) & members[owners_C]
                for code, language in enumerate(languages.names) if language}
    captions = {language: own_C for language, own_C in captions.items() if own_C.any()}
    if name == ALL or len(captions) < 2:
        return {}
    has_all = np.all([np.bincount(owners_C[own_C], minlength=len(table)) > 0 for own_C in captions.values()], axis=0)
    return {f"{name}_{language}": {
        f"{first}-text": found for first in ("image", "audio")
        if (found := _retrieval(encoded, data, (first, "text"), has_all, options, scores, captions=own_C))}
        for language, own_C in captions.items()}


def evaluate_split(model: Any, data: Data, split: str, config: Config, setting: Setting,
                   heads: Heads | None = None) -> tuple[Figures, Encoded]:
    """`encode_split`, then `score`; with `heads`, of a checkpoint, re-ranked where `evaluation.rerank` asks for it."""
    encoded = encode_split(model, data, split, config, setting)
    scores = PairScores(model, heads, data, split, config, setting) if heads and config.evaluation.rerank else None
    return score(encoded, data, config, scores), encoded


def mark_trained_on(encoded: Encoded, data: Data, config: Config, known: np.ndarray) -> None:
    """Add to the facts of each set how many of its encoded samples have a file that is among `known`."""
    table = data.tables[encoded.split]
    is_known = has_known_file(table, config.paths.data_root, known)
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *(items.rows_N for items in encoded.items.values())]))
    for source, facts in encoded.facts.items():
        facts["trained_on"] = sum(bool(is_known[row]) for row in rows.tolist() if table.sources[row] == source)


def mark_near(encoded: Encoded, data: Data, config: Config) -> None:
    """Add to the facts of each set how many of its pictures and sounds are near-equal to one of the training split."""
    table = data.tables[encoded.split]
    for modality, pairs in near_files(data.splits[encoded.split], data.splits["train"], config).items():
        for source in {table.sources[row] for row in pairs[:, 0].tolist()}:
            count = sum(table.sources[row] == source for row in pairs[:, 0].tolist())
            encoded.facts[source].setdefault("near", {})[modality] = count


def _sets(data: Data, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names of sets, and True at the rows of each; `ALL` first where there are several."""
    table = data.tables[split]
    names = table.sources.names
    if len(names) > 1:
        yield ALL, np.ones(len(table), bool)
    for code, name in enumerate(names):
        members = table.sources.codes == code
        yield name, members
        for further, left_out in SETS[name].without_label.items():
            symbols = np.array([label == left_out for label in table.labels.names], bool)[table.labels.codes]
            owners = np.repeat(np.arange(len(table)), np.diff(table.label_offsets))
            plain = members.copy()
            plain[owners[symbols]] = False
            if plain.sum() < members.sum():
                yield further, plain


@dataclass(frozen=True)
class _Pairs:
    """Which items of a second modality belong to which of a first: N and M items, as int64 indices into their `Items`.

    Only items of samples that have both modalities. Of the first modality each file stands once, however many samples
    share it; of the second every item of those samples stands.
    """

    first_N: np.ndarray  # indices of the first modality's items
    second_M: np.ndarray  # indices of the second modality's items
    owners_M: np.ndarray  # for each of the second, the position in first_N of the item that belongs to it
    ids_M: np.ndarray  # `Items.ids_N` of the second: equal for equal captions or files


def pair_items(encoded: Encoded, pair: tuple[str, str], members: np.ndarray,
                captions: np.ndarray | None = None) -> _Pairs:
    """Match the encoded items of the two modalities in `pair` by their samples, merging equal files of the first.

    `members`: True at the table rows of the samples to use; `captions`: likewise of its captions (None: all). Empty
    where a modality of the pair was not encoded.
    """
    if not set(pair) <= encoded.items.keys():
        return _Pairs(*np.empty((4, 0), np.int64))
    first, second = (encoded.items[name] for name in pair)
    first_N = np.flatnonzero(members[first.rows_N] & np.isin(first.rows_N, second.rows_N))
    second_M = np.flatnonzero(members[second.rows_N] & np.isin(second.rows_N, first.rows_N))
    if captions is not None:
        second_M = second_M[captions[encoded.captions_C[second_M]]]
    owners_M = np.searchsorted(first.rows_N[first_N], second.rows_N[second_M])
    kept, file_N = first_of_each(first.ids_N[first_N])
    return _Pairs(first_N[kept], second_M, file_N[owners_M], second.ids_N[second_M])


def first_of_each(ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices, ascending, of the first occurrence of each id, and for each of the N ids which of these it equals."""
    _, first, group_N = np.unique(ids_N, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[group_N]


def _retrieval(encoded: Encoded, data: Data, pair: tuple[str, str], members: np.ndarray, options: metrics.Options,
               scores: PairScores | None = None, captions: np.ndarray | None = None) -> dict[str, Figure]:
    """Both directions, each file and each of its wordings once; with captions also as papers count, caption by caption.

    A file that stands in several samples is one, for which all their captions are right. `captions`: as `pair_items`
    takes them.
    """
    p = pair_items(encoded, pair, members, captions)
    if len(p.first_N) < 2:
        return {}
    first, second = (take(encoded.items[name].features_NF, indices)
                     for name, indices in zip(pair, (p.first_N, p.second_M), strict=True))
    texts = pair[1] == "text"

    def rerank(columns: np.ndarray) -> metrics.Rerank | None:
        if scores is None or not texts:
            return None
        return scores.rerank(pair[0], encoded.items[pair[0]].rows_N[p.first_N],
                             encoded.captions_C[p.second_M[columns]])

    _, ids = np.unique(p.ids_M, return_inverse=True)
    counted, _ = first_of_each(p.owners_M * (ids.max() + 1) + ids if texts else ids)
    order = np.concatenate([counted, np.setdiff1d(np.arange(len(ids)), counted)])
    figures = metrics.retrieval(first, take(second, counted), torch.from_numpy(p.owners_M[order]),
                                torch.from_numpy(ids[order]), names=pair, options=options, rerank=rerank(counted))
    if texts:
        times = data.tables[encoded.split].caption_times[encoded.captions_C[p.second_M]]
        each = np.repeat(np.arange(len(p.second_M)), times)  # equal captions of one clip are so many queries there
        of_papers = metrics.retrieval(first, take(second, each), torch.from_numpy(p.owners_M[each]), names=pair,
                                      options=options, rerank=rerank(each))
        figures = {name + suffix: found[name] for name in figures
                   for suffix, found in (("", figures), (PER_CAPTION, of_papers))}
    return figures


def take(features: Tensor, rows: np.ndarray) -> Tensor:
    """Rows of a tensor, on its device."""
    return features[torch.from_numpy(rows).to(features.device)]


def _concepts(encoded: Encoded, modality: str, members: np.ndarray, options: metrics.Options) -> dict[str, Figure]:
    """Mean average precision of the concept classifier on one modality alone, each file once. A file's concepts are
    those of all samples that share it."""
    answers = encoded.answers.get(modality)
    if answers is None:
        return {}
    own = np.flatnonzero(members[answers.rows_N])
    items = encoded.items[modality]
    first, file_N = first_of_each(items.ids_N[np.searchsorted(items.rows_N, answers.rows_N[own])])
    if len(first) < 2:
        return {}
    labels_NK = answers.concepts_NK[torch.from_numpy(own)]
    of_files = torch.zeros(len(first), labels_NK.shape[1], dtype=torch.int32)
    of_files.index_add_(0, torch.from_numpy(file_N), labels_NK.int())
    return metrics.concept_precision(answers.logits_NK[torch.from_numpy(own[first])], of_files > 0,
                                     name=f"{modality}_to_concepts_mAP", options=options)


# ---- speakers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeakerTrials:
    """Pairs of sounds that are compared: indices of their `Items`, names and cosines."""

    items_T2: np.ndarray
    speakers_T2: np.ndarray
    same_T: np.ndarray
    scores_T: np.ndarray
    about: str  # which trials these are


def _speakers(encoded: Encoded, data: Data, members: np.ndarray, config: Config,
              options: metrics.Options) -> dict[str, Figure]:
    """Verification of the speakers of one set; adds to the set's facts which trials it was."""
    found = speaker_trials(encoded, data, members, config)
    if found is None:
        return {}
    encoded.facts[data.tables[encoded.split].sources[int(np.flatnonzero(members)[0])]]["trials"] = found.about
    return metrics.verification(found.scores_T, found.same_T, found.speakers_T2, options)


def speaker_trials(encoded: Encoded, data: Data, members: np.ndarray, config: Config) -> SpeakerTrials | None:
    """The official trials of a set where they are there, else pairs of our own; None without two speakers."""
    table, items = data.tables[encoded.split], encoded.items.get("audio")
    if items is None:
        return None
    places = np.array([n for n, row in enumerate(items.rows_N) if members[row] and table.speakers[row]], np.int64)
    names = np.array([table.speakers[row] for row in items.rows_N[places]])
    if len(np.unique(names)) < 2:
        return None
    source = table.sources[items.rows_N[places[0]]]
    ids = items.ids_N[places]
    published = SETS[source].trials
    if published and encoded.split == "test":
        keys = [table.keys[row] for row in items.rows_N[places]]
        pairs_T2, about = trials.listed_trials(keys, names, ids, Path(config.paths.data_root) / source, published)
    else:
        pairs_T2, about = trials.own_trials(names, ids, "no trial list")
    features = take(items.features_NF, places).double().cpu()
    scores = torch.cat([(features[part[:, 0]] * features[part[:, 1]]).sum(1)
                        for part in torch.from_numpy(pairs_T2).split(10_000)])
    return SpeakerTrials(places[pairs_T2], names[pairs_T2], names[pairs_T2[:, 0]] == names[pairs_T2[:, 1]],
                         scores.numpy(), about)
