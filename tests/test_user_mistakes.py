"""Each mistake takes one line on stderr that says where it is and what to do, exit code 2, and nothing else happens."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
import run_training
from tests import trees
from tests.project import ROOT
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import RECIPE, SmallRuns
from trimodal import checkpoint
from trimodal.arguments import exit_code, writing_to
from trimodal.config import SIZES
from trimodal.data import cache as cache_module
from trimodal.evaluation import compare, zero_shot
from trimodal.export import __main__ as export
from trimodal.training import initial
from trimodal.training import run as run_module

Main = Callable[..., str]
Named = list[str]


def status_of(main: Callable[[list[str]], int], arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture
def mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs run_training.py with these arguments, on the small recipe; the one line that it must print."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), "utf-8")

    def run(*arguments: str, main: Callable[[list[str]], int] = run_training.main) -> str:
        given = list(arguments)
        if main is run_training.main and "--config" not in given:
            given = ["--config", str(recipe), *given]
        defaults = {"--data-root": str(tmp_path / "data"), "--output-dir": str(tmp_path / "out"), "--device": "cpu"}
        for flag in defaults.keys() - set(given):
            given += [flag, defaults[flag]]
        status = status_of(main, given)
        error = capsys.readouterr().err
        assert status == 2, (status, error)
        assert_told(error)
        return error.removesuffix("\n")

    return run


# ---- what is printed -----------------------------------------------------------------------------------------------


def prints(text: str) -> Callable[[], int]:
    return lambda: print(text) or 0


def asks_for_help() -> int:
    run_training.main(["--help"])
    raise AssertionError("help ends the command")


def writes_a_file() -> int:
    with writing_to(Path("folder")):
        print("x" * 100_000)
    return 0


@pytest.mark.parametrize("main", [prints("a line"), prints("x" * 100_000), asks_for_help, writes_a_file])
@pytest.mark.parametrize("has_reader", [True, False])
def test_an_output_that_cannot_be_written(main: Callable[[], int], has_reader: bool, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """One line where the disk is full; silence where a reader such as `head` has had enough."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full if has_reader else pipe)
        status = exit_code(main)
        told = capsys.readouterr().err
    if has_reader:
        assert_told(told, os.strerror(errno.ENOSPC))
    assert (status, bool(told)) == ((2, True) if has_reader else (141, False))


def test_a_command_passes_its_own_mistakes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise BrokenPipeError("of another pipe")

    with pytest.raises(BrokenPipeError, match="another"):
        exit_code(fails)
    monkeypatch.setattr(sys, "stdout", None)  # closed by the caller
    assert exit_code(prints("a line")) == 0


@pytest.mark.parametrize(("flags", "has_saved"), [([], True), (["--check"], False), (["--plan"], False)])
def test_only_a_training_that_is_interrupted_says_how_to_go_on(
        flags: list[str], has_saved: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_training, "run", interrupted)
    assert run_training.main(flags) == 130
    assert ("--resume" in capsys.readouterr().err) == has_saved


# ---- what was asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "named"), [
    (["--bogus"], ["--bogus", "--help"]),
    (["--bogus=3"], ["--bogus=3"]),
    (["word"], ["word"]),
    (["--epochs"], ["--epochs"]),
    (["--doctor", "--plan"], ["--doctor", "--plan"]),
    (["--epochs", "many"], ["training.epochs", "integer", "many"]),
    (["--epochs", "0"], ["training.epochs", "0", "1"]),
    (["--batch-size", "2.5"], ["training.batch_size", "integer", "2.5"]),
    (["--lr", "fast"], ["training.learning_rate", "number", "fast"]),
    (["--lr", "-1"], ["training.learning_rate", "-1", "0"]),
    (["--model-size", "huge"], ["model.size", "huge", *SIZES]),
    (["--datasets", "cocoo"], ["data.datasets", "cocoo", "'coco'"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["training.epoch=3"], ["training.epoch", "'epochs'"]),
    (["trainig.epochs=3"], ["trainig", "'training'"]),
    (["epochs=3"], ["epochs=3", "section.key=value"]),
    (["stages.algn.share=2"], ["stages.algn", "algn", "pretrain", "align", "finetune"]),
    (["stages.align.shares=2"], ["stages[1].shares", "'share'"]),
    (["stages.align.tasks.0.objectives={contrast: 1.0}"],
     ["stages[1].tasks[0].objectives", "contrast", "'contrastive'"]),
    (["memory.budget_gb=-1"], ["memory.budget_gb", "-1", "0"]),
    (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
    (["--datasets", "manifest"], ["data.manifest", "JSONL", "CSV"]),
    (["--datasets", "synthetic", "synthetic"], ["data.datasets", "synthetic", "2"]),
    (["--output-dir", ""], ["paths.output_dir"]),
    (["--data-root", " "], ["paths.data_root"]),
    (["data.cache_dir=''"], ["data.cache_dir"]),
    (["--model-size", "3"], ["model.size", "3", "tiny"]),
])
def test_what_was_asked_for(mistake: Main, tmp_path: Path, arguments: list[str], named: Named) -> None:
    assert_names(mistake(*arguments), *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("patterns", "named"), [
    ("['vision.*']", ["vision.*", "image"]), ("['audio.*']", ["contrastive_image_text"]),
    ("[]", ["contrastive_image_text"])])
