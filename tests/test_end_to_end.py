"""From a command line to a report: all stages on mixed sets, everything that a run promises to leave behind, and the
same figures from evaluate.py; and one epoch on the official layouts of COCO and Clotho."""

import contextlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import evaluate
import run_training
from model import load_model
from tests import trees
from tests.evaluation.test_page import Parsed
from tests.refusals import assert_names, assert_told
from tests.small_runs import records
from trimodal.evaluation import page_media

MIXED: dict[str, Any] = {
    "data": {"datasets": ["stamps", "synthetic"], "synthetic_images": 128, "synthetic_sounds": 128, "fit": "pad",
             "audio_max_s": 0.5, "workers": 1},
    "model": {"size": "nano", "image_size": 32, "context_length": 16, "embed_dim": 8, "num_classes": 1000,
              "vocab_size": 1, "word_embeddings": f"file:{Path(__file__).with_name('words.json')}"},
    "memory": {"micro_batch": 16},
    "training": {"epochs": 4, "batch_size": 16, "gradient_accumulation_steps": 2, "log_every_steps": 2,
                 "learning_rate": 1e-3},
    "evaluation": {"resamples": 20, "max_validation": 16}, "report": {"language": "en", "gallery_queries": 2},
    "stages": [
        {"name": "pretrain", "share": 1, "image_keep": 0.5, "audio_keep": 0.5, "tasks": [
            {"inputs": ["image"], "objectives": {"masked": 1.0}},
            {"inputs": ["audio"], "objectives": {"masked": 1.0, "speaker": 1.0}, "passes": 0.5}]},
        {"name": "align", "share": 2, "drop_path": 0.1, "tasks": [
            {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}},
            {"inputs": ["audio", "text"], "objectives": {"contrastive": 1.0}, "passes": 0.5},
            {"inputs": ["image", "audio"], "objectives": {"contrastive": 0.5}}]},
        {"name": "finetune", "share": 1, "lr_factor": 0.3, "tasks": [
            {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0, "matching": 0.5, "concepts": 0.5}}]},
    ],
}


@dataclass
class Finished:
    folder: Path
    report: dict[str, Any]
    out: str
    arguments: list[str]


