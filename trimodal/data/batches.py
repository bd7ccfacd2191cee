"""Batches of one split: choice of captions, augmentation, noise, collation.

All random numbers of a sample (caption, crop, flip, masks, noise) come from (seed, epoch, set, index, visit), so
batches do not depend on workers, on other samples or on where a run was resumed. There is no loader state to lose.

What a frozen tower reads is one of `data.views` fixed views of a sample (`read_view`), so that its features can be
kept; where they are, a batch holds them in place of the files and token ids that they were made from.

    reader = BatchReader(split, jobs, inputs=[("image", "text")], config=config, train=True, epoch=1)
    batch, broken = reader[0]

Shape suffixes: B samples, C captions, L text tokens, T mel frames, M mels, S pixels.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimodal import members
from trimodal.config import FRAME_RATE_HZ, NUM_MELS, Config
from trimodal.data import bad_samples, prepared
from trimodal.data.concepts import concepts_of
from trimodal.data.features import Features
from trimodal.data.images import augment, fit_eval
from trimodal.data.mirroring import may_mirror
from trimodal.data.samples import BrokenSample, SampleTable, normalise_caption, ragged_take, stable_hash
from trimodal.data.splits import audio_ids, image_ids
from trimodal.data.store import Store
from trimodal.data.tokenizer import Tokenizer, pad_rows
from trimodal.data.workers import NO_ITEM, report_nothing
from trimodal.errors import UserError

Jobs = Sequence[tuple[int, np.ndarray]]  # (task, sample indices) of each batch

VISIT = 1 << 40  # index + n * VISIT in a job is a sample's n-th repetition in an epoch, with its own random numbers
PATCH = 16  # pixels, frames and mels of a patch's side
PATH_DRAWS = 64  # uniforms for drop-path, more than any tower has blocks

TIME_MASKS, TIME_MASK_FRAMES, TIME_MASK_PCT = 2, 60, 15  # at most so many frames, and so much of the sound, each
MEL_MASKS, MEL_MASK_BANDS = 2, 16  # SpecAugment (arXiv:1904.08779) masks up to 27 of 80 bands of hours of speech


@dataclass(frozen=True)
class Split:
    """One split of all sets: its table and what is worked out once, as arrays that workers share."""

    table: SampleTable
    store: Store
    pad_id: int
    set_hash: np.ndarray  # int64 [n], 32 bits of the hash of the sample's set
    position: np.ndarray  # int64 [n], within the set: other sets do not change a sample's draws
    token_ids: np.ndarray  # int32, all captions one after another
    token_offsets: np.ndarray  # int64 [captions + 1]
    caption_ids: np.ndarray  # int64 [captions], equal for equal normalised captions
    concept_ids: np.ndarray  # int32, all samples one after another
    concept_offsets: np.ndarray  # int64 [n + 1]
    may_flip: np.ndarray  # bool [n]: mirrored, all captions and labels stay true, see mirroring
    speakers: np.ndarray  # int64 [n], position in Data.speakers, -1 = none or not a speaker of train
    image_ids: np.ndarray  # int64 [n], equal for equal files; of samples without a picture equal to no other
    audio_ids: np.ndarray  # int64 [n], equal for the same stretch of equal files; without a sound equal to no other
    # By modality whose tower is pretrained, how it reads: see trimodal.towers, ImageInput, TextInput, SoundReader.
    inputs: Mapping[str, Any] = field(default_factory=dict)
    # By modality whose tower is frozen: its features; None where the cache does not hold them.
    frozen: Mapping[str, Features | None] = field(default_factory=dict)
    caption_vectors: np.ndarray | None = None  # float16 [captions, W], see towers/captions; None: nothing needs them


def prepare_split(store: Store, config: Config, tokenizer: Tokenizer, concepts: Sequence[str],
                  speakers: Sequence[str], english: Collection[str]) -> Split:
    """Tokenise captions and work out all that batches need of a split. `english`: names of sets in that language."""
    table = store.table
    set_hash, position = _seeds(table)

    def of_words() -> dict[str, np.ndarray]:
        captions = table.captions.tolist()
        token_ids, token_offsets = tokenizer.encode_flat(captions, config.model.context_length)
        concept_ids, concept_offsets = concepts_of(table, concepts)
        return {"token_ids": token_ids, "token_offsets": token_offsets,
                "caption_ids": np.array([stable_hash(normalise_caption(text)) for text in captions], np.int64),
                "concept_ids": concept_ids, "concept_offsets": concept_offsets,
                "may_flip": may_mirror(table, english) if config.data.flip else np.zeros(len(table), bool)}

    if len(table.captions) < prepared.MANY:
        words = of_words()
    else:
        state = prepared.digest([*table.arrays().values(), tokenizer.to_json(), str(config.model.context_length),
                                 repr(list(concepts)), repr(sorted(english)), repr(config.data.flip)])
        words = dict(prepared.kept(config, "words", state, of_words))
    numbers = {name: number for number, name in enumerate(speakers)}
    by_code = np.array([numbers.get(name, -1) for name in table.speakers.names], np.int64)
    return Split(
        table=table, store=store, pad_id=tokenizer.pad_id, set_hash=set_hash, position=position,
        **words,  # type: ignore[arg-type]  # none of them is `frozen`
        speakers=by_code[table.speakers.codes],
        image_ids=image_ids(table), audio_ids=audio_ids(table),
    )


def _seeds(table: SampleTable) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each sample's set (32 bits) and its position within the set, int64 [n] each."""
    codes = table.sources.codes
    hashes = np.array([stable_hash(name) & 0xFFFFFFFF for name in table.sources.names], np.int64)
    position = np.zeros(len(table), np.int64)
    for code in range(len(hashes)):
        position[codes == code] = np.arange(np.count_nonzero(codes == code))
    return hashes[codes], position


