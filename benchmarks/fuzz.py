"""Damaged files of every kind through the project's own entry points: none may crash, hang or give bad values.

    python benchmarks/fuzz.py [--inputs 2000 --seed 0 --kinds png wav --timeout-s 20 --keep FOLDER]

Each input is a whole file, made in memory, with one to three changes drawn from (seed, kind, number): flipped bits, a
cut, parts copied within the file or from another one, other numbers in its header, runs of 0 or 255, nasty pieces of
text. Most of PNG and Ogg get the right checksums again. Each is read in a process of its own by what reads this kind in
training. Counted are, by kind:

    accepted    read, all values finite and within bounds
    refused     refused with the error of this kind, one line
    hangs       no answer within the time limit
    crashes     any other exception, the end of the process, or more than 6 GB of memory
    bad values  accepted, but not finite, of another shape, or a changed checkpoint that was not noticed

`checkpoint` is changed as it lies on the disk: the digest must notice every change. `resealed` is a checkpoint that was
changed and given the right digest: what then comes out must be plain data. Exit code 1 if any of the last three
columns is not 0; `--keep` writes those inputs to a folder.
"""

import argparse
import math
import os
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
from tqdm import tqdm

from benchmarks.damage import SIDE, damaged, whole
from tests import forked
from trimodal import checkpoint
from trimodal.config import load_config
from trimodal.data import cache
from trimodal.data.images import MAX_PIXELS
from trimodal.data.samples import BrokenSample, SampleTable
from trimodal.errors import CheckpointError, UserError
from trimodal.sets.manifest import MAX_SECONDS, read_manifest
from trimodal.sets.reading import MAX_CAPTION_CHARS

COLUMNS = ("inputs", "accepted", "refused", "hangs", "crashes", "bad values")
FAILURES = COLUMNS[3:]
MEMORY_BYTES = 6 << 30  # what the reading process may write to
LARGEST_SOUND_FRAMES = 100 * 3_600 + 1


# ---- reading, in a process of its own ----------------------------------------------------------------------------


class Bad(Exception):
    """What was accepted is not what this kind may be."""


def must(holds: bool, what: str) -> None:
    if not holds:
        raise Bad(what)


def read_picture(path: Path) -> None:
    pixels = cache.decode("image", (str(path), 0.0, 0.0), SIDE)
    must(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0,
         f"{pixels.dtype} {pixels.shape}")
    must(min(pixels.shape[:2]) <= SIDE and pixels.size <= 3 * MAX_PIXELS, f"{pixels.shape}")


def read_sound(path: Path) -> None:
    for start_s, duration_s in ((0.0, 0.0), (0.2, 0.25)):
        mel = cache.decode("sound", (str(path), start_s, duration_s), SIDE)
        must(mel.dtype == np.float16 and mel.ndim == 2 and mel.shape[1] == 80, f"{mel.dtype} {mel.shape}")
        must(0 < len(mel) <= (26 if duration_s else LARGEST_SOUND_FRAMES), f"{len(mel)} frames")
        must(bool(np.isfinite(mel).all()), "log-mels that are not finite")


def read_list(path: Path) -> None:
    table = SampleTable.pack(read_manifest(path))
    must(len(table) > 0, "no samples")
    for sample in (table[i] for i in range(len(table))):
        for file in filter(None, (sample.image, sample.audio)):
            must(os.path.realpath(file).startswith(os.path.realpath(path.parent) + "/"), f"outside: {file}")
        must(0 <= sample.start_s <= MAX_SECONDS and 0 <= sample.duration_s <= MAX_SECONDS, "seconds")
        must(all(0 < len(text) <= MAX_CAPTION_CHARS for text in sample.captions), "captions")
        "".join((sample.key, sample.speaker, *sample.captions, *sample.labels)).encode("utf-8", "surrogateescape")


def read_settings(path: Path) -> None:
    for value in leaves(asdict(load_config(path))):
        must(not isinstance(value, float) or math.isfinite(value), f"{value}")
        must(not isinstance(value, int) or abs(value) < 2**63, "a whole number beyond 63 bits")


def read_checkpoint(path: Path) -> None:
    checkpoint.load(path)
    raise Bad("the change was not noticed")


def read_resealed(path: Path) -> None:
    import torch

    for value in leaves(checkpoint.load(path)):
        if isinstance(value, torch.Tensor):
            must(value.untyped_storage().nbytes() <= path.stat().st_size, "a tensor larger than the file")
        else:
            must(value is None or type(value) in (bool, int, float, str, bytes), f"a {type(value).__name__}")


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


class Kind(NamedTuple):
    suffix: str
    read: Callable[[Path], None]
    error: type[Exception]


