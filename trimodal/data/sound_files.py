"""The structure of sound files where decoders pass over it: the links of a chained Ogg file and its lost pages, the
parts of a joined MP3 file, and WAV and AU files whose writer was killed before it wrote how many samples they hold.
"""

import itertools
import mmap
import zlib
from typing import IO

from trimodal import members
from trimodal.members import Source, Stretch

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PADDING_BYTES = 4096  # behind the samples of a WAV or MP3 file
_FRAME_BYTES = 256  # of MP3, which hold its own header
_MAX_CHUNKS = 1000  # before the samples


# ---- Ogg and MP3 ---------------------------------------------------------------------------------------------------


def ogg_links(path: str) -> tuple[list[tuple[int, int]], bool]:
    """First and last byte of each link of a chained Ogg file, none of a file of one piece; and whether pages are lost
    or damaged amid one. A page that begins a stream, after one that does not, begins a link."""
    with members.open_bytes(path) as file:
        if file.read(4) != b"OggS":
            return [], False
    with members.mapped(path) as content:
        return _links_of_pages(content)


def _links_of_pages(content: mmap.mmap | bytes) -> tuple[list[tuple[int, int]], bool]:
    begins, next_page = list[int](), dict[bytes, int]()
    at, in_head, is_lost, has_holes = 0, False, False, False
    while 0 <= at <= len(content) - 27:
        page = content[at: at + 27 + content[at + 26]]
        page += content[at + len(page): at + len(page) + sum(page[27:])]
        if page[:5] != b"OggS\0" or not _has_right_checksum(page):
            at, is_lost = content.find(b"OggS\0", at + 1), True
            continue
        begins_stream, stream, number = bool(page[5] & 2), page[14:18], int.from_bytes(page[18:22], "little")
        if begins_stream and not in_head:
            begins.append(at)
        elif not begins_stream:
            has_holes |= is_lost or next_page.get(stream, number) != number
        in_head, is_lost, next_page[stream] = begins_stream, False, (number + 1) % (1 << 32)
        at += len(page)
    return list(itertools.pairwise([*begins, len(content)])) if len(begins) > 1 else [], has_holes


def _has_right_checksum(page: bytes) -> bool:
    """Compare the checksum of an Ogg page: a CRC-32 as zlib's, but from the other end of each byte."""
    blank = page[:22] + bytes(4) + page[26:]
    found = zlib.crc32(blank.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return page[22:26].translate(_MIRRORED) == found.to_bytes(4, "big")


def joined_mp3(path: str) -> list[tuple[int, int]]:
    """First and last byte of each part of MP3 files that were joined, as in podcasts; none of other files. libsndfile
    reads as much as the header of the first states."""
    begins = [0]
    with members.open_bytes(path) as file:
        while end := _end_of_mp3(file, begins[-1]):
            begins.append(end)
    return list(itertools.pairwise([*begins, members.size_of(path)])) if len(begins) > 1 else []


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


# ---- files whose writer was killed ---------------------------------------------------------------------------------


def mended_au(path: str) -> Source:
    """The file or member; of an AU file whose header states 0 bytes of samples, the same file behind a header that says
    that its length is unknown, so that decoders read to the end."""
    with members.open_bytes(path) as file:
        head = file.read(12)
    if head[:4] != b".snd" or any(head[8:]):
        return members.source(path)
    return Stretch(path, 0, members.size_of(path), head[:8] + b"\xff" * 4)


def states_too_few_samples(path: str) -> bool:
    """Whether a WAV or RF64 file holds more samples than its header states: its writer was killed before it wrote the
    final length, so the header says 0 or the length of some time before."""
    with members.open_bytes(path) as file:
        head, size = file.read(12), members.size_of(path)
        if head[8:] != b"WAVE" or head[:4] not in (b"RIFF", b"RF64"):
            return False
        found = _samples_chunk(file)
        if found is None:
            return False
        first, stated = found
        if head.startswith(b"RF64"):  # its sizes stand in a chunk before all others
            file.seek(28)
            stated = int.from_bytes(file.read(8), "little")
        return _samples_follow(file, first, stated, size)


def _samples_chunk(file: IO[bytes]) -> tuple[int, int] | None:
    """Offset of the samples in a WAV file, and their length as its "data" chunk states it, both in bytes; None without
    such a chunk among the first ones."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        at += 8
        if name == b"data":
            return at, length
        at += length + length % 2
    return None


def _samples_follow(file: IO[bytes], first: int, stated: int, size: int) -> bool:
    """Whether a file of `size` bytes goes on with samples after the `stated` bytes of them from offset `first`: what
    follows is neither another chunk nor a tag nor padding."""
    end = first + stated
    file.seek(min(end, size))
    begin = file.read(_PADDING_BYTES)
    # Some writers leave out the byte that makes a length even.
    if not begin or any(_is_other(begin[skipped:], size) for skipped in range(1 + stated % 2)):
        return False
    return not stated or (len(begin) == _PADDING_BYTES and size - end > stated / 10 and any(begin))


def _is_other(begin: bytes, size: int) -> bool:
    """Whether `begin` is the begin of a RIFF chunk that fits a file of `size` bytes, or of an ID3 or APE tag."""
    is_chunk = begin[:4].isascii() and begin[:4].decode().isprintable() and int.from_bytes(begin[4:8], "little") <= size
    return is_chunk or begin.startswith((b"ID3", b"TAG", b"APETAGEX"))
