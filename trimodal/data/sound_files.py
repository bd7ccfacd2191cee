"""What libsndfile passes over in sound files: all parts but the first of a chained Ogg or a joined MP3 file, pages that
are lost amid an Ogg file, and the samples of WAV, AIFF and AU files whose writer was killed before it wrote how many
they are.
"""

import io
import itertools
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

Source = str | IO[bytes] | io.RawIOBase
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_TO_THE_END = b"\xff\xff\xff\xff"  # as a size
_PADDING_BYTES = 4096  # behind the samples of a WAV or MP3 file
_FRAME_BYTES = 256  # of MP3, which hold its own header
_MAX_CHUNKS = 1000  # before the samples


class Stretch(io.RawIOBase):
    """The bytes `first` to `last` of a file, some of them others, as a file of its own, of which only what is asked for
    is ever in memory. `changes`: new bytes by their place in the file."""

    def __init__(self, path: str, first: int, last: int, changes: Mapping[int, bytes] | None = None) -> None:
        self.file, self.first, self.size, self.changes = open(path, "rb"), first, last - first, changes or {}
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.first + self.at)
        content = bytearray(self.file.read(max(0, min(len(buffer), self.size - self.at))))
        for place, new in self.changes.items():
            first, last = max(place, self.at), min(place + len(new), self.at + len(content))
            if first < last:
                content[first - self.at: last - self.at] = new[first - place: last - place]
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True)
class Ogg:
    """Where the parts of a chained file begin, and whether pages are lost or damaged amid one."""

    begins: tuple[int, ...] = ()
    has_holes: bool = False

    def links(self, size: int) -> list[tuple[int, int]]:
        """First and last byte of each part; none of a file of one piece."""
        return list(itertools.pairwise([*self.begins, size])) if len(self.begins) > 1 else []


def ogg(path: str) -> Ogg:
    """What the pages of an Ogg file tell, of which decoders show nothing; no parts of other files. A page that begins a
    stream, after one that does not, begins a part."""
    with open(path, "rb") as file:
        if file.read(4) != b"OggS":
            return Ogg()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _told_by_pages(content)


def _told_by_pages(content: mmap.mmap) -> Ogg:
    begins, next_page = list[int](), dict[bytes, int]()
    at, in_head, is_lost, has_holes = 0, False, False, False
    while 0 <= at <= len(content) - 27:
        page = content[at: at + 27 + content[at + 26]]
        page += content[at + len(page): at + len(page) + sum(page[27:])]
        if page[:5] != b"OggS\0" or not _is_whole(page):
            at, is_lost = content.find(b"OggS\0", at + 1), True
            continue
        begins_stream, stream, number = bool(page[5] & 2), page[14:18], int.from_bytes(page[18:22], "little")
        if begins_stream and not in_head:
            begins.append(at)
        elif not begins_stream:
            has_holes |= is_lost or next_page.get(stream, number) != number
        in_head, is_lost, next_page[stream] = begins_stream, False, (number + 1) % (1 << 32)
        at += len(page)
    return Ogg(tuple(begins), has_holes)


