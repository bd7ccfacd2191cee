"""Plans fit and waste nothing, running out is recognised and answered, devices are chosen and explained."""

import dataclasses
import json

import pytest
import torch

import memory
from config import UserError
from footprint import TAGS, Usage, tracing
from memory import GIB, MicroBatch, OverBudget, Plan, plan_micro_batches

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
UPPER = {"image": 4096, "text": 4096, "audio": 1024}
SAMPLE_BYTES = {"image": 10 << 20, "text": 1 << 20, "audio": 20 << 20}


class Step:
    """A step whose bytes follow the model of recompute: whole towers keep their activations, parts do one by one."""

    def __init__(self, upper: MicroBatch, base_bytes: int = GIB):
        self.upper, self.base_bytes, self.runs = upper, base_bytes, 0

    def __call__(self, micro_batch: MicroBatch) -> Usage:
        self.runs += 1
        kept = sum(size * SAMPLE_BYTES[t] for t, size in micro_batch.items() if size == self.upper[t])
        part = max((size * SAMPLE_BYTES[t] for t, size in micro_batch.items() if size < self.upper[t]), default=0)
        total = self.base_bytes + kept + part
        return Usage(total, {"parameters": self.base_bytes, "activations": total - self.base_bytes})


def planned(budget_gib: float, upper: MicroBatch = UPPER, **options) -> Plan:
    return plan_micro_batches(Step(upper), tuple(upper), int(budget_gib * GIB), upper, **options)


# ---- plans -------------------------------------------------------------------------------------------------------


