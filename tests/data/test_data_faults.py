"""Faults of real files, folders and processes while batches are read: what is lost, what is said, what stays equal."""

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import run_training
from datasets import Data, Loader, epoch_batches, load_data
from tests import trees
from tests.data.test_workers import ours
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import RECIPE
from tests.test_datasets import assert_equal, configured
from trimodal.config import Config
from trimodal.data import cache
from trimodal.data.batches import Batch
from trimodal.data.store import open_store

pytestmark = pytest.mark.timed
LIVE = "data.cache=false"  # files are decoded when they are read
SOON = "data.timeout_s=2"


@pytest.fixture(autouse=True)
def _a_small_disk_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RESERVE_GB", 0.0)


def pictures(folder: Path, number: int = 30) -> Path:
    """A list of pictures below `folder`/disk; the folder."""
    lines = [json.dumps({"id": "v", "text": "a text alone", "split": "val"})]
    for i in range(number):
        path = trees.noise(folder / "disk" / f"{i}.png", (48, 40), seed=i)
        lines.append(json.dumps({"id": str(i), "image": str(path), "text": f"picture {i}", "split": "train"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "disk"


def opened(folder: Path, *overrides: str) -> tuple[Data, Config]:
    config = configured(folder, "data.max_bad_pct=20", *overrides)
    return load_data(config), config


def load(data: Data, config: Config, passes: float = 1.0, **more: Any) -> Loader:
    """Batches of five pictures."""
    jobs = epoch_batches([np.arange(len(data.tables["train"]))], [passes], 5, seed=0, epoch=1)
    return Loader(data, "train", jobs, config, inputs=[("image", "text")], train=True, epoch=1, **more)


def broken(folder: Path) -> dict[str, str]:
    """Key and reason of each line of bad_samples.jsonl."""
    path = folder / "outputs/logs/bad_samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({line["key"] for line in lines}) == len(lines), "each once"
    return {line["key"]: line["reason"] for line in lines}


LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
files = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
for file in files:
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def hanging(*paths: Path) -> Iterator[None]:
    """Whoever opens one of `paths` waits: another process holds the system's leases on them, and gives none up."""
    if not sys.platform.startswith("linux"):
        pytest.skip("leases of files are Linux's")
    holder = subprocess.Popen([sys.executable, "-c", LEASE, *map(str, paths)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stderr is not None
    try:
        if holder.stdout.readline() != "held\n":
            pytest.skip(f"this file system has no leases: {holder.stderr.read().splitlines()[-1:]}")
        yield
    finally:
        holder.kill()
        holder.communicate()


# ---- processes that die --------------------------------------------------------------------------------------------


def test_batches_are_bit_identical_though_reading_processes_are_killed(tmp_path: Path) -> None:
    pictures(tmp_path)
    data, config = opened(tmp_path, LIVE)
    said: list[str] = []
    found: list[Batch] = []
    for batch in load(data, config, passes=4, workers=2, say=said.append):
        found.append(batch)
        if len(found) in (2, 9):
            os.kill(ours()[len(said) % 2], signal.SIGKILL)
    assert_equal(found, list(load(data, config, passes=4, workers=0)))
    assert len(said) == 2
    for line in said:
        assert_names(line, "data", "SIGKILL")
    assert broken(tmp_path) == {} and ours() == []


@pytest.fixture
def no_dumps() -> Iterator[None]:
    """Processes that are to crash inherit that pytest prints where."""
    faulthandler.disable()
    yield
    assert sys.__stderr__ is not None
    faulthandler.enable(sys.__stderr__)


@pytest.mark.usefixtures("no_dumps")
def test_a_cache_that_shrinks_under_its_readers_is_an_error_of_one_line(tmp_path: Path) -> None:
    pictures(tmp_path)
    data, config = opened(tmp_path)
    [content] = (tmp_path / "data/cache").glob("*/data.bin")
    said: list[str] = []
    reads = iter(load(data, config, workers=1, passes=3, say=said.append))
    next(reads)
    os.truncate(content, 4096)  # whoever has it open and reads on is killed by SIGBUS
    with refused(content.parent, "--resume auto"):
        list(reads)
    [line] = said
    assert_names(line, "data", "SIGBUS")


# ---- samples that hang ---------------------------------------------------------------------------------------------


def test_a_picture_that_hangs_costs_that_picture_only_and_one_wait(tmp_path: Path) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE, SOON)
    said: list[str] = []
    with hanging(disk / "7.png"):
        found = list(load(data, config, passes=2, workers=2, say=said.append))
        again = list(load(data, config, passes=2, workers=2, say=said.append))  # as the next epoch, or a resumed run
    assert 1 <= len(said) <= 2, "both visits, if read side by side"
    assert broken(tmp_path).keys() == {"manifest/7"}
    for line in (*said, broken(tmp_path)["manifest/7"]):
        assert_names(line, disk / "7.png", SOON)
    assert_equal(found, again)
    trees.truncate(disk / "7.png")  # a broken file in its place gives the same batches, down to the stand-ins
    (tmp_path / "outputs/logs/bad_samples.jsonl").unlink()
    assert_equal(found, list(load(data, config, passes=2, workers=0)))
    assert ours() == []


def test_a_line_deleted_gives_its_sample_another_try(tmp_path: Path) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE, SOON)
    clean = list(load(data, config, workers=0))
    with hanging(disk / "7.png"):
        list(load(data, config, workers=1))
    assert "manifest/7" not in {key for batch in load(data, config, workers=1) for key in batch.keys}
    path = tmp_path / "outputs/logs/bad_samples.jsonl"
    path.write_text('{}\nnull\n{"key": 1, "split": "train", "reason": []}\n' + "[" * 9999 + '\n{"key": "cut off')
    assert_equal(list(load(data, config, workers=1)), clean)


def test_a_disk_that_hangs_ends_the_run_soon(tmp_path: Path) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE, SOON)
    with hanging(*disk.iterdir()), refused("data", 3, SOON, "--resume auto") as caught:
        list(load(data, config, workers=1))
    assert f"{disk}/" in str(caught.value)
    assert broken(tmp_path) == {}, "none of them is to blame"
    assert len(list(load(data, config, workers=1))) == 6


def test_a_picture_that_hangs_while_the_cache_is_filled_is_left_out(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    disk = pictures(tmp_path)
    with hanging(disk / "7.png"):
        data, config = opened(tmp_path, SOON, "data.workers=2")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert broken(tmp_path).keys() == {"manifest/7"}
    for words in (line, broken(tmp_path)["manifest/7"]):
        assert_names(words, disk / "7.png", SOON)
    seen = {key for batch in load(data, config, workers=0) for key in batch.keys}
    assert seen == {f"manifest/{i}" for i in range(30)} - {"manifest/7"}


# ---- files and folders that go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_deleted_meanwhile_are_named_and_replaced(tmp_path: Path, workers: int) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE)
    found: list[Batch] = []
    for batch in load(data, config, passes=3, workers=workers):
        if not found:
            for i in (3, 11):
                (disk / f"{i}.png").unlink()
        found.append(batch)
    assert [len(batch.keys) for batch in found] == [5] * 18
    assert not {"manifest/3", "manifest/11"} & {key for batch in found[-6:] for key in batch.keys}
    assert broken(tmp_path).keys() == {"manifest/3", "manifest/11"}
    for key, reason in broken(tmp_path).items():
        assert_names(reason, disk / f"{key.removeprefix('manifest/')}.png")


def test_too_many_pictures_deleted_meanwhile_end_the_run(tmp_path: Path) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE)
    reads = iter(load(data, config, passes=3, workers=2))
    next(reads)
    for i in range(7):
        (disk / f"{i}.png").unlink()
    with refused("data", 7, 30, "data.max_bad_pct=20"):
        list(reads)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_cache_originals_may_go(tmp_path: Path, workers: int) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path)
    expected = list(load(data, config, workers=0))
    shutil.rmtree(disk)
    assert_equal(list(load(data, config, workers=workers)), expected)
    assert broken(tmp_path) == {}


def test_a_cache_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    pictures(tmp_path)
    opened(tmp_path)
    data, config = opened(tmp_path)
    [entry] = (tmp_path / "data/cache").glob("manifest-train-image-*")
    shutil.rmtree(tmp_path / "data/cache")
    with refused(entry, "No such file or directory", "--resume auto"):
        list(load(data, config, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["deleted", "detached"])
def test_a_folder_that_is_gone_is_one_error_at_once(tmp_path: Path, workers: int, how: str) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE)
    reads = iter(load(data, config, passes=9, workers=workers))
    next(reads)
    disk.rename(tmp_path / "elsewhere")
    if how == "detached":
        disk.mkdir()  # the place where it was mounted
    with refused("data", disk, "--resume auto") as caught:
        list(reads)
    assert f"{disk}/" not in str(caught.value), "no picture"
    assert broken(tmp_path) == {}
    shutil.rmtree(disk, ignore_errors=True)
    (tmp_path / "elsewhere").rename(disk)
    assert len(list(load(data, config, workers=workers))) == 6


def test_a_folder_that_is_gone_leaves_no_cache_of_broken_files(tmp_path: Path) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE)
    disk.rename(tmp_path / "elsewhere")
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=True))
    with refused("data", disk, "--resume auto") as caught:
        open_store(data.tables["train"], cached)
    assert f"{disk}/" not in str(caught.value), "no picture"
    assert list((tmp_path / "data/cache").glob("manifest*")) == [] and broken(tmp_path) == {}


