"""What is no picture and no sound is named for what it is, with what to do about it, and its path stands there once."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import trees
from tests.project import ROOT
from trimodal import media
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image
from trimodal.download.verify import problem_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", b"x")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return file.getvalue()


KINDS = {
    "empty": b"", "git lfs pull": POINTER, "git annex get": b"/annex/objects/SHA256E-s1--a.jpg\n",
    "HTML": b"\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "web page": b"<HTML><HEAD>",
    "zip": zipped(), "tar": tarred(), "gzip": b"\x1f\x8b\x08" + bytes(99), "7z": b"7z\xbc\xaf\x27\x1c" + bytes(99),
    "zeros": bytes(9_000), "text": b"Access denied: your quota is used up", "PDF": b"%PDF-1.7\n\xff\xff",
    "SVG": b"<?xml version='1.0'?><svg xmlns='x'/>", "AppleDouble": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(99),
    "JPEG XL": b"\xff\x0a" + bytes(range(99))}


def reasons(path: Path) -> list[str]:
    """Why a file is read neither as a picture nor as a sound, each without its path in front."""
    found = []
    for read in (decode_image, decode_audio):
        with pytest.raises(ValueError) as caught:
            read(path)
        told = str(caught.value)
        assert told.startswith(f"{path}: ") and told.count(path.name) == 1 and "\n" not in told
        found.append(told.removeprefix(f"{path}: "))
    return found


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".wav", ".flac", ".mp4", ".webm"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_medium_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(KINDS[kind])
    for told in [*reasons(path), problem_of(path)]:
        assert kind in told, told


@pytest.mark.parametrize(("content", "picture", "sound"), [
    (HEIC, "HEIC", "HEIC"), (np.random.default_rng(0).bytes(999), "decoded", "decoded")])
def test_pictures_of_telephones_and_nothing_at_all(tmp_path: Path, content: bytes, picture: str, sound: str) -> None:
    (tmp_path / "a.heic").write_bytes(content)
    told = reasons(tmp_path / "a.heic")
    assert picture in told[0] and sound in told[1] and problem_of(tmp_path / "a.heic")


@pytest.mark.parametrize(("make", "kind"), [
    (lambda path: trees.sound(path.with_suffix(".wav"), trees.tone()), "WAV"),
    (lambda path: trees.sound(path.with_suffix(".flac"), trees.tone()), "FLAC")])
def test_a_sound_is_no_picture(tmp_path: Path, make: Callable[[Path], Path], kind: str) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(ValueError, match=kind):
        decode_image(path)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WebP"), ("a.gif", "GIF")])
def test_a_picture_is_no_sound(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        decode_audio(trees.picture(tmp_path / name))


def test_avif_is_named_where_it_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import features

    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "a.avif")
    assert media.kind_of(str(tmp_path / "a.avif"), "picture") == ""
    assert decode_image(tmp_path / "a.avif").shape == (16, 16, 3)
    monkeypatch.setattr(features, "get_supported_modules", list)
    assert "AVIF" in media.kind_of(str(tmp_path / "a.avif"), "picture")


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a.mp4"])
def test_a_still_picture_is_not_taken_for_a_video_of_its_tiles(tmp_path: Path, name: str) -> None:
    """FFmpeg opens HEIC and shows its first tile."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(file, "AVIF")
    (tmp_path / name).write_bytes(file.getvalue().replace(b"avif", b"heic"))
    assert "HEIC" in reasons(tmp_path / name)[0]


def test_verifying_opens_what_training_reads_whatever_its_name_says(tmp_path: Path) -> None:
    for made, name in (("a.wav", "b.webm"), ("a.mp3", "b.mp4"), ("a.flac", "b.m4a"), ("a.m4a", "b.wav")):
        path = trees.sound(tmp_path / made, trees.tone()).rename(tmp_path / name)
        assert len(decode_audio(path)) >= 16_000 and problem_of(path) == ""
    path = trees.picture(tmp_path / "a.png").rename(tmp_path / "c.mp4")
    assert decode_image(path).ndim == 3 and problem_of(path) == ""
    trees.truncate(path)
    assert problem_of(path)


def test_a_file_of_text_is_shown_in_short_and_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("é\n" * 5_000, encoding="utf-8")
    told = media.kind_of(str(tmp_path / "a.jpg"), "picture")
    assert "text" in told and len(told) < 120 and "\n" not in told


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mp4", "a.webm"])
def test_media_themselves_are_not_taken_for_something_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    is_picture = path.suffix in (".jpg", ".png")
    _ = trees.picture(path) if is_picture else trees.sound(path, trees.tone())
    assert media.kind_of(str(path), "picture" if is_picture else "sound") == ""


@pytest.mark.parametrize("readme", ["docs/datasets.md", "docs/datasets_en.md"])
def test_the_readme_names_the_suffixes_of_all_videos(readme: str) -> None:
    text = " ".join((ROOT / readme).read_text("utf-8").split())
    assert " ".join(media.VIDEO_SUFFIXES) in text
