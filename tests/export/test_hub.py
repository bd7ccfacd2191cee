"""A folder to share: the same numbers as the run, a model card from its report, and nothing of its paths or machine."""

import json
import platform
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from model import load_model, open_model
from tests.project import ROOT
from tests.refusals import assert_told
from tests.small_runs import SmallRuns
from tests.tiny_towers import SIDE, by_name
from trimodal.errors import counted
from trimodal.export import __main__ as command
from trimodal.export.public import is_public, public_command

TELLTALE = "quokka"  # in every name of the machine and its user
FILES = {"README.md", "config.json", "model.safetensors", "preprocessing.json", "tokenizer.json"}
PAIRS = "[{inputs: [image, text], objectives: {contrastive: 1}}, {inputs: [audio, text], objectives: {contrastive: 1}}]"
TOWERS = (f"model.image_size={SIDE}", *(f"model.{name}.tower=./{TELLTALE}/tiny_{name}" for name in ("image", "text")),
          *(f"stages.{name}.tasks={PAIRS}" for name in ("pretrain", "align", "finetune")),
          "stages.pretrain.image_keep=1", "stages.align.audio_keep=1", "stages.align.drop_path=0")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is encoded, and is test data of the runs."""
    folder, rng = tmp_path_factory.mktemp(TELLTALE), np.random.default_rng(0)
    found: dict[str, Any] = {"images": [], "audio": [], "texts": ["a red circle", "low tone", "a blue square"]}
    for n in range(3):
        found["images"].append(str(folder / f"{n}.png"))
        Image.fromarray(rng.integers(0, 256, (40, 50 + n, 3), np.uint8)).save(found["images"][-1])
        found["audio"].append(str(folder / f"{n}.wav"))
        soundfile.write(found["audio"][-1], rng.normal(0, 0.1, 8_000 * (n + 1)), 16_000)
    lines = [{"image": found["images"][n], "audio": found["audio"][n], "text": found["texts"][n], "split": "test"}
             for n in range(3)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


@pytest.fixture(scope="module", params=["own", "towers"])
def run(request: pytest.FixtureRequest, small: SmallRuns, media: dict[str, Any],
        tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output folder of a run whose settings, command, user and machine hold the telltale."""
    folder = tmp_path_factory.mktemp(TELLTALE)
    words = folder / "words.json"
    words.write_bytes((ROOT / "tests" / "words.json").read_bytes())
    own = Path(media["images"][0]).with_name("own.jsonl")
    with by_name(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "run_training.py", "--config", str(folder / "a.yaml"), "--data-root", f"/{TELLTALE}/data", "--epochs", "3",
            f"--output-dir={folder}", "--datasets", "synthetic", "manifest", f"data.manifest={own}", "training.seed=1"])
        patch.setattr(socket, "gethostname", lambda: TELLTALE)
        patch.setattr(platform, "node", lambda: TELLTALE)
        for name in ("USER", "LOGNAME", "HOSTNAME"):
            patch.setenv(name, TELLTALE)
        small.train(folder / "run", "data.datasets=[synthetic,manifest]", f"data.manifest={own}", "training.seed=1",
                    f"data.cache_dir={folder / 'cache'}", f"model.word_embeddings=file:{words}", "report.language=en",
                    *(TOWERS if request.param == "towers" else ()))
        assert TELLTALE in (folder / "run" / "checkpoints" / "config.json").read_text("utf-8"), "as a run keeps it"
        yield folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "new" / "model"
    assert command.main(["hub", str(run), str(folder)]) == 0
    return folder


def test_numbers_are_those_of_the_run(run: Path, exported: Path, media: dict[str, Any]) -> None:
    before, after = open_model(run, "cpu"), open_model(exported, "cpu")
    assert after.digest == before.digest and after.description["concepts"] == before.description["concepts"]
    for name, elements in media.items():
        given: dict[str, Any] = {name: elements}
        assert torch.equal(after.encode(**given), before.encode(**given))
    assert torch.equal(after.fuse(**media), before.fuse(**media))
    assert torch.equal(after.classify(media["texts"], audio=media["audio"]),
                       before.classify(media["texts"], audio=media["audio"]))
    _, state = load_model(exported / "model.safetensors")
    assert state["tokenizer"].startswith("{") and state["stage"] == "finetune"


