"""Plans: true to the real step's bytes, inside the README's budgets, kept, obeyed, printed without any data."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import run_training
from model import TriModalModel
from tests import forked
from tests.refusals import assert_names, refused
from tests.small_runs import STAGES, SmallRuns, batches
from trimodal.config import PRESETS, SIZES, Config, StageConfig, TaskConfig, load_config
from trimodal.errors import UserError
from trimodal.memory.devices import CONTEXT_GIB, GIB, Fit
from trimodal.memory.tracker import TAGS, PeakMemory, Usage
from trimodal.training import fitting, loop, planner
from trimodal.training.fitting import Plan
from trimodal.training.planner import DeviceSetup

CPU, CUDA = DeviceSetup("cpu", None), DeviceSetup("cuda", torch.bfloat16)


WORDS = "{contrastive: 1.0, masked_words: 0.5, words: 0.5}"
MORE = {"words": [f"stages.align.tasks.{task}.objectives={WORDS}" for task in (0, 1)]}  # of other stages than the usual


def tasks_of(row: StageConfig) -> list[planner.TaskConfig]:
    return planner.without_speaker(row.tasks)


def planned(config: Config, name: str, setup: DeviceSetup = CPU) -> Plan:
    row = next(row for row in config.stages if row.name == name)
    return planner.plan_stage(config, row, tasks_of(row), setup)


# ---- the truth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [
    ("pretrain", 16), ("align", 8), ("finetune", 32), ("words", 8),
    *(pytest.param(*case, marks=pytest.mark.repetition) for case in (
        ("pretrain", 4), ("align", 2), ("finetune", 8), ("words", 4)))])
def test_the_prediction_is_the_peak_of_the_real_step(small: SmallRuns, tmp_path: Path, name: str, size: int) -> None:
    """Real batches of full size: captions and sounds are longer than what is read; up to 4 parts, two of
    them traced (with `--all` up to 16). Weights are little of these steps, so what they are is compared as well."""
    run = small.open(tmp_path / "run", "model.vocab_size=200", "model.context_length=10", "training.ema_decay=0.9",
                     f"memory.micro_batch={size}", *MORE.get(name, ()), micro_batch=size)  # more rows than words
    name = "align" if name in MORE else name
    stage = small.stage(run, name)
    found = []
    for task in range(len(stage.tasks)):
        heads = [stage.objectives[f"{task}_{objective}"] for objective in stage.tasks[task].objectives]
        batch = batches(run, stage, task)[0]
        with PeakMemory() as tracker:
            tracker.watch(p for module in (run.model, *heads) for p in module.parameters())
            own = {id(p) for module in (run.model, *heads) for p in module.parameters()}
            tracker.mark("optimizer", [list(state.values()) for p, state in stage.optimizer.state.items()
                                       if id(p) in own], stage.average.values if stage.average else [])
            tracker.mark("data", [v for v in vars(batch).values() if isinstance(v, torch.Tensor)], batch.noise)
            for _ in range(2):
                loop.train_step(run, stage, task, batch)
        found.append(tracker.usage())
    predicted, real = planned(run.config, name), max(found, key=lambda usage: usage.peak_bytes)
    assert predicted.micro_batch == dict.fromkeys(planner.TOWERS, size)
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    for tag in ("parameters", "gradients", "optimizer"):
        assert predicted.by_tag[tag] == real.by_tag[tag], tag


def test_an_average_of_the_weights_is_planned_for(small: SmallRuns, tmp_path: Path) -> None:
    without, with_average = (planned(small.config(tmp_path / "run", f"training.ema_decay={decay}"), "finetune")
                             for decay in (0.0, 0.9))
    weights = without.by_tag["parameters"]
    assert with_average.by_tag["optimizer"] - without.by_tag["optimizer"] == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("setup", [CPU, CUDA], ids=["cpu", "cuda"])
def test_fits_measured_one_after_the_other_take_what_each_takes_alone(small: SmallRuns, tmp_path: Path,
                                                                      setup: DeviceSetup) -> None:
    """To the byte, and after a step that was left at its limit, too."""
    config = small.config(tmp_path / "run", "training.ema_decay=0.9")
    row = next(row for row in config.stages if row.name == "finetune")
    fits = [Fit(dict.fromkeys(planner.TOWERS, size), dict.fromkeys(planner.TOWERS, every))
            for size, every in ((32, 0), (8, 0), (32, 1), (32, 0))]
    alone = [planner.TaskMeasure(config, row, row.tasks[0], setup)(fit) for fit in fits]
    measure = planner.TaskMeasure(config, row, row.tasks[0], setup)
    together = []
    for fit, usage in zip(fits, alone, strict=True):
        assert usage is not None and measure(fit, usage.peak_bytes - 1) is None
        together.append(measure(fit, usage.peak_bytes))
    assert together == alone and len({usage.peak_bytes for usage in alone if usage}) > 1


# ---- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stage"), [
    pytest.param(size, stage, marks=() if stage == "finetune" else pytest.mark.repetition)
    for size in SIZES for stage in ("pretrain", "align", "finetune")])
def test_every_size_trains_in_the_budget_that_the_readme_states(tmp_path: Path, size: str, stage: str) -> None:
    """The default stages on a GPU with bf16, 32 samples an effective batch, 224 pixels, sounds of 10 s."""
    config = load_config(None, [f"model.size={size}", f"paths.output_dir={tmp_path}"])
    assert all(config.effective_batch(row) == 32 for row in config.stages)
    plan = planned(config, stage, CUDA)
    assert plan.fits and plan.peak_bytes + plan.allowance_bytes <= config.budget_gb * GIB
    assert sum(plan.by_tag.values()) == plan.peak_bytes and min(plan.micro_batch.values()) >= 1


@pytest.mark.parametrize(("size", "budget_gb"), [("tiny", 4), ("small", 8), ("base", 12), ("large", 20)])
def test_the_budget_of_a_size_is_the_one_that_the_readme_states(size: str, budget_gb: int) -> None:
    assert load_config(None, [f"model.size={size}"]).budget_gb == PRESETS[size].budget_gb == budget_gb


@pytest.mark.parametrize(("size", "budget_gb"), [("nano", 1), pytest.param("tiny", 4, marks=pytest.mark.repetition)])
def test_a_large_effective_batch_fits_in_parts_of_a_useful_size(tmp_path: Path, size: str, budget_gb: int) -> None:
    config = load_config(None, [f"model.size={size}", f"memory.budget_gb={budget_gb}", f"paths.output_dir={tmp_path}",
                                "stages.align.effective_batch=4096"])
    row = config.stages[1]
    plan = planner.plan_stage(config, row, row.tasks[:1], CUDA)
    assert plan.fits and plan.budget_bytes == budget_gb * GIB
    assert plan.upper["image"] == 4096 and plan.in_parts, "more than fits at once, so some towers go in parts"
    assert all(size >= 16 for size in plan.micro_batch.values())


def test_a_batch_that_waits_on_the_host_takes_nothing_of_a_gpu(small: SmallRuns, tmp_path: Path) -> None:
    """However large it is: 2,048 pictures here are more than all else together."""
    config = small.config(tmp_path / "run", "training.batch_size=2048", "model.image_size=224")
    row, fit = config.stages[1], Fit(dict.fromkeys(planner.TOWERS, 16), dict.fromkeys(planner.TOWERS, 1))
    on_gpu, on_cpu = (planner.TaskMeasure(config, row, row.tasks[0], setup)(fit) for setup in (CUDA, CPU))
    assert on_gpu is not None and on_cpu is not None
    pictures = 2048 * 3 * 224 * 224
    assert on_gpu.by_tag["data"] == 0 and on_gpu.peak_bytes < pictures < on_cpu.by_tag["data"] < on_cpu.peak_bytes


def test_what_a_stage_freezes_takes_neither_gradients_nor_moments(small: SmallRuns, tmp_path: Path) -> None:
    wide = ("model.size=tiny", "model.embed_dim=512")  # weights and activations outweigh the data
    whole = planned(small.config(tmp_path / "run", *wide), "align")
    heads = small.config(tmp_path / "run", *wide, "stages.align.trainable=['projections.*', 'logit_.*']")
    plan = planned(heads, "align")
    trained = sum(p.numel() for name, p in TriModalModel(heads.model).named_parameters()
                  if name.startswith(("projections.", "logit_")))
    assert plan.by_tag["parameters"] == whole.by_tag["parameters"]
    assert plan.by_tag["optimizer"] < 9 * trained < whole.by_tag["optimizer"] / 9
    assert plan.peak_bytes < whole.peak_bytes / 2


def test_on_a_cpu_the_best_weights_so_far_are_in_the_budget(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run", "memory.budget_gb=4")
    weights = sum(p.numel() * p.element_size() for p in TriModalModel(config.model).parameters())
    found = planner.limits(config, DeviceSetup("cpu", None, ratio=1.0)).tensor_bytes
    assert found == 3 * GIB - weights
    on_gpu = planner.limits(config, DeviceSetup("cuda", None, ratio=1.0)).tensor_bytes
    assert on_gpu == 4 * GIB - int(CONTEXT_GIB["cuda"] * GIB)


def test_a_budget_that_nothing_fits_is_one_line(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run", "memory.budget_gb=0.55")
    with refused("memory.budget_gb", "0.55 GiB", "image 32", "memory.micro_batch", error=fitting.OverBudget) as stop:
        planned(config, "finetune")
    assert isinstance(stop.value, UserError)
    smallest = small.config(tmp_path / "run", "memory.budget_gb=0.55", "memory.micro_batch=auto")
    with refused("memory.budget_gb", "0.55 GiB", "image 1", error=fitting.OverBudget) as stop:
        planned(smallest, "finetune")
    assert "memory.micro_batch" not in str(stop.value), "it is auto already"


@pytest.mark.parametrize(("name", "task"), [
    ("align", 0), pytest.param("finetune", 0, marks=pytest.mark.repetition)])
def test_no_mixture_of_a_real_steps_options_takes_less_than_the_least(small: SmallRuns, tmp_path: Path, name: str,
                                                                     task: int) -> None:
    """Eight pairs; the towers whole, in parts of 2 and of 1."""
    config = small.config(tmp_path / "run", "training.batch_size=8", "training.gradient_accumulation_steps=1")
    row = next(row for row in config.stages if row.name == name)
    upper = planner.stage_upper(config, row, CPU)
    kept = planner.StageMeasure(config, row, row.tasks[task:task + 1], CPU)
    towers = ("image", "text", "fusion") if name == "finetune" else ("image", "text")
    possible = [option for option in fitting.options(None, may_recompute=True, parts_are_free=False)
                if option.size in (fitting.WHOLE, 2, 1)]
    mixtures = (dict(zip(towers, mixture, strict=True)) for mixture in itertools.product(possible, repeat=len(towers)))
    whole = dict.fromkeys(upper, fitting.Option(fitting.WHOLE, 0))
    peaks = [usage.peak_bytes for mixture in mixtures
             if (usage := kept(fitting.with_options(whole | mixture, upper), None))]
    least = kept(fitting.least_fit(possible, kept, upper), None)
    assert least is not None and least.peak_bytes == min(peaks) < max(peaks)


# ---- what is obeyed and kept ---------------------------------------------------------------------------------------


def test_plans_are_kept_until_something_that_matters_changes(small: SmallRuns, tmp_path: Path) -> None:
    traced = []

    class Counting(planner.TaskMeasure):
        def __call__(self, fit: Fit, limit_bytes: int | None = None) -> Usage | None:
            traced.append(fit)
            return super().__call__(fit, limit_bytes)

    def plan(*overrides: str) -> tuple[Plan, int]:
        """Of the masked pretraining of texts, and how often a step was traced for it."""
        traced.clear()
        config = small.config(tmp_path / "run", *overrides)
        return planner.plan_stage(config, config.stages[0], config.stages[0].tasks[1:], CPU, kind=Counting), len(traced)

    first, times = plan("memory.micro_batch=16")
    assert times == 1 and first.micro_batch == dict.fromkeys(planner.TOWERS, 16), "a pinned size is not searched for"
    assert plan("memory.micro_batch=16") == (first, 0)
    assert plan("memory.micro_batch=16", "training.seed=5", "training.epochs=9", "training.learning_rate=0.1",
                "stages.pretrain.share=7", "training.keep_checkpoints=1") == (first, 0), "none of these takes memory"
    other, times = plan("memory.micro_batch=8")
    assert times == 1 and other.micro_batch == dict.fromkeys(planner.TOWERS, 8)
    for override in ("model.context_length=20", "training.captions_per_visit=2", "training.batch_size=16",
                     "training.ema_decay=0.9", "training.optimizer=adamw", "stages.pretrain.drop_path=0.1",
                     "memory.budget_gb=3"):
        assert plan("memory.micro_batch=16", override)[1] == 1, override
        assert plan("memory.micro_batch=16", override)[1] == 0, override


def plan_side_by_side(config: Config, results: Any) -> None:
    """Sends the plans of all stages, and whether a search runs in another process."""
    planner.cpu_cores = lambda: 2
    where = planner.side_by_side({"one": os.getpid, "other": os.getpid})
    results.put((planner.plan_stages(config, all_tasks(config), CPU), os.getpid() not in where.values()))


def nothing_found(find: Any) -> None: ...


def all_tasks(config: Config) -> dict[str, list[TaskConfig]]:
    return {row.name: tasks_of(row) for row in config.stages}


def test_stages_planned_side_by_side_have_the_plans_that_they_have_alone(small: SmallRuns, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new process, since torch may run no backward pass in forks of one that has run some, as this one has."""
    config, other = (small.config(tmp_path / name, "memory.micro_batch=auto") for name in ("here", "there"))
    monkeypatch.setattr(planner, "cpu_cores", lambda: 1)
    alone = planner.plan_stages(config, all_tasks(config), CPU)
    assert list(alone) == ["pretrain", "align", "finetune", "evaluation"]
    results = forked.context().SimpleQueue()
    process = forked.context().Process(target=plan_side_by_side, args=(other, results))
    process.start()
    assert results.get() == (alone, sys.platform == "linux")
    process.join()
    monkeypatch.setattr(planner, "cpu_cores", lambda: 2)
    monkeypatch.setattr(planner, "find_in_fork", nothing_found)  # as where backward passes have run
    assert planner.side_by_side({"one": os.getpid, "other": os.getpid}) == {"one": os.getpid(), "other": os.getpid()}
    monkeypatch.undo()
    short = small.config(tmp_path / "short", "memory.micro_batch=auto", "memory.budget_gb=0.55")
    with refused("memory.budget_gb", "0.55 GiB", error=fitting.OverBudget):
        planner.plan_stages(short, all_tasks(short), CPU)


