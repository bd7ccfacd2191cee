"""Which attention kernel is the fastest for bfloat16 on this CPU: timed once, then kept for all runs.

A choice changes no more than rounding, but two kernels round differently. So a run keeps to its own: it is in the
checkpoints, all ranks have that of the main one, and later runs on this machine read the choice instead of timing anew,
which could come out otherwise.
"""

import json
import time
from pathlib import Path

import torch

from trimodal.blocks import KERNELS, attend
from trimodal.files import replacing
from trimodal.memory.devices import cpu_bf16_units, machine_file

SHAPE = (8, 3, 128, 64)  # samples, heads, tokens and head width: of a picture's kept patches, or a short sound's
ROUNDS = 5


def has_choice(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether the kernel matters: for bfloat16 on a CPU."""
    return device.type == "cpu" and dtype == torch.bfloat16


def choose_kernel(device: torch.device, dtype: torch.dtype | None) -> str:
    """One of model.KERNELS: the fastest as timed here once; the first where nothing is to choose."""
    if not has_choice(device, dtype):
        return KERNELS[0]
    path, known = kernels_file(), _read()
    place = f"{cpu_bf16_units()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if known.get(place) in KERNELS:
        return known[place]
    seconds = times()
    fastest = min(seconds, key=lambda kernel: seconds[kernel])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as file:
            json.dump(known | {place: fastest}, file, indent=1)
    except OSError:
        pass  # the next run times them again
    return fastest


def times() -> dict[str, float]:
    """The least CPU time of a forward and backward pass of each kernel, in seconds; they take turns. Wall time would
    depend on what else the machine does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    spent = dict.fromkeys(KERNELS, float("inf"))
    for turn in range(ROUNDS + 1):  # the first one warms up
        for kernel in KERNELS:
            start_s = time.process_time()
            torch.autograd.grad(attend(q, k, v, None, "auto", kernel).sum(), (q, k, v))
            if turn:
                spent[kernel] = min(spent[kernel], time.process_time() - start_s)
    return spent


def kernels_file() -> Path:
    """Where this machine's choices are kept."""
    return machine_file("attention_kernels.json")


def _read() -> dict[str, str]:
    try:
        return {str(place): str(kernel) for place, kernel in json.loads(kernels_file().read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
