"""Getting one set by several files at a time: all that can be had, unpacked meanwhile; or a part, where it is asked."""

import hashlib
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import miniature, packing
from tests.download.test_acquire import options, run, serve, server
from tests.loopback import Loopback
from tests.refusals import assert_names
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download import unpack
from trimodal.download.acquire import acquire, bytes_needed, open_job
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import File, Item, Source

__all__ = ["server"]  # a fixture


def several(server: Loopback, number: int, folder: Path) -> Source:
    """A set of so many zips of one file each."""
    source, served = SOURCES["coco"], {}
    items = []
    for i in range(number):
        data = packing.zip_of({f"{i}.jpg": bytes([i]) * 200_000}, compression=zipfile.ZIP_STORED)
        served[f"{i}.zip"] = data
        items.append(Item(name=f"{i}.zip", kind="zip", into="val2017", unpacked=200_000, files=(
            File(name=f"{i}.zip", urls=(), size=len(data), sha256=hashlib.sha256(data).hexdigest()),)))
    return serve(server, (replace(source, items=tuple(replace(item, subset="2017") for item in items)), served))


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_files_are_fetched_at_a_time(server: Loopback, tmp_path: Path, jobs: int) -> None:
    source = several(server, 5, tmp_path)
    server.wait_until_at_once, server.slow_s = jobs, 0.02
    assert run(source, options(tmp_path, server, jobs=jobs)).state == "done"
    assert server.most_at_once == jobs
    assert len(list((tmp_path / "data/coco/val2017").iterdir())) == 5


