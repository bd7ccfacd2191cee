"""Contrast between two modalities over the whole effective batch: InfoNCE or the pairwise sigmoid loss, and which pairs
are right.

Shape suffixes: B samples, C captions, Q queries, K keys, F embed_dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.step import Step

CHUNK_ROWS = 1024  # rows of a similarity matrix held at once

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


# ---- losses ------------------------------------------------------------------------------------------------------


def info_nce(query_QF: Tensor, key_KF: Tensor, scale: Tensor, positives: Mask, chunk: int = CHUNK_ROWS) -> Tensor:
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


def pairwise_sigmoid(query_QF: Tensor, key_KF: Tensor, scale: Tensor, bias: Tensor, positives: Mask,
                     chunk: int = CHUNK_ROWS) -> Tensor:
    """Sum over all pairs of -log sigmoid(z (scale * similarity + bias)), z = 1 for positives and -1 for all others
    (arXiv:2303.15343). `positives` and `chunk` as in `info_nce`; a query may do without a positive."""
    def chunk_sum(rows: Tensor) -> Tensor:
        logits = scale * query_QF[rows] @ key_KF.T + bias
        return -F.logsigmoid(torch.where(positives(rows), logits, -logits)).sum()

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

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        assert len(self.inputs) == 2, f"contrast needs two modalities, got {self.inputs}"

    def count(self, step: Step) -> float:
        return 1.0 if step.num_rows(self.inputs[0]) > 1 else 0.0

    def loss(self, step: Step) -> SumAndParts:
        query, key = (step.features(name) for name in self.inputs)
        loss = self._compare(step, query, key, positives_of(step.batch, self.inputs).to(step.to_device))
        return loss, {f"contrastive_{'_'.join(self.inputs)}": loss}

    def _compare(self, step: Step, query: Tensor, key: Tensor, positives: Positives) -> Tensor:
        scale = pair_scale(step, self.inputs)
        forward = info_nce(query, key, scale, positives.of_samples) / len(query)
        backward = info_nce(key, query, scale, positives.of_captions) / len(key)
        return (forward + backward) / 2


class SigmoidContrastive(Contrastive):
    """The pairwise sigmoid loss (arXiv:2303.15343) over the whole effective batch: each pair is classified by itself,
    with a learned bias. The mean over keys of the sum over queries, as there, where both are as many."""

    def _compare(self, step: Step, query: Tensor, key: Tensor, positives: Positives) -> Tensor:
        bias = step.model.logit_bias["_".join(self.inputs)]
        total = pairwise_sigmoid(query, key, pair_scale(step, self.inputs), bias, positives.of_samples)
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
