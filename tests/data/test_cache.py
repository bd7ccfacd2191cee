"""The cache gives what live decoding gives, survives every interruption, and never grows past its bounds."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import trees
from tests.refusals import assert_names, refused
from trimodal.config import Config, load_config
from trimodal.data import cache as cache_module
from trimodal.data import codecs
from trimodal.data import store as store_module
from trimodal.data.cache import cache_side
from trimodal.data.codecs import Kind
from trimodal.data.samples import BrokenSample, Sample, SampleTable
from trimodal.data.store import Store, entries_to_make, open_store
from trimodal.errors import UserError


@pytest.fixture(autouse=True)
def _a_small_disk_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE_GB", 0.0)


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, ["model.image_size=32", f"paths.data_root={folder}/data", "data.workers=0",
                              f"paths.output_dir={folder}/outputs", *overrides])


def files(folder: Path, number: int = 6) -> SampleTable:
    """`number` pictures of different sizes and as many sounds of different lengths; the last of each lies twice."""
    root, rows = folder / "data" / "set", []
    for i in range(number):
        picture = trees.noise(root / f"{i}.png", (50 + 7 * i % 60, 90 - 5 * i % 60), i)
        sound = trees.sound(root / f"{i}.wav", trees.tone(0.3 + 0.1 * (i % 6), hz=50 * i + 99))
        rows += [sample(f"image {i}", image=picture), sample(f"sound {i}", audio=sound)]
    rows.append(sample("again", image=Path(rows[-2].image), audio=Path(rows[-1].audio)))
    rows.append(sample("stretch", audio=Path(rows[-2].audio), start_s=0.1, duration_s=0.2))
    rows.append(Sample(key="drawn", source="set", split="train", image="synthetic:3"))
    return SampleTable.pack(rows)


def sample(key: str, image: Path | str = "", audio: Path | str = "", source: str = "set", **more: float) -> Sample:
    return Sample(key=key, source=source, split="train", image=str(image), audio=str(audio), **more)  # type: ignore[arg-type]


def assert_same(one: Store, other: Store) -> None:
    for row in range(len(one.table)):
        if one.table.has_image[row]:
            a, b = one.image(row), other.image(row)
            assert a.dtype == b.dtype == np.uint8 and np.array_equal(a, b)
        if one.table.has_audio[row]:
            a, b = one.mel(row), other.mel(row)
            assert a.dtype == b.dtype == np.float16 and np.array_equal(a, b)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data" / "cache").glob("*") if path.name != cache_module.LOCK)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gives_what_live_decoding_gives(tmp_path: Path, workers: int) -> None:
    table = files(tmp_path, 2 * cache_module.CHUNK + 1 if workers else 6)  # several jobs of several files
    cached = open_store(table, configured(tmp_path, f"data.workers={workers}"))
    live = open_store(table, configured(tmp_path, "data.cache=false"))
    assert len(cached.entries) == 2 and not live.entries
    assert_same(cached, live)
    assert cached.image(0).shape == (67, 37, 3) and cache_side(32) == 37
    assert len(cached.mel(1)) == 30 and cached.mel(len(table) - 2).shape == (20, 80)
    assert cached.image(len(table) - 1).shape == (32, 32, 3)


def test_a_second_run_decodes_nothing_and_a_changed_file_or_setting_everything(tmp_path: Path) -> None:
    table, config = files(tmp_path), configured(tmp_path)
    first = open_store(table, config)
    names = entries(tmp_path)
    times = [(tmp_path / "data" / "cache" / name / "data.bin").stat().st_mtime_ns for name in names]
    again = open_store(table, config)
    assert_same(first, again)
    assert entries(tmp_path) == names and len(names) == 2
    assert [(tmp_path / "data" / "cache" / n / "data.bin").stat().st_mtime_ns for n in names] == times
    open_store(table, configured(tmp_path, "model.image_size=48"))
    assert len(entries(tmp_path)) == 3  # sounds do not depend on the size of pictures
    path = Path(table.audio[1])
    trees.sound(path, trees.tone(0.7))
    changed = open_store(table, config)
    assert len(changed.mel(1)) == 70 and len(entries(tmp_path)) == 4


def test_a_moved_data_root_is_found_again(tmp_path: Path) -> None:
    table = files(tmp_path)
    open_store(table, configured(tmp_path))
    names = entries(tmp_path)
    (tmp_path / "there").mkdir()
    os.rename(tmp_path / "data", tmp_path / "there" / "data")
    moved = SampleTable.pack(sample(s.key, s.image.replace(f"{tmp_path}/", f"{tmp_path}/there/"),
                                    s.audio.replace(f"{tmp_path}/", f"{tmp_path}/there/"), start_s=s.start_s,
                                    duration_s=s.duration_s) for s in (table[i] for i in range(len(table))))
    open_store(moved, configured(tmp_path / "there"))
    assert entries(tmp_path / "there") == names


def test_equal_files_are_decoded_once(tmp_path: Path) -> None:
    path = trees.picture(tmp_path / "data" / "a.png")
    store = open_store(SampleTable.pack(sample(str(i), image=path) for i in range(5)), configured(tmp_path))
    assert len(store.entries[0].offsets) == 2
    assert np.array_equal(store.image(0), store.image(4))


def broken_files(folder: Path, good: int) -> SampleTable:
    root = folder / "data" / "set"
    rows = [sample(f"good {i}", image=trees.picture(root / f"good{i}.png")) for i in range(good)]
    bad = trees.truncate(trees.picture(root / "bad.png", size=(200, 200)))
    rows += [sample("truncated", image=bad), sample("missing", image=root / "missing.png")]
    rows += [sample(f"sound {i}", audio=trees.sound(root / f"{i}.wav", trees.tone())) for i in range(good)]
    return SampleTable.pack([*rows, sample("silent", audio=trees.sound(root / "s.wav", np.zeros(800, np.float32)))])


@pytest.mark.parametrize("cache", ["true", "false"])
def test_broken_files_cost_one_sample_each(tmp_path: Path, cache: str) -> None:
    table = broken_files(tmp_path, 4)
    store = open_store(table, configured(tmp_path, f"data.cache={cache}", "data.max_bad_pct=50"))
    assert store.image(0).shape[2] == 3 and len(store.mel(6)) == 100
    for row in (4, 5):
        with refused(table.images[row], error=BrokenSample):
            store.image(row)
    with refused(table.audio[10], error=BrokenSample):
        store.mel(10)


def test_broken_files_are_listed_once(tmp_path: Path) -> None:
    config = configured(tmp_path, "data.max_bad_pct=50")
    for _ in range(2):
        open_store(broken_files(tmp_path, 4), config)
    lines = [json.loads(line) for line in (tmp_path / "outputs/logs/bad_samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["set/truncated", "set/missing", "set/silent"]
    assert all(line["split"] == "train" and line["reason"] for line in lines)


def test_too_many_broken_files_are_an_error_with_the_count_and_a_file(tmp_path: Path) -> None:
    table = broken_files(tmp_path, 4)
    with refused("set-train-images", 2, 6, "data.max_bad_pct=33", table.images[4], "bad_samples.jsonl"):
        open_store(table, configured(tmp_path, "data.max_bad_pct=33"))
    open_store(broken_files(tmp_path, 4), configured(tmp_path, "data.max_bad_pct=34"))


def assert_not_kept(printed: str, *named: str) -> None:
    """A line says which entry there is no room for, and what else it names."""
    [line] = [line for line in printed.splitlines() if "set-train-image" in line]
    assert_names(line, "set-train-image", *named)


def almost_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has a thousand bytes more than those that stay free."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_module, "RESERVE_GB", 2.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 2 * 10**9 + 1000))


@pytest.mark.parametrize("bound", ["growth", "disk"])
def test_without_room_files_are_decoded_live_and_the_reason_is_printed(
        tmp_path: Path, bound: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path)
    config = configured(tmp_path, f"data.cache_max_gb={60 if bound == 'disk' else 1e-5}")
    if bound == "disk":
        almost_full(monkeypatch)
    assert [size for _, size in entries_to_make(table, config).values()] == [0, 0], "of a few files none is foretold"
    store = open_store(table, config)
    assert not store.entries and entries(tmp_path) == []
    limits = ["data.cache_max_gb=60", "2 GB"] if bound == "disk" else ["data.cache_max_gb=1e-05"]
    assert_not_kept(capsys.readouterr().out, *limits)
    assert_same(store, open_store(table, configured(tmp_path, "data.cache=false")))


@pytest.mark.parametrize("bound", ["growth", "disk"])
def test_of_many_files_a_few_foretell_that_there_is_no_room(
        tmp_path: Path, bound: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [trees.noise(tmp_path / "data" / f"{i}.png", (9, 9)) for i in range(cache_module.FEW + 1)]
    table = SampleTable.pack(sample(str(i), image=path) for i, path in enumerate(paths))
    decoded, decode = [], cache_module.decode

    def counted(*given: Any) -> np.ndarray:
        decoded.append(given)
        return decode(*given)

    monkeypatch.setattr(cache_module, "decode", counted)
    config = configured(tmp_path, f"data.cache_max_gb={60 if bound == 'disk' else 1e-5}")
    each = len(codecs.encode("image", decode("image", (str(paths[0]), 0.0, 0.0), 9)))
    assert entries_to_make(table, config) == {"set-train-image": (len(paths), each * len(paths))}
    decoded.clear()
    with monkeypatch.context() as patch:
        if bound == "disk":
            almost_full(patch)
        assert not open_store(table, config).entries and len(decoded) == cache_module.PROBES
    assert_not_kept(capsys.readouterr().out)
    assert open_store(table, configured(tmp_path)).entries


def test_the_bound_counts_what_the_cache_holds_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path)
    open_store(table, configured(tmp_path))
    used_gb = sum(p.stat().st_size for p in (tmp_path / "data/cache").rglob("*") if p.is_file()) / 1e9
    config = configured(tmp_path, "model.image_size=48", f"data.cache_max_gb={1.2 * used_gb}")
    assert len(open_store(table, config).entries) == 1  # the sounds of before
    assert_not_kept(capsys.readouterr().out)


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(files(tmp_path), configured(tmp_path, f"data.cache_dir={tmp_path}/file/cache"))
    assert not store.entries
    assert_not_kept(capsys.readouterr().out, f"{tmp_path}/file/cache")


def test_a_damaged_entry_names_its_folder(tmp_path: Path) -> None:
    table, config = files(tmp_path), configured(tmp_path)
    store = open_store(table, config)
    trees.truncate(store.entries[0].folder / "data.bin")
    with refused(store.entries[0].folder):
        open_store(table, config)


FORK: Any = multiprocessing.get_context("fork")


def test_other_processes_read_the_same_and_a_store_pickles_small(tmp_path: Path) -> None:
    store = open_store(files(tmp_path), configured(tmp_path))
    expected = store.image(2).copy(), store.mel(3).copy()  # maps the files before the other starts
    pickled = pickle.dumps(store)
    assert len(pickled) < 20_000 < sum(int(entry.offsets[-1]) for entry in store.entries)
    assert_same(pickle.loads(pickled), store)
    results = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: results.put((store.image(2).copy(), store.mel(3).copy())))
    process.start()
    assert all(np.array_equal(a, b) for a, b in zip(results.get(), expected, strict=True))
    process.join()


def fill(folder: Path, name: str) -> None:
    """In a process of its own: fill the cache in `folder`, and stop in the middle while `folder/hold` is there."""
    sys.stdout = (folder / f"{name}.out").open("w", encoding="utf-8")
    original = cache_module.decode

    def held(kind: Kind, item: cache_module.Item, side: int) -> np.ndarray:
        wait_for(lambda: not entries(folder) or not (folder / "hold").exists())
        return original(kind, item, side)

    cache_module.decode = held
    rows = SampleTable.pack(sample(str(i), image=folder / "data" / "set" / f"{i}.png") for i in range(MANY))
    open_store(rows, configured(folder, "data.workers=2"))


MANY = 3 * cache_module.CHUNK  # work for two processes


def filling(folder: Path, name: str) -> Any:
    process = FORK.Process(target=fill, args=(folder, name))
    process.start()
    return process


def children_of(parent: int) -> list[int]:
    """Living processes that `parent` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # ended meanwhile
        if int(ppid) == parent and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timed
