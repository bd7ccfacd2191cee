"""Micro-batches of an evaluation: so many rows at a time as the plan says, and fewer once memory has run out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimodal.blocks import Tokens
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES
from trimodal.data.batches import Batch
from trimodal.errors import UserError
from trimodal.memory import devices

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a split is encoded."""

    device: torch.device
    amp: torch.dtype | None = None  # of autocast; None = float32
    limit: int | None = None  # at most so many samples of each set and kind of inputs, drawn by a fixed seed
    concepts: bool = True  # pictures and sounds also through the fusion, for the classifier's figures
    sizes: Mapping[str, int] = field(default_factory=dict)  # samples at a time by modality; else evaluation.batch_size
    less: Callable[[int, str], None] = lambda size, cause: None  # told when memory ran out: the new size, and why


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


class MicroBatches:
    """Does work on so many rows of a modality at a time; out of memory halves that for all that follows."""

    def __init__(self, setting: Setting, size: int):
        """`size`: rows at a time of the modalities that `setting.sizes` does not name."""
        self.setting = setting
        self.size = {name: setting.sizes.get(name, size) for name in MODALITIES}

    def of(self, names: tuple[str, ...], rows: int, work: Callable[[slice], T], *, weight: int = 1) -> list[T]:
        """The results of `work` on slices of `rows` rows, in order.

        A row takes as much memory as `weight` rows of each of the modalities `names`, all together.

        Raises:
            UserError: out of memory with one row.
        """
        found: list[T] = []
        start = 0
        while start < rows:
            size = max(1, min(self.size[name] for name in names) // (weight * len(names)))
            try:
                with torch.autocast(self.setting.device.type, self.setting.amp, enabled=self.setting.amp is not None):
                    found.append(work(slice(start, min(start + size, rows))))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                cause = devices.out_of_memory_cause(error)
            # outside of the handler, so that the failed micro-batch's tensors are let go
            devices.free_cached(self.setting.device)
            if size == 1:
                raise UserError(f"evaluation: out of memory with one sample at a time ({cause}); free the device for "
                                "this run, or evaluate with --device cpu")
            self.size = {known: max(1, value // 2) for known, value in self.size.items()}
            self.setting.less(max(self.size.values()), cause)
        return found