def test_a_size_whose_widths_have_changed_is_planned_anew(small: SmallRuns, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.config(tmp_path / "run", "memory.micro_batch=16")
    first = planned(config, "pretrain")
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], dim=16))
    assert planned(config, "pretrain").by_tag["parameters"] > first.by_tag["parameters"]


def test_the_search_takes_everything_at_once_where_it_fits(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run", "memory.micro_batch=auto", "training.captions_per_visit=2")
    plan = planned(config, "finetune")
    assert plan.micro_batch == plan.upper == {"image": 32, "audio": 32, "text": 64, "fusion": 32}


def test_the_search_measures_anew_what_differs_in_what_its_step_uses(small: SmallRuns, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], fusion_depth=3))  # the last keeps little
    config = small.config(tmp_path / "run")
    row = next(row for row in config.stages if row.name == "finetune")
    upper = planner.stage_upper(config, row, CPU)
    kept = planner.StageMeasure(config, row, row.tasks, CPU)
    deepest = dict.fromkeys(upper, 1)
    least = kept(Fit(upper, deepest), 1 << 40)
    for tower in ("image", "text", "fusion"):
        more = kept(Fit(upper, deepest | {tower: 0}), 1 << 40)
        assert least and more and more.peak_bytes != least.peak_bytes, f"{tower} recomputes nothing"


