"""Pictures of coloured shapes and melodies of tones, generated while training from the number of a combination.

The path of such a sample is "SCHEME:NUMBER" instead of a file's. A combination is one value of each attribute; each
visit jitters shade, place, size, pitch and noise.

    picture = generate_image(combination_of("scheme:7"), size=64, rng=np.random.default_rng(0))
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from trimodal.config import SAMPLE_RATE_HZ

COLOURS = {"red": (215, 45, 45), "green": (45, 165, 65), "blue": (50, 85, 215), "yellow": (225, 205, 45),
           "purple": (150, 55, 180)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (0.075, 0.088), "large": (0.118, 0.130)}  # radius, as a part of the picture's side
POSITIONS = ("top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left",
             "bottom middle", "bottom right")
BACKGROUNDS = {"white": (225, 225, 225), "grey": (128, 128, 128), "black": (30, 30, 30), "brown": (115, 80, 50)}
IMAGE_ATTRIBUTES = (tuple(COLOURS), SHAPES, tuple(SIZES), POSITIONS, tuple(BACKGROUNDS))

TIMBRES = {"sine": (1.0,), "square": (1.0, 0.0, 1 / 3, 0.0, 1 / 5, 0.0, 1 / 7),
           "sawtooth": (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7), "organ": (1.0, 1.0, 0.0, 1.0)}
REGISTERS = {"low": 220.0, "middle": 500.0, "high": 1130.0}  # centre of the melody, Hz
CONTOURS = ("rising", "falling", "arching", "dipping", "steady", "alternating", "jumping", "dropping")
TEMPI = {"slow": (0.24, 0.28), "fast": (0.11, 0.13)}  # length of one tone, s
LENGTHS = {"short": (0.9, 1.1), "long": (2.2, 2.6)}  # of the whole melody, s
SOUND_ATTRIBUTES = (tuple(TIMBRES), tuple(REGISTERS), CONTOURS, tuple(TEMPI), tuple(LENGTHS))

NUM_IMAGES = math.prod(len(values) for values in IMAGE_ATTRIBUTES)  # 1800
NUM_SOUNDS = math.prod(len(values) for values in SOUND_ATTRIBUTES)  # 384
_PATH = re.compile(r"[a-z]+:\d+")
_SPAN = 5.0  # semitones that a contour goes above and below its centre
_TABLE_BITS = 11  # wave tables of 2048 points


def is_generated(path: str) -> bool:
    """Whether the path of a sample stands for a generated picture or sound, not for a file."""
    return _PATH.fullmatch(path) is not None


def combination_of(path: str) -> int:
    return int(path.rpartition(":")[2])


def attributes(combination: int, values: Sequence[Sequence[str]]) -> list[str]:
    """Attribute values of a combination, in the order of IMAGE_ATTRIBUTES or SOUND_ATTRIBUTES."""
    indices = np.unravel_index(combination, [len(v) for v in values])
    return [names[int(index)] for names, index in zip(values, indices, strict=True)]


def generate_image(combination: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """An image with the attributes of a combination, uint8 [size, size, 3], with smooth edges and pixel noise."""
    colour, shape, big, position, background = attributes(combination, IMAGE_ATTRIBUTES)
    jitter = rng.uniform(-1, 1, 8)
    row, column = divmod(POSITIONS.index(position), 3)
    low, high = SIZES[big]
    radius = size * (low + (high - low) * (jitter[0] + 1) / 2)
    x, y = size * (column / 3 + 1 / 6 + 0.035 * jitter[1]), size * (row / 3 + 1 / 6 + 0.035 * jitter[2])
    front = np.array(COLOURS[colour]) * (1 + 0.12 * jitter[3])
    back = np.array(BACKGROUNDS[background]) * (1 + 0.08 * jitter[4])
    tint = 6 * jitter[5:8]
    noise = np.frombuffer(rng.bytes(size * size * 3), np.uint8).reshape(size, size, 3) >> 4  # 0 to 15
    picture = noise + _tones(back + tint)
    top, left = max(int(y - radius - 2), 0), max(int(x - radius - 2), 0)
    box = (slice(top, int(y + radius + 3)), slice(left, int(x + radius + 3)))
    rows, columns = np.ogrid[box[0].start:min(box[0].stop, size), box[1].start:min(box[1].stop, size)]
    inside = _coverage(shape, columns + 0.5 - x, rows + 0.5 - y, radius)[..., None]
    patch = _tones(back + tint) + inside * (_tones(front + tint) - _tones(back + tint).astype(np.float64))
    picture[box] = noise[box] + patch.astype(np.uint8)
    return picture


def generate_sound(combination: int, rng: np.random.Generator) -> np.ndarray:
    """A melody with the attributes of a combination, float32 mono at 16 kHz, shorter than 3 s, within [-1, 1]."""
    timbre, register, contour, tempo, length = attributes(combination, SOUND_ATTRIBUTES)
    tone_s, total_s = rng.uniform(*TEMPI[tempo]), rng.uniform(*LENGTHS[length])
    tones, points = max(round(total_s / tone_s), 3), round(tone_s * SAMPLE_RATE_HZ)
    semitones = _SPAN * _contour(contour, tones) + rng.uniform(-1.5, 1.5) + rng.uniform(-0.1, 0.1, tones)
    pitch_hz = REGISTERS[register] * 2 ** (semitones / 12)
    step = (pitch_hz / SAMPLE_RATE_HZ * 2**32).astype(np.uint32)  # 32-bit phase: a turn is a wrap-around
    phase = step[:, None] * np.arange(points, dtype=np.uint32)
    table = _wave_table(TIMBRES[timbre], float(REGISTERS[register] * 2 ** ((_SPAN + 1.6) / 12)))
    melody = table[phase >> np.uint32(32 - _TABLE_BITS)] * _envelope(points, rng.uniform(2, 5))
    before, after = (rng.uniform(0.02, 0.12, 2) * SAMPLE_RATE_HZ).astype(int)
    wave = np.zeros(before + melody.size + after, np.float32)
    wave[before:before + melody.size] = melody.ravel()
    hiss = rng.random(len(wave), np.float32) - np.float32(0.5)
    return np.float32(rng.uniform(0.2, 0.8)) * (wave + np.float32(rng.uniform(0.005, 0.04)) * hiss)


def _tones(colour: np.ndarray) -> np.ndarray:
    """uint8 colour to which noise of 0 to 15 can be added without overflow."""
    return np.clip(colour - 8, 0, 240).astype(np.uint8)


_OUTSIDE: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    # signed distance in pixels (positive = outside) of a shape about as large as a circle of radius r
    "circle": lambda x, y, r: np.sqrt(x * x + y * y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.95 * r,
    "triangle": lambda x, y, r: np.maximum(y - 0.8 * r, 0.866 * abs(x) - 0.5 * y - 0.5 * r),
    "cross": lambda x, y, r: np.maximum(np.maximum(abs(x), abs(y)) - r, np.minimum(abs(x), abs(y)) - 0.36 * r),
    "ring": lambda x, y, r: abs(np.sqrt(x * x + y * y) - 0.75 * r) - 0.25 * r,
}


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1."""
    return np.clip(0.5 - _OUTSIDE[shape](x, y, radius), 0, 1)


