"""Pictures: any common file to RGB, and from there to the squares that the image encoder reads.

    picture = decode_image("cat.png")                        # uint8 [H, W, 3]; of a video, its middle frame
    square = augment(picture, 224, rng, min_crop=0.5)        # uint8 [224, 224, 3], for training
    square = fit_eval(picture, 224)                          # uint8 [224, 224, 3], for evaluation
"""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from trimodal import media, members
from trimodal.data import metadata
from trimodal.data.samples import BrokenSample, decoding
from trimodal.errors import WHOLE

# What may be decoded. All of it is checked before memory is taken for pixels.
MAX_PIXELS = 89_000_000  # just below the size at which Pillow warns; 267 MB as RGB
MAX_SIDES_RATIO = 100  # a strip of which a square would show next to nothing; panoramas stay below 20
MAX_FILE_BYTES = 1_000_000_000  # some decoders read all of a file first; 89 million 16-bit RGBA pixels are 712 MB
MAX_SKIPPED_FRAMES = 3_000  # of a video, from a key frame to its middle: two minutes at 25 a second
MAX_PIXEL_ASPECT = 10  # of a video: pixels said to be longer are taken for square, no camera makes such
# Others are not tried: Pillow hands EPS to another program.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # AVIF: from Pillow 11.3 on
WHITE = 255
MAX_ASPECT = 8  # the cache keeps the long side within this multiple of the short side it was asked for
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_CROP_ASPECT = 4 / 3  # of the windows that `augment` cuts
_TRANSPOSITIONS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                                  Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                                  Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
                                 start=2))  # by the tag of EXIF that undoes


def decode_image(path: str | Path) -> np.ndarray:
    """Decode `path` to uint8 [H, W, 3], RGB, upright: EXIF orientation applied, transparency over white, CMYK, palette,
    grey and 16-bit pixels converted. Of an animation the first frame; of a video (by suffix) the middle one.

    Raises:
        BrokenSample: no such file, not a picture of PICTURE_FORMATS, no video, truncated, or beyond the bounds
            above.
    """
    with decoding(str(path), "picture"):
        return _read(str(path))


def resize_for_cache(picture: np.ndarray, short_side: int) -> np.ndarray:
    """Shrink uint8 [H, W, 3] so that its shorter side is `short_side` and its longer one at most 8 times that; the
    proportions stay. A smaller picture is returned as it is."""
    height, width = picture.shape[:2]
    scale = min(1.0, short_side / min(height, width), MAX_ASPECT * short_side / max(height, width))
    if scale == 1.0:
        return picture
    return _resize(picture, max(1, round(width * scale)), max(1, round(height * scale)))


def fit_eval(picture: np.ndarray, size: int, fit: str = "crop", crop_pct: float = 1.0,
             filter: str = "bicubic") -> np.ndarray:
    """The same square of uint8 [H, W, 3] every time, uint8 [size, size, 3]: "crop" takes the centre, with `crop_pct` of
    the shorter side (1: the whole); "pad" takes everything and makes it square with white; "squash" takes everything
    and changes its proportions. `filter` is one of FILTERS."""
    if fit == "pad":
        picture = _pad(picture)
    height, width = picture.shape[:2]
    if fit == "squash":
        return _resize(picture, size, size, filter=filter)
    side = min(height, width) * crop_pct
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(picture, size, size, (left, top, left + side, top + side), filter)


def augment(picture: np.ndarray, size: int, rng: np.random.Generator, min_crop: float, fit: str = "crop",
            flip: bool = False) -> np.ndarray:
    """A random window of uint8 [H, W, 3], resized to uint8 [size, size, 3], half of the time mirrored where `flip`.

    The window takes `min_crop` to all of the area of the largest window that fits with sides within 4:3, and its own
    sides are within 4:3. "pad" first makes the picture square with white. Takes exactly five numbers from `rng`,
    whatever the picture, so that what is drawn afterwards does not depend on it.
    """
    of_area, of_aspect, of_left, of_top, of_flip = rng.random(5)
    if fit == "pad":
        picture = _pad(picture)
    height, width = picture.shape[:2]
    largest = min(width, MAX_CROP_ASPECT * height) * min(height, MAX_CROP_ASPECT * width)
    area = largest * (min_crop + (1 - min_crop) * of_area)
    low = math.log(max(1 / MAX_CROP_ASPECT, area / height**2))
    high = math.log(min(MAX_CROP_ASPECT, width**2 / area))
    aspect = math.exp(low + (high - low) * of_aspect)
    crop_width, crop_height = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = (width - crop_width) * of_left, (height - crop_height) * of_top
    square = _resize(picture, size, size, (left, top, left + crop_width, top + crop_height))
    return np.ascontiguousarray(square[:, ::-1]) if flip and of_flip < 0.5 else square


