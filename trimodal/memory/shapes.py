"""Shapes: what an operation on fake tensors gives, worked out once for each set of shapes that it meets.

A step is ten thousands of operations, and its blocks, micro-batches and repetitions are much alike. FakeTensorMode
takes a third of a millisecond for each, even for one that it has kept, which is most of the time of a plan; here a
result whose like is known is made in a tenth of that. All others come from FakeTensorMode, which stays below.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.ops.prim.device.default  # how fake tensors are asked for their device: two calls in three
CPU = torch.device("cpu")
VARYING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class _Output(NamedTuple):
    """How to make one tensor of a result: as a new tensor, as a view of an input tensor, or as that input itself."""

    given: int = -1  # index of the input tensor whose storage it shares; -1: it has its own
    shape: tuple[int, ...] | None = None  # None: it is that input itself
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32


class _Result(NamedTuple):
    kind: Any  # list or tuple of the outputs; None: a single one, or nothing
    outputs: tuple[_Output, ...]


_known: dict[tuple, _Result | None] = {}  # None: it does not follow from shapes


def forget() -> None:
    """Frees what is known, some megabytes: for the end of planning."""
    _known.clear()


class Shapes:
    """Runs operations on the fake tensors of `mode`, which is entered: repeats the result of an earlier one of the same
    shapes, calls all others."""

    def __init__(self, mode: FakeTensorMode):
        self.mode = mode
        with torch._C._DisableTorchDispatch():
            self._state = dict(vars(FakeTensor(mode, torch.empty(0, device="meta"), CPU)))

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor] | None]:
        """The result, and which tensors may have storages not seen before; None: any of those given and made."""
        parts: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[Tensor] = []
        if not _describe((args, kwargs), parts, tensors):
            return func(*args, **kwargs), None
        key = tuple(parts)
        known = _known.get(key)
        if known is not None:
            made = [self._made(output, tensors) for output in known.outputs]
            return (known.kind(made) if known.kind else made[0] if made else None), made
        result = func(*args, **kwargs)
        if key not in _known:
            _known[key] = self._remembered(key, (args, kwargs), tensors, result)
        return result, None

    def _made(self, output: _Output, tensors: Sequence[Tensor]) -> Tensor:
        given, shape, stride, offset, dtype = output
        if shape is None:
            return tensors[given]
        with torch._C._DisableTorchDispatch():
            if given < 0:
                inner = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                inner = torch.empty(0, dtype=dtype, device="meta")
                inner.set_(tensors[given].untyped_storage(), offset, shape, stride)
            made = Tensor._make_subclass(FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=CPU)
        vars(made).update(self._state)
        return made

    def _remembered(self, key: tuple, arguments: Any, tensors: Sequence[Tensor], result: Any) -> _Result | None:
        """How to make `result` again; None where it depends on more than shapes, or is like no other tensor."""
        func, kind = key[0], type(result) if isinstance(result, list | tuple) else None
        parts: list[Any] = list(key[:2])
        unchanged = _describe(arguments, parts, []) and tuple(parts) == key
        if not unchanged or _varies(func, tensors) or func in self.mode.lift_fns or kind not in (None, list, tuple):
            return None
        found = list(result) if kind else [] if result is None else [result]
        outputs = [_describe_output(tensor, tensors) for tensor in found]
        known = _Result(kind, tuple(output for output in outputs if output is not None))
        return known if len(known.outputs) == len(found) and self._makes(known, found, tensors) else None

    def _makes(self, known: _Result, found: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
        """Whether `found` would be made, to the last byte of its storages."""
        pairs = list(zip(found, known.outputs, strict=True))
        own = [tensor.untyped_storage()._cdata for tensor, output in pairs if output.given < 0]
        return len(set(own)) == len(own) and all(
            _facts(self._made(output, tensors)) == _facts(tensor) for tensor, output in pairs)


def _describe(values: Any, parts: list[Any], tensors: list[Tensor]) -> bool:
    """Adds to `parts` all that the shapes of a result depend on, to `tensors` the tensors; False where there is more.
    Runs for every operation."""
    for item in values.values() if type(values) is dict else values:
        kind = type(item)
        if kind is FakeTensor:
            if item.constant is not None:  # its value is known, and used
                return False
            parts += (item.shape, item.stride(), item.dtype, item.storage_offset())
            tensors.append(item)
        elif kind is list or kind is tuple or kind is dict:
            parts.append((kind, *item) if kind is dict else (kind, len(item)))
            if not _describe(item, parts, tensors):
                return False
        elif isinstance(item, Tensor):
            return False
        else:
            parts += (kind, item)  # 1, 1.0 and True are equal
    return True


def _varies(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether an operator's output shape depends on values of its inputs (indexing with a mask does), or it changes a
    shape in place."""
    if func is torch.ops.aten.index.Tensor:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return bool(VARYING.intersection(func.tags))


def _describe_output(tensor: Any, tensors: Sequence[Tensor]) -> _Output | None:
    """How to make `tensor`, a result of an operation, again from the operation's input `tensors`: as one of them, as a
    view of one of them, or as a new tensor.

    Returns:
        None where that is not known: `tensor` is no plain fake tensor on a CPU, or shares its storage with several
        inputs.
    """
    if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.fake_device != CPU:
        return None
    own = tensor.untyped_storage()._cdata
    sharing = [place for place, one in enumerate(tensors) if one.untyped_storage()._cdata == own]
    if len(sharing) > 1:
        return None
    given = sharing[0] if sharing else -1
    if sharing and tensors[given] is tensor:
        return _Output(given)
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    return _Output(given, shape, stride, offset, tensor.dtype)


def _facts(tensor: Tensor) -> tuple:
    return (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.untyped_storage().nbytes(),
            tensor.requires_grad, torch._C._dispatch_key_set(tensor))
