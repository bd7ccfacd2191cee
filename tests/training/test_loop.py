"""Training: epochs of stages, what a step changes, lack of memory, bad steps, validation and the best weights."""

import copy
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import trees
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, apart, batches, differing, float64, records, step, trained, weights
from tests.training.test_tracking import scalars
from trimodal.config import Config, StageConfig, TaskConfig, load_config
from trimodal.errors import ConfigError, TrainingError
from trimodal.memory import devices
from trimodal.training import loop, plans, resume, validation
from trimodal.training import run as run_module
from trimodal.training.run import Run
from trimodal.training.saving import Saver
from trimodal.training.signals import Interruption

# ---- stages ------------------------------------------------------------------------------------------------------


def sharing(epochs: int, *shares: float) -> Config:
    task = TaskConfig(inputs=("image",), objectives={"concepts": 1.0})
    return dataclasses.replace(
        Config(), training=dataclasses.replace(Config().training, epochs=epochs),
        stages=tuple(StageConfig(name=str(i), share=share, tasks=(task,)) for i, share in enumerate(shares)))


@pytest.mark.parametrize("shares", [
    (0.2, 0.6, 0.2), (0.1, 0.7, 0.2), (1, 1, 1), (5,), (0.98, 0.01, 0.01), (3, 1), (7, 0.1)])
def test_stages_share_any_number_of_epochs(shares: tuple[float, ...]) -> None:
    for epochs in range(1, 131):
        given = list(resume.stage_epochs(sharing(epochs, *shares)).values())
        wanted = [epochs * share / sum(shares) for share in shares]
        assert sum(given) == epochs and min(given) >= (epochs >= len(shares)), (epochs, given)
        if min(wanted) >= 1:
            assert all(abs(g - w) < 1 for g, w in zip(given, wanted, strict=True)), (epochs, given, wanted)


def test_shares_of_the_defaults() -> None:
    default = {epochs: list(resume.stage_epochs(load_config(None, [f"training.epochs={epochs}"])).values())
               for epochs in (1, 2, 3, 4, 7, 50, 100)}
    assert default == {1: [0, 1, 0], 2: [0, 2, 0], 3: [1, 1, 1], 4: [1, 2, 1], 7: [1, 5, 1], 50: [3, 37, 10],
                       100: [6, 74, 20]}


def test_one_epoch_trains_one_stage_and_says_which_are_skipped(small: SmallRuns, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    small.train(tmp_path, "training.epochs=1", "evaluation.max_validation=8", "report.gallery_queries=0")
    assert [line["stage"] for line in records(tmp_path, "stage")] == ["finetune"]
    about = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("[pretrain]", "[align]"))]
    assert [line.split()[0] for line in about] == ["[pretrain]", "[align]"]
    assert_names(about[0], 1)


def test_tasks_without_samples_are_named_and_a_stage_without_any_is_an_error(small: SmallRuns, tmp_path: Path) -> None:
    data = small.open(tmp_path).data

    def row(*tasks: tuple[str, str]) -> StageConfig:
        return StageConfig(name="own", share=1, audio_keep=0.5, tasks=tuple(
            TaskConfig(inputs=tuple(inputs.split("+")), objectives=dict.fromkeys(names.split("+"), 1.0))
            for inputs, names in tasks))

    tasks, skipped = loop.active_tasks(row(
        ("image+text", "contrastive"), ("image+audio", "contrastive"), ("audio", "masked+speaker"),
        ("audio", "speaker")), data)
    assert [task.inputs for task in tasks] == [("image", "text"), ("audio",)]
    assert tasks[1].objectives == {"masked": 1.0}, "no speaker is known here"
    assert len(skipped) == 2
    assert_names(skipped[0], "own", "image", "audio", "contrastive")
    assert_names(skipped[1], "own", "speaker")
    with refused("stages.own", "synthetic", "--datasets"):
        loop.active_tasks(row(("image+audio", "contrastive"), ("audio", "speaker")), data)


