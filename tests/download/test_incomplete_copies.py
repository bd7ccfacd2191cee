"""Copies that lack something, have moved, or stand where a set belongs: what is done is said, and nothing is lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import miniature, trees
from tests.download.test_known_trees import (
    Made,
    Run,
    aac_audiocaps,
    aac_clotho,
    nested,
    samples,
    speechbrain,
    state_of,
    trainer,
    unpacked,
)
from tests.loopback import Loopback
from tests.refusals import assert_names
from trimodal.download.state import write_marker
from trimodal.sets import inventory
from trimodal.sets.base import Source


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def made(tmp_path: Path, server: Loopback, name: str) -> Run:
    """A miniature set in the folder `true`, a copy of it in `own`, and the command, whose server has nothing."""
    makers = {"coco": miniature.coco, "clotho": miniature.clotho, "audiocaps": miniature.audiocaps,
              "voxceleb": miniature.voxceleb}
    source, served = makers[name](tmp_path / "true")
    shutil.copytree(tmp_path / "true" / name, tmp_path / "own")
    return Run(Made(name, tmp_path / "true" / name, source, served), server, tmp_path)


def looked_at(run: Run, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*words, "--status", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    return dict(found)


# --- Folders of pictures and recordings ------------------------------------------------------------------------------


def test_a_folder_with_too_few_files_is_told_and_fetched(tmp_path: Path, server: Loopback,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    for image_id in trees.COCO_TRAIN[::3]:
        (own / f"train2017/{image_id:012d}.jpg").unlink()
    left = len(list((own / "train2017").iterdir()))
    run.serve("train2017.zip")
    before = state_of(own)
    found = looked_at(run, capsys, "--local", str(own))
    assert found["bytes_to_fetch"] == len(run.made.served["train2017.zip"])
    (sentence,) = found["left_out"]
    assert_names(sentence, own / "train2017", left, len(trees.COCO_TRAIN) + 1)
    assert run("--local", str(own)) == 0
    assert run.asked_for() == ["train2017.zip"] and state_of(own) == before
    assert not (run.root / "coco/train2017").is_symlink() and (run.root / "coco/val2017").is_symlink()
    assert samples(run.root, "coco") == samples(tmp_path / "true", "coco")


def test_nearly_all_of_a_folder_is_linked_and_told(tmp_path: Path, server: Loopback,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    (own / f"train2017/{trees.COCO_TRAIN[0]:012d}.jpg").unlink()
    before = state_of(own)
    assert run("--local", str(own)) == 3
    assert_names(capsys.readouterr().out.splitlines()[-1], "train2017", 40, 41)
    assert (run.root / "coco/train2017").is_symlink() and run.asked_for() == [] and state_of(own) == before


@pytest.mark.parametrize("damage", ["empty", "small"])
def test_pictures_of_another_edition_are_not_linked(tmp_path: Path, server: Loopback, damage: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    for path in (own / "val2017").iterdir():
        path.write_bytes(b"" if damage == "empty" else b"x")
    found = looked_at(run, capsys, "--local", str(own))
    assert found["bytes_to_fetch"] == len(run.made.served["val2017.zip"])
    assert len(found["left_out"]) == (damage == "small")


def test_the_folder_of_the_pictures_itself_may_be_named(tmp_path: Path, server: Loopback,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, server, "coco")
    found = looked_at(run, capsys, "--local", str(tmp_path / "own/train2017"))
    states = {part["name"]: part["state"] for part in found["parts"]}
    assert states.pop("train2017.zip") == "in --local" and set(states.values()) == {"missing"}


@pytest.mark.parametrize("link", [False, True])
def test_what_stands_where_a_link_belongs_stays(tmp_path: Path, server: Loopback, link: bool,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    place = run.root / "coco/val2017"
    shutil.copytree(own / "val2017", tmp_path / "mine" if link else place)
    if link:
        place.parent.mkdir(parents=True)
        place.symlink_to(tmp_path / "mine", target_is_directory=True)
    assert run("--local", str(own)) == 0
    assert_names(next(line for line in capsys.readouterr().out.splitlines() if "not linked" in line), place)
    assert place.is_symlink() == link and place.resolve() == (tmp_path / "mine" if link else place)
    assert samples(run.root, "coco") == samples(tmp_path / "true", "coco") and run.asked_for() == []


def test_an_incomplete_folder_behind_a_link_is_named_before_anything_is_fetched(
        tmp_path: Path, server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    for path in sorted((own / "train2017").iterdir())[1:]:
        path.unlink()
    run.serve(*run.made.served)
    (run.root / "coco").mkdir(parents=True)
    (run.root / "coco/train2017").symlink_to(own / "train2017", target_is_directory=True)
    before = state_of(own)
    assert run() == 2
    assert_names(capsys.readouterr().err.splitlines()[-1], run.root / "coco/train2017", "train2017.zip")
    assert run.asked_for() == [] and state_of(own) == before


def test_a_copy_that_has_moved_is_named_and_linked_anew(tmp_path: Path, server: Loopback,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "coco"), tmp_path / "own"
    assert run("--local", str(own)) == 0
    moved = own.rename(tmp_path / "moved")
    run.serve(*run.made.served)
    for words in [], ["--skip-existing"]:
        capsys.readouterr()
        assert run(*words) == 2
        assert_names(capsys.readouterr().err.splitlines()[0], own / "annotations/captions_train2017.json", "--local")
    assert run.asked_for() == []
    assert run("--local", str(moved)) == 0
    assert samples(run.root, "coco") == samples(tmp_path / "true", "coco") and run.asked_for() == []


@pytest.mark.parametrize(("name", "tree", "code"), [("audiocaps", aac_audiocaps, 3), ("voxceleb", speechbrain, 0)])
def test_links_of_an_earlier_release_are_renewed_where_they_lead_nowhere(
        tmp_path: Path, server: Loopback, name: str, tree: Callable[[Path], Path], code: int) -> None:
    """It did not note where they lead."""
    run = made(tmp_path, server, name)
    if name == "voxceleb":
        (tmp_path / "own/voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    own = tree(tmp_path / "own")
    assert run("--local", str(own)) == code
    marker = inventory.read_marker(run.root / name)
    del marker["linked_from"], marker["licence_sha256"]
    write_marker(run.root / name, marker)
    assert run("--skip-existing") == code
    assert run("--local", str(own.rename(tmp_path / "moved"))) == code
    assert samples(run.root, name) == samples(tmp_path / "true", name)


@pytest.mark.parametrize(("name", "tree", "code"), [
    ("coco", unpacked, 0), ("coco", nested, 0), ("clotho", aac_clotho, 0), ("audiocaps", aac_audiocaps, 3),
    ("voxceleb", speechbrain, 0), ("voxceleb", trainer, 0)])
def test_the_folder_of_the_set_itself_may_be_named(tmp_path: Path, server: Loopback, name: str,
                                                   tree: Callable[[Path], Path], code: int) -> None:
    run = made(tmp_path, server, name)
    if name == "voxceleb":
        (tmp_path / "own/voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    run.root.mkdir()
    folder = tree(tmp_path / "own").rename(run.root / name)
    before = state_of(folder)
    for words in ["--local", str(folder)], ["--local", str(folder)], ["--skip-existing"], []:
        assert run(*words) == code
        after = state_of(folder)
        assert {place: after[place] for place in before} == before and run.asked_for() == []
        assert samples(run.root, name) == samples(tmp_path / "true", name)


def test_recordings_put_there_by_hand_are_taken_over(tmp_path: Path, server: Loopback,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Of VoxCeleb 1 both archives share one folder."""
    for name in ("clotho", "voxceleb"):
        run = made(tmp_path / name, server, name)
        (tmp_path / name / "own").rename((run.root / name).parent.parent / "hand")
        run.root.mkdir()
        (tmp_path / name / "hand").rename(run.root / name)
        lists = {item.name for item in run.made.source.items if item.kind == "plain"}
        found = looked_at(run, capsys)
        absent = {part["name"] for part in found["parts"] if part["state"] != "there"}
        assert absent == lists & run.made.served.keys() - {"vox2_meta.csv"}


