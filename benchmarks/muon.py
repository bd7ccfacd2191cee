"""Our Muon against torch.optim.Muon: time of a step and of its update, memory of an update, and what each one keeps.

    git worktree add /tmp/before dde8035
    python benchmarks/muon.py [--size tiny --batch 32 --turns 7 --steps 2 --fp32 --cpu-time --against /tmp/before]

One run, one model, one batch; in each turn every optimizer makes the same number of whole steps (forward, backward,
update), the order changing from turn to turn. A ratio is that of the turn's medians to ours; given are the median over
the turns and the range. A step is one of align with pictures and captions, by default half of the patches of a
picture; `share` is that of the update in it. `--against` adds the Muon of another checkout; `--cpu-time` counts CPU
seconds in the place of time, for a machine that does other work as well. `peak` is the largest sum of tensors that live
within one update, less what lived before.
`skips`: told by `found_inf` on the device, as torch's fused AdamW is, that the gradient is not finite, an update
changes neither weights nor momentum; without that each step must wait for the device.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import nn

from benchmarks.attention_memory import cpu_name
from tests.small_runs import SmallRuns, batches
from trimodal.blocks import use_kernel
from trimodal.config import SIZES
from trimodal.memory import devices
from trimodal.memory.tracker import PeakMemory
from trimodal.training.attention import choose_kernel
from trimodal.training.loop import train_step
from trimodal.training.optimizer import Muon, block_matrices

Matrices = list[nn.Parameter]
Make = Callable[[Matrices, torch.dtype | None], torch.optim.Optimizer]


def of_torch(ns_steps: int) -> Make:
    return lambda matrices, dtype: torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, momentum=0.95,
                                                    ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS: dict[str, Make] = {
    "ours, 4 iterations": lambda matrices, dtype: Muon(matrices, 0.1, dtype),
    "torch, 4 iterations": of_torch(4), "torch, 5 (its default)": of_torch(5)}
OURS = next(iter(OPTIMIZERS))


def of_checkout(folder: Path) -> Make:
    """The Muon of another checkout, whose optimizer.py runs on the modules of this one."""
    spec = importlib.util.spec_from_file_location("other_optimizer", folder / "trimodal/training/optimizer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda matrices, dtype: module.Muon(matrices, 0.1, dtype)


def timed(clock: Callable[[], float], work: Callable[[], object]) -> float:
    start_s = clock()
    work()
    return clock() - start_s


def give_gradients(matrices: Matrices) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def update_peak_bytes(optimizer: torch.optim.Optimizer, matrices: Matrices) -> int:
    optimizer.step()  # the state is there from now on
    give_gradients(matrices)
    with PeakMemory(granularity=1) as tracker:
        tracker.mark("parameters", matrices)
        tracker.mark("gradients", [p.grad for p in matrices])
        tracker.mark("optimizer", [list(state.values()) for state in optimizer.state.values()])
        before = tracker.live_bytes
        optimizer.step()
        return tracker.peak_bytes - before


def skips(make: Make) -> bool:
    """Whether a masked update of a bad gradient leaves weights and momentum as they were."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = make([p], None)
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as torch's fused AdamW is told
    optimizer.step()
    return bool((p == 1).all()) and all(bool(value.isfinite().all()) for value in optimizer.state[p].values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="whole steps of each optimizer in a turn")
    parser.add_argument("--fp32", action="store_true", help="without mixed precision")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds in the place of time")
    parser.add_argument("--against", type=Path, help="another checkout, whose Muon is measured as well")
    args = parser.parse_args(argv)
    devices.prepare_process()
    seconds_of = partial(timed, time.process_time if args.cpu_time else time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        small = SmallRuns(Path(folder) / "shared")
        run = small.open(Path(folder) / "run", f"model.size={args.size}", "model.image_size=224", "model.embed_dim=512",
                         "model.num_classes=1000", "model.vocab_size=30522", "model.word_embeddings=random",
                         "stages.align.image_keep=0.5",
                         f"training.use_amp={str(not args.fp32).lower()}",
                         f"training.batch_size={args.batch}", micro_batch=args.batch)
        stage = small.stage(run, "align")
        use_kernel(run.model, choose_kernel(run.device, run.precision.dtype))
        batch = batches(run, stage)[0]
        matrices = block_matrices(nn.ModuleDict({name: getattr(run.model, name) for name in ("image", "text")}))
        print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, "
              f"{torch.get_num_threads()} threads; {args.size}, batch {args.batch}, {run.precision.reason}; "
              f"{len(matrices)} matrices, {sum(p.numel() for p in matrices) / 1e6:.1f} M", flush=True)
        dtype = torch.bfloat16 if run.precision.dtype == torch.bfloat16 else None
        factories = OPTIMIZERS | ({"other checkout": of_checkout(args.against)} if args.against else {})
        made = {name: make(matrices, dtype) for name, make in factories.items()}
        for group in (group for optimizer in made.values() for group in optimizer.param_groups):
            group["lr_factor"] = 1.0  # as the groups of a run
        step_s: dict[str, list[float]] = {name: [] for name in made}
        update_s: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(-1, args.turns):  # the first one warms up
            names = list(made)[turn % len(made):] + list(made)[:turn % len(made)]
            for name in names:
                stage.optimizer.optimizers["muon"] = made[name]
                steps = [seconds_of(lambda: train_step(run, stage, 0, batch).read()) for _ in range(args.steps)]
                updates = []
                for _ in range(args.steps):
                    give_gradients(matrices)
                    updates.append(seconds_of(made[name].step))
                if turn >= 0:
                    step_s[name].append(statistics.median(steps))
                    update_s[name].append(statistics.median(updates))
        print(f"{'':22}  {'step s':>6}  {'ratio (range)':20}  {'update s':>8}  {'ratio (range)':20}  {'share %':>7}  "
              f"{'state MB':>8}  {'peak MB':>7}  skips")
        for name, optimizer in made.items():
            cells = []
            for seconds in (step_s, update_s):
                ratios = [one / ours for one, ours in zip(seconds[name], seconds[OURS], strict=True)]
                cells.append((statistics.median(seconds[name]),
                              f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"))
            peak = update_peak_bytes(optimizer, matrices)
            state = sum(value.nbytes for one in optimizer.state.values() for value in one.values())
            print(f"{name:22}  {cells[0][0]:6.2f}  {cells[0][1]:20}  {cells[1][0]:8.3f}  {cells[1][1]:20}  "
                  f"{100 * cells[1][0] / cells[0][0]:7.1f}  "
                  f"{state / 1e6:8.1f}  {peak / 1e6:7.1f}  {'yes' if skips(factories[name]) else 'no'}", flush=True)
        run.tracker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
