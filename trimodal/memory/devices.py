"""Memory and devices: where a run computes and in which numbers, what it took, what to do when it was not enough."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from trimodal.errors import UserError

GIB = 1 << 30
EVALUATION = "evaluation"  # has a fit of its own, beside those of the stages
# Beside all tensors: CUDA's context and libraries; elsewhere Python, torch, compiled kernels and the data read so far.
CONTEXT_GIB = {"cuda": 0.8, "cpu": 1.0, "mps": 1.0}

KNOBS = ("lower training.batch_size, model.size, model.image_size or data.audio_max_s, set model.use_checkpoint: true, "
         "or raise memory.budget_gb if the device has more")

T = TypeVar("T")
MicroBatch = dict[str, int]  # samples in memory at once, by tower


@dataclass(frozen=True)
class Fit:
    """How a stage's steps are made to fit; changes time and memory, never the mathematics."""

    micro_batch: MicroBatch
    recompute: dict[str, int]  # by tower: every n-th block's activations are recomputed; 0: none are
    keep_tokens: bool = False  # of all samples, for the fusion; False: each objective that fuses encodes them again

    def __str__(self) -> str:
        sizes = ", ".join(f"{tower} {size}" for tower, size in self.micro_batch.items())
        again = ", ".join(f"{tower} {n}" for tower, n in self.recompute.items() if n)
        return (f"micro-batch {sizes}" + (f"; recompute of every n-th block: {again}" if again else "")
                + ("; tokens kept" if self.keep_tokens else ""))


# ---------------------------------------------------------------------------------------------- running out


def is_out_of_memory(error: BaseException) -> bool:
    """True for each way in which devices and libraries say that memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)


def out_of_memory_cause(error: BaseException) -> str:
    """The first words of an error for lack of memory; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    return " ".join(str(error).split())[:100] or type(error).__name__  # Python's own says nothing


