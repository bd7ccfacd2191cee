"""The cache of what is made of files once: decoded images and sounds, and features of frozen towers.

The cache has one entry for each set, split and kind. It is a folder with

    data.bin     the items one after another, as `codecs` encodes them: images with a short side of up to 8/7 of the
                 model's, log-mels, or features
    index.npz    where each of them begins
    entry.json   format, kind, what encoded them, and the reasons of files that are broken

`Contents` says what an entry holds and makes it; its name holds a digest of all that decides the values (file names,
sizes, dates, settings, decoders, of features the tower's weights), so that after any change the old entry is not found.
It appears whole, by a rename, or not at all; after a kill the next run goes on with the entry that was being filled:
see `PartialEntry`.

Shape suffixes: H, W pixels, T frames of 10 ms, M mels.
"""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

import numpy as np
from tqdm import tqdm

from trimodal import members
from trimodal.config import Config
from trimodal.data import codecs
from trimodal.data.codecs import Kind
from trimodal.data.samples import BrokenSample, offsets_of
from trimodal.data.workers import NO_ITEM, Workers, cpu_cores, in_line
from trimodal.errors import UserError, counted
from trimodal.files import bytes_below, hold_lock, nearest_existing, replacing, sync_folder

AnyItem = TypeVar("AnyItem", bound=tuple[Any, ...])
T = TypeVar("T")  # what reading one file gives
Item = tuple[str, float, float]  # path, start_s, duration_s

FORMAT = 3  # counts up with every change of what an entry holds
PROBES = 16  # files decoded first, to estimate the size of an entry
CHUNK = 8  # files that a worker decodes before it hands them over
FEW = 64  # an entry of at most so many files is written without an estimate
GB = 1e9
LOCK = ".filling.lock"  # not that of a run: the cache may lie in its folder
RESERVE_GB = 2.0  # of the disk that the cache leaves free
DATA, INDEX, FACTS = "data.bin", "index.npz", "entry.json"
JOURNAL, SUFFIX = "journal.jsonl", ".tmp"  # of an entry that is being filled
FORMER = "broken.json"  # only entries of formats 1 and 2 have it
STRETCH_BYTES, STRETCH_S = 64_000_000, 10.0  # at most so much is lost by a kill
_OWN_FILES = re.compile(r"(journal\.jsonl|data\.bin|index\.npz|entry\.json|broken\.json)(\.\S+\.tmp)?")


class _NoRoom(Exception):
    """The cache cannot take an entry; the message says why."""


# ---- decoding -----------------------------------------------------------------------------------------------------


def cache_side(image_size: int) -> int:
    """Short side of cached images in pixels: 8/7 of the model's, so that random crops are still scaled down."""
    return round(image_size * 8 / 7)


def decode(kind: Kind, item: Item, side: int) -> np.ndarray:
    """uint8 [H, W, 3] with a short side of at most `side`, or float16 [T, 80], as the cache encodes them.

    Raises:
        BrokenSample: the file holds no usable picture or sound.
    """
    path, start_s, duration_s = item
    if kind == "image":
        from trimodal.data.images import decode_image, resize_for_cache

        return np.ascontiguousarray(resize_for_cache(decode_image(path), side))
    from trimodal.data.audio import decode_audio, log_mel

    return log_mel(decode_audio(path, start_s, duration_s)).astype(np.float16)


def read_all(read: Callable[[AnyItem], T], items: Sequence[AnyItem], config: Config) -> Generator[T | str, None, None]:
    """Call `read` on each of `items` in worker processes, and yield, in order, what it returns, or the message of the
    BrokenSample that it raises. An item begins with the path of its file. Workers run only a few chunks ahead, which
    bounds the memory.

    Raises:
        UserError: workers die again and again at one file, or the folder of the files is gone.
    """
    def work(job: int, skipped: Mapping[int, str], report: Callable[[int], None]) -> list[T | str]:
        found: list[T | str] = []
        for number in range(job * CHUNK, min((job + 1) * CHUNK, len(items))):
            report(number)
            try:
                found.append(skipped[number] if number in skipped else read(items[number]))
            except BrokenSample as error:
                found.append(str(error))
        return found

    def name(job: int, number: int) -> str:
        return members.shown(items[job * CHUNK if number == NO_ITEM else number][0])

    jobs = range(math.ceil(len(items) / CHUNK))
    wanted = min(cpu_cores(), 16) if config.data.workers == "auto" else config.data.workers
    count = min(wanted, len(jobs))
    chunks = iter(Workers(work, jobs, count, timeout_s=config.data.timeout_s, name=name, say=print)) if count else (
        in_line(work, jobs, {}))
    folder = None
    with closing(chunks):
        for chunk in chunks:
            if any(isinstance(found, str) for found in chunk):
                folder = folder or common_folder(item[0] for item in items)
                check_folder(folder)
            yield from chunk


