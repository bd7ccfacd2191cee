"""Loss mathematics first, then the objectives, then the OBJECTIVES table that config.yaml's stages name.

An objective turns a `Step` (one effective batch) into terms. Each term is a sum over some samples together with
its named parts; `count` is known before the first backward, from masks alone, so that sums divided by the count over
the whole effective batch are exact however the batch is split. Single-sample objectives give one term a micro-batch,
contrast gives one for the whole batch, whose encoders run in micro-batches under recompute.

Shape suffixes: B samples, C captions, Q queries, K keys or kept patches, N patches, D width, F embed_dim,
P values of a patch, L text tokens, U distinct captions, V classes, Z depth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from trimodal.objectives.step import Positives, Step, Term, accumulate, hidden_words, kept_patches, pick

__all__ = ["OBJECTIVES", "Objective", "Positives", "Step", "Term", "accumulate", "kept_patches"]

TEXT_DROP_PART = 0.75  # part of the samples whose text is hidden from the concept classifier, since it tells them
HARD_KEY_COLUMN, HARD_QUERY_COLUMN = 62, 63  # columns of the "path" uniforms, behind those of the encoders
PAIR_ORDER = ("image", "audio", "text")  # pairs are named image_text, audio_text, image_audio
CHUNK_ROWS = 1024  # rows of a similarity matrix held at once
SPEAKER_MARGIN, SPEAKER_SCALE = 0.2, 30.0  # arXiv:1801.07698 with the values usual for VoxCeleb


# ---- mathematics -------------------------------------------------------------------------------------------------


def info_nce(query_QF: Tensor, key_KF: Tensor, scale: Tensor, positives: Callable[[Tensor], Tensor],
             chunk: int = CHUNK_ROWS) -> Tensor:
    """Sum over the queries of -mean over a query's positives of log p(key | query) (arXiv:1807.03748; several
    positives as in arXiv:2004.11362, L_out).

    `positives(rows)` gives the (rows, K) mask of some queries, of which each needs a positive. Computed by `chunk` rows
    at a time: memory is O(chunk * K).
    """
    def chunk_sum(rows: Tensor) -> Tensor:
        log_p = (scale * query_QF[rows] @ key_KF.T).log_softmax(1)
        right = positives(rows)
        return -((log_p * right).sum(1) / right.sum(1)).sum()

    return _sum_by_rows(chunk_sum, query_QF, chunk)


def pairwise_sigmoid(query_QF: Tensor, key_KF: Tensor, scale: Tensor, bias: Tensor,
                     positives: Callable[[Tensor], Tensor], chunk: int = CHUNK_ROWS) -> Tensor:
    """Sum over all pairs of -log sigmoid(z (scale * similarity + bias)), z = 1 for positives and -1 for all others
    (arXiv:2303.15343). `positives` and `chunk` as in `info_nce`; a query may do without a positive."""
    def chunk_sum(rows: Tensor) -> Tensor:
        logits = scale * query_QF[rows] @ key_KF.T + bias
        return -F.logsigmoid(torch.where(positives(rows), logits, -logits)).sum()

    return _sum_by_rows(chunk_sum, query_QF, chunk)


def _sum_by_rows(chunk_sum: Callable[[Tensor], Tensor], query_QF: Tensor, chunk: int) -> Tensor:
    """Rows are independent: beyond `chunk` of them each chunk is recomputed in the backward pass, so that no scores of
    more than one live at a time."""
    parts = torch.arange(len(query_QF), device=query_QF.device).split(chunk)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.stack([chunk_sum(rows) for rows in parts]).sum()
    sums = [recompute(chunk_sum, rows, use_reentrant=False, preserve_rng_state=False) for rows in parts]
    return torch.stack(sums).sum()


def hard_negatives(query_QF: Tensor, key_KF: Tensor, scale: Tensor, positives: Callable[[Tensor], Tensor],
                   uniform_Q: Tensor) -> tuple[Tensor, Tensor]:
    """For each query one wrong key drawn with probability softmax(similarity) (arXiv:2107.07651) by inverting the
    distribution at `uniform_Q`; and whether the query has any wrong key. (Q,) int64, (Q,) bool.

    Probabilities are whole multiples of 2^-48: their sums are exact, in whatever order a device adds them.
    """
    picks, some = [], []
    for rows in torch.arange(len(query_QF), device=query_QF.device).split(CHUNK_ROWS):
        wrong = ~positives(rows)
        logits = (scale * query_QF[rows] @ key_KF.T).masked_fill(~wrong, -torch.inf)
        some.append(wrong.any(1))
        dtype = torch.promote_types(logits.dtype, torch.float32)  # in float16 2^48 is infinite
        likely = logits.masked_fill(~some[-1][:, None], 0.0).softmax(1, dtype=dtype)
        cumulated = (likely * 2.0**48).long().cumsum(1)
        target = (uniform_Q[rows, None].double() * cumulated[:, -1:]).long()
        picks.append(torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=len(key_KF) - 1))
    return torch.cat(picks), torch.cat(some)


def patch_error(predicted_BNP: Tensor, target_BNP: Tensor, hidden_BN: Tensor) -> Tensor:
    """Sum over hidden patches of the mean squared error against the patch's own normalised values
    (arXiv:2111.06377)."""
    variance, mean = torch.var_mean(target_BNP, dim=-1, keepdim=True, correction=0)
    target_BNP = (target_BNP - mean) / (variance + 1e-3).sqrt()
    return ((predicted_BNP - target_BNP).square().mean(-1) * hidden_BN).sum()  # of float32 targets: float32


def margin_logits(features_BF: Tensor, weight_VF: Tensor, labels_B: Tensor) -> Tensor:
    """Cosines of features and class vectors with an additive angular margin on the right class
    (arXiv:1801.07698), times the scale; (B, V)."""
    cosine_BV = features_BF @ F.normalize(weight_VF, dim=1).T
    right = F.one_hot(labels_B, len(weight_VF)).bool()
    angle = cosine_BV.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return SPEAKER_SCALE * torch.where(right, (angle + SPEAKER_MARGIN).clamp(max=math.pi).cos(), cosine_BV)


# ---- objectives --------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """`count(step)` units of the whole batch (0: nothing to learn here), `terms(step)` sums to be divided by it.

    Parameters of an objective are heads that only its stage needs; they are never part of the model.
    """

    is_of_whole_batch = False  # True: each process's term is the loss of all rows; else that of its own, to be summed
    uses_fusion = False  # encodes in the fusion's micro-batches
    encodes_others = False  # samples whose pictures and sounds other processes have read

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__()
        self.inputs = tuple(sorted(inputs, key=PAIR_ORDER.index))

    def count(self, step: Step) -> float:
        raise NotImplementedError

    def terms(self, step: Step) -> Iterator[Term]:
        raise NotImplementedError


class Contrastive(Objective):
    """Symmetric InfoNCE between two modalities (arXiv:2103.00020) over the whole effective batch."""

    is_of_whole_batch = True

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        assert len(self.inputs) == 2, f"contrast needs two modalities, got {self.inputs}"

    def count(self, step: Step) -> float:
        return 1.0 if step.rows(self.inputs[0]) > 1 else 0.0

    def terms(self, step: Step) -> Iterator[Term]:
        query, key = (step.features(name) for name in self.inputs)
        loss = self._loss(step, query, key, step.positives(self.inputs))
        yield loss, {f"contrastive_{'_'.join(self.inputs)}": loss.detach()}

    def _loss(self, step: Step, query: Tensor, key: Tensor, positives: Positives) -> Tensor:
        scale = pair_scale(step, self.inputs)
        forward = info_nce(query, key, scale, positives.of_samples) / len(query)
        backward = info_nce(key, query, scale, positives.of_captions) / len(key)
        return (forward + backward) / 2


class SigmoidContrastive(Contrastive):
    """The pairwise sigmoid loss (arXiv:2303.15343) over the whole effective batch: each pair is judged by itself, with
    a learned bias. The mean over keys of the sum over queries, as there, where both are as many."""

    def _loss(self, step: Step, query: Tensor, key: Tensor, positives: Positives) -> Tensor:
        bias = step.model.logit_bias["_".join(self.inputs)]
        total = pairwise_sigmoid(query, key, pair_scale(step, self.inputs), bias, positives.of_samples)
        return total / len(key)


def pair_scale(step: Step, inputs: Sequence[str]) -> Tensor:
    """exp of the pair's learned log-scale; the model bounds it after each update."""
    return step.model.logit_scale["_".join(inputs)].exp()