_OUT_OF_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says when its workspace cannot be had
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def smaller(fit: Fit, *, may_recompute: bool) -> Fit | None:
    """Half the micro-batch of every tower, at least 1; then recompute of every block; then no tokens kept; None where
    nothing is left.

    Leave the `except` block before the step is redone: the error's traceback keeps the tensors of the failed one alive.
    """
    if any(size > 1 for size in fit.micro_batch.values()):
        return replace(fit, micro_batch={tower: max(size // 2, 1) for tower, size in fit.micro_batch.items()})
    if may_recompute and any(n != 1 for n in fit.recompute.values()):
        return replace(fit, recompute=dict.fromkeys(fit.recompute, 1))
    return replace(fit, keep_tokens=False) if fit.keep_tokens else None


def out_of_memory_message(where: str, device: torch.device) -> str:
    """The one line for a run that does not fit at micro-batch 1."""
    peak = peak_gib(device)
    return f"{where}: out of memory on {device} even at micro-batch 1 (peak {peak.gib:.2f} GiB, {peak.kind}); {KNOBS}"


def no_room(device: torch.device, error: BaseException) -> str:
    """What to do when the weights, the optimizer's state or another run's memory leave no room beside a step."""
    return (f"out of memory on {device} ({out_of_memory_cause(error)}): the model and its optimizer need more than is "
            f"free there or in memory.budget_gb; end what else uses it, or {KNOBS}; what was saved is whole, "
            "--resume auto goes on")


def free_cached(device: torch.device) -> None:
    """Give back what the allocator holds for later, before a step is redone with smaller parts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


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


def held_gib(device: torch.device) -> float:
    """The memory in GiB that this process takes now, to be subtracted from a later `peak_gib`: plans do not count it.

    Call it before a model is made, when the memory is that of Python, the libraries and the data read so far. On CUDA
    it is 0, since `peak_gib` counts the allocator's memory alone. Elsewhere it is the resident memory; where the system
    only reports a peak (not Linux), that peak.
    """
    if device.type == "cuda":
        return 0.0
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024 / GIB
    return peak_gib(device).gib


def reset_peak(device: torch.device) -> None:
    """Let `peak_gib` measure from now on. Where it cannot be reset (neither CUDA nor Linux), nothing happens."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident size


def prepare_process() -> None:
    """Set what a process that trains or encodes needs before its first step; the user's own settings stay."""
    keep_few_kernels()
    keep_freed_memory()


def keep_few_kernels() -> None:
    """Let oneDNN (bf16 on CPUs) keep 64 compiled kernels, not 1,024: it compiles one for every number of tokens, a new
    one in each step, and all of them take more than a small model does. Before the first step; the user's own settings
    stay."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its own cache, and torch's in front of it
        os.environ.setdefault(name, "64")


def keep_freed_memory() -> None:
    """Let glibc keep the blocks of up to 32 MiB that a step frees for the next one, until `free_cached`; by itself it
    gives them back to the system, which clears ten thousands of pages anew in each step: up to a third of its time
    (`benchmarks/matmul_share.py`). The user's own settings stay; other C libraries are left alone.
    """
    own = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}
    if own & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # what it comes to by itself; set, since the next line ends that
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # the most that it takes


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def use_deterministic(wanted: bool) -> None:
    """Turn kernels that give the same bits each time on or off. Before the first product on CUDA, since
    cuBLAS reads its workspaces' setting then; the user's own stays."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def cap_allocator(device: torch.device, budget_bytes: int) -> int | None:
    """Make CUDA's allocator refuse more than the budget less the context; bytes of the cap, None on other devices.

    Raises:
        UserError: the driver cannot grow segments, as on some virtual GPUs.
    """
    if device.type != "cuda":
        return None
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        if "not supported" not in str(error):
            raise
        raise UserError(f"{device}: its driver cannot grow the allocator's segments ({str(error).splitlines()[0]}); "
                        "start again with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False") from None
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


def choose_device(name: str = "auto", where: str = "--device") -> torch.device:
    """The device called "auto" (CUDA, else CPU), "cpu", "cuda", "cuda:1" or "mps". `where` names it in messages.

    Raises:
        UserError: unknown, or not in this machine; lists what is.
    """
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    if name == "auto":
        name = "cuda" if "cuda:0" in found else "cpu"
    if name.startswith("cuda"):
        _grow_segments()
    exact = "cuda:0" if name == "cuda" else name
    if exact not in found:
        names = [f"{one} ({torch.cuda.get_device_name(one)})" if one.startswith("cuda") else one for one in found]
        raise UserError(f"{where}: {name!r} is not in this machine; it has {', '.join(names)}, and 'auto' chooses")
    return torch.device(exact)


def _grow_segments() -> None:
    """Let CUDA's allocator grow its segments where they lie, so that freed pieces join again and hardly any memory is
    lost between them. It reads this at its first use; the user's own settings stay. The older name of the setting is
    the one that all versions of torch here obey."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def free_and_total_gib(device: torch.device) -> tuple[float, float]:
    """The free and the total memory of `device` in GiB. For other devices than CUDA it is that of the machine, or of
    the container (cgroup) where its limit is lower."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / GIB, total / GIB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    with contextlib.suppress(OSError, StopIteration):  # Linux alone
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no group, or "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        total = min(total, limit)
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free / GIB, total / GIB


def device_name(device: torch.device) -> str:
    """What the device is called: on CUDA the card's name, which plans are calibrated by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine_file(name: str) -> Path:
    """Where what was measured on this machine is kept for all runs: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimodal-trainer" / name


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
    units = cpu_bf16_units() if device.type == "cpu" else None
    if units:
        return Precision(torch.bfloat16, False, f"bf16: this CPU has {units}")
    lacking = ("this CPU has no bf16 units (AMX, AVX512_BF16)" if device.type == "cpu"
               else f"nothing else is tested on {device.type}")
    return Precision(None, False, f"fp32: {lacking}")


def cpu_bf16_units() -> str | None:
    """Name of the units that multiply bf16 in hardware. oneDNN's own answer is yes on every AVX-512 machine, also where
    bf16 is emulated and far slower than fp32."""
    for name, units in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512_BF16")):
        has_units = getattr(torch.cpu, name, None)  # private, so it may go
        if has_units and has_units():
            return units
    return None
