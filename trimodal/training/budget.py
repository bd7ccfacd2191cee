"""Budget: the fastest way to make a stage's steps fit a stated memory, found by measuring them.

A plan is no formula. `measure` runs the real step on fake tensors (shapes without bytes, so a 60 GiB step plans on a
laptop) while `footprint` adds up every storage that lives. What is chosen among, from fast to slow:

1. The whole batch at once, nothing computed twice.
2. The whole batch, with the activations of every 4th, every 2nd or every block of a tower recomputed in the backward
   pass: a quarter, half or all of that tower's forward pass more. As little as fits for all towers alike, then each as
   little as then fits, the costliest first.
3. Parts: a tower encodes micro-batches and recomputes each in the backward pass, one forward pass more; where a stage
   has several objectives, each also encodes anew, since no tokens of the whole batch are kept. The largest micro-batch
   for all towers together, then for each alone, the costliest first: whole if that fits, else as large as fits.
   Where every objective is over single samples, parts cost nothing, and come second.
4. Parts whose blocks are recomputed as well, one more forward pass, where that makes up for parts so small that what
   each call costs by itself counts (`CALL_SAMPLES`), or where not even single samples fit without.

`benchmarks/plan_choice.py` compares a choice with the others that fit, run for real.

A GPU needs more than its tensors: `memory.CONTEXT_GIB` for the driver's context and libraries, and
`FRAGMENTATION_PCT` of what the tensors take for gaps between blocks and kernel workspaces, or what earlier runs on the
same machine have measured (`calibration`). A plan leaves room for both: of 20 GiB, 17.5 are planned.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trimodal.errors import UserError
from trimodal.files import replacing
from trimodal.memory.devices import CONTEXT_GIB, GIB, KNOBS, Fit, MicroBatch, smaller
from trimodal.memory.tracker import TAGS, Usage

FRAGMENTATION_PCT = 10.0
AMPLE_MICRO_BATCH = 256  # larger parts fill the device no better
FINE_MICRO_BATCH = 16  # below this, sizes between the powers of two, and recompute in parts, are tried as well
CALL_SAMPLES = 1.5  # a part costs as much as so many samples more: measured on a CPU (benchmarks/plan_choice.py)
PARTIAL = (4, 2)  # every n-th block: what lies between recomputing none and all

Measure = Callable[[Fit, int | None], Usage | None]  # None: more than that many bytes


class OverBudget(UserError):
    """Nothing fits, not even single samples."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage fits, and the memory that one of its steps is predicted to take."""

    micro_batch: MicroBatch
    recompute: dict[str, int]  # as in Fit
    upper: MicroBatch  # samples of a whole effective batch (of this process); a tower at its upper is encoded once
    peak_bytes: int  # of all tensors
    by_tag: dict[str, int]  # what they are; sums to peak_bytes
    allowance_bytes: int  # context and fragmentation, kept free
    budget_bytes: int
    device: str  # type of device that it is for

    @property
    def fits(self) -> bool:
        return self.peak_bytes + self.allowance_bytes <= self.budget_bytes

    @property
    def fit(self) -> Fit:
        return Fit(dict(self.micro_batch), dict(self.recompute))

    @property
    def in_parts(self) -> tuple[str, ...]:
        """Towers that encode in several parts, and so run forward twice."""
        return tuple(tower for tower, size in self.micro_batch.items() if size < self.upper[tower])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Plan":
        """Raises TypeError, ValueError or AttributeError where `raw` is not what `to_dict` gives."""
        plan = cls(**raw)
        sizes = [*plan.micro_batch.values(), *plan.upper.values()]
        others = [plan.peak_bytes, plan.allowance_bytes, plan.budget_bytes, *plan.recompute.values()]
        if plan.micro_batch.keys() != plan.upper.keys() or not all(type(n) is int for n in sizes + others):
            raise ValueError("not the numbers of a plan")
        if min(sizes) < 1 or min(others) < 0:
            raise ValueError("sizes below 1 or bytes below 0")
        return plan


