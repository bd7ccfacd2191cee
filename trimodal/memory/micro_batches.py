"""Micro-batches without gradients: so many rows at a time as asked for, and fewer once memory has run out."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from trimodal.errors import UserError
from trimodal.memory import devices

T = TypeVar("T")


class MicroBatches:
    """Does work on so many rows of a modality at a time; out of memory halves that for all that follows."""

    def __init__(self, device: torch.device, amp: torch.dtype | None, sizes: Mapping[str, int],
                 less: Callable[[int, str], None] = lambda size, cause: None):
        """`amp`: of autocast, None for float32. `sizes`: rows at a time by modality. `less` is told when memory ran
        out: the new size, and why."""
        self.device, self.amp, self.size, self.less = device, amp, dict(sizes), less

    def of(self, names: tuple[str, ...], rows: int, work: Callable[[slice], T], *, weight: int = 1) -> list[T]:
        """The results of `work` on slices of `rows` rows, in order.

        A row takes as much memory as `weight` rows of each of the modalities `names`, all together.

        Raises:
            UserError: out of memory with one row.
        """
        found: list[T] = []
        start = 0
        while start < rows:
            size = max(1, min(self.size[name] for name in names) // (weight * len(names)))
            try:
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    found.append(work(slice(start, min(start + size, rows))))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                cause = devices.out_of_memory_cause(error)
            # outside of the handler, so that the failed micro-batch's tensors are let go
            devices.free_cached(self.device)
            if size == 1:
                raise UserError(f"out of memory on {self.device} with one sample at a time ({cause}); free the device "
                                "for this, or take the CPU (--device cpu)")
            self.size = {known: max(1, value // 2) for known, value in self.size.items()}
            self.less(max(self.size.values()), cause)
        return found