def test_a_killed_run_leaves_no_entry_no_lock_and_no_process(tmp_path: Path) -> None:
    table = files(tmp_path, MANY)
    (tmp_path / "hold").touch()
    process = filling(tmp_path, "killed")
    wait_for(lambda: entries(tmp_path) and len(children_of(process.pid)) == 2)
    children = children_of(process.pid)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and [name.endswith(".tmp") for name in entries(tmp_path)] == [True]
    wait_for(lambda: not any(is_alive(child) for child in children))
    assert_same(open_store(table, configured(tmp_path)), open_store(table, configured(tmp_path, "data.cache=false")))
    assert len(entries(tmp_path)) == 2 and not any(name.endswith(".tmp") for name in entries(tmp_path))


@pytest.mark.timed
def test_two_runs_at_once_share_one_entry(tmp_path: Path) -> None:
    files(tmp_path, MANY)
    (tmp_path / "hold").touch()
    runs = [filling(tmp_path, "first")]
    wait_for(lambda: entries(tmp_path))
    runs.append(filling(tmp_path, "second"))

    def said(name: str) -> list[str]:
        return (tmp_path / f"{name}.out").read_text("utf-8").splitlines() if (tmp_path / f"{name}.out").exists() else []

    wait_for(lambda: said("second"))
    (tmp_path / "hold").unlink()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(entries(tmp_path)) == 1 and said("first") == []
    [waiting] = said("second")
    assert_names(waiting, tmp_path / "data" / "cache")


