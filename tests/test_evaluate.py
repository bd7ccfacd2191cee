"""evaluate.py from its command line: the same figures as the protocols, a report, and one line for each mistake."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import evaluate
from datasets import Data, load_data
from model import TriModalModel
from tests.refusals import assert_told
from tests.small_runs import RECIPE
from trimodal.checkpoint import save
from trimodal.config import Config, config_from_dict
from trimodal.evaluation import phrases, protocols, report
from trimodal.memory import devices
from trimodal.training.run import build_model

Captured = pytest.CaptureFixture[str]


class Trained(NamedTuple):
    checkpoint: Path
    config: Config
    data: Data
    model: TriModalModel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A checkpoint as training writes it, of an untrained model for pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_from_dict({**RECIPE, "report": {"language": "en", "gallery_queries": 2},
                               "evaluation": {"resamples": 10}, "paths": {"data_root": str(folder / "data")}})
    data = load_data(config)
    torch.manual_seed(0)
    model = build_model(config, data, None)
    config = dataclasses.replace(config, model=model.config)  # with as many words as there are
    state = {"config": config.to_dict(), "tokenizer": data.tokenizer.to_json(), "concepts": list(data.concepts),
             "speakers": [], "stage": "align", "epoch": 3, "loss": 1.25, "model_state_dict": model.state_dict()}
    path = folder / "best_model.pt"
    save(state, path)
    return Trained(path, config, data, model)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def folder(tmp_path: Path, plans: Path) -> Iterator[Path]:
    """One whose output folder finds the plans of earlier tests."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plans").symlink_to(plans)
    yield tmp_path


def main(folder: Path, *arguments: str | Path) -> int:
    return evaluate.main([*map(str, arguments), "--output-dir", str(folder / "out"), "--device", "cpu",
                          "--data-root", str(folder / "data")])


def told(folder: Path) -> dict[str, Any]:
    """The JSON of its one report."""
    (path,) = (folder / "out" / "reports").glob("report_*.json")
    return json.loads(path.read_text("utf-8"))


