"""Arrays that take long to work out of many samples, kept in the cache's folder: tables of lists, tokens, concepts.

    arrays = kept(config, "words", state, make)     # those of an earlier start with an equal `state`, else make()

A file's name holds the digest of all that its arrays follow from, so that after any change the old file is not found.
It appears whole or not at all, and one that is damaged, or cannot be written, costs nothing but time.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from trimodal.config import Config
from trimodal.files import replacing

FORMAT = 2  # counts up with every change of what is kept, or of how it is worked out
MANY = 10_000  # samples or captions from which on it takes about a second

Arrays = Mapping[str, np.ndarray]


def digest(parts: Iterable[np.ndarray | str]) -> str:
    """SHA-256 of arrays (their types, shapes and bytes) and texts, in order."""
    state = hashlib.sha256(f"{FORMAT}".encode())
    for part in parts:
        if isinstance(part, str):
            content = part.encode("utf-8", "surrogateescape")
            state.update(f"text {len(content)} ".encode() + content)
        else:
            state.update(f"{part.dtype.str} {part.shape} ".encode())
            state.update(np.ascontiguousarray(part).view(np.uint8).data)
    return state.hexdigest()


def kept(config: Config, name: str, state: str, make: Callable[[], Arrays]) -> Arrays:
    """What `make` returns, which follows from `state` alone."""
    return load(config, name, state) or keep(config, name, state, make())


def load(config: Config, name: str, state: str) -> Arrays | None:
    """The arrays kept under `name` and `state`; None where there are none, or the cache is off."""
    if not _is_on(config):
        return None
    try:
        with np.load(_path(config, name, state), allow_pickle=False) as file:  # checks the CRC-32 of each array
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def keep(config: Config, name: str, state: str, arrays: Arrays) -> Arrays:
    """Write `arrays`, where the folder can be written; returns them."""
    if _is_on(config):
        path = _path(config, name, state)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError:
            pass  # the next start works them out again
    return arrays


def _is_on(config: Config) -> bool:
    return config.data.cache and config.data.cache_max_gb > 0


def part(arrays: Arrays, name: str) -> Arrays:
    """Those whose names begin with `name` and a slash, by the rest of their names."""
    return {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}


def _path(config: Config, name: str, state: str) -> Path:
    from trimodal.data.cache import cache_folder

    return cache_folder(config) / "prepared" / f"{name}-{state[:32]}.npz"
