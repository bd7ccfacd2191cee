"""A model for use: it encodes images, texts and sounds, compares them, and classifies by prompts.

    m = model.open_model("outputs/demo")
    pictures = m.encode(images=["dog.jpg", "cat.jpg"])               # float32 [2, F], each of length 1
    m.compare(pictures, m.encode(texts=["a dog", "a cat"]))          # cosines [2, 2]
    m.classify(["a dog", "a cat"], images="dog.jpg")                 # probabilities [1, 2]

Shape suffixes: N items, F embed_dim, K prompts.
"""

import functools
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, zip_longest
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from trimodal.data.samples import BrokenSample
from trimodal.data.workers import cpu_cores
from trimodal.errors import UserError, counted
from trimodal.inference.given import EXPECTED, WrongType, listed, picture, sound
from trimodal.inference.prepared import BROKEN, Prepared
from trimodal.memory.micro_batches import MicroBatches
from trimodal.towers.base import digest_of
from trimodal.towers.features import exact_products

NAMES = {"image": "images", "text": "texts", "audio": "audio"}  # of the arguments, by modality
BATCH_SIZE = {"cpu": 32, "cuda": 128, "mps": 32}
MAX_THREADS = 8
TEXTS_AT_ONCE = 1024  # tokenised, before any of them is encoded
HALF = re.compile("[\ud800-\udfff]")  # of a UTF-16 pair; also a byte that Python could not decode

OnBroken = Callable[[int, str], None]


class TextsCut(UserWarning):
    """Texts are longer than the model reads."""


