"""The middle frame of a video, as a player shows it: turned and mirrored by its display matrix, its pixels square.

Legend: H, W pixels.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimodal import media

MAX_PIXEL_ASPECT = 10  # a pixel that is said to be longer is square: no camera makes such
START_IS_0_S = 0.1  # a clock that begins later may count a video's length from elsewhere
_ROUNDING_S = 0.002  # of time stamps in milliseconds
_ROTATED = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # by quarters counterclockwise
_US = 1_000_000  # of FFmpeg's clock of a container, in a second


class BrokenVideo(ValueError):
    """A file that holds no usable video."""


@dataclass(frozen=True)
class Bounds:
    """What may be decoded, checked before memory is taken for pixels."""

    check_size: Callable[[int, int], None]  # raises for a width and height
    max_pixels: int
    max_skipped: int  # frames from a key frame to the middle


@dataclass(frozen=True)
class Picture:
    """A frame as it is stored, uint8 [H, W, 3], and how it is shown."""

    pixels_HW3: np.ndarray
    matrix: tuple[int, int, int, int]  # of the display: what a step to the right and one down are, in x and y each
    pixel_aspect: float  # width by height

    def upright(self, resize: Callable[[np.ndarray, int, int], np.ndarray]) -> np.ndarray:
        """Enlarged by `resize` (pixels, width, height) to square pixels, then turned and mirrored."""
        pixels = self.pixels_HW3
        height, width = pixels.shape[:2]
        if self.pixel_aspect > 1:
            pixels = resize(pixels, round(width * self.pixel_aspect), height)
        elif self.pixel_aspect < 1:
            pixels = resize(pixels, width, round(height / self.pixel_aspect))
        return np.ascontiguousarray(_turned(pixels, self.matrix))


def middle_frame(path: str, bounds: Bounds) -> Picture:
    """The first frame at or after the middle of the picture track, or the last one.

    The middle is that of the times that the file states, where they can be believed; else all packets are looked at.

    Raises:
        BrokenVideo: no picture track, no frame, or none that can be jumped to within `bounds`.
        Exception: what decoders raise for damage, and `bounds.check_size`.
    """
    import av

    with _opened(path, bounds) as (container, stream):
        times = _stated_times(container, stream)
        if times is not None:
            middle_s = sum(times) / 2
            with contextlib.suppress(av.FFmpegError):  # some formats can be jumped in only amid a picture
                container.seek(int(middle_s * _US))  # to the key frame before it
                frame = _jumped_to(_timed(container.decode(stream), stream), middle_s, bounds)
                if frame is not None:
                    return _picture(frame, stream, bounds)
    return _found_by_packets(path, bounds)


def _found_by_packets(path: str, bounds: Bounds) -> Picture:
    with _opened(path, bounds) as (container, stream):
        packets = [(at_s, one.is_keyframe) for one, at_s in _timed(container.demux(stream), stream) if one.size]
        times = [at_s for at_s, _ in packets if not math.isnan(at_s)]
        middle_s = (min(times) + max(times) + _step_s(stream)) / 2 if times else math.nan
    key_s = max((at_s for at_s, is_key in packets if is_key and at_s <= middle_s), default=math.nan)
    with _opened(path, bounds) as (container, stream):
        last = None
        for skipped, (frame, at_s) in enumerate(_timed(_decoded_from(container, stream, key_s), stream)):
            last = frame
            if not at_s < middle_s:  # or no frame has a time
                break
            if skipped == bounds.max_skipped:
                raise BrokenVideo(f"has no key frame within {skipped:,} frames before its middle")
        if last is None:
            raise BrokenVideo("holds no frame that can be decoded")
        return _picture(last, stream, bounds)


class _opened:
    """A container and its picture track, whose size has been checked."""

    def __init__(self, path: str, bounds: Bounds) -> None:
        self.container, self.bounds = media.open_container(path, media.VIDEO_FORMATS), bounds

    def __enter__(self) -> tuple[Any, Any]:
        try:
            stream = media.picture_track(self.container)
            if stream is None:
                raise BrokenVideo("has no picture track")
            self.bounds.check_size(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = {"max_pixels": str(self.bounds.max_pixels)}  # frames may be larger than said
            return self.container, stream
        except BaseException:
            self.container.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _stated_times(container: Any, stream: Any) -> tuple[float, float] | None:
    """First and last time of the picture track, None where the file does not state them beyond doubt."""
    if container.format.name == "mpeg":  # it states none, and where FFmpeg looks, few pictures have a time
        return None
    if stream.start_time is not None and stream.duration:
        start_s = float(stream.start_time * stream.time_base)
        return start_s, start_s + float(stream.duration * stream.time_base)
    start_s = (container.start_time or 0) / _US
    if own_s := _tagged_s(stream):
        return (start_s, own_s) if abs(start_s) <= START_IS_0_S else None
    if not container.duration or abs(start_s) > START_IS_0_S:  # some count a length from 0, some from the start
        return None
    return start_s, start_s + container.duration / _US


def _tagged_s(stream: Any) -> float:
    """The end of a track of Matroska as most writers state it, "00:01:02.500"; 0 where it is not stated."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip())
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0


def _jumped_to(frames: Iterator[tuple[Any, float]], middle_s: float, bounds: Bounds) -> Any:
    """The first frame at or after `middle_s`; None where the jump led behind it or far before it, or the track ends
    before it."""
    for skipped, (frame, at_s) in enumerate(frames):
        if at_s >= middle_s:
            return frame if skipped or at_s <= middle_s + _ROUNDING_S else None
        if skipped == bounds.max_skipped:
            break
    return None


def _timed(found: Iterator[Any], stream: Any) -> Iterator[tuple[Any, float]]:
    """Frames or packets and their times; one that has none comes a frame after the one before."""
    step_s, at_s = _step_s(stream), math.nan
    for one in found:
        at_s = at_s + step_s if one.pts is None else float(one.pts * one.time_base)
        yield one, at_s


def _step_s(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 0.04


def _decoded_from(container: Any, stream: Any, key_s: float) -> Iterator[Any]:
    """Frames of all packets from that of the key frame at `key_s` on, a jump that no index is needed for; of all
    packets where there is none."""
    has_begun = math.isnan(key_s)
    for packet, at_s in _timed(container.demux(stream), stream):
        has_begun = has_begun or at_s >= key_s or not packet.size
        if has_begun:
            yield from packet.decode()


def _picture(frame: Any, stream: Any, bounds: Bounds) -> Picture:
    bounds.check_size(frame.width, frame.height)
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    pixel_aspect = float(aspect) if aspect and 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0
    bounds.check_size(round(frame.width * max(1.0, pixel_aspect)), round(frame.height / min(1.0, pixel_aspect)))
    return Picture(frame.to_ndarray(format="rgb24"), _matrix(frame), pixel_aspect)


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """Of nine numbers those that turn and mirror; of a picture that is neither where there are none."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV opens none where it does not know one of them; it then tells the angle alone
        return _ROTATED[round(frame.rotation / 90) % 4]
    if found is None:
        return _ROTATED[0]
    numbers = np.frombuffer(found, np.int32, 9)
    return int(numbers[0]), int(numbers[1]), int(numbers[3]), int(numbers[4])


def _turned(pixels_HW3: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """By the nearest of the eight ways to lay a picture down: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        rightward, downward = a, d
    else:
        pixels_HW3, rightward, downward = pixels_HW3.transpose(1, 0, 2), c, b
    return pixels_HW3[:: -1 if downward < 0 else 1, :: -1 if rightward < 0 else 1]
