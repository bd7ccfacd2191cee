"""How a stage fits a memory budget: the micro-batches and recompute that are tried, and which of them is taken.

A tower has a list of options, ordered by the forward passes that they cost (`Option.passes`): the whole batch at once
with recompute of no block, of every 4th, every 2nd or all, and micro-batches of 256, 128, ... 1 rows with recompute of
no block or all. The first option at which all towers fit together is taken, or, where there is none, the mixture that
takes least (`least_fit`); then each tower by itself, the costliest first, takes the first option at which the step
still fits. Where a stage fuses, all this is tried with tokens kept first, and without only if no
option fits with them: to encode again for each objective costs more than the smallest micro-batches do.
`benchmarks/plan_choice.py` compares the choice with the others that fit, run for real.

A GPU needs more than its tensors: `CONTEXT_GIB` for the driver's context and libraries, and `FRAGMENTATION_PCT` of the
tensors for gaps between blocks and kernel workspaces, or what earlier runs on the same machine have measured
(`plans.calibration`). A plan leaves room for both: of 20 GiB, 17.5 are planned.
"""

import bisect
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimodal.errors import UserError
from trimodal.memory.devices import CONTEXT_GIB, GIB, KNOBS, Fit, MicroBatch
from trimodal.memory.tracker import Usage

WHOLE = sys.maxsize  # a micro-batch that is the whole batch
SIZES = (256, 128, 64, 32, 16, 12, 8, 6, 4, 3, 2, 1)  # larger micro-batches fill a device no better
RECOMPUTE = (0, 4, 2, 1)  # of every n-th block; 0: of none
CALL_ROWS = 1.5  # a micro-batch costs as much as so many rows more: measured on a CPU (benchmarks/plan_choice.py)
FRAGMENTATION_PCT = 10.0

Measure = Callable[[Fit, int | None], Usage | None]  # peak at a fit; None: more than that many bytes


class OverBudget(UserError):
    """Nothing fits, not even single samples."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage fits, and the memory that one of its steps is predicted to take."""

    micro_batch: MicroBatch
    recompute: dict[str, int]  # as in Fit
    keep_tokens: bool = False  # as in Fit
    upper: MicroBatch  # rows of a whole effective batch (of this process); a tower at its upper is encoded once
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
        return Fit(dict(self.micro_batch), dict(self.recompute), self.keep_tokens)

    @property
    def in_parts(self) -> tuple[str, ...]:
        """Towers that encode in several micro-batches."""
        return tuple(tower for tower, size in self.micro_batch.items() if size < self.upper[tower])


@dataclass(frozen=True)
class Limits:
    """The memory budget of one process, and what of it is not left for the tensors of a step."""

    budget_bytes: int
    device: str = "cuda"
    ratio: float | None = None  # as in DeviceSetup
    held_bytes: int = 0  # of what a run holds beside its steps

    @property
    def tensor_bytes(self) -> int:
        """Bytes left for tensors: the budget less the device context and `held_bytes`, divided by the calibration
        ratio, or by 1 + FRAGMENTATION_PCT % where none was measured."""
        ratio = 1 + FRAGMENTATION_PCT / 100 if self.ratio is None else self.ratio
        others = int(CONTEXT_GIB[self.device] * GIB) + self.held_bytes
        return int(max(self.budget_bytes - others, 0) / ratio)


# ---- choosing ----------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """How a tower may run: rows in memory at once, and every n-th block recomputed (0: none)."""

    size: int
    every: int

    def passes(self, parts_are_free: bool) -> float:
        """Forward passes of the tower in a step: a backward pass counts as two; micro-batches run forward again in it,
        unless `parts_are_free`, as do recomputed blocks; small ones cost more for each row."""
        is_part = self.size != WHOLE
        again = (is_part and not parts_are_free) + (1 / self.every if self.every else 0)
        return (3 + again) * (1 + (CALL_ROWS / self.size if is_part else 0))


def options(pinned: int | None, may_recompute: bool, parts_are_free: bool) -> list[Option]:
    """All options of a tower, from fast to slow. `pinned`: the user's own micro-batch."""
    some = RECOMPUTE if may_recompute else (0,)
    all_or_none = [every for every in some if every in (0, 1)]
    found = [Option(size, every) for size in ([pinned] if pinned else [WHOLE, *SIZES])
             for every in (some if size in (pinned, WHOLE) else all_or_none)]
    return sorted(found, key=lambda option: option.passes(parts_are_free))