def _is_whole(page: bytes) -> bool:
    """Whether a page has the sum that it states: a CRC-32 as zlib's, but from the other end of each byte."""
    blank = page[:22] + bytes(4) + page[26:]
    found = zlib.crc32(blank.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return page[22:26].translate(_MIRRORED) == found.to_bytes(4, "big")


def joined_mp3(path: str) -> list[tuple[int, int]]:
    """First and last byte of each part of MP3 files that were joined, as in podcasts; none of other files. libsndfile
    reads as much as the header of the first states."""
    begins = [0]
    with open(path, "rb") as file:
        while end := _end_of_mp3(file, begins[-1]):
            begins.append(end)
    return list(itertools.pairwise([*begins, os.path.getsize(path)])) if len(begins) > 1 else []


def _end_of_mp3(file: IO[bytes], first: int) -> int:
    """Where the MP3 file that begins at `first` ends and another one begins; 0 where none does."""
    file.seek(first)
    tag = file.read(10)
    if tag.startswith(b"ID3"):
        first += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
    file.seek(first)
    frame = file.read(_FRAME_BYTES)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = int.from_bytes(frame[at + 4: at + 8], "big")  # 1: it states how many frames, 2: how many bytes
    if at < 0 or not _is_frame(frame) or not flags & 2:
        return 0
    place = at + 8 + 4 * (flags & 1)
    length = int.from_bytes(frame[place: place + 4], "big")
    file.seek(first + length)
    begin = file.read(_PADDING_BYTES)
    follows = length >= _FRAME_BYTES and len(begin) == _PADDING_BYTES and (begin.startswith(b"ID3") or _is_frame(begin))
    return first + length if follows else 0


def _is_frame(begin: bytes) -> bool:
    return begin[:1] == b"\xff" and begin[1:2] >= b"\xe0"


def mended(source: Source) -> Source:
    """A WAV, AIFF or AU file with a header that says to read on to the end, where it states too little: that of a
    writer that was killed states nothing, or what had come some time before."""
    if not isinstance(source, str):
        return source
    with open(source, "rb") as file:
        head, size = file.read(12), os.path.getsize(source)
        mend = _HEADERS.get((head[:4], head[8:]), _HEADERS.get((head[:4], b"")))
        changes = mend(file, size) if mend else {}
    return Stretch(source, 0, size, changes) if changes else source


def _wav(file: IO[bytes], size: int) -> dict[int, bytes]:
    """New bytes of the header by their place; none where it needs none."""
    found = _samples_chunk(file)
    if found is None or not _goes_on(file, *found, size):
        return {}
    return {4: _TO_THE_END, found[0] - 4: _TO_THE_END}


def _wav_of_64_bits(file: IO[bytes], size: int) -> dict[int, bytes]:
    """A chunk before all others states the sizes; without it the file is a usual one."""
    file.seek(12)
    name, stated = file.read(4), file.read(20)[12:]
    found = _samples_chunk(file)
    if name != b"ds64" or any(stated) or found is None or not _goes_on(file, found[0], 0, size):
        return {}
    return {0: b"RIFF" + _TO_THE_END, 12: b"JUNK", found[0] - 4: _TO_THE_END}


def _au(file: IO[bytes], size: int) -> dict[int, bytes]:
    file.seek(4)
    first, stated = struct.unpack(">II", file.read(8))
    return {8: _TO_THE_END} if not stated and size > first else {}


def _aiff(file: IO[bytes], size: int) -> dict[int, bytes]:
    file.seek(0)
    head = file.read(_PADDING_BYTES)
    common, samples = head.find(b"COMM"), head.find(b"SSND")
    if min(common, samples) < 0 or len(head) < max(common + 16, samples + 16):
        return {}
    channels, frames, bits = struct.unpack_from(">HIH", head, common + 8)
    if frames or not channels * bits or size <= samples + 16:
        return {}
    number = (size - samples - 16) // (channels * -(-bits // 8))
    return {4: struct.pack(">I", size - 8), samples + 4: struct.pack(">I", size - samples - 8),
            common + 10: struct.pack(">I", number)}


_HEADERS: dict[tuple[bytes, bytes], Callable[[IO[bytes], int], dict[int, bytes]]] = {
    (b"RIFF", b"WAVE"): _wav, (b"RF64", b"WAVE"): _wav_of_64_bits, (b".snd", b""): _au, (b"FORM", b"AIFF"): _aiff,
    (b"FORM", b"AIFC"): _aiff}


def _samples_chunk(file: IO[bytes]) -> tuple[int, int] | None:
    """Where the samples of a WAV file begin, and how many bytes of them it states."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        at += 8
        if name == b"data":
            return at, length
        at += length + length % 2
    return None


def _goes_on(file: IO[bytes], first: int, stated: int, size: int) -> bool:
    """Whether samples follow those that are stated: neither another chunk nor a tag, nor a little padding."""
    end = first + stated
    file.seek(min(end, size))
    begin = file.read(_PADDING_BYTES)
    # Some writers leave out the byte that makes a length even.
    if not begin or any(_is_other(begin[skipped:], size) for skipped in range(1 + stated % 2)):
        return False
    return not stated or (len(begin) == _PADDING_BYTES and size - end > stated / 10 and any(begin))


def _is_other(begin: bytes, size: int) -> bool:
    is_chunk = begin[:4].isascii() and begin[:4].decode().isprintable() and int.from_bytes(begin[4:8], "little") <= size
    return is_chunk or begin.startswith((b"ID3", b"TAG", b"APETAGEX"))
