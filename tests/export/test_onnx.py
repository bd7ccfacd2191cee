"""Graphs of a model beside the model itself, run by onnxruntime, and the folder that they are given out in."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from model import TriModalModel, create_model, load_model, open_model
from tests.project import ROOT
from tests.refusals import assert_told, refused
from tests.small_runs import RECIPE
from trimodal import checkpoint
from trimodal.blocks import Tokens
from trimodal.config import MODALITIES
from trimodal.data.audio import log_mel
from trimodal.export import onnx
from trimodal.export.__main__ import main
from trimodal.export.graphs import AUDIO_WINDOW

onnxruntime: Any = importlib.import_module("onnxruntime")
WITHIN, WIDTH = 1e-4, 64
LENGTHS = (1, 400, 16_000, AUDIO_WINDOW, AUDIO_WINDOW + 1, 2 * AUDIO_WINDOW + 5_000)


def write_checkpoint(path: Path, **settings: Any) -> Path:
    """A model as no training leaves it: all of its numbers count."""
    torch.manual_seed(3)
    model = create_model(**{**RECIPE["model"], **settings})
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value) / max(1.0, value.shape[-1] ** 0.5 if value.ndim else 1.0))
    config = {**RECIPE, "model": {**RECIPE["model"], **settings}, "data": {**RECIPE["data"], "fit": "pad"}}
    words = Path(RECIPE["model"]["word_embeddings"].removeprefix("file:")).read_text("utf-8")
    checkpoint.save({"config": config, "tokenizer": words, "concepts": [f"concept {i}" for i in range(60)],
                     "model_state_dict": model.state_dict()}, path)
    return path


class Export(NamedTuple):
    folder: Path
    checkpoint: Path
    model: TriModalModel

    def run(self, name: str, *outputs: str, **inputs: Any) -> list[torch.Tensor]:
        """What onnxruntime makes of a graph: all outputs, or those named."""
        session = onnxruntime.InferenceSession(str(self.folder / f"{name}.onnx"))
        given = {key: np.asarray(value) for key, value in inputs.items()}
        return [torch.from_numpy(value) for value in session.run(list(outputs) or None, given)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("export")
    path = write_checkpoint(folder / "best_model.pt", attention_chunk=4, embed_dim=WIDTH)
    assert main(["onnx", str(path), str(folder / "new" / "graphs")]) == 0
    return Export(folder / "new" / "graphs", path, load_model(path)[0])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().max())


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """A tone that swells from nothing, over noise; silence in the middle."""
    rng = np.random.default_rng(seed)
    times_S = np.arange(samples) / 16_000
    wave_S = np.sin(2 * np.pi * 440 * times_S) * np.linspace(0, 0.9, samples) + 1e-3 * rng.standard_normal(samples)
    wave_S[samples // 3: samples // 2] = 0
    return wave_S.astype(np.float32)


def mel(wave_S: np.ndarray) -> torch.Tensor:
    """As data sets keep it, [1, T, 80]."""
    return torch.from_numpy(log_mel(wave_S)).half()[None]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_pictures(exported: Export, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    features, tokens, valid = exported.run("image", images=images)
    assert apart(features, exported.model.image_features(images)) < WITHIN
    assert apart(tokens, exported.model.image(images).tokens_BND) < WITHIN and valid.all()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1], [12], [5, 12, 1], [2] * 9])
def test_texts_whatever_their_padding(exported: Export, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, 135, mask.shape, generator=generator)
    features, tokens, valid = exported.run("text", input_ids=ids, attention_mask=mask)
    assert apart(features, exported.model.text_features(ids, mask)) < WITHIN
    assert apart(tokens, exported.model.text(ids, mask).tokens_BND) < WITHIN and valid.equal(mask.bool())
    others = torch.where(mask.bool(), ids, (ids + 1) % 135)
    again = exported.run("text", "text_features", input_ids=others, attention_mask=mask)[0]
    assert apart(again, features) < 1e-6


@torch.no_grad()
def test_sounds_of_any_length_alone_and_beside_others(exported: Export) -> None:
    """Shorter than a window, exactly one, just over it, and several."""
    waves = [sound(samples, seed) for seed, samples in enumerate(LENGTHS)]
    expected = torch.cat([exported.model.audio_features(mel(wave)) for wave in waves])
    alone = torch.cat([exported.run("audio", "audio_features", waveform=wave[None], samples_valid=[len(wave)])[0]
                       for wave in waves])
    assert apart(alone, expected) < WITHIN
    for padding in (0.0, 5.0):
        padded = np.full((len(waves), max(LENGTHS)), padding, np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[:len(wave)] = wave
        features, tokens, valid = exported.run("audio", waveform=padded, samples_valid=LENGTHS)
        assert apart(features, alone) < 1e-6, "what lies behind a sound is not heard"
        frames = [-(-samples // 160) for samples in LENGTHS]
        assert valid.sum(1).tolist() == [5 * -(-count // 16) for count in frames] and tokens.shape[:2] == valid.shape


@torch.no_grad()
@pytest.mark.parametrize("given", [("image",), ("text", "audio"), MODALITIES])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_fusion_of_what_is_given(exported: Export, given: tuple[str, ...], batch: int) -> None:
    """The tokens are those of the other graphs; a modality that is not given has none."""
    generator = torch.Generator().manual_seed(1)
    tokens = {}
    for name in MODALITIES:
        values = torch.randn(batch, 6 if name in given else 0, 8, generator=generator)
        tokens[name] = Tokens(values, torch.rand(values.shape[:2], generator=generator) < 0.7)
    expected = exported.model.fuse({name: tokens[name] for name in given})[1:]
    found = exported.run("fusion", **{f"{name}_{part}": value for name, (values, valid) in tokens.items()
                                      for part, value in (("tokens", values), ("valid", valid))})
    assert max(apart(*pair) for pair in zip(found, expected, strict=True)) < WITHIN


# ---- the folder --------------------------------------------------------------------------------------------------


def test_the_folder_is_whole_and_tells_nothing_of_this_machine(exported: Export) -> None:
    names = {"image.onnx", "text.onnx", "audio.onnx", "fusion.onnx", "preprocessing.json", "tokenizer.json",
             "README.md", "example.py"}
    assert {path.name for path in exported.folder.iterdir()} == names
    assert [path.name for path in exported.folder.parent.iterdir()] == ["graphs"], "nothing is left beside it"
    for path in exported.folder.iterdir():
        content = path.read_bytes()
        assert not [place for place in (ROOT, exported.checkpoint.parent, Path.home())
                    if str(place).encode() in content]
    rules = json.loads((exported.folder / "preprocessing.json").read_text("utf-8"))
    assert rules["image"]["size"] == 32 and rules["text"]["max_tokens"] == 12 and rules["audio"]["rate_hz"] == 16_000
    assert rules["concepts"][:1] == ["concept 0"] and rules["fusion"] == dict.fromkeys(MODALITIES, 8)


def test_sizes_that_vary_have_names(exported: Export) -> None:
    session = onnxruntime.InferenceSession(str(exported.folder / "audio.onnx"))
    assert [(one.name, one.shape) for one in (*session.get_inputs(), *session.get_outputs())] == [
        ("waveform", ["batch", "samples"]), ("samples_valid", ["batch"]), ("audio_features", ["batch", WIDTH]),
        ("audio_tokens", ["batch", "audio_length", 8]), ("audio_valid", ["batch", "audio_length"])]


WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "trimodal", "model", "datasets"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def block(text: str) -> str:
    """The program in a manual, from its first line on, without its comments."""
    program = text.partition("from example import")[2].partition("```")[0]
    return re.sub(r" +#.*", "", f"from example import{program}")


def test_the_manual_s_example_runs_without_torch_and_gives_the_model_s_numbers(exported: Export, tmp_path: Path
                                                                              ) -> None:
    """As in the trainer's own reading of the files: a drawing that is larger than the model reads, with transparency
    and a turned one; sounds of two channels."""
    rng = np.random.default_rng(0)
    drawing = Image.fromarray(np.kron(rng.integers(0, 256, (9, 6, 4)), np.ones((10, 20, 1))).astype(np.uint8), "RGBA")
    drawing.save(tmp_path / "picture.png")
    wave = sound(50_000)
    soundfile.write(tmp_path / "sound.wav", np.stack([wave, 0.5 * wave], 1), 16_000, subtype="FLOAT")
    manuals = (exported.folder / "README.md", ROOT / "docs" / "using.md", ROOT / "docs" / "using_en.md")
    [program] = {block(path.read_text("utf-8")) for path in manuals}
    show = "\nfor found in (images, texts, sounds, together):\n    for name, value in found.items():\n" \
           "        np.save(name, value)\n"
    subprocess.run([sys.executable, "-I", "-c",
                    f"{WITHOUT_US}\nsys.path.insert(0, {str(exported.folder)!r})\nimport numpy as np\n{program}{show}"],
                   cwd=tmp_path, check=True)
    found = {path.stem: torch.from_numpy(np.load(path)) for path in tmp_path.glob("*.npy")}
    assert len(found) == 11
    model = open_model(exported.checkpoint, device="cpu")
    assert apart(found["image_features"], model.encode(images=[tmp_path / "picture.png"])) < WITHIN
    assert apart(found["audio_features"], model.encode(audio=[tmp_path / "sound.wav"])) < WITHIN
    assert apart(found["text_features"], model.encode(texts=["a dog barks", "rain on a roof"])) < WITHIN


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_what_is_there_is_not_written_over(exported: Export, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    assert main(["onnx", str(exported.checkpoint), str(mine)]) == 2
    assert_told(capsys.readouterr().err, mine)
    assert not list(mine.iterdir())


def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("no_such_package",))
    with refused("no_such_package", "pip install -r requirements-export.txt"):
        onnx.write("best_model.pt", tmp_path / "new")
    assert (ROOT / "requirements-export.txt").is_file()


def test_a_graph_that_differs_is_not_given_out(exported: Export, monkeypatch: pytest.MonkeyPatch,
                                               tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "write_graph", lambda graph, path: path.write_bytes(b""))
    monkeypatch.setattr(onnx, "largest_difference", lambda graph, path: float("nan"))
    with refused("image", "constraints.txt"):
        onnx.write(str(exported.checkpoint), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["onnx", "no.pt", "new"], ["onnx"], ["pickle", "no.pt", "new"],
                                       ["onnx", "no.pt", "new", "--modalities", "smell"]])
def test_other_mistakes_take_one_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
