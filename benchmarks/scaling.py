"""What a step costs as it grows, and how long a run of many samples takes to its first step.

    python benchmarks/scaling.py step      # against image tokens, effective batch, clip length, size of the model
    python benchmarks/scaling.py start     # with 1,000 to 1,000,000 samples [--most 100000 --turns 5 --folder DIR]

step: the real training step of the stage align, all patches kept, on random input of full length. Each point is a
process of its own: the median of five steps behind a first one, and the memory at the peak above that before the first.
The slope is that of the logarithms, by least squares: 1 is proportional.

start: from the command to the end of the first optimizer step of the model nano, on a list (set `manifest`) of
stretches of ten sounds with eight words each. Nothing is kept at the first start; the others find what that one has
worked out. The sounds are decoded at each use, since a first start would decode a million of them. Memory is that of
all processes at the end of this step, shared pages counted once (PSS), and the peak that of the main process. The ten
sounds are 16 MB each; the list takes 0.1 kB a sample.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting(lambda line: None)

import numpy as np

STEPS, TURNS = 5, 5
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
SOUNDS, RATE_HZ, STRETCH_S, APART_S = 10, 8_000, 0.5, 0.01
MANY_S, MANY_GB = 20.0, 1.0  # more than a thousand samples take, at most
GIB = 1 << 30

BASE = {"size": "tiny", "image_size": 112, "batch": 16, "clip_s": 5.0, "inputs": "image+text"}
AXES: dict[str, tuple[str, Sequence[Any], dict[str, Any]]] = {  # axis -> what varies, its values, what else differs
    "image tokens": ("image_size", (112, 160, 224, 320), {}),
    "effective batch": ("batch", (8, 16, 32, 64), {}),
    "clip, s": ("clip_s", (1.28, 2.56, 5.12, 10.24), {"inputs": "audio+text"}),
    "parameters": ("size", ("tiny", "small", "base"), {"batch": 8}),
}


# ---- a step ----------------------------------------------------------------------------------------------------------


def step_cost(point: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step, peak memory in GiB, and the place on the axis, for settings as in BASE; in this process."""
    import torch

    from trimodal.config import load_config
    from trimodal.memory.devices import Fit, held_gib, peak_gib, reset_peak
    from trimodal.training import loop
    from trimodal.training.planner import TOWERS, largest_batch
    from trimodal.training.run import Options, open_run
    from trimodal.training.stage import build_stage

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [
            "data.datasets=[synthetic]", "data.workers=0", "training.gradient_accumulation_steps=1",
            f"training.batch_size={point['batch']}", f"model.size={point['size']}",
            f"model.image_size={point['image_size']}", f"data.audio_max_s={point['clip_s']}",
            "stages.align.image_keep=1.0", "stages.align.audio_keep=1.0", f"paths.output_dir={folder}/run",
            f"paths.data_root={folder}/data", "model.context_length=32"])
        run = open_run(config, Options("cpu"), None)
        row = next(row for row in run.config.stages if row.name == "align")
        task = next(task for task in row.tasks if "+".join(task.inputs) == point["inputs"])
        run.fits[row.name] = Fit(dict.fromkeys(TOWERS, 10**6), dict.fromkeys(TOWERS, 0))
        stage, batch = build_stage(run, row, [task], 1), filled(largest_batch(run.config, row, task, run.model))
        run.tracker.open_bar(1, 0, row.name)
        run.model.train()
        reset_peak(run.device)
        before = held_gib(run.device) or resident_gib()
        loop.train_step(run, stage, 0, batch).read()
        times = []
        for _ in range(STEPS):
            begin_s = time.perf_counter()
            loop.train_step(run, stage, 0, batch).read()
            times.append(time.perf_counter() - begin_s)
        peak = peak_gib(run.device).gib - before
        run.tracker.close()
        x = {"image tokens": (point["image_size"] // 16) ** 2, "parameters": sum(
            parameter.numel() for parameter in run.model.parameters())}
        del torch
        return {"s": statistics.median(times), "low_s": min(times), "high_s": max(times), "gib": peak, **x}