class Matching(Objective):
    """Does this pair belong together? Read off the fusion token, on right pairs and on hard wrong ones, drawn by
    similarity over the whole effective batch (arXiv:2107.07651)."""

    uses_fusion = encodes_others = True

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        self.head = nn.Linear(model.config.preset.dim, 1)

    def count(self, step: Step) -> float:
        return 3.0 * len(step.batch.sample_ids) if len(step.batch.sample_ids) > 1 else 0.0

    @torch.no_grad()
    def negatives(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A wrong key for each sample, a wrong query for each sample's first key, and whether both exist; host."""
        query, key = (step.detached[n] if n in step.detached else step.features(n).detach() for n in self.inputs)
        positives, scale = step.positives(self.inputs), pair_scale(step, self.inputs).detach()
        first = step.to_device(first_keys(step, self.inputs))
        uniform = step.to_device(step.batch.noise["path"])
        keys, some = hard_negatives(query, key, scale, positives.of_samples, uniform[:, HARD_KEY_COLUMN])
        queries, also = hard_negatives(key[first], query, scale, lambda rows: positives.of_captions(first[rows]),
                                       uniform[:, HARD_QUERY_COLUMN])
        return step.to_host(keys), step.to_host(queries), step.to_host(some & also)

    def terms(self, step: Step) -> Iterator[Term]:
        keys, queries, some = self.negatives(step)
        first = first_keys(step, self.inputs)
        for rows in step.parts("fusion"):
            logits = self._pair_logits(step, torch.cat([rows, queries[rows]]), torch.cat([first[rows], keys[rows]]))
            n = len(rows)
            target = step.to_device(torch.cat([torch.ones(n), torch.zeros(2 * n)]))
            weight = step.to_device(torch.cat([torch.ones(n), some[rows].float(), some[rows].float()]))
            loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight, reduction="sum")
            right = ((logits > 0) == (target > 0.5)).float().sum()
            yield loss, {"matching": loss.detach(), "matching_accuracy": right.detach()}

    def _pair_logits(self, step: Step, query_rows: Tensor, key_rows: Tensor) -> Tensor:
        """Rows hold n right ones, then n wrong ones: pairs (right, right), (right, wrong key), (wrong query, right)."""
        n = len(query_rows) // 2
        first, second = torch.arange(n), torch.arange(n, 2 * n)
        with step.autocast():
            query = step.encode(self.inputs[0], query_rows)
            key = step.encode(self.inputs[1], key_rows)
            pairs = {self.inputs[0]: pick(query, step.to_device(torch.cat([first, first, second]))),
                     self.inputs[1]: pick(key, step.to_device(torch.cat([first, second, first])))}
            fused_BD = step.model.fuse(pairs)[0]
        return self.head(fused_BD)[:, 0]


