"""Memory: what a training step takes, which micro-batches fit a budget, and what to do when it was not enough.

A plan is no formula. The real step runs on fake CPU tensors (shapes without bytes, so a 60 GB step plans on a laptop)
while `footprint` adds up every storage that lives; the micro-batches are then searched with such runs.

    def run_step(micro_batch):
        with footprint.tracing() as tracker:
            ...build the model, `tracker.watch(model.parameters())`, train two steps...
        return tracker.usage()
    plan = plan_micro_batches(run_step, ("image", "text", "audio"), 20 * GIB, {"image": 32, "text": 32, "audio": 32})

A GPU needs more than its tensors: `CONTEXT_GIB` for the driver's context and libraries, and `FRAGMENTATION_PCT` of what
the tensors take for gaps between blocks and kernel workspaces. A plan leaves room for both: 17.5 of 20 GiB are planned.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from config import UserError
from footprint import TAGS, Usage

GIB = 1 << 30
CONTEXT_GIB = {"cuda": 0.7, "cpu": 0.5, "mps": 0.5}  # CUDA context and libraries; elsewhere Python and torch themselves
FRAGMENTATION_PCT = 10.0
AMPLE_MICRO_BATCH = 256  # larger parts fill the device no better
FINE_MICRO_BATCH = 16  # below this, sizes between the powers of two are tried as well

KNOBS = ("lower training.batch_size, model.size, model.image_size or data.audio_max_s, set model.use_checkpoint: true, "
         "or raise memory.budget_gb if the device has more")

T = TypeVar("T")
MicroBatch = dict[str, int]  # samples in memory at once, by tower


# ---------------------------------------------------------------------------------------------- planning


class OverBudget(UserError):
    """Not even the smallest micro-batch fits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The micro-batches of a stage and the memory that one of its steps is predicted to take."""

    micro_batch: MicroBatch
    upper: MicroBatch  # samples of a whole effective batch; a tower at its upper recomputes nothing
    peak_bytes: int  # of all tensors
    by_tag: dict[str, int]  # what they are; sums to peak_bytes
    allowance_bytes: int  # context and fragmentation, kept free
    budget_bytes: int
    device: str  # type of device that it is for

    @property
    def fits(self) -> bool:
        return self.peak_bytes + self.allowance_bytes <= self.budget_bytes

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Towers that encode in several parts, and so run forward twice."""
        return tuple(tower for tower, size in self.micro_batch.items() if size < self.upper[tower])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Plan":
        return cls(**raw)


def allowance_bytes(budget_bytes: int, device: str) -> int:
    """What a budget keeps free beside tensors: the context, and gaps of FRAGMENTATION_PCT of the tensors."""
    context = int(CONTEXT_GIB[device] * GIB)
    for_tensors = max(budget_bytes - context, 0) / (1 + FRAGMENTATION_PCT / 100)
    return budget_bytes - int(for_tensors)


def plan_micro_batches(run_step: Callable[[MicroBatch], Usage], towers: Sequence[str], budget_bytes: int,
                       upper: Mapping[str, int], device: str = "cuda", pinned: int | None = None) -> Plan:
    """The fastest micro-batches whose step fits the budget, found by running the step.

    First everything at once, which recomputes nothing. If that does not fit, the largest power of two for all towers
    together; then each tower in the order of `towers` (costliest first) is tried whole, which spares its recompute, and
    else raised by itself. Sizes are those of equal parts: 17 to 31 of 32 are two parts of 16.

    Args:
        run_step: measures a step at these micro-batches, for example with `tracing`.
        upper: samples of each tower in an effective batch.
        pinned: the user's own size for all towers; measured, not searched.

    Raises:
        OverBudget: not even micro-batch 1 (or `pinned`) fits; names the knobs.
    """
    line = budget_bytes - allowance_bytes(budget_bytes, device)
    search = _Search(run_step, {tower: upper[tower] for tower in towers}, line)
    chosen = search.all_at(pinned) if pinned else search.best()
    usage = search.usage(chosen)
    plan = Plan(micro_batch=chosen, upper=search.upper, peak_bytes=usage.peak_bytes, by_tag=usage.by_tag,
                allowance_bytes=budget_bytes - line, budget_bytes=budget_bytes, device=device)
    if not plan.fits:
        raise OverBudget(f"memory.budget_gb: of {budget_bytes / GIB:.3g} GiB, {line / GIB:.2f} are for tensors, but at "
                         f"micro-batch {_sizes(chosen)} a step takes {usage.peak_bytes / GIB:.2f} "
                         f"({_by_tag_gib(usage.by_tag)}); {KNOBS}")
    return plan


