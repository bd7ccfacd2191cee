"""Validation of a run: said where there is none, and done once an epoch."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import Data
from tests import trees
from tests.small_runs import SmallRuns, differing, records
from trimodal import checkpoint
from trimodal.config import TaskConfig
from trimodal.evaluation import protocols
from trimodal.training import loop, validation
from trimodal.training.run import Options


def one_to_validate_on(folder: Path) -> list[str]:
    """Overrides for twelve captioned pictures, and a single one for validation."""
    paths = [trees.picture(folder / f"{i}.png", (20 * i, 90, 99), size=(32, 32)) for i in range(13)]
    lines = [json.dumps({"id": path.stem, "image": path.name, "text": f"picture {path.stem}",
                         "split": "val" if path.stem == "12" else "train"}) for path in paths]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return ["data.datasets=[manifest]", f"data.manifest={folder}/manifest.jsonl", f"paths.data_root={folder}/data"]


def test_without_validation_the_run_says_so_once_and_no_epoch_is_the_best(
        small: SmallRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.joinpath("set").mkdir()
    folder, task = tmp_path / "run", TaskConfig(inputs=("image", "text"), objectives={"contrastive": 1.0})
    config = small.config(folder, *one_to_validate_on(tmp_path / "set"), "training.epochs=4", "report.language=en",
                          "training.batch_size=6")
    rows = tuple(dataclasses.replace(row, tasks=(task,)) for row in config.stages if row.name != "pretrain")
    report = loop.train(dataclasses.replace(config, stages=rows), Options("cpu"))
    assert report is not None
    told = capsys.readouterr().out
    assert not re.search(r"\bnan\b", told) and " *" not in told
    assert told.count(validation.NO_VAL) == told.count(validation.ADD_VAL) == 1
    assert len([line for line in told.splitlines() if "] epoch " in line]) == 4 and "validation " not in told.replace(
        validation.NO_VAL, "")
    assert [record["loss"] for record in records(folder, "validation")] == [None] * 4
    assert [record["message"].count(validation.NO_VAL) for record in records(folder, "event")].count(1) == 1
    best = checkpoint.load(folder / "checkpoints/best_model.pt")
    assert (best["stage"], best["epoch"], best["loss"]) == ("finetune", 4, None)
    newest = checkpoint.load(folder / "checkpoints/checkpoint_epoch_4.pt")
    assert differing(best["model_state_dict"], newest["model_state_dict"]) == []
    page = report.read_text("utf-8")
    assert "no validation: the newest weights, stage finetune, epoch 4" in page
    assert not re.search(r"\bnan\b", page, re.I)
    assert json.loads(report.with_suffix(".json").read_text("utf-8"))["best"] == {
        "stage": "finetune", "epoch": 4, "loss": None}
    board = EventAccumulator(str(folder / "logs/tensorboard")).Reload()
    assert not [tag for tag in board.Tags()["scalars"] if tag.startswith("validation/")]


def test_the_validation_split_is_encoded_once_an_epoch(small: SmallRuns, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], protocols.encode_split

    def counted(model: Any, data: Data, split: str, *rest: Any) -> protocols.Encoded:
        encoded.append(split)
        return encode(model, data, split, *rest)

    monkeypatch.setattr(protocols, "encode_split", counted)
    small.train(tmp_path)
    contrasting = [record for record in records(tmp_path, "validation") if record["metrics"]]
    assert encoded == ["val"] * len(contrasting) + ["test"] and len(contrasting) == 2
    board = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
    assert len(board.Images("examples/image")) == 2, "both are saved, so both are shown"


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_no_sample_is_encoded_twice_in_a_validation(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    stage: str) -> None:
    """Samples of several tasks either, save for tokens that the fusion reads; loss and figures are as without that."""
    run = small.open(tmp_path, "data.audio_max_s=10")
    built = small.stage(run, stage)
    run.model.eval()
    table, encoded = run.data.tables["val"], dict.fromkeys(("image", "text", "audio"), 0)
    for name in encoded:
        def count(module: Any, inputs: Any, name: str = name) -> None:
            encoded[name] += len(inputs[0])

        getattr(run.model, name).register_forward_pre_hook(count)
    known: protocols.Known = {}
    loss, parts = validation.validation_loss(run, built, known)
    in_losses, whole = dict(encoded), {"image": int(table.has_image.sum()), "audio": int(table.has_audio.sum()),
                                       "text": int(table.caption_count.sum())}
    together = validation.encode_validation(run, known)
    for name, number in whole.items():
        assert encoded[name] - in_losses[name] == number - sum(map(len, known.get(name, {}).values())) < number or (
            name == "audio" and stage == "finetune"), "no task of that stage contrasts sounds"
    assert stage == "finetune" or encoded == whole
    alone = validation.encode_validation(run)
    assert together is not None and alone is not None and together.facts == alone.facts
    for name, items in alone.items.items():
        assert (together.items[name].rows_N == items.rows_N).all() and (together.items[name].ids_N == items.ids_N).all()
        assert torch.allclose(together.items[name].features_NF, items.features_NF, atol=1e-6)
    assert (together.captions_C == alone.captions_C).all()
    assert validation.retrieval_figures(run, together) == validation.retrieval_figures(run, alone)
    monkeypatch.setattr(validation, "known_features", lambda *_: {})
    again, same_parts = validation.validation_loss(run, built)
    assert loss == pytest.approx(again, rel=1e-6) and parts == pytest.approx(same_parts, rel=1e-6)


def test_a_sound_that_losses_see_a_part_of_is_encoded_whole_for_retrieval(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, "data.audio_max_s=0.3")
    known: protocols.Known = {}
    validation.validation_loss(run, small.stage(run, "align"), known)
    assert known["image"] and known["text"]
    assert len(known.get("audio", {})) < int(run.data.tables["val"].has_audio.sum())
    together, alone = (validation.encode_validation(run, one) for one in (known, None))
    assert together is not None and alone is not None
    for name, items in alone.items.items():
        assert torch.allclose(together.items[name].features_NF, items.features_NF, atol=1e-6)
