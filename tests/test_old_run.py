"""A run of the release of November 2026 (tests/old_run/write.py says how it was made) opens, computes, goes on and is
evaluated as it was then. Users hold such files: names in a state dict and keys of a checkpoint do not move."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import run_training
from model import create_model, load_model
from tests.small_runs import records
from trimodal.config import PRESETS

OLD = Path(__file__).with_name("old_run") / "run"
BEST = OLD / "checkpoints" / "best_model.pt"
WITHIN = "checkpoint_epoch_3_step_11.pt"  # one step of the third epoch is left


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` is as small as it was when the run was written."""
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["nano"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, to be written to."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def figures(report: Path) -> dict[str, float]:
    """The value of each metric of an evaluation: "synthetic image-text image_to_text_R@1" -> 0.03125."""
    found = json.loads(report.read_text("utf-8"))["evaluation"]["figures"]
    return {f"{name} {pair} {metric}": entry["value"] for name, pairs in found.items()
            for pair, metrics in pairs.items() for metric, entry in metrics.items()}


def assert_same_figures(new: Path, old: Path) -> None:
    then, now = figures(old), figures(new)  # today's has more of them
    assert {name: now[name] for name in then} == pytest.approx(then, rel=1e-5)


def go_on(run: Path, checkpoint: str, epochs: int) -> int:
    return run_training.main([
        "--config", str(run / "config.yaml"), "--data-root", str(run.parent / "data"), "--output-dir", str(run),
        "--resume", checkpoint, "--device", "cpu", "--epochs", str(epochs)])


def assert_same_features(model: torch.nn.Module) -> None:
    """Features within 1e-6 in float32; all outputs within 1e-9 in float64, as logits of 17 hold no 1e-6 in float32."""
    recorded = torch.load(OLD / "features.pt")
    with torch.inference_mode():
        outputs, exact = model(**recorded["inputs"]), model.double()(**recorded["inputs"])
    assert outputs.keys() == exact.keys() == recorded["outputs"].keys()
    for name, value in recorded["outputs"].items():
        torch.testing.assert_close(exact[name], recorded["exact"][name], rtol=1e-9, atol=1e-9)
        if name != "logits":
            torch.testing.assert_close(outputs[name], value, rtol=1e-6, atol=1e-6)


def test_load_model_gives_the_features_of_then() -> None:
    model, extras = load_model(BEST)
    assert_same_features(model)
    assert extras["config"]["model"]["image_size"] == 32 and "circle" in extras["concepts"]


def test_the_loading_snippet_gives_the_features_of_then() -> None:
    model = create_model("tiny", vocab_size=135, embed_dim=8, num_classes=60)
    checkpoint = torch.load(BEST)
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()
    assert_same_features(model)


def test_training_within_an_epoch_goes_on_to_the_figures_of_then(run: Path) -> None:
    """The step that was left, the validation after it and the evaluation are computed again, as they were."""
    then = records(OLD, "step", "validation")
    assert go_on(run, str(run / "checkpoints" / WITHIN), 3) == 0
    now = records(run, "step", "validation")
    assert [(line["kind"], line["stage"], line["epoch"], line["step"]) for line in now] == [
        (line["kind"], line["stage"], line["epoch"], line["step"]) for line in then]
    assert [line["loss"] for line in now] == pytest.approx([line["loss"] for line in then], rel=1e-5)
    [new], [old] = run.glob("reports/report_*.json"), OLD.glob("reports/report_*.json")
    assert_same_figures(new, old)


def test_a_finished_run_goes_on_to_further_epochs(run: Path) -> None:
    assert go_on(run, "auto", 5) == 0
    lines = records(run, "step", "validation")
    assert lines[:len(records(OLD, "step", "validation"))] == records(OLD, "step", "validation"), "earlier lines stay"
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 17))
    assert [line["epoch"] for line in lines if line["kind"] == "validation"] == [1, 2, 3, 4, 5]
    state = torch.load(run / "checkpoints" / "checkpoint_epoch_5.pt")
    assert state["progress"]["epoch"] == 5 and state["stage_epochs"] == {"pretrain": 1, "align": 1, "finetune": 3}


def test_evaluate_gives_the_figures_of_then(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "reports")
    assert evaluate.main(["--checkpoint", str(run / "checkpoints" / "best_model.pt"), "--device", "cpu", "--data-root",
                          str(run.parent / "data"), "--output-dir", str(run)]) == 0
    [new], [old] = run.glob("reports/report_*.json"), OLD.glob("reports/report_*.json")
    assert_same_figures(new, old)
