"""How fast model.open_model encodes, with and without threads that read ahead, and what a long list takes of memory.

    OMP_NUM_THREADS=2 python benchmarks/encoding.py [--size base --turns 3 --minutes 60]

An untrained model of our own; JPEG photographs of 1,024 x 768 pixels, WAV files of 10 s at 44.1 kHz, captions of ten
words. Turns of the ways alternate; items per second, median and range. Then sounds from a generator, of so many minutes
in all, and one sound of so many: the resident memory that each adds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.run import commit, hardware
from model import create_model, open_model
from trimodal.checkpoint import save
from trimodal.config import SAMPLE_RATE_HZ, SIZES, config_from_dict
from trimodal.data.tokenizer import load_tokenizer
from trimodal.inference import open_model as module
from trimodal.inference.open_model import OpenModel
from trimodal.memory import devices

GIVEN = {"images": 48, "audio": 32, "texts": 512}  # how many of each


def write_checkpoint(size: str, path: Path) -> None:
    config = config_from_dict({"model": {"size": size}})
    save({"config": config.to_dict(), "tokenizer": load_tokenizer(config.model).to_json(),
          "model_state_dict": create_model(size).state_dict()}, path)


def inputs(folder: Path) -> dict[str, list[str]]:
    """Files that decode as photographs and recordings do, and captions."""
    rng = np.random.default_rng(0)
    found: dict[str, list[str]] = {name: [] for name in GIVEN}
    for n in range(GIVEN["images"]):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
        found["images"].append(str(folder / f"{n}.jpg"))
        coarse.resize((1024, 768), Image.Resampling.BICUBIC).save(found["images"][-1], quality=92)
    for n in range(GIVEN["audio"]):
        found["audio"].append(str(folder / f"{n}.wav"))
        soundfile.write(found["audio"][-1], rng.normal(0, 0.1, 441_000), 44_100)
    words = "dog cat bird tree car rain sea man woman child red green plays runs sings barks in on the a".split()
    found["texts"] = [" ".join(rng.choice(words, 10)) for _ in range(GIVEN["texts"])]
    return found


def rates(model: OpenModel, given: dict[str, list[str]], threads: int) -> dict[str, float]:
    """Items per second by argument."""
    found, before = {}, module.MAX_THREADS
    module.MAX_THREADS = threads
    try:
        for name, elements in given.items():
            begin_s = time.perf_counter()
            model.encode(**{name: elements}, progress=False)  # type: ignore[arg-type]
            found[name] = len(elements) / (time.perf_counter() - begin_s)
    finally:
        module.MAX_THREADS = before
    return found


def added_gib(model: OpenModel, sounds: Any) -> tuple[float, float]:
    """Resident memory at the peak beyond what was held before, and seconds."""
    devices.free_cached(torch.device("cpu"))
    devices.reset_peak(torch.device("cpu"))
    before, begin_s = devices.held_gib(torch.device("cpu")), time.perf_counter()
    model.encode(audio=sounds, progress=False)
    return devices.peak_gib(torch.device("cpu")).gib - before, time.perf_counter() - begin_s


def waves(count: int, seconds: float) -> Iterator[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.normal(0, 0.1, round(seconds * SAMPLE_RATE_HZ)).astype(np.float32), SAMPLE_RATE_HZ


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=20)
    args = parser.parse_args(argv)
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {hardware()}; {args.size}, float32, "
          f"{torch.get_num_threads()} compute threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.size, Path(folder) / "best_model.pt")
        given, model = inputs(Path(folder)), open_model(folder, "cpu")
        rates(model, {name: elements[:8] for name, elements in given.items()}, 1)  # the first calls load libraries
        ways = {"one thread": 1, "reading ahead": module.MAX_THREADS}
        found = [{way: rates(model, given, threads) for way, threads in ways.items()} for _ in range(args.turns)]
        print("| items/s | " + " | ".join(ways) + " |\n| --- | ---: | ---: |")
        for name in GIVEN:
            cells = [sorted(turn[way][name] for turn in found) for way in ways]
            print(f"| {name} | " + " | ".join(f"{median(cell):.1f} ({cell[0]:.1f} to {cell[-1]:.1f})" for cell in cells)
                  + " |")
        print("| sounds | GiB more | seconds |\n| --- | ---: | ---: |")
        for what, sounds in ((f"{args.minutes} of a minute", waves(args.minutes, 60)),
                             (f"{3 * args.minutes} of a minute", waves(3 * args.minutes, 60)),
                             (f"1 of {args.minutes} minutes", waves(1, 60 * args.minutes))):
            gib, seconds = added_gib(model, sounds)
            print(f"| {what} | {gib:.2f} | {seconds:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
