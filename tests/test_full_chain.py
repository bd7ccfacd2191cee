"""From served miniature archives of all four sets to a report: download, prepare, train a step, evaluate. All commands
are those of the real sets; only the table of sources, which the test hands in, has other sizes and digests."""

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import download_datasets
import evaluate
import run_training
from tests import miniature
from tests.loopback import Loopback
from tests.small_runs import records
from trimodal.download.http import Policy
from trimodal.sets import ALL, SOURCES

SETTINGS: dict[str, Any] = {
    "data": {"datasets": list(ALL), "audio_max_s": 0.5, "workers": 0},
    "model": {"size": "nano", "image_size": 32, "context_length": 16, "vocab_size": 1,
              "word_embeddings": f"file:{Path(__file__).with_name('words.json')}"},
    "memory": {"micro_batch": 64},
    "training": {"epochs": 1, "batch_size": 64, "gradient_accumulation_steps": 1, "log_every_steps": 1},
    "evaluation": {"resamples": 20, "max_validation": 16}, "report": {"language": "en", "gallery_queries": 0},
    "stages": [{"name": "align", "share": 1, "tasks": [
        {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}},
        {"inputs": ["audio", "text"], "objectives": {"contrastive": 1.0}},
        {"inputs": ["audio"], "objectives": {"speaker": 1.0}}]}],
}


def download(folder: Path, server: Loopback) -> int:
    """`--datasets all`, each set from this server, with faults on the way."""
    table, words = dict(SOURCES), ["--datasets", "all", "--data-root", str(folder / "data")]
    for name in ALL:
        shards = {"shards": True} if name == "audiocaps" else {}
        table[name], served = getattr(miniature, name)(folder / "true", **shards)
        server.files |= {f"/{name}/{file}": data for file, data in served.items()}
        words += ["--base-url", f"{name}={server.url(f'/{name}')}"]
    server.faults = {"/coco/train2017.zip": ["cut:70000", "503"], "/clotho/clotho_audio_development.7z": ["retry:1"],
                     "/voxceleb/vox1_dev_wav_partab": ["cut:10"]}
    return download_datasets.main(words, table=table, policy=Policy(sleep=lambda seconds: None))


def report_of(folder: Path, kind: str) -> tuple[dict[str, Any], str]:
    found = [(json.loads(path.read_text("utf-8")), path.with_suffix(".md").read_text("utf-8"))
             for path in (folder / "reports").glob("report_*.json")]
    return next(pair for pair in found if pair[0]["kind"] == kind)


def test_downloaded_prepared_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VOXCELEB_KEY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with Loopback() as server:
        assert download(tmp_path, server) == 3, "all there, but for clips of AudioCaps that are gone"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS), "utf-8")
    common = ["--config", str(tmp_path / "config.yaml"), "--data-root", str(tmp_path / "data"), "--device", "cpu",
              "training.use_amp=false"]
    assert run_training.main([*common, "--output-dir", str(tmp_path / "out"), "--epochs", "1"]) == 0
    assert evaluate.main(["--checkpoint", str(tmp_path / "out/checkpoints/best_model.pt"), "--data-root",
                          str(tmp_path / "data"), "--output-dir", str(tmp_path / "again")]) == 0
    steps = records(tmp_path / "out", "step")
    assert {part for step in steps for part in step["parts"]} >= {"contrastive_image_text", "contrastive_audio_text",
                                                                  "speaker"}
    assert list((tmp_path / "data/cache").iterdir()), "prepared"
    trained, _ = report_of(tmp_path / "out", "training")
    evaluated, text = report_of(tmp_path / "again", "evaluation")
    assert set(trained["data"]["counts"]) == set(ALL)
    assert {"coco", "clotho", "audiocaps"} <= set(evaluated["evaluation"]["figures"])
    assert_available(trained["data"]["available"], evaluated["data"]["available"], text)


def assert_available(trained: dict[str, Any], evaluated: dict[str, Any], text: str) -> None:
    """Count, and digest of the list, of the set that is there in part: in every report, and the same."""
    keys = ["kL1m2N3o4p5_50", "mN3o4P5q6r7_52"]
    digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
    assert trained.keys() == evaluated.keys() == {"audiocaps"}
    assert trained["audiocaps"]["train"]["of"] == 8 > trained["audiocaps"]["train"]["samples"] > 0
    for available in (trained, evaluated):
        assert available["audiocaps"]["test"] == {"samples": 2, "of": 3, "sha256": digest}
    assert "2 / 3" in text and digest in text
