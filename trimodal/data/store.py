"""Images and log-mels of the samples of a table: generated, decoded when they are read, or read from the cache.

    store = open_store(table, config)
    image_HW3, mel_TM = store.image(0), store.mel(1)

Shape suffixes: H, W pixels, T frames of 10 ms, M mels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimodal.config import Config
from trimodal.data import bad_samples, generated
from trimodal.data.cache import (
    KINDS,
    Entry,
    Item,
    Kind,
    cache_side,
    check_folder,
    common_folder,
    decode,
    entry_folder,
    open_entry,
    predicted_bytes,
)
from trimodal.data.samples import SampleTable


@dataclass(frozen=True)
class Store:
    """Pictures and sounds of the samples of one table, by row, the same whether they are cached or not."""

    table: SampleTable
    image_size: int
    entries: list[Entry] = field(default_factory=list)
    places: dict[Kind, np.ndarray] = field(default_factory=dict)  # int64 [n, 2]: entry (-1: none) and number in it
    folders: dict[tuple[Kind, int], str] = field(default_factory=dict)  # of the files of a set, once needed

    def image(self, row: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 [H, W, 3]: generated with `rng` at the model's size, else with a short side of up to 8/7 of it."""
        path = self.table.images[row]
        if generated.is_generated(path):
            rng = rng or np.random.default_rng(0)
            return generated.draw_image(generated.combination_of(path), self.image_size, rng)
        return self._read("image", row, path)

    def mel(self, row: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """float16 [T, 80], the whole of the sample's stretch of sound."""
        path = self.table.audio[row]
        if generated.is_generated(path):
            from trimodal.data.audio import log_mel

            wave = generated.draw_sound(generated.combination_of(path), rng or np.random.default_rng(0))
            return log_mel(wave).astype(np.float16)
        return self._read("sound", row, path)

    def is_generated(self, row: int) -> bool:
        return generated.is_generated(self.table.images[row] or self.table.audio[row])

    def record(self, row: int, reason: str) -> dict[str, str]:
        """The line of bad_samples.jsonl for a broken sample."""
        table = self.table
        return {"key": f"{table.sources[row]}/{table.keys[row]}", "split": table.splits[row], "reason": reason}

    def check_folders(self, row: int) -> None:
        """Raise UserError where a sample cannot be read since the whole folder of its set is gone."""
        table, code = self.table, int(self.table.sources.codes[row])
        kinds: tuple[tuple[Kind, Any], ...] = (("image", table.images), ("sound", table.audio))
        for kind, paths in kinds:
            if paths[row] and not generated.is_generated(paths[row]):
                if (kind, code) not in self.folders:
                    rows = np.flatnonzero(table.sources.codes == code).tolist()
                    self.folders[kind, code] = common_folder(paths[r] for r in rows if paths[r])
                check_folder(self.folders[kind, code])

    def _read(self, kind: Kind, row: int, path: str) -> np.ndarray:
        entry, number = self.places[kind][row].tolist() if kind in self.places else (-1, 0)
        if entry >= 0:
            return self.entries[entry].read(number)
        item = (path, float(self.table.start_s[row]), float(self.table.duration_s[row]))
        return decode(kind, item, cache_side(self.image_size))


def open_store(table: SampleTable, config: Config, *, fill: bool = True) -> Store:
    """The store of one split; fills the cache first where `data.cache` is on and there is room, and with `fill` false
    takes of it what is there.

    Raises:
        UserError: more than `data.max_bad_pct` of a set's pictures or sounds cannot be read.
    """
    store = Store(table, config.model.image_size)
    if not config.data.cache:
        return store
    store.places.update({kind: np.full((len(table), 2), -1, np.int64) for kind in KINDS})
    for kind, name, rows, numbers, items in _groups(table):
        entry = open_entry(kind, name, items, config, fill)
        if entry:
            store.places[kind][rows] = np.stack([np.full(len(rows), len(store.entries)), numbers], 1)
            store.entries.append(entry)
            _report(store, rows, [entry.reasons.get(number) for number in numbers.tolist()], f"{name}s", config)
    return store


def entries_to_make(table: SampleTable, config: Config) -> dict[str, tuple[int, float]]:
    """Files and foretold bytes of each entry that `open_store` would make, by its name."""
    return {name: (len(items), predicted_bytes(kind, items, config)) for kind, name, _, _, items in _groups(table)
            if not entry_folder(kind, name, items, config).is_dir()}


def _groups(table: SampleTable) -> Iterator[tuple[Kind, str, np.ndarray, np.ndarray, list[Item]]]:
    """For each entry its kind and name, the rows that have a file in it, each one's number there, and all files."""
    for kind in KINDS:
        for code, source in enumerate(table.sources.names):
            rows, numbers, items = _files(table, kind, np.flatnonzero(table.sources.codes == code))
            if items:
                yield kind, f"{source}-{table.splits[int(rows[0])]}-{kind}", rows, numbers, items


def _files(table: SampleTable, kind: Kind, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Item]]:
    """Those of `rows` that have a file of `kind`, the number of each one's file, and the different files."""
    paths = table.images if kind == "image" else table.audio
    kept, numbers, known = [], [], dict[Item, int]()
    for row in rows.tolist():
        path = paths[row]
        if not path or generated.is_generated(path):
            continue
        start, duration = (0.0, 0.0) if kind == "image" else (float(table.start_s[row]), float(table.duration_s[row]))
        kept.append(row)
        numbers.append(known.setdefault((path, start, duration), len(known)))
    return np.array(kept, np.int64), np.array(numbers, np.int64), list(known)


def _report(store: Store, rows: np.ndarray, reasons: Sequence[str | None], what: str, config: Config) -> None:
    """List the broken ones of `rows` in bad_samples.jsonl, and stop where there are too many."""
    records = [store.record(row, reason) for row, reason in zip(rows.tolist(), reasons, strict=True) if reason]
    if records:
        bad_samples.record(records, config)
        bad_samples.check(what, len(records), len(rows), records[0]["reason"], config)