def filled(batch: Any) -> Any:
    """A batch of zeros with different samples, full sounds and captions, and random values."""
    import torch

    batch.sample_ids = torch.arange(len(batch.sample_ids))
    batch.keys = [str(i) for i in range(len(batch.sample_ids))]
    draw = torch.Generator().manual_seed(0)
    for name in batch.noise:
        batch.noise[name] = torch.rand(batch.noise[name].shape, generator=draw)
    batch.image_ids = batch.audio_ids = batch.sample_ids
    if batch.images is not None:
        batch.images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=draw)
    if batch.audio is not None:
        batch.audio = torch.rand(batch.audio.shape, generator=draw).half()
        batch.audio_lengths = torch.full_like(batch.audio_lengths, batch.audio.shape[1])
    if batch.input_ids is not None:
        batch.input_ids = torch.randint(1_000, 20_000, batch.input_ids.shape, generator=draw)
        batch.attention_mask = torch.ones_like(batch.attention_mask)
        batch.caption_owner = batch.caption_ids = torch.arange(len(batch.input_ids))
    return batch


def resident_gib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB


def slope(places: Sequence[float], values: Sequence[float]) -> float:
    """Of log(value) over log(place), by least squares."""
    return float(np.polyfit(np.log(places), np.log(values), 1)[0])


def steps() -> Iterator[str]:
    yield f"{'axis':<16} {'at':>12}  {'s a step (range)':<22} {'GiB':>6}"
    for axis, (varies, values, others) in AXES.items():
        found, places = [], []
        for value in values:
            one = child("--point", json.dumps({**BASE, **others, varies: value}))
            places.append(one.get(axis, value))
            found.append(one)
            spread = f"{one['s']:.3f} ({one['low_s']:.3f} to {one['high_s']:.3f})"
            yield f"{axis:<16} {places[-1]:>12,}  {spread:<22} {one['gib']:>6.2f}"
        yield (f"{axis:<16} {'slope':>12}  {slope(places, [one['s'] for one in found]):<22.2f} "
               f"{slope(places, [one['gib'] for one in found]):>6.2f}")


# ---- a start ---------------------------------------------------------------------------------------------------------


def first_step(manifest: Path) -> None:
    """Train to the end of the first optimizer step, print what it took, and end the process there."""
    from trimodal.config import load_config
    from trimodal.training import loop
    from trimodal.training.run import Options

    def stop(*given: Any) -> Any:
        result = train_step(*given)
        result.read()
        status = Path("/proc/self/status").read_text()
        peak_kb = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        begin_s = float(os.environ["BEGIN_S"])
        print("\n" + json.dumps({"s": time.time() - begin_s, "cpu_s": time.process_time(), "gib": pss_gib(os.getpid()),
                                 "peak_gib": peak_kb / (1 << 20)}), flush=True)
        os.killpg(0, 9)

    folder = manifest.parent
    config = load_config(None, [
        "model.size=nano", "data.datasets=[manifest]", f"data.manifest={manifest}", "data.cache_max_gb=0.000001",
        f"paths.data_root={folder}/data", f"paths.output_dir={folder}/run", "data.workers=1",
        "training.log_every_steps=1"])
    train_step = loop.train_step
    setattr(loop, "train_step", stop)  # noqa: B010, as a plain assignment has another type
    loop.train(config, Options("cpu", overwrite=True))


