"""The doctor: a healthy run passes, each fault put in is found and named with what to do, and nothing is changed."""

import copy
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from torch import nn

import run_training
from datasets import load_data
from tests import trees
from tests.data.test_cache import children_of, wait_for
from tests.data.test_data_faults import hanging
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import RECIPE
from trimodal import distributed
from trimodal.config import Config, TaskConfig, config_from_dict
from trimodal.data import cache
from trimodal.doctor import doctor, environment, findings, inspection, rehearsal
from trimodal.doctor.findings import Finding
from trimodal.doctor.inspection import Case
from trimodal.training.run import Options

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


def own_pictures(folder: Path, good: int, bad: int, val: int = 0) -> str:
    """Path of a list of pictures, as an override: the `bad` are cut off, the first `val` are to validate on."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(good + bad):
        path = trees.picture(folder / f"{i}.png", size=(64, 48))
        if i >= good:
            trees.truncate(path)
        split = "val" if i < val else "train"
        lines.append(json.dumps({"image": path.name, "text": f"picture number {i}", "split": split}))
    (folder / "own.jsonl").write_text("\n".join(lines), "utf-8")
    return f"data.manifest={json.dumps(str(folder / 'own.jsonl'))}"


def row(found: Sequence[Finding], check: str) -> Finding:
    (one,) = [one for one in found if one.check == check]
    return one


# ---- the whole of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are written."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_healthy_run_passes_and_an_earlier_run_stays_as_it_is(
        tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "out"
    quick = {**RECIPE["training"], "learning_rate": 0.03}  # so small a model learns a batch at such a rate only
    recipe.write_text(yaml.safe_dump({**RECIPE, "memory": {}, "training": quick}), "utf-8")
    for name in ("checkpoints/checkpoint_epoch_1.pt", "logs/metrics.jsonl", "logs/tensorboard/events", "config.yaml"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"earlier {name}")
    before = contents(out)
    status = run_training.main(["--config", str(recipe), "--doctor", "--device", "cpu", "--data-root",
                                str(tmp_path / "data"), "--output-dir", str(out), "--overwrite"])
    printed = capsys.readouterr()
    assert status == 0, printed.out
    assert contents(out) == before and not (tmp_path / "data").exists() and not list(temporary.glob("doctor-*"))
    assert printed.err == "", "nothing but the table, and that on stdout"
    lines = printed.out.splitlines()
    shown = {match[1]: match[2] for match in (re.match(r"(\S.*?)  +(\w+)  ", line) for line in lines) if match}
    expected = {"torch", "decoders", "device", "data: synthetic", "disk: checkpoints", "model", "memory: evaluation",
                "step: pretrain image", "step: align audio-text", "step: finetune image-text", "overfit: masked text",
                "overfit: contrastive audio-text", "overfit: matching image-text", "overfit: concepts image-text",
                "output folder"}
    assert expected <= shown.keys() and {shown[name] for name in expected} == {"ok"}
    assert {f"waiting: {stage}" for stage in ("pretrain", "align", "finetune")} <= shown.keys()
    assert re.match(r"\d+ ok\b", lines[-1]) and "fail" not in lines[-1]


def recipe_of(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "memory": {}}), "utf-8")
    return path


def test_a_device_that_is_not_there_fails_and_skips_what_needs_it(
        tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(configured(tmp_path), "tpu") == 1
    assert not list(temporary.glob("doctor-*"))
    printed = capsys.readouterr().out
    assert re.search(r"^device +fail .*--device.*tpu", printed, re.MULTILINE)
    assert re.search(r"^data: synthetic +ok ", printed, re.MULTILINE), "what does not need a device is looked at"
    skipped = re.findall(r"^(\w+) +skipped ", printed, re.MULTILINE)
    assert skipped == ["model", "memory", "step", "overfit", "waiting"]
    assert_names(printed.splitlines()[-1], "1 fail", "5 skipped")


def test_a_fault_of_the_program_is_a_row_and_not_a_traceback() -> None:
    def look(case: object) -> Iterator[Finding]:
        yield Finding("a", "ok", "found before")
        raise KeyError("lost")

    first, second = findings.guarded("a", look, None)
    assert first.found == "found before"
    assert second.state == "fail" and "KeyError: 'lost'" in second.found and "test_doctor.py, line " in second.found


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("--doctor", "torchrun"):
        doctor.main(configured(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", " ")
    assert doctor.main(configured(tmp_path), "tpu") == 1 and distributed.start().size == 1, "no number of processes"


def test_an_interrupted_look_prints_what_it_has_found_and_leaves_nothing(
        tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def asked_to_stop(case: Case) -> Iterator[Finding]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield Finding("files", "ok", "comes too late")

    monkeypatch.setattr(inspection, "files", asked_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    status = run_training.main(["--config", str(recipe_of(tmp_path)), "--doctor", "--device", "cpu",
                                "--data-root", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert status == 130 and "Traceback" not in printed.err and signal.getsignal(signal.SIGTERM) is before
    assert re.search(r"^data: synthetic +ok ", printed.out, re.MULTILINE)
    assert not re.search(r"^files", printed.out, re.MULTILINE) and not re.search(r"^\d+ ok", printed.out, re.MULTILINE)
    assert_told_last(printed.out)
    assert not list(temporary.glob("doctor-*"))


def assert_told_last(printed: str) -> None:
    """Below the table stands that it is not the whole of it."""
    last = printed.splitlines()[-1]
    assert last and not re.search(r" {2,}(ok|warn|fail|skipped) ", last)


@pytest.mark.timed
def test_a_look_that_is_interrupted_while_files_hang_leaves_no_process(
        tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal comes when a file is being read: every process has been started by then, and at the moment of a fork
    Python may lose what a handler raises."""
    listed, command = own_pictures(tmp_path / "pictures", 20, 0), ["--config", str(recipe_of(tmp_path)), "--doctor"]
    before, decode = set(children_of(os.getpid())), cache.decode

    def noted(*given: Any) -> Any:
        (tmp_path / "reading").touch()
        return decode(*given)

    def interrupt() -> None:
        wait_for((tmp_path / "reading").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cache, "decode", noted)
    thread = threading.Thread(target=interrupt, daemon=True)
    with hanging(*(tmp_path / "pictures").glob("*.png")):
        thread.start()
        status = run_training.main([*command, "--device", "cpu", "--data-root", str(tmp_path / "data"), "--output-dir",
                                    str(tmp_path / "out"), "data.datasets=[manifest]", listed])
    thread.join()
    printed = capsys.readouterr()
    assert status == 130 and "Traceback" not in printed.err
    assert re.search(r"^data: manifest +ok ", printed.out, re.MULTILINE)
    assert_told_last(printed.out)
    assert set(children_of(os.getpid())) <= before and not list(temporary.glob("doctor-*"))