def plan_fit(measure: Measure, upper: Mapping[str, int], limits: Limits, *, pinned: int | None = None,
             may_recompute: bool = True, parts_are_free: bool = False, fuses: bool = False) -> Plan:
    """The fastest fit that keeps to the limits, as the head of this file orders them.

    Args:
        measure: runs a step at a fit; may stop, and return None, once more than the bytes given live.
        upper: rows of each tower in an effective batch, the costliest tower first.
        pinned: the user's own micro-batch of all towers.
        may_recompute: whether blocks may be recomputed.
        parts_are_free: no objective looks at the whole batch, so micro-batches are encoded once, as the whole is.
        fuses: some objective reads tokens of the whole batch, which are kept if they fit.

    Raises:
        OverBudget: nothing fits; names the knobs.
    """
    possible, limit = options(pinned, may_recompute, parts_are_free), limits.tensor_bytes
    alike = (with_options(dict.fromkeys(upper, option), upper, Fit({}, {}, keeps))
             for keeps in ((True, False) if fuses else (False,)) for option in possible)
    chosen = next((fit for fit in alike if measure(fit, limit)), None)
    if chosen is None:
        chosen = least_fit(possible, measure, upper)
        refuse_above(limits, plan_of(chosen, measure, upper, limits), pinned)
    for tower in upper:
        chosen = fastest_fit(tower, possible, chosen, upper, lambda fit: measure(fit, limit) is not None)
    return plan_of(chosen, measure, upper, limits)


def refuse_above(limits: Limits, least: Plan, pinned: int | None) -> None:
    """Raises OverBudget where the plan that takes least memory does not keep to the limits."""
    if least.fits:
        return
    advice = "set memory.micro_batch to auto, " if pinned else ""
    tags = ", ".join(f"{tag} {size / GIB:.2f}" for tag, size in least.by_tag.items() if size)
    raise OverBudget(f"memory.budget_gb: of {limits.budget_bytes / GIB:.3g} GiB, {limits.tensor_bytes / GIB:.2f} are "
                     f"for tensors, but the least that a step takes is {least.peak_bytes / GIB:.2f} ({tags}), at "
                     f"{least.fit}; {advice}{KNOBS}")


def fastest_fit(tower: str, possible: Sequence[Option], chosen: Fit, upper: Mapping[str, int],
                fits: Callable[[Fit], bool]) -> Fit:
    """`chosen` with the fastest option of a tower that fits; without recompute of the whole batch where there are more
    than SIZES[0] rows, as many of which take as long, and less memory.

    Of the options for the whole batch each is measured, which ends soon where it does not fit. Parts of equal recompute
    take less the smaller they are: each of these rows of options is bisected.
    """
    faster = list(itertools.takewhile(lambda fit: fit != chosen, (
        with_options({tower: option}, upper, chosen) for option in possible)))
    rows: dict[Option | int, list[int]] = {}
    for place, option in enumerate(possible[:len(faster)]):
        if option != (WHOLE, 1) or upper[tower] <= SIZES[0]:
            rows.setdefault(option if option.size == WHOLE else option.every, []).append(place)
    best = len(faster)
    for row in rows.values():
        row = [place for place in row if place < best]
        first = bisect.bisect_left(row, True, key=lambda place: fits(faster[place]))
        best = row[first] if first < len(row) else best
    return [*faster, chosen][best]


def least_fit(possible: Sequence[Option], measure: Measure, upper: Mapping[str, int]) -> Fit:
    """The fit that takes least memory of all that give each tower some option.

    Recompute of all blocks takes least of a tower's micro-batches of one size, and the smallest micro-batches least of
    all but the whole batch. That may take less still: parts add each its gradients to those before. So these two of
    each tower are tried, in every mixture, with no tokens kept.
    """
    deepest = max(option.every == 1 for option in possible)
    sizes = {max(option.size for option in possible), min(option.size for option in possible)}
    ends = [Option(size, int(deepest)) for size in sorted(sizes)]
    mixtures = (dict(zip(upper, mixture, strict=True)) for mixture in itertools.product(ends, repeat=len(upper)))

    def peak_bytes(fit: Fit) -> int:
        usage = measure(fit, None)
        assert usage is not None, "a measurement without a limit ends with a figure"
        return usage.peak_bytes

    return min((with_options(mixture, upper) for mixture in mixtures), key=peak_bytes)


def with_options(of: Mapping[str, Option], upper: Mapping[str, int], fit: Fit | None = None) -> Fit:
    """`fit` with other options for some towers. Micro-batches are equal parts: 17 to 31 rows of 32 are two of 16."""
    fit = fit or Fit({}, {})
    sizes, every = dict(fit.micro_batch), dict(fit.recompute)
    for tower, option in of.items():
        parts = -(-upper[tower] // min(option.size, upper[tower]))
        sizes[tower], every[tower] = -(-upper[tower] // parts), option.every
    return Fit(sizes, every, fit.keep_tokens)


def plan_of(fit: Fit, measure: Measure, upper: Mapping[str, int], limits: Limits) -> Plan:
    """The plan that `fit` is, whether it keeps to the budget or not."""
    usage = measure(fit, None)
    assert usage is not None, "a measurement without a limit ends with a figure"
    return Plan(**dataclasses.asdict(fit), upper=dict(upper), peak_bytes=usage.peak_bytes, by_tag=usage.by_tag,
                allowance_bytes=limits.budget_bytes - limits.tensor_bytes, budget_bytes=limits.budget_bytes,
                device=limits.device)