def test_the_next_archive_arrives_while_one_is_unpacked(server: Loopback, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    source = several(server, 2, tmp_path)
    extract = unpack.extract

    def after_the_next(*arguments: Any) -> Any:
        met.append(server.asked_for("/coco/1.zip", within_s=60))
        return extract(*arguments)

    met: list[bool] = []
    monkeypatch.setattr(unpack, "extract", after_the_next)
    assert run(source, options(tmp_path, server, jobs=1)).state == "done"
    assert met[0], "asked for before the first archive was unpacked"


def test_a_file_that_fails_keeps_the_others_from_nothing(server: Loopback, tmp_path: Path) -> None:
    source = several(server, 5, tmp_path)
    absent = {name: server.files.pop(f"/coco/{name}") for name in ("0.zip", "2.zip")}
    outcome = run(source, options(tmp_path, server))
    assert (outcome.state, outcome.code) == ("failed", 1)
    assert_names(outcome.detail, "0.zip", "2.zip")
    assert {path.name for path in (tmp_path / "data/coco/val2017").iterdir()} == {"1.jpg", "3.jpg", "4.jpg"}
    server.requests.clear()
    server.files |= {f"/coco/{name}": data for name, data in absent.items()}
    assert run(source, options(tmp_path, server)).state == "done"
    assert {name for name, _ in server.requests} == {"/coco/0.zip", "/coco/2.zip"}


def test_where_nothing_works_not_everything_is_tried(server: Loopback, tmp_path: Path) -> None:
    source = several(server, 40, tmp_path)
    for name in list(server.files):
        del server.files[name]
    outcome = run(source, options(tmp_path, server, jobs=2))
    assert outcome.code == 1 and 1 <= len(set(re.findall(r"\d+\.zip", outcome.detail))) <= 5
    assert not re.search(r"\d+\.zip", outcome.detail.rpartition("; ")[2]), "last, that there are others"
    assert 1 <= len({name for name, _ in server.requests}) <= 5


def test_names_are_compared_with_the_lists(server: Loopback, tmp_path: Path) -> None:
    source, served = miniature.clotho(tmp_path / "true")
    name = "clotho_captions_evaluation.csv"
    served[name] = served[name].replace(b"wind.wav", b"Wind.wav")
    items = tuple(replace(item, files=(replace(item.files[0], size=0, sha256=""),)) if item.name == name else item
                  for item in source.items)
    outcome = run(serve(server, (replace(source, items=items), served)), options(tmp_path, server))
    assert (outcome.state, outcome.code) == ("partial", 1)
    assert_names(outcome.detail, "evaluation", name, 2, 3, "Wind.wav")


def test_a_bound_of_bytes_makes_a_usable_part(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.coco(tmp_path / "true"))
    outcome = run(source, options(tmp_path, server, max_gb=0.0001))
    assert (outcome.state, outcome.code) == ("partial", 0)
    assert_names(outcome.detail, "--max-gb", "train2017.zip")
    assert run(source, options(tmp_path, server, max_gb=0.0001, skip_existing=True)).state == "skipped"
    config = config_from_dict({"paths": {"data_root": str(tmp_path / "data")}})
    assert [len(list(all_sets.read_split("coco", split, config))) for split in ("train", "val", "test")] == [6, 1, 1]
    assert run(source, options(tmp_path, server, skip_existing=True)).state == "done"


# --- What an earlier run has brought ---------------------------------------------------------------------------------


def unpinned(server: Loopback, folder: Path) -> Source:
    """VoxCeleb's archive in four parts, of which no digest is published."""
    source, served = miniature.voxceleb(folder / "true")
    (item,) = (item for item in source.items if len(item.files) == 4)
    item = replace(item, files=tuple(replace(file, sha256="", md5="", size=0) for file in item.files), counts=())
    return serve(server, (replace(source, items=(item,)), served))


@pytest.mark.parametrize("keep_archives", [False, True])
def test_parts_without_a_published_digest_are_not_fetched_twice(server: Loopback, tmp_path: Path,
                                                                keep_archives: bool) -> None:
    source = unpinned(server, tmp_path)
    names = [file.name for file in source.items[0].files]
    archives_folder = tmp_path / "data/voxceleb/archives"
    last = server.files.pop(f"/voxceleb/{names[3]}")
    assert run(source, options(tmp_path, server)).code == 1
    (archives_folder / names[1]).write_bytes(b"damaged meanwhile")
    server.requests.clear()
    server.files[f"/voxceleb/{names[3]}"] = last
    outcome = run(source, options(tmp_path, server, keep_archives=keep_archives))
    assert outcome.state == "done", outcome.detail
    assert sorted(name for name, _ in server.requests) == [f"/voxceleb/{names[1]}", f"/voxceleb/{names[3]}"]
    record = inventory.read_marker(tmp_path / "data/voxceleb")["items"][source.items[0].name]
    assert record["checked"] == [""] * 4, "ours is no published digest"
    left = [path.name for path in archives_folder.iterdir()]
    assert sorted(name for name in left if name in names) == (sorted(names) if keep_archives else [])
    (aside,) = (name for name in left if ".before_" in name)
    assert (archives_folder / aside).read_bytes() == b"damaged meanwhile", "what did not come by us stays"
    assert keep_archives or left == [aside], "the notes go with the archives"


def test_what_has_arrived_or_was_unpacked_needs_no_room_again(server: Loopback, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that sufficed for the first run suffices for the one that goes on."""
    source = several(server, 1, tmp_path)

    def stopped(file: Path, *places: Any) -> None:
        if ".unpacking" in str(file) and file.is_dir():  # all of it is unpacked, and moved now
            raise KeyboardInterrupt
        replace_file(file, *places)

    replace_file = os.replace
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(source, options(tmp_path, server))
    monkeypatch.undo()
    archive, staged = (next((tmp_path / "data/coco").glob(pattern)) for pattern in ("archives/*.zip", ".unpacking/*/*"))
    assert archive.stat().st_size > 200_000 and staged.stat().st_size == 200_000
    assert bytes_needed(open_job(source, options(tmp_path, server)), list(source.items)) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    outcome = acquire(source, options(tmp_path, server))
    assert outcome.state == "done", outcome.detail


def test_without_locks_the_user_is_told(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    source = several(server, 1, tmp_path)
    assert run(source, options(tmp_path / "locked", server)).state == "done"
    without = capsys.readouterr().out
    monkeypatch.setattr("trimodal.files.hold_lock", lambda *given, **more: None)
    assert run(source, options(tmp_path, server)).state == "done"
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(without.splitlines()), "once"
