"""Signs in a stage's figures that something goes wrong: spikes of loss or gradient, a contrast that learns nothing.

What is said is a function of the figures alone, in the order of the steps: no clock, no draw, no device. With its state
in the checkpoints a run that goes on says what an undisturbed one says.

    alarms = Alarms("align", warmup_steps=100)
    for line in alarms.hear(step, "image_text", Figures(loss, norm, {"image_text": (loss, guessing(32, 32))})): ...
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WINDOW = 100  # steps of a task that say what is usual
LEAST = 30  # steps without which nothing is unusual
SPREADS = 8  # robust standard deviations above the median that make a spike
RISE = {"loss": 1.5, "gradient": 5.0}  # times the median that it is above as well: gradients have long tails
SCALE = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
CHANCE_STEPS = 500  # of a contrast after warm-up, before it is said to learn nothing
NEAR_CHANCE = 0.98  # of the loss of guessing: a model that has learnt anything is below


class Figures(NamedTuple):
    """Of one step of one task, all processes together."""

    loss: float
    norm: float  # of the gradient, before clipping
    contrasts: Mapping[str, tuple[float, float]]  # by pair: loss, and that of guessing on this batch


@dataclass
class Series:
    """Recent values of one figure of one task."""

    values: list[float] = field(default_factory=list)
    is_high: bool = False
    quiet_steps: int = 0  # left until it may be spoken of again

    def rises(self, value: float, times: float) -> float | None:
        """Take in a value; the usual one if it is where a spike begins that should be spoken of."""
        usual, limit = 0.0, math.inf
        if len(self.values) >= LEAST:
            usual = statistics.median(self.values)
            spread = SCALE * statistics.median(abs(one - usual) for one in self.values)
            limit = max(usual + SPREADS * spread, times * usual)
        begins = value > limit and not self.is_high and self.quiet_steps == 0
        self.is_high = value > limit
        self.quiet_steps = WINDOW if begins else max(0, self.quiet_steps - 1)
        self.values = [*self.values[1 - WINDOW:], value]
        return usual if begins else None


@dataclass
class Contrast:
    """Recent losses of one pair's contrast, as parts of the loss of guessing."""

    parts: list[float] = field(default_factory=list)
    steps: int = 0
    was_said: bool = False

    def learns_nothing(self, value: float, guess: float) -> bool:
        """Take in a step after warm-up; whether it is time to say, once, that all is as at the start."""
        self.steps += 1
        self.parts = [*self.parts[1 - WINDOW:], value / guess]
        now = not self.was_said and self.steps >= CHANCE_STEPS and statistics.median(self.parts) > NEAR_CHANCE
        self.was_said |= now
        return now


@dataclass
class Alarms:
    """Those of one stage."""

    stage: str = ""
    warmup_steps: int = 0
    steps: int = 0
    series: dict[str, Series] = field(default_factory=dict)  # "loss image_text"
    contrasts: dict[str, Contrast] = field(default_factory=dict)

    def hear(self, step: int, task: str, figures: Figures) -> list[str]:
        """Take in a step whose figures are finite; a line for each thing that a user should know."""
        self.steps += 1
        lines = []
        for name, value in (("loss", figures.loss), ("gradient", figures.norm)):
            usual = self.series.setdefault(f"{name} {task}", Series()).rises(value, RISE[name])
            lines += [_spike(name, task, value, usual)] if usual is not None else []
        if self.steps > self.warmup_steps:
            lines += [_guesses(pair, loss, guess) for pair, (loss, guess) in figures.contrasts.items()
                      if self.contrasts.setdefault(pair, Contrast()).learns_nothing(loss, guess)]
        return [f"[{self.stage}] step {step}: {line}" for line in lines]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "series": {name: vars(one).copy() for name, one in self.series.items()},
                "contrasts": {name: vars(one).copy() for name, one in self.contrasts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.series = {name: Series(**one) for name, one in state["series"].items()}
        self.contrasts = {name: Contrast(**one) for name, one in state["contrasts"].items()}


def _spike(name: str, task: str, value: float, usual: float) -> str:
    figure = f"the loss of {task}" if name == "loss" else f"the norm of the gradient of {task}"
    return (f"{figure} is {value:.4g}, usually {usual:.4g} (median of up to {WINDOW} steps). One such step does no "
            "harm; where the loss stays up, go on from an earlier checkpoint with a lower --lr")


def _guesses(pair: str, loss: float, guess: float) -> str:
    return (f"the contrast of {pair} has learnt nothing in {CHANCE_STEPS} steps or more since warm-up: its loss, "
            f"{loss:.3f}, is that of guessing, {guess:.3f}. Look whether its pairs belong together, then try --lr "
            "times or divided by 3, or a larger effective batch")


def guessing(queries: int, keys: int, right: int | None = None) -> float:
    """Loss of a contrast to which all pairs are alike, so to a model that has learnt nothing.

    Of InfoNCE, the mean of both directions: a uniform choice, however many keys are right for a query. With `right`,
    the number of right pairs, of the pairwise sigmoid loss: the share of right pairs is said of each pair.
    """
    if right is None:
        return (math.log(queries) + math.log(keys)) / 2
    share = right / (queries * keys)
    return queries * sum(-p * math.log(p) for p in (share, 1 - share) if p)
