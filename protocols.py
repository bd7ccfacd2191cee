"""Evaluation protocols: encode a split once per modality, then every figure that its data allow.

    encoded = encode_split(model, data, "test", config, Setting(device=device, amp=torch.bfloat16))
    figures = score(encoded, data, config)
    figures["coco"]["image-text"]["image_to_text_R@1"]["value"]

`score` gives {set: {pair: {metric: figure}}} (a figure: see metrics). Pairs: "image-text", "audio-text",
"image-audio", "image-concepts" and "audio-concepts" (what the classifier says of a picture or a sound alone, through
the fusion), "speakers" (verification). The set "all" holds the samples of all sets together; with several sets its
candidates come from all of them. "stamps" stands a second time as "stamps_without_symbols": letters and digits are
told apart by their shapes alone.

Retrieval is over all captions of each sample. Speakers are verified on the official trial list where it is there
(cosines of audio_features), else on all pairs of at most `SPEAKER_UTTERANCES` utterances.

Shape suffixes: N encoded items of one modality, F feature width, K classes, C captions, T trials.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import memory
import metrics
from config import AUDIO_WINDOW_FRAMES, MODALITIES, Config, UserError
from datasets import Batch, Data, loader
from metrics import Figure

ALL = "all"
WITHOUT_SYMBOLS = "stamps_without_symbols"
SPEAKER_UTTERANCES = 300  # of at most UTTERANCES_EACH a speaker, where there is no trial list: up to 44,850 pairs
UTTERANCES_EACH = 10
TRIAL_FOLDERS = ("voxceleb1", ".", "voxceleb2", "meta", "metadata", "voxceleb1/meta", "voxceleb1/metadata")
TRIAL_LISTS = (  # cleaned Vox1-O first; the figures of papers are on either. The others are of all speakers
    "veri_test2.txt", "veri_test.txt", "voxceleb1_test_v2.txt", "list_test_all2.txt", "list_test_all.txt",
    "list_test_hard2.txt", "list_test_hard.txt")
SAMPLING_SEED = 0  # of the parts of a split that are used; never the training seed, so that runs compare

Figures = dict[str, dict[str, dict[str, Figure]]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a split is encoded."""

    device: torch.device
    amp: torch.dtype | None = None  # of autocast; None = float32
    limit: int | None = None  # at most so many samples of each set and kind of inputs, drawn by a fixed seed
    concepts: bool = True  # pictures and sounds also through the fusion, for the classifier's figures
    sizes: Mapping[str, int] = field(default_factory=dict)  # samples at a time by modality; else evaluation.batch_size
    less: Callable[[int, str], None] = lambda size, cause: None  # told when memory ran out: the new size, and why


@dataclass(frozen=True)
class Items:
    """What was encoded of one modality."""

    features_NF: Tensor
    rows_N: np.ndarray  # row of each item's sample in the split's table, ascending