def test_the_figures_are_those_of_the_protocols_and_stand_in_table_and_report(
        trained: Trained, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's precision, here that of a machine that has bf16."""
    asked: list[bool] = []

    def chosen(device: torch.device, use_amp: bool) -> devices.Precision:
        asked.append(use_amp)
        return devices.Precision(torch.bfloat16, False, "bf16")

    monkeypatch.setattr(devices, "choose_precision", chosen)
    assert main(folder, "--checkpoint", trained.checkpoint, "training.use_amp=true") == 0
    assert asked == [True]
    out, found = capsys.readouterr().out, told(folder)
    setting = protocols.Setting(device=torch.device("cpu"), amp=torch.bfloat16)
    expected, encoded = protocols.evaluate_split(trained.model, trained.data, "test", trained.config, setting)
    assert found["evaluation_s"] > 0
    assert found["evaluation"] == {"split": "test", "figures": expected, "facts": encoded.facts}
    assert report.format_table(expected) in out
    assert found["kind"] == "evaluation" and found["best"] == {"stage": "align", "epoch": 3, "loss": 1.25}
    assert found["data"]["counts"]["synthetic"].keys() == {"test"} and found["stages"] == []
    assert len(found["gallery"]) == 4  # two captions of pictures, two of sounds
    markdown = folder / "out" / "reports" / found["files"]["markdown"]
    assert str(markdown) in out and markdown.read_text("utf-8").startswith(
        f"# {phrases.PHRASES['title_evaluation']['en']}\n")


def test_split_limit_and_overrides(trained: Trained, folder: Path, capsys: Captured) -> None:
    arguments = ["--split", "val", "--limit", "8", "--datasets", "synthetic", "report.language=zh",
                 "report.gallery_queries=0"]
    assert main(folder, "--checkpoint", trained.checkpoint, *arguments) == 0
    found = told(folder)
    assert found["evaluation"]["split"] == "val"
    assert "training.use_amp" in capsys.readouterr().out, "fp32, as it was trained"
    assert found["evaluation"]["facts"]["synthetic"] | {"nonfinite": {}} == {
        "samples": 16, "of": 64, "broken": 0, "subset_seed": 0, "nonfinite": {}}
    assert found["config"]["report"]["language"] == "zh" and found["gallery"] == []
    markdown = folder / "out" / "reports" / found["files"]["markdown"]
    assert phrases.PHRASES["title_evaluation"]["zh"] in markdown.read_text("utf-8")


def test_checkpoints_that_cannot_be_used(trained: Trained, folder: Path, capsys: Captured) -> None:
    whole, paths = trained.checkpoint.read_bytes(), [folder / f"{name}.pt" for name in ("none", "text", "cut", "other")]
    paths[1].write_text("hello")
    paths[2].write_bytes(whole[:len(whole) // 2])
    save({"weights": torch.zeros(3)}, paths[3])
    reasons: tuple[list[str], ...] = ["other.pt"], [], [f"{paths[2].stat().st_size} bytes"], []
    for path, why in zip(paths, reasons, strict=True):
        assert main(folder, "--checkpoint", path) == 2
        assert_told(capsys.readouterr().err, path, *why)


@pytest.mark.parametrize(("arguments", "named"), [
    (["--datasets", "cocoo"], ["data.datasets", "cocoo", "'coco'"]),
    (["--datasets", "clotho"], ["python download_datasets.py --datasets clotho --data-root"]),
    (["evaluation.batchsize=3"], ["evaluation.batchsize", "'batch_size'"]),
    (["evaluation.batch_size=x"], ["evaluation.batch_size", "integer", "x"]),
    (["model.size=large"], ["model.size=large"]),
    (["--datasets", "manifest"], ["data.manifest", "JSONL", "CSV"]),
    (["--device", "tpu"], ["--device", "tpu"]),
])
def test_what_was_asked_for_wrongly_takes_one_line(trained: Trained, folder: Path, capsys: Captured,
                                                   arguments: list[str], named: list[str]) -> None:
    defaults = ["--output-dir", str(folder / "out"), "--data-root", str(folder / "data"), "--device", "cpu"]
    assert evaluate.main(["--checkpoint", str(trained.checkpoint), *defaults, *arguments]) == 2
    assert_told(capsys.readouterr().err, *named)


@pytest.mark.parametrize(("arguments", "named"), [
    (["--bogus"], ["--bogus"]), (["--split", "tset"], ["--split", "tset", "train", "val", "test"]),
    (["--limit", "1"], ["--limit", "1", "2"]), (["--limit", "many"], ["--limit", "int", "many"]), (["word"], ["word"]),
    (["--data-root", ""], ["--data-root"]), (["--output-dir", " "], ["--output-dir"]),
])
def test_flags_that_are_wrong(trained: Trained, capsys: Captured, arguments: list[str], named: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", str(trained.checkpoint), *arguments])
    assert stop.value.code == 2
    assert_told(capsys.readouterr().err, *named)


def test_no_checkpoint_given(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    assert stop.value.code == 2
    assert_told(capsys.readouterr().err, "--checkpoint")


def test_an_output_folder_that_cannot_be_written(trained: Trained, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(tmp_path, "--checkpoint", trained.checkpoint) == 2
    assert_told(capsys.readouterr().err, tmp_path / "out" / "reports", "--output-dir")


def test_a_full_disk(trained: Trained, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(folder, "--checkpoint", trained.checkpoint, "--limit", "2") == 0  # its plan is kept
    shutil.rmtree(folder / "out" / "reports")
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(folder, "--checkpoint", trained.checkpoint, "--limit", "2") == 2
    assert_told(capsys.readouterr().err, folder / "out" / "reports", "No space left on device", "--output-dir")
    assert list((folder / "out" / "reports").iterdir()) == []


def test_a_split_without_anything_to_compare(trained: Trained, folder: Path, capsys: Captured) -> None:
    manifest = folder / "own.jsonl"
    manifest.write_text(json.dumps({"text": "words alone", "split": "test"}) + "\n")
    own = ["--datasets", "manifest", f"data.manifest={manifest}"]
    assert main(folder, "--checkpoint", trained.checkpoint, *own) == 2
    assert_told(capsys.readouterr().err, "--split test", "manifest")


def test_the_concepts_are_those_of_the_checkpoint(trained: Trained, folder: Path) -> None:
    """A label that the training did not know is not scored; one that it knew keeps its place."""
    first, second = trained.data.concepts[:2]
    lines = []
    for n, label in enumerate([first, "unheard of", first, second]):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(folder / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "labels": [label], "split": "test"}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    own = ["--datasets", "manifest", f"data.manifest={folder}/own.jsonl"]
    assert main(folder, "--checkpoint", trained.checkpoint, *own) == 0
    figure = told(folder)["evaluation"]["figures"]["manifest"]["image-concepts"]["image_to_concepts_mAP"]
    assert figure["queries"] == 2 and figure["candidates"] == 3
