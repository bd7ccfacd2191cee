"""Footprint: the bytes of all tensors that live during a step, their peak, and what they were at that moment.

`PeakMemory` follows every storage through a dispatch mode, on real tensors or on fake ones (shapes without bytes), so
the step that trains is the step that is measured. Modules may run any number of times in a step.

    with tracing() as tracker:                       # fake CPU tensors: needs no memory and no GPU
        model = build(); tracker.watch(model.parameters())
        loss = step(model); loss.backward()
    tracker.usage().peak_bytes

In `tracing` most results come from `shapes`, which repeats those of earlier operations of the same shapes: much faster,
to the same byte.
What is made under `phase(HOST)` waits in the host's memory while the step runs on a device, and is left out.
`tracing(limit_bytes=...)` ends with `OverLimit` as soon as more than that lives, long before the step is through.

A step says what it is doing by `phase` and `loss_ends_at`, which do nothing when no tracker follows it.
"""

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from trimodal.memory.shapes import DEVICE, Shapes

TAGS = ("parameters", "gradients", "optimizer", "activations", "loss", "data")
HOST = "host"  # tag of storages that wait in the host's memory while the step runs on a device: they do not count
BLOCK_BYTES = 512  # the CUDA allocator hands out multiples of this


class Usage(NamedTuple):
    """Bytes of all live tensors at the moment of the peak, and what they were."""

    peak_bytes: int
    by_tag: dict[str, int]


class OverLimit(Exception):
    """More bytes are live than the tracker's limit."""


class _Block:
    """A live storage: `reference` tells when it dies."""

    __slots__ = ("reference", "size", "tag")

    def __init__(self, reference: weakref.ref, size: int, tag: str):
        self.reference, self.size, self.tag = reference, size, tag


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every storage that is made or touched while it is entered, real or fake.

    A storage counts once however many views it has, in whole blocks of `granularity` bytes, from the operation that
    returns it until it is freed. Enter it after (inside) a FakeTensorMode. What one operation allocates and frees
    within itself is not seen, nor is anything inside a compiled graph.
    """

    def __init__(self, granularity: int = BLOCK_BYTES, limit_bytes: int | None = None, shapes: Shapes | None = None):
        super().__init__()
        self._shapes = shapes
        self.granularity, self.limit_bytes = granularity, limit_bytes
        self.tag = "activations"  # of storages that appear from now on
        self.live_bytes = 0
        self.peak_bytes = 0
        self.live_by_tag = dict.fromkeys(TAGS, 0)
        self._at_peak = dict(self.live_by_tag)
        self._blocks: dict[int, _Block] = {}
        self._hooks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._shapes is None:
            result, touched = func(*args, **kwargs), None
        elif func is DEVICE:
            return args[0].fake_device
        else:
            result, touched = self._shapes.run(func, args, kwargs)
        for tensor in _tensors((args, kwargs, result)) if touched is None else touched:
            self._see(tensor.untyped_storage())
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch does not wrap each of the many calls to keep its compiler out; nothing is compiled in here.
        Private; in torch 2.11 to 2.14."""
        return False

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._blocks.clear()  # and with it the callbacks: storages that live on are no longer followed

    def mark(self, tag: str, *trees: Any) -> None:
        """Count every tensor in `trees` (nested lists, tuples, dicts; `vars(batch)` of a dataclass) as `tag`."""
        for tensor in _tensors(trees):
            block = self._see(tensor.untyped_storage())
            self.live_by_tag[block.tag] -= block.size
            block.tag = tag
            self.live_by_tag[tag] = self.live_by_tag.get(tag, 0) + block.size

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Count these as parameters, and what backward leaves in their `.grad` as gradients."""
        for parameter in parameters:
            self.mark("parameters", parameter)
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: self.mark("gradients", p.grad))
                self._hooks.append(hook)

    def held(self) -> list[tuple[UntypedStorage, str]]:
        """All storages that live now, with their tags, for the `hold` of later trackers."""
        return [(storage, block.tag) for block in self._blocks.values() if (storage := block.reference()) is not None]

    def hold(self, held: Iterable[tuple[UntypedStorage, str]]) -> None:
        """Count these from now on."""
        for storage, tag in held:
            with phase(tag):
                self._see(storage)

    def usage(self) -> Usage:
        return Usage(self.peak_bytes, {tag: size for tag, size in self._at_peak.items() if size or tag in TAGS})

    def _see(self, storage: UntypedStorage) -> _Block:
        key = storage._cdata
        block = self._blocks.get(key)
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        if block is not None and block.reference() is not storage:  # its owner died, the callback has yet to come
            self._count(-block.size, block.tag)
            block = None
        if block is None:
            block = _Block(weakref.ref(storage, lambda dead: self._free(key, dead)), 0, self.tag)
            self._blocks[key] = block
        if size != block.size and block.tag != HOST:  # new, or resized in place
            self._count(size - block.size, block.tag)
            block.size = size
        return block

    def _free(self, key: int, dead: weakref.ref) -> None:
        block = self._blocks.get(key)
        if block is not None and block.reference is dead:  # else the address has a new owner by now
            del self._blocks[key]
            self._count(-block.size, block.tag)

    def _count(self, change: int, tag: str) -> None:
        self.live_bytes += change
        self.live_by_tag[tag] = self.live_by_tag.get(tag, 0) + change
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._at_peak = dict(self.live_by_tag)
            if self.limit_bytes is not None and self.peak_bytes > self.limit_bytes:
                raise OverLimit


@contextlib.contextmanager
def tracing(limit_bytes: int | None = None, mode: FakeTensorMode | None = None) -> Iterator[PeakMemory]:
    """All tensors made inside are fake, of `mode` if it is given, and counted.

    Raises (from the operation that needs too much):
        OverLimit: more than `limit_bytes` live.
    """
    collects = gc.isenabled()
    gc.disable()  # a tenth faster; and what only the collector would free counts, as it may on a real device
    try:
        with (mode or FakeTensorMode() as mode, disable_fake_tensor_cache(mode),  # Shapes keeps what it would
              PeakMemory(limit_bytes=limit_bytes, shapes=Shapes(mode)) as tracker):
            yield tracker
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def phase(tag: str) -> Iterator[None]:
    """Count what is allocated in the block as `tag`. Without an active tracker, as in training, it does nothing."""
    tracker = _active_tracker()
    if tracker is None:
        yield
        return
    before, tracker.tag = tracker.tag, tag
    try:
        yield
    finally:
        tracker.tag = before


def loss_ends_at(features: Tensor) -> Tensor:
    """Marks where the loss begins: backward, run under `phase("loss")`, counts as activations once it is back here."""
    tracker = _active_tracker()
    if tracker is not None and features.requires_grad:
        features.register_hook(lambda gradient: setattr(tracker, "tag", "activations"))
    return features


def _active_tracker() -> PeakMemory | None:
    modes = _get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, PeakMemory)), None)


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts. Runs for every operation, so it is a plain loop."""
    found, waiting = [], [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return found