@dataclass(frozen=True)
class Answers:
    """What the classifier says of the items whose concepts are known, given that one modality. On the host."""

    logits_NK: Tensor
    concepts_NK: Tensor  # bool
    rows_N: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Features of a split, and what part of it they are."""

    split: str
    items: dict[str, Items]  # by modality; of text, one item a caption
    answers: dict[str, Answers]  # by modality
    caption_ids_C: Tensor  # equal for equal normalised captions
    captions_C: np.ndarray  # row of each caption in the table's captions
    facts: dict[str, dict[str, Any]]  # by set, as plain JSON; `score` adds how speakers were tried


# ---- encoding ----------------------------------------------------------------------------------------------------


def encode_split(model: Any, data: Data, split: str, config: Config, setting: Setting) -> Encoded:
    """Encode each picture, caption and sound of `split` once, in eval mode, `evaluation.batch_size` at a time.

    Features stay on the device. Out of memory halves the parts from there on, which changes nothing else. Samples
    whose file is broken are left out and counted.

    Raises:
        UserError: too many broken files, or out of memory with one sample at a time.
    """
    table = data.tables[split]
    rows_by_kind = chosen_rows(data, split, setting.limit)
    size = config.evaluation.batch_size
    jobs = [(task, part) for task, rows in enumerate(rows_by_kind.values())
            for part in np.array_split(rows, -(-len(rows) // size))]
    inputs = list(rows_by_kind)
    gathered = _Gathered(model, setting, size)
    was_training = model.training
    model.eval()
    try:
        batches = loader(data, split, jobs, config, inputs=inputs, train=False, epoch=0) if jobs else iter(())
        with torch.inference_mode():
            for batch in tqdm(batches, total=len(jobs), desc=f"evaluating {split}", unit="batch", disable=None):
                gathered.add(batch, table.caption_offsets)
    finally:
        model.train(was_training)
    rows = np.concatenate([np.empty(0, np.int64), *rows_by_kind.values()])
    return gathered.result(split, _facts(data, split, rows, gathered))


def chosen_rows(data: Data, split: str, limit: int | None) -> dict[tuple[str, ...], np.ndarray]:
    """Rows to encode by the modalities that their samples have, ascending.

    Samples with one modality alone only count where they have labels or a speaker. With a limit, a fixed random part
    of each set and kind.
    """
    table = data.tables[split]
    has = np.stack([table.has_image, table.has_text, table.has_audio], axis=1)
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


def can_score(data: Data, split: str) -> bool:
    """False where the samples of a split cannot give any figure: all of them need two pictures or two sounds."""
    kinds = chosen_rows(data, split, None)
    return any(sum(len(rows) for kind, rows in kinds.items() if name in kind) > 1 for name in ("image", "audio"))


def _facts(data: Data, split: str, rows: np.ndarray, gathered: "_Gathered") -> dict[str, dict[str, Any]]:
    """Of each set: samples used, samples there are, broken ones, and features that are not finite."""
    table, facts = data.tables[split], {}
    for code, source in enumerate(table.sources.names):
        there = table.sources.codes == code
        used = int(there[rows].sum())
        seen = int(there[np.array(sorted(gathered.seen), np.int64)].sum())
        facts[source] = {"samples": used, "of": int(there.sum()), "broken": used - seen,
                         "subset_seed": SAMPLING_SEED if used < there.sum() else None,
                         "nonfinite": gathered.nonfinite(there)}
    return facts


class _Gathered:
    """Encodes batches and keeps what they give."""

    def __init__(self, model: Any, setting: Setting, size: int):
        self.model, self.setting = model, setting
        self.size = {name: setting.sizes.get(name, size) for name in MODALITIES}
        self.seen: set[int] = set()
        self.features: dict[str, list[Tensor]] = {name: [] for name in MODALITIES}
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in MODALITIES}
        self.answers: dict[str, list[Answers]] = {name: [] for name in MODALITIES}
        self.caption_ids: list[Tensor] = []
        self.captions: list[np.ndarray] = []

    def add(self, batch: Batch, caption_offsets: np.ndarray) -> None:
        rows = batch.sample_ids.numpy()
        self.seen.update(rows.tolist())
        with torch.autocast(self.setting.device.type, self.setting.amp, enabled=self.setting.amp is not None):
            if batch.images is not None:
                self._keep("image", rows, batch, self._in_parts("image", self._image(batch), batch.images))
            if batch.audio is not None:
                assert batch.audio_lengths is not None
                windows = -(-batch.audio.shape[1] // AUDIO_WINDOW_FRAMES)  # the size counts windows: long sounds fit
                found = self._in_parts("audio", self._audio(batch), batch.audio, batch.audio_lengths, windows=windows)
                self._keep("audio", rows, batch, found)
            if batch.input_ids is not None:
                assert batch.caption_owner is not None and batch.caption_ids is not None
                assert batch.attention_mask is not None
                found = self._in_parts("text", self._text, batch.input_ids, batch.attention_mask)
                self._keep("text", rows[batch.caption_owner.numpy()], batch, found)
                self.caption_ids.append(batch.caption_ids)
                self.captions.append(np.concatenate([np.arange(*caption_offsets[row:row + 2]) for row in rows]))

    def _in_parts(self, name: str, encode: Callable[..., dict[str, Tensor]], *inputs: Tensor,
                  windows: int = 1) -> list[dict[str, Tensor]]:
        """What `encode` makes of `inputs`, so many rows at a time; out of memory halves that for all that follows."""
        found: list[dict[str, Tensor]] = []
        start = 0
        while start < len(inputs[0]):
            size = max(1, self.size[name] // windows)
            try:
                found.append(encode(*(x[start:start + size] for x in inputs)))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                cause = memory.out_of_memory_cause(error)
            # outside of the handler, so that the failed part's tensors are let go
            memory.free_cached(self.setting.device)
            if size == 1:
                raise UserError(f"evaluation: out of memory with one sample at a time ({cause}); free the device for "
                                "this run, or evaluate with --device cpu")
            self.size = {known: max(1, value // 2) for known, value in self.size.items()}
            self.setting.less(max(self.size.values()), cause)
        return found

    def _keep(self, name: str, rows: np.ndarray, batch: Batch, found: list[dict[str, Tensor]]) -> None:
        self.rows[name].append(rows)
        self.features[name] += [part[f"{name}_features"].float() for part in found]
        if "logits" in found[0]:
            assert batch.concepts is not None
            known = batch.concepts.any(1)  # of a sample without any nobody knows which ones it lacks
            logits = torch.cat([part["logits"].float().cpu() for part in found])
            self.answers[name].append(Answers(logits[known], batch.concepts[known], rows[known.numpy()]))

    def _classifies(self, batch: Batch) -> bool:
        return self.setting.concepts and batch.concepts is not None and bool(batch.concepts.any())

    def _image(self, batch: Batch) -> Callable[..., dict[str, Tensor]]:
        classify = self._classifies(batch)

        def encode(images: Tensor) -> dict[str, Tensor]:
            images = images.to(self.setting.device)
            return self.model(images=images) if classify else {"image_features": self.model.image_features(images)}

        return encode

    def _audio(self, batch: Batch) -> Callable[..., dict[str, Tensor]]:
        classify = self._classifies(batch)

        def encode(audio: Tensor, lengths: Tensor) -> dict[str, Tensor]:
            frames = min(-(-int(lengths.max()) // 16) * 16, audio.shape[1])  # no more padding than this part needs
            audio, lengths = audio[:, :frames].to(self.setting.device), lengths.to(self.setting.device)
            if classify:
                return self.model(audio=audio, audio_lengths=lengths)
            return {"audio_features": self.model.audio_features(audio, lengths)}

        return encode

    def _text(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        ids, mask = ids.to(self.setting.device), mask.to(self.setting.device)
        return {"text_features": self.model.text_features(ids, mask)}

    def nonfinite(self, members: np.ndarray) -> dict[str, int]:
        """Items of `members` (bool, by row) whose features are not finite, by modality, where there are any."""
        counts = {}
        for name in (name for name in MODALITIES if self.rows[name]):
            own = torch.from_numpy(members[np.concatenate(self.rows[name])])
            features = torch.cat(self.features[name])
            counts[name] = metrics.count_nonfinite(features[own.to(features.device)])
        return {name: count for name, count in counts.items() if count}

    def result(self, split: str, facts: dict[str, dict[str, Any]]) -> Encoded:
        """Everything in order of rows, so that sets and pairs can be picked out by searching."""
        items = {}
        ids, captions = torch.empty(0, dtype=torch.int64), np.empty(0, np.int64)
        for name in (name for name in MODALITIES if self.rows[name]):
            rows = np.concatenate(self.rows[name])
            order = np.argsort(rows, kind="stable")
            items[name] = Items(_rows(torch.cat(self.features[name]), order), rows[order])
            if name == "text":
                ids = torch.cat(self.caption_ids)[torch.from_numpy(order)]
                captions = np.concatenate(self.captions)[order]
        answers = {name: Answers(torch.cat([p.logits_NK for p in parts]), torch.cat([p.concepts_NK for p in parts]),
                                 np.concatenate([p.rows_N for p in parts]))
                   for name, parts in self.answers.items() if parts}
        return Encoded(split, items, answers, ids, captions, facts)


# ---- scoring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score(encoded: Encoded, data: Data, config: Config) -> Figures:
    """All figures of an encoded split: {set: {pair: {metric: figure}}}; pairs without two samples are left out."""
    options = metrics.Options(tile=config.evaluation.tile, resamples=config.evaluation.resamples)
    figures: Figures = {}
    for name, members in _sets(data, encoded.split):
        pairs = {"image-text": _retrieval(encoded, ("image", "text"), members, options)}
        if name != WITHOUT_SYMBOLS:
            pairs["audio-text"] = _retrieval(encoded, ("audio", "text"), members, options)
            pairs["image-audio"] = _retrieval(encoded, ("image", "audio"), members, options)
            for modality in ("image", "audio"):
                pairs[f"{modality}-concepts"] = _concepts(encoded, modality, members, options)
            if name != ALL:
                pairs["speakers"] = _speakers(encoded, data, members, config, options)
        figures[name] = {pair: found for pair, found in pairs.items() if found}
    if len(data.tables[encoded.split].sources.names) == 1:
        figures[ALL] = figures[data.tables[encoded.split].sources.names[0]]
    return {name: pairs for name, pairs in figures.items() if pairs}


def evaluate_split(model: Any, data: Data, split: str, config: Config, setting: Setting) -> tuple[Figures, Encoded]:
    """`encode_split`, then `score`."""
    encoded = encode_split(model, data, split, config, setting)
    return score(encoded, data, config), encoded


def _sets(data: Data, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names of sets, and True at the rows of each; `ALL` first where there are several."""
    table = data.tables[split]
    names = table.sources.names
    if len(names) > 1:
        yield ALL, np.ones(len(table), bool)
    for code, name in enumerate(names):
        members = table.sources.codes == code
        yield name, members
        if name == "stamps":
            symbols = np.array([label == "symbols" for label in table.labels.names], bool)[table.labels.codes]
            owners = np.repeat(np.arange(len(table)), np.diff(table.label_offsets))
            plain = members.copy()
            plain[owners[symbols]] = False
            if plain.sum() < members.sum():
                yield WITHOUT_SYMBOLS, plain


