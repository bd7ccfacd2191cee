"""Shapes: what an operation on fake tensors gives, worked out once for each set of shapes that it meets.

FakeTensorMode keeps the shapes of results as well, but takes a third of a millisecond to look one up, most of the time
of a plan: a step is tens of thousands of operations, and blocks, micro-batches and steps repeat each other. Here a
result whose like is known is made at once; all others come from FakeTensorMode, which stays below.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.ops.prim.device.default  # how the device of a fake tensor is asked for: two calls in three
CPU = torch.device("cpu")
MOST_KNOWN = 200_000  # results; some hundred bytes each
VARYING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class _Output(NamedTuple):
    """One tensor of a result: a new one, a view of an argument, or the argument itself (`shape` None)."""

    argument: int | None  # place among the tensors given, of the one whose storage it has
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32


class _Result(NamedTuple):
    kind: type | None  # list or tuple of the outputs; None: a single one, or nothing
    outputs: tuple[_Output, ...]
    is_new: bool  # whether any of them has a storage of its own


_known: dict[tuple, _Result | None] = {}  # None: not to be made from its shapes alone


class Shapes:
    """Runs operations for a `FakeTensorMode` that is entered: what is known here, itself; the rest by calling them."""

    def __init__(self, mode: FakeTensorMode):
        self.mode = mode
        with torch._C._DisableTorchDispatch():
            self._state = dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), CPU)))

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        parts: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        if not _describe((args, kwargs), parts, tensors):
            return func(*args, **kwargs), None
        key = tuple(parts)
        known = _known.get(key, self)
        if known is self:
            result = func(*args, **kwargs)
            if len(_known) < MOST_KNOWN:
                _known[key] = self._remembered(func, key, (args, kwargs), tensors, result)
            return result, None
        if known is None:
            return func(*args, **kwargs), None
        made = [self._made(output, tensors) for output in known.outputs]
        return (known.kind(made) if known.kind else made[0] if made else None), made if known.is_new else ()

    def _made(self, output: _Output, tensors: Sequence[FakeTensor]) -> Tensor:
        argument, shape, stride, offset, dtype = output
        if shape is None:
            return tensors[argument]  # type: ignore[index]
        with torch._C._DisableTorchDispatch():
            if argument is None:
                inner = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                inner = torch.empty(0, dtype=dtype, device="meta")
                inner.set_(tensors[argument].untyped_storage(), offset, shape, stride)
            made = Tensor._make_subclass(FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=CPU)
        vars(made).update(self._state)
        return made

    def _remembered(self, func: Any, key: tuple, given: Any, tensors: Sequence[FakeTensor],
                    result: Any) -> _Result | None:
        """How to make `result` again; None where it depends on more than shapes, or is made like no other."""
        parts: list[Any] = list(key[:2])
        unchanged = _describe(given, parts, []) and tuple(parts) == key
        if _varies(func, tensors) or func in self.mode.lift_fns or not unchanged:
            return None
        kind = type(result) if isinstance(result, list | tuple) else None
        found = list(result) if kind else [] if result is None else [result]
        outputs = [self._output(tensor, tensors) for tensor in found]
        if None in outputs or kind not in (None, list, tuple) or not self._alike(found, outputs, tensors):
            return None
        return _Result(kind, tuple(outputs), any(output.argument is None for output in outputs))

    def _output(self, tensor: Any, tensors: Sequence[FakeTensor]) -> _Output | None:
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.fake_device != CPU:
            return None
        storages = [one.untyped_storage()._cdata for one in tensors]
        own = tensor.untyped_storage()._cdata
        sharing = [place for place, storage in enumerate(storages) if storage == own]
        if len(sharing) > 1:  # which of them it was is not told by shapes
            return None
        if sharing and tensors[sharing[0]] is tensor:
            return _Output(sharing[0])
        return _Output(sharing[0] if sharing else None, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(),
                       tensor.dtype)

    def _alike(self, found: Sequence[Tensor], outputs: Sequence[Any], tensors: Sequence[FakeTensor]) -> bool:
        """Whether what would be made is what was found, to the last byte of its storage."""
        new = [tensor.untyped_storage()._cdata for tensor, output in zip(found, outputs, strict=True)
               if output.argument is None]
        return len(set(new)) == len(new) and all(
            _facts(self._made(output, tensors)) == _facts(tensor) for tensor, output in zip(found, outputs, strict=True))


def _varies(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether shapes follow from values, or change in place. Of indexing only where a mask says what is taken."""
    if func is torch.ops.aten.index.Tensor:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return bool(VARYING.intersection(func.tags))


def _facts(tensor: Tensor) -> tuple:
    return (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.untyped_storage().nbytes(),
            tensor.requires_grad, torch._C._dispatch_key_set(tensor))


def _describe(value: Any, parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Adds to `parts` all that a result's shapes depend on, to `tensors` the tensors; False where there is more."""
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind is FakeTensor:
            if item.constant is not None:
                return False
            parts += (item.shape, item.stride(), item.dtype, item.storage_offset())
            tensors.append(item)
        elif kind is list or kind is tuple or kind is dict:
            parts.append((kind, *item) if kind is dict else len(item))
            if not _describe(item, parts, tensors):
                return False
        elif isinstance(item, Tensor):
            return False
        else:
            parts += (kind, item)
    return True
