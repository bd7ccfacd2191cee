"""Contrast between two modalities over the whole effective batch: InfoNCE or the pairwise sigmoid loss, which pairs
are right, and how alike the captions of all others are.

Shape suffixes: B samples, C captions, Q queries, K keys, F embed_dim, W width of the vectors of captions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from trimodal.config import TrainingConfig
from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.step import Step

CHUNK_ROWS = 1024  # rows of a similarity matrix held at once

LIKENESS_TEMPERATURE = 0.1  # of the share of the target that goes to wrong keys by how alike their captions are

Mask = Callable[[Tensor], Tensor]  # of the queries at some rows (Q), which keys are right: (Q, K)


# ---- which pairs are right ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positives:
    """Which captions are positives of which samples: those with the same text as a caption of the sample's file.

    Two samples of one file have the same positives, and equal captions are positives of the same files. Masks are made
    for the rows asked for, so that nothing here grows with B * C. In image-audio contrast sounds stand for captions.
    """

    file_C: Tensor  # number of the file that each caption belongs to
    group_C: Tensor  # equal for equal captions
    file_B: Tensor  # number of each sample's file, equal for equal files

    @staticmethod
    def of(sample_C: Tensor, ids_C: Tensor, files_B: Tensor) -> "Positives":
        """The positives of a batch of B samples with C captions.

        Args:
            sample_C: index in the batch of the sample that each caption belongs to.
            ids_C: equal for captions of equal text, whichever sample they belong to.
            files_B: equal for samples of the same file: a caption of one is a caption of all.
        """
        file_B = dense_ids(files_B)
        return Positives(file_B[sample_C], dense_ids(ids_C), file_B)

    def to(self, move: Callable[[Tensor], Tensor]) -> "Positives":
        return replace(self, file_C=move(self.file_C), group_C=move(self.group_C), file_B=move(self.file_B))

    def of_samples(self, rows: Tensor) -> Tensor:
        """(Q, C) mask for the samples `rows` as queries: captions equal to one of the sample's file."""
        own_QC = self.file_C == self.file_B[rows][:, None]
        return any_by_number(own_QC, self.group_C, len(self.group_C))[:, self.group_C]

    def of_captions(self, rows: Tensor) -> Tensor:
        """(Q, B) mask for the captions `rows` as queries: samples whose file has an equal caption."""
        same_QC = self.group_C == self.group_C[rows][:, None]
        return any_by_number(same_QC, self.file_C, len(self.file_B))[:, self.file_B]

    def count(self) -> int:
        """How many (sample, caption) pairs are positives, among all B * C."""
        owned = torch.stack([self.file_C, self.group_C]).unique(dim=1)  # one of each group that a file has
        samples, captions = self.file_B.bincount(), self.group_C.bincount()
        return int((samples[owned[0]] * captions[owned[1]]).sum())


def positives_of(batch: Any, inputs: Sequence[str]) -> Positives:
    """The positives of `batch` for the pair of modalities `inputs`, as CPU tensors.

    Captions are the same if their text is; images and sounds are the same if their file is, or, where the batch holds
    no ids of files, their sample.
    """
    def files(name: str) -> Tensor:
        found = batch.image_ids if name == "image" else batch.audio_ids
        return batch.sample_ids if found is None else found

    if "text" in inputs:
        first = next(name for name in inputs if name != "text")
        return Positives.of(batch.caption_owner, batch.caption_ids, files(first))
    return Positives.of(torch.arange(len(batch.sample_ids)), files(inputs[1]), files(inputs[0]))


def dense_ids(ids_N: Tensor) -> Tensor:
    """Replace ids by 0, 1, 2, ... in their ascending order, equal ones by equal numbers; int64 [N].

    As the inverse of `torch.unique`, but no shape depends on the values, so that the planner's fake tensors can run it.
    """
    sorted_N, order_N = ids_N.sort()
    rank_N = F.pad((sorted_N[1:] != sorted_N[:-1]).long().cumsum(0), (1, 0))
    return torch.empty_like(rank_N).scatter_(0, order_N, rank_N)


def any_by_number(flag_QC: Tensor, number_C: Tensor, count: int) -> Tensor:
    """(Q, count): whether one of the flags with this number is up."""
    sums = torch.zeros(len(flag_QC), count, dtype=torch.int32, device=flag_QC.device)
    return sums.index_add_(1, number_C, flag_QC.int()) > 0


