"""Stages read features where towers are as a run began with them, and learn what they learn by encoding each time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_runs import SmallRuns, batches, records
from tests.training.test_pretrained import TINY, tiny
from trimodal.towers.settings import decoded_kinds, frozen_until
from trimodal.training.frozen import open_features, read_features

__all__ = ["tiny"]  # the fixture


def test_stages_read_features_of_towers_that_none_has_trained(small: SmallRuns, tiny: Iterator[None],
                                                              tmp_path: Path) -> None:
    run = small.open(tmp_path / "run", *TINY)
    open_features(run)
    held, until = {}, frozen_until(run.config, run.model.towers)
    for row in run.config.stages:
        read_features(run, until[row.name])
        held[row.name] = set(batches(run, small.stage(run, row.name))[0].tokens)
    assert held == until == {"pretrain": {"image", "text"}, "align": {"text"}, "finetune": {"text"}}
    assert decoded_kinds(run.config, run.model.towers) == ("image", "sound")
    frozen = small.config(tmp_path / "other", *TINY, r"stages.align.trainable=['(?!image\.tower|text\.tower).*']")
    assert decoded_kinds(frozen, run.model.towers) == ("sound",), "pictures are decoded for their features alone"


def test_a_run_without_room_for_features_learns_the_same(small: SmallRuns, tiny: Iterator[None],
                                                         tmp_path: Path) -> None:
    losses = []
    for name, gb in (("with", 1), ("without", 0)):
        small.train(tmp_path / name, *TINY, f"data.cache_max_gb={gb}", f"data.cache_dir={tmp_path}/cache_{name}",
                    "training.epochs=3", "stages.align.feature_dropout=0")
        losses.append([line["loss"] for line in records(tmp_path / name, "step")])
    assert any((tmp_path / "cache_with").glob("*features*"))
    assert not any((tmp_path / "cache_without").glob("*features*"))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
