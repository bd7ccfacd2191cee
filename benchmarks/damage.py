"""Damaged files, the same for ever: whole ones of every kind, made in memory, with changes by (seed, kind, number)."""

import hashlib
import io
import json
import random
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from trimodal import checkpoint
from trimodal.config import SAMPLE_RATE_HZ
from trimodal.data import generated

SIDE = 64  # pixels of the drawn pictures


# ---- whole files -------------------------------------------------------------------------------------------------


def draw(number: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(generated.generate_image(97 * number, SIDE, np.random.default_rng(number))).convert(mode)


def picture(form: str, number: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    draw(number, mode).save(out, form, **options)
    return out.getvalue()


def sound(form: str, subtype: str, rate_hz: int = SAMPLE_RATE_HZ, channels: int = 1) -> bytes:
    import soundfile

    wave = generated.generate_sound(11, np.random.default_rng(0))[:SAMPLE_RATE_HZ]
    out = io.BytesIO()
    soundfile.write(out, np.tile(wave[:, None], (1, channels)), rate_hz, format=form, subtype=subtype)
    return out.getvalue()


def video(pictures: bool, voice: bool) -> bytes:
    """MP4 of 12 frames and half a second of sound, or one of them."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        tracks: list[tuple[Any, list[Any]]] = []
        if pictures:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = SIDE
            tracks.append((stream, [av.VideoFrame.from_image(draw(n)) for n in range(12)]))
        if voice:
            track = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
            wave = generated.generate_sound(11, np.random.default_rng(0))[None, :8 * 1024]
            parts = [av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, i:i + 1024]), "fltp", "mono")
                     for i in range(0, wave.shape[1], 1024)]
            for i, part in enumerate(parts):
                part.sample_rate, part.pts = SAMPLE_RATE_HZ, 1024 * i
            tracks.append((track, parts))
        for stream, frames in tracks:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return out.getvalue()


def manifest_lines() -> list[dict[str, Any]]:
    return [{"image": "a.png", "text": ["a dog on grass", "a dog"], "labels": ["dog"], "split": "train", "id": "one"},
            {"audio": "a.wav", "start": 0.1, "duration": 0.5, "text": "a door slams", "speaker": 7, "split": "val"},
            {"image": "b/c.png", "audio": "a.wav", "text": "both of them", "split": "val"}]


def manifest_csv() -> bytes:
    return (b"image,audio,start,duration,text,labels,speaker,split\r\n"
            b"a.png,,,,a dog on grass,dog;grass,,train\r\n"
            b',a.wav,0.1,0.5,"[""a door slams"", ""a door""]",,anna,val\r\n'
            b'b/c.png,,,,"a cup,\ntwo lines",,,test\r\n')


def saved() -> bytes:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save({"model_state_dict": {"w": torch.arange(60.0).reshape(6, 10), "b": torch.ones(3)}, "epoch": 3,
                         "config": {"model": {"size": "tiny"}}, "names": ["a", "b"]}, Path(folder, "a.pt"))
        return Path(folder, "a.pt").read_bytes()


@cache
def whole(kind: str) -> tuple[bytes, ...]:
    """Undamaged files of a kind, the same at each call."""
    if kind == "jpeg":
        return picture("JPEG"), picture("JPEG", 1, progressive=True), picture("JPEG", 2, "CMYK")
    if kind == "png":
        return picture("PNG"), picture("PNG", 1, "RGBA"), picture("PNG", 2, "P"), picture("PNG", 3, "I;16")
    if kind == "webp":
        return (picture("WEBP"), picture("WEBP", 1, "RGBA", lossless=True),
                picture("WEBP", 2, save_all=True, append_images=[draw(3)]))
    if kind == "gif":
        return picture("GIF"), picture("GIF", 1, save_all=True, append_images=[draw(2), draw(3)])
    if kind == "bmp":
        return picture("BMP"), picture("BMP", 1, "P"), picture("BMP", 2, "1")
    if kind == "wav":
        return sound("WAV", "PCM_16"), sound("WAV", "FLOAT", 44_100, 2), sound("WAV", "IMA_ADPCM")
    if kind in ("flac", "ogg", "mp3"):
        subtype = {"flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}[kind]
        return sound(kind.upper(), subtype), sound(kind.upper(), subtype, 44_100, 2)
    if kind in ("mp4", "mp4 sound", "m4a"):
        both, one = video(True, True), video(kind == "mp4", kind != "mp4")
        return (one,) if kind == "m4a" else (both, one)
    if kind == "jsonl":
        return ("".join(json.dumps(line) + "\n" for line in manifest_lines())).encode(),
    if kind == "csv":
        return manifest_csv(),
    if kind == "yaml":
        root = Path(__file__).resolve().parent.parent
        return tuple(root.joinpath(name).read_bytes() for name in ("config.yaml", "recipes/demo.yaml"))
    return saved(),


# ---- damage ------------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, (1 << 63) - 1)
PIECES = (b"[" * 5_000, b"{\"a\":" * 3_000, b"9" * 5_000, b"0x" + b"f" * 5_000, b"1e999", b"-1e999", b".inf", b"NaN",
          b"\\ud800", b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"\"", b"\n", b"\r", b",", b": ", b"- ", b"x" * 200_000,
          b"../../../../etc/passwd", b"/etc/passwd", b"!!python/object/apply:os.system [exit]", b"2001-99-99",
          b"*a", b"\n&a [*a, *a]", b"<<: ", b"? [1]\n: ", b"!!binary x", b"\t", b"true", b"null", b"{}", b"[]", b"~")
VALUES = (b'"\\ud800"', b'"\\u0000"', b'"' + b"x" * 20_000 + b'"', b'"../a.png"', b'""', b"-1",
          b'"' + b"../" * 20 + b'etc/passwd"', b"1e300", b'["a", ["b"]]', b"9" * 400, b"-0.0", b"1_000", b"0o17",
          b"1e999", b"12:30:45", b"2026-01-01")
FIELDS: tuple[Any, ...] = (0, 1, -1, 0.5, 1e-9, 59.9, 1e300, -1e300, float("nan"), 10**400, True, None, "", " ",
                           "x" * 20_000, "a  dog\n\ton\u2028grass", "\u202e", "\0", "\ud800", "a.png", "b/c.png",
                           "../a.png", "/etc/passwd", "train", "0.5", "inf", [], ["a", "a", "b"], ["a", ["b"]], {},
                           {"a": 1}, ["a"] * 5_000)
TEXTS = ("jsonl", "csv", "yaml")


def flip(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random, other: bytes) -> None:
    del data[rng.randrange(len(data)):]


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    """A part of this or another file over, or between, what is there."""
    source = bytes(data) if rng.random() < 0.5 else other
    start, size, place = rng.randrange(len(source)), rng.randint(1, 512), rng.randrange(len(data))
    data[place:place + (size if rng.random() < 0.5 else 0)] = source[start:start + size]


def header(data: bytearray, rng: random.Random, other: bytes) -> None:
    """Another number of 1, 2, 4 or 8 bytes, in either order, mostly near the beginning or the end."""
    size = rng.choice((1, 2, 4, 4, 8))
    value = (rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)) & ((1 << 8 * size) - 1)
    near = rng.choice((64, 512, len(data)))
    place = rng.randrange(min(near, len(data)))
    if rng.random() < 0.2:
        place = max(0, len(data) - 1 - place)
    data[place:place + size] = value.to_bytes(size, rng.choice(("big", "little")))


def run(data: bytearray, rng: random.Random, other: bytes) -> None:
    place, size = rng.randrange(len(data)), rng.randint(1, 400)
    data[place:place + size] = rng.choice((b"\0", b"\xff")) * size


def replace(data: bytearray, rng: random.Random, other: bytes) -> None:
    """Another value, so that a text stays what it is and the value is looked at."""
    found = rng.choice(list(re.finditer(rb"(?:: |(?<=\S),)([^,\n\r}\]]*)", data)) or [None])
    if found:
        data[found.start(1):found.end(1)] = rng.choice((*PIECES, *VALUES, *VALUES))


def insert(data: bytearray, rng: random.Random, other: bytes) -> None:
    """A nasty piece of text, often where a value begins."""
    starts = [i + 1 for i, byte in enumerate(data) if byte in b":,[=\n "] or [0]
    place = rng.choice(starts)
    data[place:place + rng.choice((0, 0, 1, 5))] = rng.choice(PIECES)


def revalue(data: bytearray, rng: random.Random, other: bytes) -> None:
    """One field of one line changed, added or taken away, and the JSON right: what is in it has to be looked at."""
    try:
        lines = [json.loads(line) for line in data.splitlines()]
    except (ValueError, RecursionError):
        return  # an earlier change broke the syntax
    line = rng.choice([line for line in lines if isinstance(line, dict)] or [{}])
    name = rng.choice(["image", "audio", "text", "labels", "speaker", "split", "start", "duration", "id", "odd"])
    if rng.random() < 0.2:
        line.pop(name, None)
    else:
        line[name] = rng.choice(FIELDS)
    data[:] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def damaged(kind: str, number: int, seed: int) -> bytes:
    """Input `number` of a kind: the same for ever, and never a whole file."""
    rng = random.Random(f"{seed} {kind} {number}")
    files = whole(kind)
    changes: list[Callable[[bytearray, random.Random, bytes], None]] = [flip, cut, splice, header, run]
    if kind in TEXTS:
        changes += [insert] * 5 + [replace] * 20
    if kind == "jsonl":
        changes += [revalue] * 60
    good = rng.choice(files)
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            rng.choice(changes)(data, rng, rng.choice(files))
    if bytes(data) in files:
        data[rng.randrange(len(data))] ^= 1
    mended = MENDED[kind](bytes(data)) if kind == "resealed" or (kind in MENDED and rng.random() < 0.7) else b""
    return bytes(data) if mended in (b"", *files) else mended


def mend_png(data: bytes) -> bytes:
    """The checksums of all chunks put right, so that a change gets past them."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place:place + 4], "big")
        out[end:end + 4] = zlib.crc32(out[place + 4:end]).to_bytes(4, "big") if end + 4 <= len(out) else b""
        place = end + 4
    return bytes(out)


def mend_ogg(data: bytes) -> bytes:
    """The checksums of all pages put right; a page ends where the next one begins."""
    pages = data.split(b"OggS")
    return pages[0] + b"".join(_mend_page(b"OggS" + page) for page in pages[1:])


def _mend_page(page: bytes) -> bytes:
    if len(page) < 27:
        return page
    checksum, page = 0, page[:22] + bytes(4) + page[26:]
    for byte in page:
        checksum = (checksum << 8) & 0xFFFFFFFF ^ _ogg_table()[(checksum >> 24) ^ byte]
    return page[:22] + checksum.to_bytes(4, "little") + page[26:]


@cache
def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value >> 31 else 0)
        table.append(value)
    return table


def reseal(data: bytes) -> bytes:
    """A changed checkpoint with the digest that fits, as somebody would make it who wants it opened."""
    body = data[:-64]
    return body + hashlib.sha256(body).hexdigest().encode()


MENDED: dict[str, Callable[[bytes], bytes]] = {"png": mend_png, "ogg": mend_ogg, "resealed": reseal}
