"""Pictures and log-mels of samples: drawn, decoded on the spot, or read from a cache that holds each file decoded.

The cache has one entry for each set, split and kind: a flat file (uint8 pictures with a short side of up to 8/7 of the
model's, or float16 log-mels) and an index. An entry's name holds a digest of file names, sizes, dates and settings, so
that after any change the old entry is not found. It appears whole, by a rename, or not at all; where a run is killed
before that, the next one goes on (partial_fills.py).

    store = open_store(table, config)
    picture_HW3, mel_TM = store.image(0), store.mel(1)

Shape suffixes: H, W pixels, T frames of 10 ms, M mels.
"""

import hashlib
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from trimodal.config import NUM_MELS, Config
from trimodal.data import bad_samples, generated, partial_fills
from trimodal.data.samples import BrokenSample, SampleTable, offsets_of
from trimodal.data.workers import NO_ITEM, Workers, cpu_cores, in_line
from trimodal.errors import UserError
from trimodal.files import bytes_below, nearest_existing, replacing, sync_folder, take_lock

Kind = Literal["image", "sound"]
Item = tuple[str, float, float]  # path, start_s, duration_s
KINDS: tuple[Kind, ...] = ("image", "sound")

FORMAT = 2  # counts up with every change of what an entry holds
PROBES = 16  # files decoded first, to foretell the size of an entry
CHUNK = 8  # files that a process decodes before it hands them over
FEW = 64  # files whose size need not be foretold
GB = 1e9
LOCK = ".filling.lock"  # not that of a run: the cache may lie in its folder
RESERVE_GB = 2.0  # of the disk that the cache leaves free


class _NoRoom(Exception):
    """The cache cannot take an entry; the message says why."""


# ---- decoding -----------------------------------------------------------------------------------------------------


def cache_side(image_size: int) -> int:
    """Short side of cached pictures: random crops of all but the smallest pictures still shrink."""
    return round(image_size * 8 / 7)


def decode(kind: Kind, item: Item, side: int) -> np.ndarray:
    """uint8 [H, W, 3] with a short side of at most `side`, or float16 [T, 80]: what the cache holds.

    Raises:
        BrokenSample: the file holds no usable picture or sound.
    """
    path, start_s, duration_s = item
    if kind == "image":
        from trimodal.data.images import decode_image, resize_for_cache

        return np.ascontiguousarray(resize_for_cache(decode_image(path), side))
    from trimodal.data.audio import decode_audio, log_mel

    return log_mel(decode_audio(path, start_s, duration_s)).astype(np.float16)


def _decoded(kind: Kind, side: int, item: Item) -> np.ndarray:
    return decode(kind, item, side)


@dataclass(frozen=True)
class _Decoder:
    """Files in chunks, each a job of `workers`."""

    read: Callable[[Item], np.ndarray]
    items: Sequence[Item]

    def __len__(self) -> int:
        return math.ceil(len(self.items) / CHUNK)

    def work(self, job: int, skipped: Mapping[int, str], report: Callable[[int], None]) -> list[np.ndarray | str]:
        """Decoded files, or the reason why not."""
        found: list[np.ndarray | str] = []
        for number in range(job * CHUNK, min((job + 1) * CHUNK, len(self.items))):
            report(number)
            try:
                if number in skipped:
                    raise BrokenSample(skipped[number])
                found.append(self.read(self.items[number]))
            except BrokenSample as error:
                found.append(str(error))
        return found

    def name(self, job: int, number: int) -> str:
        return self.items[job * CHUNK if number == NO_ITEM else number][0]


def decode_all(kind: Kind, items: Sequence[Item], config: Config) -> Generator[np.ndarray | str, None, None]:
    """All of `items` in order, decoded by processes, which run only a few chunks ahead: that bounds the memory.

    Raises:
        UserError: processes die again and again at one file, or the folder of the files is gone.
    """
    return read_all(partial(_decoded, kind, cache_side(config.model.image_size)), items, config)


