"""Features of the towers that a run's stages leave as they are: opened before memory is planned, read by those stages.
"""

from collections.abc import Collection
from dataclasses import replace

from trimodal.towers.features import with_features
from trimodal.towers.settings import frozen_until, live_towers
from trimodal.training.run import Run


def open_features(run: Run) -> None:
    """Open the features of all towers that some stage reads so, and encode what is missing in the cache. What one of
    the processes cannot keep is read by none, so that all of them have the same plans and batches.

    Raises:
        UserError: more than `data.max_bad_pct` of a set's images or sounds cannot be read.
    """
    names = set.union(*frozen_until(run.config, run.model.towers).values())
    encoders = {name: getattr(run.model, name) for name in sorted(names)}
    opened = run.world.together(lambda: {
        split: of.frozen for split, of in with_features(run.data.splits, encoders, run.config).items()})
    lacking = set.union(*run.world.gather_objects(
        {(split, name) for split, found in opened.items() for name, one in found.items() if one is None}))
    run.features = {split: {name: None if (split, name) in lacking else one for name, one in found.items()}
                    for split, found in opened.items()}
    if names := _lacking(run):
        run.tracker.say(f"Features of {', '.join(sorted(names))} are not in the cache, so each step runs these frozen "
                        "towers; memory is planned for that")


def _lacking(run: Run) -> set[str]:
    """The modalities whose features are not there for all batches that a stage reads, in training or validation."""
    return {name for split, found in run.features.items() if split != "test"
            for name, one in found.items() if one is None}


def live_by_stage(run: Run) -> dict[str, tuple[str, ...]]:
    """By stage, the frozen towers that its steps run (see `live_towers`)."""
    return live_towers(run.config, run.model.towers, _lacking(run))


def read_features(run: Run, names: Collection[str]) -> None:
    """Let batches hold the features of these modalities, as far as they have been opened."""
    run.data = replace(run.data, splits={
        split: replace(of, frozen={name: found for name, found in run.features.get(split, {}).items() if name in names})
        for split, of in run.data.splits.items()})
