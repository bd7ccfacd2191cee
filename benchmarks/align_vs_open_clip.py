"""Pairs per CPU second of alignment, and what is learnt from equally many, beside open_clip 3.3.0.

    python download_datasets.py --datasets stamps
    python benchmarks/align_vs_open_clip.py                        # 5 turns, about 25 minutes on 2 idle cores
    python benchmarks/align_vs_open_clip.py --quality --turns 0    # 3 seeds: about 15 minutes
    python benchmarks/run.py align_same_bf16 align_default_bf16 align_dropped_bf16 align_same_fp32

Both train by their own programs, on files (see beside_open_clip.py): Tux Paint stamps at 224 pixels, batches of 32.
Speed is the difference of two runs, each of one epoch with one validation on the same 32 pairs, over 128 and over 512
pairs: so without start-up and validation, with reading, workers and logs. Pairs over CPU seconds of the process and its
children, and over wall seconds; memory is the peak of the process that trains. A ratio is ours / theirs, more is better
but for memory; runs take turns, and the median of the turns decides.

  same      whole pictures, AdamW, no drop-path, no clipping, crops as open_clip's: what it trains by default
  default   settings of config.yaml (half of the patches, Muon, drop-path) against the defaults of open_clip
  dropped   the same against open_clip with `--force-patch-dropout 0.5`

`--quality`: R@5 on held-out pairs (mean of both directions) after equally many samples, settings as in `default` and
`dropped`, one learning rate; "error" is the standard error of the mean over the seeds.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

from benchmarks.beside_open_clip import (
    ROOT,
    Watched,
    environment,
    fill_cache,
    kept_folder,
    machine,
    ours,
    stamps_pairs,
    synthetic_pairs,
    theirs,
    write_lists,
)
from benchmarks.run import FIGURES, commit

SHORT, LONG, VAL, BATCH = 128, 512, 32, 32
SAME = ("stages.align.image_keep=1", "stages.align.drop_path=0", "training.optimizer=adamw", "data.min_crop=0.9",
        "data.flip=false", "training.grad_clip_norm=0")
OURS = {"same": SAME, "default": (), "same_fp32": (*SAME, "training.use_amp=false")}
DROPPED = ("--force-patch-dropout", "0.5")
THEIRS = {"default": ("--precision", "amp_bf16"), "dropped": ("--precision", "amp_bf16", *DROPPED),
          "fp32": ("--precision", "fp32")}
KEYS = {"align_same_bf16": ("same", "default"), "align_default_bf16": ("default", "default"),
        "align_dropped_bf16": ("default", "dropped"), "align_same_fp32": ("same_fp32", "fp32")}
SHAPES_PX, STAMPS_PX, SEEDS = 64, 96, (0, 1, 2)


@dataclass(frozen=True)
class Speed:
    """Of the pairs that a longer run has trained on, and a shorter one has not."""

    per_cpu_s: float
    per_s: float
    peak_gib: float

    @staticmethod
    def of(short: Watched, long: Watched) -> "Speed":
        first, last = short.epochs[-1], long.epochs[-1]
        pairs = LONG - SHORT
        return Speed(pairs / (last.cpu_s - first.cpu_s), pairs / (last.wall_s - first.wall_s), long.peak_gib)


def turn(keys: Sequence[str], python: Path, lists: Sequence[Path],
         number: int = 0) -> tuple[dict[str, Speed], dict[str, Speed]]:
    """Run each of our and their settings that `keys` compare on both lists; the order changes from turn to turn."""
    runs = [(side, name) for side in (0, 1) for name in dict.fromkeys(KEYS[key][side] for key in keys)]
    found: tuple[dict[str, Speed], dict[str, Speed]] = ({}, {})
    for side, name in runs if number % 2 == 0 else reversed(runs):
        found[side][name] = Speed.of(*(train(side, name, python, pairs) for pairs in lists))
    return found


def train(side: int, name: str, python: Path, lists: Path) -> Watched:
    """One run of ours (side 0) or theirs (1), by the name of its settings."""
    words = ("--batch-size", str(BATCH), "--epochs", "1", "--lr", "5e-4")
    with tempfile.TemporaryDirectory() as folder:
        if side == 0:
            return ours(lists, Path(folder, "run"), (*words, *OURS[name]))
        return theirs(python, lists, Path(folder, "run"), (*words, *THEIRS[name], "--warmup", "2"))


def measured(keys: Sequence[str]) -> dict[str, float]:
    """One turn, for `benchmarks/run.py`: ratio of pairs per CPU second, ours / theirs."""
    ours_found, theirs_found = turn(keys, *prepare(Path(kept_folder().name), ROOT / "data"))
    return {key: ours_found[KEYS[key][0]].per_cpu_s / theirs_found[KEYS[key][1]].per_cpu_s for key in keys}


def prepare(folder: Path, data_root: Path) -> tuple[Path, list[Path]]:
    """The Python of the other environment, and the short and the long list, in `folder` unless there."""
    lists = [folder / f"stamps_224_{count}" for count in (SHORT, LONG)]
    for one, count in zip(lists, (SHORT, LONG), strict=True):
        if not one.exists():
            pairs = stamps_pairs(224, data_root)
            write_lists(one, {"train": itertools.islice(pairs["train"], count),
                              "val": itertools.islice(pairs["val"], VAL)})
            fill_cache(one)
    return environment(folder / "open_clip"), lists


def speed(python: Path, lists: Sequence[Path], turns: int) -> None:
    found = []
    for number in range(turns):
        found.append(turn(list(KEYS), python, lists, number))
        print(f"turn {number + 1}", file=sys.stderr, flush=True)
    print(f"{'run':24}  {'pairs/CPU s':>21}  {'pairs/s':>18}  {'peak GiB':>17}")
    for side, whose in enumerate(("this project", "open_clip")):
        for name in found[0][side]:
            speeds = [one[side][name] for one in found]
            print(f"{whose + ' ' + name:24}  {_range([s.per_cpu_s for s in speeds], 1):>21}  "
                  f"{_range([s.per_s for s in speeds], 1):>18}  {_range([s.peak_gib for s in speeds], 2):>17}")
    print(f"{'ratio':24}  {'pairs/CPU s':>21}  {'pairs/s':>18}  {'peak GiB':>17}  at least")
    for key, (a, b) in KEYS.items():
        ratios = [[getattr(one[0][a], field) / getattr(one[1][b], field) for one in found]
                  for field in ("per_cpu_s", "per_s", "peak_gib")]
        print(f"{key:24}  {_range(ratios[0], 2):>21}  {_range(ratios[1], 2):>18}  {_range(ratios[2], 2):>17}  "
              f"{FIGURES[key].at_least:g}")


def quality(python: Path, folder: Path, data_root: Path) -> None:
    cases = {"synthetic": (SHAPES_PX, 4, partial(synthetic_pairs, SHAPES_PX),
                           ("data.min_crop=1", "data.flip=false"), ("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)")),
             "stamps": (STAMPS_PX, 16, partial(stamps_pairs, STAMPS_PX, data_root), (), ())}
    print(f"{'set':10} {'run':24}  samples seen  R@5 by seed           mean   error")
    for name, (pixels, epochs, pairs, own_words, their_words) in cases.items():
        lists = folder / f"{name}_{pixels}"
        if not lists.exists():
            write_lists(lists, pairs())
        samples = epochs * sum(1 for _ in open(lists / "train.tsv"))
        words = ("--batch-size", str(BATCH), "--epochs", str(epochs), "--lr", "1e-3")
        for label, who in (("this project default", "ours"), ("open_clip default", "default"),
                           ("open_clip dropped", "dropped")):
            recalls = []
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as temporary:
                    out = Path(temporary, "run")
                    if who == "ours":
                        seen = ours(lists, out, (*words, f"model.image_size={pixels}", f"training.seed={seed}",
                                                 *own_words))
                    else:
                        seen = theirs(python, lists, out, (*words, "--force-image-size", str(pixels), "--warmup", "20",
                                                           "--seed", str(seed), *THEIRS[who], *their_words))
                recalls.append(seen.epochs[-1].recall)
            error = statistics.stdev(recalls) / len(recalls) ** 0.5
            print(f"{name:10} {label:24}  {samples:12,}  {' '.join(f'{one:.3f}' for one in recalls):20}  "
                  f"{statistics.mean(recalls):.3f}  {error:.3f}", flush=True)


def _range(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}, {high})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of speed (default 5; 0: none)")
    parser.add_argument("--quality", action="store_true", help="compare what is learnt as well")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with stamps (default ./data)")
    parser.add_argument("--folder", type=Path, help="keep the environment of open_clip and the lists here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="align_") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        python, lists = prepare(folder, options.data_root)
        print(f"{date.today().isoformat()}, {commit()}, {machine()}, 2 threads and 1 worker each", flush=True)
        if options.turns:
            speed(python, lists, options.turns)
        if options.quality:
            quality(python, folder, options.data_root)


if __name__ == "__main__":
    main()
