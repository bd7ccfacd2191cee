"""How near do the model's blocks come to the speed of bare matrix products, and where does the rest go?

    python benchmarks/matmul_share.py [--size tiny --batch 32 --turns 7 --cpu-time --kernel float32 --default-malloc]

The blocks of the image and of the text tower, forward and backward, at what stage align gives them: all samples of a
batch, half of a picture's 196 patches, captions of 24 tokens of which some are padding. Set up as a run sets itself up.

Share: useful operations a second, over the peak. Useful are the products of the layers and of attention, each once in
the forward pass and twice in the backward pass, without what is computed again. Peak: the faster of `torch.mm` at
[samples x tokens, width] x [width, 4 x width] and at 2048^3, in the same type and threads. Both are timed in turns, and
a share is the median of those of the turns. The table adds up the time of the operators themselves (torch.profiler) in
one more pass. `--cpu-time` counts CPU seconds in the place of time, for a machine that does other work as well.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch.profiler import ProfilerActivity, profile

from model import create_model
from trimodal.blocks import KERNELS, Blocks, use_kernel
from trimodal.config import SIZES
from trimodal.memory import devices
from trimodal.training.attention import choose_kernel

TOKENS = {"image": 98, "text": 24}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUPS = {  # the first whose words are part of an operator's name
    "attention": ("scaled_dot_product", "softmax", "bmm"), "matrix products": ("mm", "linear"),
    "GELU": ("gelu",), "layer norm": ("layer_norm",), "copies and casts": ("copy", "cat", "contiguous", "clone"),
    "sums": ("add", "sum"), "products with numbers": ("mul", "div"), "zeros": ("fill", "zero")}


class Tower:
    """The blocks of one tower, with their input."""

    def __init__(self, name: str, blocks: Blocks, dim: int, batch: int, dtype: torch.dtype):
        self.name, self.blocks, self.dtype = name, blocks, dtype
        N = TOKENS[name]
        self.x_BND = torch.randn(batch, N, dim, requires_grad=True)
        self.valid_BN = torch.arange(N) < torch.randint(N // 2, N + 1, (batch, 1)) if name == "text" else None
        self.upstream_BND = torch.randn(batch, N, dim)
        depth = len(blocks.blocks)
        self.operations = 3 * depth * batch * N * (2 * 12 * dim**2 + 4 * N * dim)

    def run(self) -> None:
        """One forward and backward pass; gradients are freed."""
        amp = self.dtype != torch.float32
        with torch.autocast("cpu", self.dtype) if amp else contextlib.nullcontext():
            out_BND = self.blocks(self.x_BND, self.valid_BN)
        out_BND.backward(self.upstream_BND.to(out_BND.dtype))
        self.blocks.zero_grad()
        self.x_BND.grad = None


def products(dim: int, batch: int, dtype: torch.dtype) -> list[tuple[int, Callable[[], Any]]]:
    """Operations and call of each product whose speed may be the peak."""
    shapes = [(batch * TOKENS["image"], dim, 4 * dim), (2048, 2048, 2048)]
    pairs = [(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)) for m, k, n in shapes]
    outs = [torch.empty(m, n, dtype=dtype) for m, _, n in shapes]
    return [(2 * m * k * n, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
            for (m, k, n), (a, b), out in zip(shapes, pairs, outs, strict=True)]


Clock = Callable[[], float]


def seconds(work: Callable[[], Any], clock: Clock, least_s: float) -> float:
    """Time of one call: the mean of as many as `least_s` take, at least one."""
    start_s, calls = clock(), 0
    while not calls or clock() - start_s < least_s:
        work()
        calls += 1
    return (clock() - start_s) / calls


def shares(towers: list[Tower], candidates: list[tuple[int, Callable[[], Any]]], turns: int,
           clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Of each turn: the share of each tower and of all together, and the peak in GFLOP/s."""
    found: dict[str, list[float]] = {name: [] for name in ("peak", *(tower.name for tower in towers), "both")}
    for turn in range(-1, turns):  # the first one warms up
        peak = max(operations / seconds(work, clock, 0.1) for operations, work in candidates)
        spent_s = {tower.name: seconds(tower.run, clock, 0.3) for tower in towers}
        peak = max(peak, *(operations / seconds(work, clock, 0.1) for operations, work in candidates))
        if turn >= 0:
            found["peak"].append(peak / 1e9)
            for tower in towers:
                found[tower.name].append(tower.operations / spent_s[tower.name] / peak)
            found["both"].append(sum(tower.operations for tower in towers) / sum(spent_s.values()) / peak)
    return found


def where_it_goes(tower: Tower) -> list[tuple[str, float]]:
    """Share of each group of operators in the time of a pass, in %, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        tower.run()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::") if event.key.startswith("aten::") else ""
        group = next((group for group, words in GROUPS.items() if any(word in name for word in words)),
                     "views, allocation, autograd")
        spent[group] += event.self_cpu_time_total
    return [(group, 100 * part / sum(spent.values())) for group, part in spent.most_common()]


def prepared(size: str, batch: int, precision: str, kernel: str | None = None
             ) -> tuple[list[Tower], list[tuple[int, Callable[[], Any]]]]:
    """Towers with the attention kernel that a run takes here (or `kernel`), and the products to compare them with."""
    torch.manual_seed(0)
    model = create_model(size)
    use_kernel(model, kernel or choose_kernel(torch.device("cpu"), TYPES[precision]))
    dim, dtype = model.config.preset.dim, TYPES[precision]
    towers = [Tower(name, getattr(model, name).blocks, dim, batch, dtype) for name in TOKENS]
    return towers, products(dim, batch, dtype)


def share(precision: str, turns: int = 5) -> float:
    """The share of both towers' blocks, set up as a run sets itself up before its first step."""
    devices.prepare_process()
    return statistics.median(shares(*prepared("tiny", 32, precision), turns)["both"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--default-malloc", action="store_true", help="without devices.keep_freed_memory")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds in the place of time")
    parser.add_argument("--kernel", choices=KERNELS, help="of attention in bf16; that of a run here by default")
    options = parser.parse_args(argv)
    from benchmarks.run import commit, hardware

    devices.keep_few_kernels()
    if not options.default_malloc:
        devices.keep_freed_memory()
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {hardware()}; {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads; {options.size}, batch {options.batch}", flush=True)
    tables = {}
    for precision in TYPES:
        towers, candidates = prepared(options.size, options.batch, precision, options.kernel)
        found = shares(towers, candidates, options.turns, time.process_time if options.cpu_time else time.perf_counter)
        cells = [f"{name} {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
                 for name, values in found.items()]
        print(f"{precision}: {', '.join(cells)}", flush=True)
        tables[precision] = {tower.name: where_it_goes(tower) for tower in towers}
    for precision, of_towers in tables.items():
        for name, rows in of_towers.items():
            print(f"{precision}, {name}: " + ", ".join(f"{group} {part:.1f} %" for group, part in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
