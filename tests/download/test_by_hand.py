"""What somebody put into the folder of a set: sounds of AudioCaps in whatever form are not fetched a second time, and
nothing need be written where a copy is complete."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import miniature
from tests.download.test_known_trees import (
    Made,
    Run,
    aac_audiocaps,
    by_number,
    samples,
    state_of,
    unpacked,
    with_six_digits,
    with_thousandths,
)
from tests.loopback import Loopback
from tests.refusals import assert_names
from trimodal.download import acquire
from trimodal.sets import inventory

TREES = [aac_audiocaps, by_number, unpacked, with_six_digits, with_thousandths]


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def placed(tmp_path: Path, server: Loopback, tree: Callable[[Path], Path], linked: bool = False,
           most: bool = True) -> tuple[Run, Path]:
    """A copy in the form of `tree` at data/audiocaps, and the command; `most` of each split, or few of test."""
    source, served = miniature.audiocaps(tmp_path / "true", shards=True)
    if most:  # 2 of the 3 clips of test are there
        source = replace(source, partly=tuple(replace(count, number=min(count.number, 7) if count.folder == "train"
                                                      else 2) for count in source.partly))
    shutil.copytree(tmp_path / "true/audiocaps", tmp_path / "own")
    run = Run(Made("audiocaps", tmp_path / "true/audiocaps", source, served), server, tmp_path)
    folder = run.root / "audiocaps"
    run.root.mkdir()
    own = tree(tmp_path / "own")
    if linked:
        folder.symlink_to(own, target_is_directory=True)
    else:
        own.rename(folder)
    return run, folder


def looked_at(run: Run, capsys: pytest.CaptureFixture[str], look: str, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*words, look, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    return dict(found)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_they_are_used_where_they_are(tmp_path: Path, server: Loopback, tree: Callable[[Path], Path], linked: bool,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = placed(tmp_path, server, tree, linked)
    before = state_of(folder)
    for look in ("--status", "--dry-run"):
        assert looked_at(run, capsys, look)["bytes_to_fetch"] == 0
    assert state_of(folder) == before
    assert run("--skip-existing") in (0, 3)
    assert run.asked_for() == [] and samples(run.root, "audiocaps") == samples(tmp_path / "true", "audiocaps")
    after = state_of(folder)
    assert {place: after[place] for place in before} == before
    for words in [], ["--skip-existing"]:
        assert run(*words) in (0, 3)
        assert state_of(folder) == after and run.asked_for() == []
    assert looked_at(run, capsys, "--status")["bytes_to_fetch"] == 0


def test_of_a_split_with_few_clips_the_published_ones_are_fetched_and_it_is_told(
        tmp_path: Path, server: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = placed(tmp_path, server, aac_audiocaps, most=False)
    shard = "test-00000-of-00041.parquet"
    run.serve(shard)
    found = looked_at(run, capsys, "--dry-run")
    assert found["bytes_to_fetch"] == len(run.made.served[shard])
    (sentence,) = found["left_out"]
    assert_names(sentence, "test", 2, 3, f"--local {folder}")
    assert run() == 3
    assert sentence in capsys.readouterr().out and run.asked_for() == [shard]
    assert samples(run.root, "audiocaps") == samples(tmp_path / "true", "audiocaps")


def test_a_few_sounds_alone_are_told_and_all_is_fetched(tmp_path: Path, server: Loopback,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = placed(tmp_path, server, aac_audiocaps, most=False)
    for path in sorted(folder.rglob("*.*")):
        if path.suffix != ".csv" and path.stem != "gH7i8J9k0l1_8":
            path.unlink()
    run.serve(*run.made.served)
    assert_names(looked_at(run, capsys, "--status")["left_out"][0], "train", 1, 8, f"--local {folder}")
    assert run() == 3
    told = [line for line in capsys.readouterr().out.splitlines() if "not linked" in line]
    assert len(told) == 1 and f"--local {folder}" in told[0]
    assert len([name for name in run.asked_for() if name.endswith(".parquet")]) == 3


def test_lists_that_are_not_there_are_fetched_first(tmp_path: Path, server: Loopback,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Before that no look can tell what the sounds are, and says so."""
    run, folder = placed(tmp_path, server, with_thousandths)
    for name in ("dataset", "dataset2.0"):
        shutil.rmtree(folder / name)
    run.serve(*run.made.served)
    for words in [], ["--local", str(folder)]:
        for look in ("--status", "--dry-run"):
            assert_names(looked_at(run, capsys, look, *words)["left_out"][0], folder)
    assert run("--skip-existing") in (0, 3)
    assert "not linked" not in capsys.readouterr().out
    assert {name.rpartition(".")[2] for name in run.asked_for()} == {"csv"}
    assert samples(run.root, "audiocaps") == samples(tmp_path / "true", "audiocaps")


