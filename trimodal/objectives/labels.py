"""Objectives over labels: the concepts of a sample, and who speaks.

Shape suffixes: B samples, V classes, F embed_dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.blocks import Tokens
from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.step import Step, first_keys

TEXT_DROP_SHARE = 0.75  # of the samples: their text is hidden from the concept classifier, since it names the concepts
SPEAKER_MARGIN, SPEAKER_SCALE = 0.2, 30.0  # arXiv:1801.07698 with the values usual for VoxCeleb
NO_SPEAKER = -1


class Concepts(Objective):
    """Multi-label classification of the fused features. Most samples are shown without their text, which names the
    concepts; count = labels in the batch, so that long and short label lists weigh alike."""

    def count(self, step: Step) -> float:
        labels_BV = step.batch.concepts
        return float(step.read(labels_BV.sum(), labels_BV.numel())) if step.num_concepts else 0.0

    def loss(self, step: Step, rows: slice) -> SumAndParts:
        """Binary cross-entropy of the micro-batch `rows`, summed over samples and concepts."""
        with step.autocast():
            logits_BV = step.model.fuse(self._fusion_inputs(step, rows))[2]
        target_BV = step.to_device(step.batch.concepts[rows]).to(logits_BV.dtype)
        used = step.num_concepts
        loss = F.binary_cross_entropy_with_logits(logits_BV[:, :used], target_BV[:, :used], reduction="sum")
        return loss, {"concepts": loss}

    def _fusion_inputs(self, step: Step, rows: slice) -> dict[str, Tokens]:
        """Tokens by modality of a micro-batch. Beside another modality, most samples' text tokens are masked."""
        others = [name for name in self.inputs if name != "text"]
        given = {name: step.tokens(name, rows) for name in others}
        if "text" in self.inputs:
            text = step.tokens("text", first_keys(step.batch, self.inputs)[rows])
            uniform_B = step.batch.noise["drop_text"][rows]
            seen_B = uniform_B >= TEXT_DROP_SHARE if others else torch.ones_like(uniform_B).bool()
            seen_B1 = step.to_device(seen_B)[:, None]
            valid_BN = seen_B1.expand(text.tokens_BND.shape[:2]) if text.valid_BN is None else text.valid_BN & seen_B1
            given["text"] = text._replace(valid_BN=valid_BN)
        return given


def margin_logits(features_BF: Tensor, weight_VF: Tensor, labels_B: Tensor) -> Tensor:
    """Cosines of features and class vectors with an additive angular margin on the right class
    (arXiv:1801.07698), times the scale; (B, V)."""
    cosine_BV = features_BF @ F.normalize(weight_VF, dim=1).T
    right = F.one_hot(labels_B, len(weight_VF)).bool()
    angle = cosine_BV.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return SPEAKER_SCALE * torch.where(right, (angle + SPEAKER_MARGIN).clamp(max=math.pi).cos(), cosine_BV)


class Speaker(Objective):
    """Who speaks: an angular-margin softmax on audio_features, so that cosines of features verify speakers."""

    scope = "tower"

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        self.weight = nn.Parameter(torch.randn(max(num_speakers, 1), model.config.embed_dim) * 0.05)

    @property
    def towers(self) -> tuple[str, ...]:
        return ("audio",)

    def count(self, step: Step) -> float:
        """How many samples of the effective batch have a known speaker."""
        speakers_B = step.batch.speakers
        return float(step.read((speakers_B != NO_SPEAKER).sum(), len(speakers_B)))

    def loss(self, step: Step, tower: str, rows: slice) -> SumAndParts:
        """Cross-entropy over the speakers with an angular margin (`margin_logits`), summed over the samples of the
        micro-batch `rows` whose speaker is known."""
        with step.autocast():
            features_BF = step.model.features(tower, step.encode(tower, rows))
        labels_B = step.to_device(step.batch.speakers[rows])
        logits_BV = margin_logits(features_BF, self.weight, labels_B.clamp(min=0))
        loss = F.cross_entropy(logits_BV, labels_B, reduction="sum", ignore_index=NO_SPEAKER)
        return loss, {"speaker": loss}
