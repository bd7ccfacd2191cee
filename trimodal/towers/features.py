"""Features of frozen towers: encoded once into the cache, with the run's device, from where each step reads them.

    splits = with_features(splits, {"image": model.image, "text": model.text}, config)
    splits["train"].frozen["image"].read(rows, views)

Each set, split, modality and view has an entry of the cache (see `cache`). What it holds is decided by the weights of
the tower, how its inputs are prepared, the libraries that compute it, and the files or token ids that it is made from.

Files are decoded by worker processes while the tower encodes those before them. Batches are the same ones in every
filling, however often it is killed, and are computed in float32 without TF32, so that the bytes are, too, on the same
machine.
"""

import hashlib
import importlib.metadata
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch

from trimodal.config import Config
from trimodal.data import bad_samples, cache, generated
from trimodal.data.batches import Split, frame_multiple, pad_captions, pad_sounds, read_view
from trimodal.data.cache import Contents
from trimodal.data.codecs import Kind
from trimodal.data.features import Features
from trimodal.data.store import item_of
from trimodal.memory.devices import is_out_of_memory
from trimodal.towers.base import digest_of

FORMAT = 1  # counts up with every change of what is encoded
KINDS: Mapping[str, Kind] = {"image": "image", "audio": "sound"}  # of the files of a modality


# ---- what an entry holds ---------------------------------------------------------------------------------------------


class Encodings(Contents):
    """What an encoder makes of samples, in batches of `together`."""

    encoder: Any
    tower: str  # digest of all about the encoder that decides its output
    kind: Kind = "features"
    verb: ClassVar[str] = "Encoding"
    says_size: ClassVar[bool] = True
    otherwise: ClassVar[str] = "encoded anew in each step"

    def made_by(self) -> str:
        return f"float32 {self.tower}"


@dataclass(frozen=True)
class EncodedFiles(Encodings):
    """Features of the images or sounds of one set, in one view; item i is that of the sample `rows[i]` of the split."""

    name: str
    config: Config
    split: Split
    modality: str
    rows: np.ndarray  # int64, ascending
    view: int
    encoder: Any
    tower: str
    unit: ClassVar[str] = "file"
    together: ClassVar[int] = 32

    def __len__(self) -> int:
        return len(self.rows)

    def state(self) -> str:
        data = self.config.data
        state = hashlib.sha256(f"{FORMAT} {self.tower} {self.modality} {self.view} {data.fit}".encode())
        state.update(cache.made_from(KINDS[self.modality], self.config).encode())
        for line in cache.file_lines((item for item in self._items() if item), self.config):
            state.update(line)
        for part in self._random() if self.view else ():
            state.update(part)
        return state.hexdigest()

    def _random(self) -> Iterator[bytes]:
        """What the augmentation of a view is made from."""
        data, split = self.config.data, self.split
        yield f"{data.min_crop} {data.audio_max_s}".encode()
        yield from (values[self.rows].tobytes() for values in (split.set_hash, split.position, split.may_flip))

    def _items(self) -> Iterator[cache.Item | None]:
        table, kind = self.split.table, KINDS[self.modality]
        paths = table.images if self.modality == "image" else table.audio
        return (item_of(table, kind, row) or (paths[row], 0.0, 0.0) for row in self.rows.tolist())

    def paths(self) -> Iterator[str]:
        return (item[0] for item in self._items() if item and not generated.is_generated(item[0]))

    def encode(self, numbers: Sequence[int]) -> Generator[bytes | str, None, None]:
        paths = self.split.table.images if self.modality == "image" else self.split.table.audio
        rows = self.rows[np.asarray(numbers, np.int64)].tolist()
        items = [(paths[row], row) for row in rows]

        def read(item: tuple[str, int]) -> Any:
            return read_view(self.split, self.modality, item[1], self.view, self.config)

        with closing(cache.read_all(read, items, self.config)) as each:
            while batch := list(islice(each, self.together)):
                good = [one for one in batch if not isinstance(one, str)]
                encoded = iter(encode_batch(self.encoder, self._inputs(good)) if good else ())
                yield from (one if isinstance(one, str) else next(encoded) for one in batch)

    def _inputs(self, values: Sequence[Any]) -> tuple[np.ndarray, ...]:
        if self.modality == "image":
            return (np.ascontiguousarray(np.stack(values).transpose(0, 3, 1, 2)),)
        return pad_sounds(values, frame_multiple(self.split))


