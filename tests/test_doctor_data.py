"""What the doctor finds in data, files, disk and an earlier run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from datasets import load_data
from tests import shard_files, trees
from tests.data.test_data_faults import hanging
from tests.project import ROOT
from tests.refusals import assert_names, refused
from tests.test_doctor import PICTURES, WORDS, case_of, configured, opened, own_pictures, row
from trimodal import doctor
from trimodal.data import bad_samples, cache, probe
from trimodal.data.batches import pool
from trimodal.data.near import near_files
from trimodal.doctor import Case, Finding
from trimodal.memory.devices import Fit
from trimodal.training import resume, saving
from trimodal.training import run as run_module
from trimodal.training.run import Options
from trimodal.training.saving import Saver
from trimodal.training.signals import Interruption
from trimodal.training.stage import build_stage

# ---- data and disk -------------------------------------------------------------------------------------------------


def test_a_missing_set_comes_with_its_command_and_the_others_are_counted(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[synthetic, coco]")
    found = list(doctor.check_data(case))
    missing = row(found, "data: coco")
    assert missing.state == "fail" and f"{tmp_path}/data/coco" in missing.found
    assert f"python download_datasets.py --datasets coco --data-root {tmp_path}/data" in missing.advice
    assert_names(row(found, "data: synthetic").found.splitlines()[0], "train", "64 audio+text", "64 image+text", 256)
    assert case.config.data.datasets == ("synthetic",) and list(case.tasks) == ["words"]


def test_shards_are_counted_with_what_they_lack(tmp_path: Path) -> None:
    """A shard that was cut: its samples are counted, the member within which it ends is a broken file, and what stood
    behind it is told to be gone; so are pictures that the training split has as well."""
    pictures = {f"{n:02}.jpg": trees.noise(tmp_path / "of" / f"{n}.jpg", (64, 48), n).read_bytes() for n in range(20)}
    texts = {name.replace("jpg", "txt"): f"number {name}".encode() for name in pictures}
    path = shard_files.tar(tmp_path / "data" / "shards" / "train" / "0.tar", dict(sorted((pictures | texts).items())))
    with tarfile.open(path) as archive:
        cut = archive.getmember("15.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    shard_files.tar(tmp_path / "data" / "shards" / "test" / "0.tar", {"1.jpg": pictures["03.jpg"], "1.txt": b"again",
                                                                     "2.jpg": pictures["19.jpg"], "2.txt": b"new"})
    case = case_of(tmp_path, "data.datasets=[shards]", "data.max_bad_pct=50")
    counted = row(list(doctor.check_data(case)), "data: shards")
    assert counted.state == "warn" and counted.advice
    assert_names(counted.found.replace("\n", " "), "train", "13 image+text", "val", "test", "2 image+text", path,
                 "15.jpg")
    files = row(list(doctor.check_files(case)), "files: shards")
    assert files.state == "warn" and f"{path}: 15.jpg" in files.found
    load_data(case.trial)  # fills the cache
    assert case.data is not None
    filled = load_data(case.config)
    assert len(near_files(filled.splits["test"], filled.splits["train"], case.config)["image"]) == 1


def test_without_any_set_nothing_follows(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[coco, clotho]")
    assert [one.check for one in doctor.check_data(case)] == ["data: coco", "data: clotho"]
    assert case.data is None


def test_a_stage_without_samples_is_told(tmp_path: Path) -> None:
    both = {"name": "both", "share": 1, "tasks": [{"inputs": ["image", "audio"], "objectives": {"contrastive": 1.0}}]}
    case = case_of(tmp_path, stages=[WORDS, both])
    found = row(list(doctor.check_data(case)), "stage: both")
    assert found.state == "fail"
    assert_names(found.found, "stages.both", "synthetic")
    assert list(case.tasks) == ["words"]


def test_files_that_a_list_names_and_that_are_gone_are_told_here_and_not_on_the_screen(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    trees.audiocaps(tmp_path / "data")
    found = row(list(doctor.check_data(case_of(tmp_path, "data.datasets=[audiocaps]"))), "data: audiocaps")
    (told,) = [line for line in found.found.splitlines() if line.startswith("audiocaps train")]
    assert_names(told, 1, 8)
    assert found.state == "warn"
    assert "--datasets audiocaps" in found.advice and capfd.readouterr().err == "" and not caplog.records


def own_list(folder: Path, lines: list[dict[str, str]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "own.jsonl").write_text("\n".join(json.dumps({"split": "train", **line}) for line in lines), "utf-8")
    return f"data.manifest={json.dumps(str(folder / 'own.jsonl'))}"


@pytest.mark.parametrize(("gone", "state"), [(0, "ok"), (1, "warn"), (3, "fail")])
def test_files_of_an_own_list_that_are_gone_are_told_as_a_run_takes_them(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], gone: int, state: str) -> None:
    listed = own_pictures(tmp_path / "own", 40, 0)
    for i in range(gone):
        (tmp_path / "own" / f"{7 * i}.png").unlink()
    case = case_of(tmp_path, "data.datasets=[manifest]", listed)
    *failed, found = [one for one in doctor.check_data(case) if one.check == "data: manifest"]
    assert ("fail" if failed else found.state) == state and capfd.readouterr().err == ""
    if gone:
        assert_names(found.found.splitlines()[-1], f"{gone} of 40", "line 1", str(tmp_path / "own" / "0.png"))
    assert all("data.max_bad_pct" in one.found + one.advice for one in failed)


def test_what_was_understood_of_an_own_list_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Lines of one file, names of columns and of files, captions that are cut, unknown or none."""
    trees.picture(tmp_path / "own" / "a.png")
    trees.picture(tmp_path / "own" / "b.png")
    (tmp_path / "own" / "c.png").symlink_to("a.png")
    captions = ["nan", "狗" * 20, "a b"]
    lines = [{"file_name": f"{name}.png", "caption": text} for name in "ab" for text in captions]
    lines += [{"file_name": ".\\c.png", "caption": "x"}, {"file_name": "b.png", "wav": "s.wav", "caption": "y"}]
    trees.sound(tmp_path / "own" / "s.wav", trees.tone(0.1))
    found = list(doctor.check_data(case_of(tmp_path, "data.datasets=[manifest]", own_list(tmp_path / "own", lines))))
    told = [line for line in row(found, "data: manifest").found.splitlines() if line.startswith("manifest")]
    for line, named in zip(told, [("'file_name' as image", "'caption' as text"), ("1 file", "backslashes"),
                                  ("7 lines", "2 files")], strict=True):
        assert_names(line, "manifest", *named)
    captions_row = row(found, "data: captions")
    assert captions_row.state == "warn" and len(captions_row.found.splitlines()) == 4
    assert_names(captions_row.found.splitlines()[-1], "train", 2, "image")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("bad", "state"), [(0, "ok"), (1, "warn"), (5, "fail")])
