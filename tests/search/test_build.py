"""Making an index: what is new is encoded once, what is known stays, what is gone is forgotten, what is broken is
named; and a process that is killed anywhere loses nothing."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked, killing, trees
from tests.refusals import refused
from tests.search import things
from trimodal.search import build
from trimodal.search.build import Summary, build_index
from trimodal.search.index import FILE, Index
from trimodal.search.journal import NAME, Journal, read_journal


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are seconds old; only the test of that waits."""
    monkeypatch.setattr(build, "SETTLED_NS", -(10**12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return things.folder(tmp_path / "media")


class Recorded:
    """An OpenModel that keeps the names of what it encoded."""

    def __init__(self, digest: str = "") -> None:
        self.names: list[str] = []
        self.digest = digest or things.model().digest

    def __getattr__(self, name: str) -> Any:
        return getattr(things.model(), name)

    def encode(self, **given: Any) -> torch.Tensor:
        self.names += [Path(path).name for name in ("images", "audio") for path in given.get(name, ())]
        return things.model().encode(**given)


def indexed(folder: Path, place: Path, model: Any = None, replace: bool = False) -> tuple[Summary, Index]:
    summary = build_index(folder, place, model or things.model(), "best_model.pt", replace=replace)
    return summary, Index.open(place)


def names(index: Index) -> list[tuple[str, str]]:
    return [(entry.kind, entry.path) for entry in index.entries]


EVERYTHING = [("image", "film.mp4"), ("image", "blue.png"), ("image", "red.png"), ("image", "sub/green.png"),
              ("image", "sub/white.png"), ("audio", "film.mp4"), ("audio", "low.wav"),
              ("audio", "sub/deeper/high.flac")]


def test_pictures_sounds_and_both_tracks_of_videos(folder: Path, tmp_path: Path) -> None:
    summary, index = indexed(folder, tmp_path / "index")
    assert sorted(names(index)) == sorted(EVERYTHING)
    assert summary.files == {"pictures": 4, "sounds": 2, "videos": 1} and summary.num_others == 1
    assert summary.encoded == {"image": 5, "audio": 3} and not summary.skipped
    for kind, argument in build.ARGUMENTS.items():
        alone = [things.model().encode(**{argument: str(folder / entry.path)})[0] for entry in index.by_kind[kind]]
        torch.testing.assert_close(index.features(kind), torch.stack(alone), atol=1e-5, rtol=0)
    lasts = {entry.path: entry.duration_s for entry in index.entries if entry.kind == "audio"}
    assert lasts == {"film.mp4": pytest.approx(0.8, abs=0.1), "low.wav": 0.6, "sub/deeper/high.flac": 1.2}
    assert {path.name for path in (tmp_path / "index").iterdir()} == {FILE, build.SKIPPED}
    assert index.search(index.features("image")[2], "image", 1)[0].entry == index.by_kind["image"][2]


def test_again_nothing_is_read_or_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(folder, tmp_path / "index")
    before, model = (tmp_path / "index" / FILE).stat(), Recorded()
    monkeypatch.setattr(build, "digests", lambda folder, files: iter(() if not files else [1 / 0]))
    summary, _ = indexed(folder, tmp_path / "index", model)
    assert model.names == [] and (tmp_path / "index" / FILE).stat() == before
    assert summary.entries == {"image": 5, "audio": 3} and not summary.encoded


def test_only_new_content_is_encoded(folder: Path, tmp_path: Path) -> None:
    """Moved, renamed and equal files are known by their content; one that changed under its name is not."""
    _, first = indexed(folder, tmp_path / "index")
    shutil.move(folder / "red.png", folder / "sub" / "moved.png")
    shutil.copy(folder / "blue.png", folder / "copy.png")
    trees.picture(folder / "sub" / "green.png", (90, 10, 90))
    trees.picture(folder / "new.png", (1, 90, 90))
    shutil.copy(folder / "new.png", folder / "new_copy.png")
    (folder / "low.wav").unlink()
    model = Recorded()
    summary, second = indexed(folder, tmp_path / "index", model)
    assert sorted(model.names) == ["green.png", "new.png"], "each content once"
    assert names(second) == [("image", name) for name in (
        "blue.png", "copy.png", "film.mp4", "new.png", "new_copy.png", "sub/green.png", "sub/moved.png",
        "sub/white.png")] + [("audio", "film.mp4"), ("audio", "sub/deeper/high.flac")]
    assert summary.num_forgotten == 2, "red.png and low.wav"

    def feature(index: Index, path: str) -> torch.Tensor:
        return index.features("image")[[entry.path for entry in index.by_kind["image"]].index(path)]

    assert torch.equal(feature(first, "red.png"), feature(second, "sub/moved.png"))
    assert torch.equal(feature(second, "new.png"), feature(second, "new_copy.png"))
    assert not torch.equal(feature(first, "sub/green.png"), feature(second, "sub/green.png"))


def test_a_change_that_keeps_size_and_date_is_seen(folder: Path, tmp_path: Path) -> None:
    trees.sound(folder / "low.wav", trees.tone(0.5, hz=300))
    date = (folder / "low.wav").stat()
    indexed(folder, tmp_path / "index")
    trees.sound(folder / "low.wav", trees.tone(0.5, hz=5000))
    os.utime(folder / "low.wav", ns=(date.st_atime_ns, date.st_mtime_ns))
    assert (folder / "low.wav").stat().st_size == date.st_size
    model = Recorded()
    indexed(folder, tmp_path / "index", model)
    assert model.names == ["low.wav"]


def test_a_file_younger_than_the_clock_ticks_is_read_again(folder: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SETTLED_NS", 10**12)
    _, index = indexed(folder, tmp_path / "index")
    assert {entry.changed_ns for entry in index.entries} == {0}
    model = Recorded()
    indexed(folder, tmp_path / "index", model)
    assert model.names == [], "the content is the same"


def test_what_is_broken_is_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>not found</html>")
    shutil.copy(folder / "page.jpg", folder / "page_copy.jpg")
    trees.truncate(trees.noise(folder / "half.png", (200, 200)))
    trees.sound(folder / "silent.wav", 0 * trees.tone(0.5))
    trees.video(folder / "mute.mp4", [(10, 20, 30)] * 5)
    trees.video(folder / "cut.mp4", [(10, 20, 30)] * 5)
    trees.truncate(folder / "cut.mp4", 0.1)
    summary, index = indexed(folder, tmp_path / "index")
    assert sorted(path for path, _ in summary.skipped) == [
        "cut.mp4", "empty.png", "half.png", "page.jpg", "page_copy.jpg", "silent.wav"]
    assert all(reason and str(folder) not in reason for _, reason in summary.skipped)
    assert summary.without == {"videos without sound": 1}
    assert sorted(names(index)) == sorted([*EVERYTHING, ("image", "mute.mp4")])
    listed = [json.loads(line) for line in (tmp_path / "index" / build.SKIPPED).read_text().splitlines()]
    assert [one["path"] for one in listed] == [path for path, _ in summary.skipped]


def test_a_file_that_changes_while_it_is_encoded_is_left_for_the_next_time(folder: Path, tmp_path: Path) -> None:
    class Slow(Recorded):
        def encode(self, **given: Any) -> torch.Tensor:
            (folder / "red.png").write_bytes((folder / "blue.png").read_bytes())
            return super().encode(**given)

    summary, index = indexed(folder, tmp_path / "index", Slow())
    assert [path for path, _ in summary.skipped] == ["red.png"] and ("image", "red.png") not in names(index)
    assert ("image", "red.png") in names(indexed(folder, tmp_path / "index")[1])


def test_what_a_closed_folder_held_is_not_forgotten(folder: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(folder, tmp_path / "index")
    found = build.find(folder)
    found.files = [file for file in found.files if not file.path.startswith("sub/")]
    found.unread = ["sub"]
    monkeypatch.setattr(build, "find", lambda *given: found)
    summary, index = indexed(folder, tmp_path / "index")
    assert sorted(names(index)) == sorted(EVERYTHING) and not summary.num_forgotten


def test_an_index_stays_where_there_is_nothing_to_put_in_its_place(folder: Path, tmp_path: Path) -> None:
    _, before = indexed(folder, tmp_path / "index")
    shutil.move(folder, tmp_path / "detached")
    folder.mkdir()
    with refused(folder):
        indexed(folder, tmp_path / "index")
    (folder / "x.png").touch()
    with refused(folder, 1, "x.png"):
        indexed(folder, tmp_path / "index")
    assert Index.open(tmp_path / "index").entries == before.entries


def test_an_index_of_another_folder_or_model_is_refused_unless_it_may_go(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    indexed(folder, place)
    other = tmp_path / "other"
    shutil.copytree(folder / "sub", other)
    with refused(place, folder, other, "--index", "--replace"):
        indexed(other, place)
    another = Recorded(digest="cd" * 32)
    with refused(place, "best_model.pt", "cdcdcdcdcdcd", things.model().digest[:12], "--replace"):
        indexed(folder, place, another)
    assert Index.open(place).folder == folder and another.names == []
    model = Recorded()
    _, index = indexed(other, place, model, replace=True)
    assert model.names == [] and index.folder == other, "equal content, the same model: nothing is encoded again"
    _, index = indexed(other, place, another, replace=True)
    assert sorted(another.names) == ["green.png", "high.flac", "white.png"] and index.model.digest == "cd" * 32


def test_what_the_model_does_not_read_is_counted(folder: Path, tmp_path: Path) -> None:
    model = Recorded()
    model.modalities = ("image", "text")  # type: ignore[attr-defined]
    summary, index = indexed(folder, tmp_path / "index", model)
    assert {kind for kind, _ in names(index)} == {"image"} and len(index.entries) == 5
    assert summary.without == {"sounds that the model does not read": 2}


def test_a_place_that_could_not_be_opened_again_is_refused_before_anything_is_encoded(folder: Path,
                                                                                      tmp_path: Path) -> None:
    place, model = tmp_path / os.fsdecode(b"an index \xff"), Recorded()
    for use in (lambda: indexed(folder, place, model), lambda: Index.open(place)):
        with refused(r"an index \xff", "UTF-8", "--index"):
            use()
    assert model.names == [] and not place.exists()
    folder = folder.rename(tmp_path / os.fsdecode(b"media \xff"))
    assert indexed(folder, tmp_path / "index")[1].folder == folder, "what is indexed may have any name"


def test_a_folder_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(tmp_path / "file" / "index", "--index"):
        indexed(folder, tmp_path / "file" / "index")


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", [FILE, NAME, build.SKIPPED])
def test_a_file_of_the_user_by_a_name_of_the_index_stays(folder: Path, tmp_path: Path, name: str,
                                                         replace: bool) -> None:
    (tmp_path / "index").mkdir()
    own = tmp_path / "index" / name
    own.write_text('{"mine": 1}\n', "utf-8")
    with refused(own, "--index"):
        indexed(folder, tmp_path / "index", replace=replace)
    assert own.read_text("utf-8") == '{"mine": 1}\n'


# ---- kills -------------------------------------------------------------------------------------------------------


def test_a_journal_ends_with_its_last_whole_record(tmp_path: Path) -> None:
    """Cut at each of its bytes: what is whole is read, and what is appended later is read too."""
    path, features = tmp_path / NAME, torch.randn(3, 5).numpy()
    journal = Journal(path, "ab")
    ends = [path.stat().st_size]
    for row in range(3):
        journal.add([build.Entry("image", f"{row}.png", f"{row}", 0.0, 0.0, 1, 1)], features[row:row + 1])
        ends.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        digest, records, _ = read_journal(path)
        expected = sum(end <= cut for end in ends) - 1
        assert (digest, len(records)) == ("ab" if expected >= 0 else "", max(expected, 0)), cut
        again = Journal(path, "ab")
        again.add([build.Entry("image", "new.png", "9", 0.0, 0.0, 1, 1)], features[:1])
        again.close()
        _, records, _ = read_journal(path)
        assert [record.entries[0].path for record in records] == [
            *(f"{row}.png" for row in range(max(expected, 0))), "new.png"]
        assert (records[-1].features_NF == features[0]).all()


PLACES = {  # where an indexing dies, one after another, each of which goes on where the one before was
    "before the index is written": ("trimodal.search.build.write_index", 1),
    "before the index is renamed": ("os.replace", 1),
    "before the list of what was skipped": ("trimodal.search.build.replacing", 1),
    "before that list is renamed": ("os.replace", 1),
    "before the journal goes": ("trimodal.files.sync_folder", 1)}


def _index_by_one(folder: Path, place: Path, log: Path, dies: str = "", after: tuple[int, float] | None = None) -> None:
    """In a process: one file a record, each named in `log` before it is encoded. The process dies at one of PLACES, or
    so many seconds after it has begun with so many files."""
    forked.as_usual()
    os.fsync = lambda fd: None
    build.FIRST_GROUP = build.LARGEST_GROUP = 1
    build.SETTLED_NS = -(10**12)
    if dies:
        killing.die_at(*PLACES[dies])

    class Logged(Recorded):
        def encode(self, **given: Any) -> torch.Tensor:
            [(name, [path])] = [(name, given[name]) for name in ("images", "audio") if name in given]
            with log.open("a") as file:
                file.write(f"{name} {Path(path).name}\n")
            encoded = super().encode(**given)
            if after and len(self.names) == after[0]:
                threading.Timer(after[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return encoded

    build_index(folder, place, Logged(), "best_model.pt")
    os._exit(0)


@pytest.mark.timed
def test_killed_at_any_moment_nothing_is_lost(tmp_path: Path) -> None:
    """SIGKILL at random moments of encoding and at each step of writing: no file is encoded twice but those at which a
    kill hit, the index is that of a run without kills, and nothing is left beside it."""
    folder, noises = things.folder(tmp_path / "media"), 100
    for number in range(noises):
        trees.noise(folder / f"noise_{number:02}.png", (64, 64), seed=number)
    draw = random.Random(0)
    moments = [("", (draw.randint(1, 6), draw.uniform(0, 0.02))) for _ in range(4)]
    for dies, after in [*moments, *((dies, None) for dies in PLACES), ("", None)]:
        process = forked.context().Process(target=_index_by_one,
                                           args=(folder, tmp_path / "index", tmp_path / "log", dies, after))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if dies or after else 0), (dies, after)
    encoded = (tmp_path / "log").read_text().splitlines()
    assert len(set(encoded)) == noises + 8 and len(encoded) <= noises + 8 + len(moments)
    assert {path.name for path in (tmp_path / "index").iterdir()} == {FILE, build.SKIPPED}
    _, whole = indexed(folder, tmp_path / "whole")
    killed = Index.open(tmp_path / "index")
    assert killed.entries == whole.entries
    for kind in build.KINDS:
        torch.testing.assert_close(killed.features(kind), whole.features(kind), atol=1e-5, rtol=0)


@pytest.mark.timed
def test_two_processes_do_not_index_into_one_place_at_once(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    place = tmp_path / "index"
    place.mkdir()
    with build.locked(place / "index"):
        process = forked.context().Process(target=_index_by_one, args=(folder, place, tmp_path / "log"))
        process.start()
        time.sleep(1.0)
        assert process.is_alive() and not (tmp_path / "log").exists() and not said
    process.join()
    assert process.exitcode == 0 and len(Index.open(place).entries) == 8