def pss_gib(pid: int) -> float:
    """Of a process and those below it, in GiB; pages that they share count once."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:"))) / (1 << 20)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(pss_gib(int(one)) for one in children)


def write_list(folder: Path, count: int) -> Path:
    """A list of `count` stretches of the sounds in `folder`, which are made where they are missing."""
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "na", "po", "ri", "sa", "tu") for b in
             ("bel", "dor", "gan", "lim", "mok", "nup", "ras", "tel", "vin", "zot")]
    draw, length_s = random.Random(0), COUNTS[-1] / SOUNDS * APART_S + STRETCH_S
    for number in range(SOUNDS):
        path = folder / f"{number}.wav"
        if not path.exists():
            noise = np.random.default_rng(number).standard_normal(round(length_s * RATE_HZ)) * 3_000
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE_HZ)
                file.writeframes(noise.astype("<i2").tobytes())
    path = folder / f"{count}.jsonl"
    with path.open("w") as lines:
        for i in range(count):
            lines.write(json.dumps({"audio": f"{i % SOUNDS}.wav", "start": round(i // SOUNDS * APART_S, 2),
                                    "duration": STRETCH_S, "text": " ".join(draw.choices(words, k=8))}) + "\n")
    return path


def starts(folder: Path, counts: Sequence[int], turns: int) -> dict[int, list[dict[str, float]]]:
    """What each start took, by the number of samples; the first of each finds nothing kept."""
    import shutil

    shutil.rmtree(folder / "data", ignore_errors=True)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(1 + turns):
        for count in counts:
            path = folder / f"{count}.jsonl"
            if not path.exists():
                write_list(folder, count)
            found[count].append(child("--first-step", str(path)))
    return found


def start_table(found: Mapping[int, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    yield (f"{'samples':>9}  {'first start':>12}  {'CPU s':>6}  {'peak GiB':>8}  {'later starts (range)':>24}  "
           f"{'CPU s':>6}  {'GiB':>6}  {'peak GiB':>8}")
    for count, (first, *later) in found.items():
        times = [one["s"] for one in later]
        spread = f"{statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})"
        middle = {key: statistics.median(one[key] for one in later) for key in ("cpu_s", "gib", "peak_gib")}
        yield (f"{count:>9,}  {first['s']:>10.1f} s  {first['cpu_s']:>6.1f}  {first['peak_gib']:>8.2f}  {spread:>24}  "
               f"{middle['cpu_s']:>6.1f}  {middle['gib']:>6.2f}  {middle['peak_gib']:>8.2f}")


@functools.cache
def started_before() -> "tempfile.TemporaryDirectory[str]":
    """A folder with lists of a thousand and a million samples, both of which have been started from once."""
    folder = tempfile.TemporaryDirectory()
    starts(Path(folder.name), (COUNTS[0], COUNTS[-1]), 0)
    return folder


def measured() -> dict[str, float]:
    """Seconds and GB by which a later start with a million samples exceeds one with a thousand, for benchmarks/run.py;
    the first call is preceded by the first starts."""
    folder = Path(started_before().name)
    few, many = (child("--first-step", str(folder / f"{count}.jsonl")) for count in (COUNTS[0], COUNTS[-1]))
    return {"million_samples_start_s": many["s"] - few["s"],
            "million_samples_memory_gb": (many["gib"] - few["gib"]) * GIB / 1e9}


# ---- processes -------------------------------------------------------------------------------------------------------


def child(*arguments: str) -> dict[str, float]:
    """The last line that this script prints in a process group of its own, which is JSON."""
    done = subprocess.run([sys.executable, __file__, "child", *arguments], capture_output=True, text=True,
                          start_new_session=True, env={**os.environ, "BEGIN_S": repr(time.time())})
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("step", "start", "child"))
    parser.add_argument("--most", type=int, default=COUNTS[-1])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first-step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "child":
        if options.first_step:
            first_step(options.first_step)
        print("\n" + json.dumps(step_cost(options.point)))
        return 0
    from benchmarks.run import commit, hardware

    print(f"{hardware()}; {commit()}, {date.today()}")
    if options.what == "step":
        for line in steps():
            print(line, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = starts(folder, [count for count in COUNTS if count <= options.most], options.turns)
    print("\n".join(start_table(found)))
    few, many = found[min(found)], found[max(found)]
    more_s, more_gib = (statistics.median(one[key] for one in many[1:]) - statistics.median(one[key] for one in few[1:])
                        for key in ("s", "gib"))
    print(f"{max(found):,} take {more_s:.1f} s and {more_gib * GIB / 1e9:.2f} GB more than {min(found):,}; at most "
          f"{MANY_S:g} s and {MANY_GB:g} GB are allowed for {COUNTS[-1]:,}")
    return int(more_s > MANY_S or more_gib * GIB / 1e9 > MANY_GB)


if __name__ == "__main__":
    sys.exit(main())