def _contour(name: str, tones: int) -> np.ndarray:
    """Height of each tone, -1 to 1."""
    time = np.linspace(0, 1, tones)
    return {"rising": 2 * time - 1, "falling": 1 - 2 * time, "arching": 1 - 2 * abs(2 * time - 1),
            "dipping": 2 * abs(2 * time - 1) - 1, "steady": 0 * time,
            "alternating": 1.0 - 2 * (np.arange(tones) % 2), "jumping": np.where(time < 0.5, -1.0, 1.0),
            "dropping": np.where(time < 0.5, 1.0, -1.0)}[name]


def _envelope(points: int, decay: float) -> np.ndarray:
    """Loudness of one tone: 8 ms rise, exponential decay, 8 ms release."""
    edge = int(0.008 * SAMPLE_RATE_HZ)
    envelope = np.exp(np.linspace(0, -decay / 4, points, dtype=np.float32))
    envelope[:edge] *= np.linspace(0, 1, edge, dtype=np.float32)
    envelope[-edge:] *= np.linspace(1, 0, edge, dtype=np.float32)
    return envelope


@cache
def _wave_table(partials: tuple[float, ...], highest_hz: float) -> np.ndarray:
    """One period, float32 [2048], peak 1, of those partials that stay below half the sample rate at `highest_hz`."""
    turn = 2 * np.pi * np.arange(2**_TABLE_BITS) / 2**_TABLE_BITS
    kept = partials[:int(SAMPLE_RATE_HZ / 2 / highest_hz)]
    wave = sum(weight * np.sin(k * turn) for k, weight in enumerate(kept, start=1))
    return (wave / np.abs(wave).max()).astype(np.float32)