@dataclass(frozen=True)
class Limits:
    """What a process may take on a type of device."""

    budget_bytes: int
    device: str = "cuda"
    ratio: float | None = None  # bytes that this machine's allocator took of each of the tensors, where it was measured
    held_bytes: int = 0  # of what a run holds beside its steps

    @property
    def tensor_bytes(self) -> int:
        """What is left for tensors beside the context, gaps and workspaces."""
        ratio = 1 + FRAGMENTATION_PCT / 100 if self.ratio is None else self.ratio
        others = int(CONTEXT_GIB[self.device] * GIB) + self.held_bytes
        return int(max(self.budget_bytes - others, 0) / ratio)


def plan_fit(measure: Measure, upper: Mapping[str, int], limits: Limits, *, pinned: int | None = None,
             may_recompute: bool = True, parts_are_free: bool = False) -> Plan:
    """The fastest fit, as the head of this file orders them. Sizes are those of equal parts: 17 to 31 of 32 are two
    parts of 16.

    Args:
        measure: runs a step at a fit; may stop, and return None, once more than the bytes given live. The bytes given
            never rise from call to call; without any, the figure is that of whole steps.
        upper: samples of each tower in an effective batch; the costliest tower first.
        pinned: the user's own micro-batch of all towers.
        may_recompute: whether blocks may be recomputed.
        parts_are_free: no objective looks at the whole batch, so parts are encoded once, as the whole is.

    Raises:
        OverBudget: nothing fits; names the knobs.
    """
    line = aim = limits.tensor_bytes
    while True:
        chosen = _Search(measure, dict(upper), aim, may_recompute, parts_are_free).best(pinned)
        plan = plan_of(chosen, measure, upper, limits)
        if plan.fits or pinned or smaller(chosen, may_recompute=may_recompute) is None:
            break
        aim -= plan.peak_bytes - line  # whole steps take more than the gradients that the search measures
    if not plan.fits:
        auto = "set memory.micro_batch to auto, " if pinned else ""
        raise OverBudget(f"memory.budget_gb: of {limits.budget_bytes / GIB:.3g} GiB, {line / GIB:.2f} are for tensors, "
                         f"but at {chosen} a step takes {plan.peak_bytes / GIB:.2f} ({_by_tag_gib(plan.by_tag)}); "
                         f"{auto}{KNOBS}")
    return plan


def plan_of(fit: Fit, measure: Measure, upper: Mapping[str, int], limits: Limits) -> Plan:
    """The plan that `fit` is, whether it keeps to the budget or not."""
    usage = measure(fit, None)
    assert usage is not None, "a measurement without a limit ends with a figure"
    return Plan(micro_batch=fit.micro_batch, recompute=fit.recompute, upper=dict(upper), peak_bytes=usage.peak_bytes,
                by_tag=usage.by_tag, allowance_bytes=limits.budget_bytes - limits.tensor_bytes,
                budget_bytes=limits.budget_bytes, device=limits.device)