def common_folder(paths: Iterable[str]) -> str:
    """The deepest folder that all of `paths` are below; "" where there is none."""
    folders = {os.path.dirname(os.path.abspath(file)) for file in set(map(members.file_of, paths))}
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


# ---- what an entry holds -------------------------------------------------------------------------------------------


class Contents(ABC):
    """The items of an entry, and how they are made. `name` is SET-SPLIT-KIND."""

    kind: Kind
    name: str
    config: Config
    verb: ClassVar[str]  # of the progress bar
    unit: ClassVar[str]
    otherwise: ClassVar[str]  # what happens where there is no room
    says_size: ClassVar[bool] = False
    together: ClassVar[int] = 1  # items that are made at once: a filling goes on from a multiple of it

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def state(self) -> str:
        """Digest of all that decides what is made."""

    @abstractmethod
    def made_by(self) -> str:
        """What makes the items, in words."""

    @abstractmethod
    def paths(self) -> Iterator[str]:
        """Of the files that they are made of."""

    @abstractmethod
    def encode(self, numbers: Sequence[int]) -> Generator[bytes | str, None, None]:
        """Make the items of these numbers, and yield, in order, the bytes that the cache keeps of each, or, as a
        string, why its file is broken. Raises what `read_all` does."""

    def folder(self) -> Path:
        return cache_folder(self.config) / f"{self.name}-{self.state()[:16]}"

    def predicted_bytes(self) -> float:
        """Size of all, from a few spread over the list."""
        if len(self) <= FEW:
            return 0.0
        spread = [int(number) for number in np.linspace(0, len(self) - 1, PROBES)]
        sizes = [len(found) for found in self.encode(spread) if not isinstance(found, str)]
        return len(self) * sum(sizes) / max(len(sizes), 1)


@dataclass(frozen=True)
class DecodedFiles(Contents):
    """Images or sounds as `decode` gives them."""

    kind: Kind
    name: str
    items: Sequence[Item]
    config: Config
    verb: ClassVar[str] = "Decoding"
    unit: ClassVar[str] = "file"
    otherwise: ClassVar[str] = "decoded at each use"

    def __len__(self) -> int:
        return len(self.items)

    def state(self) -> str:
        state = hashlib.sha256(f"{FORMAT} {made_from(self.kind, self.config)}".encode())
        for line in file_lines(self.items, self.config):
            state.update(line)
        return state.hexdigest()

    def made_by(self) -> str:
        return codecs.made_by(self.kind)

    def paths(self) -> Iterator[str]:
        return (path for path, _, _ in self.items)

    def encode(self, numbers: Sequence[int]) -> Generator[bytes | str, None, None]:
        kind, side = self.kind, cache_side(self.config.model.image_side)
        return read_all(lambda item: codecs.encode(kind, decode(kind, item, side)),
                        [self.items[number] for number in numbers], self.config)


def made_from(kind: Kind, config: Config) -> str:
    """What decides the values that a file gives, in words."""
    side = cache_side(config.model.image_side) if kind == "image" else ""
    return f"{kind} {side} {codecs.made_by(kind)}"


def file_lines(items: Iterable[Item], config: Config) -> Iterator[bytes]:
    """Name, stretch, size and date of each file, for digests; a member of a shard has the size and date of its shard.
    What lies below data_root is named from there: it may move."""
    root = os.path.join(os.path.abspath(config.paths.data_root), "")
    state_of = functools.cache(_size_and_date)  # a file may have many stretches
    for path, start_s, duration_s in items:
        size, changed_ns = state_of(members.file_of(path))
        line = f"\0{path.removeprefix(root)}\0{start_s!r} {duration_s!r} {size} {changed_ns}"
        yield line.encode("utf-8", "surrogateescape")