def read_all(read: Callable[[Item], np.ndarray], items: Sequence[Item],
             config: Config) -> Generator[np.ndarray | str, None, None]:
    """What `read` gives for all of `items`, or why it raised BrokenSample; raises as `decode_all`."""
    decoder = _Decoder(read, items)
    jobs, count = range(len(decoder)), min(_processes(config), len(decoder))
    chunks = iter(Workers(decoder.work, jobs, count, timeout_s=config.data.timeout_s, name=decoder.name, say=print)
                  ) if count else in_line(decoder.work, jobs, {})
    folder = None
    with closing(chunks):
        for chunk in chunks:
            if any(isinstance(found, str) for found in chunk):
                folder = folder or common_folder(path for path, _, _ in items)
                check_folder(folder)
            yield from chunk


def _bytes_of(kind: Kind, shape: Any) -> Any:
    """Of a decoded file of some shape, or of several, whose first and second sizes are `shape`."""
    return shape[0] * (shape[1] * 3 if kind == "image" else NUM_MELS * np.dtype(np.float16).itemsize)


def common_folder(paths: Iterable[str]) -> str:
    """The deepest folder that all of `paths` are below; "" where there is none."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    return os.path.commonpath(folders) if folders else ""


def check_folder(folder: str) -> None:
    """Raise UserError where a folder that files were listed in is gone or, as a disk's that was detached, empty."""
    try:
        with os.scandir(folder or os.sep) as found:
            there = any(found)
    except OSError:
        there = False
    if not there:
        raise UserError(f"data: {folder} is gone, or empty, though files are to be read there; mount the disk again or "
                        "put the folder back, then go on with --resume auto")


# ---- the store ----------------------------------------------------------------------------------------------------


