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

import pytest
import torch
import yaml

import run_training
from tests import trees
from tests.data.test_cache import children_of, wait_for
from tests.data.test_data_faults import hanging
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import RECIPE
from trimodal import distributed, doctor
from trimodal.config import Config, config_from_dict
from trimodal.data import cache
from trimodal.doctor import Case, Finding
from trimodal.training.run import Options

WORDS = {"name": "words", "share": 1, "tasks": [{"inputs": ["text"], "objectives": {"masked": 1.0}}]}
PICTURES = {"name": "pictures", "share": 1, "image_keep": 0.5,
            "tasks": [{"inputs": ["image"], "objectives": {"masked": 1.0}}]}


def configured(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,)) -> Config:
    recipe = {**copy.deepcopy(RECIPE), "stages": copy.deepcopy(list(stages)), "memory": {}}
    return config_from_dict(recipe, [f"paths.data_root={json.dumps(str(folder / 'data'))}",
                                     f"paths.output_dir={json.dumps(str(folder / 'out'))}", *overrides])


def case_of(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,), options: Options | None = None) -> Case:
    (folder / "temporary").mkdir(parents=True)
    return Case(configured(folder, *overrides, stages=stages), options or Options("cpu"), folder / "temporary")


def opened(folder: Path, *overrides: str, stages: Sequence[Any] = (WORDS,)) -> Case:
    """A case as far as the run on a few samples."""
    case = case_of(folder, *overrides, stages=stages)
    for check in (doctor.check_device, doctor.check_data, doctor.check_memory):
        list(doctor.guarded(check.__name__, check, case))
    assert case.run is not None
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
    expected = {"packages", "device", "data: synthetic", "disk: checkpoints", "model", "memory: evaluation",
                "step: pretrain image", "step: align audio-text", "step: finetune image-text", "output folder"}
    assert expected <= shown.keys() and {shown[name] for name in expected} == {"ok"}
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
    assert skipped == ["memory", "step"]
    assert_names(printed.splitlines()[-1], "1 fail", "2 skipped")


def test_a_fault_of_the_program_is_a_row_and_not_a_traceback() -> None:
    def look(case: object) -> Iterator[Finding]:
        yield Finding("a", "ok", "found before")
        raise KeyError("lost")

    first, second = doctor.guarded("a", look, None)
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

    monkeypatch.setattr(doctor, "CHECKS", [(title, asked_to_stop if title == "files" else check, needs)
                                            for title, check, needs in doctor.CHECKS])
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
    failed = row(found, "packages")
    assert failed.state == "fail" and failed.advice == doctor.SET_UP
    assert any(package in line.split() for line in failed.found.splitlines())
    assert (found[-1].check, found[-1].state) == ("all else", "skipped")


@pytest.mark.parametrize("words", [["run_training.py", "--doctor"], ["evaluate.py", "--checkpoint", "x"],
                                   ["download_datasets.py", "--datasets", "coco"]], ids=lambda words: words[0])
def test_without_the_environment_the_command_that_activates_it_is_told(words: list[str]) -> None:
    run = subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True,
                         cwd=run_training.DEFAULT_CONFIG.parent, check=False)
    assert run.returncode == 2
    assert_told(run.stderr, "source venv/bin/activate")


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

    (found,) = doctor.guarded("model", look)
    assert found.state == "fail"
    assert_names(found.found, "Tried to allocate 2 GiB")
    assert_names(found.advice, "model.size")


# ---- the environment -----------------------------------------------------------------------------------------------


def test_this_environment_is_found_good() -> None:
    assert {one.check: one.state for one in doctor.check_packages()} == {"python": "ok", "packages": "ok"}


def test_words_of_the_hub_that_are_not_here_are_told(tmp_path: Path) -> None:
    (found,) = doctor.check_word_embeddings(case_of(tmp_path / "1", "model.word_embeddings=hub:nobody/has-this"))
    assert found.state == "warn" and "HF_ENDPOINT" in found.advice
    (found,) = doctor.check_word_embeddings(case_of(tmp_path / "2", "model.word_embeddings=minilm"))
    assert found.state == "ok"


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_of_all_tasks_are_finite_and_timed(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    found = list(doctor.check_steps(case))
    assert [(one.check, one.state) for one in found] == [("step: words text", "ok"), ("step: pictures image", "ok")]


def test_a_weight_that_is_not_a_number_is_found_where_it_acts(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[WORDS, PICTURES])
    assert case.run is not None
    with torch.no_grad():
        case.run.model.image.embed.weight[3, 4] = torch.nan
    found = list(doctor.check_steps(case))
    assert row(found, "step: words text").state == "ok"
    bad = row(found, "step: pictures image")
    assert bad.state == "fail" and "stages.pictures" in bad.advice
    assert_names(bad.found, "masked_image")


def test_a_fault_of_one_stage_leaves_the_others(tmp_path: Path) -> None:
    case = opened(tmp_path, stages=[{**PICTURES, "trainable": ["vision.*"]}, WORDS])
    found = list(doctor.check_steps(case))
    assert [one.state for one in found] == ["fail", "ok"]
    assert_names(found[0].found, "vision.*")


def test_the_progress_bar_is_quiet_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    list(doctor.examine(configured(tmp_path), tmp_path / "t", "tpu", None, False))
    assert said.getvalue() == ""


def test_the_table_is_aligned_and_wraps_findings_but_no_commands() -> None:
    command = "python download_datasets.py --datasets coco --data-root ./data " + "x" * 60
    table = doctor.format_table([Finding("data: coco", "fail", "word " * 40, command), Finding("x", "ok", "y")], 100)
    lines = table.splitlines()
    assert sum(command in line for line in lines) == 1
    assert max(len(line) for line in lines if command not in line) <= 100
    assert {line.index(word) for line, word in ((lines[0], "word"), (lines[-1], "y"))} == {lines[0].index("word")}