def test_a_task_whose_passes_come_to_no_sample_is_named_and_not_trained(small: SmallRuns, tmp_path: Path) -> None:
    data = small.open(tmp_path).data
    few, some = (TaskConfig(inputs=("image",), objectives={"masked": 1.0}, passes=passes) for passes in (0.001, 0.05))
    row = StageConfig(name="own", share=1, image_keep=0.5, tasks=(few, some))
    tasks, [line] = loop.active_tasks(row, data)
    assert tasks == [some]
    assert_names(line, "own", "passes", 0.001, 64, 0, "image", "masked")
    with refused("stages.own", "synthetic", "passes"):
        loop.active_tasks(dataclasses.replace(row, tasks=(few,)), data)


def test_patterns_choose_what_moves(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "stages.align.trainable=['image\\.blocks\\..*', 'logit_scale.*']")
    stage = small.stage(run, "align")
    before = weights(run.model)
    step(run, stage, batches(run, stage)[0])
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("image.blocks.")} | {"logit_scale.image_text"}


def test_words_are_hidden_only_behind_a_token_of_the_tokenizer(small: SmallRuns, tmp_path: Path) -> None:
    """Tokenizers of image-text models have none for that."""
    run = small.open(tmp_path)
    run.data.tokenizer.mask_id = -1
    with refused("stages.pretrain.tasks", "masked", "[MASK]", "model.word_embeddings", error=ConfigError):
        small.stage(run, "pretrain")


