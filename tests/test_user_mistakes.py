"""Each mistake takes one line on stderr that says where it is and what to do, exit code 2, and nothing else happens."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import checkpoint
import evaluate
import prepare
import run_training
import runs
from tests import trees
from tests.small_runs import RECIPE

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[..., str]


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
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        return error

    return run


# ---- what was asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--bogus"], ["unknown argument '--bogus'", "see --help"]),
    (["--bogus=3"], ["unknown argument '--bogus=3'"]),
    (["word"], ["unknown argument 'word'"]),
    (["--epochs"], ["--epochs", "expected one argument"]),
    (["--doctor", "--plan"], ["--doctor plans as well"]),
    (["--epochs", "many"], ["training.epochs", "expected int", "'many'"]),
    (["--epochs", "0"], ["training.epochs: 0 is below 1"]),
    (["--batch-size", "2.5"], ["training.batch_size", "expected int"]),
    (["--lr", "fast"], ["training.learning_rate", "expected float", "'fast'"]),
    (["--lr", "-1"], ["training.learning_rate: -1.0 is not above 0"]),
    (["--model-size", "huge"], ["model.size", "'huge' is not one of tiny, small, base, large"]),
    (["--datasets", "cocoo"], ["data.datasets", "'cocoo' is unknown. Did you mean 'coco'?"]),
    (["--device", "tpu"], ["--device", "'tpu' is not in this machine", "cpu"]),
    (["training.epoch=3"], ["training.epoch: unknown key", "Did you mean 'epochs'?"]),
    (["trainig.epochs=3"], ["trainig: unknown key", "Did you mean 'training'?"]),
    (["epochs=3"], ["an override looks like section.key=value"]),
    (["stages.algn.share=2"], ["stages.algn: no entry 'algn'; have pretrain, align, finetune"]),
    (["stages.align.shares=2"], ["stages[1].shares: unknown key", "Did you mean 'share'?"]),
    (["stages.align.tasks.0.objectives={contrast: 1.0}"], ["'contrast' is unknown. Did you mean 'contrastive'?"]),
    (["memory.budget_gb=-1"], ["memory.budget_gb: -1.0 is not above 0"]),
    (["--config", "/no/such.yaml"], ["/no/such.yaml: no such file"]),
    (["--datasets", "manifest"], ["data.manifest", "JSONL or CSV"]),
    (["--datasets", "synthetic", "synthetic"], ["data.datasets: 'synthetic' is given 2 times; once is enough"]),
    (["--output-dir", ""], ["paths.output_dir: is empty; name a path"]),
    (["--data-root", " "], ["paths.data_root: is empty; name a path"]),
    (["data.cache_dir=''"], ["data.cache_dir: is empty"]),
    (["--model-size", "3"], ["model.size: '3' is not one of tiny"]),
])
def test_what_was_asked_for(mistake: Main, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    error = mistake(*arguments)
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("patterns", "words"), [
    ("['vision.*']", "'vision.*' matches no parameter; names look like "),
    ("['audio.*']", "contrastive_image_text depends on none of the parameters named"),
    ("[]", "contrastive_image_text depends on none of the parameters named"),
])
def test_the_patterns_of_the_last_stage_are_checked_before_the_first(mistake: Main, tmp_path: Path, patterns: str,
                                                                     words: str) -> None:
    assert f"stages.finetune.trainable: {words}" in mistake(f"stages.finetune.trainable={patterns}")
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize(("text", "words"), [
    ("training: {epochs: 3}\ntraining: {epochs: 4}\n", ["line 2", "'training' is given twice"]),
    ("training:\n  epochs: [3\n", ["not valid YAML"]),
    ("- 1\n", ["expected sections such as 'model:'"]),
    ("model: {size: tiny}\nbatch_size: 3\n", ["batch_size: unknown key"]),
])
def test_a_configuration_file_that_is_wrong(mistake: Main, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, "utf-8")
    error = mistake("--config", str(path))
    for word in words:
        assert word in error


@pytest.mark.parametrize("name", ["2026", "1_0", "1e5", "nan", "-5", "true", "1: a", "[a", "~", "a #b"])
def test_a_folder_may_have_any_name(name: str) -> None:
    config = run_training.configuration(run_training.parse([f"--output-dir={name}", f"--data-root={name}"]))
    assert (config.paths.output_dir, config.paths.data_root) == (name, name)


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco", "clotho", "audiocaps", "voxceleb", "stamps"])
def test_missing_data_come_with_the_command_that_gets_them(mistake: Main, tmp_path: Path, name: str) -> None:
    error = mistake("--datasets", name)
    assert f"python download_datasets.py --datasets {name} --data-root {tmp_path / 'data'}" in error
    assert "holds an earlier run" not in mistake("--datasets", name), "the folder is not in use by this"


@pytest.mark.parametrize(("line", "words"), [
    ('{"image": "a.png", "txt": "x"}', ["txt"]), ("{not json", []), ('{"text": 7}', ["text"]),
    ('{"image": "gone.png", "text": "x"}', ["gone.png"]),
])
def test_a_line_of_a_manifest_that_is_wrong(mistake: Main, tmp_path: Path, line: str, words: list[str]) -> None:
    path = trees.manifest(tmp_path, samples=6)
    text = path.read_text("utf-8")
    path.write_text(text + line + "\n", "utf-8")
    error = mistake("--datasets", "manifest", f"data.manifest={path}")
    for word in [f"{path}", "line 7", *words]:
        assert word in error


def test_all_samples_broken(mistake: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "RESERVE_GB", 0.0)  # a full disk would turn the cache off
    lines = []
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"picture {i}", "split": "train"}))
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    for cache, words in (("true", "cannot be read, more than data.max_bad_pct=5 allows"),
                         ("false", "none of the 6 samples with image can be read"), ("true", "bad_samples.jsonl")):
        error = mistake("--datasets", "manifest", f"data.manifest={path}", f"data.cache={cache}")
        assert words in error and ".png: cannot be decoded" in error
    assert (tmp_path / "out" / "logs" / "bad_samples.jsonl").read_text("utf-8").count(".png") >= 6


def test_no_task_of_a_stage_has_samples(mistake: Main, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"only words {i}", "split": "val" if i == 3 else "train"}) for i in range(8)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    error = mistake("--datasets", "manifest", f"data.manifest={path}")
    assert "stages.align: none of its tasks has samples in manifest; add a set (--datasets)" in error


# ---- folders and checkpoints ---------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written(mistake: Main, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        error = mistake("--output-dir", str(folder))
        assert f"{folder}: cannot be written (" in error and "choose another --output-dir" in error


def test_a_full_disk(mistake: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "out" / "logs" / "metrics.jsonl"

    def full(number: int) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number), str(log))

        return fail

    monkeypatch.setattr(runs, "Tracker", full(errno.ENOSPC))
    assert mistake() == f"error: {log}: No space left on device; free space, then go on with --resume auto\n"
    monkeypatch.setattr(runs, "Tracker", full(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):  # no mistake of the user's: all of it is shown
        mistake()


def test_a_device_without_room_for_the_weights_or_the_moments(mistake: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 20 GiB.")

    for place in ("stages.Optimizer.allocate", "runs.memory.cap_allocator"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            error = mistake("--overwrite")
        assert error.startswith("error: out of memory on cpu (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        assert "end what else uses it, or lower training.batch_size, model.size" in error and "--resume auto" in error


def test_a_used_output_folder(mistake: Main, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "checkpoint_epoch_3.pt").write_bytes(b"weights")
    error = mistake()
    assert f"{tmp_path / 'out'}: holds an earlier run (checkpoints)" in error
    assert "--resume auto" in error and "--overwrite" in error


def files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoints that are none, and what must be said of each."""
    folder.mkdir()
    names = ("text", "cut", "foreign", "empty", "weights")
    text, cut, foreign, empty, weights = (folder / f"{name}.pt" for name in names)
    text.write_text("hello", "utf-8")
    empty.write_bytes(b"")
    torch.save({"state_dict": {"w": torch.zeros(3)}}, foreign)
    checkpoint.save({"model_state_dict": {"w": torch.zeros(2000)}}, weights)
    cut.write_bytes(weights.read_bytes()[:-200])
    not_ours = {name: (path, "not a checkpoint of this project")
                for name, path in (("text", text), ("foreign", foreign))}
    return not_ours | {"missing": (folder / "none.pt", "no such checkpoint; "), "cut": (cut, "truncated or damaged"),
                       "empty": (empty, "truncated or damaged"), "folder": (folder, "cannot be read")}


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "foreign", "cut", "folder"])
def test_a_checkpoint_that_is_none(mistake: Main, tmp_path: Path, kind: str) -> None:
    path, words = files(tmp_path / "found")[kind]
    error = mistake("--resume", str(path))
    assert f"error: --resume: {path}: {words}" in error
    assert not (tmp_path / "out" / "logs").exists()
    error = mistake("--checkpoint", str(path), main=evaluate.main)
    assert f"error: {path}: {words}" in error


def test_a_checkpoint_without_what_training_needs(mistake: Main, tmp_path: Path) -> None:
    files(tmp_path / "found")
    error = mistake("--resume", str(tmp_path / "found" / "weights.pt"))
    assert "holds weights only, training cannot go on from it; give a checkpoint_epoch_*.pt" in error
    error = mistake("--checkpoint", str(tmp_path / "found" / "weights.pt"), main=evaluate.main)
    assert "not a checkpoint of this project" in error


# ---- as a user sees it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model-sise", "tiny"], "error: unknown argument '--model-sise'; see --help\n"),
    (["--datasets", "clotho", "--data-root", "DATA"], "python download_datasets.py --datasets clotho --data-root DATA"),
])
def test_nothing_else_reaches_stderr(tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [word.replace("DATA", str(tmp_path / "data")) for word in arguments]
    done = subprocess.run([sys.executable, "run_training.py", *given, "--output-dir", str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words.replace("DATA", str(tmp_path / "data")) in done.stderr and "Traceback" not in done.stdout
