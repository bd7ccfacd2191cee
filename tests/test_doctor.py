"""The doctor: a healthy run passes, each fault put in is found and named with what to do, and nothing is changed."""

import copy
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from torch import nn

import doctor
import environment
import findings
import inspection
import prepare
import rehearsal
import run_training
from config import Config, TaskConfig, UserError, config_from_dict
from findings import Finding
from inspection import Case
from runs import Options
from tests import trees
from tests.small_runs import RECIPE, one_thread

WORDS = {"name": "words", "share": 1, "tasks": [{"inputs": ["text"], "objectives": {"masked": 1.0}}]}
PICTURES = {"name": "pictures", "share": 1, "image_keep": 0.5,
            "tasks": [{"inputs": ["image"], "objectives": {"masked": 1.0}}]}


def configured(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,)) -> Config:
    recipe = {**copy.deepcopy(RECIPE), "stages": copy.deepcopy(list(stages)), "memory": {}}
    return config_from_dict(recipe, [f"paths.data_root={json.dumps(str(folder / 'data'))}",
                                     f"paths.output_dir={json.dumps(str(folder / 'out'))}", *overrides])


def case_of(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,), options: Options | None = None) -> Case:
    (folder / "temporary").mkdir()
    return Case(configured(folder, *overrides, stages=stages), options or Options("cpu"), folder / "temporary")


def opened(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,)) -> Case:
    """A case as far as the run on a few samples."""
    case = case_of(folder, *overrides, stages=stages)
    for look in (inspection.device, inspection.data, rehearsal.model):
        assert "fail" not in {one.state for one in look(case)}  # a busy machine has little memory free: a warning
    return case


def row(found: Sequence[Finding], check: str) -> Finding:
    (one,) = [one for one in found if one.check == check]
    return one


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- the whole of it -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_healthy_run_passes_and_an_earlier_run_stays_as_it_is(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump({**RECIPE, "memory": {}}), "utf-8")
    for name in ("checkpoints/checkpoint_epoch_1.pt", "logs/metrics.jsonl", "logs/tensorboard/events", "config.yaml"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"earlier {name}")
    before = contents(out)
    status = run_training.main(["--config", str(recipe), "--doctor", "--device", "cpu", "--data-root",
                                str(tmp_path / "data"), "--output-dir", str(out)])
    printed = capsys.readouterr()
    assert status == 0, printed.out
    assert contents(out) == before and not (tmp_path / "data").exists()
    assert printed.err == "", "nothing but the table, and that on stdout"
    lines = printed.out.splitlines()
    shown = {match[1]: match[2] for match in (re.match(r"(\S.*?)  +(\w+)  ", line) for line in lines) if match}
    expected = {"torch", "decoders", "device", "data: synthetic", "disk: checkpoints", "model", "memory: evaluation",
                "step: pretrain image", "step: align audio-text", "step: finetune image-text", "overfit: masked text",
                "overfit: contrastive audio-text", "overfit: matching image-text", "overfit: concepts image-text",
                "waiting: align"}
    assert expected <= shown.keys() and {shown[name] for name in expected} == {"ok"}
    assert shown["output folder"] == "warn" and "holds an earlier run" in printed.out
    assert re.match(r"\d+ ok, 1 warn: a run with these settings can start", lines[-1])


def test_a_device_that_is_not_there_fails_and_skips_what_needs_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(configured(tmp_path), "tpu") == 1
    printed = capsys.readouterr().out
    assert re.search(r"device +fail +--device: 'tpu' is not in this machine", printed)
    assert re.search(r"data: synthetic +ok", printed), "what does not need a device is looked at"
    assert re.search(r"model +skipped +needs a device; see above", printed)
    assert re.search(r"waiting +skipped +needs a step; see above", printed)
    assert printed.splitlines()[-1].endswith("1 fail, 5 skipped: mend what failed and try again")


def test_a_fault_of_the_program_is_a_row_and_not_a_traceback() -> None:
    def look(case: object) -> Iterator[Finding]:
        yield Finding("a", "ok", "found before")
        raise KeyError("lost")

    first, second = findings.guarded("a", look, None)
    assert first.found == "found before"
    assert second.state == "fail" and "KeyError: 'lost'" in second.found and "test_doctor.py, line " in second.found


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with python"):
        doctor.main(configured(tmp_path))


def test_the_table_is_aligned_and_breaks_findings_but_no_commands() -> None:
    command = "python download_datasets.py --datasets coco --data-root ./data"
    table = findings.format_table([Finding("data: coco", "fail", "word " * 40, command), Finding("x", "ok", "y")], 100)
    lines = table.splitlines()
    assert sum(command in line for line in lines) == 1
    assert max(len(line) for line in lines if command not in line) <= 100
    column = lines[0].index("what was found")
    assert {line[column - 2:column] for line in lines} == {"  "} and lines[-1].startswith("x ")


