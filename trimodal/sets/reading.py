"""What the readers of several sets need: folders, rows of lists, captions, splits of our own, and missing files."""

import csv
import dataclasses
import itertools
import logging
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample, SampleTable, normalise_caption
from trimodal.data.splits import draw_splits_of
from trimodal.errors import UserError, counted
from trimodal.sets import inventory

SPLIT_SEED = 2017  # of the splits that we draw ourselves; never the training seed, so that everybody has the same
MAX_CAPTION_CHARS = 10_000  # the text encoder reads 64 words; of longer ones this would be all but lost

_log = logging.getLogger(__name__)


# ---- folders and lists -------------------------------------------------------------------------------------------


def names_in(folder: Path) -> frozenset[str]:
    """Names of the files and folders in `folder`; none where it is no folder or cannot be read."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def folders_in(folder: Path, unread: list[str] | None = None) -> list[Path]:
    """The folders in a folder; where it cannot be read, none, and a sentence in `unread`, or an error without that."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not inventory.is_hidden(entry.name) and entry.is_dir())
    except OSError as error:
        sentence = f"{folder}: cannot be read ({error.strerror})"
        if unread is None:
            raise UserError(sentence) from None
        unread.append(sentence)
        return []
    return [folder / name for name in names]


def rows(path: Path, columns: Sequence[str], *, encoding: str = "utf-8-sig",
         delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Rows of a CSV file as dicts. Blanks around the names of columns are dropped, never those around values.

    Raises:
        UserError: a column is missing, or the file is damaged.
    """
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = [column.strip() for column in next(reader, [])]
            if absent := [column for column in columns if column not in header]:
                raise UserError(f"{path}: no column {absent[0]!r} in its first line, {','.join(header)[:80]!r}")
            for cells in reader:
                if len(cells) >= len(header):
                    yield dict(zip(header, cells, strict=False))
                elif cells:
                    raise UserError(f"{path}, line {reader.line_num}: {counted(len(cells), 'cell')}, but "
                                    f"{counted(len(header), 'column')}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num}: damaged ({error}); rename it and download the set again"
                            ) from None


def worded_captions(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """`texts` without outer blanks and without those that hold no word; equal ones stay, since papers count them.

    Raises:
        UserError: one of absurd length; begins with `where`.
    """
    found = []
    for text in texts:
        if len(text) > MAX_CAPTION_CHARS:
            raise UserError(f"{where}: a text of {len(text):,} characters, over {MAX_CAPTION_CHARS:,}; shorten it")
        if normalise_caption(text):
            found.append(text.strip())
    return tuple(found)


def in_languages(sample: Sample, wanted: Collection[str]) -> Sample:
    """The sample with its captions in the languages wanted, and those whose language is not known."""
    if not sample.languages:
        return sample
    return _with_captions(sample, [(text, language) for text, language in
                                   zip(sample.captions, sample.languages, strict=True)
                                   if not language or language in wanted])


def on_one_side(samples: Iterable[Sample]) -> list[Sample]:
    """The samples, and a caption that stands in several splits in one of them alone: test, before val, before train.

    For sets whose split is drawn by their English captions: two of these may have one translation.
    """
    samples, strict = list(samples), SPLITS[::-1]
    side = dict[str, str]()
    for sample in samples:
        for text in map(normalise_caption, sample.captions):
            side[text] = min(side.get(text, sample.split), sample.split, key=strict.index)
    return [_with_captions(sample, [pair for pair in zip(sample.captions, sample.languages, strict=True)
                                    if side[normalise_caption(pair[0])] == sample.split]) for sample in samples]


def _with_captions(sample: Sample, captions: Sequence[tuple[str, str]]) -> Sample:
    return dataclasses.replace(sample, captions=tuple(text for text, _ in captions),
                               languages=tuple(language for _, language in captions))


# ---- splits ------------------------------------------------------------------------------------------------------


def draw_splits(units: Iterable[str], test: int, val: int) -> dict[str, str]:
    """Assign each of the distinct `units` to a split at random: `test` and `val` of them to these, the rest to train.

    A shuffle of the sorted units by NumPy's `RandomState`, whose stream is frozen: the same on every machine, for ever.
    """
    ordered = sorted(set(units))
    shuffled = [ordered[i] for i in np.random.RandomState(SPLIT_SEED).permutation(len(ordered))]
    sides = ["test"] * test + ["val"] * val
    return dict(itertools.zip_longest(shuffled, sides[: len(shuffled)], fillvalue="train"))


def draw_fold(units: Iterable[str], fold: int, folds: int, val: float) -> dict[str, str]:
    """Assign each of the distinct `units` to a split so that of all `folds` each unit is test in one: test is part
    number `fold` of a shuffle of them, val the share `val` that follows, the rest train. Part 0 begins where
    `draw_splits` does."""
    order = list(draw_splits(units, 0, 0))
    first, last = (round(len(order) * number / folds) for number in (fold, fold + 1))
    sides = ["test"] * (last - first) + ["val"] * round(val * len(order))
    return dict(itertools.zip_longest(order[first:] + order[:first], sides[:len(order)], fillvalue="train"))


def by_split(table: SampleTable, splits: Sequence[str]) -> Iterator[Sample]:
    """The samples of some splits of a table, one split after the other; where no sample has a split, they are drawn."""
    names = draw_splits_of(table) if table.splits.names == ("",) else np.array(table.splits.names)[table.splits.codes]
    sides = np.array(names)
    for split in splits:
        for row in np.flatnonzero(sides == split).tolist():
            yield dataclasses.replace(table[row], split=split)


# ---- what is not there -------------------------------------------------------------------------------------------


def download_command(name: str, config: Config) -> str:
    return f"python download_datasets.py --datasets {name} --data-root {shlex.quote(config.paths.data_root)}"


def missing(path: Path, config: Config) -> UserError:
    """The error for a file or folder of a set that is not there."""
    name = path.relative_to(Path(config.paths.data_root).absolute()).parts[0]
    return UserError(f"{path}: not there; get it with: {download_command(name, config)}")


def existing(path: Path, config: Config) -> Path:
    """`path`; raises `missing` where there is no such file."""
    if not path.is_file():
        raise missing(path, config)
    return path


def is_partial(root: Path) -> bool:
    """Whether the user fetched a part of the set on purpose: any number of its files may be absent then."""
    return bool(inventory.read_marker(root).get("limited"))


def report_absent(root: Path, split: str, found: int, absent: Sequence[str], config: Config, *,
                  never_whole: bool = False) -> None:
    """Log how many files of a list are not there, and the first.

    Raises:
        UserError: all are absent, or more than `data.max_bad_pct` allows, unless the set is `never_whole` or partial.
    """
    if not absent:
        return
    name, total = root.name, found + len(absent)
    limit_pct = 100.0 if never_whole else config.data.max_bad_pct
    count = (f"{name} {split}: {len(absent):,} of the {counted(total, 'file')} in its list not there (the first: "
             f"{', '.join(absent[:3])})")
    if not is_partial(root) and (not found or 100 * len(absent) > limit_pct * total):
        raise UserError(f"{count}; get them with: {download_command(name, config)}"
                        + (f" (or raise data.max_bad_pct, {limit_pct:g})" if found else ""))
    _log.warning("%s and are left out", count)
