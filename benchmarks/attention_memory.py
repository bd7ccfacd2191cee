"""Peak memory and time of attention, forward and backward: quadratic, in chunks of queries, by the fused kernel.

    python benchmarks/attention_memory.py [--tokens 512 1024 2048 --batch 2 --heads 8 --width 64 --chunks 64 128]

`quadratic` is what PyTorch computes where none of its fused kernels takes the inputs; `bf16` rows compare the CPU's
fused kernel in bfloat16 with float32 inside casts, which is what model.attend does there. MiB: peak of all live tensors
over what is given, which includes the output and the three gradients that every method has. Time: the shortest of
the rounds, in which the methods take turns, and its multiple of the fused kernel's.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimodal.blocks import attend
from trimodal.memory.tracker import PeakMemory

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Case(NamedTuple):
    tokens: int
    masked: bool
    method: str
    mib: float
    milliseconds: float


def fused(q: Tensor, k: Tensor, v: Tensor, valid_BN: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if valid_BN is None else valid_BN[:, None, None, :])


def quadratic(q: Tensor, k: Tensor, v: Tensor, valid_BN: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return fused(q, k, v, valid_BN)


def ours(chunk: int | str) -> Attention:
    return lambda q, k, v, valid_BN: attend(q, k, v, valid_BN, chunk)


def methods(chunks: list[int]) -> dict[str, Attention]:
    return {"fused": ours("auto"), "quadratic": quadratic, **{f"chunks of {size}": ours(size) for size in chunks},
            "bf16 fused": fused, "bf16 in casts": ours("auto")}


def measure(compared: dict[str, Attention], shape: tuple[int, ...], masked: bool, seconds: float) -> list[Case]:
    """One run of each is followed for its memory, the others for the time."""
    exact = torch.randn(4, *shape)
    given = {dtype: [x.requires_grad_() for x in exact.to(dtype).unbind()] for dtype in (torch.float32, torch.bfloat16)}
    valid = torch.arange(shape[2]).expand(shape[0], -1) < shape[2] * 3 // 4 if masked else None

    def seconds_of(name: str) -> float:
        q, k, v, upstream = given[torch.bfloat16 if name.startswith("bf16") else torch.float32]
        began = time.perf_counter()
        torch.autograd.grad(compared[name](q, k, v, valid), (q, k, v), upstream)
        return time.perf_counter() - began

    mib = {}
    for name in compared:
        with PeakMemory() as tracker:
            tracker.mark("data", given, valid)
            before = tracker.live_bytes
            seconds_of(name)
        mib[name] = (tracker.peak_bytes - before) / 2**20
    rounds: list[dict[str, float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < until:
        rounds.append({name: seconds_of(name) for name in compared})
    return [Case(shape[2], masked, name, mib[name], 1000 * min(times[name] for times in rounds)) for name in compared]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def verdict(cases: list[Case]) -> str:
    """What the largest masked case says."""
    largest = {case.method: case for case in cases if case.masked and case.tokens == cases[-1].tokens}
    plain, kernel = largest["quadratic"], largest["fused"]
    chunks = min((case for case in largest.values() if case.method.startswith("chunks")), key=lambda case: case.mib)
    over_plain, over_kernel = chunks.milliseconds / plain.milliseconds, chunks.milliseconds / kernel.milliseconds
    return (
        f"Chunking pays where no fused kernel takes the inputs: at {plain.tokens:,} masked tokens, {chunks.method} "
        f"need {plain.mib / chunks.mib:.1f} times less memory than the quadratic form, at {over_plain:.1f} times its "
        "time. Where one takes them (on a CPU it does, masks included) chunking costs "
        f"{over_kernel:.1f} times the time and {chunks.mib / kernel.mib:.1f} times the memory for nothing: hence "
        "model.attention_chunk: auto.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15, help="for each number of tokens and mask")
    args = parser.parse_args(argv)
    print(f"{date.today()}, torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads, float32, "
          f"B={args.batch} H={args.heads} E={args.width}")
    print(f"{'tokens':>6}  {'key mask':8}  {'method':14} {'MiB':>7} {'ms':>8} {'time':>6}")
    cases: list[Case] = []
    for tokens in args.tokens:
        for masked in (False, True):
            shape = (args.batch, args.heads, tokens, args.width)
            found = measure(methods(args.chunks), shape, masked, args.seconds)
            cases += found
            for case in found:
                print(f"{tokens:6,}  {'yes' if masked else 'no':8}  {case.method:14} {case.mib:7.1f} "
                      f"{case.milliseconds:8.1f} {case.milliseconds / found[0].milliseconds:6.1f}", flush=True)
    print(verdict(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