def _size_and_date(path: str) -> tuple[int, int]:
    """Bytes and date of change of a file, in ns; -1 each where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


# ---- entries -------------------------------------------------------------------------------------------------------


class Entry:
    """One entry of the cache, mapped into memory on first use in each process (a map is never pickled)."""

    def __init__(self, folder: Path, kind: Kind, number: int) -> None:
        """Raises UserError where `folder` does not hold `number` whole items of `kind`."""
        self.folder, self.kind = folder, kind
        self._bytes: np.ndarray | None = None
        try:
            self._load_index(number)
        except Exception as error:  # zipfile, numpy and json raise nearly any type for damage
            raise self._damaged(error) from None

    def _load_index(self, number: int) -> None:
        """Read an array of plain numbers and plain JSON, neither of which can run code; raise ValueError where they do
        not describe data.bin."""
        with zipfile.ZipFile(self.folder / INDEX) as archive:
            if sum(part.file_size for part in archive.infolist()) > 8 * number + 1000:  # 128 bytes before the array
                raise ValueError("unpacks to more than an index takes")
        with np.load(self.folder / INDEX, allow_pickle=False) as index:
            self.offsets = index["offsets"]
        if (self.offsets.dtype, self.offsets.shape) != (np.int64, (number + 1,)):
            raise ValueError(f"not the places of {number} items")
        if self.offsets[0] or (np.diff(self.offsets) < 0).any():
            raise ValueError("places that do not follow one another")
        if self.offsets[-1] != (self.folder / DATA).stat().st_size:
            raise ValueError(f"{DATA} has another size than the index states")
        facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        if facts["kind"] != self.kind:
            raise ValueError(f"holds items of kind {facts['kind']}")
        self.reasons = {int(number): str(reason) for number, reason in facts["broken"].items()}

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.folder}: this entry of the cache is damaged ({type(error).__name__}: {error}); delete "
                         "it, and it will be made again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_bytes": None}

    @property
    def content(self) -> np.ndarray:
        """All items one after another, uint8. Raises UserError where they cannot be read any more."""
        if self._bytes is None:
            self._bytes = self._map()
        return self._bytes

    def check(self, number: int) -> None:
        """Raises BrokenSample for a file that is broken."""
        if number in self.reasons:
            raise BrokenSample(self.reasons[number])

    def read(self, number: int) -> np.ndarray:
        """Raises BrokenSample for a file that is broken, UserError where the entry is."""
        self.check(number)
        try:
            return codecs.decode(self.kind, self.content[self.offsets[number]:self.offsets[number + 1]].data)
        except UserError:
            raise
        except Exception as error:  # Pillow raises nearly any type
            raise self._damaged(error) from None

    def _map(self) -> np.ndarray:
        try:
            content = np.memmap(self.folder / DATA, np.uint8, mode="r")
            problem = "" if content.nbytes == self.offsets[-1] else "it has shrunk"
        except (OSError, ValueError) as error:  # the second where it is empty
            problem = getattr(error, "strerror", None) or str(error)
        if problem:
            raise UserError(f"{self.folder}: this entry of the cache cannot be read any more ({problem}); delete it if "
                            "it is still there, then go on with --resume auto, and it will be made again")
        return content


# ---- filling the cache --------------------------------------------------------------------------------------------


def cache_folder(config: Config) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.paths.data_root) / "cache"


def open_entry(contents: Contents, fill: bool) -> Entry | None:
    """Open the cache entry of `contents`; with `fill`, make and write it first where it is missing.

    None where it is missing and `fill` is false, or where it cannot be written: then a line says why.
    """
    folder = contents.folder()
    if fill and not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent):
                if not folder.is_dir():  # another process may have made it while we waited
                    _make_entry(folder, contents)
                    if contents.says_size:
                        print(f"Cache: {contents.name}: {len(contents):,} {contents.unit}s, "
                              f"{bytes_below(folder) / GB:.3g} GB", flush=True)
        except (_NoRoom, OSError) as error:
            print(f"Cache: {contents.name} is not kept but {contents.otherwise}: {error}", flush=True)
            return None
    return Entry(folder, contents.kind, len(contents)) if folder.is_dir() else None


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Hold the lock of a cache, so that one process at a time fills it; the system frees it if the holder dies."""
    lock = hold_lock(cache / LOCK, lambda: print(f"Cache: waiting for another process that fills {cache}", flush=True))
    try:
        yield
    finally:
        if lock:
            lock.release()


