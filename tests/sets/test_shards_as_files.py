"""Shards give what the same samples give as files: the same batches, losses and weights, bit for bit, also of a run
that was killed and resumed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets import Data, Loader, epoch_batches, load_data
from tests import killing, shard_files
from tests.small_runs import SmallRuns, differing
from trimodal.config import Config
from trimodal.data.batches import Batch, pool
from trimodal.data.samples import SPLITS, SampleTable

pytestmark = pytest.mark.timed
INPUTS = [("image", "text"), ("audio", "text"), ("image", "audio")]
WRITERS = {"webdataset": shard_files.as_webdataset, "parquet": shard_files.as_parquet}


@pytest.fixture(scope="module")
def of_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_files.files(tmp_path_factory.mktemp("files"))


@pytest.fixture(params=WRITERS)
def shards(of_files: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return WRITERS[request.param](of_files, tmp_path / "shards")


def config_of(small: SmallRuns, folder: Path, of_files: Path, shards: Path, *overrides: str) -> Config:
    return small.config(folder, "data.datasets=[shards]", f"data.shards={shards}", f"data.folder={of_files}",
                        f"data.cache_dir={folder}/cache", *overrides)


def batches(data: Data, config: Config, epochs: int = 2) -> Iterator[Batch]:
    """Those of training, then those of evaluation."""
    for split, train in (("train", True), ("test", False)):
        pools = [pool(data.tables[split], inputs) for inputs in INPUTS]
        for epoch in range(1, epochs + 1):
            jobs = epoch_batches(pools, [1.0] * len(pools), 8, 0, epoch)
            yield from Loader(data, split, jobs, config, inputs=INPUTS, train=train, epoch=epoch)


def described(table: SampleTable) -> list[tuple[object, ...]]:
    return [(one.key, one.split, one.captions, one.labels, bool(one.image), bool(one.audio))
            for one in map(table.__getitem__, range(len(table)))]


@pytest.mark.parametrize("settings", [["data.cache=true"], ["data.cache=false", "data.workers=2", "data.flip=true",
                                                            "data.min_crop=0.3"]], ids=["cached", "live"])
def test_batches_are_equal_bit_for_bit(small: SmallRuns, of_files: Path, shards: Path, tmp_path: Path,
                                       settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(small, tmp_path / "own", of_files, shards, *settings)
    own = load_data(config)
    found = list(batches(own, config))
    shard_files.read_as_files(monkeypatch)
    config = config_of(small, tmp_path / "other", of_files, shards, *settings)
    other = load_data(config)
    assert other.tables["train"].images[0].startswith(str(of_files))
    for split in SPLITS:
        assert described(own.tables[split]) == described(other.tables[split])
    expected = list(batches(other, config))
    assert len(found) == len(expected) > 10
    assert differing([vars(one) for one in found], [vars(one) for one in expected]) == []


def test_training_is_equal_also_after_a_kill(small: SmallRuns, of_files: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, figures and weights of a run on shards that dies amid a stage and goes on, and of one on files."""
    shards = shard_files.as_webdataset(of_files, tmp_path / "shards")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = [*killing.RECIPE, "data.datasets=[shards]", f"data.shards={shards}", f"data.folder={of_files}"]
    process = killing.in_process(small, folder, *settings, *killing.OFTEN, f"data.cache_dir={tmp_path}/cache",
                                 dies="in align")
    process.join()
    assert process.exitcode == -signal.SIGKILL, folder.with_suffix(".out").read_text("utf-8")[-2000:]
    small.train(folder, *settings, *killing.OFTEN, f"data.cache_dir={tmp_path}/cache", resume="auto")
    shard_files.read_as_files(monkeypatch)
    small.train(whole, *settings, "training.save_every_minutes=0", f"data.cache_dir={tmp_path}/other")
    killing.assert_same(folder, whole)