def test_no_file_names_the_user_or_the_machine(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    for path in exported.iterdir():
        content = path.read_bytes().lower()
        for name in (TELLTALE, "/tmp/", "./tiny_"):  # the last are folders of towers
            assert name.encode() not in content, (path.name, name)
    with (exported / "model.safetensors").open("rb") as file:
        [size] = struct.unpack("<Q", file.read(8))
        assert json.loads(file.read(size))["__metadata__"] == {"format": "pt"}


def test_the_card_tells_figures_data_training_and_licences(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text("utf-8")
    [path] = (run / "reports").glob("report_*.json")
    report = json.loads(path.read_text("utf-8"))
    figure = report["evaluation"]["figures"]["synthetic"]["image-text"]["image_to_text_R@5"]
    assert f"| synthetic | image_to_text_R@5 | {figure['value']:.4f} |" in card
    assert f"| {figure['chance']:.4f} | {figure['candidates']} | {figure['queries']} |" in card
    assert "python run_training.py --epochs 3 --datasets synthetic manifest training.seed=1`" in card
    assert f"Hardware: cpu, {counted(report['environment']['cpus'], 'CPU core')}" in card
    for name, licence in report["data"]["licences"].items():
        assert f"| data set {name} | {licence} |" in card
    for name, tower in report["towers"].items():
        assert f"| tower of {name}: ./local | {tower['licence']} |" in card
    assert card.startswith("---\n") and card.count("\n---\n") == 1 and "open_model" in card


def test_without_a_report_the_card_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "best_model.pt").symlink_to(run / "checkpoints" / "best_model.pt")
    assert command.main(["hub", str(tmp_path / "best_model.pt"), str(tmp_path / "made")]) == 0
    card = (tmp_path / "made" / "README.md").read_text("utf-8")
    assert "not evaluated" in card and "data set synthetic" in card


def test_what_is_there_is_never_written_over(run: Path, exported: Path, capsys: pytest.CaptureFixture[str],
                                             tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert command.main(["hub", str(run), str(exported)]) == 2
    assert_told(capsys.readouterr().err, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command.main(["hub", str(run), str(folder)]) == 2
        assert_told(capsys.readouterr().err, folder)
    assert command.main(["hub", str(tmp_path / "gone"), str(tmp_path / "new")]) == 2
    assert_told(capsys.readouterr().err, tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("command", "public"), [
    ("python run_training.py --model-size=base --lr 1e-3 --resume auto", "--model-size=base --lr 1e-3"),
    ("python run_training.py --output-dir 8 --batch-size 8 /a/b c", "--batch-size 8"),
    ("python /a/run_training.py --config recipes/demo.yaml --plan", "--config recipes/demo.yaml"),
    ("python run_training.py --config /data/a/recipes/own.yaml --datasets coco a/b x=1", "--datasets coco"),
    ("python run_training.py model.size=tiny model.image.tower=a model.text.weights=/a data.manifest=a.jsonl",
     "model.size=tiny"),
    ("python run_training.py stages.align.lr_factor=0.5 training.x=a/b paths.data_root=a memory.budget_gb=8",
     "stages.align.lr_factor=0.5 memory.budget_gb=8")])
def test_of_a_command_what_names_no_path_is_kept(command: str, public: str) -> None:
    assert public_command(command) == f"python run_training.py {public}"


def test_names_of_towers_that_others_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "clip").mkdir(parents=True)
    known = ["timm:vit_small_patch14_dinov2.lvd142m", "hub:openai/clip-vit-base-patch32", "package:a-b", "hub:a/b@v1"]
    assert [name for name in known if not is_public(name)] == []
    assert [name for name in ("./clip", "/a/b", "hub:/a/b", "hub:own/clip", "file:words.json", "timm:local-dir:/a",
                              "hub:a/b/c", "hub:~/a") if is_public(name)] == []
