"""What a run notices about its steps: spikes of the loss or the gradient, a contrastive loss that learns nothing, and
where a step that was not finite first stopped being so.

`Monitor` watches finite steps. What it reports is a function of the figures alone, in the order of the steps: no clock,
no randomness, no device. Its state is in the checkpoints, so a resumed run reports what an undisturbed one reports.

A step that was not finite has changed nothing, so `locate` repeats it, under hooks that find the first module whose
output, or else the first parameter whose gradient, is not finite. The flags of a step are read one step late; if the
step in between has updated the weights, the repetition has those after its update.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimodal.data.batches import Batch
from trimodal.distributed import World
from trimodal.objectives.base import Losses
from trimodal.objectives.contrastive import positives_of
from trimodal.objectives.step import Share, Step
from trimodal.training.tracking import Tracker

# ---- finite steps ------------------------------------------------------------------------------------------------

WINDOW = 100  # recent steps of a task that say what is usual
LEAST = 30  # steps without which nothing is unusual
SPREADS = 8  # robust standard deviations above the median that make a spike
RISE = {"loss": 1.5, "gradient": 5.0}  # times the median that a spike is above as well: gradients have long tails
SCALE = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
CHANCE_STEPS = 500  # of a contrastive loss after warm-up, before it is reported to learn nothing
NEAR_CHANCE = 0.98  # of the loss of guessing: a model that has learnt anything is below


class Figures(NamedTuple):
    """The figures of one step of one task, over all ranks, that the monitor watches."""

    loss: float
    norm: float  # of the gradient, before clipping
    contrasts: Mapping[str, tuple[float, float]]  # by pair: contrastive loss, and that of guessing on this batch


@dataclass
class Series:
    """Recent values of one figure of one task. The names of the fields stand in checkpoints."""

    values: list[float] = field(default_factory=list)
    is_high: bool = False
    quiet_steps: int = 0  # left until the next spike is reported

    def add(self, value: float, rise: float) -> float | None:
        """Take in a value. The usual value (median) if a spike begins that should be reported, else None."""
        usual, limit = 0.0, math.inf
        if len(self.values) >= LEAST:
            usual = statistics.median(self.values)
            spread = SCALE * statistics.median(abs(one - usual) for one in self.values)
            limit = max(usual + SPREADS * spread, rise * usual)
        begins = value > limit and not self.is_high and self.quiet_steps == 0
        self.is_high = value > limit
        self.quiet_steps = WINDOW if begins else max(0, self.quiet_steps - 1)
        self.values = [*self.values[1 - WINDOW:], value]
        return usual if begins else None


@dataclass
class Contrast:
    """Recent contrastive losses of one pair, divided by the loss of guessing. The fields stand in checkpoints."""

    parts: list[float] = field(default_factory=list)
    steps: int = 0
    was_said: bool = False

    def add(self, loss: float, guess: float) -> bool:
        """Take in a step after warm-up; whether to report now, once, that nothing has been learnt."""
        self.steps += 1
        self.parts = [*self.parts[1 - WINDOW:], loss / guess]
        now = not self.was_said and self.steps >= CHANCE_STEPS and statistics.median(self.parts) > NEAR_CHANCE
        self.was_said |= now
        return now


@dataclass
class Monitor:
    """Watches the figures of one stage's finite steps."""

    stage: str = ""
    warmup_steps: int = 0
    steps: int = 0
    series: dict[str, Series] = field(default_factory=dict)  # "loss image_text"
    contrasts: dict[str, Contrast] = field(default_factory=dict)

    def observe(self, step: int, task: str, figures: Figures) -> list[str]:
        """Take in a step; a line for each thing that a user should know."""
        self.steps += 1
        lines = []
        for name, value in (("loss", figures.loss), ("gradient", figures.norm)):
            usual = self.series.setdefault(f"{name} {task}", Series()).add(value, RISE[name])
            if usual is not None:
                what = f"the loss of {task}" if name == "loss" else f"the norm of the gradient of {task}"
                lines.append(f"{what} is {value:.4g}, usually {usual:.4g} (median of up to {WINDOW} steps). One such "
                             "step does no harm; where the loss stays up, go on from an earlier checkpoint with a "
                             "lower --lr")
        for pair, (loss, guess) in figures.contrasts.items() if self.steps > self.warmup_steps else ():
            if self.contrasts.setdefault(pair, Contrast()).add(loss, guess):
                lines.append(f"the contrast of {pair} has learnt nothing in {CHANCE_STEPS} steps or more since "
                             f"warm-up: its loss, {loss:.3f}, is that of guessing, {guess:.3f}. Look whether its pairs "
                             "belong together, then try --lr times or divided by 3, or a larger effective batch")
        return [f"[{self.stage}] step {step}: {line}" for line in lines]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "series": {name: vars(one).copy() for name, one in self.series.items()},
                "contrasts": {name: vars(one).copy() for name, one in self.contrasts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.series = {name: Series(**one) for name, one in state["series"].items()}
        self.contrasts = {name: Contrast(**one) for name, one in state["contrasts"].items()}


def contrasts_of(parts: Mapping[str, float], batch: Batch, loss: str) -> dict[str, tuple[float, float]]:
    """{pair: (contrastive loss of the step, loss of random guessing on this batch)}, for the pairs in `parts`.

    `parts`: losses of the step by name, of which those called contrastive_PAIR are used; `loss`: infonce or sigmoid.
    """
    found = {}
    for name, value in parts.items():
        kind, _, pair = name.partition("_")
        if kind == "contrastive":
            found[pair] = (value, guessing_loss(batch, pair.split("_"), loss))
    return found


def guessing_loss(batch: Batch, inputs: list[str], loss: str) -> float:
    """Contrastive loss of a model that has learnt nothing on this batch, to which all pairs are alike.

    InfoNCE, the mean of both directions: a uniform choice, however many keys are right for a query. The pairwise
    sigmoid loss: the share of right pairs is predicted for each pair.
    """
    queries = keys = len(batch.sample_ids)
    if "text" in inputs:
        assert batch.caption_owner is not None
        keys = len(batch.caption_owner)
    if loss == "infonce":
        return (math.log(queries) + math.log(keys)) / 2
    share = positives_of(batch, inputs).count() / (queries * keys)
    return queries * sum(-p * math.log(p) for p in (share, 1 - share) if p)


# ---- steps that are not finite ------------------------------------------------------------------------------------

WHERE = {"": "", "sounds": "in sounds of the batch itself", "weights": "in the weights {}",
         "output": "first in the output of {}", "gradient": "first in the gradient of {}",
         "loss": "in the loss, though the outputs of all modules are finite", "unknown": "where cannot be told ({})"}
SHOWN = 3  # samples named in a line


class Inputs(NamedTuple):
    """The task and batches that a step was computed from; references, no copies."""

    task: int
    own: Batch  # that this process has read
    whole: Batch  # the effective batch
    share: Share | None


@dataclass
class Finding:
    """Where a step first stops being finite, and for which samples."""

    kind: str  # a key of WHERE; "": everything is finite
    name: str  # fills the {} of that sentence
    keys: list[str]  # of the samples concerned; of all samples where that is not known


def locate(step: Step, objectives: nn.ModuleDict, inputs: Inputs,
           repeat: Callable[[], Losses]) -> Finding:
    """Find where a step stops being finite. `repeat` computes `step` and its gradients, which stay, again."""
    modules = nn.ModuleDict({"model": step.model, "objectives": objectives})
    with watch(modules) as seen:
        losses = repeat()
    sounds = [] if inputs.own.audio is None else [
        key for key, sound_TM in zip(inputs.own.keys, inputs.own.audio, strict=True) if not is_finite(sound_TM)]
    if sounds:
        return Finding("sounds", "", sounds)
    weight = next((name for name, p in modules.named_parameters() if not is_finite(p)), None)
    if weight is not None:
        return Finding("weights", weight, inputs.own.keys)
    if not seen and not all(is_finite(one) for one in (losses.total, *losses.parts.values()) if one is not None):
        seen.append(("loss", ""))
    kind, name = seen[0] if seen else ("", "")
    return Finding(kind, name, bad_samples(step, inputs) or inputs.own.keys)


def is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def bad_samples(step: Step, inputs: Inputs) -> list[str]:
    """Keys of this process's samples whose features are not finite."""
    own = inputs.share.rows["fusion"] if inputs.share else range(len(inputs.own.keys))
    rows: set[int] = set()
    for modality, features in step.known_features.items():
        bad = (~features.isfinite().all(1)).nonzero()[:, 0].cpu()
        rows |= set((cast(Tensor, inputs.whole.caption_owner)[bad] if modality == "text" else bad).tolist())
    return [key for row, key in zip(own, inputs.own.keys, strict=True) if row in rows]


@contextlib.contextmanager
def watch(modules: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Collect (kind, name) of what is not finite, the first one first: outputs of modules, then gradients as they are
    computed."""
    seen: list[tuple[str, str]] = []

    def output_hook(name: str) -> Callable[..., None]:
        @torch.no_grad()  # tensors that autograd would keep of this check are missed in the recompute
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            bad = None if seen else next((one for one in floating(output) if not is_finite(one)), None)
            if bad is not None:
                seen.append(("output", f"{name} ({str(bad.dtype).removeprefix('torch.')})"))
        return hook

    def gradient_hook(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not seen and parameter.grad is not None and not is_finite(parameter.grad):
                seen.append(("gradient", name))
        return hook

    handles = [module.register_forward_hook(output_hook(name)) for name, module in modules.named_modules() if name]
    handles += [parameter.register_post_accumulate_grad_hook(gradient_hook(name))
                for name, parameter in modules.named_parameters() if parameter.requires_grad]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def floating(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists and tuples."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, list | tuple):
        for one in output:
            yield from floating(one)


def report_skipped_step(world: World, tracker: Tracker, finding: Finding, facts: Mapping[str, Any],
                        loss_scale: float | None) -> str:
    """Log a step that was not finite, by what all processes have found; its cause in words. `facts`: of the step's
    record. `loss_scale`: of fp16, None elsewhere."""
    findings = world.gather_objects(finding)
    # sounds and outputs are those of one process alone; what others find may follow from them
    order = sorted(findings, key=lambda one: (not one.kind, one.kind not in ("sounds", "output")))
    first, bad = order[0], [part for part, value in facts["parts"].items() if not math.isfinite(value)]
    cause = f"loss part {', '.join(bad)}" if bad else "the gradient, not the loss"
    if first.kind:
        cause += f", {WHERE[first.kind].format(first.name)}"
    else:
        cause += "; done again, with the weights of one step later, it is finite"
        cause += "" if loss_scale is None else f" without the loss scale, now {loss_scale:g}"
    more = f" and {len(first.keys) - SHOWN} more" if len(first.keys) > SHOWN else ""
    tracker.skipped_step(f"[{facts['stage']}] step {facts['step']} skipped: not finite in {cause} "
                         f"(samples {', '.join(first.keys[:SHOWN])}{more})", facts["step"], parts=bad,
                         found=first.kind, name=first.name, samples=first.keys[:SHOWN], of=len(first.keys))
    return cause
