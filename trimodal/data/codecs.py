"""How the cache keeps what it holds: images lossless where that is small, else as JPEG; arrays as their numbers.

Drawings, and every picture of a model of small images, take at most `EXACT_BYTES` as lossless WebP, and come back bit
by bit. A photograph of 256 pixels would take about 120 kB so; as JPEG it takes less than half of that, and comes back
with an error that `benchmarks/cache.py` measures.

Shape suffixes: H, W pixels, T frames of 10 ms, M mels.
"""

import io
from typing import Literal

import numpy as np
from PIL import Image, features

from trimodal.config import NUM_MELS
from trimodal.data.images import MAX_PIXELS

Kind = Literal["image", "sound", "features"]
KINDS: tuple[Kind, ...] = ("image", "sound")  # of files

EXACT_BYTES = 64_000  # below the 73 kB at which COCO's 123,287 pictures take 9 GB
JPEG_QUALITY = 95  # with 4:4:4; 97 could come to more than these 73 kB, see benchmarks/README.md
RUNS = 0.25  # share of pixels that equal their neighbour: 0.02 to 0.28 in photographs, above 0.3 in most drawings
FORMATS = ("JPEG", "WEBP")


def made_by(kind: Kind) -> str:
    """What decides which values come back: a change of it is a change of every entry of the kind."""
    if kind == "image":
        return (f"WebP {features.version('webp')} up to {EXACT_BYTES}, JPEG {JPEG_QUALITY} 4:4:4, libjpeg "
                f"{features.version('libjpeg_turbo') or features.version('jpg')}")
    return f"float16 {NUM_MELS}"


def encode(kind: Kind, value: np.ndarray) -> bytes:
    """Bytes of a uint8 image [H, W, 3], or of a float16 log-mel [T, 80]."""
    if kind == "sound":
        return value.astype(np.float16).tobytes()
    exact = None
    if _may_be_small(value):
        exact = _save(value, "WEBP", lossless=True, quality=0, method=0)  # the quickest: larger efforts save a tenth
        if len(exact) <= EXACT_BYTES:
            return exact
    lossy = _save(value, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return lossy if exact is None or len(lossy) < len(exact) else exact


def decode(kind: Kind, content: bytes | memoryview) -> np.ndarray:
    """What `encode` was given, but for the error of JPEG.

    Raises:
        ValueError, OSError: `content` is not of this kind.
    """
    if kind == "sound":
        return np.frombuffer(content, np.float16).reshape(-1, NUM_MELS)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
            raise ValueError(f"a picture of mode {image.mode} and {image.width} x {image.height} pixels")
        return np.array(image)


def _may_be_small(picture_HW3: np.ndarray) -> bool:
    """Whether trying the lossless form, which takes five times as long as JPEG, is worth while: of few pixels always,
    else where a quarter of them equal their left neighbour."""
    rows = picture_HW3[::8]
    return (picture_HW3.nbytes <= 2 * EXACT_BYTES
            or bool((rows[:, 1:] == rows[:, :-1]).all(2).mean() >= RUNS))


def _save(picture_HW3: np.ndarray, name: str, **settings: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, name, **settings)
    return file.getvalue()
