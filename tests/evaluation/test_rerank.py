"""Re-ranking: the logits of pairs are those of the fusion and the head, and checkpoints hold what it needs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import Data, Loader, load_data
from model import TriModalModel, load_model
from tests.refusals import refused
from tests.small_runs import RECIPE, SmallRuns, float64, records
from trimodal import checkpoint
from trimodal.config import Config, config_from_dict
from trimodal.evaluation import protocols
from trimodal.evaluation.micro_batches import Setting
from trimodal.evaluation.rerank import PairScores, heads_of
from trimodal.training import loop
from trimodal.training.run import Options, build_model

CPU = Setting(device=torch.device("cpu"), concepts=False)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Data, TriModalModel]:
    folder = tmp_path_factory.mktemp("synthetic")
    config = config_from_dict({
        "data": RECIPE["data"], "model": RECIPE["model"], "evaluation": {"batch_size": 7, "resamples": 0, "rerank": 4},
        "paths": {"data_root": str(folder / "data"), "output_dir": str(folder / "out")}})
    data = load_data(config)
    with float64():
        return config, data, build_model(config, data, None).eval()


def _heads(model: TriModalModel, *pairs: str) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    dim = model.config.preset.dim
    return {pair: {"weight": torch.randn(1, dim, generator=g, dtype=torch.float64), "bias": torch.ones(1).double()}
            for pair in pairs}


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_logits_are_those_of_pairs_fused_one_by_one(synthetic: tuple[Config, Data, TriModalModel], modality: str,
                                                   size: int) -> None:
    """Whatever the micro-batches, and whatever has been asked before."""
    config, data, model = synthetic
    heads = _heads(model, f"{modality}_text")
    setting = Setting(device=torch.device("cpu"), sizes={"image": size, "text": size, "audio": size})
    scores = PairScores(model, heads, data, "test", config, setting)
    split = data.splits["test"]
    rows = np.flatnonzero(getattr(split.table, f"has_{modality}"))
    g = np.random.default_rng(0)
    asked = g.choice(rows[:9], 40), g.choice(len(split.table.captions), 40)
    found = np.concatenate([scores.logits(modality, asked[0][part], asked[1][part])
                            for part in (slice(0, 25), slice(10, 40))])[np.r_[0:25, 40:55]]
    head, expected = heads[f"{modality}_text"], []
    with torch.no_grad():
        for row, caption in zip(*asked, strict=True):
            (batch,) = Loader(data, "test", [(0, np.array([row]))], config, inputs=[(modality,)], train=False, epoch=0)
            media = model.image(batch.images) if modality == "image" else model.audio(batch.audio, batch.audio_lengths)
            ids, mask = data.tokenizer.encode([split.table.captions[caption]], config.model.context_length)
            fused = model.fuse({modality: media, "text": model.text(ids, mask)})[0]
            expected.append(float(fused @ head["weight"][0] + head["bias"]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.std(expected) > 1e-3


def test_each_pair_is_computed_once(synthetic: tuple[Config, Data, TriModalModel],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    config, data, model = synthetic
    scores = PairScores(model, _heads(model, "image_text"), data, "test", config, CPU)
    pairs, computed = [], scores._of_pairs

    def counted(modality: str, tokens: Any, places_P: np.ndarray, captions_P: np.ndarray) -> torch.Tensor:
        pairs.append(len(places_P))
        return computed(modality, tokens, places_P, captions_P)

    monkeypatch.setattr(scores, "_of_pairs", counted)
    protocols.score(protocols.encode_split(model, data, "test", config, CPU), data, config, scores)
    assert sum(pairs) == len(scores.known["image"][0]) and scores.known.keys() == {"image"}


def test_reranked_figures_stand_beside_the_plain_ones(synthetic: tuple[Config, Data, TriModalModel]) -> None:
    config, data, model = synthetic
    plain, _ = protocols.evaluate_split(model, data, "test", config, CPU)
    heads = _heads(model, "image_text")
    heads["image_text"]["weight"].zero_()
    both, _ = protocols.evaluate_split(model, data, "test", config, CPU, heads)
    pairs = both["synthetic"]
    for pair, figures in plain["synthetic"].items():
        assert {name: pairs[pair][name] for name in figures} == figures
    assert pairs["audio-text"] == plain["synthetic"]["audio-text"], "there is no head for it"
    for name in plain["synthetic"]["image-text"]:
        again = pairs["image-text"].get(name.replace("_per_caption", "") + "_reranked" + (
            "_per_caption" if name.endswith("_per_caption") else ""))
        assert again == plain["synthetic"]["image-text"][name], "a head that says nothing leaves the similarity"


def test_a_run_keeps_its_heads_and_reranks_its_report(small: SmallRuns, tmp_path: Path) -> None:
    report = small.train(tmp_path / "run", "evaluation.rerank=5")
    assert "image_to_text_R@1_reranked" in report.with_suffix(".json").read_text("utf-8")
    folder = tmp_path / "run" / "checkpoints"
    best, final = (checkpoint.load(folder / f"{name}_model.pt") for name in ("best", "final"))
    last = checkpoint.load(folder / "checkpoint_epoch_3.pt")["stage_state"]["objectives"]
    for state in (best, final, checkpoint.load_export(folder / "model.safetensors")):
        assert state["matching_head"].keys() == {"image_text"}
        for name, value in state["matching_head"]["image_text"].items():
            assert value.shape == last[f"0_matching.head.{name}"].shape
            assert torch.equal(value, last[f"0_matching.head.{name}"]), "of the epoch of these weights"
    model, _ = load_model(folder / "best_model.pt")
    assert not any("matching" in name for name in model.state_dict())


def test_a_run_whose_last_stage_does_not_match_says_so(small: SmallRuns, tmp_path: Path) -> None:
    config = small.config(tmp_path / "run", "evaluation.rerank=5", "training.epochs=2")
    loop.train(dataclasses.replace(config, stages=config.stages[:2]), Options("cpu"))
    assert any("evaluation.rerank=5" in record["message"] for record in records(tmp_path / "run", "event"))
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "best_model.pt")
    assert state["matching_head"] == {}
    with refused("evaluation.rerank", "here.pt"):
        heads_of(state, config, "here.pt")
    assert heads_of(state, config_from_dict(state["config"], ["evaluation.rerank=0"]), "here.pt") == {}
