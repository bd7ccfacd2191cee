"""How a split is encoded, in micro-batches: so many rows at a time as the plan says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimodal.blocks import Tokens
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES
from trimodal.data.batches import Batch
from trimodal.memory.micro_batches import MicroBatches


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a split is encoded."""

    device: torch.device
    amp: torch.dtype | None = None  # of autocast; None = float32
    limit: int | None = None  # at most so many samples of each set and kind of inputs, drawn by a fixed seed
    concepts: bool = True  # pictures and sounds also through the fusion, for the classifier's figures
    sizes: Mapping[str, int] = field(default_factory=dict)  # samples at a time by modality; else evaluation.batch_size
    less: Callable[[int, str], None] = lambda size, cause: None  # told when memory ran out: the new size, and why

    def micro_batches(self, size: int) -> MicroBatches:
        """`size`: rows at a time of the modalities that `sizes` does not name."""
        return MicroBatches(self.device, self.amp, {name: self.sizes.get(name, size) for name in MODALITIES}, self.less)


def inputs_of(batch: Batch, modality: str) -> list[Tensor]:
    """What a batch holds of a modality: what its tower reads, or what is kept of a frozen tower's outputs."""
    given = {"image": (batch.images,), "audio": (batch.audio, batch.audio_lengths),
             "text": (batch.input_ids, batch.attention_mask)}
    return [x for x in batch.tokens.get(modality, given[modality]) if x is not None]


def encode(model: Any, batch: Batch, modality: str, inputs: Sequence[Tensor]) -> Tokens:
    """The tokens of some rows of `inputs_of(batch, modality)`."""
    encoder = getattr(model, modality)
    return encoder.adapt(Tokens(*inputs)) if modality in batch.tokens else encoder(*inputs)


def windows_of(model: Any, batch: Batch, modality: str) -> int:
    """Of how many windows a row of a batch is: those of an audio tower, which it encodes one by one."""
    if modality != "audio" or batch.audio is None:
        return 1
    tower = model.towers.get("audio")
    return -(-batch.audio.shape[1] // (tower.input.window_frames if tower else AUDIO_WINDOW_FRAMES))
