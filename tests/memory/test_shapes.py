"""Results made from their shapes are those of FakeTensorMode, and a step measured with them takes the same bytes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, disable_fake_tensor_cache

from tests.small_runs import SmallRuns
from trimodal.memory import shapes
from trimodal.memory import tracker as tracker_module
from trimodal.memory.devices import Fit
from trimodal.training import planner
from trimodal.training.planner import DeviceSetup, TaskMeasure

F = torch.ops.aten


@contextlib.contextmanager
def plain_tracing(limit_bytes: int | None = None,
                  mode: FakeTensorMode | None = None) -> Iterator[tracker_module.PeakMemory]:
    """As `tracker.tracing`, each result from FakeTensorMode."""
    with mode or FakeTensorMode(), tracker_module.PeakMemory(limit_bytes=limit_bytes) as tracker:
        yield tracker


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    shapes.forget()
    yield
    shapes.forget()


FLOAT, BF16 = DeviceSetup("cpu", None), DeviceSetup("cuda", torch.bfloat16)


BRIEFLY = [("pretrain", 0, (FLOAT, 32, 0)), ("pretrain", 1, (FLOAT, 8, 2)), ("align", 0, (BF16, 8, 1)),
           ("finetune", 0, (FLOAT, 8, 2))]


@pytest.mark.parametrize(("stage", "task", "how"), [
    *BRIEFLY, *(pytest.param(stage, task, how, marks=pytest.mark.repetition)
      for stage, task in (("pretrain", 0), ("pretrain", 1), ("align", 0), ("finetune", 0))
      for how in ((FLOAT, 8, 2), (BF16, 32, 0), (BF16, 32, 1), (BF16, 5, 1)) if (stage, task, how) not in BRIEFLY)])
def test_a_step_takes_the_same_bytes(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str,
                                     task: int, how: tuple[DeviceSetup, int, int]) -> None:
    """By FakeTensorMode alone, while shapes become known, and when they are."""
    setup, size, every = how
    config = small.config(tmp_path, "training.ema_decay=0.9")
    row = next(row for row in config.stages if row.name == stage)
    fit = Fit(dict.fromkeys(planner.TOWERS, size), dict.fromkeys(planner.TOWERS, every))
    found = [TaskMeasure(config, row, row.tasks[task], setup)(fit) for _ in range(2)]
    monkeypatch.setattr(planner, "tracing", plain_tracing)
    assert found == 2 * [TaskMeasure(config, row, row.tasks[task], setup)(fit)]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "new": lambda a, b: a + b, "broadcast": lambda a, b: a + b[0], "of a number": lambda a, b: b.int() * 2,
    "of a fraction": lambda a, b: b.int() * 2.0, "view": lambda a, b: a.view(2, -1), "transposed": lambda a, b: a.T,
    "view of a row": lambda a, b: a[1].view(3, 2), "view of the next": lambda a, b: a[2].view(3, 2),
    "into the second": lambda a, b: torch.add(a, b, out=b), "into the first": lambda a, b: torch.add(a, b, out=a),
    "of a view": lambda a, b: a.T + b.T, "row": lambda a, b: a[1], "next row": lambda a, b: a[2],
    "in place": lambda a, b: a.mul_(2), "onto itself": lambda a, b: a.copy_(a), "views": lambda a, b: a.split(3),
    "tuple": lambda a, b: torch.var_mean(a, 1), "list given": lambda a, b: torch.cat([a, b]),
    "picked": lambda a, b: a[torch.zeros(5, dtype=torch.int64)], "expanded": lambda a, b: a[:1].expand(4, -1),
    "cast": lambda a, b: a.to(torch.bfloat16), "same dtype": lambda a, b: a.to(a.dtype),
    "resized": lambda a, b: a.clone().resize_(3, 2), "resized less": lambda a, b: a.clone().resize_(1, 2),
    "turned in place": lambda a, b: a.clone().t_(), "value": lambda a, b: torch.tensor(2.5).item(),
    "nothing": lambda a, b: torch._foreach_mul_([a, b], 2.0), "kernel": lambda a, b: torch.layer_norm(a, (6,)),
}


def facts(value: object, given: tuple[Tensor, ...]) -> object:
    """All that may be told of a result, and which tensor given it shares its storage with."""
    if isinstance(value, list | tuple):
        return type(value), [facts(item, given) for item in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, storage.nbytes(),
            value.requires_grad, [value is one for one in given],
            [storage._cdata == one.untyped_storage()._cdata for one in given])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_known_result_is_the_one_that_was_found(name: str) -> None:
    found = []
    for tracing in (plain_tracing, tracker_module.tracing, tracker_module.tracing, tracker_module.tracing):
        with tracing() as tracker:
            given = torch.ones(4, 6), torch.ones(4, 6)
            value = OPERATIONS[name](*given)
            found.append((facts(value, given), tracker.live_bytes, tracker.peak_bytes))
    assert found[1:] == 3 * found[:1]


def test_what_is_known_of_one_operation_misleads_no_other() -> None:
    found = []
    for tracing in (plain_tracing, tracker_module.tracing):
        with tracing():
            for _ in range(2):
                pairs = {name: (torch.ones(4, 6), torch.ones(4, 6)) for name in OPERATIONS}
                found.append({name: facts(OPERATIONS[name](*pair), pair) for name, pair in pairs.items()})
    assert found[0] == found[1] == found[2] == found[3]


class Counting(FakeTensorMode):
    """Knows which operations have come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def dispatch(self, func: Any, *rest: Any) -> object:
        self.calls.append(func)
        return super().dispatch(func, *rest)


def calls_of(operation: Callable[[], object]) -> list[Any]:
    """Which operations FakeTensorMode had to run for it."""
    with Counting() as mode, disable_fake_tensor_cache(mode), tracker_module.PeakMemory(shapes=shapes.Shapes(mode)):
        mode.calls.clear()
        operation()
        return mode.calls


def test_shapes_that_follow_from_values_are_never_kept() -> None:
    def picked() -> Tensor:
        return torch.ones(4, 6)[torch.zeros(4, dtype=torch.int64)]

    def masked() -> None:
        with pytest.raises(DynamicOutputShapeException):
            torch.ones(4, 6)[torch.ones(4, dtype=torch.bool)]

    assert F.index.Tensor in calls_of(picked) and F.index.Tensor not in calls_of(picked)
    for _ in range(2):
        assert F.index.Tensor in calls_of(masked)


def test_what_is_known_is_made_without_fake_tensor_mode() -> None:
    def operation() -> Tensor:
        return torch.ones(4, 6).t().exp()

    assert calls_of(operation) and not calls_of(operation)
    shapes.forget()
    assert calls_of(operation)