def test_a_pattern_must_match_a_whole_name(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    for pattern in ("imag", "image.block", "vision.*"):
        row = dataclasses.replace(run.config.stages[1], trainable=(".*", pattern))
        with refused("stages.align.trainable", pattern, error=ConfigError):
            loop.freeze(run.model, row)


def test_learning_rate_factors_scale_what_a_step_moves_and_are_said(small: SmallRuns, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    given = "stages.align.lr_factors={image.*: {factor: 0.25, layer_decay: 0.5}, text.blocks.*: 2}"
    moved: list[dict[str, torch.Tensor]] = []
    with float64():
        for name, overrides in (("plain", ()), ("factors", (given,))):
            run = small.open(tmp_path / name, "training.weight_decay=0", *overrides)
            stage = small.stage(run, "align")
            before, batch = weights(run.model), batches(run, stage)[0]
            log = loop.StepLog(run, stage, epoch=1)
            log.add(step(run, stage, batch), batch, len(batch.keys))
            log.flush()
            moved.append({key: value - before[key] for key, value in run.model.state_dict().items()})
    expected = {"image.embed.weight": 0.0625, "image.blocks.blocks.0.up.weight": 0.125, "image.blocks.norm.bias": 0.25,
                "image.blocks.blocks.1.qkv.weight": 0.25, "image.blocks.blocks.1.qkv.bias": 0.25,
                "text.blocks.blocks.0.up.weight": 2.0, "text.words.weight": 1.0, "projections.image.weight": 1.0}
    plain, factors = moved
    for key, factor in expected.items():
        torch.testing.assert_close(factors[key], factor * plain[key], rtol=1e-6, atol=0)  # the rate is float32
        assert plain[key].abs().max() > 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "image.*" in line]
    assert_names(line, "align", "0.0625", "0.25", "image.*", "2", "text.blocks.*")
    [record], [other] = records(tmp_path / "factors", "step"), records(tmp_path / "plain", "step")
    assert record["lr"] == other["lr"] and "lr_of" not in other
    assert record["lr_of"] == {"image.*": 0.25 * other["lr"], "text.blocks.*": 2 * other["lr"]}


def test_a_loss_that_can_train_nothing_is_an_error(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "stages.align.trainable=['audio.*']")
    stage = small.stage(run, "align")
    with refused("stages.align.trainable", "contrastive_image_text", error=ConfigError):
        step(run, stage, batches(run, stage)[0])


def test_a_vocabulary_beyond_the_settings_is_planned_as_large_as_it_is(small: SmallRuns, tmp_path: Path) -> None:
    planned = []
    for rows in (1, 135):
        run = small.open(tmp_path / str(rows), f"model.vocab_size={rows}")
        plans.fit_stages(run, {"pretrain": list(run.config.stages[0].tasks)}, None)
        planned.append(run.predicted_gib)
    assert planned[0] == planned[1]


# ---- one step ----------------------------------------------------------------------------------------------------


def test_a_step_without_a_modality_leaves_its_tower_bit_identical(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "training.weight_decay=0.5")
    stage = small.stage(run, "align")
    for task, without in ((0, "audio."), (1, "image."), (0, "audio.")):  # the moments of audio exist by the third
        before = weights(run.model)
        step(run, stage, batches(run, stage, task)[0], task)
        moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
        assert not [name for name in moved if name.startswith(without)]
        assert [name for name in moved if name.startswith("text.")]


@pytest.mark.parametrize(("name", "task"), [
    ("pretrain", 0), ("pretrain", 1), ("align", 0), ("align", 1), ("finetune", 0)])
def test_a_micro_batch_changes_the_weights_by_rounding_only(small: SmallRuns, tmp_path: Path, name: str,
                                                            task: int) -> None:
    with float64():
        start = small.open(tmp_path / "start").model
        whole, parts = (trained(small, tmp_path / str(size), name, size, 2, task)[0].model for size in (32, 7))
    assert apart(start, whole) > 1e-3, "two steps move the weights far more than rounding does"
    assert 0 < apart(whole, parts) < 1e-12


def test_a_temperature_is_pushed_past_its_bound_and_comes_back(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "stages.align.tasks.1.passes=0.0001", "training.learning_rate=0.1")
    stage = small.stage(run, "align")
    batch, scale, bound = batches(run, stage)[0], run.model.logit_scale["image_text"], math.log(100)
    scale.data.fill_(bound - 1e-4)
    upwards = scale.register_hook(torch.neg)  # as of pairs that are all told apart
    for _ in range(3):
        step(run, stage, batch)
        assert scale.item() == pytest.approx(bound, rel=1e-6)
    upwards.remove()
    for _ in range(9):  # the optimizer's momentum has to turn round
        step(run, stage, batch)
    assert 0 < scale.item() < bound - 1e-4


# ---- bad steps ---------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, run: Run, where: str, steps: set[int]) -> None:
    """Makes the loss, or only its gradient, NaN in some steps, counted from 1."""
    features = run.model.features

    def poisoned(*given: Any) -> torch.Tensor:
        found = features(*given)
        if run.progress.step + 1 in steps:
            if where == "loss":
                return found * math.nan
            if found.requires_grad:
                found.register_hook(lambda gradient: gradient * math.nan)
        return found

    monkeypatch.setattr(run.model, "features", poisoned)


@pytest.mark.parametrize(("where", "parts"), [("loss", ["contrastive_image_text"]), ("gradient", [])])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, parts: list[str]) -> None:
    run = small.open(tmp_path, "stages.align.tasks.1.passes=0.0001", "training.ema_decay=0.9")
    stage = small.stage(run, "align")
    assert stage.average is not None
    first, second = batches(run, stage)
    step(run, stage, first)
    before, state = weights(run.model), [value.clone() for one in stage.optimizer.state.values()
                                         for value in one.values()]
    average = copy.deepcopy(stage.average.state_dict())
    poison(monkeypatch, run, where, {2})
    log = loop.StepLog(run, stage, epoch=1)
    log.add(step(run, stage, second), second, len(second.keys))
    assert differing(run.model.state_dict(), before) == []
    assert differing([value for one in stage.optimizer.state.values() for value in one.values()], state) == []
    assert differing(stage.average.state_dict(), average) == []
    log.add(step(run, stage, first), first, len(first.keys))
    log.flush()
    assert differing(run.model.state_dict(), before) != [], "the run goes on"
    assert stage.average.updates == 2 and differing(stage.average.state_dict(), average) != []
    [event] = records(tmp_path, "event")
    assert event["step"] == 2 and event["parts"] == parts
    assert event["found"] == "", "gone when looked for"
    assert event["samples"] == second.keys[:3] and event["of"] == 32
    assert_names(event["message"], 2, "align", *second.keys[:3], *parts)
    assert [record["step"] for record in records(tmp_path, "step")] == [3]
    assert run.progress.losses == 1 and math.isfinite(run.progress.loss_sum)


