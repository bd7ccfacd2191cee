"""What pictures, sounds and videos have in common: the names of their files, how FFmpeg's libraries open them, and what
a file that cannot be read is in truth."""

import os
from typing import Any

from trimodal import members
from trimodal.errors import WHOLE

# By these names videos are known wherever a file is a picture, a sound or a part of a data set; in any case of letters.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts", ".flv",
                  ".f4v", ".wmv", ".asf", ".mpg", ".mpeg", ".vob", ".ogv")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".oga", ".aac", ".wma", ".aiff", ".aif", ".au",
                  ".caf", ".w64", ".mka", ".weba", ".ac3", ".amr")
WITH_SOUND = (*SOUND_SUFFIXES, *VIDEO_SUFFIXES)  # of two files with one name the earlier suffix is taken
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".heic",
                    ".heif", ".jfif", ".ppm", ".pgm")
SUFFIXES = (*PICTURE_SUFFIXES, *WITH_SOUND)  # of all that is read
# FFmpeg tries no other formats: some are playlists, and it opens the files and addresses that these name.
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,asf,flv,ogg"
SOUND_FORMATS = f"{VIDEO_FORMATS},wav,w64,aiff,au,caf,flac,mp3,aac,ac3,amr,ape,wv,tta"

_HEAD_BYTES = 4096  # that tell what a file is
_SHOWN = 40  # letters of a text
Signature = tuple[int, bytes, str]  # where some bytes stand, the bytes, what they tell
_TEXTS = (  # how files of text begin, blanks left out, in small letters
    ((b"version https://git-lfs", b"version https://hawser"),
     "is a Git LFS pointer and not the file itself; run: git lfs pull"),
    ((b"/annex/objects", b"../.git/annex/objects", b".git/annex/objects"),
     "is a pointer of git-annex and not the file itself; run: git annex get"))
_ARCHIVES: tuple[Signature, ...] = (
    (0, b"PK\3\4", "zip"), (0, b"\x1f\x8b", "gzip"), (0, b"7z\xbc\xaf\x27\x1c", "7z"), (0, b"Rar!\x1a\x07", "rar"),
    (0, b"\xfd7zXZ\0", "xz"), (0, b"BZh", "bzip2"), (0, b"\x28\xb5\x2f\xfd", "zstd"), (257, b"ustar", "tar"))
_OTHERS: tuple[Signature, ...] = (
    (0, b"%PDF", "is a PDF document; save its pages as PNG"), (0, b"8BPS", "is a drawing of Photoshop; save it as PNG"),
    (0, b"\xff\x0a", "is JPEG XL, which is not read here; convert it to JPEG or PNG"),
    (0, b"\0\0\0\x0cJXL ", "is JPEG XL, which is not read here; convert it to JPEG or PNG"),
    (0, b"\0\5\x16\7", "is a companion file of macOS (AppleDouble), which holds neither picture nor sound; delete it"),
    (0, b"\x93NUMPY", "is an array of NumPy; save it as PNG or WAV"),
    (0, b"PAR1", "is a Parquet table; unpack what it holds"))
