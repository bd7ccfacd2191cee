"""A model for use: it encodes images, texts and sounds, compares them, and classifies by prompts.

    m = model.open_model("outputs/demo")
    pictures = m.encode(images=["dog.jpg", "cat.jpg"])               # float32 [2, F], each of length 1
    m.compare(pictures, m.encode(texts=["a dog", "a cat"]))          # cosines [2, 2]
    m.classify(["a dog", "a cat"], images="dog.jpg")                 # probabilities [1, 2]

Shape suffixes: N items, F embed_dim, K prompts.
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from trimodal.data.samples import BrokenSample
from trimodal.data.workers import cpu_cores
from trimodal.errors import UserError
from trimodal.inference import given as given_inputs
from trimodal.inference.prepared import Prepared
from trimodal.memory.micro_batches import MicroBatches
from trimodal.towers.base import digest_of
from trimodal.towers.features import exact_products

NAMES = {"image": "images", "text": "texts", "audio": "audio"}  # of the arguments, by modality
BATCH_SIZE = {"cpu": 32, "cuda": 128, "mps": 32}
MAX_THREADS = 8
TEXTS_AT_ONCE = 1024  # tokenised, before any of them is encoded

OnBroken = Callable[[int, str], None]


class OpenModel:
    """What model.open_model returns.

    Attributes:
        modalities: those that it reads, of "image", "text" and "audio".
        embed_dim: F.
        description: where it comes from and what it is, as plain data.
        device: where it computes.
    """

    def __init__(self, model: Any, device: torch.device, amp: torch.dtype | None, description: Mapping[str, Any]):
        """`model`: a CheckpointModel or a HubModel on `device`. `amp`: of autocast; None: float32."""
        self._model, self.device, self._amp = model, device, amp
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

    def _encode(self, modality: str, elements: Iterable[Any], count: int | None, batch_size: int | None,
                progress: bool | None, on_broken: OnBroken | None) -> Tensor:
        micro_batches = self._micro_batches(batch_size)
        numbers, features = list[int](), list[Tensor]()
        broken = list[int]()
        bar = tqdm(total=count, desc=f"encoding {NAMES[modality]}", unit=modality, disable=None if progress is None else
                   not progress, delay=1.0 if progress is None else 0.0)
        with bar:
            for batch in _batches(self._prepared(modality, elements, count, on_broken, broken), modality,
                                  micro_batches):
                numbers += [number for number, _ in batch]
                features += self._features(modality, [item for _, item in batch], micro_batches)
                bar.update(len(batch))
        found = torch.full((len(numbers) + len(broken), self.embed_dim), torch.nan)
        if numbers:
            found[torch.tensor(numbers)] = torch.cat(features)
        return found

    def compare(self, a_NF: Tensor, b_KF: Tensor) -> Tensor:
        """Cosines of what `encode` gave, [N, K]; a NaN wherever a row could not be read."""
        for name, features in (("a", a_NF), ("b", b_KF)):
            if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.embed_dim:
                shape = list(getattr(features, "shape", [])) or type(features).__name__
                raise UserError(f"compare: {name} is {shape}; expected what encode gives, [N, {self.embed_dim}]")
        return F.normalize(a_NF.float(), dim=-1) @ F.normalize(b_KF.float(), dim=-1).T.to(a_NF.device)

    def classify(self, prompts: Iterable[str | Sequence[str]], *, images: Any = None, texts: Any = None,
                 audio: Any = None, batch_size: int | None = None, progress: bool | None = None,
                 on_broken: OnBroken | None = None) -> Tensor:
        """Probabilities of each prompt, [N, K], that sum to 1: a softmax of cosines at the temperature of training.

        Args:
            prompts: a text for each class, or several texts, whose mean is taken.
            images, texts, audio, batch_size, progress, on_broken: as for `encode`.
        """
        groups = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        if isinstance(prompts, str) or not groups or not all(groups):
            raise UserError("classify: prompts: expected a list with a text, or several texts, for each class")
        modality, elements, count = self._the_one(images=images, texts=texts, audio=audio)
        features_NF = self._encode(modality, elements, count, batch_size, progress, on_broken)
        each = self.encode(texts=[prompt for group in groups for prompt in group]).split(list(map(len, groups)))
        scale = self._model.temperature(modality, "text") if modality != "text" else 100.0
        classes_KF = torch.stack([features.mean(0) for features in each])
        return (scale * self.compare(features_NF, classes_KF)).softmax(dim=-1)

    # ---- one modality -------------------------------------------------------------------------------------------

    def _the_one(self, **given: Any) -> tuple[str, Iterable[Any], int | None]:
        """The modality that was given, its elements, and how many they are."""
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise UserError(f"expected exactly one of images, texts and audio, got {' and '.join(names) or 'none'}")
        modality = next(modality for modality, name in NAMES.items() if name == names[0])
        if modality not in self.modalities:
            raise UserError(f"{names[0]}: this model reads {' and '.join(self.modalities)}")
        return modality, *given_inputs.listed(names[0], given[names[0]])

    def _prepared(self, modality: str, elements: Iterable[Any], count: int | None, on_broken: OnBroken | None,
                  broken: list[int]) -> Iterator[tuple[int, Prepared]]:
        """Yield the number of each element, and what it has become; those that cannot be read are added to `broken`."""
        if modality == "text":
            yield from self._texts(elements)
            return
        threads = 1 if count == 1 else min(cpu_cores(), MAX_THREADS)
        for number, found in enumerate(_ahead(functools.partial(self._read, modality), elements, threads)):
            if isinstance(found, Prepared):
                yield number, found
                continue
            if isinstance(found, given_inputs.WrongType):
                name = NAMES[modality]
                raise UserError(f"{name}[{number}]: is a {found}; expected {given_inputs.EXPECTED[name]}")
            if on_broken is None:
                raise UserError(f"{NAMES[modality]}[{number}]: {found}")
            broken.append(number)
            on_broken(number, str(found))

    def _read(self, modality: str, element: Any) -> Prepared | Exception:
        try:
            if modality == "image":
                prepared: Prepared = self._model.read_image(given_inputs.picture(element))
            else:
                prepared = self._model.read_sound(given_inputs.sound(element, self._model.rate_hz))
            return prepared
        except (BrokenSample, given_inputs.WrongType) as error:
            return error

    def _texts(self, elements: Iterable[Any]) -> Iterator[tuple[int, Prepared]]:
        numbered, cut = enumerate(elements), list[int]()
        while part := list(islice(numbered, TEXTS_AT_ONCE)):
            for number, value in part:
                if not isinstance(value, str):
                    raise UserError(f"texts[{number}]: is a {type(value).__name__}; expected a text")
            for (number, _), prepared in zip(part, self._model.read_texts([value for _, value in part]), strict=True):
                if prepared.is_cut:
                    cut.append(number)
                yield number, prepared
        if cut:
            warnings.warn(f"{len(cut)} texts are longer than the model reads, and were cut there as in training; the "
                          f"first is texts[{cut[0]}]", stacklevel=5)

    # ---- batches ------------------------------------------------------------------------------------------------

    def _micro_batches(self, batch_size: int | None) -> MicroBatches:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is below 1")
        size = batch_size or BATCH_SIZE[self.device.type]
        return MicroBatches(self.device, self._amp, dict.fromkeys(NAMES, size))

    @torch.inference_mode()
    def _features(self, modality: str, items: Sequence[Prepared], micro_batches: MicroBatches) -> list[Tensor]:
        """Float32 on the CPU, [n, F] of each micro-batch."""
        values = [item.value for item in items]

        def work(rows: slice) -> Tensor:
            features: Tensor = self._model.features(modality, values[rows])
            return features.float().cpu()

        with exact_products():
            return micro_batches.of((modality,), len(items), work, weight=_weight(modality, items[0]))


def _weight(modality: str, item: Prepared) -> int:
    return item.steps if modality == "audio" else 1


def _batches(prepared: Iterable[tuple[int, Prepared]], modality: str,
             micro_batches: MicroBatches) -> Iterator[list[tuple[int, Prepared]]]:
    """Yield lists of numbered items with equal `steps`, each as soon as it fills a micro-batch, the rest at the end."""
    waiting: dict[int, list[tuple[int, Prepared]]] = {}
    for number, item in prepared:
        alike = waiting.setdefault(item.steps, [])
        alike.append((number, item))
        if len(alike) * _weight(modality, item) >= micro_batches.size[modality]:
            yield waiting.pop(item.steps)
    yield from waiting.values()


def _ahead(work: Callable[[Any], Any], elements: Iterable[Any], threads: int) -> Iterator[Any]:
    """Yield, in order, what `work` makes of each element; so many threads do it, one element each ahead."""
    if threads == 1:
        yield from map(work, elements)
        return
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(threads, "reading")
    try:
        for element in elements:
            waiting.append(pool.submit(work, element))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