def test_bad_steps_in_a_row_end_the_run_though_epochs_are_short(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path, "training.max_bad_steps=3", "training.epochs=4")
    stage = small.stage(run, "finetune", epochs=4)
    checkpoint = tmp_path / "checkpoints" / "checkpoint_epoch_1.pt"
    poison(monkeypatch, run, "loss", {1, 2, 4, 5, 6})  # two steps an epoch
    loop.train_epoch(run, stage, 1)
    validation.validate(run, stage)
    Saver(run, {"finetune": 4}, Interruption()).save("finetune", stage.state_dict)
    loop.train_epoch(run, stage, 2)
    with refused("finetune", 6, 3, "contrastive_image_text", checkpoint, "--lr", error=TrainingError):
        loop.train_epoch(run, stage, 3)
    assert len(records(tmp_path, "event")) == 5


def test_an_epoch_whose_steps_were_all_skipped_has_no_loss(small: SmallRuns, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "finetune")
    poison(monkeypatch, run, "gradient", {1, 2})
    log = loop.train_epoch(run, stage, 1)
    validation.validate(run, stage, log.speed)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "[finetune] epoch 1/3  loss nan  validation " in line and "0.0000" not in line


# ---- validation --------------------------------------------------------------------------------------------------


def test_validation_is_the_same_whatever_happened_before_and_in_which_order(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path, "training.batch_size=8", "evaluation.max_validation=20")
    stage = small.stage(run, "align")
    run.model.eval()
    first = validation.validation_loss(run, stage)
    assert first[1].keys() == {"contrastive_image_text", "contrastive_audio_text"}
    assert first[0] == pytest.approx(sum(first[1].values()) / 2)
    random.random(), np.random.rand(), torch.rand(3)
    run.progress.step, run.progress.epoch = 77, 7
    assert validation.validation_loss(run, stage) == first
    jobs = validation.validation_jobs(run, stage)
    assert sorted(len(rows) for _, rows in jobs) == [6, 6, 7, 7, 7, 7]
    assert len({row for _, rows in jobs for row in rows.tolist()}) == 40, "20 of each task's 32"
    monkeypatch.setattr(validation, "validation_jobs", lambda *_: jobs[::-1])
    loss, parts = validation.validation_loss(run, stage)
    assert loss == pytest.approx(first[0], rel=1e-6) and parts == pytest.approx(first[1], rel=1e-6)


