"""A picture or sound within a shard is read as its file is: the same values, the same reason where it is broken."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from PIL import Image

from tests import trees
from trimodal import media, members
from trimodal.data import cache, images, tracks
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample, Sample, SampleTable
from trimodal.data.splits import file_hashes, file_key, has_known_file

NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def in_tar(path: Path, offset: int = 3) -> str:
    """`path` as a member of a tar, between others."""
    shard = path.parent / f"{path.stem}.tar"
    with tarfile.open(shard, "w") as archive:
        for number in range(offset):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"), io.BytesIO())
        archive.add(path, f"folder/{path.name}")
        archive.addfile(tarfile.TarInfo("z.txt"), io.BytesIO())
    with tarfile.open(shard) as archive:
        found = archive.getmember(f"folder/{path.name}")
    return members.in_tar(str(shard), found.offset_data, found.size, found.name)


def in_parquet(path: Path) -> str:
    """`path` as a row of a table of two row groups."""
    column = [None, {"bytes": b"x", "path": None}, {"bytes": path.read_bytes(), "path": path.name}]
    shard = path.parent / f"{path.stem}.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"media": column}), shard, row_group_size=2)
    return members.in_parquet(str(shard), 1, 0, "media.bytes", path.name)


def saved(name: str, **settings: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Image.fromarray(NOISE).save(folder / name, **settings)
        return folder / name
    return write


def recorded(name: str, samples: np.ndarray | None = None, **settings: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        soundfile.write(folder / name, trees.tone(1.5) if samples is None else samples, 16_000, **settings)
        return folder / name
    return write


def joined(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same file twice in one: a chained Ogg, a joined MP3."""
    def twice(folder: Path) -> Path:
        path = write(folder)
        path.write_bytes(2 * path.read_bytes())
        return path
    return twice


def cut(write: Callable[[Path], Path], keep: float = 0.5) -> Callable[[Path], Path]:
    return lambda folder: trees.truncate(write(folder), keep)


def text(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text("<html>not found</html>")
        return folder / name
    return write


def turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("a.jpg", exif=exif)(folder)


def unfinished_wav(folder: Path) -> Path:
    """Its header says that it holds no samples, as of a writer that was killed."""
    path = recorded("a.wav")(folder)
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(4) + content[44:])
    return path


PICTURES = [saved("a.jpg", quality=90), turned, *(saved(f"a.{end}") for end in ("png", "webp", "gif", "bmp", "tif",
                                                                                "jp2", "ppm", "avif"))]
SOUNDS = [recorded("a.wav"), recorded("a.flac"), recorded("a.ogg"), recorded("a.opus", format="OGG", subtype="OPUS"),
          recorded("a.mp3"), lambda folder: trees.sound(folder / "a.m4a", trees.tone()), recorded("a.au"),
          recorded("a.aiff"), joined(recorded("a.ogg")),
          joined(recorded("a.mp3")), unfinished_wav, recorded("a.wav", np.stack([trees.tone(), -trees.tone()], 1))]
BROKEN_PICTURES = [text("a.jpg"), cut(saved("a.png")), cut(saved("a.jpg"), 0.0), cut(saved("a.tif")),
                   cut(saved("a.webp"))]
BROKEN_SOUNDS = [text("a.wav"), cut(recorded("a.ogg"), 0.0), recorded("a.wav", np.zeros(99)),
                 cut(recorded("a.mp3"), 0.01)]


@pytest.mark.parametrize("pack", [in_tar, in_parquet])
def test_pictures_of_every_format(tmp_path: Path, pack: Callable[[Path], str]) -> None:
    for number, write in enumerate(PICTURES):
        (folder := tmp_path / str(number)).mkdir()
        path = write(folder)
        assert np.array_equal(decode_image(pack(path)), decode_image(path)), path
        assert not images.has_flawed_metadata(pack(path))


@pytest.mark.parametrize("pack", [in_tar, in_parquet])
def test_sounds_of_every_format(tmp_path: Path, pack: Callable[[Path], str]) -> None:
    for number, write in enumerate(SOUNDS):
        (folder := tmp_path / str(number)).mkdir()
        path = write(folder)
        for start_s, duration_s in ((0.0, 0.0), (0.5, 0.25)):
            expected = decode_audio(path, start_s, duration_s)
            assert np.array_equal(decode_audio(pack(path), start_s, duration_s), expected), path
        assert tracks.oddities(pack(path), 0.0, 0.0) == tracks.oddities(str(path), 0.0, 0.0)