KINDS: dict[str, Kind] = {
    **{name: Kind(f".{name}", read_picture, BrokenSample) for name in ("jpeg", "png", "webp", "gif", "bmp")},
    **{name: Kind(f".{name}", read_sound, BrokenSample) for name in ("wav", "flac", "ogg", "mp3", "m4a")},
    "mp4": Kind(".mp4", read_picture, BrokenSample),
    "mp4 sound": Kind(".mp4", read_sound, BrokenSample),
    "jsonl": Kind(".jsonl", read_list, UserError), "csv": Kind(".csv", read_list, UserError),
    "checkpoint": Kind(".pt", read_checkpoint, CheckpointError),
    "resealed": Kind(".pt", read_resealed, CheckpointError),
    "yaml": Kind(".yaml", read_settings, UserError),
}


def outcome(kind: str, path: Path) -> tuple[str, str]:
    """(column, what was said) of one input."""
    try:
        KINDS[kind].read(path)
    except KINDS[kind].error as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("bad values", f"several lines: {error}")
    except Bad as error:
        return "bad values", str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "crashes", f"{type(error).__name__}: {str(error)[:200]!r} in {Path(where.filename).name}:{where.lineno}"
    return "accepted", ""


def serve(pipe: Connection, folder: str) -> None:
    """Read what arrives, until nothing does. What decoders print goes nowhere."""
    import torch

    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    Path(folder, "b").mkdir(exist_ok=True)
    for name in ("a.png", "b/c.png"):
        Path(folder, name).write_bytes(whole("png")[0])
    Path(folder, "a.wav").write_bytes(whole("wav")[0])
    for kind in ("png", "mp4 sound", "checkpoint"):  # loads the libraries, which take seconds at first
        Path(folder, "warm" + KINDS[kind].suffix).write_bytes(whole(kind)[0])
        outcome(kind, Path(folder, "warm" + KINDS[kind].suffix))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    pipe.send(("ready", ""))
    while True:
        kind, data = pipe.recv()
        path = Path(folder, "input" + KINDS[kind].suffix)
        path.write_bytes(data)
        pipe.send(outcome(kind, path))


class Reader:
    """A process that reads inputs; a new one takes over from one that hangs or has died."""

    def __init__(self, folder: Path, timeout_s: float, serve: Callable[[Connection, str], None] = serve):
        self.folder, self.timeout_s, self.serve = folder, timeout_s, serve
        self.process: Any = None

    def read(self, kind: str, data: bytes) -> tuple[str, str]:
        if self.process is None:
            self._start()
        try:
            self.pipe.send((kind, data))
            if self.pipe.poll(self.timeout_s):
                return self.pipe.recv()
            found = ("hangs", f"no answer within {self.timeout_s:g} s")
        except (EOFError, OSError):
            self.process.join()
            found = ("crashes", f"the process ended with {self.process.exitcode}")
        self.close()
        return found

    def _start(self) -> None:
        context = forked.context()  # has loaded the libraries once, and nothing else happened
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.serve, args=(theirs, str(self.folder)), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# ---- all of them -------------------------------------------------------------------------------------------------


def fuzz(kinds: Sequence[str], inputs: int, seed: int, timeout_s: float,
         keep: Path | None = None) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts by kind, and a line for each failure. The kinds take turns."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder), timeout_s)
        try:
            for kind in kinds:  # or their damaged ones would be refused for another reason
                for data in whole(kind):
                    found = reader.read("resealed" if kind == "checkpoint" else kind, data)
                    assert found[0] == "accepted", (kind, found)
            for i in tqdm(range(inputs), "Reading", unit="file", disable=None):
                kind, number = kinds[i % len(kinds)], i // len(kinds)
                data = damaged(kind, number, seed)
                column, said = reader.read(kind, data)
                counts[kind].update(("inputs", column))
                if column in FAILURES:
                    problems.append(f"{column}: {kind} {number}: {said}")
                    if keep:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{kind}-{number}{KINDS[kind].suffix}").write_bytes(data)
        finally:
            reader.close()
    return counts, problems


def format_table(counts: dict[str, Counter[str]]) -> str:
    rows = [*counts.items(), ("all", sum(counts.values(), Counter()))]
    lines = [f"{'kind':<11}" + "".join(f"{column:>12}" for column in COLUMNS)]
    lines += [f"{kind:<11}" + "".join(f"{found[column]:>12,}" for column in COLUMNS) for kind, found in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--timeout-s", type=float, default=20.0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    options = parser.parse_args(argv)
    counts, problems = fuzz(options.kinds, options.inputs, options.seed, options.timeout_s, options.keep)
    print("\n".join([*problems, format_table(counts)]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