def test_validation_averages_over_samples_and_leaves_out_what_it_cannot_tell(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    run.model.eval()
    pictures = np.flatnonzero(run.data.tables["val"].has_image)

    def loss_of(*groups: np.ndarray) -> float | None:
        monkeypatch.setattr(validation, "validation_jobs", lambda *_: [(0, rows) for rows in groups])
        return validation.validation_loss(run, stage)[0]

    large, small_one = loss_of(pictures[:24]), loss_of(pictures[24:])
    assert large is not None and small_one is not None
    assert loss_of(pictures[:24], pictures[24:]) == pytest.approx((24 * large + 8 * small_one) / 32)
    assert loss_of(pictures[:24], pictures[24:25]) == pytest.approx(large), "one picture has nothing to be told from"
    assert loss_of(pictures[:1]) is None and loss_of() is None


def test_best_weights_are_those_of_the_lowest_loss_of_the_last_stage(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)

    def remember(stage: str, *losses: float | None) -> tuple[list[int], list[int]]:
        """Epochs, counted from 1, whose weights were remembered, and those that counted as the best."""
        run.best, taken, best = {} if stage == "a" else run.best, [], []
        for epoch, loss in enumerate(losses, start=1):
            run.progress.epoch = epoch
            with torch.no_grad():
                run.model.text.norm.bias.fill_(epoch)
            before = run.best
            if validation.remember_best(run, stage, loss):
                best.append(epoch)
            if run.best is not before:
                taken.append(epoch)
        assert run.best["epoch"] == taken[-1] and run.best["stage"] == stage
        assert float(run.best["model_state_dict"]["text.norm.bias"][0]) == taken[-1], "a copy, not the live weights"
        return taken, best

    nan = math.nan
    assert remember("a", 3.0, 2.0, 2.0, 2.5, 1.0, nan, None, 4.0) == ([1, 2, 5], [1, 2, 5])
    assert remember("b", 9.0, 9.5, 8.0) == ([1, 3], [1, 3]), "another stage has another loss"
    assert remember("c", None, None, None) == ([1, 2, 3], []), "without any validation the newest, none the best"
    assert remember("a", nan, nan, 5.0, nan, 6.0) == ([1, 2, 3], [3])


def test_the_average_is_what_is_validated_and_remembered(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "training.ema_decay=0.9")
    stage = small.stage(run, "finetune")
    log = loop.train_epoch(run, stage, 1)
    run.progress.epoch = 1
    live = weights(run.model)
    validation.validate(run, stage, log.speed)
    assert stage.average is not None
    assert differing(run.model.state_dict(), live) == [], "training goes on from its own weights"
    averaged = dict(zip(stage.average.names, stage.average.values, strict=True))
    best = run.best["model_state_dict"]
    assert differing({name: best[name] for name in averaged}, averaged) == []
    assert not torch.equal(best["image.embed.weight"], live["image.embed.weight"])
    run.model.load_state_dict(best)
    run.model.eval()
    assert validation.validation_loss(run, stage)[0] == run.best["loss"] == records(tmp_path, "validation")[0]["loss"]


class Tripwire:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"training reads the test split ({name})")

    def __getitem__(self, item: Any) -> Any:
        raise AssertionError("training reads the test split")