def test_the_task_that_passed_the_limit_is_the_first_to_be_run_at_the_next_fit(tmp_path: Path) -> None:
    config, runs = load_config(None, [f"paths.output_dir={tmp_path}"]), []
    row = config.stages[2]

    def kind(config: Config, row: StageConfig, task: TaskConfig, setup: DeviceSetup) -> planner.Measure:
        def run(fit: Fit, limit_bytes: int | None) -> Usage | None:
            runs.append(task.inputs)
            return None if task.inputs == ("audio", "text") else Usage(1, {})

        return run

    measure = planner.StageMeasure(config, row, tasks_of(row), CPU, kind)
    for size in (8, 4):
        runs.clear()
        assert measure(Fit(dict.fromkeys(planner.TOWERS, size), dict.fromkeys(planner.TOWERS, 0)), 5) is None
    assert runs == [("audio", "text")]


def test_speakers_take_memory_where_there_are_any(tmp_path: Path) -> None:
    config = load_config(None, ["model.size=nano", "data.audio_max_s=0.5", "memory.micro_batch=32",
                                f"paths.output_dir={tmp_path}"])
    row = config.stages[0]
    audio = [task for task in row.tasks if task.inputs == ("audio",)]
    few, many = (planner.plan_stage(config, row, audio, DeviceSetup("cpu", None, count)) for count in (1, 7205))
    weights = 7204 * 512 * 4  # and as much in gradients, twice in moments
    assert many.by_tag["parameters"] - few.by_tag["parameters"] == pytest.approx(weights, rel=0.01)
    assert many.by_tag["optimizer"] - few.by_tag["optimizer"] == pytest.approx(2 * weights, rel=0.01)