def test_broken_pictures_are_named(tmp_path: Path, bad: int, state: str) -> None:
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 30, bad, val=1))
    list(doctor.check_data(case))
    (found,) = doctor.check_files(case)
    assert found.state == state
    read = 29 + bad
    assert_names(found.found.splitlines()[0], "train", read, *([bad] if bad else []))
    named = [i for i in range(30, 30 + bad) if f"{tmp_path}/{i}.png" in found.found]
    assert len(named) == min(bad, probe.NAMED)
    if bad > probe.NAMED:
        assert_names(found.found.splitlines()[-1], bad - probe.NAMED)
    assert ("data.max_bad_pct" in found.advice) == (state == "fail")


def with_broken_validation(folder: Path) -> list[str]:
    """One of 41 pictures is broken: 2 % of all, and half of those to validate on."""
    override = own_pictures(folder, 41, 0, val=2)
    trees.truncate(folder / "0.png")
    return ["data.datasets=[manifest]", override]


def test_each_split_is_judged_by_itself_as_a_run_does(tmp_path: Path) -> None:
    case = case_of(tmp_path, *with_broken_validation(tmp_path))
    list(doctor.check_data(case))
    (found,) = doctor.check_files(case)
    assert found.state == "fail"
    assert_names(next(line for line in found.found.splitlines() if " val " in line), 2, 1)
    with refused("data.max_bad_pct=5", 1, 2):
        load_data(case.config)