# ---- photographs, which do not come back bit by bit ------------------------------------------------------------------


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with photographs of 256 pixels: nothing is kept exactly."""
    monkeypatch.setattr(codecs, "EXACT_BYTES", 0)


def photographs(folder: Path) -> SampleTable:
    root = folder / "data" / "set"
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(root / f"{i}.png")
    return SampleTable.pack(sample(str(i), image=root / f"{i}.png") for i in range(3))


@pytest.mark.usefixtures("lossy")
def test_a_sample_is_the_same_whether_there_is_room_for_it_or_not(tmp_path: Path) -> None:
    table = photographs(tmp_path)
    full = open_store(table, configured(tmp_path, "data.cache_max_gb=0"))
    unfilled = open_store(table, configured(tmp_path), fill=())
    assert not full.entries and not unfilled.entries
    cached = open_store(table, configured(tmp_path))
    assert cached.entries
    assert_same(cached, full)
    assert_same(cached, unfilled)
    original = open_store(table, configured(tmp_path, "data.cache=false"))
    assert not np.array_equal(cached.image(0), original.image(0)), "only without a cache are files read as they are"


def test_exact_and_lossy_entries_never_stand_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, config = photographs(tmp_path), configured(tmp_path)
    exact = open_store(table, config).image(0)
    monkeypatch.setattr(codecs, "EXACT_BYTES", 0)
    assert not np.array_equal(open_store(table, config).image(0), exact) and len(entries(tmp_path)) == 2


def test_a_picture_that_is_damaged_in_an_entry_is_an_error_that_names_the_entry(tmp_path: Path) -> None:
    store = open_store(files(tmp_path), configured(tmp_path))
    folder = store.entries[0].folder
    (folder / "data.bin").write_bytes(bytes((folder / "data.bin").stat().st_size))
    with refused(folder, error=UserError):
        store.image(0)


def former_entry(table: SampleTable, config: Config) -> Path:
    """An entry of format 2, the last that held pixels themselves."""
    [(_, name, by_row), *_] = store_module._entries(table)
    folder = cache_module.cache_folder(config) / (f"{name}-0123456789abcdef")
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(bytes(3 * len(by_row)))
    np.savez(folder / "index.npz", offsets=np.arange(len(by_row) + 1) * 3, is_image=True,
             shapes=np.ones((len(by_row), 2), np.int32))
    (folder / "broken.json").write_text("{}")
    return folder


def test_an_entry_of_an_earlier_release_stays_and_is_named_once(tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    table, config = files(tmp_path), configured(tmp_path)
    former = former_entry(table, config)
    before = {path.name: path.read_bytes() for path in former.iterdir()}
    store = open_store(table, config)
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, former)
    assert_same(store, open_store(table, configured(tmp_path, "data.cache=false")))
    open_store(table, config)
    assert capsys.readouterr().out == ""
    assert {path.name: path.read_bytes() for path in former.iterdir()} == before


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
