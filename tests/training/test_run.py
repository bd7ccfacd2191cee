"""A run's folder: opened, refused, resumed bit for bit, completed; what its checkpoints hold and which of them stay."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import model as model_module
from tests.refusals import assert_names, refused
from tests.small_runs import STAGES, SmallRuns, differing, records, without_times
from trimodal import checkpoint
from trimodal.config import Config, config_from_dict, load_config
from trimodal.training import loop, plans, resume, saving, validation
from trimodal.training import run as run_module
from trimodal.training.run import Options

QUICK = ("training.epochs=4", "evaluation.max_validation=8", "report.gallery_queries=0", "training.ema_decay=0.5",
         "stages.align.tasks.1.passes=0.5", "training.keep_checkpoints=9")
ALL_EPOCHS = ["checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt"]


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs (pretrain, align, finetune twice) that nothing interrupted, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *QUICK)
    return folder


def state_of(folder: Path, name: str) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoints" / name)


def mathematics(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint without paths, times and how many are kept."""
    state = state_of(folder, name)
    training_config = {**state["config"]["training"], "keep_checkpoints": 0}
    return {**state, "progress": {**state["progress"], "stage_s": 0.0},
            "config": {**state["config"], "paths": {}, "training": training_config}}


def interrupted(whole: Path, folder: Path, epoch: int) -> Path:
    """The folder as a kill in the middle of epoch `epoch` + 1 leaves it: logs go on past the last checkpoint."""
    shutil.copytree(whole / "logs", folder / "logs")
    (folder / "checkpoints").mkdir()
    for one in range(1, epoch + 1):
        shutil.copy(whole / "checkpoints" / f"checkpoint_epoch_{one}.pt", folder / "checkpoints")
    state = state_of(whole, f"checkpoint_epoch_{epoch}.pt")  # its weights are the best ones: the loss falls
    best = next(line for line in records(whole, "validation") if line["epoch"] == epoch)
    average = state["stage_state"]["average"]["values"]
    kept = {name: value for name, value in state.items() if name not in ("stage_state", "fits")}
    weights = {**state["model_state_dict"], **average}
    checkpoint.save({**kept, "epoch": epoch, "loss": best["loss"], "model_state_dict": weights},
                    folder / "checkpoints" / "best_model.pt")
    lines = (folder / "logs" / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line).get("epoch", 0) == epoch + 1
               and json.loads(line)["kind"] == "step")
    (folder / "logs" / "metrics.jsonl").write_text("".join(lines[:last]) + lines[last][:20], "utf-8")
    return folder


# ---- resuming ----------------------------------------------------------------------------------------------------


def test_the_whole_run_has_a_best_epoch_in_each_stage_and_all_checkpoints(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "best_model.pt", *ALL_EPOCHS, "config.json", "final_model.pt", "model.safetensors"]
    assert [line["stage"] for line in records(whole, "validation")] == ["pretrain", "align", "finetune", "finetune"]
    assert state_of(whole, "best_model.pt")["epoch"] == 4, "the tests below need a loss that falls"


def assert_same_run(folder: Path, whole: Path, epochs: range) -> None:
    """Weights, optimizer, heads, averages and records bit for bit; times and the name of the report aside."""
    for name in (*(f"checkpoint_epoch_{epoch}.pt" for epoch in epochs), "best_model.pt", "final_model.pt"):
        assert differing(mathematics(folder, name), mathematics(whole, name)) == [], name
    again = [line for line in records(folder) if not line.get("resumed")]
    found, expected = ([line | {"file": None} if line["kind"] == "report" else line for line in without_times(lines)]
                       for lines in (again, records(whole)))
    assert found == expected
    assert len(records(folder)) == len(again) + 1, "and one line says where it was resumed"


def test_a_run_that_stopped_at_the_end_of_a_stage_goes_on_bit_for_bit(small: SmallRuns, whole: Path,
                                                                      tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 1)
    small.train(folder, *QUICK, resume="auto")
    assert_same_run(folder, whole, range(2, 5))