def test_a_folder_that_goes_while_the_cache_is_filled_costs_nothing_of_what_is_done(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    disk = pictures(tmp_path)
    data, config = opened(tmp_path, LIVE, "data.workers=0")
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=True))
    monkeypatch.setattr(cache, "STRETCH_S", 0.0)  # each file is written down
    decode, decoded = cache.decode, list[str]()

    def detach(kind: Any, item: cache.Item, side: int) -> np.ndarray:
        decoded.append(item[0])
        if len(decoded) == 20:
            disk.rename(tmp_path / "elsewhere")
        return decode(kind, item, side)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", detach)
        for _ in range(2):  # the second finds no file at all: then names, sizes and dates are not those of the first
            with refused("data", disk, "--resume auto"):
                open_store(data.tables["train"], cached)
    [left] = (tmp_path / "data/cache").glob("manifest*")
    assert left.name.endswith(cache.SUFFIX) and '"reasons": {"' not in (left / "journal.jsonl").read_text()
    (tmp_path / "elsewhere").rename(disk)
    capsys.readouterr()
    store = open_store(data.tables["train"], cached)
    assert_names(capsys.readouterr().out.splitlines()[0], "going on from 16 of 30")
    live = open_store(data.tables["train"], config)
    assert all(np.array_equal(store.image(row), live.image(row)) for row in range(30)) and broken(tmp_path) == {}


# ---- the command ---------------------------------------------------------------------------------------------------

def test_a_run_whose_disk_is_detached_ends_with_code_2_and_goes_on_with_resume(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    disk, replace = pictures(tmp_path), os.replace
    stage = {"name": "own", "share": 1, "tasks": [{"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}}]}
    recipe = {**RECIPE, "data": {"datasets": ["manifest"], "cache": False, "workers": 1}, "stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    command = ["--config", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "outputs"), "--device", "cpu",
               f"data.manifest={tmp_path / 'manifest.jsonl'}", "--data-root", str(tmp_path / "data")]

    def detach(source: Any, target: Any) -> None:
        """As the first epoch's checkpoint appears."""
        replace(source, target)
        if Path(target).name == "checkpoint_epoch_1.pt":
            disk.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", detach)
        assert run_training.main(command) == 2
    told = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert_told(told, "data", disk, "--resume auto")
    assert f"{disk}/" not in told, "no picture"
    (tmp_path / "elsewhere").rename(disk)
    assert run_training.main([*command, "--resume", "auto"]) == 0
    assert broken(tmp_path) == {} and ours() == []
