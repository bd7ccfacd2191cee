"""What libsndfile passes over in sound files: all parts of a chained Ogg file but the first, and the samples of a WAV
file whose writer was killed before it wrote how many they are.
"""

import io
import mmap
import os
from collections.abc import Iterator
from typing import IO

Source = str | IO[bytes]
_PADDING_BYTES = 4096  # behind the samples of a WAV file


def links(path: str) -> list[tuple[int, int]]:
    """First and last byte of each part of a chained Ogg file; none where it is of one piece, or no Ogg file. A page
    that begins a stream, after one that does not, begins a part."""
    with open(path, "rb") as file:
        if file.read(4) != b"OggS":
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begins = list(_begins(content))
    ends = [*begins[1:], os.path.getsize(path)]
    return list(zip(begins, ends, strict=True)) if len(begins) > 1 else []


def _begins(content: mmap.mmap) -> Iterator[int]:
    at, in_head = 0, False
    while 0 <= at <= len(content) - 27:
        if content[at: at + 5] != b"OggS\0":
            at = content.find(b"OggS\0", at + 1)
            continue
        segments = content[at + 27: at + 27 + content[at + 26]]
        begins_stream = bool(content[at + 5] & 2)
        if begins_stream and not in_head:
            yield at
        in_head = begins_stream
        at += 27 + len(segments) + sum(segments)


def mended(source: Source) -> Source:
    """A WAV file with a header that says to read on to the end, where it states too little: that of a writer that was
    killed states nothing, or what had come some time before."""
    if not isinstance(source, str):
        return source
    with open(source, "rb") as file:
        head, size = file.read(12), os.path.getsize(source)
        found = _samples_chunk(file, size) if head[:4] == b"RIFF" and head[8:] == b"WAVE" else None
        if found is None or not _goes_on(file, *found, size):
            return source
        file.seek(0)
        content = bytearray(file.read())
    at = found[0]
    content[4:8] = content[at - 4: at] = b"\xff\xff\xff\xff"
    return io.BytesIO(content)


def _samples_chunk(file: IO[bytes], size: int) -> tuple[int, int] | None:
    """Where the samples of a WAV file begin, and how many bytes of them it states."""
    at = 12
    while at + 8 <= size:
        file.seek(at)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        at += 8
        if name == b"data":
            return at, length
        at += length + length % 2
    return None


def _goes_on(file: IO[bytes], first: int, stated: int, size: int) -> bool:
    """Whether samples follow those that are stated: neither another chunk nor a tag, nor a little padding."""
    end = first + stated + stated % 2
    file.seek(min(end, size))
    begin = file.read(_PADDING_BYTES)
    is_chunk = begin[:4].isascii() and begin[:4].decode().isprintable() and int.from_bytes(begin[4:8], "little") <= size
    if not begin or is_chunk or begin.startswith((b"ID3", b"TAG", b"APETAGEX")):
        return False
    return not stated or (len(begin) == _PADDING_BYTES and size - end > stated / 10 and any(begin))
