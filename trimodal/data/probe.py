"""Decode a sample of a data set's files before a run does: which are broken, and what is odd about the others.

Odd are sounds far above full scale, sounds whose channels cancel each other, and images with damaged metadata.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from trimodal import members
from trimodal.config import Config
from trimodal.data import cache, images, tracks
from trimodal.data.batches import Split
from trimodal.data.codecs import KINDS, Kind
from trimodal.data.store import Store, items_of
from trimodal.errors import counted

FILES = 64  # images, and sounds, of each split that are decoded
LOUD = 2.0  # full scale is 1; overshoots of a codec or a mix stay below twice that
NAMED, REASONS = 3, 8  # files named for each reason, reasons named


class Oddity(NamedTuple):
    peak: float = 0.0  # of a sound that is stored as floating-point numbers and is above `LOUD`; else 0
    cancels: bool = False  # the channels of a sound cancel each other: the loudest is taken
    flawed: bool = False  # the metadata of an image are damaged: it is read without them


@dataclass
class Probe:
    """The result of decoding some files of one data set: which are broken, and which are odd."""

    counts: list[str] = field(default_factory=list)  # "64 of 785 train images read, 2 broken"
    broken: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    odd: list[tuple[str, Oddity]] = field(default_factory=list)
    worst_pct: float = 0.0  # highest percentage of broken files of a split and kind

    def lines(self, limit_pct: float) -> list[str]:
        """Lines to print: the files that were read, what is odd about them, and the broken ones by reason."""
        found = [*self.counts, *(line for line, _ in describe(self.odd))]
        if self.broken:
            found += [f"a run allows {limit_pct:g} % of each to be broken; these are:", *by_reason(self.broken)]
        return found

    def advice(self) -> list[str]:
        """One remedy for each kind of odd file that was found."""
        return [remedy for _, remedy in describe(self.odd)]


def probe(splits: Mapping[str, Split], name: str, config: Config, show: Callable[[str], Any]) -> Probe:
    """Decode up to `FILES` images and as many sounds of each split of the set `name`, in worker processes."""
    found = Probe()
    for split, one in splits.items():
        for kind in KINDS:
            items, total = _some_files(one.store, name, kind)
            if not items:
                continue
            show(counted(len(items), f"{split} {kind}"))
            side = cache.cache_side(config.model.image_side)
            results = list(cache.read_all(partial(_examine, kind, side), items, config))
            names = [members.shown(path) for path, *_ in items]
            bad = [(name, reason.removeprefix(f"{name}: ")) for name, reason in zip(names, results, strict=True)
                   if isinstance(reason, str)]
            found.broken += bad
            found.odd += [(name, oddity) for name, oddity in zip(names, results, strict=True)
                          if isinstance(oddity, Oddity)]
            found.worst_pct = max(found.worst_pct, 100 * len(bad) / len(items))
            found.counts.append(f"{len(items):,} of {counted(total, f'{split} {kind}')} read"
                                + (f", {len(bad)} broken" if bad else ""))
    return found


def _some_files(store: Store, name: str, kind: Kind) -> tuple[list[cache.Item], int]:
    """Files of a set, the same each time, and how many there are in all."""
    table = store.table
    items = list(items_of(table, kind, table.sources.names.index(name)).values()) if name in table.sources.names else []
    chosen = np.random.default_rng(0).permutation(len(items))[:FILES].tolist()
    return [items[i] for i in chosen], len(items)


def _examine(kind: Kind, side: int, item: cache.Item) -> Oddity:
    """Decode a file as for the cache; say what is odd about it.

    Raises:
        BrokenSample: it cannot be decoded.
    """
    cache.decode(kind, item, side)
    if kind == "image":
        return Oddity(flawed=images.has_flawed_metadata(item[0]))
    peak, cancels = tracks.oddities(*item)
    return Oddity(peak if peak > LOUD else 0.0, cancels)


def by_reason(broken: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each reason, the commonest first: how many files, why, and the first of them."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, reason in broken:
        groups.setdefault(re.sub(r"\d+", "0", reason), []).append((path, reason))
    lines = []
    for group in sorted(groups.values(), key=len, reverse=True):
        more = f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
        lines.append(f"{len(group)}: {group[0][1][:200]}: {', '.join(path for path, _ in group[:NAMED])}{more}")
    others = len(lines) - REASONS
    return lines[:REASONS] + ([f"and {counted(others, 'further reason')}"] if others > 0 else [])


def describe(odd: Sequence[tuple[str, Oddity]]) -> Iterator[tuple[str, str]]:
    """Yield (what is odd, what to do) for each oddity that one of the files (path, oddity) has."""
    loud = [(path, one.peak) for path, one in odd if one.peak]
    cancels = [path for path, one in odd if one.cancels]
    flawed = [path for path, one in odd if one.flawed]
    if loud:
        yield (f"{counted(len(loud), 'sound')} far louder than full scale, which is 1: {loud[0][0]} (peak "
               f"{loud[0][1]:,.6g})",
               "scale sounds of floating-point numbers to -1 to 1 (those of 16 bits by 1/32,768)")
    if cancels:
        yield (f"{counted(len(cancels), 'sound')} with channels that cancel each other, of which the loudest is taken: "
               f"{cancels[0]}", "save these sounds with one channel")
    if flawed:
        yield (f"{counted(len(flawed), 'image')} with damage beside the pixels (metadata), read without: {flawed[0]}",
               "save these images anew where they stand the wrong way up")
