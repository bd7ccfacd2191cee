"""Ranks without torchrun: processes that share one store, as torchrun's agent would have started them.

They are forked from a server that has loaded everything (tests/forked.py), so a rank begins within milliseconds.

    def work(folder: Path) -> Tensor:              # in a module of its own, at top level
        world = distributed.start()
        ...
    first, second = in_ranks(2, work, tmp_path)
    first.value, second.printed
"""

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests import forked

PATIENCE_S = 600.0  # no work of a test takes that long, however busy the machine


@dataclass(frozen=True)
class Rank:
    """What one rank's work gave, and what it printed."""

    value: Any
    printed: str
    told: str  # on stderr


def in_ranks(size: int, work: Callable[..., Any], *given: Any) -> list[Rank]:
    """`work(*given)` on each of `size` ranks, which it joins by `distributed.start()`.

    Raises:
        AssertionError: a rank died or raised; with what it printed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        processes = [forked.context().Process(target=_rank, args=(rank, size, store.port, folder, work, given))
                     for rank in range(size)]
        for process in processes:
            process.start()
        _join(processes)
        said = [tuple((folder / f"{rank}.{end}").read_text("utf-8") for end in ("out", "err")) for rank in range(size)]
        assert not any(process.exitcode for process in processes), "\n".join(told for _, told in said)
        return [Rank(torch.load(folder / f"{rank}.pt"), *said[rank]) for rank in range(size)]


def _join(processes: Sequence[BaseProcess]) -> None:
    """Wait for all; the death of one ends the others, and so does that none ends for very long: they would wait for one
    another for a day."""
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], PATIENCE_S)
        if not ended or any(process.exitcode for process in running):
            for process in running:
                process.kill()
        running = [process for process in running if process.exitcode is None]
    for process in processes:
        process.join()


def _rank(rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    forked.as_usual()
    with (open(folder / f"{rank}.out", "w", encoding="utf-8") as out,
          open(folder / f"{rank}.err", "w", encoding="utf-8") as err,
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            torch.save(work(*given), folder / f"{rank}.pt")
            assert not torch.distributed.is_initialized(), "the work has to leave the group of processes"
        except BaseException:
            traceback.print_exc()
            err.flush()
            os._exit(1)