def first_keys(step: Step, inputs: Sequence[str]) -> Tensor:
    """Row of the first caption (or the sample's own row) of each sample; int64 [B], on the host."""
    num_samples = len(step.batch.sample_ids)
    if "text" not in inputs:
        return torch.arange(num_samples)
    return torch.searchsorted(step.batch.caption_owner, torch.arange(num_samples))


class Concepts(Objective):
    """Multi-label classification of the fused features. Most samples are shown without their text, which names the
    concepts; count = labels in the batch, so that long and short label lists weigh alike."""

    uses_fusion = True

    def count(self, step: Step) -> float:
        return float(step.batch.concepts.sum()) if step.num_concepts else 0.0

    def terms(self, step: Step) -> Iterator[Term]:
        for rows in step.parts("fusion"):
            with step.autocast():
                logits_BV = step.model.fuse(self._given(step, rows))[2]
            target_BV = step.to_device(step.batch.concepts[rows]).to(logits_BV.dtype)
            used = step.num_concepts
            loss = F.binary_cross_entropy_with_logits(logits_BV[:, :used], target_BV[:, :used], reduction="sum")
            yield loss, {"concepts": loss.detach()}

    def _given(self, step: Step, rows: Tensor) -> dict[str, Any]:
        others = [name for name in self.inputs if name != "text"]
        given = {name: step.encode(name, rows) for name in others}
        if "text" in self.inputs:
            text = step.encode("text", first_keys(step, self.inputs)[rows])
            seen = step.batch.noise["drop_text"][rows] >= TEXT_DROP_PART if others else torch.ones(len(rows)).bool()
            given["text"] = text._replace(valid_BN=text.valid_BN & step.to_device(seen)[:, None])
        return given


