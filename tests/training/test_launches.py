"""What a step asks of a GPU, followed on a CPU: no value is read by the host, and updates go by whole lists."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.launches import OnDevice, Reads, watching
from tests.small_runs import SmallRuns, batches, step
from trimodal.blocks import Blocks
from trimodal.config import TrainingConfig
from trimodal.training.optimizer import MovingAverage, Optimizer


@pytest.mark.parametrize(("name", "task"), [("pretrain", 0), ("pretrain", 1), ("align", 0), ("align", 1),
                                            ("finetune", 0)])
def test_the_host_never_waits_for_the_device_within_a_step(small: SmallRuns, tmp_path: Path, name: str,
                                                           task: int) -> None:
    """But for the rows of hard negatives, whose images and sounds the host holds."""
    run = small.open(tmp_path / "run", "training.ema_decay=0.9")
    stage = small.stage(run, name)
    batch = batches(run, stage, task)[0]
    with watching(run, stage) as (device, reads):
        step(run, stage, batch, task)
    rows_of_negatives = 1 if "matching" in stage.tasks[task].objectives else 0
    assert reads.names == ["cpu"] * rows_of_negatives
    assert device.launches["backward"] > 50, "what is followed is the step"


@pytest.mark.parametrize("read", [float, int, bool, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy])
def test_each_way_of_reading_is_seen_on_the_device_alone(read: Callable[[torch.Tensor], object]) -> None:
    weight = torch.ones(())
    device = OnDevice([weight])
    reads = Reads(device)
    with device, reads:
        read(torch.zeros(()))
        assert not reads.names
        read((weight * 2).view(1)[0])
        assert len(reads.names) == 1


def test_learning_rate_factors_divide_only_what_they_multiply() -> None:
    """Each may add its own call of a fused update to each list of weights, and nothing of Newton and Schulz."""
    blocks = Blocks(8, 2, depth := 20, "auto")
    tower, found = torch.nn.ModuleDict({"tower": blocks}), list[int]()
    by_depth: dict[torch.Tensor, float] = {p: 0.9 ** (depth - number) for number, block in enumerate(blocks.blocks)
                                           for p in block.parameters()}
    for factors in ({}, by_depth):
        optimizer = Optimizer(tower, TrainingConfig(), factors=factors)
        optimizer.allocate()
        for p in tower.parameters():
            p.grad = torch.ones_like(p)
        held = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        with OnDevice([*tower.parameters(), *gradients, *held]) as device:
            optimizer.step(1e-3)
        found.append(device.launches.total())
    plain, with_factors = found
    shapes_of_matrices = 4
    assert plain < with_factors <= plain + depth * (shapes_of_matrices + 3), (plain, with_factors)


def test_an_update_takes_as_many_launches_however_deep_the_model_is() -> None:
    found = []
    for depth in (2, 20):
        tower = torch.nn.ModuleDict({"tower": Blocks(8, 2, depth, "auto")})
        optimizer, average = Optimizer(tower, TrainingConfig()), MovingAverage(tower, 0.9)
        optimizer.allocate()
        for p in tower.parameters():
            p.grad = torch.ones_like(p)
        held = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        with OnDevice([*tower.parameters(), *gradients, *held, *average.values, average.updates]) as device:
            _, finite = optimizer.step(1e-3)
            with device.within("average"):
                average.update(tower.parameters(), finite)
        found.append(dict(device.launches))
    assert found[0] == found[1]
    assert found[0]["average"] < 20 < found[0]["losses"] < 200, "most are products of Newton and Schulz"
