"""What near-equal files are found, and what is taken for near-equal though it differs (trimodal/data/near.py).

    python benchmarks/near.py [--data-root data]         # the pictures and sounds of the demo; about three minutes

Each picture is re-encoded, resized and cropped, each sound re-encoded as MP3, made quieter, resampled and cut at its
end; given is the part of these copies that is found. Different files are compared all with all: given is the number of
pairs that are taken for near-equal. "hash" is the perceptual hash of 64 bits that the package imagehash computes
(DCT, grey), at most 6 bits apart, in 12 lines of numpy.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import av
import numpy as np
from PIL import Image

from benchmarks.run import ROOT, commit, hardware
from datasets import load_data
from trimodal.config import SAMPLE_RATE_HZ, config_from_dict
from trimodal.data.audio import decode_audio, log_mel, resampled
from trimodal.data.images import decode_image
from trimodal.data.near import NEAR, image_print, sound_print

HASH_BITS = 6 / 63
Copy = Callable[[np.ndarray], np.ndarray]


def jpeg(quality: int) -> Copy:
    def copy(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))
    return copy


def resized(scale: float) -> Copy:
    def copy(picture: np.ndarray) -> np.ndarray:
        size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
        return np.asarray(Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.BICUBIC))
    return copy


def cropped(picture: np.ndarray) -> np.ndarray:
    """2 % of each side's length off, half at each end."""
    top, left = (max(1, round(side / 100)) for side in picture.shape[:2])
    return picture[top:-top, left:-left]


def mp3(kbps: int) -> Copy:
    def copy(wave: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        with av.open(file, "w", "mp3") as out:
            stream = out.add_stream("libmp3lame", rate=SAMPLE_RATE_HZ, layout="mono")
            stream.bit_rate = 1_000 * kbps
            frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
            frame.rate = SAMPLE_RATE_HZ
            for packet in itertools.chain(stream.encode(frame), stream.encode(None)):
                out.mux(packet)
        path = Path("/tmp") / "near_benchmark.mp3"
        path.write_bytes(file.getvalue())
        return decode_audio(path)
    return copy


PICTURES: dict[str, Copy] = {
    "JPEG, quality 85": jpeg(85), "JPEG, quality 50": jpeg(50), "half size": resized(0.5), "1.3 times": resized(1.3),
    "2 % cropped": cropped, "all of it": lambda picture: jpeg(75)(resized(0.7)(cropped(picture)))}
SOUNDS: dict[str, Copy] = {
    "MP3, 64 kbit/s": mp3(64), "MP3, 24 kbit/s": mp3(24), "a fifth as loud": lambda wave: 0.2 * wave,
    "through 8 kHz": lambda wave: resampled(resampled(wave, 16_000, 8_000), 8_000, 16_000),
    "2 % cut off": lambda wave: wave[:round(0.98 * len(wave))]}


def hashed(picture: np.ndarray) -> np.ndarray:
    """The perceptual hash of 64 bits of imagehash.phash, as +1 and -1 over the root of their number."""
    k, i = np.arange(32)[:, None], np.arange(32)
    dct = np.cos(np.pi * k * (2 * i + 1) / 64)
    grey = np.asarray(Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    low = (dct @ grey @ dct.T)[:8, :8].ravel()[1:]
    return (np.where(low > np.median(low), 1, -1) / np.sqrt(len(low))).astype(np.float32)


def rows(name: str, files: Sequence[np.ndarray], copies: dict[str, Copy], prints: Copy, least: float) -> list[str]:
    """A line for each kind of copy, and one for the different files."""
    own = np.stack([prints(one) for one in files])
    lines = []
    for kind, copy in copies.items():
        found = (own * np.stack([prints(copy(one)) for one in files])).sum(1) >= least
        lines.append(f"| {name} | {kind} | {len(files)} | {100 * found.mean():.1f} % found |")
    first, second = np.triu_indices(len(files), 1)
    cosines = (own @ own.T)[first, second]
    wrong = int((cosines >= least).sum())
    return [*lines, f"| {name} | different files | {len(first):,} pairs | {wrong} taken for near-equal |"]


def different(files: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Those that are equal to no other: the set has one sound under several names."""
    return list({one.tobytes(): one for one in files}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--data-root", default=str(ROOT / "data"), metavar="DIR")
    options = parser.parse_args()
    config = config_from_dict({"data": {"datasets": ["stamps"], "cache": False},
                               "paths": {"data_root": options.data_root}})
    tables = load_data(config).tables.values()
    pictures = different(decode_image(path) for table in tables for path in table.images.distinct()[1] if path)
    sounds = different(decode_audio(path) for table in tables for path in table.audio.distinct()[1] if path)

    def of_wave(wave: np.ndarray) -> np.ndarray:
        return sound_print(log_mel(wave).astype(np.float16))

    print(f"{hardware()}; {commit()}, {date.today()}\n| print | copy | files | |\n| --- | --- | ---: | ---: |")
    for lines in (rows("picture", pictures, PICTURES, image_print, NEAR["image"]),
                  rows("picture, hash", pictures, PICTURES, hashed, 1 - 2 * HASH_BITS),
                  rows("sound", sounds, SOUNDS, of_wave, NEAR["audio"])):
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
