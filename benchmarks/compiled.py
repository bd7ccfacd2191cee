"""Compiled blocks beside uncompiled ones on a CPU: time of a block, launches, and what compiling takes.

    python benchmarks/compiled.py [--size tiny --turns 7]

One block of the image tower, forward and backward in the precision that training uses, at align's shape: 32 images, 98
kept patches, drop-path. Both take turns; ratio of CPU seconds, compiled / uncompiled, median and range. Launches:
operations of the uncompiled block as benchmarks/launches.py counts them; calls in the code that the compiler has made
for a CPU, whose fused kernels a GPU's need not match one by one.
"""

import argparse
import contextlib
import os
import re
import statistics
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from benchmarks.launches import OnDevice
from benchmarks.run import commit, hardware
from model import create_model
from trimodal.config import SIZES
from trimodal.memory.devices import choose_precision
from trimodal.training.compiling import CompiledBlocks

CALL = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.[\w.]+)\(", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of each in a turn")
    args = parser.parse_args(argv)
    precision = choose_precision(torch.device("cpu"), True)
    eager, compiled = (create_model(args.size, word_embeddings="random") for _ in range(2))
    blocks = CompiledBlocks(compiled, lambda line: print(line, file=sys.stderr))
    path_B = torch.ones(32)
    width = eager.config.preset.dim

    def trained(model: torch.nn.Module) -> None:
        x_BND = torch.ones(32, 98, width, requires_grad=True)
        with torch.autocast("cpu", precision.dtype) if precision.dtype else contextlib.nullcontext():
            out = model.get_submodule("image.blocks.blocks.1")(x_BND, None, path_B)
        out.sum().backward()

    began_s = time.perf_counter()
    with fresh_cache():
        def compile_it() -> None:
            with blocks.trial():
                trained(compiled)

        _, codes = run_and_get_code(compile_it)
    compile_s = time.perf_counter() - began_s
    with OnDevice(eager.parameters()) as device:
        trained(eager)
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for turn in range(args.turns + 1):
        pairs = [("eager", eager), ("compiled", compiled)]
        for name, model in pairs if turn % 2 == 0 else reversed(pairs):
            began_s = time.process_time()
            for _ in range(args.steps):
                trained(model)
            seconds[name].append(time.process_time() - began_s)
    ratios = [one / other for one, other in zip(seconds["compiled"][1:], seconds["eager"][1:], strict=True)]
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {hardware()}; {args.size}, {precision.reason}\n"
          f"time, compiled / uncompiled: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
          f"{len(ratios)} turns); launches of a block, forward and backward: {device.launches.total()} uncompiled, "
          f"{sum(len(CALL.findall(code)) for code in codes)} compiled; compiled in {compile_s:.0f} s")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
