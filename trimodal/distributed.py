"""Several processes, one training run: ranks from torchrun, gathers, and the one reduction of gradients.

No wrapper around the model. In a step every rank encodes its share of the effective batch, gathers the features of the
others without their graphs, computes the loss of the whole batch with its own rows live, and runs one local backward.
The loss's gradient with respect to a tower is then the sum over the ranks; a parameter of the loss itself (temperature,
bias) has received the whole gradient on every rank, so it takes the mean. Both are exact up to rounding.

    world = start(torch.device("cpu"))          # alone, or one of the ranks that torchrun started
    share = batch[world.share(len(batch))]
    features = encode(share)
    world.agree_on_memory()                     # a process without memory says so here, and all begin again
    loss = objective(world.gather_rows(features))
    loss.backward()
    world.reduce_gradients(model.parameters(), objective.parameters())

With one process every call here returns its input. Messages about sizes and flags travel between the hosts (gloo) even
where tensors travel between GPUs (NCCL), so agreeing on something never waits for a GPU.

Shapes: R rows of this rank, W rows of the whole world.
"""

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trimodal.errors import ReportedByMain, UserError

# Processes wait for each other as long as this: while the main one validates, evaluates or prepares data. One that dies
# is noticed at once, whatever this says.
PATIENCE = datetime.timedelta(days=1)
BUCKET_BYTES = 64 << 20  # gradients sent in one message: large enough for bandwidth, small beside the activations

T = TypeVar("T")


class OutOfMemoryElsewhere(MemoryError):
    """Another process ran out of memory in this step, so all do it again."""


