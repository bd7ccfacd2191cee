"""Pictures whose pixels are whole though something beside them is not: what is left of a file of JPEG, PNG or TIFF
without its metadata, how it is turned, and whether a JPEG file that was cut lacks anything but its end.
"""

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from trimodal import members

ORIENTATION = 0x0112  # the tag of EXIF
UPRIGHT = 1
PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"II*\0", b"MM\0*")  # first bytes
# Tags of TIFF: sizes, kinds and places of pixels, colours, tiles, samples, tables of JPEG, ranges of YCbCr.
_TIFF_PIXELS = (*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 330, 332,
                *range(338, 342), 347, *range(512, 522), *range(529, 533))
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")  # chunks
_END = b"\xff\xd9"
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_SOS, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE  # segments of JPEG
_ADOBE_BYTES = 12  # of the segment that says how colours are stored
_ZEROS = bytes(16)  # at the end of a file: a download that did not finish
_SOF = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # that ends a scan
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def without(content: bytes) -> tuple[bytes, int] | None:
    """Strip a JPEG, PNG or TIFF file of all but its pixels; return it and the orientation that its metadata stated.
    None for other files, and where the file's structure is damaged."""
    try:
        if content.startswith(PNG):
            return _png(content)
        if content.startswith(JPEG):
            return _jpeg(content)
        if content.startswith(TIFF):
            return _tiff(content)
    except (struct.error, IndexError):
        pass
    return None


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 to 8, in the first directory of a block of EXIF; 1 where it has none."""
    try:
        exif = re.sub(rb"\A(?:Exif\0\0)+", b"", exif)
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        for number in range(count):
            tag, kind, _, short = struct.unpack_from(order + "HHIH", exif, first + 2 + 12 * number)
            if tag == ORIENTATION and kind == 3 and 1 <= short <= 8:
                return int(short)
    except (struct.error, KeyError):
        pass
    return UPRIGHT


def orientation_in_xmp(xmp: bytes) -> int:
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found else UPRIGHT


def endings(jpeg: bytes) -> tuple[bytes, bytes]:
    """Two files that a JPEG file without its end may have been: their pixels are equal only where all of them are made
    of what is there, and none is filled in."""
    whole = jpeg.rstrip(b"\xff") if jpeg.endswith(b"\xff") else jpeg
    known = whole.rstrip(b"\0") if whole.endswith(_ZEROS) else whole
    other = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)  # 255 would begin a marker
    restarts = (row.tobytes() + bytes((0xFF, 0xD0 + number % 8)) for number, row in enumerate(other))
    return whole + _END, known + b"".join(restarts) + _END


def has_all_scans(jpeg: bytes) -> bool:
    """Whether the scans of a JPEG file without metadata, the last one perhaps cut, refine all coefficients of all its
    components to the last bit."""
    lacking: set[tuple[int, int]] = set()
    at = 2
    while 2 <= at < len(jpeg) - 4 and jpeg[at + 1] != _END[1]:
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2: at + 4], "big")
        data = jpeg[at + 4: end]
        if marker in _SOF and len(data) >= 6 + 3 * data[5]:
            lacking = {(data[6 + 3 * number], place) for number in range(data[5]) for place in range(64)}
        elif marker == _SOS and len(data) == 4 + 2 * data[0] and data[-1] & 15 == 0:
            refined = range(data[-3], data[-2] + 1)
            lacking -= {(data[1 + 2 * number], place) for number in range(data[0]) for place in refined}
        found = _MARKER.search(jpeg, end) if marker == _SOS else None
        at = end if marker != _SOS else found.start() if found else -1
    return not lacking


def is_unfinished(path: str) -> bool:
    """Whether a JPEG file ends with zeros that a download has not filled. Others may have zeros behind their end."""
    with members.open_bytes(path) as file:
        if file.read(len(JPEG)) != JPEG:
            return False
        file.seek(-min(len(_ZEROS), file.seek(0, 2)), 2)
        if file.read() != _ZEROS:
            return False
        file.seek(0)
        return not file.read().rstrip(b"\0").endswith(_END)


def _png(content: bytes) -> tuple[bytes, int]:
    kept, orientation, in_xmp = [PNG], UPRIGHT, UPRIGHT
    for name, data, chunk in _chunks(content):
        if name in _PNG_PIXELS:
            kept.append(chunk)
        elif name == b"eXIf":
            orientation = orientation_of(data)
        elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0"):
            in_xmp = orientation_in_xmp(data)
    kept.append(_chunk(b"IEND", b""))
    return b"".join(kept), orientation if orientation != UPRIGHT else in_xmp


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(name, data, all of it) of each chunk; of the last one, where the file is cut, what is there."""
    at = len(PNG)
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        data = content[at + 8: end - 4]
        yield name, data, content[at: end] if end <= len(content) else _chunk(name, data)
        at = end


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _jpeg(content: bytes) -> tuple[bytes, int] | None:
    kept, orientation, in_xmp, at = [JPEG], UPRIGHT, UPRIGHT, 2
    while content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == _SOS:
            return b"".join([*kept, content[at:]]), orientation if orientation != UPRIGHT else in_xmp
        end = at + 2 + int.from_bytes(content[at + 2: at + 4], "big")
        data = content[at + 4: end]
        if marker == _APP1 and data.startswith(b"Exif\0"):
            orientation = max(orientation, orientation_of(data))
        elif marker == _APP1:
            in_xmp = max(in_xmp, orientation_in_xmp(data))
        elif marker == _APP0 and data.startswith(b"JFIF\0") and _JFIF not in kept:
            kept.append(_JFIF)
        elif marker == _APP14 and data.startswith(b"Adobe") and len(data) >= _ADOBE_BYTES:
            kept.append(content[at: end])
        elif not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            kept.append(content[at: end])
        at = end
    return None


def _tiff(content: bytes) -> tuple[bytes, int]:
    """A TIFF file without metadata, and its orientation: of its directories only the first is kept, and of that only
    the tags that describe pixels. All bytes of pixels keep their offsets."""
    order = "<" if content.startswith(TIFF[0]) else ">"
    (first,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, first)
    entries = [content[first + 2 + 12 * number: first + 14 + 12 * number] for number in range(count)]
    kept = [one for one in entries if len(one) == 12 and struct.unpack_from(order + "H", one)[0] in _TIFF_PIXELS]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:first] + directory + content[first + len(directory):], orientation_of(content)
