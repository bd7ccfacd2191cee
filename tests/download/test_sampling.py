"""A small start: some files of each archive, read in pieces where they lie; the same ones everywhere; no more bytes."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import miniature, trees
from tests.loopback import Loopback
from tests.refusals import refused
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download.acquire import acquire
from trimodal.download.http import Policy, TransferError, Wanted
from trimodal.download.remote import PIECE_BYTES, NoRange, RemoteFile
from trimodal.download.selection import Options
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)
DATA = random.Random(3).randbytes(PIECE_BYTES + 1000)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback({"/a": DATA}) as loopback:
        yield loopback


def served(server: Loopback, pair: tuple[Source, dict[str, bytes]]) -> Source:
    source, files = pair
    server.files |= {f"/{source.name}/{name}": data for name, data in files.items()}
    return source


def options(folder: Path, server: Loopback, name: str, sample: int) -> Options:
    return Options(data_root=folder / "data", base_urls={name: server.url(f"/{name}")}, policy=QUICK, sample=sample)


# --- A file on a server ----------------------------------------------------------------------------------------------


def remote(server: Loopback, path: str = "/a") -> RemoteFile:
    return RemoteFile(Wanted(path=Path("a"), urls=(server.url(path),)), QUICK)


def test_pieces_are_those_of_the_file_and_no_others_are_fetched(server: Loopback) -> None:
    file = remote(server)
    assert file.size == len(DATA)
    for start, length in ((0, 10), (700, len(DATA)), (len(DATA) - 3, 10), (len(DATA), 1)):
        assert file.read_at(start, length) == DATA[start: start + min(length, PIECE_BYTES)]
    assert server.ranges("/a") == ["bytes=0-0", "bytes=0-9", f"bytes=700-{700 + PIECE_BYTES - 1}",
                                   f"bytes={len(DATA) - 3}-{len(DATA) - 1}"]


@pytest.mark.parametrize("fault", ["503", "cut:2"])
def test_a_server_that_fails_for_a_moment_is_asked_again(server: Loopback, fault: str) -> None:
    file = remote(server)
    server.faults["/a"] = [fault]
    assert file.read_at(0, 4) == DATA[:4]


def test_what_a_server_cannot_give_in_pieces_is_told(server: Loopback) -> None:
    server.faults["/a"] = ["no-range"]
    with pytest.raises(NoRange):
        remote(server)
    with refused("a", server.url().removeprefix("http://"), 404, error=TransferError):
        remote(server, "/absent")


def test_the_first_server_that_gives_pieces_of_this_file_is_asked(server: Loopback) -> None:
    server.files |= {"/other": DATA[:-1], "/whole": DATA}
    server.faults["/whole"] = ["no-range"] * 9
    urls = tuple(server.url(path) for path in ("/absent", "/whole", "/other", "/a"))
    file = RemoteFile(Wanted(path=Path("a"), urls=urls, size=len(DATA)), QUICK)
    assert file.read_at(0, 4) == DATA[:4] and server.requests[-1][0] == "/a"


def test_another_piece_than_asked_for_is_refused(server: Loopback) -> None:
    file = remote(server)
    server.faults["/a"] = ["wrong-range"]
    with refused("a", server.url().removeprefix("http://"), error=TransferError):
        file.read_at(0, 4)


def test_a_file_that_changes_under_way_is_an_error(server: Loopback) -> None:
    file = remote(server)
    server.files["/a"] = DATA[::-1]
    with refused("a", server.url().removeprefix("http://"), error=TransferError):
        file.read_at(0, 4)


# --- Samples of the sets ---------------------------------------------------------------------------------------------


def counts(folder: Path, name: str) -> dict[str, int]:
    config = config_from_dict({"paths": {"data_root": str(folder / "data")}})
    return {split: len(list(all_sets.read_split(name, split, config))) for split in ("train", "val", "test")}


def test_a_sample_of_coco_has_pictures_of_each_side_and_can_be_trained_on(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.coco(tmp_path / "true"))
    outcome = acquire(source, options(tmp_path, server, "coco", 2))
    assert (outcome.state, outcome.code) == ("partial", 0), outcome.detail
    assert counts(tmp_path, "coco") == {"train": 2, "val": 2, "test": 2}
    assert not (tmp_path / "data/coco/archives").exists()
    assert "" not in server.ranges("/coco/train2017.zip"), "the archive of pictures is never fetched whole"


def test_few_bytes_of_a_large_archive_are_fetched(server: Loopback, tmp_path: Path) -> None:
    noise = {f"val2017/{i:012d}.jpg": random.Random(i).randbytes(60_000) for i in range(40)}
    source = served(server, miniature.shrink("coco", {"val2017.zip": noise}, tmp_path))
    assert acquire(source, options(tmp_path, server, "coco", 3)).code == 0
    got = miniature.files_of(tmp_path / "data/coco")
    assert len(got) == 3 and all(noise[name] == data for name, data in got.items())
    assert server.bytes_sent < 40 * 60_000 / 2


def test_a_whole_set_after_a_sample_and_a_sample_after_a_whole_one(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.coco(tmp_path / "true"))
    sample, whole = options(tmp_path, server, "coco", 2), options(tmp_path, server, "coco", 0)
    assert acquire(source, sample).state == "partial"
    assert inventory.read_marker(tmp_path / "data/coco")["limited"]
    assert acquire(source, replace(sample, skip_existing=True)).state == "skipped"
    assert acquire(source, replace(whole, skip_existing=True)).state == "done"
    assert miniature.files_of(tmp_path / "data/coco") == miniature.files_of(tmp_path / "true/coco")
    server.requests.clear()
    assert acquire(source, sample).code == 0 and server.requests == []
    assert not inventory.read_marker(tmp_path / "data/coco")["limited"]


def test_without_pieces_the_archive_comes_whole_and_a_sample_is_taken_out(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.coco(tmp_path / "true"))
    server.faults["/coco/val2017.zip"] = ["no-range"] * 2
    assert acquire(source, options(tmp_path, server, "coco", 2)).code == 0
    assert len(list((tmp_path / "data/coco/val2017").iterdir())) < 8


def test_a_sample_of_clotho_is_the_first_of_each_archive(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.clotho(tmp_path / "true"))
    assert acquire(source, options(tmp_path, server, "clotho", 2)).code == 0
    whole, got = miniature.files_of(tmp_path / "true/clotho"), miniature.files_of(tmp_path / "data/clotho")
    assert sum(name.endswith(".wav") for name in got) == 6 and all(whole[name] == data for name, data in got.items())
    assert "" not in server.ranges("/clotho/clotho_audio_development.7z")


def test_a_sample_of_voxceleb_has_several_recordings_of_a_speaker(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.voxceleb(tmp_path / "true"))
    assert acquire(source, options(tmp_path, server, "voxceleb", 3)).code == 0
    got = [path.parts[-3] for path in (tmp_path / "data/voxceleb/voxceleb1/wav").rglob("*.wav")]
    assert len(got) == 6 and len(set(got)) == 2
    many = [f"wav/id{speaker}/v/{i:03d}.wav" for speaker in range(5) for i in range(30)]
    chosen = source.choose(source.items[-1], tmp_path, 25)(many)
    assert len(chosen) == 25 and len({name.split("/")[1] for name in chosen}) == 3


def test_a_sample_of_audiocaps_stops_at_enough_clips(server: Loopback, tmp_path: Path) -> None:
    source = served(server, miniature.audiocaps(tmp_path / "true", shards=True))
    outcome = acquire(source, options(tmp_path, server, "audiocaps", 1))
    assert (outcome.state, outcome.code) == ("partial", 0)
    assert inventory.read_marker(tmp_path / "data/audiocaps")["counts"] == {"train": 1, "val": 1, "test": 1}
    assert acquire(source, options(tmp_path, server, "audiocaps", 1)).code == 0
    assert len(trees.AUDIOCAPS["train"]) > 1


def test_lists_are_never_sampled() -> None:
    whole = [item.name for source in SOURCES.values() for item in source.items if not item.is_sampled]
    assert {"annotations_trainval2017.zip", "caption_datasets.zip", "dataset/train.csv", "iden_split.txt"} <= set(whole)
    assert not {"train2017.zip", "clotho_audio_development.7z", "vox1_dev_wav.zip"} & set(whole)
