"""evaluate.py from its command line: the same figures as the protocols, a report, and one line for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import protocols
import report
from checkpoint import save
from config import config_from_dict
from datasets import load_data
from memory import choose_precision
from model import create_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as training writes it, of an untrained tiny model for pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_from_dict({
        "model": {"size": "tiny", "image_size": 32}, "report": {"language": "en", "gallery_queries": 2},
        "data": {"datasets": ["synthetic"], "synthetic_images": 128, "synthetic_sounds": 128, "workers": 0},
        "evaluation": {"resamples": 10}})
    data = load_data(config)
    torch.manual_seed(0)
    model = create_model("tiny", image_size=32)
    state = {"config": config.to_dict(), "tokenizer": data.tokenizer.to_json(), "concepts": list(data.concepts),
             "speakers": [], "stage": "align", "epoch": 3, "loss": 1.25, "model_state_dict": model.state_dict()}
    path = folder / "best_model.pt"
    save(state, path)
    return path, config, data, model


def _main(tmp_path, *arguments):
    return evaluate.main([*map(str, arguments), "--output-dir", str(tmp_path / "out"), "--device", "cpu",
                          "--data-root", str(tmp_path / "data")])


def test_the_figures_are_those_of_the_protocols_and_stand_in_table_and_report(trained, tmp_path, capsys):
    path, config, data, model = trained
    assert _main(tmp_path, "--checkpoint", path) == 0
    out = capsys.readouterr().out
    found = json.loads(next((tmp_path / "out" / "reports").glob("report_*.json")).read_text("utf-8"))
    cpu = torch.device("cpu")
    setting = protocols.Setting(device=cpu, amp=choose_precision(cpu, use_amp=True).dtype)
    expected, encoded = protocols.evaluate_split(model, data, "test", config, setting)
    assert found["evaluation"] == {"split": "test", "figures": expected, "facts": encoded.facts}
    assert report.format_table(expected) in out
    assert found["kind"] == "evaluation" and found["best"] == {"stage": "align", "epoch": 3, "loss": 1.25}
    assert found["data"]["counts"]["synthetic"].keys() == {"test"} and found["stages"] == []
    assert len(found["gallery"]) == 4  # two captions of pictures, two of sounds
    markdown = tmp_path / "out" / "reports" / found["files"]["markdown"]
    assert f"Report: {markdown}" in out and markdown.read_text("utf-8").startswith("# Evaluation report")


def test_split_limit_and_overrides(trained, tmp_path):
    arguments = ["--checkpoint", trained[0], "--split", "val", "--limit", "8", "--datasets", "synthetic",
                 "report.language=zh", "report.gallery_queries=0"]
    assert _main(tmp_path, *arguments) == 0
    path = next((tmp_path / "out" / "reports").glob("report_*.json"))
    found = json.loads(path.read_text("utf-8"))
    assert found["evaluation"]["split"] == "val"
    assert found["evaluation"]["facts"]["synthetic"] | {"nonfinite": {}} == {
        "samples": 16, "of": 64, "broken": 0, "subset_seed": 0, "nonfinite": {}}
    assert found["config"]["report"]["language"] == "zh" and found["gallery"] == []
    assert "评测报告" in path.with_suffix(".md").read_text("utf-8")


def _expect(capsys, status, *words):
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


def test_checkpoints_that_cannot_be_used(trained, tmp_path, capsys):
    _expect(capsys, _main(tmp_path, "--checkpoint", tmp_path / "none.pt"), "none.pt: no such checkpoint")
    text = tmp_path / "notes.pt"
    text.write_text("hello")
    _expect(capsys, _main(tmp_path, "--checkpoint", text), "notes.pt", "not a checkpoint of this project")
    whole = trained[0].read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[:len(whole) // 2])
    _expect(capsys, _main(tmp_path, "--checkpoint", cut), "cut.pt", "truncated")
    other = tmp_path / "other.pt"
    save({"weights": torch.zeros(3)}, other)
    _expect(capsys, _main(tmp_path, "--checkpoint", other), "other.pt", "not a checkpoint of this project")


@pytest.mark.parametrize("arguments, words", [
    (["--datasets", "cocoo"], ["data.datasets", "'cocoo' is unknown", "Did you mean 'coco'?"]),
    (["--datasets", "clotho"], ["clotho", "python download_datasets.py --datasets clotho --data-root"]),
    (["evaluation.batchsize=3"], ["evaluation.batchsize", "Did you mean 'batch_size'?"]),
    (["evaluation.batch_size=x"], ["evaluation.batch_size", "expected int"]),
    (["model.size=large"], ["model.size=large: the model is that of the checkpoint"]),
    (["--datasets", "manifest"], ["data.manifest", "JSONL or CSV"]),
])
def test_what_was_asked_for_wrongly_takes_one_line(trained, tmp_path, capsys, arguments, words):
    _expect(capsys, _main(tmp_path, "--checkpoint", trained[0], *arguments), *words)


@pytest.mark.parametrize("arguments, word", [
    (["--bogus"], "unknown argument '--bogus'"), (["--split", "tset"], "invalid choice: 'tset'"),
    (["--limit", "1"], "--limit: 1 is below 2"), (["--limit", "many"], "invalid int"), (["word"], "unknown argument"),
    (["--data-root", ""], "--data-root: is empty"), (["--output-dir", " "], "--output-dir: is empty; name a path"),
])
def test_flags_that_are_wrong(trained, tmp_path, capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        _main(tmp_path, "--checkpoint", trained[0], *arguments)
    _expect(capsys, stop.value.code, word)


def test_no_checkpoint_given(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    _expect(capsys, stop.value.code, "--checkpoint")


def test_a_device_that_is_not_there(trained, tmp_path, capsys):
    status = evaluate.main(["--checkpoint", str(trained[0]), "--device", "tpu", "--output-dir", str(tmp_path)])
    _expect(capsys, status, "--device", "'tpu'")


def test_an_output_folder_that_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    _expect(capsys, _main(tmp_path, "--checkpoint", trained[0]), "out/reports", "choose another --output-dir")


def test_a_full_disk(trained, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    assert _main(tmp_path, "--checkpoint", trained[0], "--limit", "2") == 0
    shutil.rmtree(tmp_path / "out" / "reports")
    capsys.readouterr()
    monkeypatch.setattr(report.os, "fsync", full)
    _expect(capsys, _main(tmp_path, "--checkpoint", trained[0], "--limit", "2"), "No space left on device")
    assert list((tmp_path / "out" / "reports").iterdir()) == []


def test_a_split_without_anything_to_compare(trained, tmp_path, capsys):
    manifest = tmp_path / "own.jsonl"
    manifest.write_text(json.dumps({"text": "words alone", "split": "test"}) + "\n")
    status = _main(tmp_path, "--checkpoint", trained[0], "--datasets", "manifest", f"data.manifest={manifest}")
    _expect(capsys, status, "--split test", "manifest")


def test_the_concepts_are_those_of_the_checkpoint(trained, tmp_path):
    """A label that the training did not know is not scored; one that it knew keeps its place."""
    path, _, data, _ = trained
    from PIL import Image

    lines = []
    for n, label in enumerate([data.concepts[0], "unheard of", data.concepts[0], data.concepts[1]]):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "labels": [label], "split": "test"}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert _main(tmp_path, "--checkpoint", path, "--datasets", "manifest", f"data.manifest={tmp_path}/own.jsonl") == 0
    found = json.loads(next(Path(tmp_path / "out" / "reports").glob("*.json")).read_text("utf-8"))
    figure = found["evaluation"]["figures"]["manifest"]["image-concepts"]["image_to_concepts_mAP"]
    assert figure["queries"] == 2 and figure["candidates"] == 3
