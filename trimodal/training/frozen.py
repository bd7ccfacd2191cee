"""Features of the towers that a run's stages leave as they are: opened before the first stage, read by those stages."""

from collections.abc import Collection
from dataclasses import replace

from trimodal.towers.features import with_features
from trimodal.towers.settings import frozen_until
from trimodal.training.run import Run


def open_features(run: Run) -> None:
    """Open the features of all towers that some stage reads so, and encode what is missing in the cache.

    Raises:
        UserError: more than `data.max_bad_pct` of a set's images or sounds cannot be read.
    """
    names = set.union(*frozen_until(run.config, run.model.towers).values())
    encoders = {name: getattr(run.model, name) for name in sorted(names)}
    run.features = {split: with_features(of, encoders, run.config).frozen for split, of in run.data.splits.items()}


def read_features(run: Run, names: Collection[str]) -> None:
    """Let batches hold the features of these modalities, as far as they have been opened."""
    run.data = replace(run.data, splits={
        split: replace(of, frozen={name: found for name, found in run.features.get(split, {}).items() if name in names})
        for split, of in run.data.splits.items()})