@pytest.mark.parametrize("package", ["numpy", "tqdm", "torch"])
def test_a_package_that_is_missing_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = list(doctor.examine(configured(tmp_path), tmp_path / "t", "cpu", None, False))
    failed = row(found, "torch" if package == "torch" else "packages")
    assert failed.state == "fail" and failed.advice == environment.SET_UP
    assert any(package in line.split() for line in failed.found.splitlines())
    assert (found[-1].check, found[-1].state) == ("all else", "skipped")


def test_without_any_of_its_packages_the_doctor_starts_all_the_same(tmp_path: Path) -> None:
    program = ("import sys; sys.modules |= dict.fromkeys(('numpy', 'tqdm', 'torch')); import run_training; "
               f"sys.exit(run_training.main(['--doctor', '--output-dir', {str(tmp_path)!r}]))")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                         cwd=run_training.DEFAULT_CONFIG.parent)
    assert run.returncode == 1 and run.stderr == ""
    assert re.findall(r"^(\S.*?) {2,}(?:fail|skipped) ", run.stdout, re.MULTILINE) == ["torch", "packages", "all else"]


@pytest.mark.parametrize("words", [["run_training.py", "--doctor"], ["evaluate.py", "--checkpoint", "x"],
                                   ["download_datasets.py", "--datasets", "coco"]], ids=lambda words: words[0])
