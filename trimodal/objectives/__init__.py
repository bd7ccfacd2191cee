"""What is learnt: the objectives that a stage of config.yaml names."""

from collections.abc import Sequence
from typing import Any

from trimodal import config
from trimodal.objectives.base import Objective
from trimodal.objectives.contrastive import Contrastive, SigmoidContrastive
from trimodal.objectives.labels import Concepts, Speaker
from trimodal.objectives.masked import Masked
from trimodal.objectives.matching import Matching
from trimodal.objectives.words import MaskedWords, Words

# In the order in which a step computes them: matching compares the features that contrast has computed.
OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "matching": Matching,
    "concepts": Concepts,
    "masked_words": MaskedWords,
    "masked": Masked,
    "speaker": Speaker,
    "words": Words,
}
assert OBJECTIVES.keys() == set(config.OBJECTIVES), "config.py names other objectives"


def build_objective(name: str, model: Any, inputs: Sequence[str], num_speakers: int,
                    training: config.TrainingConfig) -> Objective:
    """The objective of this name; `contrastive` as the settings of training say."""
    if name == "contrastive":
        kind = SigmoidContrastive if training.contrastive_loss == "sigmoid" else Contrastive
        return kind(model, inputs, num_speakers, training)
    return OBJECTIVES[name](model, inputs, num_speakers)
