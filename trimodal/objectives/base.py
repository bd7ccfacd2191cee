"""What an objective is, and how an effective batch is learnt from several of them.

The count of an objective is known before its first micro-batch, from masks alone, so that sums divided by the count
over the whole effective batch are exact however the batch is split.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimodal.errors import ConfigError
from trimodal.objectives.step import Step

INPUT_ORDER = ("image", "audio", "text")  # pairs are named image_text, audio_text, image_audio

SumAndParts = tuple[Tensor, dict[str, Tensor]]


class Objective(nn.Module):
    """Something to learn from a step. Its parameters are heads that only its stage needs, never part of the model.

    `inputs`: the modalities that it looks at, in the order of INPUT_ORDER.
    """

    tower = "fusion"  # whose micro-batches it is computed in
    is_of_whole_batch = False  # True: each process's loss is that of all rows; else of its own rows, to be summed
    uses_fusion = False  # encodes in the fusion's micro-batches
    encodes_others = False  # samples whose images and audio other processes have read

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__()
        self.inputs = tuple(sorted(inputs, key=INPUT_ORDER.index))

    def count(self, step: Step) -> float:
        """The number that the loss, summed over the whole effective batch, is divided by; 0: the batch has nothing for
        this objective."""
        raise NotImplementedError

    def micro_batches(self, step: Step) -> Sequence[tuple[Any, ...]]:
        """Arguments of `loss` for each micro-batch, whose graph is freed before the next one is made."""
        return [(rows,) for rows in step.micro_batches(self.tower)]

    def loss(self, step: Step, *micro_batch: Any) -> SumAndParts:
        """Sum of the loss over a micro-batch, and sums by name that are logged."""
        raise NotImplementedError


class Losses(NamedTuple):
    """Weighted loss of an effective batch, None where there was nothing to learn, and its parts by name, without
    graphs. The sum of these over the processes is that of the whole batch."""

    total: Tensor | None
    parts: dict[str, Tensor]


def learn(step: Step, objectives: Iterable[tuple[float, Objective]], backward: Callable[[Tensor], None]) -> Losses:
    """Compute the loss of weighted objectives, and call `backward` on it.

    `backward` is called on the loss of each micro-batch, whose graph is then freed; once, on the sum of all, where the
    objectives share the tokens of the whole batch.

    Raises:
        ConfigError: the stage trains none of the parameters that an objective depends on.
    """
    total, parts, shared = None, dict[str, Tensor](), list[Tensor]()
    for weight, objective in objectives:
        count = objective.count(step)
        if not count:
            continue
        copies = step.world.size if objective.is_of_whole_batch else 1  # each process has the same loss
        for micro_batch in objective.micro_batches(step):
            loss, sums = objective.loss(step, *micro_batch)
            loss = weight / count * loss
            if step.train and not loss.requires_grad:
                raise ConfigError(f"stages.{step.stage}.trainable: {', '.join(sums)} depends on none of the parameters "
                                  "named; name some of its encoders', or leave it out")
            if step.is_whole:
                shared.append(loss)
            else:
                backward(loss)
            share = loss.detach() / copies
            total = share if total is None else total + share
            for name, value in sums.items():
                value = value.detach() / (count * copies)
                parts[name] = parts[name] + value if name in parts else value
    if shared:
        backward(torch.stack(shared).sum())
    return Losses(total, parts)
