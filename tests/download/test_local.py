"""A copy that the user has is linked into the readers' layout, and left as it is."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import trees
from tests.refusals import refused
from trimodal.download.local import link
from trimodal.sets import SOURCES


def link_voxceleb(local: Path, folder: Path, earlier: Sequence[Path] = ()) -> dict[str, int]:
    find = SOURCES["voxceleb"].find_copies
    assert find
    copies = find(local, [])
    link(copies, folder, earlier)
    return dict(copies.numbers)


def link_audiocaps(local: Path, folder: Path, lists: Path) -> dict[str, int]:
    paths = [(split, path) for version in ("dataset", "dataset2.0") for split in ("train", "val", "test")
             if (path := lists / version / f"{split}.csv").is_file()]
    find = SOURCES["audiocaps"].find_copies
    assert find
    copies = find(local, paths)
    link(copies, folder)
    return dict(copies.numbers)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
    return path


@pytest.mark.parametrize(("given", "place"), [
    ("wav/id10001/v/00001.wav", "voxceleb1/wav"), ("id11251/v/00001.wav", "voxceleb1/wav"),
    ("voxceleb1/dev/wav/id10001/v/00001.wav", "voxceleb1/wav"), ("vox1_test_wav/wav/id10270/v/1.wav", "voxceleb1/wav"),
    ("dev/aac/id00012/v/00001.m4a", "voxceleb2/dev/aac"), ("vox2_test_aac/aac/id00017/v/1.m4a", "voxceleb2/test/aac"),
    ("wav/id00012/v/00001.wav", "voxceleb2/dev/wav"), ("vox2_test_wav/id00017/v/00001.wav", "voxceleb2/test/wav"),
    ("vox2/dev/mp4/id09272/v/1.mp4", "voxceleb2/dev/mp4"), ("vox2/test/mp4/id00017/v/1.mp4", "voxceleb2/test/mp4"),
])
def test_speakers_are_linked_where_the_readers_look(tmp_path: Path, given: str, place: str) -> None:
    sound = put(tmp_path / "latest" / given)  # "latest" holds the letters of "test"
    linked = link_voxceleb(tmp_path / "latest", tmp_path / "data")
    assert linked == {place: 1}
    speaker = sound.parent.parent
    link = tmp_path / "data" / place / speaker.name
    assert link.is_symlink() and link.resolve() == speaker and (link / "v" / sound.name).read_text() == sound.name


def test_what_is_no_speaker_is_left_alone(tmp_path: Path) -> None:
    for name in ("wav/id1/v/1.wav", "wav/other/v/1.wav", "wav/id00012/v/1.aac", "wav/id10002/v/1.txt", "iden.txt"):
        put(tmp_path / "own" / name)
    assert link_voxceleb(tmp_path / "own", tmp_path / "data") == {}
    assert not (tmp_path / "data").exists()


def test_linking_again_changes_nothing_and_a_new_place_wins(tmp_path: Path) -> None:
    link = tmp_path / "data/voxceleb1/wav/id10001"
    for own in ("first", "second"):
        put(tmp_path / own / "wav/id10001/v/1.wav")
    for own in ("first", "first", "second"):
        link_voxceleb(tmp_path / own, tmp_path / "data", [tmp_path / "first"])
        assert link.resolve() == tmp_path / own / "wav/id10001"
    shutil.rmtree(tmp_path / "second")
    link_voxceleb(tmp_path / "first", tmp_path / "data", [tmp_path / "first", tmp_path / "second"])
    assert link.resolve() == tmp_path / "first/wav/id10001", "what led nowhere"


@pytest.mark.parametrize("target", ["elsewhere/id10001", "gone"])
def test_a_link_of_the_user_stays(tmp_path: Path, target: str) -> None:
    for own in ("first", "elsewhere"):
        put(tmp_path / own / "id10001/v/1.wav")
    link = tmp_path / "data/voxceleb1/wav/id10001"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / target)
    link_voxceleb(tmp_path / "first", tmp_path / "data", [tmp_path / "first"])
    assert link.readlink() == tmp_path / target


def test_a_real_folder_in_the_way_is_kept(tmp_path: Path) -> None:
    put(tmp_path / "own/wav/id10001/v/1.wav")
    put(tmp_path / "data/voxceleb1/wav/id10001/v/2.wav")
    link_voxceleb(tmp_path / "own", tmp_path / "data")
    assert (tmp_path / "data/voxceleb1/wav/id10001/v/2.wav").exists()


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    with refused(tmp_path / "absent"):
        link_voxceleb(tmp_path / "absent", tmp_path / "data")


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    for split, clips in {"train": [(1, "-abcdefghi1", 30), (2, "YYcdefghi12", 5)], "val": [(7, "vwxyzvwxyz1", 0)],
                         "test": [(8, "YcdefghiX12", 70)]}.items():
        trees.rows(tmp_path / f"dataset/{split}.csv", [("audiocap_id", "youtube_id", "start_time", "caption"),
                                                      *((*clip, "a, \"b\"") for clip in clips)])
    return tmp_path


@pytest.mark.parametrize(("given", "place"), [
    ("-abcdefghi1_30.000_40.000.wav", "train/-abcdefghi1_30.wav"),
    ("Y-abcdefghi1_000030.wav", "train/-abcdefghi1_30.wav"),
    ("YYcdefghi12_000005_000015.wav", "train/YYcdefghi12_5.wav"),
    ("Yvwxyzvwxyz1_0.000_10.000.mp3", "val/vwxyzvwxyz1_0.mp3"),
    ("-abcdefghi1.wav", "train/-abcdefghi1_30.wav"), ("x/Y-abcdefghi1.FLAC", "train/-abcdefghi1_30.flac"),
    ("-abcdefghi1_30.ogg", "train/-abcdefghi1_30.ogg"), ("-abcdefghi1_30_40.wav", "train/-abcdefghi1_30.wav"),
    ("Y-abcdefghi1_30000_40000.wav", "train/-abcdefghi1_30.wav"), ("1.wav", "train/-abcdefghi1_30.wav"),
    ("YYcdefghi12.wav", "train/YYcdefghi12_5.wav"), ("test/YcdefghiX12_70.m4a", "test/YcdefghiX12_70.m4a"),
    ("vwxyzvwxyz1_0.mp3", "val/vwxyzvwxyz1_0.mp3"),
])
def test_sounds_are_known_by_their_usual_names(tmp_path: Path, lists: Path, given: str, place: str) -> None:
    sound = put(tmp_path / "own" / given)
    linked = link_audiocaps(tmp_path / "own", tmp_path / "data", lists)
    assert linked == {split: int(place.startswith(split)) for split in ("train", "val", "test")}
    assert (tmp_path / "data" / place).resolve() == sound
    assert sum(len(names) for _, _, names in os.walk(tmp_path / "data")) == 1


def test_other_sounds_are_not_linked_and_none_twice(tmp_path: Path, lists: Path) -> None:
    for name in ("-abcdefghi1_31.wav", "elsewhere1.wav", "vwxyzvwxyz1.txt", "vwxyzvwxyz1.flac", "vwxyzvwxyz1.wav"):
        put(tmp_path / "own" / name)
    assert link_audiocaps(tmp_path / "own", tmp_path / "data", lists) == {"train": 0, "val": 1, "test": 0}
    assert [path.name for path in (tmp_path / "data").rglob("*.*")] == ["vwxyzvwxyz1_0.flac"]


def test_what_a_stopped_download_left_in_hidden_folders_is_not_linked(tmp_path: Path, lists: Path) -> None:
    put(tmp_path / ".unpacking/x/vwxyzvwxyz1_0.flac")
    put(tmp_path / ".unpacking/vox1_dev_wav.zip-0/wav/id10001/v/1.wav")
    assert link_audiocaps(tmp_path, tmp_path / "data", lists) == {}
    assert link_voxceleb(tmp_path, tmp_path / "data") == {}


def test_clips_of_both_versions_are_known_and_unclear_numbers_are_not(tmp_path: Path, lists: Path) -> None:
    """The second version has a clip of its own, has moved another one, and gives the number 1 to a third."""
    head = ("audiocap_id", "youtube_id", "start_time", "caption")
    trees.rows(tmp_path / "dataset2.0/train.csv", [head, (1, "newclip0001", 30, "a"), (2, "YYcdefghi12", 5, "a"),
                                                   (9, "-abcdefghi1", 40, "another start")])
    trees.rows(tmp_path / "dataset2.0/val.csv", [head, (8, "YcdefghiX12", 70, "a")])
    for name in ("newclip0001_30.wav", "YcdefghiX12.wav", "1.wav", "2.wav", "-abcdefghi1.wav"):
        put(tmp_path / "own" / name)
    linked = link_audiocaps(tmp_path / "own", tmp_path / "data", lists)
    assert linked == {"train": 3, "val": 1, "test": 1}
    assert sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.wav")) == [
        "test/YcdefghiX12_70.wav", "train/-abcdefghi1_30.wav", "train/YYcdefghi12_5.wav", "train/newclip0001_30.wav",
        "val/YcdefghiX12_70.wav"]


def test_one_version_is_enough(tmp_path: Path, lists: Path) -> None:
    (lists / "dataset").rename(lists / "dataset2.0")
    put(tmp_path / "own/vwxyzvwxyz1.flac")
    assert link_audiocaps(tmp_path / "own", tmp_path / "data", lists)["val"] == 1