class Entry:
    """One entry of the cache, mapped into memory on first use in each process (a map is never pickled)."""

    def __init__(self, folder: Path, number: int) -> None:
        """Raises UserError where `folder` does not hold `number` whole items."""
        self.folder = folder
        self._bytes: np.ndarray | None = None
        try:
            self._load_index(number)
            whole = self._fits(number)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError, EOFError,
                zipfile.BadZipFile, zlib.error):
            whole = False
        if not whole:
            raise UserError(f"{folder}: this entry of the cache is damaged; delete it, and it will be made again")

    def _load_index(self, number: int) -> None:
        """Arrays of plain numbers and plain JSON: neither can run code."""
        with zipfile.ZipFile(self.folder / "index.npz") as archive:
            if sum(part.file_size for part in archive.infolist()) > 16 * number + 1000:  # 128 bytes before each array
                raise ValueError("unpacks to more than an index takes")
        with np.load(self.folder / "index.npz", allow_pickle=False) as index:
            self.offsets, self.shapes, self.is_image = index["offsets"], index["shapes"], bool(index["is_image"])
        broken = json.loads((self.folder / "broken.json").read_text(encoding="utf-8"))
        self.reasons = {int(number): str(reason) for number, reason in broken.items()}

    def _fits(self, number: int) -> bool:
        """Whether the index describes data.bin: `read` then takes nothing but whole pictures or sounds from it."""
        offsets, shapes = self.offsets, self.shapes
        if (offsets.dtype, offsets.shape) != (np.int64, (number + 1,)):
            return False
        if (shapes.dtype, shapes.shape) != (np.int32, (number, 2)):
            return False
        lengths, sizes = np.diff(offsets), _bytes_of("image" if self.is_image else "sound", shapes.T.astype(np.int64))
        return bool(offsets[0] == 0 and (shapes >= 0).all() and np.array_equal(lengths, sizes)
                    and offsets[-1] == (self.folder / "data.bin").stat().st_size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_bytes": None}

    def read(self, number: int) -> np.ndarray:
        if number in self.reasons:
            raise BrokenSample(self.reasons[number])
        if self._bytes is None:
            self._bytes = self._map()
        flat = self._bytes[self.offsets[number]:self.offsets[number + 1]].view(np.ndarray)
        if self.is_image:
            return flat.reshape(*self.shapes[number], 3)
        return flat.view(np.float16).reshape(-1, NUM_MELS)

    def _map(self) -> np.ndarray:
        try:
            content = np.memmap(self.folder / "data.bin", np.uint8, mode="r")
            problem = "" if content.nbytes == self.offsets[-1] else "it has shrunk"
        except (OSError, ValueError) as error:  # the second where it is empty
            problem = getattr(error, "strerror", None) or str(error)
        if problem:
            raise UserError(f"{self.folder}: this entry of the cache cannot be read any more ({problem}); delete it if "
                            "it is still there, then go on with --resume auto, and it will be made again")
        return content


@dataclass(frozen=True)
class Store:
    """Pictures and sounds of the samples of one table, by row, the same whether they are cached or not."""

    table: SampleTable
    image_size: int
    entries: list[Entry] = field(default_factory=list)
    places: dict[Kind, np.ndarray] = field(default_factory=dict)  # int64 [n, 2]: entry (-1: none) and number in it
    folders: dict[tuple[Kind, int], str] = field(default_factory=dict)  # of the files of a set, once needed

    def image(self, row: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 [H, W, 3]: drawn with `rng` at the model's size, else with a short side of up to 8/7 of it."""
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

    def is_drawn(self, row: int) -> bool:
        return generated.is_generated(self.table.images[row] or self.table.audio[row])

    def record(self, row: int, reason: str) -> dict[str, str]:
        """What bad_samples.jsonl says about a broken sample."""
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
        entry = _open_entry(kind, name, items, config, fill)
        if entry:
            store.places[kind][rows] = np.stack([np.full(len(rows), len(store.entries)), numbers], 1)
            store.entries.append(entry)
            _report(store, rows, [entry.reasons.get(number) for number in numbers.tolist()], f"{name}s", config)
    return store


def entries_to_make(table: SampleTable, config: Config) -> dict[str, tuple[int, float]]:
    """Files and foretold bytes of each entry that `open_store` would make, by its name."""
    return {name: (len(items), _predicted_bytes(kind, items, config)) for kind, name, _, _, items in _groups(table)
            if not _entry_folder(kind, name, items, config).is_dir()}


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


# ---- filling the cache --------------------------------------------------------------------------------------------


def cache_folder(config: Config) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.paths.data_root) / "cache"


def _entry_folder(kind: Kind, name: str, items: Sequence[Item], config: Config) -> Path:
    return cache_folder(config) / f"{name}-{_digest(kind, items, cache_side(config.model.image_size), config)}"


def _open_entry(kind: Kind, name: str, items: Sequence[Item], config: Config, fill: bool) -> Entry | None:
    """The entry of `items`, made if need be; None where it is not there and `fill` is false, or, with a printed reason,
    where there is no room for it."""
    folder = _entry_folder(kind, name, items, config)
    cache = folder.parent
    if folder.is_dir():
        return Entry(folder, len(items))
    if not fill:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache):
            if not folder.is_dir():  # another process may have made it while we waited
                _fill(folder, kind, items, config)
    except (_NoRoom, OSError) as error:
        print(f"Cache: {name} is not kept but decoded at each use: {error}", flush=True)
        return None
    return Entry(folder, len(items))


