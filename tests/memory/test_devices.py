"""Running out is recognised and answered, devices are chosen and explained."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.project import ROOT
from tests.refusals import assert_names, refused
from trimodal.errors import UserError
from trimodal.memory import devices
from trimodal.memory.devices import GIB, Fit

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KNOBS = ("training.batch_size", "model.size", "model.image_size", "data.audio_max_s", "model.use_checkpoint",
         "memory.budget_gb")


# ---- running out -------------------------------------------------------------------------------------------------


def test_a_real_failure_of_the_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (MemoryError(), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (ValueError("CUDA error: out of memory"), False),
    (KeyboardInterrupt(), False),
])
def test_only_a_lack_of_memory_counts_as_one(error: BaseException, expected: bool) -> None:
    assert devices.is_out_of_memory(error) is expected


@pytest.mark.parametrize("may_recompute", [True, False])
def test_halving_ends_at_one_then_recomputes_then_names_the_knobs(may_recompute: bool) -> None:
    fit: Fit | None = Fit({"image": 12, "text": 3}, {"image": 0, "text": 2}, keep_tokens=True)
    seen = []
    while fit:
        seen.append((*fit.micro_batch.values(), *fit.recompute.values(), fit.keep_tokens))
        fit = devices.smaller(fit, may_recompute=may_recompute)
    halved = [(12, 3, 0, 2, True), (6, 1, 0, 2, True), (3, 1, 0, 2, True), (1, 1, 0, 2, True)]
    last = [(1, 1, 1, 1, True), (1, 1, 1, 1, False)] if may_recompute else [(1, 1, 0, 2, False)]
    assert seen == halved + last
    assert_names(devices.out_of_memory_message("stages.align", CPU), "stages.align", "cpu", *KNOBS)


LAYERS = """
import torch
from trimodal.memory import devices as memory
if __import__("sys").argv[1] == "few":
    memory.keep_few_kernels()
weight, bias = torch.randn(16, 16).to_mkldnn(), torch.randn(16).to_mkldnn()
with torch.no_grad(), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
    for rows in (1, *range(1, 101), 1):
        torch.nn.functional.linear(torch.zeros(rows, 16).to_mkldnn(), weight, bias)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize(("kept", "compiled"), [("few", 2), ("all", 1)])