@dataclass(frozen=True)
class EncodedCaptions(Encodings):
    """Features of captions; item i is that of the row `rows[i]` of the table's captions."""

    name: str
    config: Config
    split: Split
    rows: np.ndarray  # int64
    encoder: Any
    tower: str
    unit: ClassVar[str] = "caption"
    together: ClassVar[int] = 64

    def __len__(self) -> int:
        return len(self.rows)

    def state(self) -> str:
        state = hashlib.sha256(f"{FORMAT} {self.tower} text".encode())
        for first in range(0, len(self.rows), 4096):
            ids_CL, mask_CL = pad_captions(self.split, self.rows[first:first + 4096])
            state.update(mask_CL.sum(1).tobytes() + ids_CL[mask_CL].tobytes())
        return state.hexdigest()

    def paths(self) -> Iterator[str]:
        return iter(())

    def encode(self, numbers: Sequence[int]) -> Generator[bytes | str, None, None]:
        rows = self.rows[np.asarray(numbers, np.int64)]
        for first in range(0, len(rows), self.together):
            yield from encode_batch(self.encoder, pad_captions(self.split, rows[first:first + self.together]))


# ---- encoding --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_batch(encoder: Any, inputs: Sequence[np.ndarray]) -> list[bytes]:
    """The valid tokens that `encoder.tower_tokens` makes of each row of `inputs`, as bytes float32 [n, D]. A batch that
    memory does not hold is halved."""
    device = next(encoder.parameters()).device
    try:
        with exact_products():
            tokens_BND, valid_BN = encoder.tower_tokens(*(torch.from_numpy(values).to(device) for values in inputs))
        tokens_BND = tokens_BND.float().cpu()
    except RuntimeError as error:
        half = len(inputs[0]) // 2
        if not half or not is_out_of_memory(error):
            raise
        return [one for part in (slice(half), slice(half, None))
                for one in encode_batch(encoder, [values[part] for values in inputs])]
    counts_B = torch.full((len(tokens_BND),), tokens_BND.shape[1]) if valid_BN is None else valid_BN.sum(1)
    return [tokens_BND[b, :count].numpy().tobytes() for b, count in enumerate(counts_B.tolist())]


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32, whose 10 bits would show in the third digit, whatever the run allows itself."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def digest_of_encoder(encoder: Any) -> str:
    """Of the weights of its tower, how inputs are prepared for it, which tokens are kept, and the libraries."""
    tower = encoder.tower
    packages = sorted({type(module).__module__.partition(".")[0] for module in tower.modules()} | {"torch"})
    facts = [digest_of(tower), repr(tower.input), repr(encoder.keep_tokens), *map(_version, packages)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


# ---- a split ---------------------------------------------------------------------------------------------------------


def with_features(splits: Mapping[str, Split], encoders: Mapping[str, Any], config: Config, *,
                  fill: bool = True) -> dict[str, Split]:
    """`splits` with the features of `encoders`, by modality, whose towers are frozen; fills the cache where they are
    missing, if `fill`.

    Raises:
        UserError: more than `data.max_bad_pct` of a set's images or sounds cannot be read.
    """
    if not config.data.cache:
        return dict(splits)
    digests = digests_of(encoders)
    return {name: replace(split, frozen={
        modality: open_features(split, modality, encoder, digests[modality], config, fill=fill)
        for modality, encoder in encoders.items()}) for name, split in splits.items()}


def digests_of(encoders: Mapping[str, Any]) -> dict[str, str]:
    """`digest_of_encoder` of each, which reads all weights: so once for all splits, and each time that these begin."""
    return {name: digest_of_encoder(encoder) for name, encoder in encoders.items()}


def open_features(split: Split, modality: str, encoder: Any, digest: str, config: Config, *,
                  fill: bool = True) -> Features | None:
    """The features of all samples of a split, or of its captions. None where some are not in the cache."""
    count = len(split.table.captions) if modality == "text" else len(split.table)
    entries = list[list[cache.Entry]]()
    places = np.full((count, 2), -1, np.int64)
    for numbers, rows, views in contents_of(split, modality, encoder, digest, config):
        found = [cache.open_entry(one, fill) for one in views]
        if None in found:
            return None
        places[rows] = np.stack([np.full(len(rows), len(entries)), numbers], 1)
        entries.append([one for one in found if one])
        if modality != "text":
            _report_broken(split, views[0], entries[-1][0], config)
    return Features(encoder.tower.dim, entries, places)


@dataclass(frozen=True)
class Missing:
    """An entry that is not in the cache: its items, and what they take, from a batch of them."""

    items: int
    bytes: float
    seconds: float


def missing(splits: Iterable[Split], encoders: Mapping[str, Any], config: Config) -> list[Missing]:
    """The entries of features that the cache lacks."""
    found, digests = [], digests_of(encoders)
    for split in splits:
        for name, encoder in encoders.items():
            for one in (one for _, _, views in contents_of(split, name, encoder, digests[name], config)
                        for one in views):
                if not one.folder().is_dir():
                    begin_s, tried = time.perf_counter(), min(len(one), one.together)
                    sizes = [len(item) for item in one.encode(range(tried)) if not isinstance(item, str)]
                    each_s = (time.perf_counter() - begin_s) / tried
                    found.append(Missing(len(one), len(one) * sum(sizes) / max(len(sizes), 1), len(one) * each_s))
    return found


def contents_of(split: Split, modality: str, encoder: Any, tower: str,
                config: Config) -> Iterator[tuple[np.ndarray, np.ndarray, list[Contents]]]:
    """Yield for each set (items int64 [n] of the rows int64 [n], those rows, what the entry of each view holds).
    `tower`: the encoder's digest."""
    table = split.table
    owners = np.repeat(np.arange(len(table)), table.caption_count)
    for code, source in enumerate(table.sources.names):
        own = table.sources.codes == code
        if modality == "text":
            rows = np.flatnonzero(own[owners])
        else:
            rows = np.flatnonzero(own & (table.has_image if modality == "image" else table.has_audio))
        if not len(rows):
            continue
        side = table.splits[int(np.flatnonzero(own)[0])]
        name = f"{source}-{side}-{modality}-features"
        if modality == "text":
            numbers, texts = table.captions.select(rows).distinct()
            first = np.empty(len(texts), np.int64)
            first[numbers[::-1]] = rows[::-1]
            yield numbers, rows, [EncodedCaptions(name, config, split, first, encoder, tower)]
        else:
            views = config.data.views if side == "train" else 1  # evaluation reads the first
            names = [f"{name}-view{view}" if view else name for view in range(views)]
            yield np.arange(len(rows)), rows, [EncodedFiles(each, config, split, modality, rows, view, encoder, tower)
                                               for view, each in enumerate(names)]


def _report_broken(split: Split, contents: Any, entry: cache.Entry, config: Config) -> None:
    """Record the samples whose files cannot be read; raise UserError where they are too many."""
    broken = [split.store.record(int(contents.rows[number]), reason) for number, reason in entry.reasons.items()]
    if broken:
        bad_samples.record(broken, config)
        bad_samples.check(f"{contents.name}", len(broken), len(contents), broken[0]["reason"], config)
