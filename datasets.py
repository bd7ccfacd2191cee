"""From data sets to batches: reading splits, the order of an epoch, and the loader.

    data = load_data(config)
    pools = [pool(data.tables["train"], ("image", "text"))]
    jobs = epoch_batches(pools, [1.0], batch_size=32, seed=0, epoch=1)
    for batch in Loader(data, "train", jobs, config, inputs=[("image", "text")], train=True, epoch=1): ...

This file has the name of a library that it does not use: never add that one to the requirements.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from logging.handlers import BufferingHandler
from typing import Any

import numpy as np
import torch

from trimodal.config import Config
from trimodal.data import bad_samples, prepared
from trimodal.data.batches import VISIT, Batch, BatchReader, Jobs, Result, Split, prepare_split
from trimodal.data.codecs import KINDS, Kind
from trimodal.data.concepts import concept_names
from trimodal.data.samples import SPLITS, SampleTable, Strings
from trimodal.data.splits import carve_val, file_key
from trimodal.data.store import open_store
from trimodal.data.tokenizer import Tokenizer, load_tokenizer
from trimodal.data.workers import Workers, cpu_cores, in_line
from trimodal.errors import UserError, counted
from trimodal.sets import SETS, listed, read_splits

MAX_WORKERS = 8


@dataclass(frozen=True)
class Data:
    """All splits, and the names behind the numbers of a batch."""

    splits: dict[str, Split]
    tokenizer: Tokenizer
    concepts: tuple[str, ...]
    speakers: tuple[str, ...]
    listed: dict[str, dict[str, int]] = field(default_factory=dict)  # of sets that are never whole, see sets.listed

    @property
    def tables(self) -> dict[str, SampleTable]:
        return {name: split.table for name, split in self.splits.items()}

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Samples by set, split, and kind of inputs ("image+text"), and captions."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for split, table in self.tables.items():
            for code, source in enumerate(table.sources.names):
                rows = table.sources.codes == code
                has = np.stack([table.has_image, table.has_audio, table.has_text], 1)[rows]
                kinds = Counter("+".join(np.array(["image", "audio", "text"])[row]) for row in has)
                captions = int(table.caption_count[rows].sum())
                found.setdefault(source, {})[split] = {**dict(sorted(kinds.items())), "captions": captions}
        return found

    def names(self) -> list[str]:
        """The sets that have samples."""
        return sorted({name for table in self.tables.values() for name in table.sources.names})

    def licences(self) -> dict[str, str]:
        return {name: SETS[name].licence for name in self.names()}

    def available(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Of each split of a set that is never whole: its samples, how many there would be, and the SHA-256 of their
        sorted keys, a line each. Figures compare only where these are the same."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, of in self.listed.items():
            for split, table in self.tables.items():
                keys = sorted(table.keys[i] for i in range(len(table)) if table.sources[i] == name)
                digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode("utf-8", "surrogateescape"))
                found.setdefault(name, {})[split] = {"samples": len(keys), "of": of[split],
                                                     "sha256": digest.hexdigest()}
        return found

    def describe(self) -> dict[str, Any]:
        """Counts, digests and licences as plain JSON, for reports."""
        digests = {split: table.digest() for split, table in self.tables.items()}
        return {"counts": self.counts(), "digests": digests, "licences": self.licences(), "available": self.available(),
                "concepts": len(self.concepts), "speakers": len(self.speakers)}


def load_data(config: Config, splits: Sequence[str] = SPLITS, *, tokenizer: Tokenizer | None = None,
              concepts: Sequence[str] | None = None, speakers: Sequence[str] | None = None,
              fill_cache: Collection[Kind] = KINDS, inputs: Mapping[str, Any] | None = None) -> Data:
    """Read `config.data.datasets`, tokenise captions, choose concepts, and open the cache of decoded files, filled with
    those kinds of them that `fill_cache` names. `inputs`: how pretrained towers read what is theirs, by modality.

    A set without validation samples gives up 5 % of its training samples, whole files, see splits. `tokenizer`,
    `concepts` and `speakers` come from a checkpoint when it is evaluated.

    Raises:
        UserError: data is missing, too much of it is broken, or its labels are more than `model.num_classes`.
    """
    tables = read_tables(config, splits)
    tokenizer = tokenizer or load_tokenizer(config.model)
    train = tables.get("train") or SampleTable.pack([])
    if concepts is None:
        concepts = kept_concept_names(train, config)
    if speakers is None:
        speakers = speakers_with_sound(train)
    stores = {name: open_store(table, config, fill=fill_cache) for name, table in tables.items()}
    english = {name for name, data_set in SETS.items() if data_set.english}
    ready = {name: replace(prepare_split(store, config, tokenizer, concepts, speakers, english), inputs=inputs or {})
             for name, store in stores.items()}
    return Data(ready, tokenizer, tuple(concepts), tuple(speakers), listed(config))


def kept_concept_names(train: SampleTable, config: Config) -> list[str]:
    """`concept_names`, kept for later starts where there are many captions."""
    def names() -> list[str]:
        return concept_names(train, config.model.num_classes)

    if len(train.captions) < prepared.MANY:
        return names()
    state = prepared.digest([*train.arrays().values(), str(config.model.num_classes)])
    found = prepared.kept(config, "concepts", state, lambda: vars(Strings.pack(names())))
    return Strings(**found).tolist()


def speakers_with_sound(train: SampleTable) -> list[str]:
    """Names, sorted, of the speakers in the training split who have at least one sound."""
    return sorted(set(train.speakers.select(np.flatnonzero(train.has_audio)).names) - {""})


def read_tables(config: Config, splits: Sequence[str]) -> dict[str, SampleTable]:
    """The samples of each split of all sets, from their lists alone.

    Raises:
        UserError: data are missing, or there is nothing to train with.
    """
    parts: dict[str, list[SampleTable]] = {name: [] for name in splits}
    for source in config.data.datasets:
        wanted = set(splits) | ({"train", "val"} if {"train", "val"} & set(splits) else set())
        asked = [split for split in SPLITS if split in wanted]
        tables = read_set(source, asked, config)
        if not len(tables.get("val", ())) and len(tables.get("train", ())):
            tables["train"], tables["val"] = carve_val(tables["train"])
        for split in splits:
            parts[split].append(tables[split])
    joined = {split: SampleTable.concat(tables) for split, tables in parts.items()}
    if "train" in joined and not len(joined["train"]):
        raise UserError(f"data.datasets: {', '.join(config.data.datasets)}: no training samples; add a set, or give "
                        "some lines of the manifest the split 'train'")
    return joined


def read_set(name: str, splits: Sequence[str], config: Config) -> dict[str, SampleTable]:
    """The samples of some splits of one set, in their order. Those of a long list are kept for later starts, as long as
    the list and every file that it names stay the same: file, size and date of change.

    Raises:
        UserError: as `read_splits` does.
    """
    state = None
    with contextlib.suppress(OSError):  # reading it says what is wrong
        state = (of := SETS[name].state) and prepared.digest([of(config), *splits])
    known = prepared.load(config, name, state) if state else None
    if known is not None:
        tables = {split: SampleTable.from_arrays(prepared.part(known, split)) for split in splits}
        if known["files"].tobytes() == file_state(tables):
            for line in Strings(known["said.buffer"], known["said.offsets"]).tolist():
                logging.getLogger(__name__).warning("%s", line)
            return tables
    with listening("trimodal.sets") as said:
        by_split = itertools.groupby(read_splits(name, splits, config), key=lambda sample: sample.split)
        tables = {split: SampleTable.pack([]) for split in splits} | {
            split: SampleTable.pack(samples) for split, samples in by_split}
    files = file_state(tables)
    if state and files and sum(map(len, tables.values())) >= prepared.MANY:
        lines = Strings.pack(said)
        prepared.keep(config, name, state, {
            "files": np.frombuffer(files, np.uint8), "said.buffer": lines.buffer, "said.offsets": lines.offsets,
            **{f"{split}/{key}": array for split, table in tables.items() for key, array in table.arrays().items()}})
    return tables


def file_state(tables: Mapping[str, SampleTable]) -> bytes:
    """Digest of which files the samples name, their sizes and dates of change; empty where one is not there."""
    keys = []
    for paths in (paths for table in tables.values() for paths in (table.images, table.audio)):
        for path in filter(None, paths.distinct()[1]):
            keys.append(file_key(path))
            if keys[-1] == path:
                return b""
    return prepared.digest(keys).encode()


@contextlib.contextmanager
def listening(name: str) -> Iterator[list[str]]:
    """The lines that a logger is given within the block."""
    logger, handler, said = logging.getLogger(name), BufferingHandler(1_000_000), list[str]()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        said += [record.getMessage() for record in handler.buffer]
        logger.removeHandler(handler)


# ---- the order of an epoch ----------------------------------------------------------------------------------------


def epoch_batches(pools: Sequence[np.ndarray], passes: Sequence[float], batch_size: int, seed: int,
                  epoch: int) -> list[tuple[int, np.ndarray]]:
    """Batches of one epoch, (task, indices): every sample of pool i once in each of `passes[i]` passes.

    Batches of a pass are near-equal in size; a shuffle interleaves those of the tasks; a part of a pass takes a random
    part of the pool. A function of its arguments alone. Indices of the second and later passes carry VISIT.
    """
    cut: list[list[np.ndarray]] = []
    for task, (members, times) in enumerate(zip(pools, passes, strict=True)):
        rng = np.random.default_rng([seed, epoch, task + 1])  # 0 shuffles the turns
        cut.append([])
        for visit in range(math.ceil(times)):
            share = min(1.0, times - visit)
            order = rng.permutation(members)[:round(share * len(members))] + visit * VISIT
            if len(order):
                cut[task] += np.array_split(order, math.ceil(len(order) / batch_size))
    turns = np.repeat(np.arange(len(cut)), [len(batches) for batches in cut])
    turns = np.random.default_rng([seed, epoch, 0]).permutation(turns)
    queues = [iter(batches) for batches in cut]
    return [(task, next(queues[task])) for task in turns.tolist()]


# ---- the loader ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """Iterates over the batches of `jobs[start:]`, one for each job, in order, read ahead by worker processes.

    In evaluation (`train` false): no augmentation, whole sounds, all captions, draws of seed 0 and epoch 0 whatever is
    given, and broken samples left out, with them a batch that has no other. In training another good sample of the
    pool stands in for a broken one, none of them twice in a batch, as far as there are such.

    A process that dies is replaced, and its batch read again; a sample at which one stays longer than `data.timeout_s`
    counts as broken, from then on and in later runs of the folder. `say` receives a line for each such event. Batches
    are functions of their jobs alone, so none of this changes the others.

    Iterating raises:
        UserError: more than `data.max_bad_pct` of the samples of `jobs` are broken, or all of a pool; the folder of a
            set is gone; processes die again and again at one batch.
    """

    data: Data
    split: str
    jobs: Jobs
    config: Config
    _: KW_ONLY
    inputs: Sequence[tuple[str, ...]]  # of each task
    train: bool
    epoch: int
    workers: int | None = None  # None: as config.data.workers says
    start: int = 0
    say: Callable[[str], None] = print
    whole: Jobs | None = None  # the effective batches, where `jobs` are this process's shares of them

    def __len__(self) -> int:
        return len(self.jobs) - self.start

    def __iter__(self) -> Iterator[Batch]:
        split = self.data.splits[self.split]
        reader = BatchReader(split, self.jobs, self.inputs, self.config, self.train, self.epoch,
                             whole=self.whole)
        count = worker_count(self.config, 0 if reader.decodes_nothing else len(self)) if self.workers is None else (
            self.workers)
        jobs, skipped = range(self.start, len(self.jobs)), bad_samples.given_up(split.table, self.config)
        if not count:
            return _checked(in_line(reader.work, jobs, skipped), reader)
        pin = partial(_pin, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        return _checked(iter(Workers(
            reader.work, jobs, count, timeout_s=self.config.data.timeout_s, name=reader.name, say=self.say,
            skipped=skipped, finish=pin)), reader)


def worker_count(config: Config, num_jobs: int) -> int:
    """Processes that read ahead: `data.workers`, or as many as the cores and the jobs allow."""
    if config.data.workers != "auto":
        return config.data.workers
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun on this machine
    cores = cpu_cores() // sharing
    return min(cores - 1 if cores > 2 else 1, MAX_WORKERS, num_jobs)


def _pin(device: int, result: Result) -> Result:
    """Copy a batch to page-locked memory, in a thread, which does not know the device of the main one."""
    batch, broken = result
    with torch.cuda.device(device):
        return batch and batch.pin_memory(), broken


def _checked(results: Generator[Result, None, None], reader: BatchReader) -> Iterator[Batch]:
    """Pass batches on; record broken samples once, and stop when there are too many."""
    known: set[str] = set()
    first, passed = "", 0  # why the first batch without a good sample had none; batches passed on
    rows = [np.empty(0, np.int64), *(indices % VISIT for _, indices in reader.jobs)]
    total = len(np.unique(np.concatenate(rows)))
    with contextlib.closing(results):
        for batch, broken in results:
            fresh = [record for record in broken if record["key"] not in known]
            if fresh:
                known.update(record["key"] for record in fresh)
                bad_samples.record(fresh, reader.config)
                bad_samples.check("data", len(known), total, fresh[0]["reason"], reader.config)
            if batch is None:
                first = first or broken[0]["reason"]
                continue
            passed += 1
            yield batch
    if first and not passed:
        raise UserError(f"data: none of the {counted(total, 'sample')} can be read; the first: {first}")
