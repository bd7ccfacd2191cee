"""How long OpenMP's threads wait busily: bounded by every command, before torch loads its OpenMP runtime and reads it.

A thread that has done its share of an operation waits for the others, and by default it does so by asking again and
again. Where another process wants that core, the thread that all wait for does not get it, and a step takes up to
thirty times longer (`benchmarks/busy_machine.py`).
"""

import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

BOUNDED = {
    "GOMP_SPINCOUNT": "2000",  # libgomp, in torch for Linux: turns, before a thread sleeps; a few microseconds
    "KMP_BLOCKTIME": "1",  # libiomp and libomp, in torch for macOS and builds with MKL: milliseconds
}
OWN = (*BOUNDED, "OMP_WAIT_POLICY")  # of which any one says that the user has chosen


def bound_waiting(say: Callable[[str], Any] = print, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting OpenMP threads sleep soon, and `say` so in one line; nothing where the user has chosen himself, or
    where torch is loaded already. Child processes inherit it. Under torchrun the first process says it."""
    if "torch" in sys.modules or any(name in environment for name in OWN):
        return
    environment.update(BOUNDED)
    if environment.get("RANK", "0") == "0":
        chosen = ", ".join(f"{name}={value}" for name, value in BOUNDED.items())
        say(f"OpenMP: waiting threads sleep soon, for machines that do other work as well ({chosen}; a value of your "
            f"own for one of {', '.join(OWN)} is kept)")