def test_what_came_by_shards_is_not_taken_for_them(tmp_path: Path, server: Loopback) -> None:
    """Also where a run was killed between the last rename and the marker."""
    run, folder = placed(tmp_path, server, unpacked)
    shutil.rmtree(folder)
    run.serve(*run.made.served)
    assert run("--splits", "train") == 3
    for marker in (True, False):
        if not marker:
            (folder / inventory.MARKER).unlink()
        server.requests.clear()
        assert run("--splits", "train", "val") == 3
        assert ("validation-00000-of-00020.parquet" in run.asked_for()) == marker
        assert not inventory.read_marker(folder)["linked"]


def test_no_link_is_made_behind_a_link_of_the_user(tmp_path: Path, server: Loopback) -> None:
    run, folder = placed(tmp_path, server, with_thousandths)
    (folder / "train").rename(tmp_path / "mine")
    (folder / "train").symlink_to(tmp_path / "mine", target_is_directory=True)
    before = state_of(tmp_path / "mine")
    assert run("--skip-existing") == 3 and run("--skip-existing") == 3
    assert state_of(tmp_path / "mine") == before and run.asked_for() == []
    assert samples(run.root, "audiocaps") == samples(tmp_path / "true", "audiocaps")


# --- Folders that cannot be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--skip-existing"]])
@pytest.mark.parametrize("name", ["coco", "clotho", "audiocaps", "voxceleb"])
def test_a_complete_copy_that_cannot_be_written_is_used(tmp_path: Path, server: Loopback, name: str, words: list[str],
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """A shared disk, linked as data/NAME."""
    run, _ = read_only(tmp_path, server, name, monkeypatch)
    before = state_of(tmp_path / "true")
    lists = name == "voxceleb" and not words  # of which no digest is published
    assert run(*words) == (2 if lists else 3 if name == "audiocaps" else 0), capsys.readouterr()
    assert state_of(tmp_path / "true") == before and run.asked_for() == []
    if not lists:
        assert samples(run.root, name) and "skipped" in capsys.readouterr().out


def test_a_copy_that_cannot_be_written_and_lacks_something_says_what_to_do(
        tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = read_only(tmp_path, server, "coco", monkeypatch)
    next((tmp_path / "true/coco/val2017").iterdir()).unlink()
    assert run("--skip-existing") == 2
    assert_names(capsys.readouterr().err.splitlines()[-1], folder, "val2017.zip",
                 f"--local {tmp_path / 'true/coco'}")
    assert run.asked_for() == []


def read_only(tmp_path: Path, server: Loopback, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    source, served = {"coco": miniature.coco, "clotho": miniature.clotho, "voxceleb": miniature.voxceleb,
                      "audiocaps": lambda folder: miniature.audiocaps(folder, shards=True)}[name](tmp_path / "true")
    source = replace(source, partly=tuple(replace(count, number=2) for count in source.partly))
    if name == "voxceleb":
        (tmp_path / "true/voxceleb/voxceleb1/veri_test2.txt").write_bytes(served["veri_test2.txt"])
        source = replace(source, items=tuple(replace(item, files=(replace(item.files[0], sha256=""),))
                                             if item.name == "iden_split.txt" else item for item in source.items))
    run = Run(Made(name, tmp_path / "true" / name, source, served), server, tmp_path)
    run.root.mkdir()
    (run.root / name).symlink_to(tmp_path / "true" / name, target_is_directory=True)

    def no(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(acquire, "check_writable", no)
    return run, run.root / name