class _Search:
    """Runs of one step, each combination once."""

    def __init__(self, run_step: Callable[[MicroBatch], Usage], upper: MicroBatch, line_bytes: int):
        self.run_step, self.upper, self.line_bytes = run_step, upper, line_bytes
        self.known: dict[tuple[int, ...], Usage] = {}

    def best(self) -> MicroBatch:
        whole = self.all_at(max(self.upper.values()))
        if self.fits(whole):
            return whole
        powers = _powers_of_two(min(AMPLE_MICRO_BATCH, max(self.upper.values())))
        size = _largest(powers, lambda size: self.fits(self.all_at(size)))
        chosen = self.all_at(size)
        for tower in self.upper:
            chosen = self._raise(tower, chosen)
        return chosen

    def all_at(self, size: int) -> MicroBatch:
        return {tower: _equal_part(size, upper) for tower, upper in self.upper.items()}

    def usage(self, sizes: MicroBatch) -> Usage:
        key = tuple(sizes.values())
        if key not in self.known:
            self.known[key] = self.run_step(dict(sizes))
        return self.known[key]

    def fits(self, sizes: MicroBatch) -> bool:
        return self.usage(sizes).peak_bytes <= self.line_bytes

    def _raise(self, tower: str, chosen: MicroBatch) -> MicroBatch:
        """`chosen` with one tower as large as fits: whole, else a power of two, else, where small, any number."""
        def at(size: int) -> MicroBatch:
            return chosen | {tower: _equal_part(size, self.upper[tower])}

        upper, now = self.upper[tower], chosen[tower]
        if self.fits(at(upper)):
            return at(upper)
        now = _largest([now, *(p for p in _powers_of_two(min(AMPLE_MICRO_BATCH, upper)) if p > now)],
                       lambda size: self.fits(at(size)))
        if now < FINE_MICRO_BATCH:
            now = _largest(range(now, min(2 * now, upper)), lambda size: self.fits(at(size)))
        return at(now)


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of increasing `sizes` that fits, by bisection; the first one is taken for granted."""
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    return sizes[low]


def _powers_of_two(top: int) -> list[int]:
    return [1 << exponent for exponent in range(top.bit_length())]


def _equal_part(size: int, upper: int) -> int:
    """The smallest micro-batch that splits `upper` into as many parts as `size` does."""
    parts = -(-upper // min(size, upper))
    return -(-upper // parts)


def format_plan(plans: Mapping[str, Plan]) -> str:
    """One aligned row for each stage, in GiB; the last line explains the allowance."""
    header = ["stage", *TAGS, "peak", "allowance", "budget", "micro-batch (of)"]
    rows = [header]
    for name, plan in plans.items():
        figures = [*(plan.by_tag.get(tag, 0) for tag in TAGS), plan.peak_bytes, plan.allowance_bytes, plan.budget_bytes]
        sizes = ", ".join(f"{tower} {size} ({plan.upper[tower]})" for tower, size in plan.micro_batch.items())
        rows.append([name, *(f"{figure / GIB:.2f}" for figure in figures), sizes])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]) for row in rows]
    devices = sorted({plan.device for plan in plans.values()})
    context = ", ".join(f"{CONTEXT_GIB[device]} GiB of context on {device}" for device in devices)
    lines.append(f"GiB. Allowance: {context}, and {FRAGMENTATION_PCT:g} % of the tensors for gaps and workspaces. "
                 "A tower whose micro-batch is the whole batch recomputes nothing.")
    return "\n".join(lines)


def plan_key(facts: Mapping[str, Any], sources: Iterable[Path] = ()) -> str:
    """Digest of all that a plan depends on: `facts` as JSON, the code in `sources`, torch's version, this module."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(torch.__version__.encode())
    for path in (*sources, Path(__file__)):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()[:32]