# ---- --plan ------------------------------------------------------------------------------------------------------


def test_plan_prints_every_stage_without_any_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": STAGES}), "utf-8")
    arguments = ["--config", str(recipe), "--data-root", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out"),
                 "model.size=nano", "model.image_size=32", "data.audio_max_s=0.5", "memory.micro_batch=32"]
    assert run_training.main(["--plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_names(lines[0], "cuda", "bfloat16", "pretrain 32", "align 32", "finetune 32")
    assert lines[1].split()[:7] == ["stage", *TAGS]
    assert [line.split()[0] for line in lines[2:6]] == ["pretrain", "align", "finetune", "evaluation"]
    whole = "image 32 (32), audio 32 (32), text 32 (32), fusion 32 (32)"
    assert [line.endswith(whole) for line in lines[2:5]] == [True, True, False]
    assert lines[4].endswith(f"{whole}; tokens kept"), "finetune fuses them"
    assert "4.00" in lines[2].split()
    assert_names(lines[6], "0.8", "cuda")
    assert not (tmp_path / "none").exists() and not (tmp_path / "out" / "checkpoints").exists()
    assert run_training.main(["--plan", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == "nano" and found["device"] == "cuda" and found["effective_batch"]["align"] == 32
    assert list(found["plans"]) == ["pretrain", "align", "finetune", "evaluation"]
    align = Plan(**found["plans"]["align"])
    assert align.fits and sum(align.by_tag.values()) == align.peak_bytes and align.recompute["image"] == 0


def test_json_is_of_a_plan_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_training.main(["--json"])
    assert stop.value.code == 2
    assert "--plan" in capsys.readouterr().err


def test_processes_share_a_plan(small: SmallRuns, tmp_path: Path) -> None:
    """Each encodes its share beside the features of all, so that what it takes lies between half and all."""
    config = small.config(tmp_path / "run", "memory.micro_batch=auto", "training.batch_size=33")
    alone, shared = (planned(config, "align", DeviceSetup("cpu", None, processes=n)) for n in (1, 2))
    assert alone.upper["image"] == 33 and shared.upper == dict.fromkeys(planner.TOWERS, 17)
    ratio = shared.by_tag["activations"] / alone.by_tag["activations"]
    assert 0.4 < ratio < 0.9 and shared.by_tag["data"] == alone.by_tag["data"]


def test_a_gpu_holds_no_more_of_the_batch_than_what_is_encoded(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run", "memory.micro_batch=8", "model.image_size=64")
    row = next(row for row in config.stages if row.name == "align")
    host, gpu = (planner.plan_stage(config, row, row.tasks[:1], setup) for setup in (CPU, DeviceSetup("cuda", None)))
    assert gpu.by_tag["data"] == 0 and host.by_tag["data"] > 32 * 3 * 64 * 64
    assert gpu.peak_bytes < host.peak_bytes


def test_evaluation_is_planned_within_the_budget(tmp_path: Path) -> None:
    nano = ["model.size=nano", f"paths.output_dir={tmp_path}"]
    config = load_config(None, [*nano, "evaluation.batch_size=2048", "memory.budget_gb=1"])
    plan = planner.plan_evaluation(config, CUDA)
    assert plan.fits and 16 <= plan.micro_batch["audio"] < 2048
    default = load_config(None, [f"paths.output_dir={tmp_path}"])
    assert default.model.size == "base"
    assert planner.plan_evaluation(default, CUDA).micro_batch == {"image": 64, "audio": 64, "text": 64}


def test_plan_for_a_named_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text("stages: [{name: only, share: 1, tasks: [{inputs: [text], objectives: {masked: 1.0}}]}]", "utf-8")
    arguments = ["--plan", "--config", str(recipe), "--output-dir", str(tmp_path / "out"), "model.size=nano",
                 "training.use_amp=false"]
    assert run_training.main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert_names(out.splitlines()[0], "cpu", "fp32", "only 32")
    assert_names(out.splitlines()[-1], "1.0", "cpu")
    (tmp_path / "file").write_text("")
    assert run_training.main([*arguments, "--device", "cpu", "--output-dir", str(tmp_path / "file")]) == 0
    found = capsys.readouterr()
    assert found.out == out
    for line in found.err.splitlines():
        assert_names(line, tmp_path / "file" / "plans")
    assert found.err
