"""Zero-shot classification: the classes of a folder, prompts, figures against a plain reference, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from datasets import Data, load_data
from model import TriModalModel
from tests.refusals import assert_told, refused
from tests.small_runs import RECIPE
from trimodal.checkpoint import save
from trimodal.config import Config, config_from_dict
from trimodal.data.images import decode_image, fit_eval
from trimodal.evaluation import zero_shot
from trimodal.evaluation.micro_batches import Setting
from trimodal.training.run import build_model

Made = tuple[Config, Data, TriModalModel, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An untrained model, its checkpoint, and what it was made of."""
    folder = tmp_path_factory.mktemp("made")
    config = config_from_dict({"data": RECIPE["data"], "model": RECIPE["model"], "evaluation": {"batch_size": 4},
                               "report": {"language": "en"}, "paths": {"data_root": str(folder / "data")}})
    data = load_data(config, ["train"])
    torch.manual_seed(0)
    model = build_model(config, data, None).eval()
    save({"config": {**config.to_dict(), "model": {**config.to_dict()["model"],
                                                  "vocab_size": model.config.vocab_size}},
          "tokenizer": data.tokenizer.to_json(), "concepts": list(data.concepts), "speakers": [], "stage": "align",
          "epoch": 1, "loss": 1.0, "model_state_dict": model.state_dict()}, folder / "best_model.pt")
    return config, data, model, folder / "best_model.pt"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of three, two and four pictures, one of them in a folder below."""
    rng = np.random.default_rng(0)
    for name, count in (("red_circle", 3), ("blue square", 2), ("green triangle", 4)):
        for n in range(count):
            place = tmp_path / "own" / name / ("more" if n == 3 else "")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(place / f"{n}.png")
    (tmp_path / "own" / "red_circle" / "notes.txt").write_text("not a picture")
    return tmp_path / "own"


def test_the_figures_are_those_of_a_plain_reference(made: Made, pictures: Path) -> None:
    config, data, model, _ = made
    classes = zero_shot.read_classes(pictures)
    assert classes.names == ("blue square", "green triangle", "red circle") and classes.modality == "image"
    assert np.bincount(classes.classes_N).tolist() == [2, 4, 3]
    prompts = ("a {} here", "{}")
    figures, facts = zero_shot.classify(model, classes, prompts, config, Setting(device=torch.device("cpu")),
                                        data.tokenizer)
    with torch.no_grad():
        sides = []
        for name in classes.names:
            texts = [data.tokenizer.encode([prompt.replace("{}", name)], 12) for prompt in prompts]
            sides.append(F.normalize(torch.cat([model.text_features(*text) for text in texts]).mean(0), dim=0))
        squares = [fit_eval(decode_image(path), 32).transpose(2, 0, 1) for path in classes.files]
        images = [model.image_features(torch.from_numpy(square.copy())[None]) for square in squares]
        scores = torch.cat(images) @ torch.stack(sides).T
    right = [int(row.argmax()) == label for row, label in zip(scores, classes.classes_N, strict=True)]
    assert figures["image_to_class_top1"]["value"] == pytest.approx(np.mean(right))
    assert figures["image_to_class_top1"]["chance"] == pytest.approx(1 / 3)
    assert figures["image_to_class_top1"]["candidates"] == 3 and figures["image_to_class_top1"]["queries"] == 9
    assert figures["image_to_class_top5"]["value"] == figures["image_to_class_top5"]["chance"] == 1.0
    assert figures["image_to_class_top1"]["low"] is not None
    assert facts["samples"] == facts["of"] == 9 and facts["broken"] == 0


def test_a_collapsed_model_finds_nothing(made: Made, pictures: Path) -> None:
    config, data, _, _ = made

    class Collapsed(torch.nn.Module):
        def image_features(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 4) / 2

        def text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(ids), 4) / 2

    figures, _ = zero_shot.classify(Collapsed(), zero_shot.read_classes(pictures), ("{}",), config,
                                    Setting(device=torch.device("cpu")), data.tokenizer)
    assert figures["image_to_class_top1"]["value"] == 0.0


def test_evaluate_reports_it_and_a_broken_file(made: Made, pictures: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "red_circle" / "9.png").write_bytes(b"no picture")
    (tmp_path / "prompts.txt").write_text("a {} of one colour\n\nsome {}\n")
    given = ["--checkpoint", str(made[3]), "--zero-shot", str(pictures), "--output-dir", str(tmp_path / "out"),
             "--device", "cpu", "data.max_bad_pct=50"]
    assert evaluate.main([*given, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert "image_to_class_top1" in capsys.readouterr().out
    (path,) = (tmp_path / "out" / "reports").glob("report_*.json")
    told = json.loads(path.read_text("utf-8"))
    assert told["evaluation"]["figures"]["own"]["image-class"]["image_to_class_top1"]["queries"] == 9
    assert told["evaluation"]["facts"]["own"]["broken"] == 1
    assert told["data"]["prompts"] == ["a {} of one colour", "some {}"]
    (tmp_path / "prompts.txt").write_text("a picture\n")
    assert evaluate.main([*given, "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert_told(capsys.readouterr().err, tmp_path / "prompts.txt", "line 1", "{}")
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(made[3]), "--prompts", "x"])
    assert_told(capsys.readouterr().err, "--prompts", "--zero-shot")


def test_sounds_are_classified_too(made: Made, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dog", "rain"):
        (tmp_path / name).mkdir()
        for n in range(2):
            soundfile.write(tmp_path / name / f"{n}.wav", rng.normal(0, 0.1, 8_000), 16_000)
    classes = zero_shot.read_classes(tmp_path)
    assert classes.modality == "audio"
    figures, _ = zero_shot.classify(made[2], classes, zero_shot.read_prompts(None, "audio"), made[0],
                                    Setting(device=torch.device("cpu")), made[1].tokenizer)
    assert figures["audio_to_class_top1"]["queries"] == 4 and figures["audio_to_class_top1"]["chance"] == 0.5


def test_folders_that_are_no_classes(pictures: Path, tmp_path: Path) -> None:
    with refused("--zero-shot", str(tmp_path / "none")):
        zero_shot.read_classes(tmp_path / "none")
    (pictures / "empty").mkdir()
    with refused("--zero-shot", "'empty'"):
        zero_shot.read_classes(pictures)
    (pictures / "empty" / "1.wav").write_bytes(b"")
    with refused("--zero-shot", 9, 1):
        zero_shot.read_classes(pictures)
    (tmp_path / "alone" / "cat").mkdir(parents=True)
    (tmp_path / "alone" / "cat" / "1.jpg").write_bytes(b"")
    with refused("--zero-shot", "1 class"):
        zero_shot.read_classes(tmp_path / "alone")