@dataclass(frozen=True)
class World:
    """The processes of this run, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The rows of a batch of `count` that this rank encodes; shares differ by at most one row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather_rows(self, rows_R: Tensor) -> Tensor:
        """The rows of all ranks, in rank order: [W, ...] from [R, ...] of uneven R.

        This rank's rows keep their graph, the others come detached. All ranks must call it, with the same type and
        the same trailing shape.
        """
        if self.size == 1:
            return rows_R
        counts, row_bytes = self._row_counts(rows_R)
        sent = torch.zeros(max(counts), row_bytes, dtype=torch.uint8, device=rows_R.device)
        sent[: len(rows_R)] = _as_bytes(rows_R, row_bytes)
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent)
        parts = [_from_bytes(part[:count], rows_R) for part, count in zip(received, counts, strict=True)]
        parts[self.rank] = rows_R
        return torch.cat(parts)

    def reserve(self, parameters: Iterable[Tensor]) -> None:
        """Take the memory that `reduce_gradients` needs and leave it to the allocator, so that running out of it
        happens before the ranks meet."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size > 1 and gradients:
            largest = max(sum(gradient.nbytes for gradient in bucket) for bucket in _buckets(gradients))
            torch.empty(largest, dtype=torch.uint8, device=gradients[0].device)

    @torch.no_grad()
    def reduce_gradients(self, sum_parameters: Iterable[Tensor], mean_parameters: Iterable[Tensor] = ()) -> None:
        """Give every rank the same `.grad`: summed over the ranks, or averaged for `mean_parameters`.

        A parameter without a gradient on every rank keeps None; one that lacks it on some ranks counts as zero there.
        All ranks must pass the same parameters in the same order.
        """
        if self.size == 1:
            return
        summed, averaged = list(sum_parameters), list(mean_parameters)
        assert len({id(p) for p in summed + averaged}) == len(summed) + len(averaged), "a parameter is given twice"
        parameters = [p for p, used in zip(summed + averaged, self._used(summed + averaged), strict=True) if used]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, reduced in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(reduced.view_as(gradient))
        for parameter in averaged:
            if parameter.grad is not None:
                parameter.grad /= self.size

    def any_flag(self, flag: bool) -> bool:
        """Logical OR of the ranks' flags, the same on every rank: true if a rank ran out of memory, or is to stop."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def all_true(self, flag: Tensor) -> Tensor:
        """Logical AND of the ranks' flags, which stay on the device, so that the host does not wait for a GPU."""
        if self.size == 1:
            return flag
        everyones = flag.to(torch.int32)
        dist.all_reduce(everyones, op=dist.ReduceOp.MIN)
        return everyones.bool()

    def agree_on_memory(self) -> None:
        """Before every collective of a step: nobody enters it alone.

        Raises:
            OutOfMemoryElsewhere: a process called `any_flag(True)` here instead, since it had run out of memory.
        """
        if self.any_flag(False):
            raise OutOfMemoryElsewhere("another process of this run")

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every process; a mistake on one of them ends it on all.

        Raises:
            UserError: as `work` raised it here, or `ReportedByMain` on the others; the main process raises that of the
                first process that has one.
        """
        problem: UserError | None = None
        try:
            result = work()
        except UserError as error:
            problem = error
        problems = self.gather_objects(None if problem is None else str(problem))
        first = next((rank for rank, text in enumerate(problems) if text is not None), None)
        if first is None:
            return result
        if self.is_main:
            raise problem or UserError(f"process {first}: {problems[first]}")
        raise ReportedByMain(problems[first])

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` on the main rank only, and return its result on every rank; an error there ends all ranks."""
        box = [self.together(lambda: work() if self.is_main else None)]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)  # pickles, between our own processes only
        return box[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the main process prints."""
        if self.is_main:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def gather_objects(self, value: T) -> list[T]:
        """Every process's `value`, in rank order. Any picklable object; it travels between our own processes only."""
        if self.size == 1:
            return [value]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, value)
        return everyones

    def sum_scalars(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over the ranks for each name; a rank without that name adds nothing."""
        everyones = self.gather_objects(dict(values))
        names = dict.fromkeys(name for one in everyones for name in one)
        return {name: sum(one.get(name, 0.0) for one in everyones) for name in names}

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` (a new model's weights) by the main rank's: machines may round a start differently."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def has_lost_someone(self, error: BaseException) -> bool:
        """Whether `error` says that another process is gone: gloo's or NCCL's words for a connection that broke. Other
        errors of NCCL (a wrong call, two processes on one GPU) are none of these."""
        text = str(error).lower()
        return self.size > 1 and any(sign in text for sign in (
            "connection closed by peer", "connection closed by remote peer", "connection reset", "broken pipe",
            "remote process exit", "timed out waiting"))

    def stop(self) -> None:
        """Leave the group of processes; call it once, at the end."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _row_counts(self, rows: Tensor) -> tuple[list[int], int]:
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        mine = torch.tensor([len(rows), row_bytes])
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        counts, widths = zip(*(one.tolist() for one in everyones), strict=True)
        assert len(set(widths)) == 1, f"rows of {widths} bytes on the ranks cannot be gathered into one tensor"
        return list(counts), row_bytes

    def _used(self, parameters: Sequence[Tensor]) -> list[bool]:
        """For each parameter, whether a rank has a gradient."""
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        if parameters:
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in used.tolist()]


def place_in_world() -> tuple[int, int]:
    """This process's rank, and how many torchrun started: 0 and 1 without it."""
    size = int(os.environ.get("WORLD_SIZE", "").strip() or 1)
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


def start(device: torch.device | None = None) -> World:
    """Join the processes that torchrun started; without torchrun, a world of one and no process group.

    On CUDA each rank takes the device of its LOCAL_RANK, whatever index `device` names.

    Raises:
        UserError: more processes on this machine than CUDA devices.
    """
    device = device or torch.device("cpu")
    rank, size = place_in_world()
    if size == 1:
        return World(device=device)
    local_rank = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun: process {local_rank} of this machine has no device, CUDA devices here: "
                             f"{torch.cuda.device_count()}; lower --nproc_per_node or add --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    return World(rank=rank, size=size, device=device)


def _as_bytes(rows: Tensor, row_bytes: int) -> Tensor:
    """[R, row_bytes]; bytes, since the backends disagree on which number types they carry."""
    return rows.detach().contiguous().reshape(-1).view(torch.uint8).view(len(rows), row_bytes)


def _from_bytes(raw: Tensor, like: Tensor) -> Tensor:
    return raw.reshape(-1).view(like.dtype).view(len(raw), *like.shape[1:])


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group gradients, in order, into lists for one all-reduce each, of at most BUCKET_BYTES or one larger gradient.

    A list may mix dtypes: `torch.cat` promotes them to the widest.
    """
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