# ---- the environment -----------------------------------------------------------------------------------------------


def test_this_environment_is_found_good(tmp_path: Path) -> None:
    found = [*environment.python(), *environment.packages(), *environment.decoders(tmp_path)]
    assert {one.check: one.state for one in found} == dict.fromkeys(["python", "torch", "packages", "decoders"], "ok")


def test_packages_that_are_missing_too_old_or_do_not_load_are_named() -> None:
    missing = environment._group("packages", [Requirement("ghost>=1")], {"ghost": ""})
    assert (missing.state, missing.found, missing.advice) == ("fail", "ghost is missing", environment.SET_UP)
    old = environment._group("packages", [Requirement("numpy>=99")], {"numpy": "2.0"})
    assert old.state == "warn" and "numpy 2.0, not >=99" in old.found
    broken = environment._group("packages", [Requirement("ghost>=1")], {"ghost": "1.0"})
    assert broken.state == "fail" and "ghost cannot be imported: No module named 'ghost'" in broken.found


@pytest.mark.parametrize(("versions", "words"), [
    (("2.14.1", "0.29.1", "2.11.0"), []),
    (("2.14.1+cpu", "0.29.1", "2.11.0"), ["different builds", "torch 2.14.1+cpu"]),
    (("2.13.0", "0.29.1", "2.11.0"), ["torchvision 0.29.1 needs torch==2.14.1, but torch 2.13.0 is there"])])
def test_torch_packages_that_do_not_belong_together_are_told(versions: tuple[str, ...], words: list[str]) -> None:
    found = environment.misfits(dict(zip(environment.TORCH, versions, strict=True)),
                                {"torchvision": ["numpy", "torch==2.14.1"], "torchaudio": []})
    assert bool(found) == bool(words) and all(word in found[0] for word in words)


def test_decoders_that_read_nothing_are_named(tmp_path: Path) -> None:
    (found,) = environment.decoders(tmp_path / "not there")
    assert found.state == "fail"
    assert [line.split(":")[0] for line in found.found.splitlines()] == list(environment.KINDS)


def test_words_of_the_hub_that_are_not_here_are_told(tmp_path: Path) -> None:
    (found,) = environment.word_vectors(configured(tmp_path, "model.word_embeddings=hub:nobody/has-this"))
    assert found.state == "warn" and "HF_ENDPOINT" in found.advice
    (found,) = environment.word_vectors(configured(tmp_path, "model.word_embeddings=minilm"))
    assert found.state == "ok"


# ---- data and disk -------------------------------------------------------------------------------------------------


def test_a_missing_set_comes_with_its_command_and_the_others_are_counted(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[synthetic, coco]")
    found = list(inspection.data(case))
    missing = row(found, "data: coco")
    assert missing.state == "fail" and f"{tmp_path}/data/coco: not there" in missing.found
    assert f"python download_datasets.py --datasets coco --data-root {tmp_path}/data" in missing.advice
    assert row(found, "data: synthetic").found.splitlines()[0] == "train: 64 audio+text, 64 image+text; 256 captions"
    assert case.config.data.datasets == ("synthetic",) and list(case.tasks) == ["words"]


def test_without_any_set_nothing_follows(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[coco, clotho]")
    assert [one.check for one in inspection.data(case)] == ["data: coco", "data: clotho"]
    assert case.data is None


def test_a_stage_without_samples_is_told(tmp_path: Path) -> None:
    both = {"name": "both", "share": 1, "tasks": [{"inputs": ["image", "audio"], "objectives": {"contrastive": 1.0}}]}
    case = case_of(tmp_path, stages=[WORDS, both])
    found = row(list(inspection.data(case)), "stage: both")
    assert found.state == "fail" and "none of its tasks has samples" in found.found
    assert [one.name for one in case.rows] == ["words"]


def test_files_that_a_list_names_and_that_are_gone_are_told_here_and_not_on_the_screen(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trees.audiocaps(tmp_path / "data")
    found = row(list(inspection.data(case_of(tmp_path, "data.datasets=[audiocaps]"))), "data: audiocaps")
    assert found.state == "warn" and "audiocaps train: 1 of the 8 files in its list are not there" in found.found
    assert "--datasets audiocaps" in found.advice and capfd.readouterr().err == ""


def own_pictures(folder: Path, good: int, bad: int) -> str:
    """Path of a list of pictures, of which `bad` are cut off, as an override."""
    lines = []
    for i in range(good + bad):
        path = trees.picture(folder / f"{i}.png", size=(64, 48))
        if i >= good:
            trees.truncate(path)
        lines.append(json.dumps({"image": path.name, "text": f"picture number {i}", "split": "train"}))
    (folder / "own.jsonl").write_text("\n".join(lines), "utf-8")
    return f"data.manifest={json.dumps(str(folder / 'own.jsonl'))}"


@pytest.mark.parametrize(("bad", "state"), [(0, "ok"), (1, "warn"), (5, "fail")])
def test_broken_pictures_are_named(tmp_path: Path, bad: int, state: str) -> None:
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 30, bad))
    list(inspection.data(case))
    (found,) = inspection.files(case)
    assert found.state == state and f"{30 + bad} of {30 + bad} images read" in found.found
    named = [i for i in range(30, 30 + bad) if f"{tmp_path}/{i}.png: " in found.found]
    assert len(named) == min(bad, inspection.NAMED) and ("and 2 more" in found.found) == (bad == 5)
    assert ("data.max_bad_pct" in found.advice) == (state == "fail")


def test_the_cache_is_foretold_and_not_made(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 80, 0), "data.cache_max_gb=1")
    list(inspection.data(case))
    found = row(list(inspection.disk(case)), "disk: cache")
    assert found.state == "ok" and case.fills_cache and "first decodes 80 files into " in found.found
    assert not prepare.cache_folder(case.config).exists()
    case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, cache_max_gb=1e-6))
    found = row(list(inspection.disk(case)), "disk: cache")
    assert found.state == "warn" and not case.fills_cache and "data.cache_max_gb" in found.advice