def test_without_the_environment_the_command_that_activates_it_is_told(words: list[str]) -> None:
    run = subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True,
                         cwd=run_training.DEFAULT_CONFIG.parent, check=False)
    assert run.returncode == 2
    assert_told(run.stderr, "yaml", "source venv/bin/activate")


@pytest.mark.parametrize("package", ["requests", "tqdm"])
def test_packages_that_downloads_load_late_are_asked_for_at_once(package: str) -> None:
    program = (f"import importlib.util as u; found = u.find_spec; "
               f"u.find_spec = lambda name: None if name == {package!r} else found(name); import download_datasets")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                         cwd=run_training.DEFAULT_CONFIG.parent)
    assert run.returncode == 2 and run.stdout == ""
    assert_told(run.stderr, package, "source venv/bin/activate")


def test_names_that_the_screen_cannot_show_and_secrets_are_hidden(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    monkeypatch.setattr("sys.stdout", screen)
    folder = os.fsdecode(os.fsencode(tmp_path / "https://anna:secret@host") + b"/\xff")
    config = configured(tmp_path)
    config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, output_dir=folder))
    doctor.main(config, "tpu")
    screen.seek(0)
    printed = screen.read()
    assert "***@host/" in printed and "secret" not in printed and "\\udcff" in printed


def test_a_lack_of_memory_comes_with_what_helps() -> None:
    def look() -> Iterator[Finding]:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        yield

    (found,) = findings.guarded("model", look)
    assert found.state == "fail"
    assert_names(found.found, "Tried to allocate 2 GiB")
    assert_names(found.advice, "model.size")


def test_the_table_is_aligned_and_breaks_findings_but_no_commands() -> None:
    command = "python download_datasets.py --datasets coco --data-root ./data"
    table = findings.format_table([Finding("data: coco", "fail", "word " * 40, command), Finding("x", "ok", "y")], 100)
    lines = table.splitlines()
    assert sum(command in line for line in lines) == 1
    assert max(len(line) for line in lines if command not in line) <= 100
    column = lines[0].index(findings.HEADER[2])
    assert {line[column - 2:column] for line in lines} == {"  "} and lines[-1].startswith("x ")


# ---- the environment -----------------------------------------------------------------------------------------------


def test_this_environment_is_found_good(tmp_path: Path) -> None:
    found = [*environment.python(), *environment.packages(), *environment.decoders(tmp_path)]
    assert {one.check: one.state for one in found} == dict.fromkeys(["python", "torch", "packages", "decoders"], "ok")


def test_packages_that_are_missing_too_old_or_do_not_load_are_named() -> None:
    missing = environment.judged("packages", [Requirement("ghost>=1")], {"ghost": ""})
    old = environment.judged("packages", [Requirement("numpy>=99")], {"numpy": "2.0"})
    broken = environment.judged("packages", [Requirement("ghost>=1")], {"ghost": "1.0"})
    assert [one.state for one in (missing, old, broken)] == ["fail", "warn", "fail"]
    assert {one.advice for one in (missing, old, broken)} == {environment.SET_UP}
    assert_names(missing.found, "ghost")
    assert_names(old.found, "numpy", "2.0", ">=99")
    assert_names(broken.found, "ghost", "No module named 'ghost'")


@pytest.mark.parametrize(("versions", "named"), [
    (("2.14.1", "0.29.1", "2.11.0"), []),
    (("2.14.1+cpu", "0.29.1", "2.11.0"), ["torch 2.14.1+cpu", "torchvision 0.29.1", "torchaudio 2.11.0"]),
    (("2.13.0", "0.29.1", "2.11.0"), ["torchvision 0.29.1", "torch==2.14.1", "torch 2.13.0"])])