def test_of_20_gib_on_cuda_17_5_are_planned() -> None:
    assert (20 * GIB - memory.allowance_bytes(20 * GIB, "cuda")) / GIB == pytest.approx(17.545, abs=0.001)
    assert memory.allowance_bytes(GIB // 2, "cuda") == GIB // 2


def test_everything_at_once_where_it_fits_in_one_run() -> None:
    step = Step({"image": 32, "text": 32})
    plan = plan_micro_batches(step, ("image", "text"), 4 * GIB, step.upper)
    assert plan.micro_batch == {"image": 32, "text": 32} and plan.recomputed == () and step.runs == 1


@pytest.mark.parametrize("budget_gib", [2.0, 2.05, 2.2, 3, 4, 6, 8, 12, 20, 24, 40, 62, 63, 80])
@pytest.mark.parametrize("upper", [UPPER, {"image": 32, "text": 32, "audio": 32}, {"text": 7, "image": 1000}])
def test_a_plan_fits_and_no_tower_could_be_larger(budget_gib: float, upper: MicroBatch) -> None:
    step = Step(upper)
    plan = plan_micro_batches(step, tuple(upper), int(budget_gib * GIB), upper)
    runs = step.runs
    assert plan.fits and plan.peak_bytes + plan.allowance_bytes <= plan.budget_bytes
    assert step(plan.micro_batch) == Usage(plan.peak_bytes, plan.by_tag)
    assert runs <= 20
    line = plan.budget_bytes - plan.allowance_bytes
    for tower, size in plan.micro_batch.items():
        if size < upper[tower]:
            assert step(plan.micro_batch | {tower: upper[tower]}).peak_bytes > line
            larger = 2 * size if size >= memory.FINE_MICRO_BATCH else -(-upper[tower] // (-(-upper[tower] // size) - 1))
            if larger <= memory.AMPLE_MICRO_BATCH:
                assert step(plan.micro_batch | {tower: larger}).peak_bytes > line, (tower, size, larger)


def test_the_first_tower_is_the_first_to_be_whole() -> None:
    upper = {"image": 1000, "text": 1000, "audio": 500}
    budget = 20.0  # holds image or audio whole, not both
    assert "image" not in planned(budget, upper).recomputed and "audio" in planned(budget, upper).recomputed
    turned = dict(reversed(upper.items()))
    assert "audio" not in planned(budget, turned).recomputed and "image" in planned(budget, turned).recomputed


def test_parts_are_equal() -> None:
    assert [memory._equal_part(size, 32) for size in (1, 7, 11, 15, 16, 31, 32, 99)] == [1, 7, 11, 11, 16, 16, 32, 32]
    for upper in range(1, 60):
        for size in range(1, upper + 1):
            part = memory._equal_part(size, upper)
            assert part <= size and -(-upper // part) == -(-upper // size)
            assert part == 1 or -(-upper // (part - 1)) > -(-upper // size), "no smaller one has as few parts"


def test_a_size_of_the_users_own_is_measured_not_searched() -> None:
    step = Step(UPPER)
    plan = plan_micro_batches(step, tuple(UPPER), 20 * GIB, UPPER, pinned=64)
    assert plan.micro_batch == {"image": 64, "text": 64, "audio": 64} and step.runs == 1
    with pytest.raises(OverBudget, match="at micro-batch image 1024, text 1024, audio 1024 a step takes"):
        planned(20, pinned=1024)


def test_a_budget_below_the_smallest_step_names_the_figures_and_the_knobs() -> None:
    with pytest.raises(UserError) as caught:
        planned(1.5)
    assert str(caught.value) == (
        "memory.budget_gb: of 1.5 GiB, 0.73 are for tensors, but at micro-batch image 1, text 1, audio 1 a step takes "
        f"1.02 (parameters 1.00, activations 0.02); {memory.KNOBS}")


def test_a_real_step_is_planned_by_running_it() -> None:
    """A tower of one wide layer: the plan fits, its double does not, and a larger budget gives larger parts."""
    def run_step(micro_batch: MicroBatch) -> Usage:
        with tracing() as tracker:
            layer = torch.nn.Linear(512, 1 << 16)  # 128 MiB of weights, 0.25 MiB a sample and tensor
            tracker.watch(layer.parameters())
            for _ in range(2):
                for part in torch.ones(512, 512).split(micro_batch["image"]):
                    layer(part).square().sum().backward()
        return tracker.usage()

    sizes = []
    for budget_gib in (0.95, 1.1, 2.0):
        plan = plan_micro_batches(run_step, ("image",), int(budget_gib * GIB), {"image": 512}, device="cpu")
        assert plan.by_tag["parameters"] == 4 * (512 + 1) * (1 << 16) and plan.fits
        sizes.append(plan.micro_batch["image"])
    assert 1 < sizes[0] < sizes[1] < sizes[2] == 512
    double = run_step({"image": 2 * sizes[0]})
    plan = plan_micro_batches(run_step, ("image",), int(0.95 * GIB), {"image": 512}, device="cpu", pinned=sizes[0])
    assert plan.fits and double.peak_bytes + plan.allowance_bytes > plan.budget_bytes


def test_plans_survive_json_and_the_cache(tmp_path) -> None:
    plan = planned(8)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    source = tmp_path / "model.py"
    source.write_text("a = 1")
    key = memory.plan_key({"stage": "align", "batch": 32}, [source])
    assert memory.read_plan(tmp_path / "plans", key) is None
    memory.write_plan(tmp_path / "plans", key, plan)
    assert memory.read_plan(tmp_path / "plans", key) == plan
    assert [path.name for path in (tmp_path / "plans").iterdir()] == [f"plan_{key}.json"]
    assert memory.plan_key({"batch": 32, "stage": "align"}, [source]) == key
    assert memory.plan_key({"stage": "align", "batch": 33}, [source]) != key
    source.write_text("a = 2")
    assert memory.plan_key({"stage": "align", "batch": 32}, [source]) != key
    file = tmp_path / "plans" / f"plan_{key}.json"
    for damaged in ("", "[1]", '{"micro_batch": {}}', file.read_text()[:40]):
        file.write_text(damaged)
        assert memory.read_plan(tmp_path / "plans", key) is None, damaged


def test_the_table_of_plans_is_aligned() -> None:
    plan = dataclasses.replace(planned(20), device="cpu")
    lines = memory.format_plan({"pretrain": plan, "x": planned(8)}).splitlines()
    assert lines[0].split()[:11] == ["stage", *TAGS, "peak", "allowance", "budget", "micro-batch"]
    assert len({line.index("image") for line in lines[1:3]} | {lines[0].index("micro-batch")}) == 1
    cells = lines[1].split()
    assert cells[:2] == ["pretrain", "1.00"] and cells[4] == f"{plan.by_tag['activations'] / GIB:.2f}"
    assert cells[7:10] == [f"{plan.peak_bytes / GIB:.2f}", f"{plan.allowance_bytes / GIB:.2f}", "20.00"]
    assert lines[1].endswith(", ".join(f"{t} {n} ({UPPER[t]})" for t, n in plan.micro_batch.items()))
    assert "0.7 GiB of context on cuda" in lines[3] and "on cpu" in lines[3]


# ---- running out -------------------------------------------------------------------------------------------------


def test_a_real_failure_of_the_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


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
    assert memory.is_out_of_memory(error) is expected


def test_halving_ends_at_one_with_a_message_that_names_the_knobs() -> None:
    sizes: MicroBatch | None = {"image": 12, "text": 3, "audio": 1}
    seen = []
    while sizes:
        seen.append(tuple(sizes.values()))
        sizes = memory.halve(sizes)
    assert seen == [(12, 3, 1), (6, 1, 1), (3, 1, 1), (1, 1, 1)]
    text = memory.out_of_memory_message("stage align", CPU)
    assert text.startswith("stage align: out of memory on cpu even at micro-batch 1") and memory.KNOBS in text


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_the_peak_of_the_process_rises_and_starts_anew() -> None:
    memory.reset_peak(CPU)
    before = memory.peak_gib(CPU)
    table = torch.ones(GIB // 16)  # 0.25 GiB of float32
    del table
    assert memory.peak_gib(CPU).gib - before.gib > 0.24
    assert before.kind.startswith("resident memory of the process")
    if "ever" not in before.kind:
        memory.reset_peak(CPU)
        assert memory.peak_gib(CPU).gib - before.gib < 0.1


def test_the_allocator_is_capped_at_the_budget_less_the_context(monkeypatch) -> None:
    asked = []
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    assert memory.cap_allocator(CPU, 20 * GIB) is None and not asked
    assert memory.cap_allocator(CUDA, 20 * GIB) == pytest.approx(19.3 * GIB, abs=1)
    assert memory.cap_allocator(CUDA, 80 * GIB) == 24 * GIB
    assert asked == [(pytest.approx(19.3 / 24), CUDA), (1.0, CUDA)]


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
    clock = memory.Clock(seconds)

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
    assert [str(memory.choose_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UserError, match=r"--device: 'cuda:2' is not in this machine; it has cpu, cuda:0 \(Tesla V9\), "
                                        r"cuda:1 \(Tesla V9\), and 'auto' chooses"):
        memory.choose_device("cuda:2")


def test_devices_without_gpus(no_gpu, monkeypatch) -> None:
    assert memory.choose_device() == CPU
    for name in ("cuda", "mps", "tpu", "", "cpu:1"):
        with pytest.raises(UserError, match="it has cpu, and 'auto' chooses"):
            memory.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert memory.choose_device("mps") == torch.device("mps") and memory.choose_device("auto") == CPU


@pytest.mark.parametrize(("capability", "dtype", "scaler"), [
    ((9, 0), torch.bfloat16, False), ((8, 0), torch.bfloat16, False), ((7, 5), torch.float16, True),
    ((7, 0), torch.float16, True), ((6, 1), None, False)])
def test_precision_follows_the_gpu(two_gpus, monkeypatch, capability, dtype, scaler) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = memory.choose_precision(CUDA, True)
    assert (found.dtype, found.use_scaler) == (dtype, scaler)
    assert "Tesla V9" in found.reason and found.reason.split()[0].strip(":") == {
        torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[dtype]
    assert memory.choose_precision(CUDA, False) == (None, False, "fp32: training.use_amp is false")


@pytest.mark.parametrize(("tiles", "dot", "dtype", "named"), [
    (True, True, torch.bfloat16, "AMX"), (True, False, torch.bfloat16, "AMX"),
    (False, True, torch.bfloat16, "AVX512_BF16"), (False, False, None, "no bf16 units")])
def test_a_cpu_takes_bf16_only_with_units_for_it(monkeypatch, tiles, dot, dtype, named) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dot, raising=False)
    found = memory.choose_precision(CPU, True)
    assert found.dtype is dtype and not found.use_scaler and named in found.reason
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert memory.choose_precision(CPU, True).dtype is None, "private names may go: fp32 then"
    assert memory.choose_precision(torch.device("mps"), True).dtype is None
