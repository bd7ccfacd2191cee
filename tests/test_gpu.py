"""On a CUDA device: the mathematics is that of the CPU, the budget is kept, memory really runs out, nothing is lost.

Each of these is skipped, with the reason, where there is no such device.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import model as model_module
from model import open_model
from tests.killing import OFTEN, assert_same, in_process, with_files
from tests.objectives import test_exactness
from tests.objectives.test_exactness import far
from tests.refusals import assert_names, assert_told
from tests.small_runs import RECIPE, SmallRuns, batches, differing, records, step, weights
from tests.test_attention import masks_of, naive_attention
from trimodal.blocks import attend, has_fused_kernel
from trimodal.memory import devices
from trimodal.training import loop, plans, saving, validation
from trimodal.training.run import Options

pytestmark = pytest.mark.gpu
ROOT = Path(model_module.__file__).parent
BF16 = functools.partial(torch.autocast, "cuda", torch.bfloat16)
LARGER = ("model.size=tiny", "model.embed_dim=512", "model.num_classes=1000", "model.vocab_size=30522",
          "model.word_embeddings=random", "model.image_size=224", "training.use_amp=true")  # activations are most


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device in this machine")
    devices.choose_device("cuda")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product of the process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # ratios that other runs have measured change plans
    yield "cuda"
    torch.cuda.set_per_process_memory_fraction(1.0)
    devices.use_deterministic(False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    return SmallRuns(tmp_path_factory.mktemp("shared"), "cuda")


# ---- mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", test_exactness.TASKS)
def test_the_gradient_is_the_same_however_the_batch_is_cut_and_that_of_the_cpu(task: str) -> None:
    """Pictures and sounds are normalised in float32, which rounds otherwise on another device: hence 1e-6 there."""
    whole = test_exactness.gradient(task, torch.float64, 1000, device="cuda")
    on_cpu = test_exactness.gradient(task, torch.float64, 1000)
    assert abs(float(whole["loss"]) - float(on_cpu["loss"])) <= 1e-6 * abs(float(on_cpu["loss"]))
    assert far(whole, on_cpu) <= 1e-6
    for cut in test_exactness.CUTS.values():
        found = test_exactness.gradient(task, torch.float64, cut, device="cuda")
        assert abs(float(found["loss"]) - float(whole["loss"])) <= 1e-9 * abs(float(whole["loss"]))
        assert far(found, whole) <= 1e-9


@pytest.mark.parametrize("task", test_exactness.TASKS)
def test_in_bf16_a_cut_changes_less_than_bf16_itself_does(task: str) -> None:
    exact = test_exactness.gradient(task, torch.float64, 1000)
    whole = test_exactness.gradient(task, torch.float32, 1000, device="cuda", autocast=BF16)
    rounding = far(whole, exact)
    for cut in test_exactness.CUTS.values():
        found = test_exactness.gradient(task, torch.float32, cut, device="cuda", autocast=BF16)
        assert far(found, whole) <= rounding <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
def test_attention_takes_a_fused_kernel_and_is_right(mask: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = given = [torch.randn(3, 2, n, 32, generator=g).to("cuda", dtype).requires_grad_() for n in (7, 9, 9)]
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    valid, upstream = masks_of(mask, 3, 9), torch.randn(3, 2, 7, 32, generator=g).to(dtype)
    ours = attend(q, k, v, None if valid is None else valid.cuda(), "auto")
    plain = naive_attention(exact[0], exact[1], exact[2], valid)
    pairs = [(ours, plain), *zip(torch.autograd.grad(ours, given, upstream.cuda()),
                                 torch.autograd.grad(plain, exact, upstream.double()), strict=True)]
    for one, other in pairs:
        close = 0.01 if dtype == torch.bfloat16 else 1e-5
        assert float((one.detach().cpu().double() - other.detach()).norm()) <= close * float(other.detach().norm())
    assert mask != "empty row" or not ours[2].any()
    mask_B11K = None if valid is None else valid.cuda()[:, None, None, :]
    assert has_fused_kernel(q, k, v, mask_B11K)


# ---- memory ------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_budget_says_what_it_took_and_calibrates_later_plans(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plans, "LEAST_GIB", 0.0)  # these steps are small
    report = small.train(tmp_path / "run", *LARGER, "memory.micro_batch=auto")
    found = json.loads(report.with_suffix(".json").read_text("utf-8"))
    lines = capsys.readouterr().out.splitlines()
    on_device = next(line for line in lines if torch.cuda.get_device_name() in line)
    assert_names(on_device, "cuda:0", "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    for stage in found["stages"]:
        planned = stage["predicted_gib"]
        assert planned < stage["peak_gib"] < 1.1 * planned + 0.3, "tensors, gaps and workspaces"
        assert stage["peak_gib"] + devices.CONTEXT_GIB["cuda"] <= 4
        figures = f"{planned:.2f} GiB", f"{stage['peak_gib']:.2f} GiB"
        assert [line for line in lines if f"[{stage['stage']}]" in line and all(one in line for one in figures)]
    ratios = json.loads(plans.calibration_file().read_text("utf-8"))[name]
    assert plans.calibration(torch.cuda.get_device_name()) == max(plans.LEAST_RATIO, *ratios)
    assert not records(tmp_path / "run", "event"), "nothing ran out"


def peak_of_a_step(small: SmallRuns, folder: Path, micro_batch: int, *overrides: str) -> int:
    run = small.open(folder, *LARGER, *overrides, micro_batch=micro_batch)
    stage = small.stage(run, "finetune")
    devices.free_cached(run.device)
    devices.reset_peak(run.device)
    step(run, stage, batches(run, stage)[0])
    return torch.cuda.max_memory_allocated()


def test_memory_that_really_runs_out_costs_no_step(small: SmallRuns, tmp_path: Path) -> None:
    """The allocator refuses what the whole batch takes; weights are then those of a run that began in parts."""
    same = "training.deterministic=true"
    whole, half = (peak_of_a_step(small, tmp_path / str(size), size, same) for size in (32, 16))
    assert half < 0.9 * whole, "else there is nothing between"
    expected = small.open(tmp_path / "expected", *LARGER, same, micro_batch=16)
    stage = small.stage(expected, "finetune")
    for batch in batches(expected, stage)[:2]:
        step(expected, stage, batch)
    right = {name: value.cpu() for name, value in weights(expected.model).items()}
    del expected, stage
    run = small.open(tmp_path / "capped", *LARGER, same, micro_batch=32)
    stage = small.stage(run, "finetune")
    devices.free_cached(run.device)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((whole + half) / 2 / total)
    for batch in batches(run, stage)[:2]:
        step(run, stage, batch)
    [event] = records(tmp_path / "capped", "event")
    assert_names(event["message"], "finetune", "image 16")
    assert run.fits["finetune"].micro_batch["image"] == 16
    assert differing({name: value.cpu() for name, value in weights(run.model).items()}, right) == []


def test_evaluation_that_runs_out_goes_on_in_smaller_parts(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path / "run", *LARGER)
    run.model.eval()
    devices.free_cached(run.device)
    devices.reset_peak(run.device)
    held = torch.cuda.memory_allocated()
    expected = validation.retrieval_figures(run, validation.encode_validation(run))
    needed = torch.cuda.max_memory_allocated() - held
    devices.free_cached(run.device)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * needed) / total)
    found = validation.retrieval_figures(run, validation.encode_validation(run))
    events = records(tmp_path / "run", "event")
    assert events and all("[evaluation]" in event["message"] for event in events)
    assert max(run.fits["evaluation"].micro_batch.values()) < 64
    assert found.keys() == expected.keys() and len(expected) > 3
    assert all(abs(found[name]["value"] - one["value"]) <= 0.1 for name, one in expected.items()), "rounding alone"


# ---- nothing is lost ---------------------------------------------------------------------------------------------


def test_a_deterministic_run_killed_at_any_place_ends_with_the_same_bits(tmp_path: Path) -> None:
    small = with_files(tmp_path / "shared", "cuda")
    same = "training.deterministic=true", "training.use_amp=true"
    whole = in_process(small, tmp_path / "whole", *same, "training.save_every_minutes=0")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.out").read_text("utf-8")[-3000:]
    for place in ("in pretrain", "before the checkpoint of a step is renamed", "in align", "in validation",
                  "before the best weights are written", "in finetune", "before the final model is written"):
        process = in_process(small, tmp_path / "run", *OFTEN, *same, dies=place)
        process.join()
        said = (tmp_path / "run.out").read_text("utf-8")
        assert process.exitcode == -signal.SIGKILL, f"not {place}: {said[-2000:]}"
    process = in_process(small, tmp_path / "run", *OFTEN, *same)
    process.join()
    assert process.exitcode == 0, (tmp_path / "run.out").read_text("utf-8")[-3000:]
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_what_is_saved_while_training_goes_on_is_of_one_moment(small: SmallRuns, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint of a run that saves after each step, in the background, is that of one that saves at once."""
    same = ("training.deterministic=true", "training.keep_checkpoints=100", *OFTEN)
    small.train(tmp_path / "background", *same)
    begin = saving.Saver.__init__

    def at_once(self: saving.Saver, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        self.in_background = False

    monkeypatch.setattr(saving.Saver, "__init__", at_once)
    small.train(tmp_path / "at_once", *same)
    names = sorted(path.name for path in (tmp_path / "at_once" / "checkpoints").glob("*.pt"))
    assert len(names) > 10 and any("_step_" in name for name in names)
    for name in names:
        one, other = (torch.load(tmp_path / folder / "checkpoints" / name) for folder in ("background", "at_once"))
        for part in ("model_state_dict", "stage_state"):
            assert differing(one.get(part), other.get(part)) == [], (name, part)
        assert all(value.device.type == "cpu" for value in one["model_state_dict"].values())


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_and_back(small: SmallRuns, tmp_path: Path) -> None:
    small.train(tmp_path / "run", "training.epochs=1")
    for epochs, place in ((2, "cpu"), (3, "cuda")):
        config = small.config(tmp_path / "run", f"training.epochs={epochs}")
        report = loop.train(config, Options(place, "auto"))
        assert report is not None and json.loads(report.with_suffix(".json").read_text("utf-8"))["best"]


def test_a_model_for_use_gives_the_features_of_the_cpu(small: SmallRuns, tmp_path: Path) -> None:
    small.train(tmp_path / "run", "training.epochs=3")
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "images": [rng.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(5)], "texts": ["a red circle", "low"] * 3,
        "audio": [(rng.normal(0, 0.1, 16_000 * (1 + 12 * (n % 2))), 16_000) for n in range(5)]}
    cpu, cuda, half = (open_model(tmp_path / "run", *way) for way in (("cpu",), ("cuda",), ("auto", "bfloat16")))
    for name, elements in given.items():
        argument: dict[str, Any] = {name: elements}
        expected = cpu.encode(**argument)
        torch.testing.assert_close(cuda.encode(**argument), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(half.encode(**argument), expected, rtol=0, atol=0.05)
    assert cuda.digest == cpu.digest and half.device.type == "cuda"


# ---- the programs ------------------------------------------------------------------------------------------------


def program(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def config(tmp_path: Path) -> str:
    settings: dict[str, Any] = {**RECIPE, "paths": {"data_root": str(tmp_path / "data"),
                                                    "output_dir": str(tmp_path / "out")}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), "utf-8")
    return str(path)


def test_the_doctor_looks_at_the_device(config: str) -> None:
    found = program("run_training.py", "--config", config, "--doctor", "training.use_amp=true")
    assert found.returncode == 0, found.stdout + found.stderr
    assert torch.cuda.get_device_name() in found.stdout


def test_more_processes_than_devices_are_refused_in_one_line(config: str) -> None:
    count = torch.cuda.device_count() + 1
    found = program("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "run_training.py",
                    "--config", config)
    assert found.returncode != 0
    assert_told(next(line for line in found.stderr.splitlines(True) if line.startswith("error: torchrun")), count - 1)
    assert f'File "{ROOT}' not in found.stderr, "torchrun prints a traceback of its own, but none of ours"
