"""The parts of files that hold several sounds, of which libsndfile reads the first alone: the links of a chained Ogg
file, and MP3 files that were joined.
"""

import io
import itertools
import mmap
import os
from typing import IO, Any

Source = str | io.RawIOBase
_PADDING_BYTES = 4096  # behind the samples of an MP3 file
_FRAME_BYTES = 256  # of MP3, which hold its own header


class Stretch(io.RawIOBase):
    """The bytes `first` to `last` of a file as a file of its own, of which only what is asked for is ever in memory."""

    def __init__(self, path: str, first: int, last: int) -> None:
        self.file, self.first, self.size = open(path, "rb"), first, last - first
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
        content = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def ogg_links(path: str) -> list[tuple[int, int]]:
    """First and last byte of each link of a chained Ogg file, none of a file of one piece. A page that begins a stream,
    after one that does not, begins a link."""
    with open(path, "rb") as file:
        if file.read(4) != b"OggS":
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begins, at, in_head = list[int](), 0, False
            while 0 <= at <= len(content) - 27:
                if content[at: at + 5] != b"OggS\0":
                    at = content.find(b"OggS\0", at)  # behind damage
                    continue
                begins_stream, number = bool(content[at + 5] & 2), content[at + 26]
                if begins_stream and not in_head:
                    begins.append(at)
                in_head = begins_stream
                at += 27 + number + sum(content[at + 27: at + 27 + number])
            return list(itertools.pairwise([*begins, len(content)])) if len(begins) > 1 else []


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
    length_at = at + 8 + 4 * (flags & 1)
    length = int.from_bytes(frame[length_at: length_at + 4], "big")
    file.seek(first + length)
    begin = file.read(_PADDING_BYTES)
    follows = length >= _FRAME_BYTES and len(begin) == _PADDING_BYTES and (begin.startswith(b"ID3") or _is_frame(begin))
    return first + length if follows else 0


def _is_frame(begin: bytes) -> bool:
    return begin[:1] == b"\xff" and begin[1:2] >= b"\xe0"
