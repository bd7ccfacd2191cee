"""A filling of the cache that is killed goes on where it was, to the same bytes; nothing else is taken or deleted."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import trees
from tests.refusals import assert_names
from trimodal.config import Config, load_config
from trimodal.data import cache as cache_module
from trimodal.data.codecs import Kind
from trimodal.data.samples import Sample, SampleTable
from trimodal.data.store import open_store
from trimodal.files import bytes_below

FORK: Any = multiprocessing.get_context("fork")
NUMBER = 12
MADE = ("data.bin", "index.npz", "entry.json")


@pytest.fixture(autouse=True)
def _each_file_is_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE_GB", 0.0)
    monkeypatch.setattr(cache_module, "STRETCH_S", 0.0)


def configured(folder: Path, cache: str = "cache", *overrides: str) -> Config:
    return load_config(None, ["model.image_size=32", f"paths.data_root={folder}/data", "data.workers=0",
                              "data.max_bad_pct=50", f"data.cache_dir={folder}/{cache}",
                              f"paths.output_dir={folder}/outputs", *overrides])


def files(folder: Path, kind: str = "image") -> SampleTable:
    """Pictures or sounds of different sizes, the fourth of them damaged."""
    rows, root = [], folder / "data"
    for i in range(NUMBER):
        path = (trees.noise(root / f"{i}.png", (40 + 3 * i, 50 - i), i) if kind == "image" else
                trees.sound(root / f"{i}.wav", trees.tone(0.2 + i / 100)))
        rows.append(Sample(key=str(i), source="set", split="train", **{"image" if kind == "image" else "audio":
                                                                       str(path)}))  # type: ignore[arg-type]
    Path(rows[3].image or rows[3].audio).write_bytes(b"neither")
    return SampleTable.pack(rows)


def entry(folder: Path, cache: str = "cache") -> Path:
    [found] = [path for path in (folder / cache).iterdir() if path.name != cache_module.LOCK]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(table: SampleTable, config: Config, die: Callable[[], None]) -> None:
    """A filling in a process of its own, in which `die` has been called first to set the moment."""
    def fill() -> None:
        sys.stdout = open(os.devnull, "w")
        die()
        open_store(table, config)

    process = FORK.Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file(number: int) -> Callable[[], None]:
    """As the file of this number, counted from where the filling began, is decoded."""
    def arrange() -> None:
        seen, decode = [0], cache_module.decode

        def until(*given: Any) -> Any:
            seen[0] += 1
            return kill() if seen[0] > number else decode(*given)

        vars(cache_module)["decode"] = until

    return arrange


def at(module: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(module, name, kill)


def decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from now on."""
    seen, decode = list[str](), cache_module.decode

    def noted(kind: Kind, item: cache_module.Item, side: int) -> np.ndarray:
        seen.append(item[0])
        return decode(kind, item, side)

    monkeypatch.setattr(cache_module, "decode", noted)
    return seen


@pytest.mark.timed
@pytest.mark.parametrize("kind", ["image", "sound"])
def test_a_filling_killed_again_and_again_goes_on_to_the_same_bytes(
        tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path, kind)
    open_store(table, configured(tmp_path, "whole"))
    config = configured(tmp_path)
    moments = [at_file(0), at_file(2), at_file(3), at(cache_module, "_sync"), at_file(1), at(np, "savez"),
               at(json, "dump"), at(os, "rename")]
    for moment in moments:
        killed(table, config, moment)
        assert entry(tmp_path).name.endswith(".tmp"), "nothing half done is taken for an entry"
    seen = decoding(monkeypatch)
    capsys.readouterr()
    store = open_store(table, config)
    assert seen == [], "all files had been decoded by then"
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, f"set-train-{kind}", f"{NUMBER} of {NUMBER}")
    assert contents(entry(tmp_path)) == contents(entry(tmp_path, "whole"))
    assert contents(entry(tmp_path)).keys() == set(MADE) and store.entries[0].reasons.keys() == {3}


@pytest.mark.timed
def test_a_kill_loses_no_file_that_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path)
    killed(table, configured(tmp_path), at_file(cache_module.CHUNK))  # a chunk is handed over at once
    seen = decoding(monkeypatch)
    open_store(table, configured(tmp_path))
    assert len(seen) == NUMBER - cache_module.CHUNK
    assert_names(capsys.readouterr().out.splitlines()[0], f"{cache_module.CHUNK} of {NUMBER}")