@pytest.mark.parametrize("pack", [in_tar, in_parquet])
def test_a_video_gives_its_picture_and_its_sound(tmp_path: Path, pack: Callable[[Path], str]) -> None:
    path = trees.video(tmp_path / "a.mp4", [(200, 20, 20), (20, 200, 20), (20, 20, 200)], trees.tone(0.5))
    assert np.array_equal(decode_image(pack(path)), decode_image(path))
    assert np.array_equal(decode_audio(pack(path)), decode_audio(path))
    assert media.is_video(pack(path))


@pytest.mark.parametrize("pack", [in_tar, in_parquet])
def test_the_reason_why_it_is_broken_is_that_of_the_file(tmp_path: Path, pack: Callable[[Path], str]) -> None:
    for number, write in enumerate([*BROKEN_PICTURES, *BROKEN_SOUNDS]):
        decode = decode_image if number < len(BROKEN_PICTURES) else decode_audio
        (folder := tmp_path / str(number)).mkdir()
        path = write(folder)
        with pytest.raises(BrokenSample) as of_file:
            decode(path)
        with pytest.raises(BrokenSample) as of_member:
            decode(pack(path))
        shard, name = members.shown(pack(path)).split(": ")
        assert str(of_member.value).startswith(f"{shard}: {name}: ") and name.endswith(path.name)
        assert str(of_member.value).removeprefix(f"{shard}: {name}") == str(of_file.value).removeprefix(str(path))


def test_a_member_that_its_shard_does_not_hold_costs_one_sample(tmp_path: Path) -> None:
    path = in_tar(saved("a.png")(tmp_path))
    shard = Path(members.file_of(path))
    shard.write_bytes(shard.read_bytes()[:8_000])
    with pytest.raises(BrokenSample, match=r"a\.tar: folder/a\.png: .*ends [\d,]+ bytes before"):
        decode_image(path)
    shard.unlink()
    with pytest.raises(BrokenSample, match=r"a\.tar: folder/a\.png: no such file"):
        decode_image(path)
    empty = members.in_parquet(members.file_of(in_parquet(saved("b.png")(tmp_path))), 0, 0, "media.bytes", "row 0")
    with pytest.raises(BrokenSample, match=r"b\.parquet: row 0: .*no bytes"):
        decode_image(empty)


def test_members_of_one_shard_are_other_files_than_each_other(tmp_path: Path) -> None:
    """They are told apart by their places, whatever links lead to the shard; and are known again on another machine."""
    path = saved("a.png")(tmp_path)
    one, other = in_tar(path), members.in_tar(str(tmp_path / "a.tar"), 0, 512, "0.txt")
    (tmp_path / "link.tar").symlink_to(tmp_path / "a.tar")
    linked = one.replace("a.tar", "link.tar")
    assert file_key(one) == file_key(linked) != file_key(other)
    assert cache.common_folder([one, other]) == str(tmp_path)
    trained = SampleTable.pack([Sample(key="1", source="s", split="train", image=linked)])
    tested = SampleTable.pack([Sample(key="2", source="s", split="test", image=name) for name in (one, other)])
    known = file_hashes(trained, str(tmp_path))
    assert has_known_file(tested, str(tmp_path), known).tolist() == [True, False]


def test_the_cache_knows_a_member_by_its_place_and_its_shard(tmp_path: Path) -> None:
    from trimodal.config import load_config

    def lines(path: str, root: Path) -> list[bytes]:
        config = load_config(None, [f"paths.data_root={root}"])
        return list(cache.file_lines([(path, 0.0, 0.0)], config))

    path = in_tar(saved("a.png")(tmp_path))
    before = lines(path, tmp_path)
    assert before == lines(path, tmp_path) != lines(members.in_tar(members.file_of(path), 0, 9, "a.png"), tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    Path(members.file_of(path)).rename(moved / "a.tar")
    assert lines(path.replace(str(tmp_path), str(moved)), moved) == before, "data_root may move"
    with (moved / "a.tar").open("ab") as file:
        file.write(b"more")
    assert lines(path.replace(str(tmp_path), str(moved)), moved) != before