def test_a_resumed_run_splits_its_batches_as_before(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """It may have run out of memory once; another split would round otherwise."""
    folder = interrupted(whole, tmp_path / "run", 3)
    config = small.config(folder, *QUICK)
    state = state_of(whole, "checkpoint_epoch_3.pt")
    towers = ("image", "audio", "text", "fusion")
    smaller = {"micro_batch": dict.fromkeys(towers, 16), "recompute": dict.fromkeys(towers, 2)}
    run = run_module.open_run(config, Options("cpu", "auto"), {**state, "best": {}})
    tasks = {row.name: loop.active_tasks(row, run.data)[0] for row in config.stages}
    plans.fit_stages(run, tasks, {**state, "fits": {**state["fits"], "finetune": smaller, "gone": smaller}})
    run.tracker.close()
    assert {name: vars(fit) for name, fit in run.fits.items()} == {
        **state["fits"], "finetune": {**smaller, "keep_tokens": False}}, "a fit of before tokens were kept"


def test_pieces_that_a_kill_leaves_behind_are_cleared(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 3)
    leftover = folder / "checkpoints" / "checkpoint_epoch_4.pt.99.tmp"
    leftover.write_bytes(b"half")
    config = small.config(folder, *QUICK)
    options = Options("cpu", "auto")
    run_module.open_run(config, options, resume.find_state(config, options)).tracker.close()
    assert not leftover.exists()
    assert max(line["step"] for line in records(folder)) == state_of(whole, "checkpoint_epoch_3.pt")["progress"]["step"]


def test_a_kill_between_the_two_files_of_an_epoch_loses_no_best_weights(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(whole, tmp_path / "run", 3)
    save_file = saving.save_file
    written: list[str] = []

    def killed(state: Any, path: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        save_file(state, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "save_file", killed)
        small.train(folder, *QUICK, resume="auto")
    small.train(folder, *QUICK, resume="auto")
    assert differing(mathematics(folder, "best_model.pt"), mathematics(whole, "best_model.pt")) == []


def test_best_weights_of_a_later_time_are_not_those_of_a_resumed_run(
        small: SmallRuns, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def best(epoch: int) -> dict[str, Any]:
        path = whole / "checkpoints" / f"checkpoint_epoch_{epoch}.pt"
        state = resume.find_state(small.config(whole, *QUICK), Options("cpu", str(path)))
        assert state is not None
        return state["best"]

    assert best(3) == {}, "best_model.pt is of epoch 4"
    assert_names(capsys.readouterr().out.rstrip("\n"), "best_model.pt", 4)
    assert best(4).keys() == {"stage", "epoch", "loss", "model_state_dict", "matching_head"} and best(4)["epoch"] == 4


def test_a_finished_run_says_so_and_trains_nothing(small: SmallRuns, whole: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    report = small.train(whole, *QUICK, resume="auto")
    assert report.parent == whole / "reports" and report.suffix == ".md"
    assert_names(capsys.readouterr().out.splitlines()[-1], 4, report)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_its_report_is_evaluated_again(
        small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "reports")
    (folder / "checkpoints" / "final_model.pt").unlink()
    report = small.train(folder, *QUICK, resume="auto")
    assert records(folder, "step", "validation") == records(whole, "step", "validation"), "nothing is trained again"
    first = json.loads(next((whole / "reports").glob("*.json")).read_text("utf-8"))
    second = json.loads(report.with_suffix(".json").read_text("utf-8"))
    assert first["evaluation_s"] > 0 and second["evaluation_s"] > 0
    for name in ("evaluation", "best", "stages", "validations", "model", "data"):
        assert second[name] == first[name], name
    assert differing(mathematics(folder, "final_model.pt"), mathematics(whole, "final_model.pt")) == []
    assert small.train(folder, *QUICK, resume="auto") == report


def test_auto_in_an_empty_folder_is_a_fresh_start(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path)
    assert resume.find_state(config, Options("cpu", "auto")) is None
    run = run_module.open_run(config, Options("cpu", "auto"), None)
    run.tracker.close()
    assert run.progress == run_module.Progress() and run.best == {}


def test_auto_after_a_kill_before_any_checkpoint_leaves_no_records_of_it(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    run.tracker.event("half an epoch", 3)
    run.tracker.close()
    assert len(records(tmp_path)) == 1
    config = small.config(tmp_path)
    state = resume.find_state(config, Options("cpu", "auto"))
    run_module.open_run(config, Options("cpu", "auto"), state).tracker.close()
    assert records(tmp_path) == []


def test_names_keep_their_numbers_when_the_data_grow(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    state = state_of(whole, "checkpoint_epoch_3.pt")
    names = state["concepts"][::-1]
    config = small.config(tmp_path, *QUICK, "data.synthetic_images=160")
    assert list(run_module.read_data(config, {**state, "concepts": names}).concepts) == names
    assert list(run_module.read_data(config, None).concepts) != names


def test_auto_where_no_checkpoint_can_be_read_is_refused_and_deletes_nothing(small: SmallRuns, whole: Path,
                                                                             tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 2)
    paths = sorted((folder / "checkpoints").glob("checkpoint_epoch_*.pt"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    with refused("--resume", len(paths), folder / "checkpoints"):
        small.train(folder, *QUICK, resume="auto")
    assert sorted((folder / "checkpoints").glob("checkpoint_epoch_*.pt")) == paths


def test_another_runs_checkpoint_is_not_gone_on_with_in_a_used_folder(small: SmallRuns, whole: Path,
                                                                      tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 2)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    path = whole / "checkpoints" / "checkpoint_epoch_3.pt"
    with refused(folder, "checkpoints", path, f"--output-dir {whole}", "new --output-dir"):
        small.train(folder, *QUICK, resume=str(path))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_going_back_moves_what_lies_further_on_before_anything_else_can_happen(small: SmallRuns, whole: Path,
                                                                                tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    config = small.config(folder, *QUICK)
    options = Options("cpu", str(folder / "checkpoints" / "checkpoint_epoch_2.pt"))
    run_module.open_run(config, options, resume.find_state(config, options)).tracker.close()
    left = [path.name for path in (folder / "checkpoints").glob("checkpoint_epoch_*.pt")]
    assert sorted(left) == ["checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"]
    assert max(record.get("epoch", 0) for record in records(folder)) == 2


def test_best_weights_that_are_lost_are_told_and_the_last_ones_taken(
        small: SmallRuns, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "reports")
    best = folder / "checkpoints" / "best_model.pt"
    best.write_bytes(best.read_bytes()[:-1])
    small.train(folder, *QUICK, resume="auto")
    assert len([line for line in capsys.readouterr().out.splitlines() if str(best) in line]) == 1
    final, last = (torch.load(folder / "checkpoints" / name) for name in ("final_model.pt", "checkpoint_epoch_4.pt"))
    assert differing(final["model_state_dict"], last["model_state_dict"]) == []


def test_steps_of_an_unfinished_epoch_count_as_done_where_fewer_are_left(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    run.progress.epoch_step = 99
    log = loop.train_epoch(run, stage, epoch=1)
    assert (log.samples, run.progress.epoch, run.progress.epoch_step) == (0, 1, 0)


def test_a_folder_is_claimed_before_its_checkpoints_are_looked_at(small: SmallRuns, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def look(config: Any, options: Options) -> None:
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = str(tmp_path / run_module.LOCK)
        found = subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True)
        assert "BlockingIOError" in found.stderr
        raise InterruptedError

    monkeypatch.setattr(loop, "find_state", look)
    with pytest.raises(InterruptedError):
        small.train(tmp_path, resume="auto")


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_used_folder_is_refused_then_thrown_away(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    with refused(folder, "checkpoints", "logs/metrics.jsonl", "--resume auto", "--overwrite", "--output-dir"):
        small.train(folder, *QUICK)
    assert len(list((folder / "checkpoints").iterdir())) == 8
    run = run_module.open_run(small.config(folder, *QUICK), Options("cpu", overwrite=True), None)
    run.tracker.close()
    assert list((folder / "checkpoints").iterdir()) == [] and records(folder) == []
    assert run.progress.step == 0
    events = list((folder / "logs" / "tensorboard").iterdir())
    assert len(events) == 1, "the curves of the run that was thrown away are gone"


def test_a_mistake_found_late_throws_nothing_away(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    with refused("download_datasets.py --datasets clotho"):
        small.train(folder, *QUICK, "data.datasets=[clotho]", overwrite=True)
    assert len(list((folder / "checkpoints").iterdir())) == 8 and len(records(folder)) == len(records(whole))


def test_a_folder_in_which_only_setting_up_failed_is_not_in_use(small: SmallRuns, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad_samples.jsonl").write_text("{}\n")
    small.open(tmp_path).tracker.close()  # stopped before the first step: its log is empty
    if lock := run_module.claim_folder(tmp_path, Options("cpu")):
        lock.release()
    tracker = small.open(tmp_path).tracker
    tracker.event("a step", 1)
    tracker.close()
    with refused(tmp_path, "logs/metrics.jsonl") as refusal:
        run_module.claim_folder(tmp_path, Options("cpu"))
    assert "checkpoints" not in str(refusal.value), "there are none"


@pytest.mark.parametrize(("override", "named"), [
    ("model.size=tiny", ("image.embed.weight", "[8, 768]", "[192, 768]", "text.words.weight")),
    ("model.num_classes=7", ("classifier.weight", "[60, 8]", "[7, 8]"))])
def test_another_model_is_refused(small: SmallRuns, whole: Path, tmp_path: Path, override: str,
                                  named: tuple[str, ...]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "checkpoint_epoch_4.pt", tmp_path / "run" / "checkpoints")
    with refused("--resume") as refusal:
        small.train(tmp_path / "run", *QUICK, override, resume="auto")
    assert [name for name in named if name not in str(refusal.value)] == []
    assert not (tmp_path / "run" / "logs" / "metrics.jsonl").exists()


def test_other_stages_than_were_trained_are_refused(small: SmallRuns, whole: Path) -> None:
    config = small.config(whole, *QUICK)
    with refused("--resume", "pretrain, align, finetune", "with align, finetune"):
        resume.find_state(dataclasses.replace(config, stages=config.stages[1:]), Options("cpu", "auto"))


@pytest.mark.parametrize(("epochs", "epoch", "epoch_step", "stage", "expected"), [
    (10, 5, 0, "align", {"pretrain": 2, "align": 6, "finetune": 2}),  # nothing has changed
    (20, 5, 0, "align", {"pretrain": 2, "align": 13, "finetune": 5}),  # 18 by 0.6 to 0.2
    (7, 5, 0, "align", {"pretrain": 2, "align": 4, "finetune": 1}),
    (7, 6, 1, "align", {"pretrain": 2, "align": 5, "finetune": 0}),  # four epochs and a part of the fifth are done
    (3, 5, 0, "align", {"pretrain": 2, "align": 3, "finetune": 0}),  # nothing is left to train
    (3, 1, 1, "pretrain", {"pretrain": 2, "align": 1, "finetune": 0}),
])
def test_a_resumed_run_may_have_more_or_fewer_epochs(epochs: int, epoch: int, epoch_step: int, stage: str,
                                                     expected: dict[str, int]) -> None:
    shares = ["stages.pretrain.share=0.2", "stages.align.share=0.6"]
    config = load_config(None, [f"training.epochs={epochs}", *shares])
    begun = load_config(None, ["training.epochs=10", *shares])
    state = {"stage": stage, "stage_epochs": resume.stage_epochs(begun), "config": begun.to_dict(),
             "progress": {"epoch": epoch, "epoch_step": epoch_step}}
    assert [row.share for row in config.stages] == [0.2, 0.6, 0.2]
    assert resume.stage_epochs(config, state) == expected


def test_what_has_changed_since_a_checkpoint_is_said(small: SmallRuns, whole: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    config = small.config(tmp_path, *QUICK, "training.learning_rate=0.5", "stages.align.drop_path=0.3")
    path = whole / "checkpoints" / "checkpoint_epoch_4.pt"
    resume.find_state(small.config(tmp_path, *QUICK), Options("cpu", str(path)))
    assert capsys.readouterr().out == "", "another folder is no change"
    resume.find_state(config, Options("cpu", str(path)))
    first, second = capsys.readouterr().out.splitlines()
    assert_names(first, "training.learning_rate", "0.001", "0.5")
    assert_names(second, "stages.align.drop_path", "0.1", "0.3")
    assert first.index("0.001") < first.index("0.5") and second.index("0.1") < second.index("0.3"), "what it was first"
    assert "not used" not in first + second
    resume.find_state(small.config(tmp_path, *QUICK, "model.word_embeddings=minilm"), Options("cpu", str(path)))
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, "model.word_embeddings", "minilm", "not used")



def test_settings_that_there_were_not_yet_are_no_change(whole: Path) -> None:
    now = state_of(whole, "checkpoint_epoch_4.pt")["config"]
    then = copy.deepcopy(now)
    for row in then["stages"]:
        del row["lr_factors"]
    assert resume.changes(then, now) == []
    now["stages"][1]["lr_factors"] = {"image.*": {"factor": 0.5, "layer_decay": 1.0}}
    lines = resume.changes(then, now)
    assert_names(lines[0], "stages.align.lr_factors.image.*.factor", 0.5)


def test_a_run_with_learning_rate_factors_goes_on_bit_by_bit(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    factors = "{image.*: {factor: 0.3, layer_decay: 0.5}, text.*: 2}"
    own = (*QUICK, *(f"stages.{name}.lr_factors={factors}" for name in ("align", "finetune")))
    small.train(tmp_path / "run", *own)
    within = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "again" / "checkpoints")
    for name in ("checkpoint_epoch_4.pt", "final_model.pt", "best_model.pt"):
        (within / name).unlink()
    small.train(tmp_path / "again", *own, resume="auto")
    one, other = (mathematics(tmp_path / name, "checkpoint_epoch_4.pt") for name in ("run", "again"))
    assert not differing(one["model_state_dict"], other["model_state_dict"])
    assert not differing(one["stage_state"], other["stage_state"])
    assert differing(one["model_state_dict"], state_of(whole, "checkpoint_epoch_4.pt")["model_state_dict"])


def test_learning_rate_factors_may_change_within_a_stage(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """A run of a release that knew none holds its moments as all runs do."""
    state = state_of(whole, "checkpoint_epoch_3.pt")["stage_state"]
    run = small.open(tmp_path / "run", *QUICK, "stages.finetune.lr_factors={.*: {factor: 0.1, layer_decay: 0.5}}")
    stage = small.stage(run, "finetune")
    stage.load_state_dict(copy.deepcopy(state))
    assert not differing(stage.state_dict()["optimizer"]["muon"]["state"], state["optimizer"]["muon"]["state"])
    assert not differing(stage.state_dict()["optimizer"]["adamw"]["state"], state["optimizer"]["adamw"]["state"])


@pytest.mark.parametrize(("override", "named"), [
    ("stages.finetune.tasks.0.objectives={contrastive: 1.0}", "0_matching"),
    ("stages.finetune.trainable=['image.*', 'logit_scale.*']", "optimizer"), ("training.optimizer=adamw", "optimizer")])
def test_a_stage_that_trains_something_else_is_refused(small: SmallRuns, whole: Path, tmp_path: Path, override: str,
                                                       named: str) -> None:
    run = small.open(tmp_path / "run", *QUICK, override)
    stage = small.stage(run, "finetune")
    with refused("--resume", "stages.finetune", named):
        stage.load_state_dict(state_of(whole, "checkpoint_epoch_3.pt")["stage_state"])


def test_checkpoints_that_training_cannot_go_on_from(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    config = small.config(tmp_path, *QUICK)
    for name in ("best_model.pt", "final_model.pt"):
        path = whole / "checkpoints" / name
        with refused("--resume", path, "checkpoint_epoch_*.pt"):
            resume.find_state(config, Options("cpu", str(path)))
    with refused("--resume", tmp_path / "none.pt"):
        resume.find_state(config, Options("cpu", str(tmp_path / "none.pt")))
    newer = tmp_path / "checkpoints" / "checkpoint_epoch_1.pt"
    checkpoint.save({"schema": 99}, newer)
    with refused("--resume", newer, 99):
        resume.find_state(config, Options("cpu", "auto"))
    with refused("--overwrite", "--resume"):
        resume.find_state(config, Options("cpu", "auto", overwrite=True))


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_its_use_needs_as_plain_data(small: SmallRuns, whole: Path) -> None:
    config = small.config(whole, *QUICK)
    for name in ("best_model.pt", "final_model.pt", "checkpoint_epoch_4.pt"):
        state = torch.load(whole / "checkpoints" / name)  # torch's default, which refuses code
        rows = len(state["model_state_dict"]["text.words.weight"])
        assert state["config"] == config.to_dict() | {"model": config.to_dict()["model"] | {"vocab_size": rows}}, name
        assert json.loads(state["tokenizer"])["model"]["vocab"]["circle"] > 0
        assert {"red", "circle", "melody"} <= set(state["concepts"]) and state["speakers"] == []
        assert state["normalisation"] == {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
                                          "log_mel_mean": -6.0, "log_mel_std": 4.0}
        kinds = {(value.device.type, value.dtype) for value in state["model_state_dict"].values()}
        assert kinds == {("cpu", torch.float32)}
        assert not [key for key in state["model_state_dict"] if key.startswith(("0_", "1_"))], "no stage's heads"
    going_on = torch.load(whole / "checkpoints" / "checkpoint_epoch_4.pt")
    assert going_on["stage_state"].keys() == {"objectives", "optimizer", "average", "bad_in_a_row", "alarms", "pace"}
    assert going_on["fits"].keys() == {"pretrain", "align", "finetune", "evaluation"}
    progress = {"epoch": 4, "step": records(whole, "stage")[-1]["step"], "stage_step": 4, "epoch_step": 0}
    assert going_on["progress"].items() >= progress.items() and going_on["progress"]["losses"] == 2
    assert going_on["stage_epochs"] == {"pretrain": 1, "align": 1, "finetune": 2}


def test_a_trained_model_loads_as_the_readme_says(whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / "checkpoints" / "best_model.pt")
    shapes = {name: state["config"]["model"][name] for name in ("embed_dim", "num_classes", "vocab_size")}
    model = model_module.create_model("nano", **shapes)  # of 224 pixels; the run's were 32
    model.load_state_dict(state["model_state_dict"])
    model.eval()
    loaded, extras = model_module.load_model(whole / "checkpoints" / "final_model.pt")
    assert loaded.config.image_size == 32 and extras["concepts"] == state["concepts"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = (each(images=images, audio=torch.zeros(2, 48, 80)) for each in (model, loaded))
    assert differing(one, other) == []
    exported, others = model_module.load_model(whole / "checkpoints" / "model.safetensors")
    assert differing(exported.state_dict(), loaded.state_dict()) == [] and not exported.training
    assert others["concepts"] == list(extras["concepts"]) and others["tokenizer"] == extras["tokenizer"]
    for name in ("none", "broken"):
        path = tmp_path / f"{name}.safetensors"
        if name == "broken":
            path.write_bytes(b"no tensors")
            (tmp_path / "config.json").write_text("{}")
        with refused(path):
            model_module.load_model(path)
    assert one["fused_features"].shape == (2, 8) and one["logits"].shape == (2, 60)


def test_the_used_settings_are_saved_in_the_folder(small: SmallRuns, whole: Path) -> None:
    kept = load_config(whole / "config.yaml")
    assert kept == small.config(whole, *QUICK) and kept.stages[1].name == STAGES[1]["name"]


def no_space(handle: int) -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(("full", "named"), [
    ("os.fsync", ["final_model.pt", os.strerror(28)]), ("shutil.disk_usage", ["0.00"])])
def test_a_full_disk_at_the_very_end_is_one_line(small: SmallRuns, whole: Path, tmp_path: Path, full: str,
                                                 named: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "reports")

    def finish(run: run_module.Run) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(full, no_space if full == "os.fsync" else lambda folder: SimpleNamespace(free=1))
            return validation.finish(run)

    for name in ("final_model.pt", "model.safetensors"):
        (folder / "checkpoints" / name).unlink()
    before = sorted((folder / "checkpoints").iterdir())
    with monkeypatch.context() as patch, refused("--resume auto", *named):
        patch.setattr(loop, "finish", finish)
        small.train(folder, *QUICK, resume="auto")
    assert sorted((folder / "checkpoints").iterdir()) == before, "nothing half written"
    assert not [line for line in records(folder, "report") if (folder / "reports" / line["file"]).exists()]


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default() -> None:
    before = Config().to_dict()
    del before["data"]["emoji_language"], before["report"]
    assert resume.changes(before, Config().to_dict()) == []
    now = config_from_dict({"data": {"emoji_language": "zh"}}).to_dict()
    assert resume.changes(before, now) == ["data.emoji_language: en -> zh"]