class OpenModel:
    """What model.open_model returns. Threads may share it.

    Attributes:
        modalities: those that it reads, of "image", "text" and "audio".
        embed_dim: F.
        description: where it comes from and what it is, as plain data.
        device: where it computes.
    """

    def __init__(self, model: Any, device: torch.device, amp: torch.dtype | None, description: Mapping[str, Any]):
        """`model`: a CheckpointModel or a HubModel on `device`. `amp`: of autocast; None: float32."""
        self._model, self.device, self._amp = model, device, amp
        self._lock = threading.Lock()  # of the tokenizer, whose settings change, and of the device
        self.modalities: tuple[str, ...] = tuple(model.modalities)
        self.embed_dim = int(model.embed_dim)
        self.description = dict(description)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, in hex: features of models with equal digests may be compared."""
        return digest_of(self._model.model)

    def encode(self, *, images: Any = None, texts: Any = None, audio: Any = None, batch_size: int | None = None,
               progress: bool | None = None, on_broken: OnBroken | None = None) -> Tensor:
        """Encode one or many items of one modality: float32 [N, F] on the CPU, each row of length 1.

        Args:
            images, texts, audio: exactly one of them: an element, or an iterable of elements, which is read as it is
                needed. Of images a path (of a video, its middle), a picture of PIL, an array [H, W, 3] or a tensor
                [3, H, W], uint8 or floats from 0 to 1; of audio a path (of a video, its sound) or a pair (waveform,
                rate in Hz), the waveform [S], or with channels on its shorter side.
            batch_size: so many at a time, of audio windows (10 s); None: by the device. Changes speed and memory alone.
            progress: whether to show a progress bar on stderr; None: if it takes over a second, and is a terminal.
            on_broken: called with the number of each element that cannot be read, and why; its row is NaN then. None:
                the first such element raises.

        Raises:
            UserError: elements of another type, one that cannot be read, a modality that the model lacks, or out of
                memory with one element at a time.
        """
        modality, elements, count = self._the_one(images=images, texts=texts, audio=audio)
        return self._encode(modality, elements, count, batch_size, progress, on_broken)

    def fuse(self, *, images: Any = None, texts: Any = None, audio: Any = None, batch_size: int | None = None,
             progress: bool | None = None) -> Tensor:
        """Encode items of several modalities together, through the fusion: [N, F] as `encode` gives it. Element i of
        each list is of item i.

        Raises:
            UserError: as `encode` does; lists of different lengths; or a model without a fusion.
        """
        if not self._model.fuses:
            raise UserError(f"fuse: {self.description['source']} has no fusion; use encode")
        given = self._given(images=images, texts=texts, audio=audio)
        counts = [count for _, count in given.values() if count is not None]
        size = self._batch_size(batch_size)
        streams = [self._prepared(name, elements, count, size) for name, (elements, count) in given.items()]
        return self._in_batches("fused", _together(tuple(given), streams), min(counts, default=None), size, progress)

    def compare(self, a_NF: Tensor, b_KF: Tensor) -> Tensor:
        """Cosines of what `encode` gave, [N, K]; a NaN wherever a row could not be read."""
        for name, features in (("a", a_NF), ("b", b_KF)):
            if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.embed_dim:
                shape = list(getattr(features, "shape", [])) or type(features).__name__
                raise UserError(f"compare: {name} is {shape}; expected what encode gives, [N, {self.embed_dim}]")
        return F.normalize(a_NF.float(), dim=-1) @ F.normalize(b_KF.float(), dim=-1).T.to(a_NF.device)

    def classify(self, prompts: Iterable[str | Sequence[str]], *, images: Any = None, audio: Any = None,
                 batch_size: int | None = None, progress: bool | None = None,
                 on_broken: OnBroken | None = None) -> Tensor:
        """Probabilities of each prompt, [N, K], that sum to 1: a softmax of cosines at the temperature of training.

        Args:
            prompts: a text for each class, or several texts, whose mean is taken.
            images, audio, batch_size, progress, on_broken: as for `encode`.
        """
        try:
            groups = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        except TypeError:  # not iterable
            groups = []
        if isinstance(prompts, str) or not groups or not all(groups):
            raise UserError("classify: prompts: expected a list with a text, or several texts, for each class")
        modality, elements, count = self._the_one(images=images, texts=None, audio=audio)
        features_NF = self._encode(modality, elements, count, batch_size, progress, on_broken)
        each = self.encode(texts=[prompt for group in groups for prompt in group]).split(list(map(len, groups)))
        classes_KF = torch.stack([features.mean(0) for features in each])
        return (self._model.scale(modality) * self.compare(features_NF, classes_KF)).softmax(dim=-1)

    # ---- what is given ------------------------------------------------------------------------------------------

    def _given(self, **given: Any) -> dict[str, tuple[Iterable[Any], int | None]]:
        """The elements of each modality that was given, and how many they are."""
        found = {}
        for modality, name in NAMES.items():
            if given[name] is not None:
                if modality not in self.modalities:
                    raise UserError(f"{name}: this model reads {' and '.join(self.modalities)}")
                found[modality] = listed(name, given[name])
        if not found:
            raise UserError(f"nothing to encode: give {', '.join(NAMES.values())}")
        return found

    def _the_one(self, **given: Any) -> tuple[str, Iterable[Any], int | None]:
        found = self._given(**given)
        if len(found) > 1:
            raise UserError(f"expected one of {', '.join(NAMES.values())}, got "
                            f"{' and '.join(NAMES[name] for name in found)}; fuse takes several")
        [(modality, (elements, count))] = found.items()
        return modality, elements, count

    def _prepared(self, modality: str, elements: Iterable[Any], count: int | None, size: int,
                  on_broken: OnBroken | None = None) -> Iterator[Prepared]:
        """Yield what each element has become; BROKEN where it cannot be read and `on_broken` was told so. About `size`
        are prepared ahead."""
        if modality == "text":
            yield from self._texts(elements)
            return
        name, threads = NAMES[modality], 1 if count == 1 else min(cpu_cores(), MAX_THREADS)
        for number, found in enumerate(_ahead(functools.partial(self._read, modality), elements, threads, size)):
            if isinstance(found, Prepared):
                yield found
            elif isinstance(found, WrongType):
                raise UserError(f"{name}[{number}]: is a {found}; expected {EXPECTED[name]}")
            elif on_broken is None:
                raise UserError(f"{name}[{number}]: {found}")
            else:
                on_broken(number, str(found))
                yield BROKEN

    def _read(self, modality: str, element: Any) -> Prepared | Exception:
        try:
            if modality == "image":
                prepared: Prepared = self._model.read_image(picture(element))
            else:
                prepared = self._model.read_sound(sound(element, self._model.rate_hz))
            return prepared
        except (BrokenSample, WrongType) as error:
            return error

    def _texts(self, elements: Iterable[Any]) -> Iterator[Prepared]:
        remaining, first, cut = iter(elements), 0, list[int]()
        while texts := list(islice(remaining, TEXTS_AT_ONCE)):
            for number, text in enumerate(texts, first):
                if not isinstance(text, str):
                    raise UserError(f"texts[{number}]: is a {type(text).__name__}; expected {EXPECTED['texts']}")
                if half := HALF.search(text):
                    raise UserError(f"texts[{number}]: holds half a character, {ascii(half[0])[1:-1]}; decode it anew")
            with self._lock:
                found = self._model.read_texts(texts)
            cut += [number for number, prepared in enumerate(found, first) if prepared.is_cut]
            first += len(texts)
            yield from found
        if cut:
            warnings.warn(f"{counted(len(cut), 'text')} cut to what the model reads, as in training; the first is "
                          f"texts[{cut[0]}]", TextsCut, stacklevel=2)

    # ---- in batches ---------------------------------------------------------------------------------------------

    def _encode(self, modality: str, elements: Iterable[Any], count: int | None, batch_size: int | None,
                progress: bool | None, on_broken: OnBroken | None) -> Tensor:
        size = self._batch_size(batch_size)
        return self._in_batches(modality, self._prepared(modality, elements, count, size, on_broken), count, size,
                                progress)

    def _batch_size(self, given: int | None) -> int:
        if given is not None and (not isinstance(given, Integral) or given < 1):
            raise UserError(f"batch_size: {given!r}; expected a whole number from 1 on")
        return given or BATCH_SIZE[self.device.type]

    def _in_batches(self, modality: str, prepared: Iterable[Prepared], count: int | None, size: int,
                    progress: bool | None) -> Tensor:
        """Features of all items in their order, [N, F], whatever the order in which they were encoded."""
        micro_batches = MicroBatches(self.device, self._amp, {modality: size})
        numbers, features = list[int](), [torch.empty(0, self.embed_dim)]
        with tqdm(total=count, desc=f"encoding {NAMES.get(modality, modality)}", unit="",
                  delay=1.0 if progress is None else 0.0, disable=None if progress is None else not progress) as bar:
            for batch in _alike(prepared, size):
                numbers += [number for number, _ in batch]
                features += self._features(modality, [item for _, item in batch], micro_batches)
                bar.update(len(batch))
        found_NF = torch.empty(len(numbers), self.embed_dim)
        found_NF[torch.tensor(numbers, dtype=torch.int64)] = torch.cat(features)
        return found_NF

    @torch.inference_mode()
    def _features(self, modality: str, items: Sequence[Prepared], micro_batches: MicroBatches) -> list[Tensor]:
        """Float32 on the CPU, [n, F] of each micro-batch of items that are alike."""
        if items[0] is BROKEN:
            return [torch.full((len(items), self.embed_dim), torch.nan)]

        def work(rows: slice) -> Tensor:
            features: Tensor = self._model.features(modality, [item.value for item in items[rows]])
            return features.float().cpu()

        with self._lock, exact_products():
            return micro_batches.of((modality,), len(items), work, weight=items[0].weight)


def _together(modalities: tuple[str, ...], streams: Sequence[Iterator[Prepared]]) -> Iterator[Prepared]:
    """Yield the inputs of each item in all of its modalities as one."""
    for parts in zip_longest(*streams):
        if None in parts:
            raise UserError(f"fuse: {' and '.join(NAMES[name] for name in modalities)} differ in length")
        yield Prepared({name: part.value for name, part in zip(modalities, parts, strict=True)},
                       steps=tuple(part.steps for part in parts), weight=max(part.weight for part in parts))


def _alike(prepared: Iterable[Prepared], size: int) -> Iterator[list[tuple[int, Prepared]]]:
    """Yield lists of numbered items with equal `steps`, each as soon as its items weigh `size`, the rest at the end."""
    waiting: dict[Any, list[tuple[int, Prepared]]] = {}
    for number, item in enumerate(prepared):
        alike = waiting.setdefault(item.steps, [])
        alike.append((number, item))
        if len(alike) * item.weight >= size:
            yield waiting.pop(item.steps)
    yield from waiting.values()


def _ahead(work: Callable[[Any], Any], elements: Iterable[Any], threads: int, size: int) -> Iterator[Any]:
    """Yield, in order, what `work` makes of each element. Threads do it for the next `size` elements, or for fewer
    where what they have made weighs as much: while a batch is encoded, they read the one after it."""
    if threads == 1:
        yield from map(work, elements)
        return
    remaining, waiting = iter(elements), deque[Future[Any]]()
    pool = ThreadPoolExecutor(threads, "reading")
    try:
        while True:
            while len(waiting) < size and sum(map(_weight, waiting)) < size:
                try:
                    waiting.append(pool.submit(work, next(remaining)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _weight(reading: Future[Any]) -> int:
    return getattr(reading.result(), "weight", 0) if reading.done() else 0