@pytest.mark.parametrize(("peaks", "loud"), [((0.5, 1.9), 0), ((0.5, 16_400, 3), 2)])
def test_sounds_far_louder_than_full_scale_are_told(
        tmp_path: Path, peaks: tuple[float, ...], loud: int) -> None:
    for number, peak in enumerate(peaks):
        soundfile.write(tmp_path / f"{number}.wav", 4 * peak * trees.tone(), 16_000, subtype="FLOAT")
    trees.sound(tmp_path / "integers.wav", trees.tone())
    (tmp_path / "list.jsonl").write_text("".join(
        json.dumps({"audio": path.name, "text": "a tone", "split": "train"}) + "\n" for path in tmp_path.glob("*.wav")))
    case = case_of(tmp_path, "data.datasets=[manifest]", f"data.manifest={tmp_path}/list.jsonl")
    list(doctor.check_data(case))
    (found,) = doctor.check_files(case)
    assert found.state == ("warn" if loud else "ok") and bool(found.advice) == bool(loud)
    told = [line for line in found.found.splitlines() if "peak" in line]
    assert len(told) == bool(loud)
    if loud:
        assert_names(told[0], loud)
        assert f"{tmp_path}/1.wav (peak 16,400)" in told[0] or f"{tmp_path}/2.wav (peak 3)" in told[0]


@pytest.mark.timed
def test_a_file_that_hangs_costs_that_file(tmp_path: Path) -> None:
    case = opened(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 30, 0, val=1), "data.timeout_s=2",
                  "data.max_bad_pct=50", "data.cache=false", stages=[PICTURES])
    assert case.data is not None
    split = case.data.splits["train"]
    path = split.table.images[int(np.random.default_rng(0).permutation(pool(split.table, ("image",)))[0])]
    with hanging(Path(path)):
        (found,) = doctor.check_files(case)
        assert found.state == "warn"
        assert_names(next(line for line in found.found.splitlines() if path in line), "data.timeout_s=2")
        assert [one.state for one in doctor.check_steps(case)] == ["ok"], "here as well"
        reason = bad_samples.path_of(case.trial).read_text()
    assert path in reason and "data.timeout_s=2" in reason, "of its batch"


def test_the_cache_is_foretold_and_not_made(tmp_path: Path) -> None:
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 80, 0), "data.cache_max_gb=1")
    list(doctor.check_data(case))
    found = row(list(doctor.check_disk(case)), "disk: cache")
    assert found.state == "ok"
    assert_names(found.found, 80, cache.cache_folder(case.trial))
    assert not cache.cache_folder(case.config).exists()
    case.config = dataclasses.replace(case.config, data=dataclasses.replace(case.config.data, cache_max_gb=1e-6))
    found = row(list(doctor.check_disk(case)), "disk: cache")
    assert found.state == "warn" and "data.cache_max_gb" in found.advice


def test_an_output_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = case_of(tmp_path, f"paths.output_dir={tmp_path}/file/out")
    found = row(list(doctor.check_disk(case)), "output folder")
    assert found.state == "fail" and "--output-dir" in found.advice
    assert_names(found.found, f"{tmp_path}/file/out", "Not a directory")


def test_a_disk_without_room_for_the_checkpoints_fails(tmp_path: Path) -> None:
    case = case_of(tmp_path, "training.keep_checkpoints=1000000", "model.size=small")
    full = row(list(doctor.check_disk(case)), "disk: checkpoints")
    assert full.state == "fail" and "training.keep_checkpoints" in full.advice
    count, each, needed = saving.checkpoint_bytes(case.config)
    assert each > 1e8, "so that its figure says something"
    assert_names(full.found, count, f"{each / 1e9:.2f} GB", f"{needed / 1e9:.1f} GB")


def test_a_cache_that_cannot_be_written_is_told_and_not_counted_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = case_of(tmp_path, "data.datasets=[manifest]", own_pictures(tmp_path, 20, 0),
                   f"data.cache_dir={tmp_path}/file/cache")
    list(doctor.check_data(case))
    found = row(list(doctor.check_disk(case)), "disk: cache")
    assert found.state == "warn"
    assert_names(found.found, f"{tmp_path}/file/cache", "Not a directory")


# ---- an earlier run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "state"), [
    (Options("cpu"), "fail"), (Options("cpu", overwrite=True), "ok"), (Options("cpu", "auto"), "ok")])
def test_an_earlier_run_is_refused_where_a_run_refuses_it(tmp_path: Path, options: Options, state: str) -> None:
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "metrics.jsonl").write_text("{}\n")
    case = case_of(tmp_path, options=options)
    used = row(list(doctor.check_disk(case)), "output folder")
    assert used.state == state and ("--overwrite" in used.advice) == (state == "fail")
    assert_names(used.found, tmp_path / "out", *(["logs/metrics.jsonl"] if state == "fail" else []))
    (tmp_path / "out" / "logs" / "metrics.jsonl").unlink()
    fresh = row(list(doctor.check_disk(case)), "output folder")
    assert fresh.state == "ok" and (fresh.found != used.found) == (state == "fail" or options.overwrite), "it is told"


