"""Pictures and sounds of a report's page as data: URIs: small, short, and no more of them than the page may weigh.

    media = Media(split)
    key = media.picture(row)         # None where the file has gone or the page is full
    media.uris[key]                  # "data:image/webp;base64,..."
"""

import base64
import io
from collections.abc import Callable

import numpy as np

from trimodal.config import SAMPLE_RATE_HZ
from trimodal.data.batches import Split
from trimodal.data.samples import BrokenSample
from trimodal.evaluation.plots import spectrogram

MOST_BYTES = 3_000_000  # of all URIs; the rest of a page, at most 400 points and 200 values a curve, is below 1 MB
PICTURE, THUMBNAIL = 176, 56  # pixels of the longer side
QUALITY = 72  # of WebP
SOUND_S = 6.0  # of a sound
MEL_FRAMES = 600  # of a spectrogram: as much


class Media:
    """What a page shows of one split, by key; each row once."""

    def __init__(self, split: Split, most_bytes: int = MOST_BYTES):
        self.split, self.room = split, most_bytes
        self.uris: dict[str, str] = {}

    def picture(self, row: int, side: int = PICTURE) -> str | None:
        """Key of the picture of a sample, shrunk to `side` pixels."""
        return self._kept(f"image-{row}-{side}", lambda: _webp(self.split.store.image(row), side))

    def spectrogram(self, row: int, side: int = PICTURE) -> str | None:
        """Key of a picture of the first seconds of a sample's sound."""
        return self._kept(f"mel-{row}-{side}", lambda: _webp(
            spectrogram(np.asarray(self.split.store.mel(row)[:MEL_FRAMES])), side, (side, side // 2)))

    def sound(self, row: int) -> str | None:
        """Key of the first seconds of a sample's sound."""
        return self._kept(f"sound-{row}", lambda: _sound(self.split.store.wave(row, SAMPLE_RATE_HZ)))

    def _kept(self, key: str, make: Callable[[], str]) -> str | None:
        if key in self.uris:
            return key
        if self.room <= 0:
            return None
        try:
            uri = make()
        except BrokenSample:  # features were kept, and the file has gone or changed since
            return None
        if len(uri) > self.room:
            return None
        self.room -= len(uri)
        self.uris[key] = uri
        return key


def _webp(pixels_HWC: np.ndarray, side: int, shape: tuple[int, int] | None = None) -> str:
    """Whole, within `side` x `side` pixels, or of just this width and height."""
    from PIL import Image

    picture = Image.fromarray(pixels_HWC)
    scale = min(1.0, side / max(picture.size))
    width, height = (max(1, round(pixels * scale)) for pixels in picture.size)
    out = io.BytesIO()
    picture.resize(shape or (width, height), Image.Resampling.LANCZOS).save(out, "WEBP", quality=QUALITY, method=4)
    return _uri("image/webp", out.getvalue())


def _sound(wave: np.ndarray) -> str:
    """As MP3, some 4 kB a second, which every browser plays and which is written six times as fast as Opus; where this
    computer's library cannot write it, half as long as WAV."""
    import soundfile

    is_mp3 = "MP3" in soundfile.available_formats()
    kept = wave[:round((SOUND_S if is_mp3 else SOUND_S / 2) * SAMPLE_RATE_HZ)]
    out = io.BytesIO()
    soundfile.write(out, np.clip(kept, -1, 1), SAMPLE_RATE_HZ, format="MP3" if is_mp3 else "WAV")
    return _uri("audio/mpeg" if is_mp3 else "audio/wav", out.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