def read_plan(folder: str | Path, key: str) -> Plan | None:
    """A plan that `write_plan` kept, or None; a damaged file counts as none, since planning again costs a minute."""
    try:
        return Plan.from_dict(json.loads((Path(folder) / f"plan_{key}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_plan(folder: str | Path, key: str, plan: Plan) -> None:
    """Keep `plan` as plan_KEY.json, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"plan_{key}.json.tmp{os.getpid()}"
    try:
        temporary.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
        os.replace(temporary, folder / f"plan_{key}.json")
    finally:
        temporary.unlink(missing_ok=True)


def _sizes(micro_batch: MicroBatch) -> str:
    return ", ".join(f"{tower} {size}" for tower, size in micro_batch.items())


def _by_tag_gib(by_tag: Mapping[str, int]) -> str:
    return ", ".join(f"{tag} {size / GIB:.2f}" for tag, size in by_tag.items() if size)


# ---------------------------------------------------------------------------------------------- running out


def is_out_of_memory(error: BaseException) -> bool:
    """True for each way in which devices and libraries say that memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)


_OUT_OF_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says when its workspace cannot be had
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def halve(micro_batch: Mapping[str, int]) -> MicroBatch | None:
    """Half the micro-batch of every tower, at least 1; None where all are at 1 already.

    Leave the `except` block before the step is redone: the error's traceback keeps the tensors of the failed one alive.
    """
    if all(size == 1 for size in micro_batch.values()):
        return None
    return {tower: max(size // 2, 1) for tower, size in micro_batch.items()}


def out_of_memory_message(where: str, device: torch.device) -> str:
    """The one line for a run that does not fit at micro-batch 1."""
    peak = peak_gib(device)
    return f"{where}: out of memory on {device} even at micro-batch 1 (peak {peak.gib:.2f} GiB, {peak.kind}); {KNOBS}"


def free_cached(device: torch.device) -> None:
    """Give back what the allocator holds for later, before a step is redone with smaller parts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


# ---------------------------------------------------------------------------------------------- measuring


class Peak(NamedTuple):
    gib: float
    kind: str  # what was measured


def peak_gib(device: torch.device) -> Peak:
    """The peak since `reset_peak`: on CUDA what the allocator reserved, elsewhere the process's resident memory."""
    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_reserved(device) / GIB, "reserved by the CUDA allocator")
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process held before it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return Peak(int(line.split()[1]) * 1024 / GIB, "resident memory of the process")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB, "resident memory of the process, ever")


def reset_peak(device: torch.device) -> None:
    """Start a new peak. Where the system cannot (not Linux, not CUDA) the peak stays that of the whole run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident size


def cap_allocator(device: torch.device, budget_bytes: int) -> int | None:
    """Make CUDA's allocator refuse more than the budget less the context; bytes of the cap, None on other devices."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    cap = min(max(budget_bytes - int(CONTEXT_GIB["cuda"] * GIB), 0), total)
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    return cap


class Clock:
    """How much of a loop's time goes into waiting for its data, from the first batch on.

    clock = Clock()
    for batch in clock.waiting_for(loader):
        ...train; `with clock.paused():` around what is no training...
    clock.wait_pct
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.wait_s = 0.0
        self._start_s: float | None = None

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        source = iter(batches)
        while True:
            start_s = self.now()
            if self._start_s is None:
                self._start_s = start_s
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.wait_s += self.now() - start_s
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start_s = self.now()
        try:
            yield
        finally:
            if self._start_s is not None:
                self._start_s += self.now() - start_s  # as if the loop had begun later

    @property
    def elapsed_s(self) -> float:
        return 0.0 if self._start_s is None else self.now() - self._start_s

    @property
    def wait_pct(self) -> float:
        elapsed_s = self.elapsed_s
        return 100 * self.wait_s / elapsed_s if elapsed_s else 0.0


# ---------------------------------------------------------------------------------------------- devices


class Precision(NamedTuple):
    dtype: torch.dtype | None  # for autocast; None: no autocast, all in float32
    use_scaler: bool
    reason: str


def choose_device(name: str = "auto") -> torch.device:
    """The device called "auto" (CUDA, else CPU), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        UserError: unknown, or not in this machine; lists what is.
    """
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    if name == "auto":
        name = "cuda" if "cuda:0" in found else "cpu"
    exact = "cuda:0" if name == "cuda" else name
    if exact not in found:
        names = [f"{one} ({torch.cuda.get_device_name(one)})" if one.startswith("cuda") else one for one in found]
        raise UserError(f"--device: {name!r} is not in this machine; it has {', '.join(names)}, and 'auto' chooses")
    return torch.device(exact)


def choose_precision(device: torch.device, use_amp: bool) -> Precision:
    """The fastest number type that the hardware has units for, and one line that says why."""
    if not use_amp:
        return Precision(None, False, "fp32: training.use_amp is false")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if major >= 8:
            return Precision(torch.bfloat16, False, f"bf16: {where}")
        if major == 7:
            return Precision(torch.float16, True, f"fp16 with a loss scaler: {where} has no bf16")
        return Precision(None, False, f"fp32: {where} has neither fast bf16 nor fast fp16")
    units = _cpu_bf16_units() if device.type == "cpu" else None
    if units:
        return Precision(torch.bfloat16, False, f"bf16: this CPU has {units}")
    lacking = ("this CPU has no bf16 units (AMX, AVX512_BF16)" if device.type == "cpu"
               else f"nothing else is tested on {device.type}")
    return Precision(None, False, f"fp32: {lacking}")


def _cpu_bf16_units() -> str | None:
    """Name of the units that multiply bf16 in hardware. oneDNN's own answer is yes on every AVX-512 machine, also where
    bf16 is emulated and far slower than fp32."""
    for name, units in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512_BF16")):
        has_units = getattr(torch.cpu, name, None)  # private, so it may go
        if has_units and has_units():
            return units
    return None