@pytest.mark.timed
@pytest.mark.parametrize("damage", ["torn line", "wrong line", "wrong byte", "lost bytes", "no journal"])
def test_of_a_damaged_filling_only_what_is_whole_is_taken(tmp_path: Path, damage: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    table = files(tmp_path)
    open_store(table, configured(tmp_path, "whole"))
    killed(table, configured(tmp_path), at_file(cache_module.CHUNK))
    journal, data = entry(tmp_path) / cache_module.JOURNAL, entry(tmp_path) / "data.bin"
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == "torn line":
        journal.write_bytes(b"".join(lines)[:-5])
    elif damage == "wrong line":
        journal.write_bytes(b"".join([*lines[:4], b'{"sizes": [-1, 1e99]}\n', *lines[4:]]))
    elif damage == "wrong byte":
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    elif damage == "lost bytes":
        trees.truncate(data, 0.6)
    else:
        journal.unlink()
    seen = decoding(monkeypatch)
    open_store(table, configured(tmp_path))
    assert len(seen) > NUMBER - cache_module.CHUNK
    assert contents(entry(tmp_path)) == contents(entry(tmp_path, "whole"))


@pytest.mark.timed
def test_a_filling_of_other_files_or_settings_is_not_taken_and_its_space_comes_back(tmp_path: Path) -> None:
    table = files(tmp_path)
    killed(table, configured(tmp_path), at_file(cache_module.CHUNK))
    old = entry(tmp_path)
    other = configured(tmp_path, "cache", "model.image_size=16")
    store = open_store(table, other)
    live = open_store(table, configured(tmp_path, "cache", "model.image_size=16", "data.cache=false"))
    assert np.array_equal(store.image(0), live.image(0)) and not old.exists()
    assert not entry(tmp_path).name.endswith(".tmp")


@pytest.mark.timed
def test_the_filling_of_another_set_is_kept_while_there_is_room(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, sounds = files(tmp_path), files(tmp_path, "sound")
    killed(pictures, configured(tmp_path), at_file(cache_module.CHUNK))
    monkeypatch.setattr(cache_module, "FEW", NUMBER - 1)  # so that the size is foretold
    old = entry(tmp_path)
    size = bytes_below(old)
    open_store(sounds, configured(tmp_path))
    assert bytes_below(old) == size
    [made] = [path for path in (tmp_path / "cache").glob("set-*") if path != old]
    needed = 1.2 * bytes_below(made)
    shutil.rmtree(made)
    assert size > 0.2 * needed
    assert open_store(sounds, configured(tmp_path, "cache", f"data.cache_max_gb={needed / 1e9}")).entries
    assert not old.exists(), "where there is none, it makes room"


@pytest.mark.timed
def test_what_the_user_keeps_in_the_cache_stays(tmp_path: Path) -> None:
    table = files(tmp_path)
    killed(table, configured(tmp_path), at_file(cache_module.CHUNK))
    name = entry(tmp_path).name
    alike = tmp_path / "cache" / f"set-train-image-{'0' * 16}.tmp"
    alike.mkdir()
    (alike / "notes.txt").write_text("mine")
    (alike / "data.bin").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data.bin").write_text("mine")
    linked = tmp_path / "cache" / f"set-train-image-{'1' * 16}.tmp"
    linked.symlink_to(elsewhere)
    (tmp_path / "cache" / name / "mine.txt").write_text("mine")
    (tmp_path / "cache" / "picture.tmp").write_text("mine")
    open_store(table, configured(tmp_path, "cache", "model.image_size=16"))
    kept = [alike / "notes.txt", alike / "data.bin", elsewhere / "data.bin", linked / "data.bin",
            tmp_path / "cache" / name / "mine.txt", tmp_path / "cache" / "picture.tmp"]
    assert [path.read_text() for path in kept] == ["mine"] * len(kept)


def test_a_disk_that_fills_up_in_the_middle_gets_its_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    table, add, left = files(tmp_path), cache_module.PartialEntry.add, [5]

    def full(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.PartialEntry, "add", full)
        store = open_store(table, configured(tmp_path))
    assert not store.entries and [path.name for path in (tmp_path / "cache").iterdir()] == [cache_module.LOCK]
    assert_names(capsys.readouterr().out.splitlines()[-1], "set-train-image", os.strerror(errno.ENOSPC))
    assert open_store(table, configured(tmp_path)).entries