def _make_entry(folder: Path, contents: Contents) -> None:
    """Write `contents` into `folder`, which appears when all is on the disk.

    A partial entry of the same set, split and kind with other files or settings is deleted; those of others only where
    there is no room beside them, and this one where there is none at all.
    """
    config = contents.config
    check_folder(common_folder(contents.paths()))  # with it gone, all files would seem to be others
    _tell_former(folder)
    temporary = folder.with_name(folder.name + SUFFIX)
    others = [path for path in sorted(folder.parent.glob(f"*-*-*-{'[0-9a-f]' * 16}{SUFFIX}")) if path != temporary]
    try:
        for other in others:
            if other.name.rsplit("-", 1)[0] == folder.name.rsplit("-", 1)[0]:
                _remove_partial(other)
        needed = contents.predicted_bytes() - bytes_below(temporary)
        for other in others if needed > room_for_entries(config) else ():
            _remove_partial(other)
        room = room_for_entries(config)
        if needed > room or room <= 0:
            raise _no_room(needed, room, config)
        _fill(temporary, contents, room)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except (_NoRoom, OSError):
        _remove_partial(temporary, with_others_files=True)
        raise
    with suppress(OSError):
        (folder / JOURNAL).unlink()


def _tell_former(folder: Path) -> None:
    """Say which entries of the same set, split and kind are of a format that is not read any more; they stay."""
    for path in sorted(folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-{'[0-9a-f]' * 16}/{FORMER}")):
        print(f"Cache: {path.parent} is of an earlier release and not read any more: it may be deleted, which frees "
              f"{bytes_below(path.parent) / GB:.1f} GB", flush=True)


def _fill(folder: Path, contents: Contents, room: float) -> None:
    """Make what is missing in a partial entry; raises _NoRoom where that takes more than `room` bytes."""
    entry, number = PartialEntry(folder, contents), len(contents)
    kept, kept_bytes = len(entry.sizes), entry.size
    if kept:
        print(f"Cache: {contents.name}: going on from {kept} of {counted(number, contents.unit)}", flush=True)
    with closing(entry), closing(contents.encode(range(kept, number))) as each:
        for encoded in tqdm(each, f"{contents.verb} {contents.name}s", number, initial=kept, unit=contents.unit,
                            disable=None):
            entry.add(encoded)
            if entry.size - kept_bytes > room:
                raise _no_room(entry.size - kept_bytes, room, contents.config)
        entry.finish()


def room_for_entries(config: Config) -> float:
    """Bytes that new entries may take: what `data.cache_max_gb` leaves, and what the disk does."""
    cache = cache_folder(config).absolute()
    free = shutil.disk_usage(nearest_existing(cache)).free
    return min(config.data.cache_max_gb * GB - bytes_below(cache), free - RESERVE_GB * GB)


def _no_room(needed: float, room: float, config: Config) -> _NoRoom:
    limits = f"data.cache_max_gb={config.data.cache_max_gb:g}, and {RESERVE_GB:g} GB of the disk stay free"
    return _NoRoom(f"it takes {needed / GB:.1f} GB or more, and {max(room, 0) / GB:.1f} GB are left in "
                   f"{cache_folder(config)} ({limits}); old entries there may be deleted")


class PartialEntry:
    """The folder ENTRY.tmp of an entry that is being filled, by one process at a time.

    Items are appended to `data.bin`; `journal.jsonl` holds a line for each stretch of them, written once their bytes
    are on the disk: at most STRETCH_BYTES or STRETCH_S are lost by a kill. `sizes` (bytes of each item) and `reasons`
    (of broken files, by number) are of the files so far.
    """

    def __init__(self, folder: Path, contents: Contents):
        """Open `folder`, made if need be, with what is whole in it. Raises OSError."""
        self.folder, self.contents = folder, contents
        self.sizes, self.reasons = list[int](), dict[int, str]()
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"*{SUFFIX}"):  # of a kill while the index was written
            if _OWN_FILES.fullmatch(path.name):
                path.unlink()
        self.data, self.journal = _open_to_append(folder / DATA), _open_to_append(folder / JOURNAL)
        self._recover()
        self._since_s, self._crc = time.monotonic(), 0  # of the stretch that is not in the journal yet, which begins
        self._journalled, self._stretch_start = len(self.sizes), self.size  # at this file and byte

    @property
    def size(self) -> int:
        """Bytes of the files so far."""
        return self.data.tell()

    def add(self, encoded: bytes | str) -> None:
        """Append the next item, or the reason why its file is broken."""
        content = b""
        if isinstance(encoded, str):
            self.reasons[len(self.sizes)] = encoded
        else:
            content = encoded
        self.sizes.append(len(content))
        self.data.write(content)
        self._crc = zlib.crc32(content, self._crc)
        is_due = self.size - self._stretch_start >= STRETCH_BYTES or time.monotonic() - self._since_s >= STRETCH_S
        if is_due and len(self.sizes) % self.contents.together == 0:
            self._commit()

    def finish(self) -> None:
        """Write the index and the reasons, after which the folder is a whole entry but for its name."""
        self._commit()
        with replacing(self.folder / INDEX) as file:
            np.savez(file, offsets=offsets_of(np.array(self.sizes, np.int64)))
        with replacing(self.folder / FACTS, "w") as file:
            json.dump({"format": FORMAT, "kind": self.contents.kind, "made_by": self.contents.made_by(),
                       "broken": self.reasons}, file)

    def close(self) -> None:
        self.data.close()
        self.journal.close()

    def _commit(self) -> None:
        """Bring what was added to the disk, then into the journal."""
        first = self._journalled
        if len(self.sizes) > first:
            _sync(self.data)
            line = json.dumps({"sizes": self.sizes[first:], "crc32": self._crc, "reasons": {
                number: reason for number, reason in self.reasons.items() if number >= first}})
            self.journal.write(line.encode() + b"\n")
            _sync(self.journal)
            self._since_s, self._crc = time.monotonic(), 0
            self._journalled, self._stretch_start = len(self.sizes), self.size

    def _recover(self) -> None:
        """Keep what a killed process has completely written: the files of all journal lines up to the first that is
        damaged or whose bytes are missing in `data.bin`. Both files are cut off behind them."""
        journal_bytes = data_bytes = 0
        for line in self.journal.readlines():
            size = self._restore(line)
            if size is None:
                break
            journal_bytes, data_bytes = journal_bytes + len(line), data_bytes + size
        for file, length in ((self.data, data_bytes), (self.journal, journal_bytes)):
            file.seek(length)
            file.truncate()

    def _restore(self, line: bytes) -> int | None:
        """Add the files of one journal line to `sizes` and `reasons`; how many bytes of `data.bin` they are. None, and
        nothing is added, where the line is damaged or cut, or those bytes are missing or do not match its CRC-32."""
        try:
            record = json.loads(line)
            sizes = [int(size) for size in record["sizes"]]
            reasons = {int(number): str(reason) for number, reason in record["reasons"].items()}
            left = os.fstat(self.data.fileno()).st_size - self.size
            if line[-1:] != b"\n" or min(sizes, default=0) < 0 or sum(sizes) > left:
                return None
            content = self.data.read(sum(sizes))
            if zlib.crc32(content) != record["crc32"]:
                return None
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            return None
        self.sizes += sizes
        self.reasons |= reasons
        return len(content)


def _open_to_append(path: Path) -> BinaryIO:
    """To be read and written where it is, without a link being followed."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_partial(folder: Path, *, with_others_files: bool = False) -> None:
    """Delete a partial entry, by the names of its files, and its folder when empty. A link, or a folder that holds
    anything else, is somebody's own and stays as it is; with `with_others_files` that else alone stays."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with suppress(OSError):
        own = [path for path in folder.iterdir() if _OWN_FILES.fullmatch(path.name) and path.is_file()
               and not path.is_symlink()]
        if with_others_files or len(own) == len(list(folder.iterdir())):
            for path in own:
                path.unlink()
            folder.rmdir()
