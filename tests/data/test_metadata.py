"""Flaws beside the pixels of a picture cost nothing; pixels that are missing cost the picture."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.refusals import refused
from trimodal.data import metadata
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)


def encoded(form: str, **settings: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, form, **settings)
    return file.getvalue()


def exif(orientation: int = 6) -> Image.Exif:
    found = Image.Exif()
    found[metadata.ORIENTATION], found[0x0110], found[0x011A] = orientation, "A camera", 72.0
    return found


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(content: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return content[:33] + b"".join(chunks) + content[33:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def read(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    return decode_image(path)


# ---- flaws beside the pixels -------------------------------------------------------------------------------------


def odd_tags() -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, count, value): other types than a tag has, counts beyond the file, places outside of it."""
    for tag in (0x0110, 0x011A, 0x0132, 0x8769, 0x8825, 0x9286, 0xA005, 0xC4A5):
        for kind in (0, 1, 2, 3, 5, 7, 9, 12, 13, 99):
            for count, value in ((1, 0), (1, 70_000), (5, 4_000_000_000), (100_000, 8)):
                yield tag, kind, count, value


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_turned_photograph_with_one_odd_tag_is_turned(tmp_path: Path) -> None:
    plain = encoded("JPEG", quality=95)
    expected = np.rot90(read(tmp_path / "a.jpg", plain), -1)
    for odd in odd_tags():
        entries = sorted([(metadata.ORIENTATION, 3, 1, 6), odd])
        directory = struct.pack("<H", 2) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
        content = plain[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + directory) + plain[2:]
        assert np.array_equal(read(tmp_path / "a.jpg", content), expected), odd


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("data", [b"not a TIFF file", b"", b"II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0",
                                  b"MM\0*\0\0\0\x08"])
def test_a_png_with_bad_exif_is_read_and_xmp_still_turns_it(tmp_path: Path, data: bytes) -> None:
    plain = encoded("PNG")
    assert np.array_equal(read(tmp_path / "a.png", with_chunks(plain, chunk(b"eXIf", data))), noise())
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    turned = np.rot90(noise(), -1)
    assert np.array_equal(read(tmp_path / "a.png", with_chunks(plain, chunk(b"eXIf", data), xmp)), turned)


LARGE = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize("flaw", [
    chunk(b"iCCP", b"profile\0\0" + LARGE), chunk(b"zTXt", b"workflow\0\0" + LARGE),
    chunk(b"iTXt", b"prompt\0\1\0\0\0" + LARGE),
    chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000), chunk(b"iCCP", b"profile\0\0no zlib"),
    chunk(b"zTXt", b"key\0\7x"), chunk(b"pHYs", b"\1"), chunk(b"gAMA", b""), chunk(b"cHRM", b"12"), chunk(b"tIME", b""),
    chunk(b"sRGB", b""),
    chunk(b"tEXt", b"a\0b")[:-4] + b"crc!"], ids=lambda flaw: f"{flaw[4:8].decode()}-{len(flaw)}")
@pytest.mark.parametrize("turned", [False, True])
def test_a_png_with_flawed_or_very_large_chunks_is_read(tmp_path: Path, flaw: bytes, turned: bool) -> None:
    more = [chunk(b"eXIf", exif().tobytes().removeprefix(b"Exif\0\0"))] if turned else []
    found = read(tmp_path / "a.png", with_chunks(encoded("PNG"), flaw, *more))
    assert np.array_equal(found, np.rot90(noise(), -1) if turned else noise())


@pytest.mark.parametrize("flaw", [
    segment(0xE2, b"MPF\0II*\0\xff\xff\xff\x7f"), segment(0xE2, b"MPF\0" + bytes(9)),
    segment(0xE2, b"ICC_PROFILE\0\x09\1bad"),
    segment(0xE0, b"JF"), segment(0xE0, b"JFIF\0"), segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\xff"),
    segment(0xFE, b"\xff\xfe" * 99), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xff<"), segment(0xEE, b"Adobe"),
    segment(0xE1, b"Exif\0\0II"), segment(0xE1, b"")], ids=lambda flaw: f"{flaw[1]:x}-{len(flaw)}")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_jpeg_with_flawed_segments_is_read(tmp_path: Path, flaw: bytes, turned: bool) -> None:
    plain = encoded("JPEG", quality=95)
    expected = read(tmp_path / "a.jpg", plain)
    more = segment(0xE1, exif().tobytes()) if turned else b""
    found = read(tmp_path / "a.jpg", plain[:2] + more + flaw + plain[2:])
    assert np.array_equal(found, np.rot90(expected, -1) if turned else expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_damage_to_metadata_alone_never_costs_the_picture(tmp_path: Path, form: str) -> None:
    """Bytes of the metadata changed at random, three at a time. Where the one of the orientation was hit, the picture
    may be turned otherwise."""
    rng = np.random.default_rng(0)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("key", "value " * 99, zip=True)
    whole = encoded(form, exif=exif(), icc_profile=rng.bytes(300), quality=95, lossless=True, dpi=(72, 72),
                    pnginfo=texts)
    expected = read(tmp_path / "a.bin", whole)
    places = {"JPEG": jpeg_places, "PNG": png_places, "WEBP": webp_places, "TIFF": tiff_places}[form](whole)
    same = 0
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.choice(places, 3):
            content[place] = rng.integers(256)
        found = read(tmp_path / "a.bin", bytes(content))
        same += np.array_equal(found, expected)
        ways = [way for turns in range(4) for way in (np.rot90(expected, turns), np.rot90(expected, turns)[::-1])]
        assert any(np.array_equal(found, way) for way in ways)
    assert same > 30


def jpeg_places(content: bytes) -> list[int]:
    at, found = 2, list[int]()
    while content[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(content[at + 2: at + 4], "big")
        found += range(at + 4, end) if 0xE0 <= content[at + 1] <= 0xEF else ()
        at = end
    return found


def png_places(content: bytes) -> list[int]:
    at, found = 8, list[int]()
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at: at + 4], "big")
        found += () if content[at + 4: at + 8] in (b"IHDR", b"IDAT", b"IEND") else range(at + 8, end)
        at = end
    return found