def _resize(picture: np.ndarray, width: int, height: int, box: tuple[float, float, float, float] | None = None,
            filter: str = "bicubic") -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((width, height), FILTERS[filter], box))


def _pad(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), WHITE, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top: top + height, left: left + width] = picture
    return square


def has_flawed_metadata(path: str) -> bool:
    """Whether `decode_image` reads a picture whose metadata is damaged: Pillow alone refuses it, or cannot turn it
    upright."""
    try:
        with Image.open(members.source(path), formats=PICTURE_FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image)
        return False
    except Exception:  # Pillow raises nearly any type
        with contextlib.suppress(BrokenSample):
            _read_picture(path)
            return True
    return False


def _read(path: str) -> np.ndarray:
    """Read a video or a picture, as the name says, and where that fails the other one."""
    first, second = (_read_video, _read_picture) if media.is_video(path) else (_read_picture, _read_video)
    try:
        return first(path)
    except BrokenSample:
        raise
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        try:
            return second(path)
        except Exception:
            raise error from None


def _read_picture(path: str) -> np.ndarray:
    """Decode an image file, uint8 [H, W, 3]; where its metadata are damaged, its pixels alone.

    Of an animation only the first frame is decoded, so the number of frames needs no bound.
    """
    if (size := members.size_of(path)) > MAX_FILE_BYTES:
        raise BrokenSample(f"has {size:,} bytes, over {MAX_FILE_BYTES:,}")
    if metadata.is_unfinished(path):
        found = _pixels_alone(path, is_whole=False)
        if found is None:
            raise BrokenSample(f"has zeros in place of its last rows, as an unfinished copy; {WHOLE}")
        return found
    try:
        return _decode(members.source(path))
    except (BrokenSample, MemoryError):
        raise
    except Exception:
        found = _pixels_alone(path)
        if found is None:
            raise
        return found


def _decode(source: str | IO[bytes], orientation: int | None = None) -> np.ndarray:
    with Image.open(source, formats=PICTURE_FORMATS) as image:
        return pixels_of(image, orientation)


