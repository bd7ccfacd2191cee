"""--status tells at a glance what is there; --verify finds every damaged byte, by name, and the next run mends it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import miniature, trees
from tests.loopback import Loopback
from tests.refusals import assert_names
from trimodal.download.acquire import LOCK, Outcome, acquire, open_job
from trimodal.download.http import Policy
from trimodal.download.selection import Options
from trimodal.download.state import write_marker
from trimodal.download.verify import problem_of, status, verify
from trimodal.files import locked
from trimodal.sets import inventory
from trimodal.sets.base import Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


class Set:
    """A miniature set, served."""

    def __init__(self, folder: Path, server: Loopback, pair: tuple[Source, dict[str, bytes]], **settings: object):
        self.source, served = pair
        self.folder = folder / "data" / self.source.name
        name = self.source.name
        server.files |= {f"/{name}/{file}": data for file, data in served.items()}
        self.options = Options(data_root=folder / "data", base_urls={name: server.url(f"/{name}")}, policy=QUICK,
                               **settings)  # type: ignore[arg-type]

    def run(self) -> Outcome:
        return acquire(self.source, self.options)

    def verify(self) -> Outcome:
        return verify(self.source, self.options)

    def parts(self) -> dict[str, dict[str, Any]]:
        found = status(self.source.name, {self.source.name: self.source}, self.options)
        return {part["name"]: part for part in found["parts"]}

    def states(self) -> dict[str, str]:
        return {name: part["state"] for name, part in self.parts().items()}


def told_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The files that were named, sorted."""
    lines = (line.split(": ", 2) for line in capsys.readouterr().out.splitlines())
    return sorted(words[1] for words in lines if len(words) == 3)


@pytest.fixture
def coco(tmp_path: Path, server: Loopback) -> Set:
    return Set(tmp_path, server, miniature.coco(tmp_path / "true"))


# --- Status ----------------------------------------------------------------------------------------------------------


def test_status_tells_missing_arriving_there_and_broken(coco: Set, server: Loopback) -> None:
    assert set(coco.states().values()) == {"missing"}
    server.faults["/coco/train2017.zip"] = ["cut:100000", "cut:0", "cut:0"]
    assert coco.run().code == 1
    assert coco.states() == {"annotations_trainval2017.zip": "there", "caption_datasets.zip": "there",
                             "val2017.zip": "there", "train2017.zip": "arriving"}
    assert coco.parts()["train2017.zip"]["bytes"] > 0
    assert coco.run().code == 0
    assert set(coco.states().values()) == {"there"}
    (coco.folder / "val2017/000000001009.jpg").unlink()
    (coco.folder / "val2017/000000001018.jpg").write_bytes(b"")
    assert_names(coco.states()["val2017.zip"], "broken", 2)
    val = coco.parts()["val2017.zip"]
    assert val["files"] == 6 and val["bytes_to_fetch"] == len(server.files["/coco/val2017.zip"])


def test_status_puts_shards_together(tmp_path: Path, server: Loopback) -> None:
    audiocaps = Set(tmp_path, server, miniature.audiocaps(tmp_path / "true", shards=True))
    audiocaps.run()
    assert {name: state for name, state in audiocaps.states().items() if "shards" in name} == {
        "shards of train": "there", "shards of val": "there", "shards of test": "there"}


def test_status_changes_nothing_on_the_disk(coco: Set, tmp_path: Path) -> None:
    coco.states()
    assert not coco.folder.exists()


# --- Verify ----------------------------------------------------------------------------------------------------------