HOLDER = """
import pathlib, sys
from trimodal import files
lock = files.hold_lock(pathlib.Path(sys.argv[1]))
assert lock
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / run_module.LOCK
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    case = case_of(tmp_path, options=Options("cpu", overwrite=True))
    found = row(list(doctor.check_disk(case)), "output folder")
    assert found.state == "fail"
    assert_names(found.found, tmp_path / "out")
    holder.communicate()
    assert row(list(doctor.check_disk(case)), "output folder").state == "ok"


def test_a_bad_checkpoint_is_a_row_and_the_disk_is_looked_at(tmp_path: Path) -> None:
    case = case_of(tmp_path, options=Options("cpu", str(tmp_path / "gone.pt")))
    (found,) = doctor.guarded("resume", doctor.check_resume, case)
    assert found.state == "fail" and "gone.pt" in found.found and case.state is None
    list(doctor.check_data(case))
    assert {"output folder", "disk: checkpoints", "disk: cache"} == {one.check for one in doctor.check_disk(case)}


def test_nothing_to_resume_is_a_fresh_start(tmp_path: Path) -> None:
    case = case_of(tmp_path, options=Options("cpu", "auto"))
    assert [one.state for one in doctor.check_resume(case)] == ["ok"] and case.state is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within the first of two stages."""
    folder = tmp_path_factory.mktemp("trained")
    run = run_module.open_run(configured(folder, stages=[WORDS, PICTURES]), Options("cpu"), None)
    towers = ("image", "audio", "text", "fusion")
    run.fits = {name: Fit(dict.fromkeys(towers, 8), dict.fromkeys(towers, 0)) for name in ("words", "pictures")}
    stage = build_stage(run, run.config.stages[0], list(run.config.stages[0].tasks), 1)
    run.progress.epoch_step = 1
    with torch.no_grad():
        run.model.text.words.weight.fill_(0.125)
    Saver(run, {"words": 2, "pictures": 1}, Interruption()).save("words", stage.state_dict)
    run.tracker.close()
    (path,) = (folder / "out" / "checkpoints").glob("checkpoint_epoch_*.pt")
    return path


def resumed(folder: Path, checkpoint: Path, *overrides: str, words: Any = WORDS) -> tuple[Case, list[Finding]]:
    case = case_of(folder, *overrides, stages=[words, PICTURES], options=Options("cpu", str(checkpoint)))
    looks = (doctor.check_device, doctor.check_resume, doctor.check_data, doctor.check_memory)
    return case, [found for look in looks for found in doctor.guarded(look.__name__, look, case)]


def test_a_run_that_goes_on_is_tried_with_what_its_checkpoint_holds(tmp_path: Path, trained: Path) -> None:
    case, found = resumed(tmp_path, trained)
    assert_names(row(found, "resume").found, 0, 3, "words")
    assert case.run is not None and bool((case.run.model.text.words.weight == 0.125).all())
    assert [one.state for one in doctor.check_steps(case)] == ["ok", "ok"]


def test_before_a_download_a_start_is_tried_and_leaves_the_folder_free(tmp_path: Path, trained: Path) -> None:
    case = case_of(tmp_path, stages=[WORDS, PICTURES], options=Options("cpu", str(trained)))
    resume.check_start(case.config, case.options)
    folder = Path(case.config.paths.output_dir)
    assert os.listdir(folder) == [run_module.LOCK] and run_module.claim_folder(folder, case.options)
    gone = trained.with_name("best_model.pt")
    with refused("--resume", gone):
        resume.check_start(case.config, Options("cpu", str(gone)))


def test_a_checkpoint_of_another_model_fails(tmp_path: Path, trained: Path) -> None:
    case, found = resumed(tmp_path, trained, "model.size=tiny")
    bad = row(found, "check_memory")
    assert bad.state == "fail" and "text" in bad.found and case.run is None


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_not_free_is_told(tmp_path: Path) -> None:
    found = row(list(doctor.check_device(case_of(tmp_path, "memory.budget_gb=100000"))), "device memory")
    assert found.state == "warn"
    assert_names(found.found, 100000)
    (advised,) = re.findall(r"memory\.budget_gb=([\d.]+)", found.advice)
    assert float(advised) < 100000


