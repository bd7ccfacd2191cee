"""Do shards that img2dataset and webdataset wrote give the training that the same samples as files give?

    python benchmarks/foreign_shards.py [--samples 96] [--venv FOLDER] [--index 100000]

img2dataset 1.47.0, in an environment of its own without torch, which the script makes, fetches drawn pictures from a
server on this machine (127.0.0.1) and writes them three times: as webdataset's tars, as parquet, and as files. Two
addresses are wrong, and a caption has two lines. The package webdataset of this environment writes sounds with a .json
of two captions, as LAION-CLAP keeps them. Each row compares with the same samples as files: the batches of two epochs
and of an evaluation, tensor by tensor; and a run of three epochs and stages, killed amid its second stage and resumed,
with one that nothing stopped: the losses of all steps, figures, weights and averages. Ends with exit code 1 at a
difference.

`--index`: so many samples (a picture of 24 bytes, .txt and .json each) in tars of 10,000 are looked through, in a
process of its own, twice: seconds, memory, and what the table of all samples takes.
"""

import argparse
import csv
import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from PIL import Image

from benchmarks.attention_memory import cpu_name
from datasets import Data, Loader, epoch_batches, load_data, read_tables
from tests import killing, shard_files
from tests.small_runs import RECIPE, SmallRuns, differing, records
from trimodal.config import Config, config_from_dict
from trimodal.data.batches import Batch, pool
from trimodal.data.generated import generate_image, generate_sound
from trimodal.data.samples import SPLITS
from trimodal.memory.devices import peak_gib, reset_peak
from trimodal.sets.synthetic import image_captions, sound_captions

IMG2DATASET = "img2dataset==1.47.0"
INPUTS = [("image", "text"), ("audio", "text")]
PER_SHARD, SIDE = 32, 128
OF_BOTH = "stages.finetune.tasks=[" + ", ".join(
    f"{{inputs: [{name}, text], objectives: {{contrastive: 1, concepts: 0.5}}}}" for name in ("image", "audio")) + "]"


# ---- what others write --------------------------------------------------------------------------------------------


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a server of a folder, on this machine alone."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()