# --- AudioCaps -------------------------------------------------------------------------------------------------------


def test_sounds_without_lists_say_where_the_lists_belong(tmp_path: Path, server: Loopback,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, server, "audiocaps")
    for folder in ("dataset", "dataset2.0"):
        shutil.rmtree(tmp_path / "own" / folder)
    before = state_of(tmp_path / "own")
    assert run("--local", str(tmp_path / "own")) == 2
    assert_names(capsys.readouterr().err.splitlines()[-1], tmp_path / "own", "dataset/train.csv", "dataset/val.csv",
                 "dataset/test.csv", run.root / "audiocaps")
    assert state_of(tmp_path / "own") == before


def test_a_list_that_nobody_has_is_asked_for_once(tmp_path: Path, server: Loopback) -> None:
    run = made(tmp_path, server, "audiocaps")
    own = aac_audiocaps(tmp_path / "own")
    (own / "AUDIOCAPS/csv_files_v2/train.csv").unlink()
    assert run("--local", str(own)) == 3
    assert [name for name, _ in server.requests] == ["/audiocaps/dataset2.0/train.csv"]
    assert samples(run.root, "audiocaps") == samples(tmp_path / "true", "audiocaps")


def test_a_list_that_the_user_changed_is_not_taken(tmp_path: Path, server: Loopback,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, server, "clotho")
    path = tmp_path / "own/clotho_captions_validation.csv"
    path.write_bytes(path.read_bytes() + b"\n")
    run.serve(path.name)
    before = state_of(tmp_path / "own")
    assert run("--local", str(tmp_path / "own")) == 0
    assert any(str(path) in line for line in capsys.readouterr().out.splitlines()), "it is told"
    assert run.asked_for() == [path.name] and state_of(tmp_path / "own") == before