def the_report(folder: Path) -> dict[str, Any]:
    [path] = (folder / "reports").glob("report_*.json")
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run, from its command line."""
    root = tmp_path_factory.mktemp("mixed")
    trees.stamps(root / "data", captions=40)
    (root / "mixed.yaml").write_text(yaml.safe_dump(MIXED), "utf-8")
    arguments = ["--config", str(root / "mixed.yaml"), "--data-root", str(root / "data"), "--output-dir",
                 str(root / "out"), "--device", "cpu", "--epochs", "4", "--lr", "1e-2", "training.use_amp=false"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_training.main(arguments) == 0
    return Finished(root / "out", the_report(root / "out"), out.getvalue(), arguments)


def test_the_folder_holds_what_was_promised(finished: Finished) -> None:
    names = {path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "logs/metrics.jsonl", "checkpoints/best_model.pt", "checkpoints/final_model.pt",
            "checkpoints/checkpoint_epoch_2.pt", "checkpoints/checkpoint_epoch_3.pt",
            "checkpoints/checkpoint_epoch_4.pt"} <= names
    assert "checkpoints/checkpoint_epoch_1.pt" not in names, "three are kept"
    assert [name for name in names if name.startswith("logs/tensorboard/events.out.tfevents.")]
    files = finished.report["files"]
    assert {f"reports/{name}" for name in files.values()} <= names
    assert files.keys() == {"markdown", "page", "losses", "progress", "gallery_image", "gallery_audio"}
    assert not [name for name in names if ".tmp" in name or ".writable" in name]


def test_tensorboard_shows_curves_charts_pictures_sounds_words_and_points(finished: Finished) -> None:
    """As its own readers find them in the folder."""
    from google.protobuf import text_format
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    folder = finished.folder / "logs" / "tensorboard"
    board = EventAccumulator(str(folder), {"audio": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    assert {"loss/align", "train/memory_planned_gib", "train/skipped_steps", "retrieval/text_to_audio_R@10_chance",
            "memory/align/planned_gib"} <= {*tags["scalars"]}
    assert {*tags["images"]} == {"examples/image", "examples/audio"}
    assert {*tags["audio"]} == {f"sounds/{number}" for number in range(1, 5)}
    sound = board.Audio("sounds/1")[0]
    assert sound.sample_rate == 16_000 and sound.encoded_audio_string.startswith(b"RIFF")
    assert 16_000 * 2 * 5 + 100 > len(sound.encoded_audio_string) > 1_000
    assert {"custom_scalars__config__", "run/settings/text_summary", "run/test_figures/text_summary",
            "sounds/asked_for/text_summary"} <= {*tags["tensors"]}
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text("utf-8"), ProjectorConfig())
    assert len(config.embeddings) == 2
    for one in config.embeddings:
        head, *labels = (folder / one.metadata_path).read_text("utf-8").splitlines()
        points = [line.split("\t") for line in (folder / one.tensor_path).read_text("utf-8").splitlines()]
        assert head.split("\t") == ["words", "modality", "set", "class"] and len(labels) == len(points) <= 400
        assert {line.split("\t")[1] for line in labels} == {"image", "text", "audio"}
        assert all(len(line.split("\t")) == 4 for line in labels) and {len(point) for point in points} == {8}
        with Image.open(folder / one.sprite.image_path) as sprite:
            across, down = (side // tile for side, tile in zip(sprite.size, one.sprite.single_image_dim, strict=True))
            assert across * down >= len(points)


def test_every_kind_of_record_is_there_with_all_its_parts(finished: Finished) -> None:
    found = records(finished.folder)
    assert {line["kind"] for line in found} == {"step", "validation", "stage", "report"}
    for line in records(finished.folder, "step"):
        assert line.keys() >= {"stage", "epoch", "step", "loss", "parts", "lr", "grad_norm", "temperature",
                               "samples_per_s", "data_wait_pct", "memory_gib"}
        assert math.isfinite(line["loss"]) and line["step"] % 2 == 0
    validations = records(finished.folder, "validation")
    assert [(line["stage"], line["epoch"]) for line in validations] == [
        ("pretrain", 1), ("align", 2), ("align", 3), ("finetune", 4)]
    assert validations[0]["metrics"] == {} and validations[0]["parts"].keys() == {
        "masked_image", "masked_audio"}
    assert {"image_to_text_R@1", "image_to_text_R@1_per_caption", "text_to_image_median_rank",
            "text_to_audio_R@10"} <= validations[1]["metrics"].keys()
    assert validations[3]["parts"].keys() == {
        "contrastive_image_text", "matching", "matching_accuracy", "concepts"}
    stages = records(finished.folder, "stage")
    assert [(line["stage"], line["epochs"]) for line in stages] == [("pretrain", 1), ("align", 2), ("finetune", 1)]
    assert sum(line["steps"] for line in stages) == stages[-1]["step"] == validations[-1]["step"]


def test_it_learns(finished: Finished) -> None:
    """Far beyond what rounding could do: the contrast of unseen samples gets better from epoch to epoch of a stage, and
    their concepts are told better than training ones were at the start of theirs."""
    _, before, after, last = records(finished.folder, "validation")
    for name in ("contrastive_image_text", "contrastive_audio_text"):
        assert after["parts"][name] < 0.99 * before["parts"][name], name
    first = next(line for line in records(finished.folder, "step") if line["stage"] == "finetune")
    assert last["parts"]["concepts"] < 0.9 * first["parts"]["concepts"]


def test_the_report_tells_what_was_run_and_found(finished: Finished) -> None:
    report = finished.report
    assert report["kind"] == "training" and report["config"]["training"]["epochs"] == 4
    assert report["config"]["training"]["batch_size"] == 16 and report["config"]["model"]["size"] == "nano"
    assert report["data"]["counts"]["synthetic"]["train"] == {"audio+text": 64, "captions": 256, "image+text": 64}
    assert report["data"]["licences"].keys() == {"stamps", "synthetic"}
    assert [stage["stage"] for stage in report["stages"]] == ["pretrain", "align", "finetune"]
    for stage in report["stages"]:
        assert stage["predicted_gib"] > 0 and stage["peak_gib"] > 0 and stage["seconds"] > 0 and stage["loss"] > 0
    figures = report["evaluation"]["figures"]
    assert {"all", "stamps", "synthetic"} <= figures.keys()
    assert {"image-text", "audio-text", "image-audio", "image-concepts"} <= figures["all"].keys()
    one = figures["synthetic"]["image-text"]["image_to_text_R@5"]
    assert one["candidates"] == 64 and one["queries"] == 32 and 0 < one["chance"] < 1 and 0 <= one["value"] <= 1
    assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
    losses = {line["epoch"]: line["loss"] for line in report["validations"] if line["stage"] == "finetune"}
    assert report["best"] == {"stage": "finetune", "epoch": 4, "loss": losses[4]}
    assert report["evaluation"]["split"] == "test" and len(report["gallery"]) == 4


def test_what_is_printed(finished: Finished) -> None:
    lines = finished.out.splitlines()
    assert [line for line in lines if "cpu" in line and "training.use_amp" in line] == lines[:1]
    assert [line.split()[0] for line in lines if line.startswith("[") and " epoch " in line] == [
        "[pretrain]", "[align]", "[align]", "[finetune]"]
    assert [line.split()[0] for line in lines if line.startswith("[") and " memory: " in line] == [
        "[pretrain]", "[align]", "[finetune]"]
    assert any(line.startswith("[align] epoch 3/4 ") and "image_to_text_R@1" in line and " (chance " in line
               for line in lines)
    [markdown] = (finished.folder / "reports").glob("*.md")
    assert_names(lines[-1], markdown)
    assert_names(lines[-2], markdown.with_suffix(".html"))
    assert markdown.read_text("utf-8").startswith("# ")


def test_the_page_shows_all_of_it(finished: Finished) -> None:
    text = (finished.folder / "reports" / finished.report["files"]["page"]).read_text("utf-8")
    page = Parsed(text)
    assert {"results", "curves", "after_stages", "memory", "time", "data", "map", "similarities", "retrievals",
            "environment", "config"} <= set(page.ids())
    assert f"{finished.report['command']}\n" in page.text()
    for query in (row["query"]["words"] for row in finished.report["retrievals"]):
        assert f"{query}\n" in page.text()
    shown = [attributes.get("src") or "" for tag, attributes in page.elements if tag in ("img", "audio")]
    assert {uri.partition(";")[0] for uri in shown} == {"data:image/webp", "data:audio/mpeg"}
    assert len(finished.report["map"]["points"]) == text.count('class="point ') > 50
    assert len(text) < page_media.MOST_BYTES + 1_000_000
    figures = finished.report["evaluation"]["figures"]["synthetic"]["image-text"]
    assert all(f">{name}</bdi>" in text for name in figures)


def test_the_page_tells_no_path_that_the_markdown_does_not(finished: Finished) -> None:
    text, markdown = ((finished.folder / "reports" / finished.report["files"][name]).read_text("utf-8")
                      for name in ("page", "markdown"))
    page = Parsed(text)
    told = page.text() + "\n".join(value or "" for _, attributes in page.elements for value in attributes.values()
                                   if not (value or "").startswith("data:"))
    paths = set(re.findall(r"(?:/[\w.-]+){2,}", told))
    assert any(str(finished.folder) in path for path in paths), "the command and the configuration hold some"
    assert [path for path in paths if path not in markdown] == []


def test_tensorboard_shows_curves_and_found_pictures(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished.folder / "logs" / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"loss/pretrain", "loss/align", "loss/finetune", "validation/align/loss", "retrieval/image_to_text_R@1",
            "retrieval/image_to_text_R@1_per_caption",
            "train/lr", "train/data_wait_pct", "temperature/image_text"} <= set(tags["scalars"])
    assert {"examples/image", "examples/audio"} <= set(tags["images"])


def test_best_and_final_are_the_weights_that_validation_chose(finished: Finished) -> None:
    best, final = (torch.load(finished.folder / "checkpoints" / f"{name}_model.pt") for name in ("best", "final"))
    assert all(torch.equal(value, final["model_state_dict"][name]) for name, value in best["model_state_dict"].items())
    model, extras = load_model(finished.folder / "checkpoints" / "best_model.pt")
    assert extras["stage"] == "finetune" and extras["epoch"] == 4
    with torch.inference_mode():
        outputs = model(images=torch.zeros(1, 3, 32, 32), input_ids=torch.tensor([[1, 2, 3]]))
    assert outputs["fused_features"].shape == (1, 8) and outputs["logits"].shape == (1, 1000)


def test_evaluate_gives_the_very_figures_of_the_run(finished: Finished, tmp_path: Path) -> None:
    status = evaluate.main(["--checkpoint", str(finished.folder / "checkpoints" / "best_model.pt"), "--device", "cpu",
                            "--data-root", finished.arguments[3], "--output-dir", str(tmp_path)])
    assert status == 0
    again = the_report(tmp_path)
    assert again["kind"] == "evaluation"
    assert again["evaluation"]["figures"] == finished.report["evaluation"]["figures"]
    assert again["data"]["digests"]["test"] == finished.report["data"]["digests"]["test"]


def test_a_second_start_is_refused_and_auto_says_that_all_is_done(finished: Finished,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training.main(finished.arguments) == 2
    assert_told(capsys.readouterr().err, finished.folder, "--resume auto", "--overwrite")
    before = records(finished.folder)
    assert run_training.main([*finished.arguments, "--resume", "auto"]) == 0
    [report] = (finished.folder / "reports").glob("*.md")
    assert_names(capsys.readouterr().out.splitlines()[-1], 4, report)
    assert records(finished.folder) == before


def test_one_epoch_on_the_official_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO with Karpathy's split and Clotho, real files, with a broken one in each."""
    trees.coco(tmp_path / "data", broken=True)
    trees.clotho(tmp_path / "data", broken=True)
    recipe = {**MIXED, "data": {"datasets": ["coco", "clotho"], "audio_max_s": 0.5, "workers": 0, "max_bad_pct": 20.0},
              "stages": [{"name": "align", "share": 1, "tasks": MIXED["stages"][1]["tasks"][:2]}]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--data-root", str(tmp_path / "data"), "--output-dir",
                 str(tmp_path / "out"), "--device", "cpu", "--epochs", "1", "training.use_amp=false"]
    best = tmp_path / "out" / "checkpoints" / "best_model.pt"
    assert run_training.main([*arguments, "training.log_every_steps=1"]) == 0
    capsys.readouterr()
    report = the_report(tmp_path / "out")
    figures = report["evaluation"]["figures"]
    assert {"all", "coco", "clotho"} <= figures.keys()
    assert figures["coco"]["image-text"].keys() and figures["clotho"]["audio-text"].keys()
    assert report["stages"][0]["steps"] == len(records(tmp_path / "out", "step"))
    bad = (tmp_path / "out" / "logs" / "bad_samples.jsonl").read_text("utf-8").splitlines()
    assert sorted(json.loads(line)["key"].split("/")[0] for line in bad) == ["clotho", "coco"]
    assert evaluate.main(["--checkpoint", str(best), "--device", "cpu", "--data-root", str(tmp_path / "data"),
                          "--output-dir", str(tmp_path / "again"), "--datasets", "coco"]) == 0
    assert the_report(tmp_path / "again")["evaluation"]["figures"]["coco"] == figures["coco"]