def pixels_of(image: Image.Image, orientation: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of a picture that Pillow has opened, as `decode_image` gives it; `orientation` in place of what
    its metadata state.

    Raises:
        BrokenSample: beyond the bounds above, or floating-point pixels; and what Pillow raises for damage.
    """
    _check_size(*image.size)
    image.load()
    orientation = _orientation(image) if orientation is None else orientation
    upright = image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image
    return np.array(_to_rgb(upright))


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF, else XMP states, 1 where none does; other damage in them is ignored."""
    block = image.info.get("exif")
    if isinstance(block, bytes) and (stated := metadata.orientation_of(block)) != metadata.UPRIGHT:
        return stated  # Pillow gives up at the first tag that lies
    try:
        found = image.getexif().get(metadata.ORIENTATION)
    except Exception:  # Pillow raises nearly any type
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        return metadata.orientation_in_xmp(xmp.encode() if isinstance(xmp, str) else xmp)
    return found if isinstance(found, int) else metadata.UPRIGHT


def _pixels_alone(path: str, *, is_whole: bool = True) -> np.ndarray | None:
    """Decode a JPEG, PNG or TIFF file after its metadata are removed; None where it is of another format, or its pixels
    cannot be decoded or are incomplete. `is_whole` False: a JPEG file whose end is known to be missing."""
    with members.open_bytes(path) as file:
        if not file.read(len(metadata.PNG)).startswith((metadata.JPEG, metadata.PNG, *metadata.TIFF)):
            return None
        file.seek(0)
        bare, orientation = metadata.without(file.read()) or (b"", metadata.UPRIGHT)
    if is_whole and (found := _attempt(bare, orientation)) is not None:
        return found
    if not bare.startswith(metadata.JPEG) or not metadata.has_all_scans(bare):
        return None
    first, second = (_attempt(one, orientation) for one in metadata.endings(bare))
    return first if first is not None and second is not None and np.array_equal(first, second) else None


def _attempt(content: bytes, orientation: int) -> np.ndarray | None:
    try:
        return _decode(io.BytesIO(content), orientation)
    except BrokenSample:
        raise
    except (OSError, SyntaxError, ValueError):
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenSample("has floating-point pixels of unknown range: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would cut these off at 255
        grey = np.clip(np.asarray(image, np.float64) * (255 / 65535), 0, 255)
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenSample(f"has {width} x {height} pixels, over {MAX_PIXELS / 1e6:.0f} million")
    if max(width, height) > MAX_SIDES_RATIO * min(width, height):
        raise BrokenSample(f"has {width} x {height} pixels, one side over {MAX_SIDES_RATIO} times the other")


# ---- videos ---------------------------------------------------------------------------------------------------------

_QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # display matrices, counterclockwise


def _read_video(path: str) -> np.ndarray:
    """The first frame at or after the middle of the picture track, or the last one, as a player shows it.

    All packets are read for their times, since files state their length wrongly or from another start; only frames from
    the key frame before the middle on are decoded.
    """
    if media.is_still(path):
        raise ValueError("a still picture")
    with _open_video(path) as (container, stream):
        packets = [(at_s, one.is_keyframe) for one, at_s in _timed(container.demux(stream), stream) if one.size]
        times = [at_s for at_s, _ in packets if not math.isnan(at_s)]
        middle_s = (min(times) + max(times) + _frame_s(stream)) / 2 if times else math.nan
    key_s = max((at_s for at_s, is_key in packets if is_key and at_s <= middle_s), default=math.nan)
    with _open_video(path) as (container, stream):
        found = None
        for skipped, (frame, at_s) in enumerate(_timed(_decode_from(container, stream, key_s), stream)):
            found = frame
            if not at_s < middle_s:  # or no frame has a time
                break
            if skipped == MAX_SKIPPED_FRAMES:
                raise BrokenSample(f"has no key frame within {skipped:,} frames before its middle")
        if found is None:
            raise BrokenSample("holds no frame that can be decoded")
        return _upright(found, stream)


@contextlib.contextmanager
def _open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """The container and its picture track, whose size has been checked."""
    with media.open_container(path, media.VIDEO_FORMATS) as container:
        stream = media.picture_track(container)
        if stream is None:
            raise BrokenSample("has no picture track")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than stated
        yield container, stream


def _timed(items: Iterator[Any], stream: Any) -> Iterator[tuple[Any, float]]:
    """Frames or packets with their times; one without a time comes a frame after the one before."""
    at_s = math.nan
    for one in items:
        at_s = at_s + _frame_s(stream) if one.pts is None else float(one.pts * one.time_base)
        yield one, at_s


def _frame_s(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 0.04


def _decode_from(container: Any, stream: Any, key_s: float) -> Iterator[Any]:
    """Frames of all packets from the key frame at `key_s` on, which needs no index; of all packets where it is NaN."""
    has_begun = math.isnan(key_s)
    for packet, at_s in _timed(container.demux(stream), stream):
        has_begun = has_begun or at_s >= key_s or not packet.size
        if has_begun:
            yield from packet.decode()


def _upright(frame: Any, stream: Any) -> np.ndarray:
    """RGB of a frame, enlarged to square pixels, then turned and mirrored by its display matrix."""
    _check_size(frame.width, frame.height)
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    aspect = aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0
    width, height = round(frame.width * max(1.0, aspect)), round(frame.height / min(1.0, aspect))
    _check_size(width, height)
    pixels = frame.to_ndarray(format="rgb24")
    if (width, height) != (frame.width, frame.height):
        pixels = _resize(pixels, width, height)
    a, b, c, d = _display_matrix(frame)  # a stored position (x, y) is shown at x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) >= abs(b) + abs(c):  # the nearest of the eight ways to lay a picture down
        rightward, downward = a, d
    else:
        pixels, rightward, downward = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if downward < 0 else 1, :: -1 if rightward < 0 else 1])


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists none where it does not know one of them; it then knows the angle alone
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if found is None:
        return _QUARTER_TURNS[0]
    numbers = np.frombuffer(found, np.int32, 9)
    return int(numbers[0]), int(numbers[1]), int(numbers[3]), int(numbers[4])
