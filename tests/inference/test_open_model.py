"""One object for use: features are those of evaluation, whatever form inputs have; mistakes are told in a line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from model import load_model, open_model
from tests.small_runs import SmallRuns
from tests.tiny_towers import SIDE, by_name
from trimodal.checkpoint import save
from trimodal.config import config_from_dict
from trimodal.evaluation import protocols
from trimodal.evaluation.micro_batches import Setting
from trimodal.inference.open_model import OpenModel
from trimodal.training import evaluations
from trimodal.training.run import description

TOWERS = (f"model.image_size={SIDE}", *(f"model.{name}.tower=./tiny_{name}" for name in ("image", "text")),
          *(f"stages.{name}.trainable=['(?!(image|text)\\\\.tower).*']"
            for name in ("pretrain", "align", "finetune")),
          "stages.pretrain.tasks=[{inputs: [image, text], objectives: {contrastive: 1}}]",
          "stages.pretrain.image_keep=1", "stages.align.audio_keep=1", "stages.align.drop_path=0")
TEXTS = ("a red circle", "two blue squares " * 9, "a", "green", "a blue square and a tone", "low tone", "a high tone")


class Made(NamedTuple):
    model: OpenModel
    expected: dict[str, torch.Tensor]  # features of evaluation, by modality
    images: list[str]
    audio: list[str]


def write_media(folder: Path) -> tuple[list[str], list[str]]:
    """Pictures that the cache keeps with and without loss, one of them turned by its EXIF; sounds of 0.2 to 25 s."""
    rng = np.random.default_rng(0)
    images = [str(folder / name) for name in ("a.jpg", "b.png", "c.jpg", "d.png")]
    turned = Image.Exif()
    turned[274] = 6  # by a quarter
    for path, shape in zip(images, ((300, 400), (40, 36), (500, 90), (64, 64)), strict=True):
        Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(path, exif=turned if "c.jpg" in path else b"")
    audio = [str(folder / f"{n}.wav") for n in range(3)]
    for path, seconds, rate_hz in zip(audio, (0.2, 25.0, 3.3), (16_000, 16_000, 44_100), strict=True):
        soundfile.write(path, rng.normal(0, 0.1, round(seconds * rate_hz)), rate_hz)
    return images, audio


@pytest.fixture(scope="module", params=["own", "towers"])
def made(request: pytest.FixtureRequest, small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """An untrained model's checkpoint, opened, and the features that evaluate.py has of files with captions."""
    folder = tmp_path_factory.mktemp(request.param)
    images, audio = write_media(folder)
    media = [{"image": path} for path in images] + [{"audio": path} for path in audio]
    lines = [{**one, "text": text, "split": "test"} for one, text in zip(media, TEXTS, strict=True)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = ["data.datasets=[synthetic,manifest]", f"data.manifest={folder / 'own.jsonl'}", "data.audio_max_s=2"]
    with by_name():
        run = small.open(folder / "run", *overrides, *(TOWERS if request.param == "towers" else ()))
        path = folder / "run" / "checkpoints" / "best_model.pt"
        save({**description(run), "stage": "align", "epoch": 1, "loss": 1.0,
              "model_state_dict": run.model.state_dict()}, path)
        yield Made(open_model(folder / "run", "cpu"), _evaluated(path), images, audio)


def _evaluated(path: Path) -> dict[str, torch.Tensor]:
    """Features of the test split, by modality, as evaluate.py encodes it."""
    model, state = load_model(path)
    config = replace(config_from_dict(state["config"], ["data.datasets=[manifest]"]), model=model.config)
    data = evaluations.with_frozen(evaluations.read_data(config, "test", state, model), model, config, fill=True)
    encoded = protocols.encode_split(model, data, "test", config, Setting(device=torch.device("cpu")))
    assert encoded.items["text"].rows_N.tolist() == list(range(len(TEXTS)))
    return {name: items.features_NF for name, items in encoded.items.items()}


def test_features_of_files_are_those_of_evaluation(made: Made) -> None:
    with pytest.warns(UserWarning, match="1 texts are longer"):
        found = {"image": made.model.encode(images=made.images), "audio": made.model.encode(audio=made.audio),
                 "text": made.model.encode(texts=TEXTS)}
    for name, features in found.items():
        assert features.dtype == torch.float32 and features.norm(dim=1) == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(features, made.expected[name], rtol=0, atol=2e-6)
        assert (features - features[0]).abs().max() > 1e-3, "the features of different items differ"
