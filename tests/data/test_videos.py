"""The middle frame of a video, in every container and however its clock runs, upright and with square pixels."""

import fractions
from pathlib import Path

import numpy as np
import pytest

from tests import trees
from tests.refusals import refused
from trimodal import media
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample

FRAMES = 50


def video(path: Path, codec: str = "mpeg4", *, clock_s: float = 0.0, options: dict[str, str] | None = None,
          sound_s: float = 0.0) -> Path:
    """Frame i of FRAMES, 25 a second, is grey 4 i; beside it a sound of `sound_s`."""
    import av

    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 2_000_000
        voice = file.add_stream("mp2" if path.suffix in (".ts", ".mpg") else "aac", rate=48_000) if sound_s else None
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + round(25 * clock_s), fractions.Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if voice is not None:
            whole = av.AudioFrame.from_ndarray(trees.tone(sound_s, 48_000)[None], format="fltp", layout="mono")
            whole.sample_rate, whole.time_base = 48_000, fractions.Fraction(1, 48_000)
            whole.pts = round(48_000 * clock_s)
            cut = av.AudioResampler(format=voice.format, layout=voice.layout, rate=48_000,
                                    frame_size=voice.codec_context.frame_size)
            for part in [*cut.resample(whole), *cut.resample(None), None]:
                file.mux(voice.encode(part))
    return path


def middle_of(path: Path) -> float:
    return float(decode_image(path).mean()) / 4


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.mp4", "mpeg4", {}), ("a.MOV", "mpeg4", {}), ("a.m4v", "mpeg4", {}), ("a.3gp", "mpeg4", {}),
    ("a.mkv", "mpeg4", {}),
    ("a.webm", "libvpx", {}), ("a.webm", "libvpx", {"live": "1"}), ("a.mkv", "mpeg4", {"live": "1"}),
    ("a.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}), ("a.avi", "mpeg4", {}), ("a.flv", "flv1", {}),
    ("a.wmv", "wmv2", {}), ("a.mpg", "mpeg2video", {}), ("a.TS", "mpeg2video", {}), ("a.m2ts", "mpeg2video", {})])
def test_the_middle_of_a_video_in_every_container(
        tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    assert middle_of(video(tmp_path / name, codec, options=options)) == pytest.approx(25, abs=1.3)


@pytest.mark.parametrize(("name", "codec", "clock_s", "sound_s"), [
    ("a.mkv", "mpeg4", 50.0, 0), ("a.mkv", "mpeg4", 50.0, 4.0), ("a.webm", "libvpx", 30.0, 0),
    ("a.ts", "mpeg2video", 3600.0, 2.0), ("a.ts", "mpeg2video", 1.4, 0), ("a.mkv", "mpeg4", 0.0, 9.0),
    ("a.mp4", "mpeg4", 0.0, 9.0), ("a.mp4", "mpeg4", 5.0, 0)])
def test_the_middle_is_that_of_the_picture_track_itself(
        tmp_path: Path, name: str, codec: str, clock_s: float, sound_s: float) -> None:
    """Whenever its clock begins, and however long its sound is."""
    path = video(tmp_path / name, codec, clock_s=clock_s, sound_s=sound_s)
    assert middle_of(path) == pytest.approx(25, abs=1.3)


def test_the_middle_of_a_video_that_states_another_length(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mkv", options={"live": "0"})
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88") + 3  # Duration, eight bytes
    content[at: at + 8] = np.array(60_000, ">f8").tobytes()
    content = content.replace(b"DURATION", b"DURATIOX")
    path.write_bytes(content)
    assert middle_of(path) == pytest.approx(25, abs=1.3)


COLOURS = {"top left": (220, 30, 30), "top right": (30, 220, 30), "bottom left": (30, 30, 220),
           "bottom right": (230, 230, 230)}


def shown(path: Path, degrees: int = 0, hflip: bool = False, aspect: fractions.Fraction | None = None) -> np.ndarray:
    """A video of four colours, 64 x 32 as stored, as `decode_image` shows it."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
        stream.set_display_rotation(degrees, hflip=hflip)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        file.mux([*stream.encode(av.VideoFrame.from_ndarray(stored(), format="rgb24")), *stream.encode(None)])
    return decode_image(path).astype(int)


def stored() -> np.ndarray:
    picture = np.zeros((32, 64, 3), np.uint8)
    for place, colour in COLOURS.items():
        rows, columns = slice(16) if "top" in place else slice(16, 32), slice(32) if "left" in place else slice(32, 64)
        picture[rows, columns] = colour
    return picture


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_is_turned_and_mirrored(tmp_path: Path, degrees: int, hflip: bool) -> None:
    """By all eight matrices: counterclockwise first, then left to right."""
    expected = np.rot90(stored(), degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    found = shown(tmp_path / "a.mp4", degrees, hflip)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 6


@pytest.mark.parametrize(("degrees", "aspect", "shape"), [
    (0, "4/3", (32, 85)), (0, "1/2", (64, 64)), (90, "4/3", (85, 32)), (0, "100", (32, 64)), (0, "1", (32, 64))])
def test_pixels_that_are_not_square_become_so(
        tmp_path: Path, degrees: int, aspect: str, shape: tuple[int, int]) -> None:
    """Those said to be a hundred times as wide as high are a mistake of the file."""
    found = shown(tmp_path / "a.mkv" if not degrees else tmp_path / "a.mp4", degrees, aspect=fractions.Fraction(aspect))
    assert found.shape[:2] == shape


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    cover = trees.picture(tmp_path / "cover.png", (250, 0, 0), (64, 32)).read_bytes()
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        front = file.add_stream("png", rate=1)
        front.width, front.height, front.pix_fmt = 64, 32, "rgb24"
        front.disposition = Disposition.attached_pic
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = front, 0, 0, fractions.Fraction(1, 25)
        packet.is_keyframe = True
        file.mux(packet)
        for _ in range(9):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 64, 3), 90, np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    assert np.abs(decode_image(tmp_path / "a.mp4").astype(int) - 90).max() < 9


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.bin"])
def test_a_video_without_its_suffix_and_a_picture_with_it(tmp_path: Path, name: str) -> None:
    video(tmp_path / "b.mp4").rename(tmp_path / name)
    assert middle_of(tmp_path / name) == pytest.approx(25, abs=1.3)
    trees.picture(tmp_path / "c.png", (9, 99, 199)).rename(tmp_path / "c.mp4")
    assert decode_image(tmp_path / "c.mp4")[0, 0].tolist() == [9, 99, 199]


@pytest.mark.parametrize("suffix", media.VIDEO_SUFFIXES)
def test_a_broken_video_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    path.write_bytes(np.random.default_rng(0).bytes(9_000))
    with refused(path, error=BrokenSample) as caught:
        decode_image(path)
    assert str(caught.value).count(str(path)) == 1
