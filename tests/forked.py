"""Processes that tests start and kill: each is forked from one that has loaded everything and done nothing, so that it
is at its work at once. There is one such server in a process, whoever asks first, hence one list for all."""

import multiprocessing
from multiprocessing.context import ForkServerContext

LOADED = ["tests.killing", "tests.download_killing", "tests.ranks", "tests.search.things", "benchmarks.fuzz", "av",
          "matplotlib.figure", "matplotlib.backends.backend_agg", "py7zr", "pyarrow.parquet", "requests", "soundfile",
          "tokenizers", "torch._dynamo", "torch.utils.tensorboard", "torchaudio"]


def context() -> ForkServerContext:
    """How to start such processes: `context().Process(target=...)`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LOADED)
    return server


def as_usual() -> None:
    """In such a process: those that it starts itself are forked from it, as from any other, and not from a server."""
    multiprocessing.set_start_method("fork", force=True)
