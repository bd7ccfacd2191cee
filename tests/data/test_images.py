"""Pictures of every kind become the RGB that a person would see; damaged ones become one kind of error."""

import fractions
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import trees
from tests.refusals import assert_names, refused
from trimodal.data import images
from trimodal.data.images import augment, decode_image, fit_eval, resize_for_cache
from trimodal.data.samples import BrokenSample

RED = (220, 40, 40)


def gradient(height: int, width: int) -> np.ndarray:
    """Red says the row, green the column, blue is 128."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = (255 * rows / max(1, height - 1), 255 * columns / max(1, width - 1), np.full((height, width), 128))
    return np.stack(planes, axis=-1).round().astype(np.uint8)


# ---- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    array = decode_image(trees.picture(tmp_path / f"a{suffix}", RED, (40, 30)))
    assert array.dtype == np.uint8 and array.shape == (30, 40, 3) and array.flags.c_contiguous
    assert np.abs(array.astype(int) - RED).max() <= 4  # JPEG and WebP lose a little


def test_grey_is_spread_over_three_channels(tmp_path: Path) -> None:
    array = decode_image(trees.picture(tmp_path / "a.jpg", RED, mode="L"))
    grey = round(0.299 * 220 + 0.587 * 40 + 0.114 * 40)
    assert np.abs(array.astype(int) - grey).max() <= 2


def test_cmyk(tmp_path: Path) -> None:
    array = decode_image(trees.picture(tmp_path / "a.jpg", RED, mode="CMYK"))
    assert np.abs(array.astype(int) - RED).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    """Opaque black left, half transparent black in the middle, nothing right (whose hidden colour is black)."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 128), (0, 0, 0, 0)])
    path = tmp_path / f"a{'.tiff' if mode == 'PA' else '.png'}"
    if mode == "P":  # a palette whose entries carry an alpha each
        image = Image.new("P", (3, 1))
        image.putpalette([0, 0, 0] * 3)
        image.putdata([0, 1, 2])
        image.save(path, transparency=bytes([255, 128, 0]))
    else:
        image.convert("LA" if mode == "PA" else mode).save(path)
    assert decode_image(path)[0].tolist() == [[0, 0, 0], [127, 127, 127], [255, 255, 255]]


