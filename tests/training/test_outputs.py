"""Nothing of the user's among a run's files is deleted, changed or written over; a run that goes back loses nothing."""

import datetime
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, records
from tests.training.test_run import QUICK, assert_same_run
from tests.training.test_tracking import scalars
from trimodal import checkpoint, doctor
from trimodal.files import remove_left
from trimodal.training import outputs, plans, resume, run
from trimodal.training.run import Options
from trimodal.training.tracking import EVENTS, Tracker, event_files

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that nothing interrupted, with all its checkpoints and its report."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *QUICK)
    return folder


def copy_of(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder, symlinks=True)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Of all files below a folder, by their names."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and "plans" not in path.parts}


# ---- the user's files --------------------------------------------------------------------------------------------


def users_files(folder: Path) -> dict[Path, bytes]:
    """Puts what a user may keep among the files of a run, and gives its bytes."""
    made = {}
    for name in ("notes.txt", "notes.2024.tmp", "checkpoints/notes.txt", "checkpoints/run.3.tmp", "logs/mine.jsonl",
                 "checkpoints/keep/checkpoint_epoch_1.pt", "logs/tensorboard/events.out.tfevents.1.host.1.0",
                 "logs/bad_step_3.pt", "reports/report_20200101_000000.md", "reports/.written.json.bak"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"of the user: {name}")
        made[path] = path.read_bytes()
    for name in ("best_copy.pt", "checkpoint_epoch_2 (copy).pt"):
        path = Path(shutil.copy(folder / "checkpoints" / "best_model.pt", folder / "checkpoints" / name))
        made[path] = path.read_bytes()
    path = folder / "checkpoints" / "checkpoint_epoch_77.pt"
    torch.save({"w": torch.ones(3)}, path)
    made[path] = path.read_bytes()
    settings = folder / "config.yaml"
    settings.write_text("# with my own words\n" + settings.read_text("utf-8"), "utf-8")
    settings.chmod(0o444)
    made[settings] = settings.read_bytes()
    return made