def webp_places(content: bytes) -> list[int]:
    at, found = 12, list[int]()
    while at < len(content):
        end = at + 8 + int.from_bytes(content[at + 4: at + 8], "little")
        found += range(at + 8, end) if content[at: at + 4] in (b"EXIF", b"ICCP") else ()
        at = end + end % 2
    return found


def tiff_places(content: bytes) -> list[int]:
    first = int.from_bytes(content[4:8], "little")
    entries = [first + 2 + 12 * number for number in range(int.from_bytes(content[first: first + 2], "little"))]
    others = (272, 282, 283, 296, 34675)
    return [place for entry in entries if int.from_bytes(content[entry: entry + 2], "little") in others
            for place in range(entry + 2, entry + 12)]


# ---- pixels that are missing -------------------------------------------------------------------------------------


WAYS = [{"quality": 90}, {"quality": 90, "progressive": True}, {"quality": 60, "restart_marker_blocks": 2}]


@pytest.mark.parametrize("way", WAYS)
def test_a_jpeg_without_its_last_two_bytes_is_whole(tmp_path: Path, way: dict[str, object]) -> None:
    content = encoded("JPEG", exif=exif(), **way)
    expected = read(tmp_path / "a.jpg", content)
    for lost in (1, 2):
        assert np.array_equal(read(tmp_path / "a.jpg", content[:-lost]), expected)
    assert np.array_equal(read(tmp_path / "a.jpg", content + bytes(99)), expected)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_jpeg_whose_last_rows_are_missing_is_broken(tmp_path: Path, way: dict[str, object], filled: bool) -> None:
    """Cut, or with zeros that a download has not filled yet."""
    content = encoded("JPEG", **way)
    for lost in [*range(20, 400, 19), len(content) // 2]:
        (tmp_path / "a.jpg").write_bytes(content[:-lost] + (bytes(lost) if filled else b""))
        with refused(tmp_path / "a.jpg", error=BrokenSample):
            decode_image(tmp_path / "a.jpg")


def test_a_png_that_was_cut_is_read_where_all_pixels_are_there(tmp_path: Path) -> None:
    content = encoded("PNG")
    for lost in (1, 12, 16):  # of its last chunk, and of the sum of the one before
        assert np.array_equal(read(tmp_path / "a.png", content[:-lost]), noise())
    for lost in (40, 200, len(content) // 2):
        (tmp_path / "a.png").write_bytes(content[:-lost])
        with refused(tmp_path / "a.png", error=BrokenSample):
            decode_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_that_was_cut_has_no_other_pixels(tmp_path: Path, compression: str | None) -> None:
    """Neither zeros nor a directory in place of what was cut off."""
    content = encoded("TIFF", compression=compression)
    for lost in (1, 2, 4, 20, 100, 200):
        try:
            found = read(tmp_path / "a.tif", content[:-lost])
        except BrokenSample:
            continue
        assert np.array_equal(found, noise())


def test_damaged_pixels_are_not_mended(tmp_path: Path) -> None:
    """Neither by leaving out what has a wrong sum, nor by a new one."""
    content = bytearray(encoded("PNG"))
    content[content.index(b"IDAT") + 60] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with refused(tmp_path / "a.png", error=BrokenSample):
        decode_image(tmp_path / "a.png")


def test_exif_is_read_in_both_byte_orders() -> None:
    for order, mark in (("<", b"II"), (">", b"MM")):
        block = mark + struct.pack(order + "HIH", 42, 8, 1) + struct.pack(order + "HHIHH", 0x0112, 3, 1, 8, 0)
        assert metadata.orientation_of(block) == metadata.orientation_of(b"Exif\0\0Exif\0\0" + block) == 8
        assert metadata.orientation_of(block[:12]) == 1
    assert metadata.orientation_of(b"") == metadata.orientation_in_xmp(b"") == 1
    assert metadata.orientation_in_xmp(XMP) == 6
