"""How many kernels a step asks a GPU for, by part, counted on a CPU: launching one takes the host 5 to 10 us, so a
device whose kernels are shorter waits for it. And how often a step makes the host wait for the device.

    python benchmarks/launches.py [--size base --batch 8 --stages pretrain align finetune]

The step is the one that trains, on real tensors; those that would lie on a GPU are followed from `Step.to_device` and
the weights on (`OnDevice`). Counted are operations that compute or copy, not views, empty tensors or work on the host;
an operation over a list of tensors (`_foreach_`, fused AdamW) counts once, though it may launch a few kernels, and a
compiled graph not at all. The number depends on the model's depth and the micro-batches, hardly on the batch.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plan_choice import SETUP, Case, random_batch
from benchmarks.run import commit
from trimodal.config import SIZES, StageConfig, load_config
from trimodal.memory.devices import Fit
from trimodal.objectives.step import Step
from trimodal.training.loop import train_step
from trimodal.training.optimizer import MovingAverage, Optimizer
from trimodal.training.planner import TOWERS, kernels_of, stage_upper, without_speaker
from trimodal.training.run import Options, Run, open_run
from trimodal.training.stage import Stage, build_stage

PARTS = ("transfers", *TOWERS, "losses", "backward", "update", "average")
READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")  # of values, by the host


class OnDevice(TorchDispatchMode):
    """Follows the tensors that would lie on a GPU, and counts by part what is launched for them."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.launches: Counter[str] = Counter()
        self.part = "losses"
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def holds(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        found = self.storages.get(storage._cdata)
        return found is not None and found() is storage  # else another one lies at the address by now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self.holds(tensor) for tensor in tensors_of((args, kwargs))):
            for tensor in tensors_of(result):
                self.add(tensor)
            self.launches[self.part] += is_launch(func)
        return result

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


class Reads(TorchFunctionMode):
    """Notes where the host asks for values of tensors that would lie on a GPU, and waits for them."""

    def __init__(self, device: OnDevice):
        super().__init__()
        self.device = device
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], Tensor) and self.device.holds(args[0]):
            self.names.append(name)
            if name == "cpu":
                with torch.utils._python_dispatch._disable_current_modes():
                    return args[0].clone()  # which lies on the host, whatever is done with it
        return func(*args, **(kwargs or {}))


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_launch(func: Any) -> bool:
    """Whether an operator computes or copies: no view, and nothing that only allocates or asks."""
    name = func._schema.name.removeprefix("aten::")
    return not (func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach", "is_", "sym_",
                                                 "_local_scalar")))


@contextlib.contextmanager
def watching(run: Run, stage: Stage) -> Iterator[tuple[OnDevice, Reads]]:
    """Within, a step's launches and reads are counted."""
    held = [*stage.objectives.parameters(), *(value for state in stage.optimizer.state.values()
                                              for value in state.values())]
    if stage.average:
        held += [*stage.average.values, stage.average.updates]
    device = OnDevice([*run.model.parameters(), *run.model.buffers(), *held])
    with contextlib.ExitStack() as stack:
        def during(owner: Any, name: str, part: str, then: Callable[[Any], Any] = lambda result: result) -> None:
            whole = getattr(owner, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with device.within(part):
                    return then(whole(*args, **kwargs))

            stack.enter_context(mock.patch.object(owner, name, wrapped))

        def moved(tensor: Tensor) -> Tensor:
            device.launches["transfers"] += 1
            copy = tensor.clone()
            device.add(copy)
            return copy

        during(Step, "to_device", "transfers", moved)
        during(Optimizer, "backward", "backward")
        during(Optimizer, "step", "update")
        during(MovingAverage, "update", "average")
        for tower in TOWERS:
            module: nn.Module = getattr(run.model, tower)
            during(module, "forward", tower)
        reads = Reads(device)
        with device, reads:
            yield device, reads


def opened(size: str, batch: int, folder: Path) -> Run:
    config = load_config(None, [
        f"model.size={size}", f"training.batch_size={batch}", "training.gradient_accumulation_steps=1",
        "data.datasets=[synthetic]", "data.synthetic_images=128", "data.synthetic_sounds=128", "data.workers=0",
        "model.word_embeddings=random", "model.image_size=32", "model.context_length=8", "data.audio_max_s=0.5",
        "training.ema_decay=0.999", f"paths.data_root={folder / 'data'}", f"paths.output_dir={folder / 'run'}"])
    return open_run(config, Options("cpu"), None)


def counted(run: Run, row: StageConfig) -> Iterator[tuple[str, Counter[str], list[str]]]:
    """Of each task of a stage: launches by part and reads of its second step, after whatever the first one makes."""
    tasks = without_speaker(row.tasks)
    run.fits[row.name] = Fit(stage_upper(run.config, row, SETUP), dict.fromkeys(TOWERS, 0))
    stage = build_stage(run, row, tasks, 1)
    for number, task in enumerate(tasks):
        batch = random_batch(Case(run.config, row, task), "cpu")
        train_step(run, stage, number, batch)
        with watching(run, stage) as (device, reads), kernels_of("cuda"):
            train_step(run, stage, number, batch)
        yield "+".join(task.inputs), device.launches, reads.names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--stages", nargs="+", default=["pretrain", "align", "finetune"])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = opened(args.size, args.batch, Path(folder))
        rows = [(row.name, *found) for row in run.config.stages if row.name in args.stages
                for found in counted(run, row)]
        run.tracker.close()
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {args.size}, {run.precision.reason}\n"
          f"stage     task         {'  '.join(f'{part:>9}' for part in PARTS)}        all  reads")
    for stage, task, launches, reads in rows:
        print(f"{stage:8}  {task:11}  {'  '.join(f'{launches[part]:9,}' for part in PARTS)}  {launches.total():9,}  "
              f"{', '.join(f'{n} {name}' for name, n in Counter(reads).items()) or 'none'}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
