"""Ranks: real processes give the gradient of one process, uneven shares and unused towers included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tests.ranks import in_ranks
from tests.refusals import refused
from trimodal import distributed
from trimodal.distributed import World, start

SHARES = {2: [9, 4], 3: [7, 0, 6]}  # rows of each rank, of 13
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


class TwoTowers(nn.Module):
    """Two towers of their own, one that nothing uses, and the loss's temperature and bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 8))
        self.unused = nn.Linear(3, 3)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))
        self.double()

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        scores = self.temperature.exp() * image @ text.T
        labels = torch.arange(len(scores))
        pairs = nn.functional.logsigmoid((2 * torch.eye(len(scores)) - 1) * (scores + self.bias))
        return (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2 - pairs.mean()

    def features(self, rows: slice) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        image = torch.randn(13, 12, generator=generator, dtype=torch.float64)
        text = torch.randn(13, 7, generator=generator, dtype=torch.float64)
        return normalize(self.image(image[rows]), dim=-1), normalize(self.text(text[rows]), dim=-1)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}


def loss_parameters(model: TwoTowers) -> tuple[list[Tensor], list[Tensor]]:
    loss: list[Tensor] = [model.temperature, model.bias]
    return [p for p in model.parameters() if all(p is not q for q in loss)], loss


def contrastive_step(world: World) -> dict:
    model = TwoTowers()
    begin = sum(SHARES[world.size][: world.rank])
    image, text = model.features(slice(begin, begin + SHARES[world.size][world.rank]))
    loss = model.loss(world.gather_rows(image), world.gather_rows(text))
    loss.backward()
    world.reduce_gradients(*loss_parameters(model))
    return {"loss": loss.detach(), "gradients": model.gradients()}


def partly_used(world: World) -> dict:
    """Only the last rank uses the second parameter, no rank the third; the first is in float32, the rest in float64."""
    first, second, third = nn.Parameter(torch.ones(40)), *(nn.Parameter(torch.ones(2).double()) for _ in range(2))
    (first.sum() * (world.rank + 1)).backward()
    if world.rank == world.size - 1:
        (second.sum() * 6).backward()
    world.reduce_gradients([first], [second, third])
    return {"first": first.grad, "second": second.grad, "third": third.grad}


def gathers(world: World) -> dict:
    rows = torch.arange(world.rank * 2, world.rank * 2 + world.rank + 1)
    tables = {str(dtype): world.gather_rows(rows[:, None].expand(-1, 3).to(dtype)) for dtype in DTYPES}
    return tables | {"flat": world.gather_rows(rows), "none": world.gather_rows(torch.empty(0, 4))}


def agreements(world: World) -> dict:
    weights = torch.full((3,), float(world.rank + 1))
    world.broadcast_tensors([weights])
    return {
        "flags": [world.any_flag(False), world.any_flag(world.rank == 1), world.any_flag(True)],
        "on the device": [bool(world.all_true(torch.tensor(flag))) for flag in (True, world.rank != 1)],
        "sums": world.sum_scalars({"loss": 0.5, f"only_{world.rank}": float(world.rank)}),
        "object": world.on_main(lambda: {"from": world.rank}),
        "weights": weights,
        "main": world.is_main,
    }


def work() -> dict[str, Any]:
    world = start(torch.device("cpu"))
    distributed.BUCKET_BYTES = 300  # several buckets even for these towers
    found = {job.__name__: job(world) for job in (contrastive_step, partly_used, gathers, agreements)}
    world.stop()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request) -> list[dict]:
    return [rank.value for rank in in_ranks(request.param, work)]


def test_gradients_equal_those_of_one_process(ranks):
    model = TwoTowers()
    loss = model.loss(*model.features(slice(None)))
    loss.backward()
    expected = model.gradients()
    assert all(g is not None and g.abs().max() > 1e-3 for name, g in expected.items() if "unused" not in name)
    for rank in ranks:
        assert torch.allclose(rank["contrastive_step"]["loss"], loss.detach(), rtol=0, atol=1e-12)
        found = rank["contrastive_step"]["gradients"]
        assert {n for n, g in found.items() if g is None} == {"unused.weight", "unused.bias"}
        for name, gradient in expected.items():
            if gradient is not None:
                assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name