def test_training_never_reads_the_test_split(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, evaluated = run_module.load_data, []

    def load_guarded(config: Config, **settings: Any) -> Any:
        data = load(config, **settings)
        contents: Any = dict.fromkeys(("store", "token_ids", "caption_ids", "concept_ids", "set_hash"), Tripwire())
        guarded = dataclasses.replace(data.splits["test"], **contents)
        return dataclasses.replace(data, splits={**data.splits, "test": guarded})

    def stop(run: Run) -> Path:
        evaluated.append(run.best)
        with pytest.raises(AssertionError, match="reads the test split"):  # the wire is taut
            validation.finish(run)
        return tmp_path

    monkeypatch.setattr(run_module, "load_data", load_guarded)
    monkeypatch.setattr(loop, "finish", stop)
    small.train(tmp_path, "training.epochs=4", "evaluation.max_validation=8", "report.gallery_queries=0")
    losses = {line["epoch"]: line["loss"] for line in records(tmp_path, "validation") if line["stage"] == "finetune"}
    assert len(losses) == 2 and evaluated[0]["stage"] == "finetune"
    assert evaluated[0]["epoch"] == min(losses, key=losses.__getitem__)


# ---- what is logged ----------------------------------------------------------------------------------------------


def test_records_of_steps_and_their_rates(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "training.log_every_steps=3", "training.batch_size=16", "training.warmup_pct=50")
    stage = small.stage(run, "finetune", epochs=2)
    assert stage.steps == 8
    for epoch in (1, 2):
        loop.train_epoch(run, stage, epoch)
    found = records(tmp_path)
    assert [(line["kind"], line["stage"], line["epoch"], line["step"]) for line in found] == [
        ("step", "finetune", 1, 3), ("step", "finetune", 2, 6)]
    assert [line["lr"] for line in found] == [pytest.approx(0.0005 * 3 / 4), pytest.approx(
        0.0005 * (0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2))]
    names = {"contrastive_image_text", "matching", "matching_accuracy", "concepts"}
    for line in found:
        assert line["task"] == "image_text" and line["samples"] == 16 and line["parts"].keys() == names
        parts = line["parts"]
        assert line["loss"] == pytest.approx(
            parts["contrastive_image_text"] + 0.5 * parts["matching"] + 0.5 * parts["concepts"], rel=1e-5)
        assert 0 <= parts["matching_accuracy"] <= 1 and line["grad_norm"] > 0
        assert 1 <= line["temperature"]["image_text"] <= 100 and line["memory_gib"] > 0
        assert 0 <= line["data_wait_pct"] <= 100 and line["samples_per_s"] > 0


def test_the_sigmoid_loss_trains_its_bias_from_the_log_odds(small: SmallRuns, tmp_path: Path) -> None:
    small.train(tmp_path, "training.contrastive_loss=sigmoid", "training.epochs=2", "evaluation.max_validation=8",
                "report.gallery_queries=0")
    found = records(tmp_path, "step")
    first = found[0]["bias"]["image_text"]
    assert first == pytest.approx(-math.log(31), abs=0.01) and found[-1]["bias"]["image_text"] != first
    assert found[0]["temperature"]["image_text"] == pytest.approx(10, rel=0.01)
    state = torch.load(tmp_path / "checkpoints" / "final_model.pt")
    assert float(state["model_state_dict"]["logit_bias.image_audio"]) == pytest.approx(-math.log(31)), "no such pairs"


def test_the_measured_peak_stands_beside_the_planned_one_and_calibrates_a_gpu(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = small.open(tmp_path / "run")
    run.predicted_gib = {"align": 2.0}
    run.config = dataclasses.replace(run.config, memory=dataclasses.replace(run.config.memory, budget_gb=1e4))
    facts = loop.compare_memory(run, "align")
    assert facts["peak_gib"] >= facts["held_gib"] > 0 and not (tmp_path / "cache").exists(), "a CPU is not calibrated"
    assert "memory.budget_gb" not in capsys.readouterr().out
    run.config = dataclasses.replace(run.config, memory=dataclasses.replace(run.config.memory, budget_gb=0.01))
    loop.compare_memory(run, "align")
    assert_names(capsys.readouterr().out.splitlines()[-1], "align", "memory.budget_gb=0.01", "memory.micro_batch")
    run.device = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "peak_gib", lambda device: devices.Peak(2.1, "reserved by the CUDA allocator"))
    monkeypatch.setattr(devices, "device_name", lambda device: "Some Card")
    run.held_gib = devices.held_gib(run.device)
    assert loop.compare_memory(run, "align") == {"peak_gib": 2.1, "held_gib": 0.0}
    line = capsys.readouterr().out.splitlines()[-1]
    assert_names(line, "align", "2.00", "2.10")
    assert line.index("2.00") < line.index("2.10"), "the planned one, then the measured one"
    assert plans.calibration("Some Card") is None, "its micro-batches are not those that were planned"
    run.planned_fits = dict(run.fits)
    loop.compare_memory(run, "align")
    assert plans.calibration("Some Card") == pytest.approx(1.05)


def test_on_a_cpu_the_measured_peak_is_of_what_is_planned(small: SmallRuns, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Python and its libraries take most of such a process, and are in no plan."""
    run = small.open(tmp_path)
    run.predicted_gib = {"align": 0.25}
    devices.reset_peak(run.device)
    tensor = torch.ones(2**26)  # 0.25 GiB
    facts = loop.compare_memory(run, "align")
    del tensor
    assert 0.24 < facts["peak_gib"] - facts["held_gib"] < 0.5 * facts["peak_gib"] < 1
    run.tracker.close()
    shown = {tag: round(points[0][1], 4) for tag, points in scalars(tmp_path / "logs").items()}
    comparable = facts["peak_gib"] - facts["held_gib"]
    assert shown == {"memory/align/planned_gib": 0.25, "memory/align/measured_gib": round(comparable, 4),
                     "memory/align/process_gib": round(facts["peak_gib"], 4)}
    [line] = [line for line in capsys.readouterr().out.splitlines() if "memory: planned" in line]
    assert_names(line, "0.25 GiB", f"{comparable:.2f} GiB", f"{facts['peak_gib']:.2f} GiB", f"{run.held_gib:.2f} GiB")


def test_an_epochs_line_tells_each_figure_with_its_chance_and_its_candidates() -> None:
    line = validation.first_recalls({
        "image_to_text_R@1": {"value": 1 / 7, "chance": 1 / 70, "candidates": 70},
        "image_to_text_R@1_per_caption": {"value": 0.125, "chance": 1 / 70, "candidates": 70},
        "image_to_text_R@5": {"value": 0.5, "chance": 1 / 14, "candidates": 70},
        "text_to_image_R@1": {"value": 0.2, "chance": 0.001, "candidates": 1000}})
    assert_names(line, "image_to_text_R@1 0.143", "0.014", 70, "0.125", "text_to_image_R@1 0.200", "0.001", "1,000")
    assert "R@5" not in line and line.count("chance") == 2


def test_records_of_validation_and_curves_hold_chance_and_candidates(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    validation.validate(run, stage)
    [record] = records(tmp_path, "validation")
    assert record["metrics"].keys() == record["chance"].keys() == record["candidates"].keys()
    name = "image_to_text_R@1"
    assert 0 < record["chance"][name] < 1 and record["candidates"][name] > 1
    run.tracker.close()
    shown = scalars(tmp_path / "logs")
    assert shown[f"retrieval/{name}_chance"][0][1] == pytest.approx(record["chance"][name])
    assert shown[f"retrieval/{name}"][0][1] == pytest.approx(record["metrics"][name])


def test_validation_hears_at_most_what_training_hears(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    given: dict[str, list[torch.Tensor]] = {"audio": [], "text": []}
    for name, seen in given.items():
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], seen: list[torch.Tensor] = seen) -> None:
            seen.append(inputs[0])

        run.model.get_submodule(name).register_forward_pre_hook(see)
    validation.validation_loss(run, stage)
    assert {sounds.shape[1] for sounds in given["audio"]} == {64}, "half a second, in whole patches"
    assert sum(map(len, given["audio"])) == 32
    assert sum(map(len, given["text"])) == 2 * 2 * 32, "all captions of pictures and of sounds"


# ---- without test samples ----------------------------------------------------------------------------------------


def test_a_list_without_test_samples_is_told_at_the_start_and_in_the_report(
        small: SmallRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for i in range(12):
        trees.picture(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": f"number {i}", "split": "test" if i == 0 else "train"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    own = ("data.datasets=[manifest]", f"data.manifest={tmp_path / 'own.jsonl'}", "training.epochs=1",
           "report.language=en")
    report = small.train(tmp_path / "run", *own)
    said = capsys.readouterr().out.splitlines()
    about = [i for i, line in enumerate(said) if "split: test" in line and "--datasets" in line]
    first_epoch = next(i for i, line in enumerate(said) if "epoch 1/1" in line)
    assert len(about) == 2 and about[0] < first_epoch < about[1]
    assert not any(line.startswith("set ") for line in said), "no table without rows"
    found = json.loads(report.with_suffix(".json").read_text("utf-8"))
    assert found["evaluation"]["figures"] == {} and found["events"] == [said[about[1]]]
    assert said[about[1]] in report.read_text("utf-8")