class _Search:
    """Measures one step's fits, each once, until the fastest that stays below the line is found."""

    def __init__(self, measure: Measure, upper: MicroBatch, line_bytes: int, may_recompute: bool,
                 parts_are_free: bool):
        self.measure, self.upper, self.line_bytes = measure, upper, line_bytes
        self.may_recompute, self.parts_are_free = may_recompute, parts_are_free
        self.known: dict[tuple, bool] = {}

    def best(self, pinned: int | None) -> Fit:
        if pinned:
            return self._whole_or_recomputed(self._sizes(pinned)) or self.at(self._sizes(pinned), self._deepest)
        if self.fits(self.at(self.upper, 0)):
            return self.at(self.upper, 0)
        whole = None if self.parts_are_free else self._whole_or_recomputed(self.upper)
        if whole:
            return whole
        found = [self._in_parts(0)]
        if self.may_recompute and (found[0] is None or min(found[0].micro_batch.values()) < FINE_MICRO_BATCH):
            found.append(self._in_parts(1))
        return min(filter(None, found), key=self._cost, default=self.at(self._sizes(1), self._deepest))

    def _cost(self, fit: Fit) -> float:
        """Forward passes of the tower that has most of them (a backward pass counts as two), small parts for more."""
        def passes(tower: str, size: int) -> float:
            in_parts, every = size < self.upper[tower], fit.recompute[tower]
            again = (in_parts and not self.parts_are_free) + (1 / every if every else 0)
            return (3 + again) * (1 + in_parts * CALL_SAMPLES / size)

        return max(passes(tower, size) for tower, size in fit.micro_batch.items())

    @property
    def _deepest(self) -> int:
        return 1 if self.may_recompute else 0

    def _sizes(self, size: int) -> MicroBatch:
        return {tower: _equal_part(size, upper) for tower, upper in self.upper.items()}

    def at(self, sizes: MicroBatch, every: int) -> Fit:
        return Fit(dict(sizes), dict.fromkeys(self.upper, every))

    def fits(self, fit: Fit) -> bool:
        key = (*fit.micro_batch.items(), *fit.recompute.items())
        if key not in self.known:
            self.known[key] = self.measure(fit, self.line_bytes) is not None
        return self.known[key]

    def _whole_or_recomputed(self, sizes: MicroBatch) -> Fit | None:
        """These sizes with as little recompute as fits; None where even all of it is not enough."""
        if self.fits(self.at(sizes, 0)):
            return self.at(sizes, 0)
        alike = [self.at(sizes, every) for every in (*PARTIAL, 1)] if self.may_recompute else []
        fit = next((fit for fit in alike if self.fits(fit)), None)
        if fit is None:
            return None
        for tower in self.upper:
            fit = self._least_recompute(tower, fit) or fit
        return fit

    def _least_recompute(self, tower: str, fit: Fit) -> Fit | None:
        """`fit` with none, else every 4th, else every 2nd block of a tower recomputed; None where none of it fits."""
        def at(every: int) -> Fit:
            return Fit(fit.micro_batch, fit.recompute | {tower: every})

        if self.fits(at(0)):
            return at(0)
        few, many = PARTIAL
        if self.parts_are_free or not self.may_recompute or not self.fits(at(many)):
            return None
        return at(few) if self.fits(at(few)) else at(many)

    def _in_parts(self, every: int) -> Fit | None:
        """The largest power of two for all towers together, then each tower raised by itself. From the top down: what
        does not fit is known long before its step is through."""
        top = min(AMPLE_MICRO_BATCH, max(self.upper.values()))
        fits = (self.at(self._sizes(size), every) for size in _powers_down_from(top))
        start = next((fit for fit in fits if self.fits(fit)), None)
        if start is None:
            return None
        for tower in self.upper:
            start = self._raise(tower, start)
        return start

    def _raise(self, tower: str, fit: Fit) -> Fit:
        """One tower whole, with no or partial recompute; else at a larger power of two; else, where small, at any."""
        upper, now = self.upper[tower], fit.micro_batch[tower]
        if now == upper:
            return fit

        def at(size: int) -> Fit:
            return Fit(fit.micro_batch | {tower: _equal_part(size, upper)}, fit.recompute)

        if whole := self._least_recompute(tower, at(upper)):
            return whole
        larger = [size for size in _powers_down_from(min(AMPLE_MICRO_BATCH, upper)) if size > now]
        now = next((size for size in larger if self.fits(at(size))), now)
        fine = range(min(2 * now, upper) - 1, now, -1) if now < FINE_MICRO_BATCH else range(0)
        return at(next((size for size in fine if self.fits(at(size))), now))


def _powers_down_from(top: int) -> list[int]:
    return [1 << exponent for exponent in reversed(range(top.bit_length()))]


