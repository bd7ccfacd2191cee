"""What callers give as images, texts and sounds: one or many, as files or in memory, to what models read.

    given, count = listed("images", "dog.jpg")                       # ["dog.jpg"], 1
    picture("dog.jpg"), picture(Image.open("dog.jpg"))               # uint8 [H, W, 3]
    sound(("waveform", 44_100), 16_000)                              # float32 [S] at 16 kHz

Shape suffixes: H, W pixels, C channels, S samples.
"""

import os
from collections.abc import Iterable, Mapping, Sized
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from trimodal.data.audio import decode_audio, waveform_of
from trimodal.data.images import decode_image, pixels_of
from trimodal.data.samples import BrokenSample
from trimodal.errors import UserError

EXPECTED = {
    "images": "a path, a picture of PIL, an array [H, W, 3] or a tensor [3, H, W]",
    "texts": "a text",
    "audio": "a path, or a pair (waveform, rate in Hz)"}
MAX_PEAK = 100.0  # of samples that are meant to lie in -1..1: loud ones go somewhat beyond, integers kept as floats far


class WrongType(TypeError):
    """A value of another type than a modality has; the message says what was given."""


def listed(name: str, given: Any) -> tuple[Iterable[Any], int | None]:
    """The elements of what was given as `name`, and how many they are, None where only reading them tells.

    Raises:
        UserError: it is neither an element nor several.
    """
    if _is_one(name, given):
        return [given], 1
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise UserError(f"{name}: is a {type(given).__name__}; expected {EXPECTED[name]}, or a list of these")
    return given, len(given) if isinstance(given, Sized) else None


def _is_one(name: str, given: Any) -> bool:
    if isinstance(given, str | os.PathLike | Image.Image):
        return True
    if name == "audio":
        return isinstance(given, tuple) and _is_pair(given)
    return name == "images" and isinstance(given, np.ndarray | torch.Tensor) and given.ndim in (2, 3) and (
        given.dtype != object)


def picture(value: Any) -> np.ndarray:
    """A picture as uint8 [H, W, 3], RGB, upright.

    Raises:
        WrongType: it is none.
        BrokenSample: it cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        return decode_image(os.fspath(value))
    if isinstance(value, Image.Image):
        return _pixels(value)
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy()
        return _of_array(array.transpose(1, 2, 0) if array.ndim == 3 else array, "[3, H, W]")
    if isinstance(value, np.ndarray):
        return _of_array(value, "[H, W, 3]")
    raise WrongType(type(value).__name__)


def _pixels(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise BrokenSample(f"has {image.width} x {image.height} pixels")
    try:
        return pixels_of(image)
    except (BrokenSample, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly any type where it reads a damaged file only now
        raise BrokenSample(f"a picture that cannot be read ({error})") from None


def _of_array(array: np.ndarray, expected: str) -> np.ndarray:
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        shape = list(array.shape)
        raise BrokenSample(f"has the shape {shape}{' once its channels are last' * ('[3' in expected)}; expected "
                           f"{expected}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
            raise BrokenSample(f"holds {array.dtype} from {array.min():g} to {array.max():g}; expected uint8 from 0 to "
                               "255, or floats from 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _pixels(Image.fromarray(np.ascontiguousarray(array)))


def sound(value: Any, rate_hz: int) -> np.ndarray:
    """A sound as float32 [S] at `rate_hz`, mono.

    Raises:
        WrongType: it is none.
        BrokenSample: it cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        return decode_audio(os.fspath(value), rate_hz=rate_hz)
    if not isinstance(value, tuple | list) or not _is_pair(value):
        raise WrongType(type(value).__name__)
    given, given_hz = value
    wave = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    is_sound = wave.dtype.kind == "f" or wave.dtype in (np.int8, np.int16, np.int32)
    if wave.ndim not in (1, 2) or not is_sound or given_hz % 1 != 0:
        raise BrokenSample(f"a waveform of {wave.dtype} {list(wave.shape)} at {given_hz} Hz; expected floats, int16 or "
                           "int32, samples [S] or [S, channels], and a whole number of Hz")
    wave_SC = wave[:, None] if wave.ndim == 1 else wave if wave.shape[0] >= wave.shape[1] else wave.T
    if wave.dtype.kind == "i":
        wave_SC = wave_SC / -float(np.iinfo(wave.dtype).min)
    elif wave.size and (peak := float(np.abs(wave).max())) > MAX_PEAK:
        raise BrokenSample(f"a waveform of floats up to {peak:.6g}; expected -1 to 1: divide what was 16-bit by 32768")
    return waveform_of(np.asarray(wave_SC, np.float32), int(given_hz), rate_hz)


def _is_pair(value: Any) -> bool:
    return len(value) == 2 and isinstance(value[1], Real)