def _paired(encoded: Encoded, pair: tuple[str, str], members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of both modalities whose samples have both, and for each of the second the place of its sample's first."""
    if not set(pair) <= encoded.items.keys():
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    first, second = (encoded.items[name].rows_N for name in pair)
    left = np.flatnonzero(members[first] & np.isin(first, second))
    right = np.flatnonzero(members[second] & np.isin(second, first))
    return left, right, np.searchsorted(first[left], second[right])


def _retrieval(encoded: Encoded, pair: tuple[str, str], members: np.ndarray,
               options: metrics.Options) -> dict[str, Figure]:
    left, right, owners = _paired(encoded, pair, members)
    if len(left) < 2:
        return {}
    first, second = (_rows(encoded.items[name].features_NF, rows) for name, rows in zip(pair, (left, right),
                                                                                          strict=True))
    texts = encoded.caption_ids_C[torch.from_numpy(right)] if pair[1] == "text" else None
    return metrics.retrieval(first, second, torch.from_numpy(owners), texts, names=pair, options=options)


def _rows(features: Tensor, rows: np.ndarray) -> Tensor:
    return features[torch.from_numpy(rows).to(features.device)]


def _concepts(encoded: Encoded, modality: str, members: np.ndarray, options: metrics.Options) -> dict[str, Figure]:
    answers = encoded.answers.get(modality)
    if answers is None:
        return {}
    own = torch.from_numpy(members[answers.rows_N])
    if int(own.sum()) < 2:
        return {}
    return metrics.concept_precision(answers.logits_NK[own], answers.concepts_NK[own],
                                     name=f"{modality}_to_concepts_mAP", options=options)


# ---- speakers ----------------------------------------------------------------------------------------------------


def read_trials(path: Path) -> list[tuple[bool, str, str]]:
    """Lines `1 id10270/x6uYqmx31kE/00001.wav id10270/8jEAjG6SegY/00008.wav` of a trial list; 1 = one speaker.

    Raises:
        UserError: a line that is none, with its number.
    """
    trials = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or words[0] not in ("0", "1"):
            raise UserError(f"{path}, line {number}: expected '1 FILE FILE' or '0 FILE FILE', got {line[:80]!r}; "
                            "download the list again")
        trials.append((words[0] == "1", words[1], words[2]))
    return trials


def _speakers(encoded: Encoded, data: Data, members: np.ndarray, config: Config,
              options: metrics.Options) -> dict[str, Figure]:
    """Verification on the official trials where they are there, else on pairs of our own; adds to the set's facts."""
    table, items = data.tables[encoded.split], encoded.items.get("audio")
    if items is None:
        return {}
    places = np.array([n for n, row in enumerate(items.rows_N) if members[row] and table.speakers[row]], np.int64)
    names = np.array([table.speakers[row] for row in items.rows_N[places]])
    if len(np.unique(names)) < 2:
        return {}
    source = table.sources[items.rows_N[places[0]]]
    if source == "voxceleb" and encoded.split == "test":
        pairs_T2, about = _listed_trials([table.keys[row] for row in items.rows_N[places]], names, config)
    else:
        pairs_T2, about = _own_trials(names, "no trial list")
    encoded.facts[source]["trials"] = about
    same_T = names[pairs_T2[:, 0]] == names[pairs_T2[:, 1]]
    features = _rows(items.features_NF, places).double().cpu()
    scores = torch.cat([(features[part[:, 0]] * features[part[:, 1]]).sum(1)
                        for part in torch.from_numpy(pairs_T2).split(10_000)])
    return metrics.verification(scores.numpy(), same_T, names[pairs_T2], options)


def _listed_trials(keys: Sequence[str], names: np.ndarray, config: Config) -> tuple[np.ndarray, str]:
    """Pairs of places in `keys` from the first list that has any of the utterances that are there, and what list it is;
    pairs of our own (see `_own_trials`) where there is none."""
    root = Path(config.paths.data_root) / "voxceleb"
    place = {key: n for n, key in enumerate(keys)}
    empty = []
    for path in (root / folder / name for name in TRIAL_LISTS for folder in TRIAL_FOLDERS):
        if not path.is_file():
            continue
        trials, name = read_trials(path), path.relative_to(root).as_posix()
        both = ((place.get(_key_of_trial(one)), place.get(_key_of_trial(other))) for _, one, other in trials)
        pairs = [pair for pair in both if None not in pair]
        if pairs:
            return np.array(pairs, np.int64), f"{name}: {len(pairs)} of its {len(trials)} trials have both files here"
        empty.append(name)
    return _own_trials(names, f"no trial of {', '.join(empty)} has both files here" if empty else "no trial list")


def _key_of_trial(file: str) -> str:
    """Key of the sample that a list calls SPEAKER/VIDEO/UTTERANCE.wav."""
    return f"vox1/{os.path.splitext(file)[0]}"


def _own_trials(names: np.ndarray, why: str) -> tuple[np.ndarray, str]:
    """All pairs among at most SPEAKER_UTTERANCES utterances, UTTERANCES_EACH a speaker, drawn by a fixed seed."""
    order = np.random.default_rng(SAMPLING_SEED).permutation(len(names))
    by_speaker: dict[str, list[int]] = {}
    for place in order.tolist():
        own = by_speaker.setdefault(str(names[place]), [])
        if len(own) < UTTERANCES_EACH:
            own.append(place)
    drawn = np.array([place for own in by_speaker.values() for place in own][:SPEAKER_UTTERANCES], np.int64)
    first, second = np.triu_indices(len(drawn), k=1)
    return np.stack([drawn[first], drawn[second]], axis=1), (
        f"{why}: all {len(first)} pairs of {len(drawn)} utterances drawn by seed {SAMPLING_SEED}")


# ---- examples ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def examples(encoded: Encoded, data: Data, modality: str, queries: int, found: int = 5) -> list[dict[str, Any]]:
    """What a few captions find among all pictures ("image") or sounds ("audio") of the split, for the gallery.

    The captions are different first ones of samples drawn by a fixed seed. Each gives {"query", "source", "modality",
    "rank" (of the best right answer, ties against the model), "candidates", "answers": [{"picture": uint8 (H, W, 3) or
    log-mel float16 (T, 80), "caption", "score", "right"}]}, best answer first.
    """
    table = data.tables[encoded.split]
    left, right, owners = _paired(encoded, (modality, "text"), np.ones(len(table), bool))
    if not len(left):
        return []
    gallery = _rows(encoded.items[modality].features_NF, left)
    rows_G, ids = encoded.items[modality].rows_N[left], encoded.caption_ids_C.numpy()[right]
    relation = metrics.Relation(torch.from_numpy(owners), torch.from_numpy(ids), len(left))
    firsts = np.unique(owners, return_index=True)[1]  # one caption a sample, and each wording once
    firsts = firsts[np.unique(ids[firsts], return_index=True)[1]]
    chosen = np.sort(np.random.default_rng(SAMPLING_SEED).permutation(firsts)[:queries])
    out = []
    for c in chosen.tolist():
        query_F = _rows(encoded.items["text"].features_NF, right[c:c + 1])[0]
        scores_G = (gallery @ query_F).nan_to_num(-2.0, -2.0, -2.0).cpu()
        right_G = relation.tile(slice(0, len(left)), slice(c, c + 1))[:, 0]
        rank = 1 + int((scores_G[~right_G] >= scores_G[right_G].max()).sum())
        best = scores_G.sort(descending=True, stable=True).indices[:found].tolist()
        out.append({"query": table.captions[encoded.captions_C[right[c]]], "source": table.sources[rows_G[owners[c]]],
                    "modality": modality, "rank": rank, "candidates": len(left),
                    "answers": [{"picture": _picture(data, encoded.split, modality, int(rows_G[g])),
                                 "caption": (table.captions_of(int(rows_G[g])) or ("",))[0],
                                 "score": float(scores_G[g]), "right": bool(right_G[g])} for g in best]})
    return out


def _picture(data: Data, split: str, modality: str, row: int) -> np.ndarray:
    store = data.splits[split].store
    return store.image(row) if modality == "image" else store.mel(row)[:AUDIO_WINDOW_FRAMES]
