"""A run's folder: opened, refused, resumed bit for bit, completed; what its checkpoints hold and which of them stay."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import checkpoint
import model as model_module
import resume
import runs
import saving
import training
from config import UserError, load_config
from runs import Options
from tests.small_runs import STAGES, SmallRuns, differing, records, without_times

ROOT = Path(__file__).resolve().parent.parent
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
    again = [line for line in records(folder) if not line.get("message", "").startswith("Resumed after")]
    found, expected = ([line | {"file": None} if line["kind"] == "report" else line for line in without_times(lines)]
                       for lines in (again, records(whole)))
    assert found == expected
    assert len(records(folder)) == len(again) + 1, "and one line says where it was resumed"


def test_a_run_that_stopped_at_the_end_of_a_stage_goes_on_bit_for_bit(small: SmallRuns, whole: Path,
                                                                      tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 1)
    small.train(folder, *QUICK, resume="auto")
    assert_same_run(folder, whole, range(2, 5))


def test_a_run_that_was_killed_goes_on_bit_for_bit(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """SIGKILL to a real process, as soon as the last epoch but one is saved."""
    folder = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small.config(folder, *QUICK).to_dict()), "utf-8")
    with subprocess.Popen([sys.executable, "run_training.py", "--config", str(recipe), "--device", "cpu"], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE) as process:
        while process.poll() is None and not (folder / "checkpoints" / "checkpoint_epoch_3.pt").exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not list((folder / "reports").iterdir())
    small.train(folder, *QUICK, resume="auto")
    assert_same_run(folder, whole, range(1, 5))


def test_a_resumed_run_splits_its_batches_as_before(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """It may have run out of memory once; another split would round otherwise."""
    folder = interrupted(whole, tmp_path / "run", 3)
    config = small.config(folder, *QUICK)
    state = state_of(whole, "checkpoint_epoch_3.pt")
    towers = ("image", "audio", "text", "fusion")
    smaller = {"micro_batch": dict.fromkeys(towers, 16), "recompute": dict.fromkeys(towers, 2)}
    run = runs.open_run(config, Options("cpu", "auto"), {**state, "best": {}})
    tasks = {row.name: training.active_tasks(row, run.data)[0] for row in config.stages}
    training.plan(run, tasks, {**state, "fits": {**state["fits"], "finetune": smaller, "gone": smaller}})
    assert {name: vars(fit) for name, fit in run.fits.items()} == {**state["fits"], "finetune": smaller}


def test_pieces_that_a_kill_leaves_behind_are_cleared(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 3)
    leftover = folder / "checkpoints" / "checkpoint_epoch_4.pt.99.tmp"
    leftover.write_bytes(b"half")
    config = small.config(folder, *QUICK)
    options = Options("cpu", "auto")
    runs.open_run(config, options, resume.find_state(config, options))
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


def test_best_weights_of_a_later_time_are_not_those_of_a_resumed_run(small: SmallRuns, whole: Path) -> None:
    def best(epoch: int) -> dict[str, Any]:
        path = whole / "checkpoints" / f"checkpoint_epoch_{epoch}.pt"
        state = resume.find_state(small.config(whole, *QUICK), Options("cpu", str(path)))
        assert state is not None
        return state["best"]

    assert best(3) == {}, "best_model.pt is of epoch 4"
    assert best(4).keys() == {"stage", "epoch", "loss", "model_state_dict"} and best(4)["epoch"] == 4


def test_a_finished_run_says_so_and_trains_nothing(small: SmallRuns, whole: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    monkeypatch.setattr(training, "open_run", None)
    report = small.train(whole, *QUICK, resume="auto")
    assert report.parent == whole / "reports" and report.suffix == ".md"
    assert f"Complete: all 4 epochs are done and evaluated. Report: {report}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_its_report_is_evaluated_again(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "reports")
    (folder / "checkpoints" / "final_model.pt").unlink()
    monkeypatch.setattr(training, "train_stage", None)
    report = small.train(folder, *QUICK, resume="auto")
    first = json.loads(next((whole / "reports").glob("*.json")).read_text("utf-8"))
    second = json.loads(report.with_suffix(".json").read_text("utf-8"))
    for name in ("evaluation", "best", "stages", "validations", "model", "data"):
        assert second[name] == first[name], name
    assert differing(mathematics(folder, "final_model.pt"), mathematics(whole, "final_model.pt")) == []
    assert small.train(folder, *QUICK, resume="auto") == report


def test_auto_in_an_empty_folder_is_a_fresh_start(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path)
    assert resume.find_state(config, Options("cpu", "auto")) is None
    run = runs.open_run(config, Options("cpu", "auto"), None)
    assert run.progress == runs.Progress() and run.best == {}


def test_auto_after_a_kill_before_any_checkpoint_leaves_no_records_of_it(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    run.tracker.event("half an epoch", 3)
    run.tracker.close()
    assert len(records(tmp_path)) == 1
    config = small.config(tmp_path)
    runs.open_run(config, Options("cpu", "auto"), resume.find_state(config, Options("cpu", "auto")))
    assert records(tmp_path) == []


def test_names_keep_their_numbers_when_the_data_grow(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 3)
    config = small.config(folder, *QUICK, "data.synthetic_images=400", "model.num_classes=12")
    options = Options("cpu", "auto")
    state = state_of(whole, "checkpoint_epoch_3.pt")
    names = state["concepts"][::-1]
    with pytest.raises(UserError, match="model is of another shape"):  # 12 classes: only to see the order below
        runs.open_run(config, options, {**state, "best": {}})
    data = runs.read_data(small.config(folder, *QUICK, "data.synthetic_images=400"), {**state, "concepts": names})
    assert list(data.concepts) == names != list(runs.load_data(small.config(folder, *QUICK)).concepts)


def test_auto_where_no_checkpoint_can_be_read_is_refused_and_deletes_nothing(small: SmallRuns, whole: Path,
                                                                             tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 2)
    paths = sorted((folder / "checkpoints").glob("checkpoint_epoch_*.pt"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"none of the {len(paths)} checkpoints in .* can be read; see to the disk"):
        small.train(folder, *QUICK, resume="auto")
    assert sorted((folder / "checkpoints").glob("checkpoint_epoch_*.pt")) == paths


def test_another_runs_checkpoint_is_not_gone_on_with_in_a_used_folder(small: SmallRuns, whole: Path,
                                                                      tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", 2)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(UserError, match="holds an earlier run"):
        small.train(folder, *QUICK, resume=str(whole / "checkpoints" / "checkpoint_epoch_3.pt"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_going_back_deletes_what_lies_further_on_before_anything_else_can_happen(small: SmallRuns, whole: Path,
                                                                                tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    config = small.config(folder, *QUICK)
    options = Options("cpu", str(folder / "checkpoints" / "checkpoint_epoch_2.pt"))
    runs.open_run(config, options, resume.find_state(config, options)).tracker.close()
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
    assert "The best weights so far are lost, the next validation begins anew: " in capsys.readouterr().out
    final, last = (torch.load(folder / "checkpoints" / name) for name in ("final_model.pt", "checkpoint_epoch_4.pt"))
    assert differing(final["model_state_dict"], last["model_state_dict"]) == []


def test_steps_of_an_unfinished_epoch_count_as_done_where_fewer_are_left(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    run.progress.epoch_step = 99
    log = training.train_epoch(run, stage, epoch=1)
    assert (log.samples, run.progress.epoch, run.progress.epoch_step) == (0, 1, 0)


def test_a_folder_is_claimed_before_its_checkpoints_are_looked_at(small: SmallRuns, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def look(config: Any, options: Options) -> None:
        code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        found = subprocess.run([sys.executable, "-c", code, str(tmp_path / runs.LOCK)], capture_output=True, text=True)
        assert "BlockingIOError" in found.stderr
        raise UserError("that was all")

    monkeypatch.setattr(training, "find_state", look)
    with pytest.raises(UserError, match="that was all"):
        small.train(tmp_path, resume="auto")


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_used_folder_is_refused_then_thrown_away(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    with pytest.raises(UserError, match=re.escape(
            f"{folder}: holds an earlier run (checkpoints, logs/metrics.jsonl). Continue it with --resume auto, delete "
            "it with --overwrite, or choose another --output-dir")):
        small.train(folder, *QUICK)
    assert len(list((folder / "checkpoints").iterdir())) == 8
    run = runs.open_run(small.config(folder, *QUICK), Options("cpu", overwrite=True), None)
    assert list((folder / "checkpoints").iterdir()) == [] and records(folder) == []
    assert run.progress.step == 0
    events = list((folder / "logs" / "tensorboard").iterdir())
    assert len(events) == 1, "the curves of the run that was thrown away are gone"


def test_a_mistake_found_late_throws_nothing_away(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    with pytest.raises(UserError, match=r"download_datasets\.py --datasets clotho"):
        small.train(folder, *QUICK, "data.datasets=[clotho]", overwrite=True)
    assert len(list((folder / "checkpoints").iterdir())) == 8 and len(records(folder)) == len(records(whole))


def test_a_folder_in_which_only_setting_up_failed_is_not_in_use(small: SmallRuns, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad_samples.jsonl").write_text("{}\n")
    small.open(tmp_path).tracker.close()  # stopped before the first step: its log is empty
    small.open(tmp_path).tracker.event("a step", 1)
    with pytest.raises(UserError, match=r"holds an earlier run \(logs/metrics\.jsonl\)"):
        small.open(tmp_path)


@pytest.mark.parametrize(("overrides", "words"), [
    (["model.size=small"], r"the checkpoint's model is of another shape: .*image \(\d+\): image\.embed\.weight "
                           r"\[192, 768\] in the file, \[320, 768\] in the model, .* and \d+ more"),
    (["model.num_classes=7"], r"another shape: other shape: classifier \(2\): classifier\.weight \[1000, 512\] in the "
                              r"file, \[7, 512\] in the model"),
])
def test_another_model_is_refused(small: SmallRuns, whole: Path, tmp_path: Path, overrides: list[str],
                                                   words: str) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "checkpoint_epoch_4.pt", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=f"^--resume: .*{words}"):
        small.train(tmp_path / "run", *QUICK, *overrides, resume="auto")
    assert not (tmp_path / "run" / "logs" / "metrics.jsonl").exists()


def test_other_stages_than_were_trained_are_refused(small: SmallRuns, whole: Path) -> None:
    config = small.config(whole, *QUICK)
    with pytest.raises(UserError, match=r"^--resume: the checkpoint has trained the stages pretrain, align, finetune, "
                                        "but the configuration begins with align, finetune; resume with the stages"):
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
    config = load_config(None, [f"training.epochs={epochs}"])
    state = {"stage": stage, "stage_epochs": resume.stage_epochs(load_config(None, ["training.epochs=10"])),
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
    assert capsys.readouterr().out.splitlines() == [
        "Changed since this checkpoint: training.learning_rate: 0.001 -> 0.5",
        "Changed since this checkpoint: stages.align.drop_path: 0.1 -> 0.3"]


@pytest.mark.parametrize(("override", "words"), [
    ("stages.finetune.tasks.0.objectives={contrastive: 1.0}", r"unexpected: 0_matching \(2\)"),
    ("stages.finetune.trainable=['image.*', 'logit_scale.*']", "the optimizer holds other parameters"),
    ("training.optimizer=adamw", "the optimizer holds other parameters"),
])
def test_a_stage_that_trains_something_else_is_refused(small: SmallRuns, whole: Path, tmp_path: Path, override: str,
                                                       words: str) -> None:
    run = small.open(tmp_path / "run", *QUICK, override)
    stage = small.stage(run, "finetune")
    said = rf"--resume: stages\.finetune had other tasks, objectives, trainable parameters or another .*{words}"
    with pytest.raises(UserError, match=said):
        stage.load_state_dict(state_of(whole, "checkpoint_epoch_3.pt")["stage_state"])


def test_checkpoints_that_training_cannot_go_on_from(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    config = small.config(tmp_path, *QUICK)
    for name in ("best_model.pt", "final_model.pt"):
        path = whole / "checkpoints" / name
        with pytest.raises(UserError, match=f"--resume: {path}: holds weights only, .*give a checkpoint_epoch_"):
            resume.find_state(config, Options("cpu", str(path)))
    with pytest.raises(UserError, match=r"--resume: .*none\.pt: no such checkpoint"):
        resume.find_state(config, Options("cpu", str(tmp_path / "none.pt")))
    newer = tmp_path / "checkpoints" / "checkpoint_epoch_1.pt"
    checkpoint.save({"schema": 99}, newer)
    with pytest.raises(UserError, match=r"--resume: .*written by a newer version"):
        resume.find_state(config, Options("cpu", "auto"))
    with pytest.raises(UserError, match="--overwrite deletes the run that --resume would go on with"):
        resume.find_state(config, Options("cpu", "auto", overwrite=True))


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_its_use_needs_as_plain_data(small: SmallRuns, whole: Path) -> None:
    config = small.config(whole, *QUICK)
    for name in ("best_model.pt", "final_model.pt", "checkpoint_epoch_4.pt"):
        state = torch.load(whole / "checkpoints" / name)  # torch's default, which refuses code
        assert state["config"] == config.to_dict(), name
        assert json.loads(state["tokenizer"])["model"]["vocab"]["circle"] > 0
        assert {"red", "circle", "melody"} <= set(state["concepts"]) and state["speakers"] == []
        assert state["normalisation"] == {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
                                          "log_mel_mean": -6.0, "log_mel_std": 4.0}
        kinds = {(value.device.type, value.dtype) for value in state["model_state_dict"].values()}
        assert kinds == {("cpu", torch.float32)}
        assert not [key for key in state["model_state_dict"] if key.startswith(("0_", "1_"))], "no stage's heads"
    going_on = torch.load(whole / "checkpoints" / "checkpoint_epoch_4.pt")
    assert going_on["stage_state"].keys() == {"objectives", "optimizer", "average", "bad_in_a_row", "alarms"}
    assert going_on["fits"].keys() == {"pretrain", "align", "finetune", "evaluation"}
    progress = {"epoch": 4, "step": records(whole, "stage")[-1]["step"], "stage_step": 4, "epoch_step": 0}
    assert going_on["progress"].items() >= progress.items() and going_on["progress"]["losses"] == 2
    assert going_on["stage_epochs"] == {"pretrain": 1, "align": 1, "finetune": 2}


def test_a_trained_model_loads_as_the_readme_says(whole: Path, tmp_path: Path) -> None:
    model = model_module.create_model("tiny")  # of 224 pixels; the run's were 32
    state = torch.load(whole / "checkpoints" / "best_model.pt")
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
        with pytest.raises(UserError, match=f"{path}: cannot be read, with the config.json beside it"):
            model_module.load_model(path)
    assert one["fused_features"].shape == (2, 512) and one["logits"].shape == (2, 1000)


def test_the_used_settings_are_saved_in_the_folder(small: SmallRuns, whole: Path) -> None:
    kept = load_config(whole / "config.yaml")
    assert kept == small.config(whole, *QUICK) and kept.stages[1].name == STAGES[1]["name"]


def no_space(handle: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("full", "said"), [("os.fsync", "No space left on device"),
                                            ("shutil.disk_usage", r"takes [0-9.]+ GB, 0\.00 are free")])
def test_a_full_disk_at_the_very_end_is_one_line(small: SmallRuns, whole: Path, tmp_path: Path, full: str, said: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "reports")

    def finish(run: runs.Run) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(full, no_space if full == "os.fsync" else lambda folder: shutil._ntuple_diskusage(9, 8, 1))
            return runs.finish(run)

    for name in ("final_model.pt", "model.safetensors"):
        (folder / "checkpoints" / name).unlink()
    before = sorted((folder / "checkpoints").iterdir())
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said + ".*--resume auto"):
        patch.setattr(training, "finish", finish)
        small.train(folder, *QUICK, resume="auto")
    assert sorted((folder / "checkpoints").iterdir()) == before, "nothing half written"
    assert not [line for line in records(folder, "report") if (folder / "reports" / line["file"]).exists()]
