"""What the cache keeps of an image or a log-mel comes back: exactly where that is small, else within JPEG's error."""

import io

import numpy as np
import pytest
from PIL import Image

from trimodal.data import codecs


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Broad patches of colour with grain on them, as of a photograph."""
    coarse = Image.fromarray(noise(height // 32, width // 32)).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(1).integers(-2, 3, (height, width, 3))
    return np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)


def drawing(height: int, width: int) -> np.ndarray:
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[height // 4: height // 2, width // 3:] = (200, 30, 30)
    picture[::9] = (0, 80, 0)
    return picture


@pytest.mark.parametrize("picture", [noise(1, 1), noise(37, 67), noise(128, 128), drawing(256, 341), drawing(2, 1000)],
                         ids=lambda picture: "x".join(map(str, picture.shape)))
def test_small_pictures_and_drawings_come_back_bit_by_bit(picture: np.ndarray) -> None:
    content = codecs.encode("image", picture)
    assert len(content) <= codecs.EXACT_BYTES
    assert np.array_equal(codecs.decode("image", content), picture)


def test_a_photograph_takes_less_than_its_lossless_form_and_comes_back_close() -> None:
    picture = smooth(256, 352)
    content = codecs.encode("image", picture)
    exact = codecs._save(picture, "WEBP", lossless=True)
    assert codecs.EXACT_BYTES < len(exact) and len(content) < 0.8 * len(exact)
    found = codecs.decode("image", content)
    assert found.shape == picture.shape and found.dtype == np.uint8
    error = found.astype(float) - picture
    assert 0 < np.sqrt((error**2).mean()) < 2 and np.abs(error.mean((0, 1))).max() < 0.5, "no shift of colour"


def test_what_jpeg_would_make_larger_stays_exact() -> None:
    picture = np.repeat(255 * np.random.default_rng(0).integers(0, 2, (800, 800, 1), np.uint8), 3, axis=2)
    content = codecs.encode("image", picture)
    assert codecs.EXACT_BYTES < len(content) and np.array_equal(codecs.decode("image", content), picture)


def test_colour_has_the_resolution_of_brightness() -> None:
    with Image.open(io.BytesIO(codecs.encode("image", smooth(256, 352)))) as image:
        assert image.format == "JPEG" and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_a_log_mel_comes_back_bit_by_bit() -> None:
    mel_TM = np.random.default_rng(0).normal(size=(57, 80)).astype(np.float16)
    content = codecs.encode("sound", mel_TM)
    assert len(content) == 57 * 80 * 2 and np.array_equal(codecs.decode("sound", content), mel_TM)


def test_what_is_no_picture_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = b"RIFF" + bytes(100)
    for content in (b"", b"neither", huge, codecs.encode("image", noise(20, 20))[:200]):
        with pytest.raises((OSError, ValueError)):
            codecs.decode("image", content)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="20 x 20"):
        patch.setattr(codecs, "MAX_PIXELS", 399)
        codecs.decode("image", codecs.encode("image", noise(20, 20)))
    grey = Image.new("L", (9, 9))
    file = io.BytesIO()
    grey.save(file, "JPEG")
    with pytest.raises(ValueError, match="mode"):
        codecs.decode("image", file.getvalue())
    with pytest.raises(ValueError):
        codecs.decode("sound", bytes(81))


def test_another_decoder_is_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    before = codecs.made_by("image")
    monkeypatch.setattr(codecs.features, "version", lambda name: "99")
    assert codecs.made_by("image") != before