def test_no_command_touches_what_the_user_keeps_in_the_folder_of_a_run(small: SmallRuns, whole: Path, tmp_path: Path,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = copy_of(whole, tmp_path / "run"), tmp_path / "elsewhere"
    for name in ("checkpoints", "reports"):  # on another disk
        shutil.move(folder / name, elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    made = users_files(folder)
    config = small.config(folder, *QUICK)
    last = folder / "checkpoints" / "checkpoint_epoch_3.pt"

    def evaluated() -> None:
        assert evaluate.main(["--checkpoint", str(folder / "checkpoints" / "best_model.pt"), "--data-root",
                              str(small.data_root), "--output-dir", str(folder), "--limit", "8"]) == 0

    commands: dict[str, Callable[[], Any]] = {
        "a fresh start, refused": lambda: refused_start(small, folder),
        "--plan": lambda: plans.print_plan(config, "cpu"),
        "--doctor": lambda: doctor.main(config, "cpu", "auto"),
        "evaluate.py": evaluated,
        "--resume auto": lambda: small.train(folder, *QUICK, resume="auto"),
        "more epochs": lambda: small.train(folder, *QUICK, "training.epochs=5", "training.keep_checkpoints=2",
                                           resume="auto"),
        "--resume EARLIER": lambda: small.train(folder, *QUICK, "training.epochs=5", resume=str(
            max((folder / "checkpoints").glob("checkpoint_epoch_4.pt"), default=last))),
        "--overwrite": lambda: small.train(folder, *QUICK, "training.epochs=3", overwrite=True)}
    for name, command in commands.items():
        command()
        assert {str(path): path.exists() and path.read_bytes() == bytes_ for path, bytes_ in made.items()} == {
            str(path): True for path in made}, name
    assert (folder / "checkpoints").is_symlink() and (folder / "reports").is_symlink()
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if line.startswith(f"{folder}: kept")]
    assert_names(told[0], "checkpoints/best_copy.pt", "checkpoints/notes.txt", "checkpoints/keep")
    assert not list((folder / "checkpoints").glob("checkpoint_epoch_4.pt")), "what was ours has gone"
    assert_names(next(line for line in said.splitlines() if "config_2.yaml" in line), folder / "config.yaml")


def refused_start(small: SmallRuns, folder: Path) -> None:
    with refused(folder, "checkpoints", "logs/metrics.jsonl", "--resume auto", "--overwrite", "--output-dir"):
        small.train(folder, *QUICK)


def test_files_of_the_user_alone_are_no_earlier_run(small: SmallRuns, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("notes.txt", "my_backup.pt"):
        (tmp_path / "checkpoints" / name).write_text("mine")
    (tmp_path / "checkpoints" / "gone").symlink_to(tmp_path / "nowhere")
    assert run.parts_in_use(tmp_path) == []
    small.open(tmp_path).tracker.close()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_lies_under_the_name_of_a_checkpoint_is_kept_beside(tmp_path: Path, kind: str,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "best_model.pt", tmp_path / "weights.bin"
    target.write_text("of the user")
    if kind == "folder":
        path.mkdir()
        target.rename(path / "weights.bin")
    elif kind == "link":
        path.symlink_to(target)
    else:
        target.rename(path)
    for _ in range(2):  # the second time it is ours
        checkpoint.save({"a": 1}, path)
    assert checkpoint.load(path)["a"] == 1 and path.is_file() and not path.is_symlink()
    [kept] = tmp_path.glob("best_model.pt.before_*")
    assert (kept / "weights.bin" if kind == "folder" else kept).read_text() == "of the user"
    assert_names(capsys.readouterr().out.rstrip("\n"), path, kept.name)


def test_rotation_neither_deletes_nor_counts_what_is_not_ours(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        checkpoint.save({"a": 1}, tmp_path / f"checkpoint_epoch_{epoch}.pt")
    users = [tmp_path / f"checkpoint_epoch_{name}.pt" for name in ("0", "7", "8_step_2")]
    for path in users:
        torch.save({"a": 1}, path)
    (tmp_path / "checkpoint_epoch_5.pt").symlink_to("checkpoint_epoch_3.pt")
    (tmp_path / "checkpoint_epoch_6.pt").mkdir()
    checkpoint.rotate(tmp_path, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in users), *(f"checkpoint_epoch_{n}.pt" for n in (3, 5, 6))}


def test_settings_are_written_beside_those_that_the_user_has_changed(tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    assert [outputs.write_settings(tmp_path, {"a": value}) for value in (1, 2, 2)] == [path] * 3
    assert path.read_text() == "a: 2\n" and capsys.readouterr().out == ""
    path.write_text("a: 3\n")
    for value in (4, 5):
        assert outputs.write_settings(tmp_path, {"a": value}).name == "config_2.yaml"
    assert path.read_text() == "a: 3\n" and (tmp_path / "config_2.yaml").read_text() == "a: 5\n"
    assert_names(capsys.readouterr().out.splitlines()[0], path, "config_2.yaml")
    assert outputs.write_settings(tmp_path, {"a": 3}) == path, "just what is there"


def test_a_log_with_lines_of_others_is_kept_as_it_was(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "logs")
    tracker.event("one", 1)
    tracker.event("two", 2)
    tracker.close()
    log = tmp_path / outputs.LOG
    with log.open("a", encoding="utf-8") as file:
        file.write('{"kind": "st')  # cut off by a kill: ours
    Tracker(tmp_path / "logs", last_step=1).close()
    assert [path.name for path in log.parent.glob("metrics*")] == ["metrics.jsonl"]
    log.write_text("my words\n" + log.read_text("utf-8"), "utf-8")
    before = log.read_bytes()
    Tracker(tmp_path / "logs", last_step=0).close()
    [first] = log.parent.glob("metrics.jsonl.before_*")
    assert first.read_bytes() == before and records(tmp_path) == []
    log.write_text("my words\n")
    outputs.remove_run(tmp_path)
    [second] = {*log.parent.glob("metrics.jsonl.before_*")} - {first}
    assert second.read_text() == "my words\n" and not log.exists()


# ---- going back --------------------------------------------------------------------------------------------------


def go_back(small: SmallRuns, folder: Path, epoch: int = 2) -> None:
    """Open the run again at an earlier checkpoint, and close it."""
    config = small.config(folder, *QUICK)
    options = Options("cpu", str(folder / "checkpoints" / f"checkpoint_epoch_{epoch}.pt"))
    run.open_run(config, options, resume.find_state(config, options)).tracker.close()


def test_a_run_that_goes_back_keeps_what_lay_further_on(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "run")
    before = digests(folder)
    go_back(small, folder)
    [place] = folder.glob("abandoned_*")
    moved = digests(place)
    gone = {name for name in before if name not in digests(folder)}
    assert gone >= {f"checkpoints/{name}" for name in (
        "checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt", "best_model.pt", "final_model.pt", "model.safetensors",
        "config.json")}
    assert {name for name in gone if name.startswith("reports/")} == {n for n in before if n.startswith("reports/")}
    assert {name for name in before if "projector_" in name} <= gone
    [events] = (name for name in before if "events.out.tfevents" in name)
    assert {name: before[name] for name in [*gone, "logs/metrics.jsonl", "config.yaml", events]} == moved
    last = checkpoint.load(folder / "checkpoints" / "checkpoint_epoch_2.pt")["progress"]["step"]
    assert [line for line in records(folder) if not line.get("resumed")] == [
        line for line in records(whole) if line["step"] <= last]
    [event] = [line["message"] for line in records(folder, "event") if line.get("resumed")]
    assert_names(event, place)
    assert not (folder / outputs.GOING_BACK).exists()
    assert small.train(place, *QUICK, resume="auto").parent == place / "reports", "it can be gone on with in there"


def test_a_run_that_went_back_ends_with_the_same_bits(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "run")
    small.train(folder, *QUICK, resume=str(folder / "checkpoints" / "checkpoint_epoch_2.pt"))
    assert_same_run(folder, whole, range(3, 5))


def test_a_fresh_start_where_the_checkpoints_are_gone_keeps_what_the_run_has_come_to(
        small: SmallRuns, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user makes room and keeps best_model.pt alone; then --resume auto, as run_all.sh has it."""
    folder = copy_of(whole, tmp_path / "run")
    for path in (folder / "checkpoints").glob("checkpoint_epoch_*.pt"):
        path.unlink()
    before = digests(folder)
    config = small.config(folder, *QUICK)
    options = Options("cpu", "auto")
    run.open_run(config, options, resume.find_state(config, options)).tracker.close()
    [place] = folder.glob("abandoned_*")
    kept = digests(place)
    assert {name: kept.get(name) for name in before if name.startswith(("checkpoints/", "reports/", "logs/"))} == {
        name: digest for name, digest in before.items() if name.startswith(("checkpoints/", "reports/", "logs/"))}
    assert records(folder) == [] and scalars(folder / "logs") == {}
    assert str(place) in capsys.readouterr().out


def test_a_complete_run_whose_last_checkpoints_are_gone_keeps_what_it_has_come_to(small: SmallRuns, whole: Path,
                                                                                  tmp_path: Path) -> None:
    """A user makes room by deleting the newest checkpoints, then goes on with the newest that is left."""
    folder = copy_of(whole, tmp_path / "run")
    for epoch in (3, 4):
        (folder / "checkpoints" / f"checkpoint_epoch_{epoch}.pt").unlink()
    before = digests(folder)
    small.train(folder, *QUICK, resume="auto")
    [place] = folder.glob("abandoned_*")
    moved = digests(place)
    kept = {name for name in before if name.startswith(("reports/", "logs/"))} | {
        f"checkpoints/{name}" for name in ("best_model.pt", "final_model.pt", "model.safetensors", "config.json")}
    assert {name: moved.get(name) for name in kept} == {name: before[name] for name in kept}
    assert_same_run(folder, whole, range(3, 5))


class Killed(BaseException):
    """As kill -9: nothing after it is done."""


CALLS = ((os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "copyfileobj"), (Path, "mkdir"))


def killed_at(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `act` came to its change of the disk of that number, before which it was killed."""
    count = 0
    with monkeypatch.context() as patch:
        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count >= number:
                    raise Killed
                return real(*args, **kwargs)
            return call

        for owner, name in CALLS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            act()
        except Killed:
            return True
    return False


def test_going_back_that_is_killed_at_any_moment_is_finished_by_the_next_start(
        whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light = copy_of(whole, tmp_path / "light")
    step = checkpoint.load(light / "checkpoints" / "checkpoint_epoch_2.pt")["progress"]["step"]

    def back(folder: Path) -> None:
        outputs.go_back(folder, "checkpoint_epoch_2.pt", 2, step, NOW)

    begun = digests(light)
    expected = copy_of(light, tmp_path / "expected")
    back(expected)
    done, number = digests(expected), 1
    while True:
        folder = copy_of(light, tmp_path / f"run{number}")
        is_killed = killed_at(number, lambda where=folder: back(where), monkeypatch)  # type: ignore[misc]
        again = number % 3 == 0 and killed_at(2, lambda where=folder: outputs.finish_going_back(where),  # type: ignore
                                              monkeypatch)
        outputs.finish_going_back(folder)
        for part in ("", *run.FOLDERS):
            remove_left(folder / part, outputs.WRITTEN)
        found = {name: digest for name, digest in digests(folder).items() if not name.endswith(".tmp")}
        assert found in ([done] if number > 2 else [begun, done]), (number, again)
        shutil.rmtree(folder)
        if not is_killed:
            break
        number += 1
    assert number > 12, "each move is one of them"


def test_auto_after_a_kill_while_going_back_goes_on_from_the_earlier_one(
        small: SmallRuns, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(whole, tmp_path / "run")
    assert killed_at(9, lambda: go_back(small, folder), monkeypatch) and (folder / outputs.GOING_BACK).exists()
    assert (folder / "checkpoints" / "checkpoint_epoch_4.pt").exists(), "the newest one, still"
    small.train(folder, *QUICK, resume="auto")
    assert_same_run(folder, whole, range(3, 5))


def test_what_a_kill_leaves_of_an_event_file_is_not_shown(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "run")
    [shown] = event_files(folder / outputs.BOARD)
    left = shown.with_name(f"{shown.name}.77.tmp")
    shutil.copy(shown, left)  # TensorBoard takes it for one more file of the run
    small.train(folder, *QUICK, "training.epochs=5", resume="auto")
    assert not left.exists() and shown.exists()


def test_checkpoints_move_to_another_disk_whole(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = copy_of(whole, tmp_path / "run"), os.rename

    def elsewhere(source: Any, target: Any) -> None:
        if Path(target).is_relative_to(folder / "abandoned_20260102_030405"):
            raise OSError(18, os.strerror(18))
        rename(source, target)

    before = digests(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", elsewhere)
        place = outputs.go_back(folder, "checkpoint_epoch_3.pt", 3, 0, NOW)
    assert place and digests(place)["checkpoints/checkpoint_epoch_4.pt"] == before["checkpoints/checkpoint_epoch_4.pt"]
    assert not (folder / "checkpoints" / "checkpoint_epoch_4.pt").exists()


def test_the_event_files_of_a_run_that_went_back_hold_what_is_kept_alone(small: SmallRuns, whole: Path,
                                                                         tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "run")
    last = max(record["step"] for record in records(folder, "step") if record["epoch"] == 2)
    expected = {tag: kept for tag, points in scalars(folder / "logs").items()
                if (kept := [point for point in points if point[0] <= last])}
    go_back(small, folder)
    found: dict[str, list[Any]] = {}
    for path in (folder / outputs.BOARD).iterdir():  # one by one, as the server behind the page reads them
        alone = tmp_path / path.name / "tensorboard"
        alone.mkdir(parents=True)
        shutil.copy(path, alone)
        for tag, points in scalars(alone.parent).items():
            found.setdefault(tag, []).extend(points)
    assert found == expected and any(tag.startswith("memory/") for tag in expected)
    assert all(path.name.endswith(EVENTS) for path in (folder / outputs.BOARD).iterdir())
