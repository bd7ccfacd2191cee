"""Small pictures of what an index holds: of pictures and videos themselves, of sounds their waveform.

Shape suffixes: H, W pixels, S samples at 16 kHz, B bars of a waveform.
"""

import asyncio
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from trimodal.data import codecs
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image, resize_for_cache

SIDE, LARGE_SIDE = 320, 1200  # pixels of the shorter side: in a list of results, and alone
MAX_BYTES = 64 << 20  # of all that are kept in memory
AT_ONCE = 2  # files decoded at the same time; the largest picture takes 267 MB
WAVEFORM_MAX_S = 600.0  # longer sounds have no waveform: they would be decoded for seconds
BARS, BAR_WIDTH, WAVEFORM_HEIGHT = 96, 4, 64  # one pixel of a bar's width is the gap to the next


class Thumbnails:
    """Makes each thumbnail once, in a few threads, and keeps the ones used last, `max_bytes` in all."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes, self.kept_bytes = max_bytes, 0
        self.kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self.being_made: dict[Hashable, asyncio.Future[bytes]] = {}
        self.threads = ThreadPoolExecutor(AT_ONCE, "thumbnails")

    async def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """The thumbnail `key`, which `make` makes where it is not kept; raises what `make` raises."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if key not in self.being_made:
            self.being_made[key] = asyncio.ensure_future(self._make(key, make))
        return await asyncio.shield(self.being_made[key])  # another browser may wait for it, too

    async def _make(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        try:
            made = await asyncio.get_running_loop().run_in_executor(self.threads, make)
        finally:
            del self.being_made[key]
        self.kept[key] = made
        self.kept_bytes += len(made)
        while self.kept_bytes > self.max_bytes:
            self.kept_bytes -= len(self.kept.popitem(last=False)[1])
        return made


def picture(path: Path, side: int) -> bytes:
    """A JPEG or WebP file of a picture, or of a video's middle frame, its shorter side `side` at most."""
    return codecs.encode("image", resize_for_cache(decode_image(path), side))


def type_of(content: bytes) -> str:
    """The media type of a thumbnail."""
    return {b"\x89PNG": "image/png", b"RIFF": "image/webp"}.get(content[:4], "image/jpeg")


def waveform(path: Path, start_s: float, duration_s: float) -> bytes:
    """A PNG file of the waveform of a sound, opaque where there is sound: the page gives it its colour."""
    heights_B = _heights(decode_audio(path, start_s, duration_s))
    rows_H = np.abs(np.arange(WAVEFORM_HEIGHT) - (WAVEFORM_HEIGHT - 1) / 2)
    alpha_HW = np.repeat(rows_H[:, None] < heights_B * WAVEFORM_HEIGHT / 2, BAR_WIDTH, axis=1)
    alpha_HW[:, BAR_WIDTH - 1:: BAR_WIDTH] = False
    file = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros_like(alpha_HW), alpha_HW]).astype(np.uint8) * 255, "LA").save(file, "PNG")
    return file.getvalue()


def _heights(waveform_S: np.ndarray) -> np.ndarray:
    """Root mean square of each of BARS equal stretches, the loudest 1, softer ones raised as the ear does."""
    ends = np.linspace(0, len(waveform_S), BARS + 1).astype(int)
    energy_B = np.array([np.mean(np.square(waveform_S[first:max(last, first + 1)], dtype=np.float64))
                         for first, last in itertools.pairwise(ends.tolist())])
    return np.maximum((energy_B / energy_B.max()) ** 0.25, 0.06)  # the fourth root of power; silence keeps a line
