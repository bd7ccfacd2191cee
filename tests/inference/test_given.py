"""Images and sounds in memory are read as their files are; what is none of either is told apart from what is broken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.refusals import refused
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample
from trimodal.inference.given import WrongType, listed, picture, sound

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_picture_is_the_same_in_every_form(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    forms: list[Any] = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png"), PIXELS,
                        PIXELS / 255, PIXELS.astype(np.float32) / 255, torch.from_numpy(PIXELS).permute(2, 0, 1),
                        torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, PIXELS[::-1][::-1]]
    for form in forms:
        assert np.array_equal(picture(form), PIXELS)


def test_pictures_are_upright_and_over_white_as_files_are(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=turned)
    rgba = np.dstack([PIXELS, np.full((20, 30), 100, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    grey = PIXELS[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert picture(Image.open(tmp_path / "turned.png")).shape == (30, 20, 3)
    for name, form in (("turned", Image.open(tmp_path / "turned.png")), ("clear", rgba), ("grey", grey),
                       ("grey", grey[:, :, None]), ("grey", torch.from_numpy(grey)),
                       ("clear", Image.open(tmp_path / "clear.png"))):
        assert np.array_equal(picture(form), decode_image(tmp_path / f"{name}.png"))


@pytest.mark.parametrize(("rate_hz", "channels"), [(16_000, 1), (22_050, 1), (44_100, 2)])
def test_a_sound_is_the_same_in_every_form(tmp_path: Path, rate_hz: int, channels: int) -> None:
    wave_SC = np.random.default_rng(0).normal(0, 0.1, (rate_hz // 2, channels))
    soundfile.write(tmp_path / "a.wav", wave_SC, rate_hz)
    from_file, _ = soundfile.read(tmp_path / "a.wav", dtype="int16", always_2d=True)
    expected = decode_audio(tmp_path / "a.wav")
    exact = from_file / 32768
    forms: list[Any] = [tmp_path / "a.wav", (from_file, rate_hz), (exact, float(rate_hz)), (exact.T, rate_hz),
                        (torch.from_numpy(exact.T.copy()).float(), rate_hz), [exact.tolist(), np.int64(rate_hz)]]
    for form in forms + ([(exact[:, 0], rate_hz)] if channels == 1 else []):
        assert np.array_equal(sound(form, 16_000), expected)
    assert np.array_equal(sound((exact, rate_hz), 48_000), decode_audio(tmp_path / "a.wav", rate_hz=48_000))


def test_channels_that_cancel_each_other_are_not_lost() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    assert np.array_equal(sound((np.stack([wave, -wave]), 16_000), 16_000), wave)


@pytest.mark.parametrize("value", [
    np.zeros((4, 5, 7)), np.zeros((0, 5, 3), np.uint8), np.full((4, 5, 3), 255.0), np.full((4, 5, 3), np.nan),
    np.zeros((4, 5, 3), np.int64), np.zeros(4, np.uint8), torch.zeros(5, 4, 3, dtype=torch.uint8), "gone.jpg",
    Image.new("F", (4, 5)), Image.new("RGB", (0, 0))])
def test_what_is_no_picture_is_broken(value: Any) -> None:
    with refused(error=BrokenSample):
        picture(value)


@pytest.mark.parametrize("value", [
    (np.zeros(99), 16_000), (np.zeros(0), 16_000), (np.full(99, np.inf), 16_000), (np.ones(99), 10),
    (np.ones((99, 99)), 16_000), (np.ones((9, 9, 9)), 16_000), (np.ones(99), 16_000.5), (["a"], 16_000), "gone.wav",
    (np.ones(99), float("nan"))])
def test_what_is_no_sound_is_broken(value: Any) -> None:
    with refused(error=BrokenSample):
        sound(value, 16_000)


def test_integers_that_no_file_has_are_not_taken_for_silence() -> None:
    with refused("int64", error=BrokenSample):
        sound((np.arange(99), 16_000), 16_000)


def test_integers_kept_as_floats_are_refused_and_loud_floats_are_not() -> None:
    wave = np.sin(np.arange(8_000) / 9).astype(np.float32)
    assert np.array_equal(sound((1.5 * wave, 16_000), 16_000), 1.5 * wave)
    with refused(32767, 32768, error=BrokenSample):
        sound((np.float32(32767) * wave / wave.max(), 16_000), 16_000)


def test_a_folder_is_not_told_to_be_missing(tmp_path: Path) -> None:
    with refused(tmp_path, "folder", error=BrokenSample):
        picture(tmp_path)


@pytest.mark.parametrize("value", [None, 3, b"bytes", {"path": "a"}, ("a.jpg",)])
def test_other_types_are_told_apart(value: Any) -> None:
    with pytest.raises(WrongType, match=type(value).__name__):
        picture(value)
    with pytest.raises(WrongType, match=type(value).__name__):
        sound(value, 16_000)


def test_one_element_stands_for_a_list_of_it() -> None:
    wave = (np.zeros(9), 16_000)
    for name, one in (("images", "a.jpg"), ("images", Path("a.jpg")), ("images", PIXELS), ("texts", "a"),
                      ("audio", wave), ("audio", "a.wav"), ("images", torch.zeros(3, 4, 5))):
        elements, count = listed(name, one)
        assert count == 1 and next(iter(elements)) is one
    for name, several, number in (("images", PIXELS[None], 1), ("audio", [wave, wave], 2), ("audio", ("a", "b"), 2),
                                  ("texts", np.array(["a", "b"]), 2), ("texts", (word for word in "ab"), None)):
        assert listed(name, several) == (several, number)