def test_the_patterns_of_the_last_stage_are_checked_before_the_first(
        mistake: Main, small: SmallRuns, tmp_path: Path, patterns: str, named: Named) -> None:
    small.config(tmp_path / "out")  # the plans of others
    error = mistake(f"stages.finetune.trainable={patterns}", "--data-root", str(small.data_root))
    assert_names(error, "stages.finetune.trainable", *named)
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_so_are_those_of_learning_rate_factors(mistake: Main, small: SmallRuns, tmp_path: Path) -> None:
    small.config(tmp_path / "out")
    error = mistake("stages.finetune.lr_factors={vision.*: 0.1}", "--data-root", str(small.data_root))
    assert_names(error, "stages.finetune.lr_factors", "vision.*", "image")
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize(("text", "named"), [
    ("training: {epochs: 3}\ntraining: {epochs: 4}\n", ["line 2", "training"]),
    ("training:\n  epochs: [3\n", []),
    ("- 1\n", ["list"]),
    ("model: {size: tiny}\nbatch_size: 3\n", ["batch_size"]),
])
def test_a_configuration_file_that_is_wrong(mistake: Main, tmp_path: Path, text: str, named: Named) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, "utf-8")
    assert_names(mistake("--config", str(path)), *(named or [str(path)]))


@pytest.mark.parametrize("name", ["2026", "1_0", "1e5", "nan", "-5", "true", "1: a", "[a", "~", "a #b"])
def test_a_folder_may_have_any_name(name: str) -> None:
    config = run_training.configuration(run_training.parse([f"--output-dir={name}", f"--data-root={name}"]))
    assert (config.paths.output_dir, config.paths.data_root) == (name, name)


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco", "clotho", "audiocaps", "voxceleb", "stamps"])
def test_missing_data_come_with_the_command_that_gets_them(mistake: Main, tmp_path: Path, name: str) -> None:
    error = mistake("--datasets", name)
    assert_names(error, f"python download_datasets.py --datasets {name} --data-root {tmp_path / 'data'}")
    assert mistake("--datasets", name) == error, "the output folder is not in use by this"


@pytest.mark.parametrize(("line", "named"), [
    ('{"image": "a.png", "txt": "x"}', ["txt"]), ("{not json", []), ('{"text": 7}', ["text"]),
    ('{"image": "gone.png", "text": "x"}', ["gone.png"]),
])
def test_a_line_of_a_manifest_that_is_wrong(mistake: Main, tmp_path: Path, line: str, named: Named) -> None:
    path = trees.manifest(tmp_path, samples=6)
    text = path.read_text("utf-8")
    path.write_text(text + line + "\n", "utf-8")
    assert_names(mistake("--datasets", "manifest", f"data.manifest={path}"), path, "line 7", *named)


def test_all_samples_broken(mistake: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE_GB", 0.0)  # a full disk would turn the cache off
    lines = []
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"picture {i}", "split": "train"}))
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    for cache, named in (("true", ["data.max_bad_pct=5", "bad_samples.jsonl"]), ("false", ["8", "image"])):
        error = mistake("--datasets", "manifest", f"data.manifest={path}", f"data.cache={cache}")
        assert_names(error, *named)
        assert re.search(rf"{tmp_path}/\d\.png\b", error), "one of them by name"
    assert (tmp_path / "out" / "logs" / "bad_samples.jsonl").read_text("utf-8").count(".png") >= 6