_PICTURES: tuple[Signature, ...] = (
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"GIF8", "GIF"), (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"), (8, b"WEBP", "WebP"))
_SOUNDS: tuple[Signature, ...] = ((0, b"fLaC", "FLAC"), (0, b"OggS", "Ogg"), (0, b"ID3", "MP3"), (8, b"WAVE", "WAV"))
_MORE_PICTURES: tuple[Signature, ...] = ((0, b"BM", "BMP"), (0, b"\0\0\0\x0cjP  ", "JPEG 2000"))
_VIDEOS: tuple[Signature, ...] = ((4, b"ftyp", "MP4"), (0, b"\x1a\x45\xdf\xa3", "Matroska"), (8, b"AVI ", "AVI"))
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def open_container(source: members.Source, formats: str, **options: str) -> Any:
    """The container (av.container.InputContainer) of a file that is of one of FFmpeg's `formats`; `options` are those
    of its demuxers.

    Raises:
        ValueError: it is of another format; and what FFmpeg raises for damage.
    """
    import av

    try:
        opened = members.source(source) if isinstance(source, str) else source
        return av.open(opened, metadata_errors="ignore", options={"format_whitelist": formats, **options})
    except av.ArgumentError:  # which a format that is not in the list gets
        raise ValueError("of a format that is not read here") from None


def picture_track(container: Any) -> Any:
    """The first video stream, cover pictures last; None where there is none."""
    from av.stream import Disposition

    streams = sorted(container.streams.video, key=lambda one: bool(one.disposition & Disposition.attached_pic))
    return streams[0] if streams else None


def kinds_in(path: str) -> tuple[str, ...]:
    """Which of "image" and "audio" a video has tracks of; () where it cannot be opened."""
    try:
        with open_container(path, VIDEO_FORMATS) as container:
            found = {"image": picture_track(container) is not None, "audio": bool(container.streams.audio)}
    except Exception:  # damage makes FFmpeg raise nearly any type
        return ()
    return tuple(kind for kind, is_there in found.items() if is_there)


def duration_s(path: str) -> float:
    """How long a sound or a video lasts as its header states it, 0 where it states nothing; to be shown."""
    try:
        with open_container(path, SOUND_FORMATS) as container:
            return max(0.0, (container.duration or 0) / 1e6)
    except Exception:  # as above
        return 0.0


def second_0(container: Any, first_s: float | None) -> float:
    """Time of the container's clock at which a player begins: the earliest start of any picture or sound track, where
    the first sample of one that was decoded is at `first_s`."""
    from av.stream import Disposition

    streams = [one for one in (*container.streams.video, *container.streams.audio) if one.start_time is not None
               and not one.disposition & Disposition.attached_pic]
    starts = [float(one.start_time * one.time_base) for one in streams]
    return min([*starts, *([] if first_s is None else [first_s])], default=0.0)


def reason_of(error: Exception, path: str) -> str:
    """The message of a decoder's error on one line, with "it" for the file's name; the error's class if it has none."""
    message = getattr(error, "strerror", None) or str(error)
    for name in (repr(path), path):
        message = message.replace(name, "it")
    return " ".join(message.split()) or type(error).__name__


def problem_of(path: str, error: Exception, wanted: str) -> str:
    """Why a file could not be decoded as `wanted`, "picture" or "sound": what it is instead (see `kind_of`), else the
    message of the decoder's error."""
    return kind_of(path, wanted) or f"cannot be decoded ({reason_of(error, path)})"


def kind_of(path: str, wanted: str) -> str:
    """What a file is by its first bytes, if not a `wanted` ("picture" or "sound"), and what to do about it.

    Returns:
        A phrase such as "is an archive (zip); unpack it"; "" where the file looks like what is wanted, or is of no
        known kind.
    """
    try:
        with members.open_bytes(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not head:
        return f"is empty (0 bytes); {WHOLE}"
    if not head.strip(b"\0"):
        return f"begins with nothing but zeros, as an unfinished download does; {WHOLE}"
    if archive := _find(head, _ARCHIVES):
        return f"is an archive ({archive}); unpack it"
    if phrase := _text(head, wanted) or _find(head, _OTHERS) or (_is_still(head) and _still(head, wanted)):
        return phrase
    medium, kind = ("picture", found) if (found := _find(head, _PICTURES)) else ("sound", _find(head, _SOUNDS))
    return f"is a {medium} ({kind})" if kind and medium != wanted else ""


def medium_of(content: bytes) -> str:
    """"picture", "sound" or "video" by the first bytes of a file; "" where they tell nothing."""
    if _find(content, _PICTURES) or _is_still(content) or _find(content, _MORE_PICTURES):
        return "picture"
    if _find(content, _SOUNDS):
        return "sound"
    return "video" if _find(content, _VIDEOS) else ""


def _find(head: bytes, signatures: tuple[Signature, ...]) -> str:
    return next((what for start, magic, what in signatures if head.startswith(magic, start)), "")


def _text(head: bytes, wanted: str) -> str:
    itself = f"take the {wanted or 'file'} itself"
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if phrase := next((phrase for starts, phrase in _TEXTS if begin.startswith(starts)), ""):
        return phrase
    if begin.startswith((b"<!doctype html", b"<html", b"<head")) or (begin.startswith(b"<") and b"<html" in begin):
        return f"is a web page (HTML), as a failed download leaves; {itself}"
    if begin.startswith(b"<") and b"<svg" in begin:
        return "is a drawing in SVG, which is not read here; convert it to PNG"
    try:
        letters = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a letter that the head cuts
            return ""
        letters = head[: error.start].decode()
    if any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in letters):
        return ""
    return f"is text ({' '.join(letters.split())[:_SHOWN]!r}); {itself}"


def is_still(path: str) -> bool:
    """Whether a file of MP4's kind holds a still picture (HEIC, AVIF), of which FFmpeg would show one tile."""
    with members.open_bytes(path) as file:
        return _is_still(file.read(64))


def _is_still(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and (head[8:12] in _HEIF_BRANDS or b"avif" in head[8:64])


def _still(head: bytes, wanted: str) -> str:
    from PIL import features

    if b"avif" not in head[8:64]:
        return "is HEIC, which is not read here; convert it to JPEG"
    if wanted != "picture":
        return "is a picture (AVIF)"
    if "avif" in features.get_supported_modules():
        return ""
    return "is AVIF, which the installed Pillow does not read; upgrade it, or convert the file to PNG"


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a video by its name."""
    return os.fspath(path).lower().endswith(VIDEO_SUFFIXES)


def has_sound(path: str) -> bool:
    """Whether a video has a sound track; False where it cannot be opened, which its picture will tell."""
    import av

    try:
        with open_container(path, VIDEO_FORMATS) as container:
            return bool(container.streams.audio)
    except (av.FFmpegError, OSError, ValueError):
        return False