def test_an_output_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = case_of(tmp_path, f"paths.output_dir={tmp_path}/file/out")
    found = row(list(inspection.disk(case)), "output folder")
    assert found.state == "fail" and "cannot be written (Not a directory)" in found.found
    assert "--output-dir" in found.advice


def test_a_disk_without_room_for_the_checkpoints_fails(tmp_path: Path) -> None:
    enough = row(list(inspection.disk(case_of(tmp_path))), "disk: checkpoints")
    assert enough.state == "ok" and "up to 4 of 0.19 GB" in enough.found
    (tmp_path / "other").mkdir()
    full = row(list(inspection.disk(case_of(tmp_path / "other", "training.keep_checkpoints=1000000"))),
               "disk: checkpoints")
    assert full.state == "fail" and "training.keep_checkpoints" in full.advice


@pytest.mark.parametrize(("options", "state", "words"), [
    (Options("cpu"), "warn", "holds an earlier run (logs/metrics.jsonl)"),
    (Options("cpu", overwrite=True), "ok", "deletes an earlier run"),
    (Options("cpu", "auto"), "ok", "nothing to resume, a fresh start")])
def test_an_earlier_run_is_told(tmp_path: Path, options: Options, state: str, words: str) -> None:
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "metrics.jsonl").write_text("{}\n")
    found = row(list(inspection.disk(case_of(tmp_path, options=options))), "output folder")
    assert found.state == state and words in found.found


def test_a_checkpoint_that_cannot_be_resumed_is_a_row(tmp_path: Path) -> None:
    case = case_of(tmp_path, options=Options("cpu", str(tmp_path / "gone.pt")))
    found = list(findings.guarded("disk", inspection.disk, case))
    assert found[-1].state == "fail" and "gone.pt" in found[-1].found


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_not_free_is_told(tmp_path: Path) -> None:
    found = row(list(inspection.device(case_of(tmp_path, "memory.budget_gb=100000"))), "device memory")
    assert found.state == "warn" and "the budget is 100000" in found.found
    assert float(found.advice.split("=")[1].split(",")[0]) < 100000