# --- VoxCeleb --------------------------------------------------------------------------------------------------------


def test_speakers_that_are_left_out_are_counted_and_told(tmp_path: Path, server: Loopback,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "voxceleb"), tmp_path / "own"
    (own / "voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    speechbrain(own)
    for speaker, name in (("id00018", "1.opus"), ("id00019", "1.opus"), ("id10003", "1.m4a")):
        (own / "wav" / speaker / "video").mkdir(parents=True)
        (own / "wav" / speaker / "video" / name).write_bytes(b"x")
    second, first = looked_at(run, capsys, "--local", str(own))["left_out"]
    assert_names(second, 2, own / "wav/id00018")
    assert_names(first, 1, own / "wav/id10003")
    assert run("--local", str(own)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not linked" in line]
    assert len(told) == 2 and second in told[0] and first in told[1]


def test_shadows_of_macos_are_neither_counted_nor_verified(tmp_path: Path, server: Loopback,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    run, own = made(tmp_path, server, "voxceleb"), tmp_path / "own"
    (own / "voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    recordings = len(list(speechbrain(own).rglob("*.wav")))
    trees.with_shadows(own)
    assert run("--local", str(own)) == 0
    assert run("--verify") == 0
    assert "cannot be opened" not in capsys.readouterr().out
    parts = {part["name"]: part["files"] for part in looked_at(run, capsys)["parts"]}
    assert sum(parts[name] for name in ("vox1_dev_wav.zip", "vox1_test_wav.zip", "voxceleb2/dev/wav")) == recordings


def test_voxceleb_2_beside_1_is_counted_though_not_asked_for(tmp_path: Path, server: Loopback,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is its list to be had, which tells its test speakers: that is said."""
    run, own = made(tmp_path, server, "voxceleb"), tmp_path / "own"
    (own / "voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    items = tuple(item for item in run.made.source.items if not item.name.startswith("vox2") or item.kind == "plain")
    run.made = replace(run.made, source=replace(run.made.source, items=items, defaults=("vox1",)))
    speechbrain(own)
    (own / "meta/vox2_meta.csv").unlink()
    assert run("--local", str(own)) == 3
    told = capsys.readouterr().out.splitlines()[-1]
    assert_names(told, "voxceleb2/dev/wav", len(trees.VOX2_DEV) + len(trees.VOX2_TEST), "vox2_meta.csv")
    parts = {part["name"]: part["files"] for part in looked_at(run, capsys)["parts"]}
    assert parts["voxceleb2/dev/wav"] == len(trees.VOX2_DEV) + len(trees.VOX2_TEST)


def test_a_folder_that_cannot_be_read_is_told_and_passed_over(tmp_path: Path, server: Loopback,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """As lost+found on top of a disk."""
    run = made(tmp_path, server, "coco")
    (tmp_path / "own/lost+found").mkdir()
    scandir, listdir = os.scandir, os.listdir

    def open_only(path: Any) -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path

    monkeypatch.setattr(os, "scandir", lambda path=".": scandir(open_only(path)))
    monkeypatch.setattr(os, "listdir", lambda path=".": listdir(open_only(path)))
    found = looked_at(run, capsys, "--local", str(tmp_path / "own"))
    assert_names(found["left_out"][0], tmp_path / "own/lost+found")
    assert found["bytes_to_fetch"] == 0


def test_test_speakers_of_voxceleb_2_are_known_by_the_users_list(tmp_path: Path, server: Loopback) -> None:
    """In SpeechBrain's tree they lie among the others."""
    run, own = made(tmp_path, server, "voxceleb"), tmp_path / "own"
    (own / "voxceleb1/veri_test2.txt").write_bytes(run.made.served["veri_test2.txt"])
    run.made = replace(run.made, source=Source(**{**_fields(run.made.source), "defaults": ("vox1",)}))
    assert run("--local", str(speechbrain(own))) == 0
    assert {speaker for _, _, _, speaker, _, _ in samples(run.root, "voxceleb")["test"]} >= {"id00016", "id00017"}


def _fields(source: Source) -> dict[str, Any]:
    return {name: getattr(source, name) for name in source.__dataclass_fields__}