def test_colour_declared_transparent_becomes_white(tmp_path: Path) -> None:
    for mode, colour in (("RGB", (10, 20, 30)), ("L", 10)):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (2, 2), colour).save(path, transparency=colour)
        assert decode_image(path).min() == 255


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    """`convert` alone would show everything above 255 of 65,535 as white."""
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    for suffix in (".png", ".tiff"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(values).save(path)
        assert decode_image(path)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "a.tiff")
    with refused(tmp_path / "a.tiff", error=BrokenSample):
        decode_image(tmp_path / "a.tiff")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "a.tiff")
    assert decode_image(tmp_path / "a.tiff").shape == (2, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """Stored turned or mirrored as the tag says, shown upright: the four corners land where they belong."""
    upright = Image.new("RGB", (64, 32))
    corners = {(0, 0): RED, (32, 0): (40, 200, 40), (0, 16): (40, 40, 220), (32, 16): (230, 230, 40)}
    for corner, colour in corners.items():
        upright.paste(colour, (*corner, corner[0] + 32, corner[1] + 16))
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    array = decode_image(tmp_path / "a.jpg")
    assert array.shape == (32, 64, 3)
    for (left, top), colour in corners.items():
        assert np.abs(array[top + 8, left + 16].astype(int) - colour).max() < 12


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / "a.gif")[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_picture(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    assert decode_image(path).shape == (64, 64, 3)
    with refused(trees.truncate(path), error=BrokenSample):
        decode_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" * 9])
@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_not_a_picture(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path / name, error=BrokenSample):
        decode_image(tmp_path / name)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "a.png", tmp_path):
        with refused(path, error=BrokenSample):
            decode_image(path)


def test_damage_at_any_place_raises_nothing_but_broken_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = trees.picture(tmp_path / "a.png")
    whole = path.read_bytes()
    outcomes = set()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(8, len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            decode_image(path)
            outcomes.add("decoded")
        except BrokenSample as error:
            assert_names(str(error), path)
            outcomes.add("broken")
    assert "broken" in outcomes


def test_pixel_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trees.picture(tmp_path / "a.png", size=(50, 20))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert decode_image(path).shape == (20, 50, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 999)
    with refused(path, 50, 20, error=BrokenSample):
        decode_image(path)


@pytest.mark.parametrize("side", [9_434, 10_000, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_header_is_refused_before_memory_is_taken(tmp_path: Path, side: int) -> None:
    """89 to 400 megapixels that a few bytes claim."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks))
    with refused(tmp_path / "a.png", error=BrokenSample) as caught:
        decode_image(tmp_path / "a.png")
    assert {str(side), str(side**2)} & set(re.findall(r"\d+", str(caught.value)))  # ours, or Pillow's own


@pytest.mark.parametrize(("size", "good"), [((300, 3), True), ((301, 3), False), ((3, 301), False), ((1, 100), True)])
def test_strips_are_refused(tmp_path: Path, size: tuple[int, int], good: bool) -> None:
    path = trees.picture(tmp_path / "a.png", size=size)
    if good:
        assert decode_image(path).shape == (size[1], size[0], 3)
    else:
        with refused(path, *size, 100, error=BrokenSample):
            decode_image(path)


def test_a_file_beyond_any_picture_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WebP is read whole before it is looked at; here it is all zeros but for its first bytes."""
    path = trees.picture(tmp_path / "a.webp")
    with path.open("r+b") as file:
        file.truncate(8_000_001)
    assert decode_image(path).shape == (30, 40, 3)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 8_000_000)
    tracemalloc.start()
    with refused(path, "8,000,001", "8,000,000", error=BrokenSample):
        decode_image(path)
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 1_000_000


def test_of_many_frames_one_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoder is asked for the first alone."""
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(30)]
    asked: list[int] = []
    for suffix, form in ((".gif", "GIF"), (".png", "PNG"), (".tiff", "TIFF"), (".webp", "WEBP")):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], duration=40)
        plugin = Image.OPEN[form][0]
        monkeypatch.setattr(plugin, "seek", lambda self, frame: asked.append(frame))
        assert decode_image(tmp_path / f"a{suffix}").shape == (20, 20, 3)
    assert asked == []


def test_only_formats_that_are_named_are_tried(tmp_path: Path) -> None:
    """EPS would be handed to Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with refused(tmp_path / "a.png", error=BrokenSample):
        decode_image(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "GIF")
    assert decode_image(tmp_path / "a.png").shape == (8, 8, 3), "a wrong suffix is no obstacle"


# ---- video -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("frames", [11, 51, 61])
def test_middle_frame_of_a_video(tmp_path: Path, suffix: str, frames: int) -> None:
    """Frame i is grey 4 i: its level tells the middle, to a frame. Every twelfth can be jumped to."""
    array = decode_image(trees.video(tmp_path / f"a{suffix}", [(4 * i,) * 3 for i in range(frames)]))
    assert array.shape == (32, 64, 3)
    assert np.abs(array / 4 - frames / 2).max() <= 1


def test_video_of_one_frame(tmp_path: Path) -> None:
    assert decode_image(trees.video(tmp_path / "a.mp4", [RED])).shape == (32, 64, 3)


def test_rotated_video_is_turned_upright(tmp_path: Path) -> None:
    """A phone held upright stores lying frames and a matrix that turns them by 90 degrees clockwise."""
    path = trees.video(tmp_path / "a.mp4", [RED] * 5)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version and flags, times, layers: then the matrix
    numbers = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content[start: start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(content)
    assert decode_image(path).shape == (64, 32, 3)


def test_rotation_turns_the_right_way(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 32
        array = np.zeros((32, 64, 3), np.uint8)
        array[:, :32] = 255  # white on the left: turned clockwise it is on top
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    numbers = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content[start: start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(content)
    upright = decode_image(path)
    assert upright.shape == (64, 32, 3) and upright[:28].min() > 200 and upright[36:].max() < 60


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile other.avi\n", "#EXTM3U\n#EXTINF:10,\nother.avi\n"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, text: str) -> None:
    trees.video(tmp_path / "other.avi", [RED] * 3)
    (tmp_path / "a.mp4").write_text(text)
    with refused(tmp_path / "a.mp4", error=BrokenSample):
        decode_image(tmp_path / "a.mp4")


def test_bounds_hold_for_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trees.video(tmp_path / "a.mp4", [RED] * 9)
    assert decode_image(path).shape == (32, 64, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 32 - 1)
    with refused(path, 64, 32, error=BrokenSample):
        decode_image(path)


def test_frames_larger_than_the_video_says_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder itself refuses them, before they take memory: or their size could be told."""
    import av

    frames = [trees.picture(tmp_path / f"{i}.jpg", size=size).read_bytes()
              for i, size in enumerate([(64, 32)] * 2 + [(640, 320)] * 7)]
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
        for number, content in enumerate(frames):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            packet.time_base = fractions.Fraction(1, 25)
            container.mux(packet)
    assert decode_image(tmp_path / "a.avi").shape == (320, 640, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 32)
    with refused(tmp_path / "a.avi", error=BrokenSample) as caught:
        decode_image(tmp_path / "a.avi")
    assert "640" not in str(caught.value)


def test_a_video_without_key_frames_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trees.video(tmp_path / "a.mp4", [RED] * 20)
    monkeypatch.setattr(images, "MAX_SKIPPED_FRAMES", 10)
    assert decode_image(path).shape == (32, 64, 3)
    monkeypatch.setattr(images, "MAX_SKIPPED_FRAMES", 9)
    with refused(path, 9, error=BrokenSample):
        decode_image(path)


def test_sound_alone_has_no_picture(tmp_path: Path) -> None:
    trees.sound(tmp_path / "a.mp4", trees.tone())
    with refused(tmp_path / "a.mp4", error=BrokenSample):
        decode_image(tmp_path / "a.mp4")


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [
    ((480, 640), (256, 341)), ((640, 480), (341, 256)), ((256, 256), (256, 256)), ((100, 3000), (68, 2048)),
    ((30, 8_900), (7, 2048)), ((1, 9000), (1, 2048)),
])
def test_resize_for_cache(size: tuple[int, int], expected: tuple[int, int]) -> None:
    result = resize_for_cache(np.zeros((*size, 3), np.uint8), 256)
    assert result.shape == (*expected, 3) and result.dtype == np.uint8


def test_small_pictures_are_not_enlarged_for_the_cache() -> None:
    small = gradient(128, 134)
    assert resize_for_cache(small, 256) is small


def test_fit_eval_crop_takes_the_centre() -> None:
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = 255
    for picture in (wide, np.ascontiguousarray(wide.transpose(1, 0, 2))):
        square = fit_eval(picture, 32)
        assert square[1:-1, 1:-1].min() == 255 and square.min() > 240  # the filter sees a little beyond the edge
    drawing = gradient(64, 64)
    assert np.array_equal(fit_eval(drawing, 64), drawing)  # a drawing of the right size passes untouched
    assert fit_eval(gradient(1, 1), 64).shape == (64, 64, 3)


def test_fit_eval_pad_keeps_everything() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    padded = fit_eval(wide, 60, "pad")
    assert padded[20:40].max() == 0 and padded[:20].min() == 255 and padded[40:].min() == 255


def window_of(square: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom (0 to 1) of the part of a `gradient` that `square` shows, from its centre lines."""
    middle = square.shape[0] // 2
    across, down = square[middle, :, 1] / 255.0, square[:, middle, 0] / 255.0
    half_x, half_y = (across[-1] - across[0]) / 2 / len(across), (down[-1] - down[0]) / 2 / len(down)
    return across[0] - half_x, down[0] - half_y, across[-1] + half_x, down[-1] + half_y


@pytest.mark.parametrize("size", [(300, 300), (300, 400), (400, 300), (200, 900)])
def test_augment_keeps_its_bounds(size: tuple[int, int]) -> None:
    """Over 300 draws: area from half to all of the largest 4:3 window, sides within 4:3, everything inside, and both
    ends reached."""
    picture, areas, aspects = gradient(*size), [], []
    height, width = size
    largest = min(width, 4 / 3 * height) * min(height, 4 / 3 * width)
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = window_of(augment(picture, 64, rng, 0.5))
        assert min(left, top) > -0.02 and max(right, bottom) < 1.02
        across, down = (right - left) * width, (bottom - top) * height
        areas.append(across * down / largest)
        aspects.append(across / down)
    assert 0.48 < min(areas) < 0.56 and 0.94 < max(areas) < 1.02
    assert 0.73 < min(aspects) < 0.85 and 1.18 < max(aspects) < 1.37


def test_augment_without_crop_shows_the_whole_square() -> None:
    square = gradient(64, 64)
    assert np.array_equal(augment(square, 64, np.random.default_rng(0), 1.0), square)


def test_augment_flips_half_of_the_time_and_only_if_asked() -> None:
    picture = gradient(64, 64)
    flipped = [bool(augment(picture, 64, np.random.default_rng(seed), 1.0, flip=True)[0, 0, 1] > 128)
               for seed in range(200)]
    assert 70 < sum(flipped) < 130
    assert not any(augment(picture, 64, np.random.default_rng(seed), 1.0)[0, 0, 1] > 128 for seed in range(50))


def test_augment_pads_before_it_crops() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    padded = augment(wide, 60, np.random.default_rng(0), 1.0, fit="pad")
    assert padded[:20].min() == 255 and padded[20:40].max() == 0


def test_augment_is_a_function_of_its_generator_and_takes_five_numbers() -> None:
    results = []
    for size, fit, flip in (((30, 40), "crop", True), ((300, 40), "pad", False), ((64, 64), "crop", False)):
        rng, other = np.random.default_rng(7), np.random.default_rng(7)
        first = augment(gradient(*size), 32, rng, 0.4, fit, flip)
        assert np.array_equal(first, augment(gradient(*size), 32, other, 0.4, fit, flip))
        assert first.flags.c_contiguous and first.shape == (32, 32, 3)
        results.append(rng.random())
    fresh = np.random.default_rng(7)
    fresh.random(5)
    assert results == [fresh.random()] * 3
