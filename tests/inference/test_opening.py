"""From what a user names to the file that is opened: runs, exports, checkpoints, hubs; and one line for all else."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model import open_model
from tests.refusals import refused
from trimodal import checkpoint
from trimodal.checkpoint import TOKENIZER
from trimodal.inference.opening import WEIGHTS, checkpoint_in
from trimodal.towers.hub import CONFIG


def file(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_folder_stands_for_its_best_weights(tmp_path: Path) -> None:
    best = file(tmp_path / "run" / "checkpoints" / "best_model.pt")
    file(tmp_path / "run" / "checkpoints" / "model.safetensors")
    file(tmp_path / "run" / "demo" / "checkpoints" / "best_model.pt")
    assert checkpoint_in(tmp_path / "run") == checkpoint_in(str(best.parent)) == checkpoint_in(best) == best
    weights = file(tmp_path / "export" / "model.safetensors")
    file(tmp_path / "export" / "config.json", '{"version": "0.2.0"}')
    assert checkpoint_in(weights.parent) == weights


def test_a_folder_without_one_model_takes_one_line(tmp_path: Path) -> None:
    with refused(tmp_path / "gone"):
        open_model(tmp_path / "gone", "cpu")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "empty"):
        checkpoint_in(tmp_path / "empty")
    runs = [file(tmp_path / "runs" / name / "checkpoints" / "best_model.pt").parent.parent for name in ("a", "b")]
    with refused(tmp_path / "runs", *runs, 2):
        checkpoint_in(tmp_path / "runs")
    late = file(tmp_path / "young" / "checkpoints" / "checkpoint_epoch_12.pt")
    file(tmp_path / "young" / "checkpoints" / "checkpoint_epoch_3.pt")
    with refused(tmp_path / "young", "best_model.pt", late):
        checkpoint_in(tmp_path / "young")
    file(tmp_path / "clip" / "config.json", '{"model_type": "clip"}')
    file(tmp_path / "clip" / "model.safetensors")
    with refused(tmp_path / "clip", f"hub:{tmp_path / 'clip'}"):
        checkpoint_in(tmp_path / "clip")
    file(tmp_path / "photos" / "a.jpg")
    with refused(tmp_path / "photos", "best_model.pt", "model.safetensors"):
        checkpoint_in(tmp_path / "photos")


def test_what_cannot_be_opened_takes_one_line(tmp_path: Path) -> None:
    other = file(tmp_path / "other.pt", "not a checkpoint")
    with refused(other):
        open_model(other, "cpu")
    weights = file(tmp_path / "other" / "model.safetensors", "no weights")
    with refused(weights):
        open_model(weights.parent, "cpu")
    for source in ("", None, 3):
        with refused(repr(source), "hub:NAME"):
            open_model(source, "cpu")  # type: ignore[arg-type]
    with refused("device", "None", "auto") as told:
        open_model(other, None)  # type: ignore[arg-type]
    with refused("device", "nowhere", "cpu") as also:
        open_model(other, "nowhere")
    assert "--" not in f"{told.value}{also.value}", "flags of commands"
    with refused("nowhere"):
        open_model(other, "nowhere")
    with refused("float8", "float32", "bfloat16", "float16", "auto"):
        open_model(other, "cpu", "float8")


@pytest.mark.parametrize(("part", "content"), [
    (CONFIG, None), (CONFIG, "{"), (CONFIG, "[]"), (TOKENIZER, None), (TOKENIZER, "{")])
def test_of_an_exported_folder_the_file_that_is_missing_or_damaged_is_named(tmp_path: Path, part: str,
                                                                            content: str | None) -> None:
    weights = tmp_path / WEIGHTS
    weights.write_bytes(save({"a": torch.zeros(1)}))
    parts = {CONFIG: json.dumps({"towers": {"text": {"tokenizer": {"file": TOKENIZER}}}}), TOKENIZER: "{}"}
    for name in parts:
        file(tmp_path / name, parts[name])
    assert checkpoint.load_export(weights)["towers"]["text"]["tokenizer"] == "{}"
    (tmp_path / part).unlink()
    if content is not None:
        file(tmp_path / part, content)
    with refused(tmp_path / part):
        checkpoint.load_export(weights)


@pytest.mark.parametrize(("closed", "prefix"), [
    ("is_dir", ""), ("is_file", ""), ("iterdir", ""), ("read_text", ""), ("is_dir", "hub:"), ("read_text", "hub:")])
def test_a_folder_that_is_closed_takes_one_line(tmp_path: Path, closed: str, prefix: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if closed == "read_text":
        file(tmp_path / WEIGHTS)
    monkeypatch.setattr(Path, closed, refuse)
    with refused(tmp_path, os.strerror(errno.EACCES)) as told:
        open_model(f"{prefix}{tmp_path}", "cpu")
    assert "damaged" not in str(told.value)


def test_a_home_of_nobody_takes_one_line() -> None:
    for prefix in ("", "hub:"):
        with refused("~nobody-has-this-name/run"):
            open_model(f"{prefix}~nobody-has-this-name/run", "cpu")


@pytest.mark.parametrize("name", ["hub:", "hub:no/such/folder"])
def test_a_hub_that_holds_nothing_takes_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused(name):
        open_model(name, "cpu")