# ---- how alike the captions are ------------------------------------------------------------------------------------


class Softened(NamedTuple):
    """What some queries should find, besides their right keys."""

    rest_Q1: Tensor  # what is left of the target for the right keys
    other_QK: Tensor  # the target of wrong keys
    left_out_QK: Tensor  # wrong keys that are not compared: bool


Soften = Callable[[Tensor, Tensor], Softened]  # of the queries at some rows (Q), whose right keys are (Q, K)


@dataclass(frozen=True)
class Likeness:
    """Cosines of a sample's captions (their mean) and of each caption, as a frozen text model sees them: `share` of a
    query's target goes to wrong keys by their softmax; wrong keys above `limit` are left out."""

    sample_BW: Tensor
    caption_CW: Tensor
    share: float
    limit: float | None

    @staticmethod
    def of(batch: Any, settings: TrainingConfig) -> "Likeness | None":
        """Of a batch on the host; None where it has no captions, or the settings ask for none."""
        vectors_CW = batch.caption_vectors
        if vectors_CW is None or not settings.compares_captions:
            return None
        vectors_CW = vectors_CW.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
        sum_BW = vectors_CW.new_zeros(len(batch.sample_ids), vectors_CW.shape[1])
        sum_BW.index_add_(0, batch.caption_owner, vectors_CW)
        return Likeness(F.normalize(sum_BW, dim=1), vectors_CW, settings.soft_targets, settings.false_negatives)

    def to(self, move: Callable[[Tensor], Tensor]) -> "Likeness":
        return replace(self, sample_BW=move(self.sample_BW), caption_CW=move(self.caption_CW))

    def of_samples(self, rows: Tensor, right_QC: Tensor) -> Softened:
        return self._soften(self.sample_BW[rows] @ self.caption_CW.T, right_QC)

    def of_captions(self, rows: Tensor, right_QB: Tensor) -> Softened:
        return self._soften(self.caption_CW[rows] @ self.sample_BW.T, right_QB)

    def _soften(self, cosine_QK: Tensor, right_QK: Tensor) -> Softened:
        is_like = cosine_QK > self.limit if self.limit is not None else torch.zeros_like(right_QK)
        left_out_QK = ~right_QK & is_like
        other_QK = ~(right_QK | left_out_QK)
        share_Q1 = self.share * other_QK.any(1, keepdim=True).to(cosine_QK.dtype)
        scores_QK = cosine_QK.masked_fill(~other_QK & (share_Q1 > 0), -torch.inf) / LIKENESS_TEMPERATURE
        return Softened(1 - share_Q1, share_Q1 * scores_QK.softmax(1), left_out_QK)


# ---- losses ------------------------------------------------------------------------------------------------------


def info_nce(query_QF: Tensor, key_KF: Tensor, scale: Tensor, positives: Mask, chunk: int = CHUNK_ROWS,
             soften: Soften | None = None) -> Tensor:
    """Sum over the queries of -mean over a query's positives of log p(key | query) (arXiv:1807.03748; several
    positives as in arXiv:2004.11362, L_out).

    `positives(rows)` gives the (rows, K) mask of some queries, of which each needs a positive. With `soften` it is the
    cross-entropy with another target, in which the positives have what is left for them; a key that is left out is none
    of those that p is spread over. Computed by `chunk` rows at a time: memory is O(chunk * K).
    """
    def chunk_sum(rows: Tensor) -> Tensor:
        logits = scale * query_QF[rows] @ key_KF.T
        right = positives(rows)
        if soften is None:
            return -((logits.log_softmax(1) * right).sum(1) / right.sum(1)).sum()
        rest, other, left_out = soften(rows, right)
        target = rest * right / right.sum(1, keepdim=True) + other
        log_p = logits.masked_fill(left_out, -torch.inf).log_softmax(1)
        return -(target * log_p.masked_fill(left_out, 0.0)).sum()

    return _sum_by_rows(chunk_sum, query_QF, chunk)


