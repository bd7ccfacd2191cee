"""open_clip 3.3.0 and this project on the same pairs: its environment, the lists of both, and runs that are watched.

Each trains by its own program on files: `open_clip_train.main` on a csv list, `run_training.py` on a manifest. Pictures
are squares of one size without transparency, a caption each; the two lists hold the same pairs in the same splits.
Towers are of one size: ViT 192 x 12 with patches of 16 pixels, text 192 x 4, 32 tokens, features of 512. Both get two
threads and the same bound on their waiting (`trimodal/openmp.py`), which open_clip does not set itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.attention_memory import cpu_name
from trimodal.data.generated import NUM_IMAGES, generate_image
from trimodal.openmp import BOUNDED
from trimodal.sets.synthetic import image_captions

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("open_clip_torch==3.3.0", "webdataset==0.2.86", "braceexpand", "pandas", "ftfy", "timm==1.0.31")
RECIPE = ROOT / "recipes" / "image_text.yaml"
THREADS = 2
TOKENS = 32
MODEL = {"embed_dim": 512,
         "vision_cfg": {"image_size": 224, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16},
         "text_cfg": {"context_length": TOKENS, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}}
OURS = ("--model-size", "tiny", "--device", "cpu", "data.datasets=[manifest]", f"model.context_length={TOKENS}",
        "data.workers=1", "evaluation.resamples=0", "report.gallery_queries=0", "training.save_every_minutes=0",
        "training.save_every_epochs=1000", "training.gradient_accumulation_steps=1")
THEIRS = ("--csv-img-key", "image", "--csv-caption-key", "text", "--workers", "1", "--save-frequency", "0",
          "--device", "cpu")
R5 = ("image_to_text_R@5", "text_to_image_R@5")


@dataclass(frozen=True)
class Epoch:
    """The moment at which a program has written down the validation that ends an epoch."""

    wall_s: float  # since the command began
    cpu_s: float  # of the process and all its children
    recall: float  # R@5 on the validation split, mean of both directions


@dataclass(frozen=True)
class Watched:
    """What was seen of one run from outside."""

    epochs: list[Epoch]
    peak_gib: float  # resident memory of the process that trains, at most
    wall_s: float  # until it ended, or was ended


# ---- the other environment -------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """The Python of an environment in `folder` with open_clip, on the torch of this one; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        [packages] = (folder / "lib").glob("python*/site-packages")
        (packages / "torch_of_the_project.pth").write_text(str(Path(np.__file__).parent.parent) + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


@cache
def kept_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder that is there until this process ends: what several measurements share is made once."""
    return tempfile.TemporaryDirectory(prefix="beside_open_clip_")


# ---- the pairs -------------------------------------------------------------------------------------------------------


Pair = tuple[np.ndarray, str]


def synthetic_pairs(size: int, held_out: int = 128) -> dict[str, Iterable[Pair]]:
    """Generated shapes: of each combination two pictures, one for each phrasing; of those held out the first alone."""
    order = np.random.default_rng(0).permutation(NUM_IMAGES)

    def drawn(combinations: np.ndarray, phrasings: Sequence[int]) -> Iterable[Pair]:
        for combination in combinations.tolist():
            for k in phrasings:
                rng = np.random.default_rng([combination, k])
                yield generate_image(combination, size, rng), image_captions(combination)[k]

    return {"train": drawn(order[held_out:], (0, 1)), "val": drawn(order[:held_out], (0,))}


def stamps_pairs(size: int, data_root: Path) -> dict[str, Iterable[Pair]]:
    """Tux Paint stamps on white squares, in the splits of the project; held out is one picture of each caption."""
    from datasets import read_tables
    from trimodal.config import config_from_dict
    from trimodal.data.images import decode_image, fit_eval
    from trimodal.data.samples import normalise_caption

    tables = read_tables(config_from_dict({"paths": {"data_root": str(data_root)}, "data": {"datasets": ["stamps"]}}),
                         ("train", "val"))

    def read(split: str) -> Iterable[Pair]:
        table, seen = tables[split], set[str]()
        for i in np.flatnonzero(table.has_image).tolist():
            caption = table.captions[table.caption_offsets[i]]
            if split == "train" or normalise_caption(caption) not in seen:
                seen.add(normalise_caption(caption))
                yield fit_eval(decode_image(table.images[i]), size, "pad"), caption

    return {split: read(split) for split in ("train", "val")}


def write_lists(folder: Path, pairs: Mapping[str, Iterable[Pair]]) -> dict[str, int]:
    """Write pictures as PNG, a list for each program, and the sizes of the model for open_clip; pairs of each split."""
    (folder / "pictures").mkdir(parents=True)
    counts, lines = dict[str, int](), list[str]()
    for split, found in pairs.items():
        rows = ["image\ttext"]
        for number, (picture, caption) in enumerate(found):
            path = folder / "pictures" / f"{split}_{number:05d}.png"
            Image.fromarray(picture).save(path)
            rows.append(f"{path}\t{caption}")
            lines.append(json.dumps({"image": str(path), "text": caption, "split": split}))
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
        counts[split] = len(rows) - 1
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "same_sizes.json").write_text(json.dumps(MODEL))
    return counts


def fill_cache(lists: Path, *settings: str) -> None:
    """Decode the pictures of `lists` into this project's cache, as the first run with these settings does."""
    from datasets import load_data
    from trimodal.config import load_config

    given = [word for word in our_words(lists, settings) if "=" in word]
    load_data(load_config(RECIPE, [*given, f"paths.data_root={lists / 'data'}"]), ("train", "val"))


# ---- the programs ----------------------------------------------------------------------------------------------------


_START = ("import sys, open_clip; open_clip.add_model_config(sys.argv[1]); "
          "from open_clip_train.main import main; main(sys.argv[2:])")


def theirs(python: Path, lists: Path, folder: Path, words: Sequence[str], **watching: Any) -> Watched:
    """Train with open_clip, whose results go to `folder`; `words`: its flags."""
    command = [str(python), "-c", _START, str(lists / "same_sizes.json"), "--model", "same_sizes",
               "--train-data", str(lists / "train.tsv"), "--val-data", str(lists / "val.tsv"),
               "--logs", str(folder.parent), "--name", folder.name, *THEIRS, *words]

    def recalls() -> list[float]:
        return [_mean(record) for record in _lines(folder / "checkpoints" / "results.jsonl")]

    return watch(command, recalls, folder.with_suffix(".txt"), **watching)


def ours(lists: Path, folder: Path, words: Sequence[str], **watching: Any) -> Watched:
    """Train with this project, whose outputs go to `folder`; `words`: flags and settings."""
    command = [sys.executable, str(ROOT / "run_training.py"), "--config", str(RECIPE), "--output-dir", str(folder),
               "--data-root", str(lists / "data"), *our_words(lists, words)]

    def recalls() -> list[float]:
        return [_mean(record["metrics"]) for record in _lines(folder / "logs" / "metrics.jsonl")
                if record["kind"] == "validation"]

    return watch(command, recalls, folder.with_suffix(".txt"), **watching)


def our_words(lists: Path, words: Sequence[str]) -> list[str]:
    """Flags and settings of a run of ours on `lists`: those that are always the same, then `words`."""
    return [*OURS, f"data.manifest={lists / 'manifest.jsonl'}", *words]


def _mean(figures: dict[str, float]) -> float:
    return sum(figures[name] for name in R5) / len(R5)


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] if path.exists() else []