def test_what_is_right_is_verified_without_a_request(coco: Set, server: Loopback,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert coco.run().code == 0
    server.requests.clear()
    capsys.readouterr()
    outcome = coco.verify()
    assert (outcome.state, server.requests) == ("verified", []), outcome.detail
    assert [int(number) for number in re.findall(r"\d+", outcome.detail)] == [
        len(miniature.files_of(coco.folder)), 1], "right, and of noise"
    assert told_of(capsys) == ["train2017/000000999999.jpg"]


def test_one_changed_bit_is_found_by_name_and_mended_by_the_next_run(coco: Set, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    coco.run()
    path = coco.folder / "val2017/000000001027.jpg"
    right = path.read_bytes()
    path.write_bytes(right[:-5] + bytes([right[-5] ^ 1]) + right[-4:])  # the size, and the picture, as before
    assert coco.run().state == "done", "the thorough look of a download sees names and sizes"
    capsys.readouterr()
    outcome = coco.verify()
    assert (outcome.state, outcome.code) == ("damaged", 1)
    right_files, *others = (int(number) for number in re.findall(r"\d+", outcome.detail))
    assert right_files == len(miniature.files_of(coco.folder)) - 1 and others == [1, 1], "damaged, and of noise"
    assert told_of(capsys) == ["train2017/000000999999.jpg", "val2017/000000001027.jpg"]
    assert_names(coco.states()["val2017.zip"], "broken", 1)
    assert outcome.next_command.startswith("python download_datasets.py --datasets coco")
    assert coco.run().state == "done" and path.read_bytes() == right
    assert coco.verify().state == "verified"


def test_files_that_were_put_back_are_damaged_no_longer(coco: Set) -> None:
    coco.run()
    path = coco.folder / "val2017/000000001027.jpg"
    right = path.read_bytes()
    path.write_bytes(bytes(len(right)))
    assert coco.verify().state == "damaged"
    path.write_bytes(right)
    assert coco.verify().state == "verified"
    assert coco.states()["val2017.zip"] == "there"


def test_a_folder_that_cannot_be_locked_is_an_outcome(coco: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.run()
    with locked(coco.folder / LOCK):
        outcome = coco.verify()
    assert (outcome.state, outcome.code) == ("failed", 2)
    assert_names(outcome.detail, coco.folder)
    (coco.folder / f"{LOCK}.lock").mkdir()
    outcome = coco.verify()
    assert outcome.code == 2
    assert_names(outcome.detail, coco.folder / f"{LOCK}.lock")


def test_missing_and_cut_files_and_lists_are_found(tmp_path: Path, server: Loopback,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    clotho = Set(tmp_path, server, miniature.clotho(tmp_path / "true"), keep_archives=True)
    clotho.run()
    (clotho.folder / "development/ Ambience Birds.wav").unlink()
    (clotho.folder / "evaluation/wind.wav").write_bytes(b"RIFF")
    (clotho.folder / "clotho_captions_validation.csv").write_bytes(b"x")
    archive = clotho.folder / "archives/clotho_audio_validation.7z"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert clotho.verify().code == 1
    assert told_of(capsys) == ["archives/clotho_audio_validation.7z", "clotho_captions_validation.csv",
                               "development/ Ambience Birds.wav", "evaluation/wind.wav"]
    assert clotho.run().code == 0 and clotho.verify().state == "verified"


def test_files_of_the_user_are_opened(tmp_path: Path, server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    audiocaps = Set(tmp_path, server, miniature.audiocaps(tmp_path / "true"),
                    local={"audiocaps": tmp_path / "true/audiocaps"})
    trees.truncate(tmp_path / "true/audiocaps/train/hI8j9K0l1m2_9.flac", 0.01)
    audiocaps.run()
    outcome = audiocaps.verify()
    assert (outcome.state, outcome.code) == ("verified", 3)
    assert_names(outcome.detail, 1)
    assert "train/hI8j9K0l1m2_9.flac" in told_of(capsys)


def test_a_set_that_is_not_there_is_missing(coco: Set) -> None:
    outcome = coco.verify()
    assert (outcome.state, outcome.code) == ("missing", 1) and not coco.folder.exists()


def test_damaged_files_are_not_taken_over_from_somebody_else(coco: Set) -> None:
    coco.run()
    marker = inventory.read_marker(coco.folder)
    marker["items"]["val2017.zip"]["damaged"] = ["x"]
    write_marker(coco.folder, marker)
    state = open_job(coco.source, coco.options).state
    assert [item.name for item in state.todo()] == ["val2017.zip"]
    assert state.adopt(state.todo()[0]) == 0


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mp4"])
def test_media_are_opened_and_damage_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix in (".jpg", ".png"):
        trees.picture(path)
    elif path.suffix == ".mp4":
        trees.video(path, [(200, 0, 0)] * 3, trees.tone(0.2))
    else:
        trees.sound(path, trees.tone(0.2))
    assert problem_of(path) == ""
    path.write_bytes(path.read_bytes()[:20])
    assert problem_of(path)


def test_a_sound_of_no_length_is_told(tmp_path: Path) -> None:
    import numpy as np

    assert problem_of(trees.sound(tmp_path / "a.wav", np.zeros(0, np.float32)))