def environment(folder: Path) -> Path:
    """The Python of an environment in `folder` with img2dataset; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", IMG2DATASET], check=True)
    return python


def by_img2dataset(python: Path, folder: Path, samples: int) -> dict[str, Path]:
    """The folders that img2dataset wrote, by its name of the format."""
    (web := folder / "web").mkdir()
    for number in range(samples):
        drawn = Image.fromarray(generate_image(number * 7, 160, np.random.default_rng(number)))
        drawn.save(web / (f"{number}.jpg" if number % 2 else f"{number}.png"))
    with server(web) as address, (folder / "urls.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption", "label"])
        for number in range(samples):
            first, second = image_captions(number * 7)
            caption = f"{first},\n{second}" if number == 3 else first
            rows.writerow([f"{address}/{number}.{'jpg' if number % 2 else 'png'}", caption, f"kind {number % 3}"])
        rows.writerows([[f"{address}/gone{number}.jpg", "gone", "kind 0"] for number in range(2)])
        file.flush()
        for name in ("webdataset", "parquet", "files"):
            subprocess.run([str(python.with_name("img2dataset")), "--url_list", file.name, "--input_format", "csv",
                            "--url_col", "url", "--caption_col", "caption", "--save_additional_columns", '["label"]',
                            "--output_format", name, "--output_folder", str(folder / name), "--processes_count", "1",
                            "--thread_count", "8", "--number_sample_per_shard", str(PER_SHARD), "--image_size",
                            str(SIDE), "--enable_wandb", "False"], check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    return {name: folder / name for name in ("webdataset", "parquet", "files")}


def by_webdataset(folder: Path, samples: int) -> dict[str, Path]:
    """Sounds with captions in a .json, by webdataset's ShardWriter and as files."""
    for name in ("tars", "trees"):
        (folder / name).mkdir()
    with webdataset.ShardWriter(str(folder / "tars" / "%05d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
        for number in range(samples):
            text = json.dumps({"text": sound_captions(number), "tag": [f"kind {number % 3}"]}).encode()
            tree = folder / "trees" / f"{number // PER_SHARD:05}"
            tree.mkdir(exist_ok=True)
            soundfile.write(tree / f"s{number:03}.flac", generate_sound(number, np.random.default_rng(number)), 16_000)
            (tree / f"s{number:03}.json").write_bytes(text)
            writer.write({"__key__": f"s{number:03}", "flac": (tree / f"s{number:03}.flac").read_bytes(), "json": text})
    return {"shards": folder / "tars", "files": folder / "trees"}


# ---- the comparison ------------------------------------------------------------------------------------------------


def batches(data: Data, config: Config) -> Iterator[Batch]:
    """Those of two epochs of training, and of an evaluation."""
    for split, epoch in (("train", 1), ("train", 2), ("test", 0)):
        pools = [pool(data.tables[split], inputs) for inputs in INPUTS]
        jobs = epoch_batches(pools, [1.0] * len(pools), 8, 0, epoch)
        yield from Loader(data, split, jobs, config, inputs=INPUTS, train=split == "train", epoch=epoch)



def compare(small: SmallRuns, folder: Path, shards: Path, files: Path) -> tuple[list[object], bool]:
    """Cells of a row, and whether all was equal."""
    given = ("data.datasets=[shards]", f"data.shards={shards}", f"data.folder={files}", "data.min_crop=0.5")
    own = small.config(folder / "own", *given, f"data.cache_dir={folder}/cache")
    data = load_data(own)
    found, samples = list(batches(data, own)), sum(map(len, data.tables.values()))
    settings = (*killing.RECIPE, *given, OF_BOTH)
    run, whole = folder / "run", folder / "whole"
    process = killing.in_process(small, run, *settings, *killing.OFTEN, f"data.cache_dir={folder}/cache",
                                 dies="in align")
    process.join()
    assert process.exitcode == -signal.SIGKILL, run.with_suffix(".out").read_text("utf-8")[-2000:]
    small.train(run, *settings, *killing.OFTEN, f"data.cache_dir={folder}/cache", resume="auto")
    with pytest.MonkeyPatch.context() as patch:
        shard_files.read_as_files(patch)
        other = small.config(folder / "other", *given, f"data.cache_dir={folder}/other_cache")
        expected = list(batches(load_data(other), other))
        small.train(whole, *settings, "training.save_every_minutes=0", f"data.cache_dir={folder}/other_cache")
    apart = [place for one, of_file in zip(found, expected, strict=True)
             for place in differing(vars(one), vars(of_file))]
    steps = [record for record in records(whole) if record["kind"] == "step"]
    try:
        killing.assert_same(run, whole)
        same = "equal"
    except AssertionError as error:
        same = str(error)[:60]
    return [samples, len(found), len(apart), len(steps), same], not apart and same == "equal"


# ---- the index -------------------------------------------------------------------------------------------------------


def index(samples: int, folder: Path) -> None:
    """Print what looking through many small samples takes, and what a second start does."""
    for shard in range(samples // 10_000):
        described = json.dumps(shard_files.described("0", "a caption")).encode()
        shard_files.tar(folder / "shards" / f"{shard:05}.tar", [
            (f"{shard:05}{number:04}.{end}", content) for number in range(10_000)
            for end, content in (("jpg", bytes(24)), ("txt", f"a caption of {number}".encode()), ("json", described))])
    for name in ("first", "second"):
        print(subprocess.run([sys.executable, __file__, "--read", str(folder), name], check=True, capture_output=True,
                             text=True).stdout, end="")


def read(folder: Path, name: str) -> None:
    """Read the set as a run does that starts."""
    config = config_from_dict(RECIPE, [f"paths.data_root={folder}", "data.datasets=[shards]"])
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before_gib, begin = peak_gib(cpu).gib, time.perf_counter()
    tables = read_tables(config, SPLITS).values()
    took_s, more_gib = time.perf_counter() - begin, peak_gib(cpu).gib - before_gib
    samples = sum(map(len, tables))
    held = sum(array.nbytes for table in tables for array in table.arrays().values())
    print(f"{name} start: {samples:,} samples in {took_s:.1f} s, {1024 * more_gib:.0f} MiB more at the peak; "
          f"the tables hold {held / samples:.0f} bytes a sample", flush=True)


def comparison(folder: Path, venv: Path, samples: int) -> bool:
    """Print the table; whether nothing differs."""
    small, all_equal = SmallRuns(folder / "shared"), True
    for name in ("pictures", "sounds"):
        (folder / name).mkdir()
    pictures = by_img2dataset(environment(venv), folder / "pictures", samples)
    sounds = by_webdataset(folder / "sounds", samples)
    rows = [(f"{IMG2DATASET}, webdataset", pictures["webdataset"], pictures["files"]),
            (f"{IMG2DATASET}, parquet", pictures["parquet"], pictures["files"]),
            (f"webdataset=={webdataset.__version__}, .flac and .json", sounds["shards"], sounds["files"])]
    print(f"{'written by':<42}{'samples':>8}{'batches':>8}{'tensors apart':>14}{'steps':>6}  killed and resumed",
          flush=True)
    for number, (what, shards, files) in enumerate(rows):
        (own := folder / str(number)).mkdir()
        with (own / "said.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            cells, equal = compare(small, own, shards, files)
        all_equal &= equal
        print(f"{what:<42}{cells[0]:>8}{cells[1]:>8}{cells[2]:>14}{cells[3]:>6}  {cells[4]}", flush=True)
    return all_equal


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="0: no comparison")
    parser.add_argument("--venv", type=Path, help="environment with img2dataset, made if need be; default: a new one")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.read:
        read(Path(options.read[0]), options.read[1])
        return 0
    with tempfile.TemporaryDirectory(prefix="foreign_shards_") as name:
        folder = Path(name)
        print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f} before; {date.today()}", flush=True)
        is_equal = not options.samples or comparison(folder, options.venv or folder / "venv", options.samples)
        if options.index:
            index(options.index, folder / "many")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