def test_torch_packages_that_do_not_belong_together_are_told(versions: tuple[str, ...], named: list[str]) -> None:
    found = environment.misfits(dict(zip(environment.TORCH, versions, strict=True)),
                                {"torchvision": ["numpy", "torch==2.14.1"], "torchaudio": []})
    assert bool(found) == bool(named)
    if found:
        assert_names(found[0], *named)


def test_decoders_that_read_nothing_are_named(tmp_path: Path) -> None:
    (found,) = environment.decoders(tmp_path / "not there")
    assert found.state == "fail"
    assert [line.split(":")[0] for line in found.found.splitlines()] == list(environment.KINDS)


def test_words_of_the_hub_that_are_not_here_are_told(tmp_path: Path) -> None:
    (found,) = environment.word_vectors(configured(tmp_path, "model.word_embeddings=hub:nobody/has-this"))
    assert found.state == "warn" and "HF_ENDPOINT" in found.advice
    (found,) = environment.word_vectors(configured(tmp_path, "model.word_embeddings=minilm"))
    assert found.state == "ok"


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_of_all_tasks_are_finite_and_timed(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    found = list(rehearsal.steps(case))
    assert [(one.check, one.state) for one in found] == [("step: words text", "ok"), ("step: pictures image", "ok")]
    assert case.step_s.keys() == {("words", 0), ("pictures", 0)}


def test_a_batch_with_nothing_to_learn_is_no_fault(tmp_path: Path) -> None:
    concepts = {"name": "named", "share": 1, "tasks": [{"inputs": ["image"], "objectives": {"concepts": 1.0}}]}
    case = opened(tmp_path, stages=[concepts])
    assert case.run is not None
    case.run.data = dataclasses.replace(case.run.data, concepts=())
    assert [(one.state, one.found) for one in rehearsal.steps(case)] == [("skipped", rehearsal.NOTHING)]


def test_a_weight_that_is_not_a_number_is_found_where_it_acts(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    assert case.run is not None
    with torch.no_grad():
        case.run.model.image.embed.weight[3, 4] = torch.nan
    found = list(rehearsal.steps(case))
    assert row(found, "step: words text").state == "ok"
    bad = row(found, "step: pictures image")
    assert bad.state == "fail" and "stages.pictures" in bad.advice
    loss, gradient = bad.found.splitlines()
    assert_names(loss, "loss", rehearsal.NOT_FINITE)
    assert_names(gradient, "gradient", rehearsal.NOT_FINITE)
    assert "image." in gradient and "text." not in gradient


def test_a_trainable_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    case = opened(tmp_path)
    assert case.run is not None
    case.run.model.text.forgotten = nn.Parameter(torch.zeros(1))
    (bad,) = rehearsal.steps(case)
    assert bad.state == "fail"
    assert_names(bad.found, "text.forgotten")
    assert bad.found.count("text.") == 1
    case.run.model.text.forgotten.requires_grad_(False)
    row_of_words = dataclasses.replace(case.rows[0], trainable=(r"text\.(?!forgotten).*",))
    case.config = dataclasses.replace(case.config, stages=(row_of_words,))
    assert next(iter(rehearsal.steps(case))).state == "ok", "a frozen one needs none"


def test_a_fault_of_one_stage_leaves_the_others(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[{**PICTURES, "trainable": ["vision.*"]}, WORDS])
    found = list(rehearsal.steps(case))
    assert [one.state for one in found] == ["fail", "ok"]
    assert_names(found[0].found, "vision.*")


def test_a_fall_of_the_loss_is_judged() -> None:
    learnt, nothing = rehearsal.judged("overfit", [2.0, 1.9, 1.3], 1e-3), rehearsal.judged("overfit", [0.0], 1e-3)
    assert (learnt.state, learnt.advice) == ("ok", "") and (nothing.state, nothing.advice) == ("skipped", "")
    slow, still, risen, broken = (rehearsal.judged("overfit", losses, 1e-3) for losses in (
        [2.0, 1.9, 1.8], [2.0, 2.0, 1.99], [2.0, 9.0], [2.0, float("nan")]))
    assert [one.state for one in (slow, still, risen, broken)] == ["warn", "fail", "fail", "fail"]
    assert slow.advice == still.advice and risen.advice == broken.advice
    assert_names(still.advice, "raise --lr")
    assert_names(risen.advice, "lower --lr")


def test_an_objective_learns_its_batch_by_heart_and_without_a_rate_it_does_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = opened(tmp_path, "training.learning_rate=0.03", stages=[{**WORDS, "trainable": [r"text\.blocks\.99\..*"]}])
    (found,) = rehearsal.overfit(case)
    assert (found.check, found.state) == ("overfit: masked text", "ok")
    before, after = map(float, re.findall(r"\d+\.\d+", found.found)[:2])
    assert after <= rehearsal.LEARNT * before + 1e-3  # they are shown with three digits
    assert case.run is not None
    case.run.config = dataclasses.replace(case.run.config, training=dataclasses.replace(
        case.run.config.training, learning_rate=1e-30))
    monkeypatch.setattr(rehearsal, "UPDATES", 4)
    (found,) = rehearsal.overfit(case)
    assert found.state == "fail"
    assert_names(found.advice, "raise --lr")
    assert_names(found.found, 4)


def test_a_large_model_learns_by_heart_in_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = opened(tmp_path, "model.size=small")
    monkeypatch.setattr(rehearsal, "UPDATES", 1)
    size, found = rehearsal.overfit(case)
    assert (size.check, size.state) == ("overfit", "ok") and found.check == "overfit: masked text"
    assert_names(size.found, "tiny")


def test_samples_of_equal_captions_are_not_put_into_one_batch(tmp_path: Path) -> None:
    case = opened(tmp_path)
    assert case.data is not None
    split, task = case.data.splits["train"], TaskConfig(inputs=("image", "text"), objectives={"contrastive": 1.0})
    rows = rehearsal.some_rows(split, task, 8)
    assert np.array_equal(rows, rehearsal.some_rows(split, task, 8)) and len(set(rows.tolist())) == 8
    equal = dataclasses.replace(split, caption_ids=split.caption_ids % 3)
    assert len(rehearsal.some_rows(equal, task, 8)) == 3
    equal = dataclasses.replace(split, image_ids=split.image_ids % 4)
    assert len(rehearsal.some_rows(equal, task, 8)) == 4, "nor those of equal pictures"


# ---- waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "step_s", "expected"), [
    (0, 1.0, 50.0), (0, 3.0, 25.0), (2, 2.0, 0.0), (2, 0.5, 50.0)])