Sound = tuple[np.ndarray, int]  # frames [T, M], and how many of them are real


def read_view(split: Split, modality: str, row: int, view: int, config: Config) -> Any:
    """A fixed view of a sample's image, as `read_image` gives it, or sound, as `read_sound` does: 0 is what evaluation
    reads, others are augmented by draws of (seed 0, set, index, view).

    Raises:
        BrokenSample: its file cannot be read.
    """
    rng = np.random.default_rng([0, 0, int(split.set_hash[row]), int(split.position[row]), view])
    if modality == "image":
        return read_image(split, row, rng, config, augmented=view > 0)
    return read_sound(split, row, rng, config, augmented=view > 0)


def read_image(split: Split, row: int, rng: np.random.Generator, config: Config, *, augmented: bool) -> np.ndarray:
    """A sample's image as the model reads it, uint8 [S, S, 3]."""
    image_HW3, data, size = split.store.image(row, rng), config.data, config.model.image_side
    if split.store.is_generated(row):
        return image_HW3  # made at this size; its place and colours are what the caption says
    if augmented:
        flip = bool(data.flip and split.may_flip[row])
        return augment(image_HW3, size, rng, min_crop=data.min_crop, fit=data.fit, flip=flip)
    return evaluated(image_HW3, config, split.inputs.get("image"))


def evaluated(image_HW3: np.ndarray, config: Config, taken: Any) -> np.ndarray:
    """An image without augmentation as the model reads it, uint8 [S, S, 3]. `taken`: how its pretrained tower reads,
    None where that is our own."""
    fit, size = config.data.fit, config.model.image_side
    if taken and fit == "crop":
        return fit_eval(image_HW3, size, taken.fit, taken.crop_pct, taken.filter)
    return fit_eval(image_HW3, size, fit, filter=taken.filter if taken else "bicubic")


def read_sound(split: Split, row: int, rng: np.random.Generator, config: Config, *, augmented: bool) -> Sound:
    """A sample's sound as the model reads it: a log-mel, float16 [T, 80], or the frames of a pretrained tower, float32
    [T, M]. Augmented it is a random stretch of at most `data.audio_max_s`."""
    longest_s, taken = config.data.audio_max_s, split.inputs.get("audio")
    if taken is None:
        mel_TM = split.store.mel(row, rng)
        mel_TM = crop_sound(mel_TM, int(longest_s * FRAME_RATE_HZ), rng) if augmented else mel_TM
        return mel_TM, len(mel_TM)
    wave_S = split.store.wave(row, taken.rate_hz, rng)
    return taken.frames(crop_sound(wave_S, int(longest_s * taken.rate_hz), rng) if augmented else wave_S)


