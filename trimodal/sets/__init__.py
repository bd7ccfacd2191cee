"""Every data set that there is: `SETS`, found in the modules of this folder, and what the program asks of all of them.

    for sample in read_split("clotho", "train", config): ...

Adding a set: one module here, with a `SET` as `base` describes it.
"""

import importlib
import itertools
import logging
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample
from trimodal.errors import ConfigError, UserError, similar
from trimodal.sets.base import DataSet, Source
from trimodal.sets.reading import download_command, missing

_log = logging.getLogger(__name__)

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
SETS: dict[str, DataSet] = {found.name: found for found in sorted(
    (module.SET for module in _MODULES if hasattr(module, "SET")), key=lambda found: found.order)}
SOURCES: dict[str, Source] = {name: found.source for name, found in SETS.items() if found.source}
NEEDS_NOTHING = {name: found.note for name, found in SETS.items() if not found.source}
ALL = tuple(name for name, source in SOURCES.items() if source.in_all)  # what `--datasets all` means

__all__ = ["ALL", "NEEDS_NOTHING", "SETS", "SOURCES", "check_settings", "download_command", "listed", "read_split",
           "read_splits"]


def check_settings(config: Config) -> Config:
    """`config` again; raises ConfigError where a set is unknown, or a setting of one does not fit."""
    unknown = [_unknown(name) for name in config.data.datasets if name not in SETS]
    wordless = [_wordless(name, config) for name in config.data.datasets
                if name in SETS and SETS[name].english and not _languages(name, config)]
    found = unknown + wordless + [problem for data_set in SETS.values() if data_set.problems
                       for problem in data_set.problems(config.data)]
    if found:
        raise ConfigError("; ".join(found))
    return config


def _languages(name: str, config: Config) -> list[str]:
    """The languages wanted of a set in which it has captions."""
    there = (*(("en",) if SETS[name].english else ()), *SETS[name].also_in)
    return [language for language in config.data.languages if language in there]


def _wordless(name: str, config: Config) -> str:
    return (f"data.languages: {', '.join(config.data.languages)}, but the set {name} has captions in en alone; add en, "
            "or leave out the set")


def _unknown(name: str) -> str:
    return f"data.datasets: {name!r} is unknown. {similar(name, SETS)}"


def read_splits(name: str, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """The samples of some splits ("train", "val", "test") of the set `name`, one split after the other; lists that
    several splits need are read once. A set may have no samples of a split.

    Raises:
        UserError: unknown set or split, or missing data, with the command that gets it. Raised by the call itself.
    """
    if name not in SETS:
        raise UserError(_unknown(name))
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; known: {', '.join(SPLITS)}")
    root = Path(config.paths.data_root).absolute() / name
    found = _languages(name, config)
    if found and (lacking := [one for one in config.data.languages if one not in found]):
        _log.warning("%s: has captions in %s, and none in %s (data.languages)", name, ", ".join(found),
                     ", ".join(lacking))
    if SETS[name].source and not root.is_dir():
        raise missing(root, config)
    samples = iter(SETS[name].read(root, splits, config))
    return itertools.chain(list(itertools.islice(samples, 1)), samples)  # the first one shows whether there are any


def read_split(name: str, split: str, config: Config) -> Iterator[Sample]:
    """The samples of one split of the set `name`; raises as `read_splits` does."""
    return read_splits(name, (split,), config)


def listed(config: Config) -> dict[str, dict[str, int]]:
    """How many samples the lists name, by set and split, of those sets whose files are in part gone for ever."""
    root = Path(config.paths.data_root).absolute()
    return {name: {split: count(root / name, split, config) for split in SPLITS}
            for name in config.data.datasets if (count := SETS[name].listed)}
