"""The cache gives what live decoding gives, survives every interruption, and never grows past its bounds."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prepare
from config import Config, UserError, load_config
from prepare import BrokenSample, Store, cache_side, open_store
from samples import Sample, SampleTable
from tests import trees

ROOT = Path(__file__).resolve().parent.parent


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, ["model.image_size=32", f"paths.data_root={folder}/data", "data.workers=1",
                              f"paths.output_dir={folder}/outputs", *overrides])


def files(folder: Path, number: int = 6) -> SampleTable:
    """`number` pictures of different sizes and as many sounds of different lengths; the last of each lies twice."""
    root, rows = folder / "data" / "set", []
    for i in range(number):
        colour = (40 * i % 256, 255 - 30 * i % 256, 9 * i % 256)
        picture = trees.picture(root / f"{i}.png", colour, (50 + 7 * i % 60, 90 - 5 * i % 60))
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
    return sorted(path.name for path in (folder / "data" / "cache").glob("*") if path.name != prepare.LOCK)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_cache_gives_what_live_decoding_gives(tmp_path: Path, workers: int) -> None:
    table = files(tmp_path, 70 if workers == 2 else 6)  # more than FEW, so that processes are used
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
    for row, reason in ((4, "bad.png"), (5, "no such file")):
        with pytest.raises(BrokenSample, match=reason):
            store.image(row)
    with pytest.raises(BrokenSample, match="silent"):
        store.mel(10)


def test_broken_files_are_listed_once(tmp_path: Path) -> None:
    config = configured(tmp_path, "data.max_bad_pct=50")
    for _ in range(2):
        open_store(broken_files(tmp_path, 4), config)
    lines = [json.loads(line) for line in (tmp_path / "outputs/logs/bad_samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["set/truncated", "set/missing", "set/silent"]
    assert all(line["split"] == "train" and line["reason"] for line in lines)


def test_too_many_broken_files_are_an_error_with_the_count_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set-train-images: 2 of 6 cannot.*max_bad_pct=33 .*bad_samples\.jsonl"):
        open_store(broken_files(tmp_path, 4), configured(tmp_path, "data.max_bad_pct=33"))
    open_store(broken_files(tmp_path, 4), configured(tmp_path, "data.max_bad_pct=34"))


@pytest.mark.parametrize("bound", ["cache_max_gb", "disk", "growth"])
def test_without_room_files_are_decoded_live_and_the_reason_is_printed(
        tmp_path: Path, bound: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path, 70)
    live = open_store(table, configured(tmp_path, "data.cache=false"))
    config = configured(tmp_path, "data.cache_max_gb=60")
    if bound == "disk":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 2 * 10**9 + 1000))
    else:
        config = configured(tmp_path, "data.cache_max_gb=0.0001")
    written, write = [], prepare._write

    def counted(*arguments: Any) -> None:
        written.append(arguments)
        write(*arguments)
    monkeypatch.setattr(prepare, "_write", counted)
    if bound == "growth":  # the forecast is too low: found out while writing
        monkeypatch.setattr(prepare, "_predicted_bytes", lambda *a: 0.0)
    store = open_store(table, config)
    assert not store.entries and entries(tmp_path) == [] and bool(written) == (bound == "growth")
    assert "set-train-image is not kept" in capsys.readouterr().out
    assert_same(store, live)


def test_the_bound_counts_what_the_cache_holds_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = files(tmp_path, 70)
    open_store(table, configured(tmp_path))
    used_gb = sum(p.stat().st_size for p in (tmp_path / "data/cache").rglob("*") if p.is_file()) / 1e9
    config = configured(tmp_path, "model.image_size=48", f"data.cache_max_gb={1.2 * used_gb}")
    assert len(open_store(table, config).entries) == 1  # the sounds of before
    assert "set-train-image is not kept" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(files(tmp_path), configured(tmp_path, f"data.cache_dir={tmp_path}/file/cache"))
    assert not store.entries and "is not kept" in capsys.readouterr().out


def test_a_damaged_entry_names_its_folder(tmp_path: Path) -> None:
    table, config = files(tmp_path), configured(tmp_path)
    store = open_store(table, config)
    trees.truncate(store.entries[0].folder / "data.bin")
    with pytest.raises(UserError, match=f"{store.entries[0].folder}.*damaged; delete it"):
        open_store(table, config)


def _read(store: Store, row: int, results) -> None:
    results.put((store.image(row).copy(), store.mel(row + 1).copy()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_and_a_store_pickles_small(tmp_path: Path, method: str) -> None:
    store = open_store(files(tmp_path), configured(tmp_path))
    expected = store.image(2).copy(), store.mel(3).copy()  # maps the files before the others start
    assert len(pickle.dumps(store)) < 20_000 < sum(int(entry.offsets[-1]) for entry in store.entries)
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_read, args=(store, 2, results))
    process.start()
    found = results.get(timeout=60)
    process.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


FILL = """
import sys, time
from pathlib import Path
import prepare
from samples import SampleTable
from tests.test_prepare import configured, entries, sample
folder = Path(sys.argv[1])
original = prepare.decode
def held(kind, item, side):
    while entries(folder) and (folder / "hold").exists():
        time.sleep(0.01)
    return original(kind, item, side)
prepare.decode = held
rows = SampleTable.pack(sample(str(i), image=folder / "data" / "set" / f"{i}.png") for i in range(80))
prepare.open_store(rows, configured(folder, "data.workers=2"))
"""


def filling(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """A process that fills the cache in `folder`, and stops in the middle of it while `folder/hold` is there."""
    with (folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", FILL, str(folder)], cwd=ROOT, stdout=out)


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


def test_a_killed_run_leaves_no_entry_no_lock_and_no_process(tmp_path: Path) -> None:
    table = files(tmp_path, 80)
    (tmp_path / "hold").touch()
    process = filling(tmp_path, "killed")
    wait_for(lambda: entries(tmp_path) and len(children_of(process.pid)) == 2)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name.endswith(".tmp") for name in entries(tmp_path)] == [True]
    wait_for(lambda: not any(is_alive(child) for child in children))
    assert_same(open_store(table, configured(tmp_path)), open_store(table, configured(tmp_path, "data.cache=false")))
    assert len(entries(tmp_path)) == 2 and not any(name.endswith(".tmp") for name in entries(tmp_path))


def test_two_runs_at_once_share_one_entry(tmp_path: Path) -> None:
    files(tmp_path, 80)
    (tmp_path / "hold").touch()
    runs = [filling(tmp_path, name) for name in ("first", "second")]

    def said() -> str:
        return "".join((tmp_path / f"{name}.out").read_text("utf-8") for name in ("first", "second"))

    wait_for(lambda: "waiting for another process" in said())
    (tmp_path / "hold").unlink()
    assert [run.wait(300) for run in runs] == [0, 0]
    assert said().count("waiting for another process") == 1 and "is not kept" not in said()
    assert len(entries(tmp_path)) == 1


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