def pairwise_sigmoid(query_QF: Tensor, key_KF: Tensor, scale: Tensor, bias: Tensor, positives: Mask,
                     chunk: int = CHUNK_ROWS, soften: Soften | None = None) -> Tensor:
    """Sum over all pairs of -log sigmoid(z (scale * similarity + bias)), z = 1 for positives and -1 for all others
    (arXiv:2303.15343). `positives` and `chunk` as in `info_nce`; a query may do without a positive. With `soften` a
    pair's target is what it has of its query's, and pairs that are left out do not count."""
    def chunk_sum(rows: Tensor) -> Tensor:
        logits = scale * query_QF[rows] @ key_KF.T + bias
        right = positives(rows)
        if soften is None:
            return -F.logsigmoid(torch.where(right, logits, -logits)).sum()
        rest, other, left_out = soften(rows, right)
        target = rest * right + other
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return loss.masked_fill(left_out, 0.0).sum()

    return _sum_by_rows(chunk_sum, query_QF, chunk)


def _sum_by_rows(chunk_sum: Mask, query_QF: Tensor, chunk: int) -> Tensor:
    """Rows are independent: beyond `chunk` of them each chunk is recomputed in the backward pass, so that no scores of
    more than one live at a time."""
    chunks = torch.arange(len(query_QF), device=query_QF.device).split(chunk)
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.stack([chunk_sum(rows) for rows in chunks]).sum()
    sums = [recompute(chunk_sum, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    return torch.stack(sums).sum()


# ---- objectives --------------------------------------------------------------------------------------------------


class Contrastive(Objective):
    """Symmetric InfoNCE between two modalities (arXiv:2103.00020) over the whole effective batch."""

    scope = "batch"

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int,
                 settings: TrainingConfig | None = None):
        super().__init__(model, inputs, num_speakers)
        assert len(self.inputs) == 2, f"contrast needs two modalities, got {self.inputs}"
        self.settings = settings or TrainingConfig()

    def count(self, step: Step) -> float:
        return 1.0 if step.num_rows(self.inputs[0]) > 1 else 0.0

    def loss(self, step: Step) -> SumAndParts:
        query, key = (step.features(name) for name in self.inputs)
        likeness = Likeness.of(step.batch, self.settings)
        loss = self._compare(step, query, key, positives_of(step.batch, self.inputs).to(step.to_device),
                             likeness and likeness.to(step.to_device))
        return loss, {f"contrastive_{'_'.join(self.inputs)}": loss}

    def _compare(self, step: Step, query: Tensor, key: Tensor, positives: Positives,
                 likeness: Likeness | None) -> Tensor:
        scale = pair_scale(step, self.inputs)
        there, back = (None, None) if likeness is None else (likeness.of_samples, likeness.of_captions)
        forward = info_nce(query, key, scale, positives.of_samples, soften=there) / len(query)
        backward = info_nce(key, query, scale, positives.of_captions, soften=back) / len(key)
        return (forward + backward) / 2


class SigmoidContrastive(Contrastive):
    """The pairwise sigmoid loss (arXiv:2303.15343) over the whole effective batch: each pair is classified by itself,
    with a learned bias. The mean over keys of the sum over queries, as there, where both are as many."""

    def _compare(self, step: Step, query: Tensor, key: Tensor, positives: Positives,
                 likeness: Likeness | None) -> Tensor:
        bias = step.model.logit_bias["_".join(self.inputs)]
        total = pairwise_sigmoid(query, key, pair_scale(step, self.inputs), bias, positives.of_samples,
                                 soften=None if likeness is None else likeness.of_samples)
        return total / len(key)


def pair_scale(step: Step, inputs: Sequence[str]) -> Tensor:
    """exp of the pair's learned log-scale; the model bounds it after each update."""
    return step.model.logit_scale["_".join(inputs)].exp()


def loss_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters of the losses of whole batches: each process has their whole gradient, not a share of it."""
    return [*model.logit_scale.values(), *model.logit_bias.values()]


def start_sigmoid(model: Any, effective_batch: int) -> None:
    """Set the initial scale and bias of the sigmoid loss of every pair in `model`.

    The scale is 10; the bias is the log odds that one of `effective_batch` keys is right, about -10 for the batch of
    32,768 in arXiv:2303.15343, which uses -10.
    """
    with torch.no_grad():
        for scale, bias in zip(model.logit_scale.values(), model.logit_bias.values(), strict=True):
            scale.fill_(math.log(10.0))
            bias.fill_(-math.log(max(effective_batch - 1, 1)))