def pad_captions(split: Split, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of some rows of the table's captions, int64 [C, L], and which of them are real, bool [C, L]."""
    return pad_rows(split.token_ids, split.token_offsets, captions, split.pad_id)


def pad_sounds(sounds: Sequence[Sound], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Sounds as one array [B, T, M], zeros behind the end, T a multiple of `multiple`, and their lengths, int64 [B]."""
    longest, first = max(len(frames_TM) for frames_TM, _ in sounds), sounds[0][0]
    audio_BTM = np.zeros((len(sounds), math.ceil(longest / multiple) * multiple, first.shape[1]), first.dtype)
    for b, (frames_TM, _) in enumerate(sounds):
        audio_BTM[b, :len(frames_TM)] = frames_TM
    return audio_BTM, np.array([length for _, length in sounds], np.int64)


def frame_multiple(split: Split) -> int:
    """Of how many frames batches of sounds are: a patch's for our own tower."""
    return 1 if "audio" in split.inputs else PATCH


def pool(table: SampleTable, inputs: Sequence[str]) -> np.ndarray:
    """Indices, int64 and ascending, of the samples that have all of `inputs`."""
    has = {"image": table.has_image, "text": table.has_text, "audio": table.has_audio}
    return np.flatnonzero(np.logical_and.reduce([has[name] for name in inputs]))


@dataclass
class Batch:
    """B samples of one kind of inputs, on the host. What the inputs lack is None.

    `noise` holds float32 uniforms in [0, 1) that take the place of every random draw of the model and the objectives:
    "image" [B, N], "audio" [B, T / 16 * 5], "text" [C, L], "path" [B, 64], "path_text" [C, 64], "drop_text" [B].
    """

    inputs: tuple[str, ...]
    keys: list[str]  # "source/key"
    sample_ids: Tensor  # int64 [B], rows of the split's table
    images: Tensor | None = None  # uint8 [B, 3, S, S]
    audio: Tensor | None = None  # float16 [B, T, 80], zeros behind the end, T a multiple of 16
    audio_lengths: Tensor | None = None  # int64 [B], frames
    input_ids: Tensor | None = None  # int64 [C, L], captions of sample 0 first
    attention_mask: Tensor | None = None  # bool [C, L]
    caption_owner: Tensor | None = None  # int64 [C], ascending
    caption_ids: Tensor | None = None  # int64 [C], equal for equal normalised captions
    caption_vectors: Tensor | None = None  # float16 [C, W], of length 1: their cosines say how alike captions are
    concepts: Tensor | None = None  # bool [B, num_classes]
    speakers: Tensor | None = None  # int64 [B], -1 = unknown
    image_ids: Tensor | None = None  # int64 [B], equal for equal pictures
    audio_ids: Tensor | None = None  # int64 [B], equal for the same stretch of equal sounds
    # of a tower whose outputs are kept: float16 or float32 [rows, 1 + N, D], and bool [rows, 1 + N], True ones first.
    # What they were made from (images, audio, input_ids) is None then.
    tokens: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    task: int = 0  # of its job

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; the loader calls it before transfers to a GPU."""
        pinned: dict[str, Any] = {f.name: value.pin_memory() for f in fields(self)
                                  if isinstance(value := getattr(self, f.name), Tensor)}
        tokens = {name: (values.pin_memory(), valid.pin_memory()) for name, (values, valid) in self.tokens.items()}
        return replace(self, **pinned, tokens=tokens,
                       noise={name: value.pin_memory() for name, value in self.noise.items()})


# A batch, None where in evaluation none of its samples can be read; and the records of its broken samples.
Result = tuple[Batch | None, list[dict[str, str]]]


@dataclass
class _Visit:
    """One visit of a sample, before collation."""

    row: int
    image_SS3: np.ndarray | None
    sound: Sound | None
    captions: np.ndarray  # rows of the table's captions
    views: dict[str, int]  # of frozen towers' inputs
    noise: dict[str, np.ndarray]
    rng: np.random.Generator  # for what depends on the longest sound of the batch; its leading numbers do not


@dataclass(frozen=True)
class BatchReader:
    """Item k is the batch of job k. `report` is called with the row of each sample before it is read."""

    split: Split
    jobs: Jobs
    inputs: Sequence[tuple[str, ...]]  # of each task
    config: Config
    train: bool
    epoch: int
    skipped: Mapping[int, str] = field(default_factory=dict)  # rows that are not to be read, and why
    report: Callable[[int], None] = report_nothing
    whole: Jobs | None = None  # the effective batches of which `jobs` are one process's shares; None: `jobs` are whole

    def __len__(self) -> int:
        return len(self.jobs)

    def work(self, k: int, skipped: Mapping[int, str], report: Callable[[int], None]) -> Result:
        """Item k, as the `work` of workers."""
        return replace(self, skipped=skipped, report=report)[k]

    def name(self, k: int, row: int) -> str:
        """Files of a sample of job k, or the keys of all its samples, for messages."""
        table, task = self.split.table, self.jobs[k][0]
        if row == NO_ITEM:
            return f"the batch of {sample_names(table, self.jobs[k][1] % VISIT)}"
        paths = {"image": table.images[row], "audio": table.audio[row]}
        named = dict.fromkeys(members.shown(paths[name]) for name in self.inputs[task] if paths.get(name))
        return " or ".join(named) or sample_names(table, np.array([row]))

    def __getitem__(self, k: int) -> Result:
        """Read, augment and collate the samples of job k.

        Raises:
            UserError: in training, no sample of the pool can be read; or the folder of a set is gone.
        """
        task, inputs = self.jobs[k][0], tuple(self.inputs[self.jobs[k][0]])
        broken: list[dict[str, str]] = []
        with one_thread():
            visits = self._read_all(k, inputs, broken)
            return replace(self._collate(visits, inputs), task=task) if visits else None, broken

    def _read_all(self, k: int, inputs: tuple[str, ...], broken: list[dict[str, str]]) -> list[_Visit]:
        """Samples of job k that can be read; in training, other samples of the pool stand in for those that cannot,
        none of them twice. Where no other is left, the batch is smaller."""
        wanted = [divmod(index, VISIT) for index in self.jobs[k][1].tolist()]
        found = [self._try(row, visit, inputs, broken) for visit, row in wanted]
        if self.train and None in found:
            taken: set[int] = set()
            found = [one or self._stand_in(k, row, visit, inputs, taken)
                     for one, (visit, row) in zip(found, wanted, strict=True)]
            if not any(found):
                bad_samples.record(broken, self.config)
                raise UserError(f"data: no sample of a batch can be read, and none of the "
                                f"{len(pool(self.split.table, inputs))} "
                                f"with {' and '.join(inputs)} can stand in; the first: {broken[0]['reason']}")
        return [one for one in found if one is not None]

    def _try(self, row: int, visit: int, inputs: tuple[str, ...], broken: list[dict[str, str]]) -> _Visit | None:
        try:
            return self._read(row, visit, inputs)
        except BrokenSample as error:
            self.split.store.check_folders(row)
            broken.append(self.split.store.record(row, str(error)))
            return None

    def _stand_in(self, k: int, row: int, visit: int, inputs: tuple[str, ...], taken: set[int]) -> _Visit | None:
        """A good sample that is neither in the whole batch nor in `taken`, to which it is added; None if there is none.

        Each position of the batch tries samples of its own first, so that ranks that share a batch take different ones
        without communication, and the same ones as a single process does.
        """
        whole = (self.whole or self.jobs)[k][1] % VISIT
        others = np.setdiff1d(pool(self.split.table, inputs), whole)
        others = np.roll(others, -int(np.searchsorted(others, whole[0])))  # other ones for each batch
        own = np.arange(len(others)) % len(whole) == np.flatnonzero(whole == row)[0]
        for candidate in [*others[own].tolist(), *others[~own].tolist()]:
            if candidate not in taken:
                try:
                    found = self._read(candidate, visit, inputs)
                except BrokenSample:
                    continue  # it is recorded in its own turn
                taken.add(candidate)
                return found
        return None

    def _read(self, row: int, visit: int, inputs: tuple[str, ...]) -> _Visit:
        split = self.split
        self.report(row)
        if row in self.skipped:
            raise BrokenSample(self.skipped[row])
        seed, epoch = (self.config.training.seed, self.epoch) if self.train else (0, 0)
        rng = np.random.default_rng([seed, epoch, int(split.set_hash[row]), int(split.position[row]), visit])
        noise = {"path": rng.random(PATH_DRAWS, np.float32), "drop_text": rng.random((), np.float32)}
        views = {name: self._choose_view(row, name, rng) for name in inputs if name in split.frozen}
        captions, image_SS3, sound = np.empty(0, np.int64), None, None
        if "text" in inputs:
            captions = self._choose_captions(row, rng)
            noise["path_text"] = rng.random((len(captions), PATH_DRAWS), np.float32)
            if self._may_hide("text"):
                noise["text"] = rng.random((len(captions), self.config.model.context_length), np.float32)
        if "image" in inputs and "image" not in self.cached:
            if self._may_hide("image"):
                noise["image"] = rng.random((self.config.model.image_side // PATCH) ** 2, np.float32)
            image_SS3 = (read_view(split, "image", row, views["image"], self.config) if "image" in views else
                         read_image(split, row, rng, self.config, augmented=self.train))
        if "audio" in inputs and "audio" not in self.cached:
            sound = self._sound(row, rng, views.get("audio"))
        return _Visit(row, image_SS3, sound, captions, views, noise, rng)

    def _may_hide(self, modality: str) -> bool:
        """Whether a part of what the tower reads may be hidden from it, by noise: of our own."""
        return modality not in self.split.inputs and modality not in self.cached

    @property
    def cached(self) -> list[str]:
        """The modalities whose features are read in place of their files."""
        return [name for name, features in self.split.frozen.items() if features]

    @property
    def decodes_nothing(self) -> bool:
        """Whether all that is read lies in the cache as features: then other processes would cost more than they do."""
        return bool(self.cached) and all(name in (*self.cached, "text") for inputs in self.inputs for name in inputs)

    def _choose_view(self, row: int, modality: str, rng: np.random.Generator) -> int:
        """Which view of a frozen tower's input is read; raises BrokenSample where it is known that there is none."""
        views = self.config.data.views if modality != "text" else 1
        view = int(rng.integers(views)) if self.train and views > 1 else 0
        if modality != "text" and (features := self.split.frozen[modality]):
            features.check(row, view)
        return view

    def _sound(self, row: int, rng: np.random.Generator, view: int | None) -> Sound:
        """A sample's sound, in training cut and, of our own tower, masked; or a view of it."""
        split = self.split
        if view is not None:
            return read_view(split, "audio", row, view, self.config)
        frames_TM, length = read_sound(split, row, rng, self.config, augmented=self.train)
        masks = self.train and self.config.data.spec_augment and "audio" not in split.inputs
        if masks and not split.store.is_generated(row):
            frames_TM = spec_augment(frames_TM, rng)
        return frames_TM, length

    def _choose_captions(self, row: int, rng: np.random.Generator) -> np.ndarray:
        offsets = self.split.table.caption_offsets
        captions = np.arange(offsets[row], offsets[row + 1])
        return rng.permutation(captions)[:self.config.training.captions_per_visit] if self.train else captions

    def _collate(self, visits: list[_Visit], inputs: tuple[str, ...]) -> Batch:
        self.report(NO_ITEM)
        table = self.split.table
        rows = np.array([one.row for one in visits], np.int64)
        noise = {"path": np.stack([one.noise["path"] for one in visits]),
                 "drop_text": np.stack([one.noise["drop_text"] for one in visits])}
        columns = {"sample_ids": rows, "concepts": self._concepts(rows)}
        if "text" in inputs:
            columns |= self._text(visits, noise)
        if "image" in inputs:
            columns["image_ids"] = self.split.image_ids[rows]
        if "image" in inputs and "image" not in self.cached:
            size = self.config.model.image_side
            columns["images"] = np.empty((len(visits), 3, size, size), np.uint8)
            for b, one in enumerate(visits):
                assert one.image_SS3 is not None
                columns["images"][b] = one.image_SS3.transpose(2, 0, 1)
            if self._may_hide("image"):
                noise["image"] = np.stack([one.noise["image"] for one in visits])
        if "audio" in inputs:
            if "audio" not in self.cached:
                columns |= self._sounds(visits, noise)
            columns |= {"speakers": self.split.speakers[rows], "audio_ids": self.split.audio_ids[rows]}
        tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in columns.items()}
        return Batch(inputs=inputs, keys=[f"{table.sources[row]}/{table.keys[row]}" for row in rows.tolist()],
                     tokens={name: self._features(name, visits, rows) for name in self.cached if name in inputs},
                     noise={name: torch.from_numpy(values) for name, values in noise.items()}, **tensors)

    def _features(self, modality: str, visits: list[_Visit], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        features = self.split.frozen[modality]
        assert features is not None
        if modality == "text":
            rows = np.concatenate([one.captions for one in visits])
        views = np.array([one.views.get(modality, 0) for one in visits] if modality != "text" else [0] * len(rows))
        tokens_BND, valid_BN = features.read(rows, views)
        return torch.from_numpy(tokens_BND), torch.from_numpy(valid_BN)

    def _concepts(self, rows: np.ndarray) -> np.ndarray:
        positions, offsets = ragged_take(self.split.concept_offsets, rows)
        hot = np.zeros((len(rows), self.config.model.num_classes), bool)
        hot[np.repeat(np.arange(len(rows)), np.diff(offsets)), self.split.concept_ids[positions]] = True
        return hot

    def _text(self, visits: list[_Visit], noise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        captions = np.concatenate([one.captions for one in visits])
        noise["path_text"] = np.concatenate([one.noise["path_text"] for one in visits])
        columns = {"caption_owner": np.repeat(np.arange(len(visits)), [len(one.captions) for one in visits]),
                   "caption_ids": self.split.caption_ids[captions]}
        if "text" not in self.cached:
            columns["input_ids"], columns["attention_mask"] = ids_CL, _ = pad_captions(self.split, captions)
            if self._may_hide("text"):
                noise["text"] = np.concatenate([one.noise["text"] for one in visits])[:, :ids_CL.shape[1]].copy()
        if self.split.caption_vectors is not None:
            columns["caption_vectors"] = self.split.caption_vectors[captions]
        return columns

    def _sounds(self, visits: list[_Visit], noise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        audio_BTM, lengths = pad_sounds([one.sound for one in visits if one.sound], frame_multiple(self.split))
        if self._may_hide("audio"):
            patches = audio_BTM.shape[1] // PATCH * (NUM_MELS // PATCH)
            noise["audio"] = np.stack([one.rng.random(patches, np.float32) for one in visits])
        return {"audio": audio_BTM, "audio_lengths": lengths}


def sample_names(table: SampleTable, rows: np.ndarray, shown: int = 3) -> str:
    """"source/key" of some rows."""
    names = [f"{table.sources[row]}/{table.keys[row]}" for row in rows[:shown].tolist()]
    return ", ".join(names) + (f" and {len(rows) - shown} more" if len(rows) > shown else "")


def crop_sound(frames_T: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of at most `longest` frames or samples."""
    if len(frames_T) <= longest:
        return frames_T
    start = int(rng.integers(len(frames_T) - longest + 1))
    return frames_T[start:start + longest]


def spec_augment(mel_TM: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with two stretches of time and two of frequency replaced by the sound's mean (arXiv:1904.08779)."""
    masked_TM = mel_TM.copy()
    mean = mel_TM.mean(dtype=np.float32)
    longest = min(TIME_MASK_FRAMES, len(mel_TM) * TIME_MASK_PCT // 100)
    for axis, limit in [(0, longest)] * TIME_MASKS + [(1, MEL_MASK_BANDS)] * MEL_MASKS:
        width = int(rng.integers(limit + 1))
        start = int(rng.integers(mel_TM.shape[axis] - width + 1))
        stretch = slice(start, start + width)
        masked_TM[(stretch, slice(None)) if axis == 0 else (slice(None), stretch)] = mean
    return masked_TM


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: log-mels of a second are slower with two, and equal numbers everywhere matter more."""
    threads = torch.get_num_threads()
    if threads == 1:  # as in every worker
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