def test_ranks_hold_the_same_bits(ranks):
    for rank in ranks[1:]:
        for name, gradient in ranks[0]["contrastive_step"]["gradients"].items():
            assert gradient is None or torch.equal(rank["contrastive_step"]["gradients"][name], gradient), name


def test_a_gradient_missing_on_some_ranks_counts_as_zero_and_on_all_stays_none(ranks):
    size = len(ranks)
    for rank in ranks:
        found = rank["partly_used"]
        assert torch.equal(found["first"], torch.full((40,), size * (size + 1) / 2))
        assert torch.equal(found["second"], torch.full((2,), 6 / size).double())
        assert found["third"] is None


def test_rows_of_every_type_arrive_in_rank_order(ranks):
    expected = torch.cat([torch.arange(r * 2, r * 2 + r + 1) for r in range(len(ranks))])
    for rank in ranks:
        found = rank["gathers"]
        assert torch.equal(found["flat"], expected) and found["none"].shape == (0, 4)
        for dtype in DTYPES:
            assert found[str(dtype)].dtype == dtype
            assert torch.equal(found[str(dtype)], expected[:, None].expand(-1, 3).to(dtype))


def test_flags_sums_objects_and_weights_agree(ranks):
    for index, rank in enumerate(ranks):
        found = rank["agreements"]
        assert found["flags"] == [False, True, True] and found["on the device"] == [True, False]
        assert found["sums"] == {"loss": 0.5 * len(ranks)} | {f"only_{r}": float(r) for r in range(len(ranks))}
        assert found["object"] == {"from": 0} and torch.equal(found["weights"], torch.ones(3))
        assert found["main"] is (index == 0)


def test_alone_every_call_returns_its_input(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = start()
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    rows = torch.ones(3, 2, requires_grad=True)
    assert world.gather_rows(rows) is rows
    rows.grad = torch.ones(3, 2)
    world.reduce_gradients([rows], [rows])
    world.broadcast_tensors([rows])
    assert torch.equal(rows.grad, torch.ones(3, 2)) and world.any_flag(True) and not world.any_flag(False)
    assert world.sum_scalars({"a": 1.5}) == {"a": 1.5} and world.on_main(lambda: "x") == "x"
    world.stop()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [0, 1, 7, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_a_batch_evenly(count, size):
    shares = [World(rank=rank, size=size).share(count) for rank in range(size)]
    assert [i for share in shares for i in range(count)[share]] == list(range(count))
    lengths = [len(range(count)[share]) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_more_processes_than_devices_is_one_line(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused("torchrun", 3, 2, "--nproc_per_node", "--device"):
        start(torch.device("cuda"))


@pytest.mark.parametrize(("said", "is_lost"), [
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711", True),
    ("Application timeout caused pair closure: Read error [127.0.0.1]:4711: Connection reset by peer", True),
    ("NCCL error: remote process exited or there was a network error, ncclRemoteError", True),
    ("ncclRemoteError: socketProgress: Connection closed by remote peer host<4711>", True),
    ("writev [127.0.0.1]:4711: Broken pipe", True),
    ("NCCL error: invalid usage, Duplicate GPU detected: rank 0 and rank 1 both on CUDA device 1000", False),
    ("NCCL error: unhandled cuda error, out of memory", False),
    ("No backend type associated with device type cuda; socket family not supported", False),
])
def test_only_a_connection_that_broke_is_a_lost_process(said: str, is_lost: bool) -> None:
    assert World(rank=0, size=2).has_lost_someone(RuntimeError(said)) is is_lost
    assert not World().has_lost_someone(RuntimeError(said)), "alone there is nobody to lose"