class Masked(Objective):
    """Predict what is hidden: patches of images and sounds (arXiv:2111.06377, arXiv:2207.06405; the encoder sees
    kept patches only), words of captions (arXiv:1810.04805, with the word table as output layer)."""

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        heads: dict[str, nn.Module] = {
            name: PatchDecoder(model.config.preset, getattr(model, name).patch_dim)
            for name in self.inputs if name != "text"}
        if "text" in self.inputs:
            preset = model.config.preset
            heads["text"] = nn.Sequential(nn.Linear(preset.dim, preset.word_rank), nn.LayerNorm(preset.word_rank))
        self.heads = nn.ModuleDict(heads)

    def count(self, step: Step) -> float:
        return float(sum(self._hidden_count(step, name) for name in self.inputs))

    def _hidden_count(self, step: Step, name: str) -> int:
        if name == "text":
            return int(hidden_words(step.batch).sum())
        uniform, rows = step.batch.noise[name], torch.arange(step.rows(name))
        real = int(step.valid_patches(rows).sum()) if name == "audio" else uniform.numel()
        return real - int(step.kept(name, rows)[1].sum())

    def terms(self, step: Step) -> Iterator[Term]:
        for name in self.inputs:
            for rows in step.parts(name):
                loss = self._words(step, rows) if name == "text" else self._patches(step, name, rows)
                yield loss, {f"masked_{name}": loss.detach()}

    def _patches(self, step: Step, name: str, rows: Tensor) -> Tensor:
        encoder = getattr(step.model, name)
        media = step.media(name, rows)
        lengths = [step.to_device(step.batch.audio_lengths[rows])] if name == "audio" else []
        kept, kept_valid = map(step.to_device, step.kept(name, rows))
        with step.autocast():
            tokens_BKD, _ = step.encode(name, rows, hide=True)
            target, valid = encoder.patches(media, *lengths)
            predicted, seen = self.heads[name](tokens_BKD, kept, kept_valid, encoder.positions(media), valid)
        hidden = ~seen if valid is None else ~seen & valid
        return patch_error(predicted, target, hidden)

    def _words(self, step: Step, rows: Tensor) -> Tensor:
        batch = step.batch
        hidden, places = step.hidden_words(rows)
        at = step.to_device(places)
        ids = step.to_device(batch.input_ids[rows])
        path = step.path_scales(batch.noise["path_text"][rows], 0, step.model.text)
        with step.autocast():
            shown = ids.masked_fill(step.to_device(hidden), step.mask_id)
            states_BLD, _ = step.model.text(shown, step.to_device(batch.attention_mask[rows]), path)
            words_MR = self.heads["text"](states_BLD[at[:, 0], at[:, 1]])
            logits_MV = words_MR @ step.model.text.words.weight.T
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        return F.cross_entropy(logits_MV, ids[at[:, 0], at[:, 1]], reduction="sum")


