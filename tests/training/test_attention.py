"""The attention kernel of a run is timed once on a machine, kept with the run, and never changes what plans ask for."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch

from tests.small_runs import SmallRuns
from trimodal.blocks import KERNELS, Block
from trimodal.training import attention, plans
from trimodal.training.planner import DeviceSetup, TaskMeasure, settings_digests
from trimodal.training.run import description
from trimodal.training.stage import active_tasks

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_fastest_kernel_is_timed_once_and_read_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention.times()
    assert found.keys() == set(KERNELS) and all(0 < seconds < 60 for seconds in found.values())
    timed = []

    def times(fastest: str) -> dict[str, float]:
        timed.append(fastest)
        return dict.fromkeys(KERNELS, 1.0) | {fastest: 0.5}

    for fastest in KERNELS:
        monkeypatch.setattr(attention, "times", functools.partial(times, fastest))
        assert attention.choose_kernel(CPU, BF16) == KERNELS[0], "the first one timed"
    assert timed == [KERNELS[0]]
    [place] = json.loads(attention.kernels_file().read_text())
    for damaged in ("not JSON", "[]", json.dumps({place: "gone"})):
        attention.kernels_file().write_text(damaged)
        assert attention.choose_kernel(CPU, BF16) == KERNELS[-1], "timed anew"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", None), ("cuda", BF16), ("cuda", torch.float16)])
def test_nothing_is_timed_where_nothing_is_to_choose(device: str, dtype: torch.dtype | None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "times", lambda: pytest.fail("timed"))
    assert attention.choose_kernel(torch.device(device), dtype) == KERNELS[0]
    assert not attention.kernels_file().exists()


@pytest.mark.parametrize(("kept", "kernel"), [({"attention_kernel": "products"}, "products"), ({}, "float32")])
def test_a_resumed_run_keeps_its_kernel(kept: dict[str, str], kernel: str, small: SmallRuns, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is the fastest by now; that of an earlier release is the only one it had."""
    monkeypatch.setattr(plans, "choose_kernel", lambda *of: "fused")
    run = small.open(tmp_path / "run")
    tasks = {row.name: active_tasks(row, run.data)[0] for row in run.config.stages}
    plans.fit_stages(run, tasks, None)
    assert run.kernel == description(run)["attention_kernel"] == "fused"
    state = {"fits": {name: dataclasses.asdict(fit) for name, fit in run.fits.items()}, "fits_asked": run.fits_asked}
    plans.fit_stages(run, tasks, state | kept)
    assert run.kernel == kernel
    assert {block.kernel for block in run.model.modules() if isinstance(block, Block)} == {kernel}


def test_a_kernel_is_no_setting_but_a_plan_is_of_it(small: SmallRuns, tmp_path: Path) -> None:
    """A checkpoint's fits are used again whatever was measured; the memory planned is that of the kernel."""
    config = small.config(tmp_path / "run")
    setups = [DeviceSetup("cpu", BF16, kernel=kernel) for kernel in KERNELS]
    tasks = {row.name: row.tasks for row in config.stages}
    assert len({json.dumps(settings_digests(config, tasks, setup)) for setup in setups}) == 1
    for setup in setups:
        model = TaskMeasure(config, config.stages[0], config.stages[0].tasks[0], setup).model
        assert {block.kernel for block in model.modules() if isinstance(block, Block)} == {setup.kernel}
