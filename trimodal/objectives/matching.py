"""Matching: does this pair belong together? Asked of the fusion, about right pairs and hard wrong ones.

Shape suffixes: B samples, Q queries, K keys, D width, F embed_dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.contrastive import CHUNK_ROWS, Mask, pair_scale, positives_of
from trimodal.objectives.step import Step, first_keys, join

HARD_KEY_COLUMN, HARD_QUERY_COLUMN = 62, 63  # columns of the "path" uniforms, behind those of the encoders


def hard_negatives(query_QF: Tensor, key_KF: Tensor, scale: Tensor, positives: Mask,
                   uniform_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one wrong key for each query with probability softmax(similarity) (arXiv:2107.07651), by inverting the
    cumulative distribution at `uniform_Q`; and whether the query has any wrong key. (Q,) int64, (Q,) bool.

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


class Matching(Objective):
    """Binary classification of pairs from the fusion token: right ones, and hard wrong ones drawn by similarity over
    the whole effective batch (arXiv:2107.07651).

    It compares the features that contrast has computed earlier in the step, if it has.
    """

    encodes_others = True

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        self.head = nn.Linear(model.config.preset.dim, 1)

    def count(self, step: Step) -> float:
        return 3.0 * len(step.batch.sample_ids) if len(step.batch.sample_ids) > 1 else 0.0

    @torch.no_grad()
    def negatives(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A wrong key for each sample, a wrong query for each sample's first key, and whether both exist; host."""
        query, key = (step.detached_features(name) for name in self.inputs)
        positives = positives_of(step.batch, self.inputs).to(step.to_device)
        scale, uniform = pair_scale(step, self.inputs), step.to_device(step.batch.noise["path"])
        first = step.to_device(first_keys(step.batch, self.inputs))
        keys, some = hard_negatives(query, key, scale, positives.of_samples, uniform[:, HARD_KEY_COLUMN])
        queries, also = hard_negatives(key[first], query, scale, lambda rows: positives.of_captions(first[rows]),
                                       uniform[:, HARD_QUERY_COLUMN])
        keys, queries, both = torch.stack([keys, queries, (some & also).long()]).cpu()  # the host waits here, once
        return keys, queries, both.bool()

    def micro_batches(self, step: Step) -> Sequence[tuple[Tensor, ...]]:
        """Arguments of `loss` for the samples of each micro-batch: their rows, wrong keys, wrong queries, whether these
        exist, and their first keys."""
        columns = (torch.arange(step.num_rows("fusion")), *self.negatives(step), first_keys(step.batch, self.inputs))
        return [tuple(column[rows] for column in columns) for rows in step.micro_batches("fusion")]

    def loss(self, step: Step, rows: Tensor, keys: Tensor, queries: Tensor, some: Tensor,
             first: Tensor) -> SumAndParts:
        logits = self._pair_logits(step, (rows, queries), (first, keys))
        n = len(rows)
        target = step.to_device(torch.cat([torch.ones(n), torch.zeros(2 * n)]))
        weight = step.to_device(torch.cat([torch.ones(n), some.float(), some.float()]))
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight, reduction="sum")
        right = ((logits > 0) == (target > 0.5)).float().sum()
        return loss, {"matching": loss, "matching_accuracy": right}

    def _pair_logits(self, step: Step, query_rows: tuple[Tensor, Tensor], key_rows: tuple[Tensor, Tensor]) -> Tensor:
        """Of the right and the wrong rows given: pairs (right, right), (right, wrong key), (wrong query, right)."""
        with step.autocast():
            (query, wrong_query), (key, wrong_key) = (
                [step.tokens(name, rows) for rows in sides]
                for name, sides in zip(self.inputs, (query_rows, key_rows), strict=True))
            pairs = {self.inputs[0]: join([query, query, wrong_query]), self.inputs[1]: join([key, wrong_key, key])}
            fused_BD = step.model.fuse(pairs)[0]
        return self.head(fused_BD)[:, 0]