class PatchDecoder(nn.Module):
    """One transformer layer over kept tokens and mask tokens at their positions, then the patch's values."""

    def __init__(self, preset: Any, patch_dim: int):
        super().__init__()
        self.embed = nn.Linear(preset.dim, preset.dim)
        self.mask = nn.Parameter(torch.zeros(preset.dim))
        self.layer = nn.TransformerEncoderLayer(preset.dim, preset.num_heads, 4 * preset.dim, dropout=0.0,
                                                activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.out = nn.LayerNorm(preset.dim), nn.Linear(preset.dim, patch_dim)

    def forward(self, tokens_BKD: Tensor, kept_BK: Tensor, kept_valid_BK: Tensor, positions_ND: Tensor,
                valid_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predicted patches (B, N, P), and which patches the encoder saw (B, N)."""
        B, N, D = len(tokens_BKD), *positions_ND.shape
        slot_BK = kept_BK.masked_fill(~kept_valid_BK, N)  # padding lands in a slot that is cut off again
        embedded = self.embed(tokens_BKD)
        full = self.mask.to(embedded.dtype).expand(B, N + 1, D)
        full = full.scatter(1, slot_BK[:, :, None].expand(-1, -1, D), embedded)[:, :N] + positions_ND
        seen = torch.zeros(B, N + 1, dtype=torch.bool, device=full.device).scatter(1, slot_BK, True)[:, :N]
        padding = None if valid_BN is None else ~valid_BN
        return self.out(self.norm(self.layer(full, src_key_padding_mask=padding))), seen


class Speaker(Objective):
    """Who speaks: an angular-margin softmax on audio_features, so that cosines of features verify speakers."""

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        self.weight = nn.Parameter(torch.randn(max(num_speakers, 1), model.config.embed_dim) * 0.05)

    def count(self, step: Step) -> float:
        return float((step.batch.speakers >= 0).sum())

    def terms(self, step: Step) -> Iterator[Term]:
        for rows in step.parts("audio"):
            rows = step.with_speaker(rows)
            if not len(rows):
                continue
            with step.autocast():
                features_BF = step.model.features("audio", step.encode("audio", rows))
            labels_B = step.to_device(step.batch.speakers[rows])
            loss = F.cross_entropy(margin_logits(features_BF, self.weight, labels_B), labels_B, reduction="sum")
            yield loss, {"speaker": loss.detach()}


def loss_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters of the losses of whole batches: each process has their whole gradient, not a share of it."""
    return [*model.logit_scale.values(), *model.logit_bias.values()]


OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "matching": Matching,
    "concepts": Concepts,
    "masked": Masked,
    "speaker": Speaker,
}


def build_objective(name: str, model: Any, inputs: Sequence[str], num_speakers: int,
                    contrastive_loss: str) -> Objective:
    """The objective of this name; `contrastive` in the form that training.contrastive_loss says."""
    if name == "contrastive" and contrastive_loss == "sigmoid":
        return SigmoidContrastive(model, inputs, num_speakers)
    return OBJECTIVES[name](model, inputs, num_speakers)


def start_sigmoid(model: Any, effective_batch: int) -> None:
    """Where the sigmoid loss begins: scale 10 and the log odds that one of `effective_batch` keys is right as bias,
    which for the 32,768 of arXiv:2303.15343 is its -10."""
    with torch.no_grad():
        for scale, bias in zip(model.logit_scale.values(), model.logit_bias.values(), strict=True):
            scale.fill_(math.log(10.0))
            bias.fill_(-math.log(max(effective_batch - 1, 1)))
