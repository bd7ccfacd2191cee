"""run_training.py --check: one line on what training would refuse, else where data and results go."""

from pathlib import Path

import pytest

import run_training
from tests.project import ROOT
from tests.refusals import assert_told


def test_check_prints_where_and_what_of_the_full_job_and_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_training.main(["--check"]) == 0
    assert capsys.readouterr().out.splitlines() == ["./data", "./outputs", "coco clotho audiocaps"]
    assert run_training.main(["--check", "--config", str(ROOT / "recipes" / "demo.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == ["./data", "./outputs/demo", "stamps"]


@pytest.mark.parametrize(("arguments", "named"), [
    (["--model-size", "huge"], ["model.size", "huge"]), (["--epochs", "none"], ["training.epochs", "none"]),
    (["training.epoch=3"], ["training.epoch", "epochs"]), (["--datasets", "cocoa"], ["data.datasets", "cocoa"]),
    (["--config", "none.yaml"], ["none.yaml"]),
    (["--device", "tpu"], ["--device", "tpu"]), (["--resume", "none.pt"], ["--resume", "none.pt"]),
    (["--overwrite", "--resume", "auto"], ["--overwrite", "--resume"]),
    (["--output-dir", "file/out"], ["file/out", "Not a directory"]), (["--output-dir", ""], ["paths.output_dir"]),
    (["--output-dir", "used", "--resume", "elsewhere.pt"], ["used", "checkpoints"]),
    (["--datasets", "manifest", "data.manifest=none.jsonl"], ["none.jsonl"]),
    (["--datasets", "manifest", "data.manifest=wrong.csv"], ["wrong.csv", "line 1", "imgae"])])
def test_check_refuses_what_training_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                             capsys: pytest.CaptureFixture[str], named: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "wrong.csv").write_text("imgae\na.png\n")
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    (tmp_path / "used" / "checkpoints" / "checkpoint_epoch_1.pt").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert run_training.main(["--check", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_told(printed.err, *named)


@pytest.mark.parametrize("arguments", [["word"], ["--epoch", "3"], ["--plan"], ["--doctor"], ["--json"]])
def test_check_refuses_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_training.main(["--check", *arguments])
    assert stop.value.code == 2
    assert_told(capsys.readouterr().err, arguments[0])
