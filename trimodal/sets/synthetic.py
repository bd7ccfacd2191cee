"""The set `synthetic`: coloured shapes and tone sequences, with captions that state each exactly.

A sample is a combination of attribute values. 64 combinations are kept for test and 64 others for validation, so every
word of a held-out caption was learnt, but never together.

    samples = read("test", images=1800, sounds=384)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trimodal.config import Config
from trimodal.data.generated import IMAGE_ATTRIBUTES, NUM_IMAGES, NUM_SOUNDS, SOUND_ATTRIBUTES, attributes
from trimodal.data.samples import Sample
from trimodal.sets.base import DataSet

HELD_OUT = 64  # combinations for test, and as many others for validation
_PREFIX = "synthetic:"


def read(split: str, images: int = NUM_IMAGES, sounds: int = NUM_SOUNDS) -> list[Sample]:
    """Samples of one split when `images` and `sounds` combinations are in use.

    Test and validation hold 64 combinations each, or a quarter of all where fewer than 256 are in use.
    """
    drawn = [_sample("image", c, split) for c in held_out_split(split, images, NUM_IMAGES)]
    return drawn + [_sample("sound", c, split) for c in held_out_split(split, sounds, NUM_SOUNDS)]


def held_out_split(split: str, used: int, total: int) -> list[int]:
    """Combinations of `split`, sorted: a fixed shuffle of all, cut as test, val, train, cut off after `used`."""
    order = np.random.default_rng(20240229).permutation(total)[:used]
    held = min(HELD_OUT, used // 4)
    start, stop = {"test": (0, held), "val": (held, 2 * held), "train": (2 * held, used)}[split]
    return sorted(order[start:stop].tolist())


def image_captions(combination: int) -> tuple[str, str]:
    colour, shape, size, position, background = attributes(combination, IMAGE_ATTRIBUTES)
    return (f"a {size} {colour} {shape} at the {position} on a {background} background",
            f"on a {background} background there is a {size} {colour} {shape} at the {position}")


def sound_captions(combination: int) -> tuple[str, str]:
    timbre, register, contour, tempo, length = attributes(combination, SOUND_ATTRIBUTES)
    article = "an" if contour[0] in "aeiou" else "a"
    return (f"a {length} {tempo} {contour} melody of {register} {timbre} tones",
            f"{register} {timbre} tones play {article} {contour} melody that is {length} and {tempo}")


def _sample(kind: str, combination: int, split: str) -> Sample:
    path = f"{_PREFIX}{combination}"
    if kind == "image":
        return Sample(key=f"image-{combination:04d}", source="synthetic", split=split, image=path,
                      captions=image_captions(combination))
    return Sample(key=f"sound-{combination:03d}", source="synthetic", split=split, audio=path,
                  captions=sound_captions(combination))


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    for split in splits:
        yield from read(split, config.data.synthetic_images, config.data.synthetic_sounds)


SET = DataSet(
    name="synthetic", order=7, licence="drawn by this program, free of rights", read=_read,
    splits="64 combinations of attributes for test, 64 for val, the rest", reads_at_once=True,
    note="drawn while training; there is nothing to download")