def _digest(kind: Kind, items: Sequence[Item], side: int, config: Config) -> str:
    """Of all that decides what an entry holds. Files below data_root are named from there, so it may be moved."""
    state = hashlib.sha256(f"{FORMAT} {kind} {side if kind == 'image' else ''}".encode())
    root = os.path.join(os.path.abspath(config.paths.data_root), "")
    for path, start_s, duration_s in items:
        try:
            found = os.stat(path)
            size, changed_ns = found.st_size, found.st_mtime_ns
        except OSError:
            size, changed_ns = -1, -1
        line = f"\0{path.removeprefix(root)}\0{start_s!r} {duration_s!r} {size} {changed_ns}"
        state.update(line.encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One process at a time fills a cache; the system frees the lock when its holder dies."""
    with (cache / LOCK).open("a") as file:
        try:
            take_lock(file, of_process=True)
        except BlockingIOError:
            print(f"Cache: waiting for another process that fills {cache}", flush=True)
            take_lock(file, of_process=True, wait=True)
        yield


def _fill(folder: Path, kind: Kind, items: Sequence[Item], config: Config) -> None:
    """Decode `items` into `folder`, which appears when all is on the disk; what a killed run had done of it stays.

    Where there is no room, all that is there of it goes, so that it holds nothing up.
    """
    temporary = folder.with_name(folder.name + partial_fills.SUFFIX)
    check_folder(common_folder(path for path, _, _ in items))  # else all were others now, and what was done superseded
    try:
        partial_fills.remove_others(temporary, superseded=True)
        needed = _predicted_bytes(kind, items, config) - bytes_below(temporary)
        if needed > room_for_entries(config):
            partial_fills.remove_others(temporary)
        _check_room(needed, room_for_entries(config), folder.parent, config)
        _write(temporary, kind, items, config)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except (_NoRoom, OSError):
        partial_fills.remove(temporary)
        raise
    with suppress(OSError):
        (folder / partial_fills.JOURNAL).unlink()


def _write(folder: Path, kind: Kind, items: Sequence[Item], config: Config) -> None:
    room = room_for_entries(config)  # beside what is there
    fill = partial_fills.PartialFill(folder, len(items), partial(_bytes_of, kind))
    name, there = folder.name.rsplit("-", 1)[0], fill.size
    if fill.kept:
        print(f"Cache: {name}: going on from {fill.kept} of {len(items)} files", flush=True)
    with closing(fill), closing(decode_all(kind, items[fill.kept:], config)) as each:
        for decoded in tqdm(each, f"Decoding {name}s", len(items), initial=fill.kept, unit="file", disable=None):
            if isinstance(decoded, str):
                fill.add((0, 0), b"", decoded)
            else:
                fill.add((decoded.shape[0], decoded.shape[1]), decoded.tobytes())
            if fill.size - there > room:
                raise _NoRoom(_no_room(fill.size - there, room, folder.parent, config))
        fill.write_down()
        with replacing(folder / "index.npz") as file:
            shapes = np.array(fill.shapes, np.int32).reshape(-1, 2)
            np.savez(file, offsets=offsets_of(fill.lengths), shapes=shapes, is_image=kind == "image")
        with replacing(folder / "broken.json", "w") as file:
            json.dump(fill.reasons, file)


def _predicted_bytes(kind: Kind, items: Sequence[Item], config: Config) -> float:
    """Size of all, from a few spread over the list."""
    if len(items) <= FEW:
        return 0.0
    spread = [items[int(i)] for i in np.linspace(0, len(items) - 1, PROBES)]
    sizes = [found.nbytes for found in decode_all(kind, spread, config) if not isinstance(found, str)]
    return len(items) * sum(sizes) / max(len(sizes), 1)


def room_for_entries(config: Config) -> float:
    """Bytes that new entries may take: what `data.cache_max_gb` leaves, and what the disk does."""
    cache = cache_folder(config).absolute()
    used = bytes_below(cache)
    free = shutil.disk_usage(nearest_existing(cache)).free
    return min(config.data.cache_max_gb * GB - used, free - RESERVE_GB * GB)


def _check_room(needed: float, room: float, cache: Path, config: Config) -> None:
    if needed > room or room <= 0:
        raise _NoRoom(_no_room(needed, room, cache, config))


def _no_room(needed: float, room: float, cache: Path, config: Config) -> str:
    limits = f"data.cache_max_gb={config.data.cache_max_gb:g}, and {RESERVE_GB:g} GB of the disk stay free"
    return (f"it takes {needed / GB:.1f} GB or more, and {max(room, 0) / GB:.1f} GB are left in {cache} ({limits}); "
            "old entries there may be deleted")


def _processes(config: Config) -> int:
    return min(cpu_cores(), 16) if config.data.workers == "auto" else config.data.workers


def _report(store: Store, rows: np.ndarray, reasons: Sequence[str | None], what: str, config: Config) -> None:
    """List the broken ones of `rows` in bad_samples.jsonl, and stop where there are too many."""
    records = [store.record(row, reason) for row, reason in zip(rows.tolist(), reasons, strict=True) if reason]
    if records:
        bad_samples.record(records, config)
        bad_samples.check(what, len(records), len(rows), records[0]["reason"], config)