def test_kernels_compiled_for_each_number_of_tokens_do_not_pile_up(kept: str, compiled: int) -> None:
    """oneDNN says what it compiles: that of one row again after those of 100 others, though not at once."""
    settings = {name: value for name, value in os.environ.items()
                if name not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")}
    said = subprocess.run([sys.executable, "-c", LAYERS, kept], cwd=ROOT, env=settings,
                          capture_output=True, text=True, check=True).stdout
    made = [line.split(",") for line in said.splitlines() if ",create:cache_" in line and ",reorder," not in line]
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("what oneDNN compiles, and says of it, is known on Linux and x86-64 only")
    assert len({shapes for *_, shapes, _ in made}) == 100
    of_one_row = [line[3] for line in made if line[-2] == made[0][-2]]
    assert of_one_row.count("create:cache_miss") == compiled


FAULTS = """
import resource, torch
from trimodal.memory import devices
devices.keep_freed_memory()
cpu, mib_pages = torch.device("cpu"), 2**20 // resource.getpagesize()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.ones(2**22) for _ in range(8)]  # of 16 MiB
step()
step()
before = faults()
for _ in range(4):
    step()
print((faults() - before) / mib_pages, devices.held_gib(cpu) * 1024)
devices.free_cached(cpu)
print(devices.held_gib(cpu) * 1024)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_freed_memory_is_used_again_until_it_is_given_back() -> None:
    """Of 128 MiB made four times, hardly a page is new to the process."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env=settings, capture_output=True, text=True,
                          check=True).stdout
    faulted_mib, held_mib, left_mib = map(float, said.split())
    assert faulted_mib < 64 and held_mib - left_mib > 100


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_the_peak_of_the_process_rises_and_starts_anew() -> None:
    devices.reset_peak(CPU)
    before = devices.peak_gib(CPU)
    table = torch.ones(GIB // 32)  # 0.125 GiB of float32
    del table
    devices.free_cached(CPU)  # an earlier test may have let it be kept
    assert devices.peak_gib(CPU).gib - before.gib > 0.12
    if Path("/proc/self/clear_refs").exists():
        devices.reset_peak(CPU)
        assert devices.peak_gib(CPU).gib - before.gib < 0.06


def test_the_allocator_is_capped_at_the_budget_less_the_context(monkeypatch) -> None:
    asked = []
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    monkeypatch.setattr(torch, "empty", lambda *given, **named: None)
    assert devices.cap_allocator(CPU, 20 * GIB) is None and not asked
    assert devices.cap_allocator(CUDA, 20 * GIB) == pytest.approx(19.2 * GIB, abs=1)
    assert devices.cap_allocator(CUDA, 80 * GIB) == 24 * GIB
    assert asked == [(pytest.approx(19.2 / 24), CUDA), (1.0, CUDA)]


@pytest.mark.parametrize(("cause", "raised", "named"), [
    ("CUDA driver error: operation not supported\nmore", UserError,
     ("cuda:0", "CUDA driver error: operation not supported", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")),
    ("CUDA error: something else", RuntimeError, ("CUDA error: something else",))])
def test_a_driver_that_cannot_grow_segments_is_one_line(monkeypatch, cause, raised, named) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError(cause)

    monkeypatch.setattr(torch, "empty", fail)
    with refused(*named, error=raised):
        devices.cap_allocator(CUDA, 20 * GIB)


class Seconds:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_clock_tells_waiting_from_working_and_leaves_pauses_out() -> None:
    seconds = Seconds()
    clock = devices.Clock(seconds)

    def slow_loader():
        for batch in range(4):
            seconds.pass_by(1)
            yield batch
        seconds.pass_by(2)

    assert clock.wait_pct == 0
    seconds.pass_by(50)
    for batch in clock.waiting_for(slow_loader()):
        seconds.pass_by(3)
        if batch == 1:
            with clock.paused():
                seconds.pass_by(1000)
    assert clock.wait_s == 4 + 2 and clock.elapsed_s == 4 * (1 + 3) + 2
    assert clock.wait_pct == pytest.approx(100 * 6 / 18)


# ---- devices -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V9")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_devices_with_gpus(two_gpus) -> None:
    assert [str(devices.choose_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0", "cuda:0", "cuda:1", "cpu"]
    with refused("--device", "cuda:2", "cpu", "cuda:0 (Tesla V9)", "cuda:1 (Tesla V9)", "auto"):
        devices.choose_device("cuda:2")


def test_segments_grow_unless_the_user_has_settings_of_the_allocator(two_gpus, monkeypatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what is set in here ends with the test
        monkeypatch.delenv(name)
    devices.choose_device("cpu")
    assert not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    devices.choose_device("cuda:1")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    devices.choose_device()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_deterministic_runs_set_the_workspaces_of_cublas(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    devices.use_deterministic(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    devices.use_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_devices_without_gpus(no_gpu, monkeypatch) -> None:
    assert devices.choose_device() == CPU
    for name in ("cuda", "mps", "tpu", "", "cpu:1"):
        with refused("--device", repr(name), "cpu", "auto"):
            devices.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("mps") == torch.device("mps") and devices.choose_device("auto") == CPU


@pytest.mark.parametrize(("capability", "dtype", "scaler"), [
    ((9, 0), torch.bfloat16, False), ((8, 0), torch.bfloat16, False), ((7, 5), torch.float16, True),
    ((7, 0), torch.float16, True), ((6, 1), None, False)])
def test_precision_follows_the_gpu(two_gpus, monkeypatch, capability, dtype, scaler) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = devices.choose_precision(CUDA, True)
    assert (found.dtype, found.use_scaler) == (dtype, scaler)
    assert_names(found.reason, "Tesla V9", {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[dtype])
    unwanted = devices.choose_precision(CUDA, False)
    assert unwanted.dtype is None and not unwanted.use_scaler
    assert_names(unwanted.reason, "fp32", "training.use_amp")


@pytest.mark.parametrize(("tiles", "dot", "dtype", "named"), [
    (True, True, torch.bfloat16, "AMX"), (True, False, torch.bfloat16, "AMX"),
    (False, True, torch.bfloat16, "AVX512_BF16"), (False, False, None, "fp32")])
def test_a_cpu_takes_bf16_only_with_units_for_it(monkeypatch, tiles, dot, dtype, named) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dot, raising=False)
    found = devices.choose_precision(CPU, True)
    assert found.dtype is dtype and not found.use_scaler
    assert_names(found.reason, named)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert devices.choose_precision(CPU, True).dtype is None, "private names may go: fp32 then"
    assert devices.choose_precision(torch.device("mps"), True).dtype is None
