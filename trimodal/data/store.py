"""Images and log-mels of the samples of a table: generated, decoded when they are read, or read from the cache.

    store = open_store(table, config)
    image_HW3, mel_TM = store.image(0), store.mel(1)

Shape suffixes: H, W pixels, T frames of 10 ms, M mels.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from trimodal.config import SAMPLE_RATE_HZ, Config
from trimodal.data import bad_samples, cache, codecs, generated
from trimodal.data.cache import DecodedFiles, Entry, Item
from trimodal.data.codecs import KINDS, Kind
from trimodal.data.samples import SampleTable


@dataclass(frozen=True)
class Store:
    """Images and log-mels of the samples of one table, by row.

    With `encoded` (`data.cache`) they are what the cache gives, also where it has no room for them, so that no number
    of a run depends on the disk; without it they are those of the files.
    """

    table: SampleTable
    image_size: int
    encoded: bool = False
    entries: list[Entry] = field(default_factory=list)
    cached: dict[Kind, np.ndarray] = field(default_factory=dict)  # int64 [n, 2]: entry (-1: none) and number in it
    folders: dict[tuple[Kind, int], str] = field(default_factory=dict)  # of the files of a set, once needed

    def image(self, row: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """The image of a sample, uint8 [H, W, 3]: with a short side of up to 8/7 of the model's image size, or, of a
        generated sample, made with `rng` (None: of seed 0) at the model's size."""
        path = self.table.images[row]
        if generated.is_generated(path):
            rng = rng or np.random.default_rng(0)
            return generated.generate_image(generated.combination_of(path), self.image_size, rng)
        return self._read("image", row)

    def mel(self, row: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Log-mel spectrogram of a sample's whole sound, or of the stretch that its start and duration name, float16
        [T, 80]. The sound of a generated sample is made with `rng` (None: of seed 0)."""
        path = self.table.audio[row]
        if generated.is_generated(path):
            from trimodal.data.audio import log_mel

            wave = generated.generate_sound(generated.combination_of(path), rng or np.random.default_rng(0))
            return log_mel(wave).astype(np.float16)
        return self._read("sound", row)

    def wave(self, row: int, rate_hz: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """The samples of the same sound at `rate_hz`, float32 [S], which the cache does not keep."""
        from trimodal.data.audio import decode_audio, resampled

        path = self.table.audio[row]
        if generated.is_generated(path):
            wave = generated.generate_sound(generated.combination_of(path), rng or np.random.default_rng(0))
            return resampled(wave, SAMPLE_RATE_HZ, rate_hz)
        item = item_of(self.table, "sound", row)
        assert item is not None
        return decode_audio(*item, rate_hz)

    def is_generated(self, row: int) -> bool:
        return generated.is_generated(self.table.images[row] or self.table.audio[row])

    def record(self, row: int, reason: str) -> dict[str, str]:
        """The line of bad_samples.jsonl for a broken sample."""
        table = self.table
        return {"key": f"{table.sources[row]}/{table.keys[row]}", "split": table.splits[row], "reason": reason}

    def check_folders(self, row: int) -> None:
        """Raise UserError where a sample cannot be read since the whole folder of its set is gone."""
        code = int(self.table.sources.codes[row])
        for kind in KINDS:
            if item_of(self.table, kind, row):
                if (kind, code) not in self.folders:
                    items = items_of(self.table, kind, code).values()
                    self.folders[kind, code] = cache.common_folder(path for path, _, _ in items)
                cache.check_folder(self.folders[kind, code])

    def _read(self, kind: Kind, row: int) -> np.ndarray:
        entry, number = self.cached[kind][row].tolist() if kind in self.cached else (-1, 0)
        if entry >= 0:
            return self.entries[entry].read(number)
        item = item_of(self.table, kind, row)
        assert item is not None
        found = cache.decode(kind, item, cache.cache_side(self.image_size))
        return codecs.decode(kind, codecs.encode(kind, found)) if self.encoded else found


def item_of(table: SampleTable, kind: Kind, row: int) -> Item | None:
    """The file of a sample and its stretch; None where there is none, or it is generated."""
    path = table.images[row] if kind == "image" else table.audio[row]
    if not path or generated.is_generated(path):
        return None
    return (path, 0.0, 0.0) if kind == "image" else (path, float(table.start_s[row]), float(table.duration_s[row]))


def items_of(table: SampleTable, kind: Kind, code: int) -> dict[int, Item]:
    """The files of the samples of a set, by row."""
    codes, paths = (table.images if kind == "image" else table.audio).distinct()
    is_file = np.array([bool(path) and not generated.is_generated(path) for path in paths], bool)
    rows = np.flatnonzero((table.sources.codes == code) & is_file[codes]) if len(table) else np.empty(0, np.int64)
    named = (paths[number] for number in codes[rows].tolist())
    starts, durations = (np.zeros(len(rows)) if kind == "image" else column[rows]
                         for column in (table.start_s, table.duration_s))
    return dict(zip(rows.tolist(), zip(named, starts.tolist(), durations.tolist(), strict=True), strict=True))


def open_store(table: SampleTable, config: Config, *, fill: Collection[Kind] = KINDS) -> Store:
    """The store of one split; fills the cache first with the kinds of files in `fill`, where `data.cache` is on and
    there is room, and takes of it what is there of the others.

    Raises:
        UserError: more than `data.max_bad_pct` of a set's images or sounds cannot be read.
    """
    store = Store(table, config.model.image_side, config.data.cache)
    if not config.data.cache:
        return store
    store.cached.update({kind: np.full((len(table), 2), -1, np.int64) for kind in KINDS})
    for kind, name, items in _entries(table):
        numbers = {item: number for number, item in enumerate(dict.fromkeys(items.values()))}
        entry = cache.open_entry(DecodedFiles(kind, name, list(numbers), config), kind in fill)
        if entry:
            store.cached[kind][list(items)] = [(len(store.entries), numbers[item]) for item in items.values()]
            store.entries.append(entry)
            broken = [store.record(row, entry.reasons[numbers[item]]) for row, item in items.items()
                      if numbers[item] in entry.reasons]
            if broken:
                bad_samples.record(broken, config)
                bad_samples.check(f"{name}s", len(broken), len(items), broken[0]["reason"], config)
    return store


def entries_to_make(table: SampleTable, config: Config,
                    fill: Collection[Kind] = KINDS) -> dict[str, tuple[int, float]]:
    """Files and predicted bytes of each entry that `open_store` would make, by its name."""
    found = {}
    for kind, name, by_row in _entries(table):
        if kind not in fill:
            continue
        files = DecodedFiles(kind, name, list(dict.fromkeys(by_row.values())), config)
        if not files.folder().is_dir():
            found[name] = len(files), files.predicted_bytes()
    return found


def _entries(table: SampleTable) -> Iterator[tuple[Kind, str, dict[int, Item]]]:
    """Yield (kind, name, {row of a sample: its file}) of each cache entry that the samples of `table` need."""
    for kind in KINDS:
        for code, source in enumerate(table.sources.names):
            items = items_of(table, kind, code)
            if items:
                yield kind, f"{source}-{table.splits[next(iter(items))]}-{kind}", items
