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

    `inputs`: the modalities that it looks at, in the order of INPUT_ORDER. `scope`: what its loss is computed from.
    "tower": the tokens of one tower, one of its micro-batches at a time; "batch": the features of all samples, so that
    each process has the same loss; "fusion": the fusion of tokens of several towers, in the fusion's micro-batches.
    """

    scope = "fusion"
    encodes_others = False  # samples whose images and audio other processes have read

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__()
        self.inputs = tuple(sorted(inputs, key=INPUT_ORDER.index))

    def prepare(self, data: Any) -> None:
        """Take what it needs to know of the data of the run, before the first step."""

    @property
    def towers(self) -> tuple[str, ...]:
        """Towers whose tokens it looks at."""
        return self.inputs

    def count(self, step: Step) -> float:
        """The number that the loss, summed over the whole effective batch, is divided by; 0: the batch has nothing for
        this objective."""
        raise NotImplementedError

    def micro_batches(self, step: Step) -> Sequence[tuple[Any, ...]]:
        """Arguments of `loss` for each micro-batch, whose graph is freed before the next one is made."""
        if self.scope == "batch":
            return [()]
        if self.scope == "tower":
            return [(tower, rows) for tower in self.towers for rows in step.micro_batches(tower)]
        return [(rows,) for rows in step.micro_batches("fusion")]

    def loss(self, step: Step, *micro_batch: Any) -> SumAndParts:
        """Sum of the loss over a micro-batch, and sums by name that are logged."""
        raise NotImplementedError


class Losses(NamedTuple):
    """Weighted loss of an effective batch, None where there was nothing to learn, and its parts by name, without
    graphs. The sum of these over the processes is that of the whole batch."""

    total: Tensor | None
    parts: dict[str, Tensor]


class Term(NamedTuple):
    """An objective that the batch has something for; its loss, summed over the batch, is divided by `total`."""

    objective: Objective
    weight: float
    total: float


def learn(step: Step, objectives: Iterable[tuple[float, Objective]], backward: Callable[[Tensor], None]) -> Losses:
    """Compute the loss of weighted objectives and its gradients, in as many pieces as the step has micro-batches.

    `backward` is called on scalars, each with a graph of its own that is then freed. The towers encode the batch first;
    the losses of whole batches and then those of the fusion's micro-batches leave the gradients of features and tokens
    in the step; at last each micro-batch of a tower passes on what was left for it, together with the losses that look
    at this tower alone. Towers whose rows are one micro-batch go first then, since their graphs wait for it; of these
    the last one, text, whose blocks keep most where those of images and audio are recomputed.

    Raises:
        ConfigError: the stage trains none of the parameters that an objective depends on.
    """
    terms = [Term(objective, weight, total) for weight, objective in objectives if (total := objective.count(step))]
    of_scope = {scope: [term for term in terms if term.objective.scope == scope]
                for scope in ("batch", "fusion", "tower")}
    sums = _Sums(step)
    with step.sharing({tower for term in of_scope["fusion"] for tower in term.objective.towers}):
        if of_scope["batch"]:
            backward(torch.stack([sums.add(term) for term in of_scope["batch"]]).sum())
        for term in of_scope["fusion"]:
            for micro_batch in term.objective.micro_batches(step):
                backward(sums.add(term, *micro_batch))
        for tower in sorted(step.batch.inputs, key=lambda name: (len(step.micro_batches(name)) > 1,
                                                                 -INPUT_ORDER.index(name))):
            local = [term for term in of_scope["tower"] if tower in term.objective.towers]
            for rows in step.micro_batches(tower):
                losses = [*(sums.add(term, tower, rows) for term in local), *step.passed_on(tower, rows)]
                if losses:
                    backward(torch.stack(losses).sum())
                step.forget(tower)
    return Losses(sums.total, sums.parts)


class _Sums:
    """Adds up the loss of a step and its parts."""

    def __init__(self, step: Step):
        self.step = step
        self.total: Tensor | None = None
        self.parts: dict[str, Tensor] = {}

    def add(self, term: Term, *micro_batch: Any) -> Tensor:
        """The weighted loss of one micro-batch, with its graph."""
        found, sums = term.objective.loss(self.step, *micro_batch)
        loss = term.weight / term.total * found
        if self.step.train and not loss.requires_grad:
            raise ConfigError(f"stages.{self.step.stage}.trainable: {', '.join(sums)} depends on none of the "
                              "parameters named; name some of its encoders', or leave it out")
        copies = self.step.world.size if term.objective.scope == "batch" else 1  # each process has the same loss
        share = loss.detach() / copies
        self.total = share if self.total is None else self.total + share
        for name, value in sums.items():
            value = value.detach() / (term.total * copies)
            self.parts[name] = self.parts[name] + value if name in self.parts else value
        return loss
