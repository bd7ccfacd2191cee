"""What a checkpoint remembers of its samples: a run that goes on with other ones, and figures on samples that it has
trained on, say so."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from tests import trees
from tests.small_runs import SmallRuns, records
from trimodal import checkpoint
from trimodal.config import Config, TaskConfig
from trimodal.data.samples import Sample, SampleTable
from trimodal.data.splits import file_hashes, has_known_file
from trimodal.training import loop
from trimodal.training.run import Options

Said = pytest.CaptureFixture[str]


def pictures(folder: Path) -> None:
    for i in range(20):
        trees.picture(folder / f"{i}.png", (12 * i, 90, 250 - 12 * i), size=(32, 32))


def write(folder: Path, split_of: Callable[[int], str], name: Callable[[int], str] = str) -> None:
    """The list of the pictures, each with a caption of its own."""
    lines = [json.dumps({"id": name(i), "image": f"{i}.png", "text": f"picture {name(i)}", "split": split_of(i)})
             for i in range(20)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))


def first(i: int) -> str:
    return "train" if i < 12 else "val" if i < 15 else "test"


def swapped(i: int) -> str:
    return "test" if i < 5 else first(i) if i < 15 else "train"


@pytest.fixture
def config(small: SmallRuns, tmp_path: Path) -> Config:
    """Two epochs of one stage, which tells pictures by their captions."""
    pictures(tmp_path)
    write(tmp_path, first)
    config = small.config(tmp_path / "run", "data.datasets=[manifest]", f"data.manifest={tmp_path}/manifest.jsonl",
                          f"paths.data_root={tmp_path}/data", "training.epochs=2", "report.language=en",
                          "training.batch_size=6", "report.gallery_queries=0")
    task = TaskConfig(inputs=("image", "text"), objectives={"contrastive": 1.0})
    return dataclasses.replace(config, stages=(dataclasses.replace(config.stages[1], tasks=(task,)),))


def go_on(config: Config, epochs: int) -> Path:
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=epochs))
    report = loop.train(longer, Options("cpu", resume="auto"))
    assert report is not None
    return report


def changed(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("Changed since this checkpoint: samples")]


def facts(report: Path) -> dict[str, int]:
    written = json.loads(report.with_suffix(".json").read_text("utf-8"))
    found: dict[str, int] = written["evaluation"]["facts"]["manifest"]
    return found


def test_a_run_that_goes_on_with_other_samples_says_so_and_its_figures_too(
        config: Config, tmp_path: Path, capsys: Said) -> None:
    report = loop.train(config, Options("cpu"))
    assert report is not None and facts(report)["trained_on"] == 0 and "trained on" not in report.read_text("utf-8")
    go_on(config, 3)
    assert changed(capsys.readouterr().out) == []
    write(tmp_path, swapped, name=lambda i: f"other {i}")  # the pictures are the same under other names and captions
    report = go_on(config, 4)
    line = ("Changed since this checkpoint: samples of train 12 -> 12, val 3 -> 3, test 5 -> 5 (5 of them were trained "
            "on)")
    said = capsys.readouterr().out
    assert changed(said) == [line]
    assert "manifest: 5 of 5 samples; 5 of them were trained on" in said
    assert [record["message"] for record in records(tmp_path / "run", "event")].count(line) == 1
    assert facts(report)["trained_on"] == 5 and "5 of them were trained on" in report.read_text("utf-8")
    write(tmp_path, first)  # back: the first test pictures have been trained on meanwhile, and that is not forgotten
    report = go_on(config, 5)
    assert changed(capsys.readouterr().out) == [line] and facts(report)["trained_on"] == 5


@pytest.mark.parametrize("weights", ["best_model.pt", "checkpoint_epoch_2.pt", "model.safetensors"])
def test_an_evaluation_of_samples_that_were_trained_on_says_so(config: Config, tmp_path: Path, capsys: Said,
                                                               weights: str) -> None:
    loop.train(config, Options("cpu"))

    def evaluated(split: str) -> str:
        capsys.readouterr()
        folders = ["--output-dir", str(tmp_path / "run"), "--data-root", str(tmp_path / "data")]
        assert evaluate.main(["--checkpoint", str(tmp_path / "run/checkpoints" / weights), "--split", split,
                              "--device", "cpu", *folders]) == 0
        return capsys.readouterr().out

    assert "trained on" not in evaluated("test") and "trained on" not in evaluated("val")
    assert "trained on" not in evaluated("train"), "that is what was asked for"
    write(tmp_path, swapped, name=lambda i: f"other {i}")
    assert "5 of them were trained on" in evaluated("test")


def test_a_checkpoint_of_an_earlier_release_goes_on_and_nothing_is_said(config: Config, tmp_path: Path,
                                                                       capsys: Said) -> None:
    loop.train(config, Options("cpu"))
    path = tmp_path / "run/checkpoints/checkpoint_epoch_2.pt"
    state = checkpoint.load(path)
    assert state["trained_on"].dtype == torch.int64 and len(state["trained_on"]) == 12
    assert torch.equal(torch.load(path)["trained_on"], state["trained_on"])
    checkpoint.save({name: value for name, value in state.items() if name not in ("trained_on", "splits")}, path)
    write(tmp_path, swapped)
    go_on(config, 3)
    assert changed(capsys.readouterr().out) == []
    assert "trained_on" in checkpoint.load(tmp_path / "run/checkpoints/checkpoint_epoch_3.pt")


def test_files_are_known_by_where_they_lie(tmp_path: Path) -> None:
    def table(*paths: str, source: str = "manifest", audio: str = "") -> SampleTable:
        return SampleTable.pack(Sample(key=str(i), source=source, split="train", image=path, audio=audio)
                                for i, path in enumerate(paths))

    one, other, moved = tmp_path / "one", tmp_path / "other", tmp_path / "moved"
    for folder in (one, other):
        (folder / "coco").mkdir(parents=True)
        (folder / "coco" / "1.jpg").write_text("")
    (tmp_path / "link").symlink_to(one)
    (one / "again.jpg").symlink_to(one / "coco" / "1.jpg")
    known = file_hashes(table(f"{one}/coco/1.jpg", source="coco"), str(one))

    def found(root: Path, *paths: Path | str, source: str = "manifest", audio: str = "") -> list[bool]:
        return has_known_file(table(*map(str, paths), source=source, audio=audio), str(root), known).tolist()

    links: list[Path | str] = [
        one / "coco/1.jpg", tmp_path / "link/coco/1.jpg", one / "again.jpg", f"{one}/coco/../coco/1.jpg"]
    assert found(one, *links) == [True] * 4, "a list that names the picture of a set"
    assert found(moved, moved / "coco/1.jpg", source="coco") == [True], "the set on another machine"
    assert found(other, other / "coco/1.jpg") == [False], "another's list with files of the same names"
    assert found(one, one / "coco/2.jpg", "", source="coco") == [False, False]
    assert found(one, "", audio=f"{one}/coco/1.jpg") == [True], "a video as a sound"
    drawn = file_hashes(table("synthetic:5", source="synthetic"), str(one))
    assert has_known_file(table("", source="synthetic", audio="synthetic:5"), str(one), drawn).tolist() == [False]
    many = file_hashes(table(*(f"/none/{i}.jpg" for i in range(1000))), str(one))
    assert many.dtype == np.int64 and len(many) == 1000 and (np.diff(many) > 0).all()