def test_processes_read_while_a_step_computes(processes: int, step_s: float, expected: float) -> None:
    assert rehearsal.Reading(batch_s=1.0, processes=processes).wait_pct(step_s) == pytest.approx(expected)


@pytest.mark.parametrize(("step_s", "state", "workers"), [
    (1e-7, "warn", 0), (100.0, "ok", 0), (float("nan"), "skipped", 0), (float("nan"), "skipped", 2)])
def test_more_than_a_fifth_of_waiting_is_told(tmp_path: Path, step_s: float, state: str, workers: int) -> None:
    case = opened(tmp_path)
    case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, workers=workers))
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


def test_waiting_is_measured_from_the_cache_of_the_run_where_that_is_filled(tmp_path: Path) -> None:
    overrides = ["data.datasets=[manifest]", own_pictures(tmp_path, 20, 0)]
    load_data(configured(tmp_path, *overrides))
    case = opened(tmp_path, *overrides, stages=[PICTURES])
    case.fills_cache = True  # of another set
    assert case.data is not None and case.data.splits["train"].store.entries
    rows = rehearsal.some_rows(case.data.splits["train"], case.rows[0].tasks[0], 10)
    assert rehearsal.as_cached(case, rows) is case.data


def test_the_progress_bar_is_quiet_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    list(doctor.examine(configured(tmp_path), tmp_path / "t", "tpu", None, False))
    assert said.getvalue() == ""