def _equal_part(size: int, upper: int) -> int:
    """The smallest micro-batch that splits `upper` into as many parts as `size` does."""
    parts = -(-upper // min(size, upper))
    return -(-upper // parts)


# ---- printing ----------------------------------------------------------------------------------------------------


def format_plan(plans: Mapping[str, Plan]) -> str:
    """One aligned row for each stage, in GiB; the last lines explain it."""
    header = ["stage", *TAGS, "peak", "allowance", "budget", "micro-batch (of), recompute"]
    rows = [header]
    for name, plan in plans.items():
        figures = [*(plan.by_tag.get(tag, 0) for tag in TAGS), plan.peak_bytes, plan.allowance_bytes, plan.budget_bytes]
        rows.append([name, *(f"{figure / GIB:.2f}" for figure in figures), describe_towers(plan)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]) for row in rows]
    devices = sorted({plan.device for plan in plans.values()})
    context = ", ".join(f"{CONTEXT_GIB[device]} GiB of context on {device}" for device in devices)
    lines.append(f"GiB. Allowance: {context}{', the best weights so far' if 'cpu' in devices else ''}, and gaps and "
                 "workspaces. A tower whose micro-batch is the whole batch is encoded once; one in parts runs forward "
                 "again in the backward pass; /n: so does every n-th block.")
    return "\n".join(lines)


def describe_towers(plan: Plan) -> str:
    """"image 16 (32), audio 32 (32) /2, ...": micro-batch, of how many, and which blocks are recomputed."""
    return ", ".join(f"{tower} {size} ({plan.upper[tower]})" + (f" /{n}" if (n := plan.recompute[tower]) else "")
                     for tower, size in plan.micro_batch.items())


def _by_tag_gib(by_tag: Mapping[str, int]) -> str:
    return ", ".join(f"{tag} {size / GIB:.2f}" for tag, size in by_tag.items() if size)


# ---- keeping -----------------------------------------------------------------------------------------------------


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Digest of `facts` as JSON: the same for tuples and lists."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def plan_key(facts: Mapping[str, Any], sources: Iterable[Path] = ()) -> str:
    """Digest of all that a plan depends on: `facts` as JSON, the code in `sources`, torch's version, this module."""
    digest = hashlib.sha256(fingerprint(facts).encode())
    digest.update(torch.__version__.encode())
    for path in (*sources, Path(__file__)):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()[:32]


def read_plan(folder: str | Path, key: str) -> Plan | None:
    """A plan that `write_plan` kept, or None; a damaged file counts as none, since planning again costs a minute."""
    path = Path(folder) / f"plan_{key}.json"
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        print(f"Plan: {path} is damaged ({type(error).__name__}), so it is made again", file=sys.stderr, flush=True)
        return None


def write_plan(folder: str | Path, key: str, plan: Plan) -> None:
    """Keep `plan` as plan_KEY.json, whole or not at all."""
    _write_json(Path(folder) / f"plan_{key}.json", plan.to_dict())


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        json.dump(value, file, indent=1)


# ---- calibration -------------------------------------------------------------------------------------------------

LEAST_RATIO = 1.02  # an allocator that seemed to waste nothing may do so next time
LEAST_GIB = 2.0  # of a plan; below it the workspaces that every process has, however small its steps, raise the ratio
MANY_RATIOS = 20  # the newest stages' count


def calibration_file() -> Path:
    """Where this machine's ratios are kept for all runs: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimodal-trainer" / "memory_ratios.json"


def _ratios() -> dict[str, list[float]]:
    try:
        found = json.loads(calibration_file().read_text(encoding="utf-8"))
        return {str(name): [float(ratio) for ratio in ratios] for name, ratios in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def calibration(device_name: str) -> float | None:
    """The largest ratio of measured to predicted peak among the newest stages run on devices of this name with this
    torch, at least LEAST_RATIO; None: nothing has been measured here."""
    ratios = _ratios().get(f"{device_name}, torch {torch.__version__}")
    return max(LEAST_RATIO, *ratios) if ratios else None


def calibrate(device_name: str, measured_gib: float, planned_gib: float) -> None:
    """Keep a stage's ratio of measured to predicted peak for later plans, if its folder can be written and the stage
    was large enough to tell."""
    if planned_gib < LEAST_GIB:
        return
    known, name = _ratios(), f"{device_name}, torch {torch.__version__}"
    known[name] = [*known.get(name, []), measured_gib / planned_gib][-MANY_RATIOS:]
    try:
        _write_json(calibration_file(), known)
    except OSError:
        return  # a convenience: the next plan takes the general allowance
