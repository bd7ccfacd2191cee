"""Which samples share a file, and so must stand on one side of a split; what is held out; what was trained on.

    image_ids(table), audio_ids(table)                 # int64 [n]: equal exactly for equal files and stretches
    train, val = carve_val(train)
    known = file_hashes(train, data_root)              # goes into the checkpoint
    has_known_file(test, data_root, known).sum()       # test samples whose picture or sound was trained on
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from trimodal import members
from trimodal.data import generated
from trimodal.data.samples import SampleTable, Strings, normalise_caption, stable_hash

VAL_PCT = 5  # of train, where a set has no validation split
LEAST_VAL = 2  # samples of a kind: a single one can be compared with nothing
MOST_VAL_PART = 5  # at most a fifth of a kind is held out for that
HELD_OUT = {"test": 0.1, "val": 0.1}  # shares of a set that has no splits; the rest is train


# ---- samples of the same file --------------------------------------------------------------------------------------


def key_of(found: os.stat_result, path: str) -> str:
    """Equal for a file, the links to it and its hard links, which `path` led to.

    Size and date of change are part of it, since some file systems give several files one number, or none.
    """
    if not found.st_ino:
        return os.path.realpath(path)
    return f"{found.st_dev:x} {found.st_ino:x} {found.st_size:x} {found.st_mtime_ns:x}"


def file_key(path: str) -> str:
    """`key_of`, with its place in that file for a member of a shard, and of a file that is not there its path."""
    file = members.file_of(path)
    try:
        return key_of(os.stat(file), file) + path.removeprefix(file)
    except (OSError, ValueError):
        return path


def image_ids(table: SampleTable) -> np.ndarray:
    """int64 [n]: the first row that has the same image; a number of its own for a sample without one, or with one that
    is generated anew at each visit."""
    return _first_rows(table.images, None)


def audio_ids(table: SampleTable) -> np.ndarray:
    """int64 [n]: as `image_ids`, for the same stretch of the same sound: start and duration are equal, too."""
    return _first_rows(table.audio, np.stack([table.start_s, table.duration_s], 1))


def _first_rows(paths: Strings, stretches: np.ndarray | None) -> np.ndarray:
    ids = -1 - np.arange(len(paths))
    codes, different = paths.distinct()
    numbers: dict[str, int] = {}
    file_of = np.array([numbers.setdefault(file_key(path), len(numbers)) if path and not generated.is_generated(path)
                        else -1 for path in different], np.int64)[codes]
    rows = np.flatnonzero(file_of >= 0)
    keys = [file_of[rows], *(() if stretches is None else stretches[rows].T)]
    order = np.lexsort(keys)  # stable: of equal ones the first row comes first
    is_first = np.ones(len(rows), bool)
    is_first[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    ids[rows[order]] = rows[order[is_first]][np.cumsum(is_first) - 1]
    return ids


# ---- what is held out ----------------------------------------------------------------------------------------------


def carve_val(train: SampleTable) -> tuple[SampleTable, SampleTable]:
    """Split about 5 % off for validation by hashes of keys: whole groups of `group_numbers`, and of each kind of sample
    (the modalities that it has) at least two, but never more than a fifth: of fewer than ten samples none.

    The same on every machine, whatever the order; few samples change sides when some are added.
    """
    group = group_numbers(train)
    keys: dict[int, str] = {}
    for row, number in enumerate(group.tolist()):
        keys[number] = min(keys.get(number, train.keys[row]), train.keys[row])
    hashes = np.array([stable_hash(keys[number]) for number in range(len(keys))], np.int64)
    is_below = hashes < (1 << 63) // 100 * VAL_PCT
    chosen = np.zeros(len(keys), bool)
    kinds = train.has_image + 2 * train.has_audio + 4 * train.has_text
    for kind in np.unique(kinds):
        sizes = np.bincount(group[kinds == kind], minlength=len(keys))
        held, most = int(sizes[chosen].sum()), int(sizes.sum()) // MOST_VAL_PART
        taken = []
        for number in np.argsort(hashes, kind="stable").tolist():
            if held >= LEAST_VAL and not is_below[number]:
                break
            if sizes[number] and not chosen[number] and held + sizes[number] <= most:
                taken.append(number)
                held += int(sizes[number])
        chosen[taken] = held >= LEAST_VAL
    is_val = chosen[group] if len(train) else np.zeros(0, bool)
    return train.select(np.flatnonzero(~is_val)), train.select(np.flatnonzero(is_val)).with_split("val")


def draw_sides(keys: Sequence[str], kinds: Sequence[Counter[Hashable]]) -> list[str]:
    """A split for each group of samples that belong together: the groups in the order of a hash of their keys, of which
    HELD_OUT are cut off the head. `kinds`: how many samples of each kind a group has; of few samples as many are held
    out as can be compared, or none (`two_of_each_kind`).

    The same whatever the order, and few samples change sides when some are added.
    """
    order = np.argsort([stable_hash(key) for key in keys], kind="stable").tolist()
    ends = [("test", HELD_OUT["test"]), ("val", sum(HELD_OUT.values())), ("train", 1.0)]
    sides = [next(name for name, end in ends if place < round(end * len(order))) for place in range(len(order))]
    held = Counter((side, kind) for side, n in zip(sides, order, strict=True) for kind in kinds[n].elements())
    if any(held[side, kind] < LEAST_VAL for side in HELD_OUT for _, kind in list(held)):
        sides = two_of_each_kind(sides, [kinds[number] for number in order])
    found = [""] * len(order)
    for side, number in zip(sides, order, strict=True):
        found[number] = side
    return found


def draw_splits_of(table: SampleTable) -> list[str]:
    """A split for each sample of a table, by its key: see `draw_sides`. Samples of one file stay together."""
    groups, rows_of = _groups_of_files(table), dict[int, list[int]]()
    for row in range(len(table)):
        rows_of.setdefault(groups.root(row), []).append(row)
    has = list(zip(table.has_image.tolist(), table.has_audio.tolist(), table.has_text.tolist(), strict=True))
    of_kind = {there: Counter[Hashable](_pairs(there)) for there in set(has)}
    sides = draw_sides([min(table.keys[row] for row in rows) for rows in rows_of.values()],
                       [of_kind[has[rows[0]]] if len(rows) == 1 else  # a million samples share a few counters
                        sum((of_kind[has[row]] for row in rows), Counter[Hashable]()) for rows in rows_of.values()])
    found = [""] * len(table)
    for side, rows in zip(sides, rows_of.values(), strict=True):
        for row in rows:
            found[row] = side
    return found


def _pairs(has: Sequence[bool]) -> list[tuple[str, ...]]:
    """The pairs of modalities that a sample has; else its one."""
    there = [name for name, one in zip(("image", "audio", "text"), has, strict=True) if one]
    return list(itertools.combinations(there, 2)) or [tuple(there)]


def two_of_each_kind(sides: Sequence[str], kinds: Sequence[Counter[Hashable]]) -> list[str]:
    """Move groups of samples between splits until test and val have two samples of a kind or none, see `carve_val`.

    `sides` are the splits of the groups, `kinds` the number of samples of each kind in each group. Where test or val
    has fewer than two of a kind, it takes further groups of train, in their order, up to a fifth of the kind; where
    that does not suffice, its groups of such kinds, which can be compared with nothing, go to train.
    """
    chosen, total = list(sides), sum(kinds, Counter[Hashable]())
    for side in ("test", "val"):
        held = sum((kinds[n] for n, one in enumerate(chosen) if one == side), Counter[Hashable]())
        for kind in (kind for kind, number in total.items() if held[kind] < LEAST_VAL <= number // MOST_VAL_PART):
            more = []
            for n in (n for n, one in enumerate(chosen) if one == "train" and kinds[n][kind]):
                if held[kind] < LEAST_VAL and held[kind] + kinds[n][kind] <= total[kind] // MOST_VAL_PART:
                    more.append(n)
                    held += kinds[n]
            for n in more:
                chosen[n] = side
        for n in (n for n, one in enumerate(chosen) if one == side):
            if all(held[kind] < LEAST_VAL for kind in kinds[n]):
                chosen[n] = "train"
    return chosen


def group_numbers(table: SampleTable) -> np.ndarray:
    """For each sample the number of its group, from 0, int64 [n]: samples that stay on one side.

    Samples of one file stay together, whatever paths and links lead to it, whichever stretches of it they are, and be
    it a picture here and a sound there. So do samples with an equal caption, from the rarest caption to the commonest,
    as long as no group comes to hold more than 1 % of the samples or ten (of fewer than a hundred a tenth): a caption
    that many share, such as "a dog", would tie all of them together.
    """
    groups = _groups_of_files(table)
    captions: dict[str, list[int]] = {}
    for row in range(len(table)):
        for text in {normalise_caption(caption) for caption in table.captions_of(row)}:
            captions.setdefault(text, []).append(row)
    most = max(len(table) // 100, min(10, len(table) // 10))
    shared = sorted((len(rows), text) for text, rows in captions.items() if len(rows) > 1)
    for _, text in shared:
        if groups.size_of(captions[text]) <= most:
            groups.join(captions[text])
    return np.unique([groups.root(row) for row in range(len(table))], return_inverse=True)[1].astype(np.int64)


def _groups_of_files(table: SampleTable) -> "Groups":
    groups, files, key_of_path = Groups(len(table)), dict[str, list[int]](), functools.cache(file_key)
    for row in range(len(table)):
        for path in {table.images[row], table.audio[row]} - {""}:
            files.setdefault(key_of_path(path), []).append(row)
    for rows in files.values():
        groups.join(rows)
    return groups


class Groups:
    """A partition of the rows 0 to `number` - 1 into groups (union-find), at first one for each row."""

    def __init__(self, number: int):
        self.parents, self.sizes = list(range(number)), [1] * number

    def root(self, row: int) -> int:
        """The row that stands for the group of `row`: equal for two rows exactly if they are of one group."""
        while self.parents[row] != row:
            self.parents[row] = row = self.parents[self.parents[row]]
        return row

    def join(self, rows: Iterable[int]) -> None:
        """Unite the groups of all `rows` (at least one) into one."""
        first, *others = sorted({self.root(row) for row in rows})
        for other in others:
            self.parents[other] = first
            self.sizes[first] += self.sizes[other]

    def size_of(self, rows: Iterable[int]) -> int:
        """How many rows the group would have that `join(rows)` makes."""
        return sum(self.sizes[root] for root in {self.root(row) for row in rows})


# ---- what has been trained on --------------------------------------------------------------------------------------


def file_hashes(table: SampleTable, data_root: str) -> np.ndarray:
    """Different hashes of the names of all files, sorted int64: what a checkpoint remembers of its training split."""
    return np.unique(np.array([stable_hash(name) for _, _, name in _file_names(table, data_root)], np.int64))


def has_known_file(table: SampleTable, data_root: str, known: np.ndarray) -> np.ndarray:
    """bool [n]: the sample's picture or sound is among `known`, whatever its id, its captions and the stretch."""
    found = np.zeros(len(table), bool)
    names = list(_file_names(table, data_root))
    is_known = np.isin(np.array([stable_hash(name) for _, _, name in names], np.int64), known)
    for kind, paths in (("image", table.images), ("sound", table.audio)):
        codes, different = paths.distinct()
        of_path = np.zeros(len(different), bool)
        of_path[[code for (of, code, _), one in zip(names, is_known, strict=True) if one and of == kind]] = True
        found |= of_path[codes] if len(codes) else False
    return found


def _file_names(table: SampleTable, data_root: str) -> Iterator[tuple[str, int, str]]:
    """("image" or "sound", number among the different paths, name) for the names of each file: its path, links
    followed, and in a downloaded set its place below `data_root` as well, which is the same on every machine."""
    root = os.path.join(os.path.abspath(data_root), "")
    folders: dict[str, str] = {}
    owns = tuple(os.path.join(root, source, "") for source in table.sources.names)  # of the files of downloaded sets
    for kind, paths in (("image", table.images), ("sound", table.audio)):
        for code, path in enumerate(paths.distinct()[1]):
            if generated.is_generated(path):
                yield kind, code, f"{kind} {path}"
            elif path:
                file = members.file_of(path)
                absolute, member = os.path.abspath(file), path.removeprefix(file)
                yield kind, code, _without_links(absolute, folders) + member
                if absolute.startswith(owns):
                    yield kind, code, absolute.removeprefix(root) + member


def _without_links(path: str, folders: dict[str, str]) -> str:
    """`os.path.realpath` of a file, whose folder is followed once for all files in it."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
