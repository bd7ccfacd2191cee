"""Features of frozen towers are those of encoding each time; they are made once, and kills leave the same bytes."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets import Data, Loader, load_data
from tests import trees
from tests.refusals import assert_names, refused
from trimodal.config import Config, load_config
from trimodal.data import batches as batches_module
from trimodal.data import cache as cache_module
from trimodal.data.batches import VISIT, Batch, pool
from trimodal.towers import features as features_module
from trimodal.towers.base import PretrainedTower, describe, input_of
from trimodal.towers.features import EncodedFiles, with_features

FORK: Any = multiprocessing.get_context("fork")
NUMBER, DIM = 40, 6  # pictures and sounds: more than a tower encodes at once
INPUTS = {"image": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "fit": "crop", "crop_pct": 1.0,
                    "filter": "bicubic"},
          "text": {"tokenizer": "", "max_length": 12, "pad_to": None, "pad_id": 0, "masked": True},
          "audio": {"rate_hz": 16_000, "front_end": "", "num_bins": 80, "frames_per_s": 100.0, "window_frames": 1024,
                    "whole_windows": False}}


class Tower(PretrainedTower):
    """A row of numbers for each patch, word or frame; their mean over the real ones."""

    def __init__(self, modality: str) -> None:
        self.modality = modality  # type: ignore[misc]
        taken = input_of({"modality": modality, "input": INPUTS[modality]})
        super().__init__(describe("stand-in", modality, "stand-in", "none", taken) | {"input": INPUTS[modality]}, DIM,
                         depth=1, blocks=[])
        torch.manual_seed(0)
        width = 192 if modality == "image" else 80
        self.layer: nn.Module = nn.Embedding(200, DIM) if modality == "text" else nn.Linear(width, DIM)
        self.calls = 0

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Any:
        self.calls += 1
        if self.modality == "image":
            inputs = nn.functional.unfold(self.standardised(inputs), 8, stride=8).mT
            real_BN = torch.ones(inputs.shape[:2], dtype=torch.bool)
        elif self.modality == "audio":
            assert valid is not None
            real_BN = torch.arange(inputs.shape[1]) < valid[:, None]
        else:
            assert valid is not None
            real_BN = valid
        values_BND = self.layer(inputs if self.modality == "text" else inputs.float()) * real_BN[:, :, None]
        return values_BND, real_BN, values_BND.sum(1) / real_BN.sum(1, keepdim=True)


class Encoder(nn.Module):
    """The protocol of `PretrainedEncoder`, as far as the cache needs it; keeps the first tokens."""

    def __init__(self, modality: str, keep_tokens: int = 3) -> None:
        super().__init__()
        self.tower, self.keep_tokens = Tower(modality), keep_tokens

    def tower_tokens(self, inputs: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens_BND, valid_BN, pooled_BD = self.tower(inputs, valid)
        kept = slice(self.keep_tokens)
        ones = torch.ones(len(pooled_BD), 1, dtype=torch.bool)
        return (torch.cat([pooled_BD[:, None], tokens_BND[:, kept]], 1), torch.cat([ones, valid_BN[:, kept]], 1))


@pytest.fixture(autouse=True)
def _a_small_disk_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE_GB", 0.0)


def encoders(*names: str) -> dict[str, Encoder]:
    return {name: Encoder(name).eval() for name in names or ("image", "text", "audio")}


def configured(folder: Path, *overrides: str) -> Config:
    words = Path(trees.__file__).with_name("words.json")
    return load_config(None, ["model.size=nano", "model.image_size=32", "model.context_length=12",
                              f"model.word_embeddings=file:{words}", f"data.manifest={folder}/list.jsonl",
                              "data.datasets=[manifest]", f"paths.data_root={folder}/data", "data.workers=0",
                              "data.max_bad_pct=20", "data.audio_max_s=0.2", "data.min_crop=0.3",
                              f"paths.output_dir={folder}/outputs", *overrides])


def prepared(folder: Path, broken: Sequence[int] = ()) -> Path:
    """A list of pictures and sounds, each with two captions, some of which are said of several; the last are of val."""
    lines = []
    for i in range(NUMBER):
        picture = trees.noise(folder / f"{i}.png", (40 + i % 7, 50 - i % 9), i)
        sound = trees.sound(folder / f"{i}.wav", trees.tone(0.2 + i % 5 / 10, hz=50 * i + 99))
        if i in broken:
            picture.write_bytes(b"neither")
        split = "val" if i >= NUMBER - 4 else "train"
        lines += [{"image": str(picture), "split": split, "text": ["a red circle", "a dog " * (i % 3 + 1)]},
                  {"audio": str(sound), "split": split, "text": [f"tone {i % 4}", "a red circle"]}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def with_towers(data: Data, config: Config, towers: dict[str, Encoder], **more: bool) -> Data:
    return replace(data, splits=with_features(data.splits, towers, config, **more))


def batches(data: Data, config: Config, inputs: Sequence[str], *, train: bool = True, epoch: int = 1,
            start: int = 0) -> list[Batch]:
    split = "train" if train else "val"
    rows = np.random.default_rng(epoch).permutation(pool(data.tables[split], inputs))
    jobs = [(0, part) for part in np.array_split(np.concatenate([rows, rows + VISIT]), 5)]
    return list(Loader(data, split, jobs, config, inputs=[tuple(inputs)], train=train, epoch=epoch, start=start))


def encoded(batch: Batch, tower: Encoder, name: str) -> tuple[Tensor, Tensor]:
    """What a tower makes of a batch that holds files."""
    given = {"image": (batch.images,), "text": (batch.input_ids, batch.attention_mask),
             "audio": (batch.audio, batch.audio_lengths)}[name]
    with torch.no_grad():
        return tower.tower_tokens(*given)  # type: ignore[arg-type]


def assert_equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], most: float = 0.0) -> None:
    (tokens, valid), (others, other_valid) = one, other
    least = min(valid.shape[1], other_valid.shape[1])
    assert torch.equal(valid[:, :least], other_valid[:, :least])
    assert not valid[:, least:].any() and not other_valid[:, least:].any()
    difference = (tokens[:, :least] - others[:, :least])[valid[:, :least]].abs().max()
    assert difference <= most, f"{difference} apart"


def entries(folder: Path) -> set[Path]:
    """The entries of features."""
    return set((folder / "data" / "cache").glob("*-features*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("views", [1, 3])
def test_batches_hold_what_encoding_each_time_gives(tmp_path: Path, views: int, train: bool) -> None:
    """Without room the same views of files, and token ids, are in a batch; all else in it is the same."""
    prepared(tmp_path)
    config, towers = configured(tmp_path, f"data.views={views}"), encoders()
    live = configured(tmp_path, f"data.views={views}", "data.cache_max_gb=0")
    each_time, cached = (with_towers(load_data(one), one, towers) for one in (live, config))
    for names in (("image", "text"), ("audio", "text")):
        for one, other in zip(batches(cached, config, names, train=train),
                              batches(each_time, live, names, train=train), strict=True):
            assert set(one.tokens) == set(names) and not other.tokens
            assert one.images is None and one.audio is None and one.input_ids is None and one.attention_mask is None
            for name in names:
                assert_equal(one.tokens[name], encoded(other, towers[name], name), 1e-5)
            assert one.keys == other.keys and torch.equal(one.sample_ids, other.sample_ids)
            assert torch.equal(one.caption_owner, other.caption_owner)  # type: ignore[arg-type]
            assert torch.equal(one.caption_ids, other.caption_ids)  # type: ignore[arg-type]
            assert all(torch.equal(values, other.noise[key]) for key, values in one.noise.items())


def test_view_0_is_what_evaluation_reads(tmp_path: Path) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path, "data.views=2"), encoders()
    data = load_data(config)
    frozen = with_towers(data, config, towers)
    for names in (("image", "text"), ("audio", "text")):
        for one, other in zip(batches(frozen, config, names, train=False), batches(data, config, names, train=False),
                              strict=True):
            for name in names:
                assert_equal(one.tokens[name], encoded(other, towers[name], name), 1e-5)


def test_views_differ_and_are_chosen_by_seed_epoch_and_visit_alone(tmp_path: Path) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path, "data.views=3"), encoders("image")
    data = with_towers(load_data(config), config, towers)
    images = data.splits["train"].frozen["image"]
    rows = pool(data.tables["train"], ["image"])
    assert images is not None and images.views == 3
    views = [images.read(rows, np.full(len(rows), view))[0] for view in range(3)]
    assert all(np.abs(one - other).max() > 1e-3 for one, other in [views[:2], views[1:]])
    seen: dict[str, set[int]] = {}
    for epoch in range(1, 8):
        for batch in batches(data, config, ["image"], epoch=epoch):
            for b, row in enumerate(batch.sample_ids.tolist()):
                place = int(np.flatnonzero(rows == row)[0])
                [view] = [v for v in range(3) if np.array_equal(views[v][place], batch.tokens["image"][0][b].numpy())]
                seen.setdefault(batch.keys[b], set()).add(view)
    assert sum(map(len, seen.values())) > 2.5 * len(seen), "in 14 visits nearly every sample shows all of them"


@pytest.mark.timed
def test_batches_do_not_depend_on_processes_order_or_resume(tmp_path: Path) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path, "data.views=2"), encoders("image", "text")
    data = with_towers(load_data(config), config, towers)
    alone = batches(data, config, ["image", "text"])
    for others, first in ((batches(data, replace_workers(config, 2), ["image", "text"]), 0),
                          (batches(data, config, ["image", "text"], start=2), 2)):
        for one, other in zip(alone[first:], others, strict=True):
            assert one.keys == other.keys
            assert all(torch.equal(a, b) for name in ("image", "text")
                       for a, b in zip(one.tokens[name], other.tokens[name], strict=True))


def replace_workers(config: Config, workers: int) -> Config:
    return replace(config, data=replace(config.data, workers=workers))


def test_what_is_cached_is_neither_decoded_nor_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path), encoders()
    data = with_towers(load_data(config), config, towers)
    calls = {name: tower.tower.calls for name, tower in towers.items()}
    assert len(entries(tmp_path)) == 6 and all(calls.values())

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be read")

    for name in ("read_view", "read_image", "pad_captions"):
        monkeypatch.setattr(batches_module, name, refuse)
    monkeypatch.setattr(cache_module, "decode", refuse)
    for names in (("image", "text"), ("audio", "text")):
        batches(data, config, names)
    with_towers(load_data(config), config, towers)
    assert {name: tower.tower.calls for name, tower in towers.items()} == calls


def test_equal_captions_are_encoded_once(tmp_path: Path) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path), encoders("text")
    split = with_towers(load_data(config), config, towers).splits["train"]
    features = split.frozen["text"]
    assert features is not None
    assert len(features.entries[0][0].offsets) - 1 == len(set(split.table.captions.tolist())) < len(features.places)


@pytest.mark.parametrize("change", ["weights", "kept tokens", "preprocessing", "file", "caption"])
def test_a_change_makes_another_entry(tmp_path: Path, change: str) -> None:
    prepared(tmp_path)
    config, towers = configured(tmp_path), encoders("image", "text")
    with_towers(load_data(config), config, towers)
    before = entries(tmp_path)
    if change == "weights":
        for tower in towers.values():
            with torch.no_grad():
                next(tower.parameters()).flatten()[0] += 1e-3
    elif change == "kept tokens":
        towers = {name: Encoder(name, 2) for name in towers}
    elif change == "preprocessing":
        towers["image"].tower.input = replace(towers["image"].tower.input, mean=(0.4,) * 3)  # type: ignore[arg-type]
    elif change == "file":
        trees.noise(tmp_path / "0.png", (50, 50), 99)
    else:
        path = tmp_path / "list.jsonl"
        path.write_text(path.read_text().replace("tone 1", "tone 7"))
    with_towers(load_data(config), config, towers)
    wanted = {"weights": ("image", "text"), "kept tokens": ("image", "text"), "preprocessing": ("image",),
              "file": ("image",), "caption": ("text",)}[change]
    assert {path.name.split("-")[2] for path in entries(tmp_path) - before} == set(wanted)


def test_a_broken_file_costs_its_sample(tmp_path: Path) -> None:
    prepared(tmp_path, broken=[3])
    config, towers = configured(tmp_path), encoders("image", "text")
    data = with_towers(load_data(config), config, towers)
    lines = (tmp_path / "outputs/logs/bad_samples.jsonl").read_text().splitlines()
    assert any("3.png" in line for line in lines)
    live = configured(tmp_path, "data.cache_max_gb=0", f"data.cache_dir={tmp_path}/none")
    each_time = with_towers(load_data(live), live, towers)
    for one, other in zip(batches(data, config, ["image", "text"]), batches(each_time, live, ["image", "text"]),
                          strict=True):
        assert one.keys == other.keys, "the same sample stands in"
        assert_equal(one.tokens["image"], encoded(other, towers["image"], "image"), 1e-5)
    with refused("train-image-features", 1, 36, "data.max_bad_pct=1", "3.png"):
        with_towers(data, configured(tmp_path, "data.max_bad_pct=1"), towers)


def test_without_room_a_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    config = configured(tmp_path)
    data = load_data(config)
    capsys.readouterr()
    small = configured(tmp_path, "data.cache_max_gb=1e-7")
    frozen = with_towers(data, small, encoders("image"))
    assert frozen.splits["train"].frozen == {"image": None} and not entries(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "features" in line]
    assert_names(lines[0], "manifest-train-image-features", "data.cache_max_gb=1e-07", "each step")
    with_towers(data, config, encoders("image"))
    [line, _] = [line for line in capsys.readouterr().out.splitlines() if "features" in line]
    assert_names(line, "manifest-train-image-features", "36 files", "GB")


def kill(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_batch(number: int) -> Callable[[], None]:
    """As the batch of this number, counted from where the filling began, is encoded."""
    def arrange() -> None:
        seen, encode = [0], features_module.encode_batch

        def until(*given: Any) -> Any:
            seen[0] += 1
            return kill() if seen[0] > number else encode(*given)

        vars(features_module)["encode_batch"] = until

    return arrange


def killed(config: Config, towers: dict[str, Encoder], die: Callable[[], None]) -> None:
    """A filling in a process of its own, in which `die` has been called first to set the moment."""
    def fill() -> None:
        sys.stdout = open(os.devnull, "w")
        die()
        with_towers(load_data(config), config, towers)

    process = FORK.Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.timed
@pytest.mark.parametrize("name", ["image", "text", "audio"])
def test_a_filling_killed_again_and_again_goes_on_to_the_same_bytes(
        tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "STRETCH_S", 0.0)
    for kind in (EncodedFiles, features_module.EncodedCaptions):
        monkeypatch.setattr(kind, "together", 3)
    prepared(tmp_path, broken=[4])
    towers, whole = encoders(name), configured(tmp_path, f"data.cache_dir={tmp_path}/whole")
    load_data(config := configured(tmp_path))
    with_towers(load_data(whole), whole, towers)
    for moment in [at_batch(0), at_batch(1), lambda: setattr(cache_module, "_sync", kill), at_batch(1),
                   lambda: setattr(np, "savez", kill), lambda: setattr(os, "rename", kill)]:
        killed(config, towers, moment)
    towers[name].tower.calls = 0
    monkeypatch.setattr(cache_module, "FEW", 10**6)  # no probe
    with_towers(load_data(config), config, towers)
    made = {path.name: contents(path) for path in entries(tmp_path)}
    assert made == {path.name: contents(path) for path in (tmp_path / "whole").glob("*-features*")} and len(made) == 2
    assert towers[name].tower.calls <= 3, "of train all had been encoded by then"