def test_no_task_of_a_stage_has_samples(mistake: Main, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"only words {i}", "split": "val" if i == 3 else "train"}) for i in range(8)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    assert_names(mistake("--datasets", "manifest", f"data.manifest={path}"), "stages.align", "manifest", "--datasets")


# ---- folders and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [
    initial.find_checkpoint, lambda name: compare.read_runs([name, name]),
    lambda name: zero_shot.read_classes(Path(name))])
def test_a_folder_that_is_closed_to_the_user(read: Callable[[str], object], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with refused(tmp_path, os.strerror(errno.EACCES)):
        read(str(tmp_path))


@pytest.mark.parametrize(("main", "given"), [
    (evaluate.main, ["--checkpoint", ""]), (export.main, ["onnx", "", "folder"]),
    (export.main, ["hub", " ", "folder"])])
def test_no_name_is_not_the_folder_that_one_is_in(main: Callable[[list[str]], int], given: list[str],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, given) == 2
    assert_told(capsys.readouterr().err, "empty")


def test_an_output_folder_that_cannot_be_written(mistake: Main, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        assert_names(mistake("--output-dir", str(folder)), folder, "--output-dir")


def test_a_full_disk(mistake: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "out" / "logs" / "metrics.jsonl"

    def full(number: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(log))

        return fail

    monkeypatch.setattr(run_module, "Tracker", full(errno.ENOSPC))
    assert_names(mistake(), log, os.strerror(errno.ENOSPC), "--resume auto")
    monkeypatch.setattr(run_module, "Tracker", full(errno.EIO))
    with pytest.raises(OSError) as caught:  # no mistake of the user's: all of it is shown
        mistake()
    assert caught.value.errno == errno.EIO


def test_a_device_without_room_for_the_weights_or_the_moments(mistake: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nGPU 0 has 20 GiB.")

    for place in ("trimodal.training.stage.Optimizer.allocate", "trimodal.training.run.devices.cap_allocator"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            error = mistake("--overwrite")
        assert_names(error, "cpu", "Tried to allocate 2.00 GiB. GPU 0 has 20 GiB.", "training.batch_size", "model.size",
                     "--resume auto")


def test_a_used_output_folder(mistake: Main, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "checkpoint_epoch_3.pt").write_bytes(b"weights")
    assert_names(mistake(), tmp_path / "out", "checkpoints", "--resume auto", "--overwrite")


def checkpoints(folder: Path) -> dict[str, Path]:
    """Checkpoints that are none, and one that holds weights only."""
    folder.mkdir()
    found = {name: folder / f"{name}.pt" for name in ("missing", "text", "empty", "foreign", "cut", "weights")}
    found["text"].write_text("hello", "utf-8")
    found["empty"].write_bytes(b"")
    torch.save({"state_dict": {"w": torch.zeros(3)}}, found["foreign"])
    checkpoint.save({"model_state_dict": {"w": torch.zeros(2000)}}, found["weights"])
    found["cut"].write_bytes(found["weights"].read_bytes()[:-200])
    return found | {"folder": folder}


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "foreign", "cut", "folder", "weights"])
def test_a_checkpoint_that_is_none(mistake: Main, tmp_path: Path, kind: str) -> None:
    path = checkpoints(tmp_path / "found")[kind]
    size = f"{path.stat().st_size} bytes" if path.is_file() else ""
    why = {"missing": ["weights.pt"], "cut": [size], "empty": ["0 bytes"], "folder": ["Is a directory"]}.get(kind, [])
    named = ["checkpoint_epoch_*.pt"] if kind == "weights" else ["--resume", path, *why]
    assert_names(mistake("--resume", str(path)), *named)
    assert not (tmp_path / "out" / "logs").exists()
    if kind == "folder":  # as that of a run, which this is not
        why = ["best_model.pt", "model.safetensors"]
    assert_names(mistake("--checkpoint", str(path), main=evaluate.main), path, *why)


# ---- as a user sees it ---------------------------------------------------------------------------------------------


def test_nothing_else_reaches_stderr(tmp_path: Path) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    command = ["run_training.py", "--datasets", "clotho", "--data-root", data, "--output-dir", out]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert_told(done.stderr, f"python download_datasets.py --datasets clotho --data-root {data}")