def test_a_budget_that_is_too_small_fails_for_the_stage_that_needs_more(tmp_path: Path) -> None:
    case = opened(tmp_path, "memory.budget_gb=1.19", "memory.micro_batch=32", "evaluation.batch_size=1")
    stage, evaluation = inspection.plan(case)
    assert (stage.check, stage.state) == ("memory: words", "fail")
    assert "memory.budget_gb: of 1.19 GiB, 0.12 are for tensors" in stage.found
    assert "raise memory.budget_gb" in stage.advice
    assert (evaluation.check, evaluation.state) == ("memory: evaluation", "ok") and list(case.plans) == ["evaluation"]


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_of_all_tasks_are_finite_and_timed(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    found = list(rehearsal.steps(case))
    assert [(one.check, one.state) for one in found] == [("step: words text", "ok"), ("step: pictures image", "ok")]
    assert case.step_s.keys() == {("words", 0), ("pictures", 0)}


def test_a_weight_that_is_not_a_number_is_found_where_it_acts(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    assert case.run is not None
    with torch.no_grad():
        case.run.model.image.embed.weight[3, 4] = torch.nan
    found = list(rehearsal.steps(case))
    assert row(found, "step: words text").state == "ok"
    bad = row(found, "step: pictures image")
    assert bad.state == "fail" and "loss is not finite (" in bad.found
    assert "gradient is not finite of image." in bad.found and "stages.pictures" in bad.advice


def test_a_trainable_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    case = opened(tmp_path)
    assert case.run is not None
    case.run.model.text.forgotten = nn.Parameter(torch.zeros(1))
    (bad,) = rehearsal.steps(case)
    assert bad.state == "fail" and bad.found == "no gradient of text.forgotten"
    case.run.model.text.forgotten.requires_grad_(False)
    row_of_words = dataclasses.replace(case.rows[0], trainable=(r"text\.(?!forgotten).*",))
    case.config = dataclasses.replace(case.config, stages=(row_of_words,))
    assert next(iter(rehearsal.steps(case))).state == "ok", "a frozen one needs none"


def test_a_fault_of_one_stage_leaves_the_others(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[{**PICTURES, "trainable": ["vision.*"]}, WORDS])
    found = list(rehearsal.steps(case))
    assert [one.state for one in found] == ["fail", "ok"]
    assert "'vision.*' matches no parameter" in found[0].found


@pytest.mark.parametrize(("losses", "state", "words"), [
    ([2.0, 1.9, 1.3], "ok", ""), ([2.0, 1.9, 1.8], "warn", "raise --lr"), ([2.0, 2.0, 1.99], "fail", "raise --lr"),
    ([2.0, 9.0], "fail", "lower --lr"), ([2.0, float("nan")], "fail", "lower --lr"), ([0.0], "skipped", "")])
def test_a_fall_of_the_loss_is_judged(losses: list[float], state: str, words: str) -> None:
    found = rehearsal.judged("overfit", losses, 1e-3)
    assert found.state == state and words in found.advice


def test_an_objective_learns_its_batch_by_heart_and_without_a_rate_it_does_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = opened(tmp_path)
    (found,) = rehearsal.overfit(case)
    assert (found.check, found.state) == ("overfit: masked text", "ok")
    before, after = map(float, re.findall(r"loss (\S+) -> (\S+) ", found.found)[0])
    assert after <= rehearsal.LEARNT * before
    assert case.run is not None
    case.run.config = dataclasses.replace(case.run.config, training=dataclasses.replace(
        case.run.config.training, learning_rate=1e-30))
    monkeypatch.setattr(rehearsal, "UPDATES", 4)
    (found,) = rehearsal.overfit(case)
    assert found.state == "fail" and "raise --lr" in found.advice and "by 4 updates" in found.found


def test_samples_of_equal_captions_are_not_put_into_one_batch(tmp_path: Path) -> None:
    case = opened(tmp_path)
    assert case.data is not None
    split, task = case.data.splits["train"], TaskConfig(inputs=("image", "text"), objectives={"contrastive": 1.0})
    rows = rehearsal.some_rows(split, task, 8)
    assert np.array_equal(rows, rehearsal.some_rows(split, task, 8)) and len(set(rows.tolist())) == 8
    equal = dataclasses.replace(split, caption_ids=split.caption_ids % 3)
    assert len(rehearsal.some_rows(equal, task, 8)) == 3


# ---- waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "step_s", "expected"), [
    (0, 1.0, 50.0), (0, 3.0, 25.0), (2, 2.0, 0.0), (2, 0.5, 50.0)])
def test_processes_read_while_a_step_computes(processes: int, step_s: float, expected: float) -> None:
    assert rehearsal.Reading(batch_s=1.0, processes=processes).wait_pct(step_s) == pytest.approx(expected)


@pytest.mark.parametrize(("step_s", "state"), [(1e-7, "warn"), (100.0, "ok"), (float("nan"), "skipped")])
def test_more_than_a_fifth_of_waiting_is_told(tmp_path: Path, step_s: float, state: str) -> None:
    case = opened(tmp_path)
    case.step_s["words", 0] = step_s
    (found,) = rehearsal.waiting(case)
    assert found.state == state and ("data.workers=" in found.advice) == (state == "warn")


def test_waiting_is_measured_as_from_the_filled_cache(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 20, 1), stages=[PICTURES])
    for look in (inspection.device, inspection.data, inspection.disk, rehearsal.model):
        list(look(case))
    assert case.data is not None and case.fills_cache
    rows = rehearsal.some_rows(case.data.splits["train"], case.rows[0].tasks[0], 10)
    live, cached = case.data.splits["train"].store, rehearsal.as_cached(case, rows).splits["train"].store
    assert not live.entries and len(cached.entries) == 1
    good = [int(i) for i in rows if "20.png" not in live.table.images[int(i)]]
    assert len(good) > 8 and all(np.array_equal(live.image(i), cached.image(i)) for i in good)
    case.fills_cache = False
    assert rehearsal.as_cached(case, rows) is case.data


def test_the_progress_bar_is_quiet_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    list(doctor.examine(configured(tmp_path), tmp_path / "t", "tpu", None, False))
    assert said.getvalue() == ""