def watch(command: Sequence[str], recalls: Callable[[], list[float]], log: Path, *, until: float = 2.0,
          limit_cpu_s: float = 7200.0) -> Watched:
    """Run `command` to its end, until an epoch's recall is at least `until`, or for `limit_cpu_s` of CPU time, which
    other work on the machine hardly changes; its output is in `log`.

    Raises:
        RuntimeError: it has failed.
    """
    own = {**os.environ, **BOUNDED, "OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    log.parent.mkdir(parents=True, exist_ok=True)
    epochs, begin_s, peak_gib = list[Epoch](), time.perf_counter(), 0.0
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                seen, now_s, used_s = recalls(), time.perf_counter() - begin_s, cpu_s(process.pid)
                epochs += [Epoch(now_s, used_s, recall) for recall in seen[len(epochs):]]
                peak_gib = max(peak_gib, _peak_gib(process.pid))
                if used_s > limit_cpu_s or (epochs and epochs[-1].recall >= until):
                    return Watched(epochs, peak_gib, now_s)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{command[0]} has failed:\n" + "\n".join(log.read_text("utf-8").splitlines()[-20:]))
    return Watched(epochs, peak_gib, time.perf_counter() - begin_s)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, of the children it has waited for, and of those that it has now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except OSError:  # it has ended meanwhile
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_s, children))


def _peak_gib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), 0.0)


def machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"
