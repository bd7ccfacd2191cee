"""Plans fit, waste nothing, and take the fast way before the slow one; they are kept, calibrated and printed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory.test_devices import KNOBS
from tests.refusals import assert_names, refused
from trimodal.memory.devices import CONTEXT_GIB, GIB, Fit, MicroBatch
from trimodal.memory.tracker import TAGS, OverLimit, Usage, tracing
from trimodal.training import fitting, planner, plans
from trimodal.training.fitting import Limits, OverBudget, Plan, plan_fit

UPPER = {"image": 4096, "audio": 1024, "text": 4096}
SAMPLE_BYTES = {"image": 20 << 20, "audio": 10 << 20, "text": 1 << 20}
NEVER: dict[str, Any] = {"may_recompute": False}


class Step:
    """A step whose bytes follow the model of recompute: whole towers keep their activations, parts do one by one, and
    beside them the gradients that each adds to those before (`added_bytes`); of a block that is recomputed a twentieth
    is kept, its input."""

    def __init__(self, upper: MicroBatch, base_bytes: int = GIB, added_bytes: dict[str, int] | None = None):
        self.upper, self.base_bytes, self.added_bytes, self.runs = upper, base_bytes, added_bytes or {}, 0

    def __call__(self, fit: Fit, limit_bytes: int | None = None) -> Usage | None:
        self.runs += 1
        total = self.peak_bytes(fit)
        usage = Usage(total, {"parameters": self.base_bytes, "activations": total - self.base_bytes})
        return None if limit_bytes is not None and total > limit_bytes else usage

    def peak_bytes(self, fit: Fit) -> int:
        taken = {t: int(size * SAMPLE_BYTES[t] * (1 - 0.95 / n if (n := fit.recompute[t]) else 1))
                 for t, size in fit.micro_batch.items()}
        kept = sum(taken[t] for t, size in fit.micro_batch.items() if size == self.upper[t])
        part = max((taken[t] + self.added_bytes.get(t, 0) for t, size in fit.micro_batch.items()
                    if size < self.upper[t]), default=0)
        return self.base_bytes + kept + part


def gib(size: float, device: str = "cuda") -> Limits:
    return Limits(int(size * GIB), device)


def planned(budget_gib: float, upper: MicroBatch = UPPER, **options) -> Plan:
    return plan_fit(Step(upper), upper, gib(budget_gib), **options)


# ---- choosing ----------------------------------------------------------------------------------------------------


def test_of_20_gib_on_cuda_17_5_are_planned() -> None:
    assert gib(20).tensor_bytes / GIB == pytest.approx(17.455, abs=0.001)
    assert gib(0.5).tensor_bytes == 0
    assert Limits(20 * GIB, "cuda", 1.02).tensor_bytes / GIB == pytest.approx(18.824, abs=0.001)


def test_everything_at_once_where_it_fits() -> None:
    step = Step({"image": 32, "text": 32})
    plan = plan_fit(step, step.upper, gib(4))
    assert plan.fit == Fit({"image": 32, "text": 32}, {"image": 0, "text": 0}) and plan.in_parts == ()
    assert step.runs == 2, "once to see that it fits, once for what the tensors are"


@pytest.mark.parametrize("budget_gib", [2.0, 2.05, 2.2, 3, 4, 6, 8, 12, 20, 24, 40, 62, 63, 80])
@pytest.mark.parametrize("options", [{}, NEVER], ids=["recompute", "parts alone"])
@pytest.mark.parametrize("upper", [UPPER, {"image": 32, "audio": 32, "text": 32}, {"image": 1000, "text": 7}])
def test_a_plan_fits_and_no_tower_could_be_faster(budget_gib: float, upper: MicroBatch, options: dict) -> None:
    step = Step(upper)
    plan = plan_fit(step, upper, gib(budget_gib), **options)
    assert plan.fits and plan.peak_bytes + plan.allowance_bytes <= plan.budget_bytes and step.runs <= 60
    assert step(plan.fit) == Usage(plan.peak_bytes, plan.by_tag)
    if options:
        assert set(plan.recompute.values()) == {0}
    for tower in upper:
        for option in fitting.options(None, not options, parts_are_free=False):
            other = fitting.with_options({tower: option}, upper, plan.fit)
            if other == plan.fit:
                break
            assert option == (fitting.WHOLE, 1) or step(other, gib(budget_gib).tensor_bytes) is None, (tower, option)


def test_blocks_are_recomputed_before_the_batch_is_cut_and_no_more_than_must_be() -> None:
    upper = {"image": 500, "audio": 500, "text": 500}  # 9.8, 4.9 and 0.5 GiB of activations
    found = {size: planned(size, upper).fit for size in (20, 15, 12, 9, 5, 2)}
    assert all(fit.micro_batch == upper for size, fit in found.items() if size > 2)
    assert found[20].recompute == {"image": 0, "audio": 0, "text": 0}
    assert found[15].recompute == {"image": 4, "audio": 4, "text": 0}, "less than all blocks of one tower"
    assert found[12].recompute == {"image": 2, "audio": 4, "text": 2}
    assert found[9].recompute == {"image": 2, "audio": 1, "text": 0}, "the costliest tower is spared first"
    assert found[5].recompute == {"image": 1, "audio": 1, "text": 0}
    assert found[2].micro_batch["image"] < 500, "in parts where even recompute of all is too much"
    assert planned(15, upper, **NEVER).micro_batch["image"] < 500


def test_parts_that_cost_nothing_come_before_recompute() -> None:
    upper = {"image": 500, "audio": 500, "text": 500}
    assert planned(12, upper).recompute["audio"] == 4
    free = planned(12, upper, parts_are_free=True)
    assert set(free.recompute.values()) == {0} and free.in_parts


def test_tokens_are_kept_unless_no_option_fits_with_them() -> None:
    """To encode again for each objective is slower than any micro-batches."""
    class Fusing(Step):
        def __call__(self, fit: Fit, limit_bytes: int | None = None) -> Usage | None:
            tokens = GIB if fit.keep_tokens else 0
            usage = super().__call__(fit, None)
            assert usage is not None
            total = usage.peak_bytes + tokens
            return None if limit_bytes is not None and total > limit_bytes else Usage(total, usage.by_tag)

    def plan(budget_gib: float) -> Plan:
        return plan_fit(Fusing(UPPER), UPPER, gib(budget_gib), fuses=True)

    assert plan(20).keep_tokens and plan(3.1).keep_tokens and not plan(3.0).keep_tokens
    assert not planned(20).keep_tokens, "no objective reads them"


def test_the_first_tower_is_the_first_to_be_whole() -> None:
    upper = {"image": 500, "text": 1000, "audio": 1000}
    cut = planned(18.2, upper, **NEVER)  # holds image or audio whole, not both
    assert "image" not in cut.in_parts and "audio" in cut.in_parts
    cut = planned(18.2, dict(reversed(upper.items())), **NEVER)
    assert "audio" not in cut.in_parts and "image" in cut.in_parts


def test_parts_are_recomputed_as_well_where_single_samples_do_not_fit() -> None:
    upper = {"image": 4000}
    limits = Limits(int(CONTEXT_GIB["cuda"] * GIB) + int(1.1 * (GIB // 2 + (5 << 20))))
    plan = plan_fit(Step(upper, GIB // 2), upper, limits)
    assert plan.fit == Fit({"image": 4}, {"image": 1}) or plan.fit == Fit({"image": 5}, {"image": 1})


@pytest.mark.parametrize(("room", "every"), [(2, 1), (12, 0)])
def test_small_parts_are_recomputed_for_larger_ones_and_no_others(room: int, every: int) -> None:
    """2 samples at a time, or 40 with one more forward pass; 12 are enough to leave it."""
    upper = {"image": 4000}
    limits = Limits(int(CONTEXT_GIB["cuda"] * GIB) + int(1.1 * (GIB // 2 + (room + 0.5) * SAMPLE_BYTES["image"])))
    plan = plan_fit(Step(upper, GIB // 2), upper, limits)
    assert plan.recompute == {"image": every}
    assert plan.micro_batch["image"] == (room if not every else 32)


def test_parts_are_equal() -> None:
    def part_of(size: int, upper: int) -> int:
        return planned(62, {"text": upper}, pinned=size).micro_batch["text"]

    assert [part_of(size, 32) for size in (1, 7, 11, 15, 16, 31, 32, 99)] == [1, 7, 11, 11, 16, 16, 32, 32]
    for upper in range(1, 60):
        for size in range(1, upper + 1):
            part = part_of(size, upper)
            assert part <= size and -(-upper // part) == -(-upper // size)
            assert part == 1 or -(-upper // (part - 1)) > -(-upper // size), "no smaller one has as few parts"


def test_a_size_of_the_users_own_is_not_searched_for() -> None:
    step = Step(UPPER)
    plan = plan_fit(step, UPPER, gib(20), pinned=64)
    assert plan.micro_batch == {"image": 64, "audio": 64, "text": 64} and step.runs == 2
    with refused("memory.budget_gb", "image 1024", "audio 1024", "text 1024", error=OverBudget):
        planned(18, pinned=1024, **NEVER)
    assert planned(18, pinned=1024).recompute["image"] > 0


def test_a_budget_below_the_smallest_step_names_the_figures_and_the_knobs() -> None:
    """Of 1.5 GiB, 0.64 are for tensors; the smallest step takes 1.02."""
    with refused("memory.budget_gb", "1.5 GiB", "0.64", "image 1", "audio 1", "text 1", "1.02", "parameters 1.00",
                 "activations 0.02", *KNOBS):
        planned(1.5, **NEVER)


@pytest.mark.parametrize("upper", [{"image": 16, "text": 16}, {"image": 5, "audio": 1000, "text": 16}])
@pytest.mark.parametrize("options", [{}, NEVER, {"pinned": 3}], ids=["recompute", "parts alone", "pinned"])
def test_a_budget_is_refused_only_where_no_mixture_of_options_fits(upper: MicroBatch, options: dict) -> None:
    """Of steps whose parts take more than the whole in some towers, as gradients that are added to others do."""
    possible = fitting.options(options.get("pinned"), options.get("may_recompute", True), parts_are_free=False)
    for heavy in itertools.chain.from_iterable(itertools.combinations(upper, n) for n in range(len(upper) + 1)):
        step = Step(upper, added_bytes=dict.fromkeys(heavy, 400 << 20))
        least = min(step.peak_bytes(fitting.with_options(dict(zip(upper, mixture, strict=True)), upper))
                    for mixture in itertools.product(possible, repeat=len(upper)))
        exact = Limits(least + int(CONTEXT_GIB["cpu"] * GIB), "cpu", 1.0)
        assert plan_fit(step, upper, exact, **options).peak_bytes <= least
        with pytest.raises(OverBudget):
            plan_fit(step, upper, dataclasses.replace(exact, budget_bytes=exact.budget_bytes - 1), **options)


def test_a_real_step_is_planned_by_running_it() -> None:
    """A tower of one wide layer: the plan fits, its double does not, and a larger budget gives larger parts."""
    def run_step(fit: Fit, limit_bytes: int | None) -> Usage | None:
        try:
            with tracing(limit_bytes=limit_bytes) as tracker:
                layer = torch.nn.Linear(512, 1 << 16)  # 128 MiB of weights, 0.25 MiB a sample and tensor
                tracker.watch(layer.parameters())
                for _ in range(2):
                    for part in torch.ones(512, 512).split(fit.micro_batch["image"]):
                        layer(part).square().sum().backward()
            return tracker.usage()
        except OverLimit:
            return None

    sizes = []
    for budget_gib in (1.45, 1.6, 2.5):
        plan = plan_fit(run_step, {"image": 512}, gib(budget_gib, "cpu"), **NEVER)
        assert plan.by_tag["parameters"] == 4 * (512 + 1) * (1 << 16) and plan.fits
        sizes.append(plan.micro_batch["image"])
    assert 1 < sizes[0] < sizes[1] < sizes[2] == 512
    assert run_step(Fit({"image": 2 * sizes[0]}, {"image": 0}), gib(1.45, "cpu").tensor_bytes) is None


# ---- keeping and calibrating -------------------------------------------------------------------------------------


def test_plans_survive_json_and_the_cache(tmp_path: Path) -> None:
    plan = planned(8)
    path = tmp_path / "plans" / "plan_k.json"
    assert planner.read_plan(path) is None
    planner.write_plan(path, plan)
    assert planner.read_plan(path) == plan and [file.name for file in path.parent.iterdir()] == [path.name]
    for damaged in ("", "[1]", '{"micro_batch": {}}', path.read_text()[:40]):
        path.write_text(damaged)
        assert planner.read_plan(path) is None, damaged


def test_what_a_machine_has_measured_calibrates_its_later_plans(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.calibration("Some Card") is None
    for ratio in (1.03, 1.06, 1.01):
        plans.calibrate("Some Card", 8 * ratio, 8.0)
    plans.calibrate("Some Card", 0.9, 0.5)  # too small to tell
    assert plans.calibration("Some Card") == pytest.approx(1.06), "the worst of what was seen"
    assert plans.calibration("Another Card") is None
    for _ in range(plans.MANY_RATIOS):
        plans.calibrate("Some Card", 7.2, 8.0)
    assert plans.calibration("Some Card") == plans.LEAST_RATIO, "old ones are forgotten, and none is trusted below"
    plans.calibration_file().write_text("{broken")
    assert plans.calibration("Some Card") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory_ratios.json" / "no folder"))
    (tmp_path / "memory_ratios.json").write_text("")
    plans.calibrate("Some Card", 12.0, 10.0)  # nowhere to write: no error


def test_the_table_of_plans_is_aligned() -> None:
    plan = dataclasses.replace(planned(20, **NEVER), device="cpu")
    recomputing = planned(12, {"image": 500, "audio": 500, "text": 500})
    lines = plans.format_plan({"pretrain": plan, "x": recomputing}).splitlines()
    assert lines[0].split()[:11] == ["stage", *TAGS, "peak", "allowance", "budget", "micro-batch"]
    assert len({line.index("image") for line in lines[1:3]} | {lines[0].index("micro-batch")}) == 1
    cells = lines[1].split()
    assert cells[:2] == ["pretrain", "1.00"] and cells[4] == f"{plan.by_tag['activations'] / GIB:.2f}"
    assert cells[7:10] == [f"{plan.peak_bytes / GIB:.2f}", f"{plan.allowance_bytes / GIB:.2f}", "20.00"]
    assert lines[1].endswith(", ".join(f"{t} {n} ({UPPER[t]})" for t, n in plan.micro_batch.items()))
    assert lines[2].endswith("image 500 (500) /2, audio 500 (500) /4, text 500 (500) /2")
    assert_names(lines[3], "0.8", "cuda", "1.0", "cpu")
