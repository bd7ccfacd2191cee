"""Nothing of the user's is harmed by a download: changed lists, links, archives, and files with names like ours.

Every byte that he put there is somewhere in the folder afterwards, whatever the command, and whatever the servers do.
"""

import functools
import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from tests import forked, miniature
from tests.loopback import Loopback
from tests.test_download import QUICK, rows
from tests.test_download import run as download
from trimodal.download.http import CHUNK_BYTES
from trimodal.files import is_set_aside
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import Source

MAKERS: dict[str, Callable[[Path], tuple[Source, dict[str, bytes]]]] = {
    "coco": miniature.coco, "clotho": miniature.clotho,
    "audiocaps": lambda folder: miniature.audiocaps(folder, shards=True), "voxceleb": miniature.voxceleb,
    "stamps": miniature.stamps}
LISTS = {"clotho": ("clotho_captions_development.csv", "clotho_metadata_evaluation.csv"),
         "audiocaps": ("dataset/train.csv", "dataset/test.csv", "dataset2.0/train.csv"),
         "voxceleb": ("voxceleb1/vox1_meta.csv", "voxceleb1/iden_split.txt"), "coco": (), "stamps": ()}


class Place:
    """One set, served, and the folder that it goes into."""

    def __init__(self, name: str, folder: Path, server: Loopback) -> None:
        self.name, self.server = name, server
        self.true, self.root, self.elsewhere = folder / "true" / name, folder / "data", folder / "elsewhere"
        self.folder = self.root / name
        self.source, self.served = MAKERS[name](folder / "true")
        server.files |= {f"/{name}/{file}": data for file, data in self.served.items()}

    def words(self, up: bool = True) -> list[str]:
        base = self.server.url(f"/{self.name}") if up else "http://127.0.0.1:9"
        return ["--datasets", self.name, "--data-root", str(self.root), "--base-url", f"{self.name}={base}"]

    @property
    def table(self) -> dict[str, Source]:
        return {**SOURCES, self.name: self.source}

    def run(self, *words: str, up: bool = True) -> int:
        return download(*self.words(up), *words, table=self.table)

    @property
    def done(self) -> int:
        """The exit code when all is there: clips of AudioCaps are missing in the tree itself."""
        return 3 if self.name == "audiocaps" else 0


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


@pytest.fixture(autouse=True)
def _no_tools_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # 7z by the package, no apt-get, no yt-dlp
    for name in ("VOXCELEB_KEY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def changed(data: bytes) -> bytes:
    """A list as pandas would write it back: the same rows, blanks stripped, and one more."""
    return data.replace(b" ", b"") + b"mine,added by hand\n"


# --- Lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, lists in LISTS.items() if lists])
@pytest.mark.parametrize("before", [True, False], ids=["downloaded before", "unpacked by the user"])
def test_changed_lists_stay_with_skip_existing(name: str, before: bool, server: Loopback, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(name, tmp_path, server)
    if before:
        assert place.run() == place.done
    else:
        shutil.copytree(place.true, place.folder)
    own = {each: changed((place.true / each).read_bytes()) for each in LISTS[name]}
    for each, data in own.items():
        (place.folder / each).write_bytes(data)
    for up in (False, True, True):
        capsys.readouterr()
        place.run("--skip-existing", up=up)
        told = capsys.readouterr().out
        for each, data in own.items():
            assert (place.folder / each).read_bytes() == data
            assert [line for line in told.splitlines() if line.startswith(f"{name}: {each}: ")], "one line for each"
            assert f"/{name}/{each}" not in dict(server.requests) or before
    assert not [path for path in place.folder.rglob("*") if is_set_aside(path.name)]


@pytest.mark.parametrize("name", [name for name, lists in LISTS.items() if lists])
def test_changed_lists_make_way_only_for_whole_ones(name: str, server: Loopback, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(name, tmp_path, server)
    assert place.run() == place.done
    own = {each: changed((place.true / each).read_bytes()) for each in LISTS[name]}
    for each, data in own.items():
        (place.folder / each).write_bytes(data)
    assert place.run(up=False) == 1
    output = capsys.readouterr()
    for each, data in own.items():
        assert (place.folder / each).read_bytes() == data and str(place.folder / each) in output.err + output.out
        server.faults[f"/{name}/{each if each in place.served else Path(each).name}"] = ["cut:5", "cut:0", "cut:0"]
    assert place.run() == 1
    assert {each: (place.folder / each).read_bytes() for each in own} == own
    server.faults.clear()
    capsys.readouterr()
    assert place.run() == place.done
    for each, data in own.items():
        path = place.folder / each
        (kept,) = (other for other in path.parent.iterdir() if is_set_aside(other.name, path.name))
        assert kept.read_bytes() == data and path.read_bytes() == (place.true / each).read_bytes()
        assert str(kept) in capsys.readouterr().err or each != LISTS[name][0]


def test_an_unpacked_set_behind_a_link_keeps_its_changed_lists(server: Loopback, tmp_path: Path) -> None:
    """Clotho in a folder of his own, lists stripped of blanks, linked as data/clotho, no network, as by run_all.sh."""
    place = Place("clotho", tmp_path, server)
    for path in place.true.glob("*.csv"):
        path.write_bytes(changed(path.read_bytes()))
    place.root.mkdir()
    place.folder.symlink_to(place.true)
    before = miniature.files_of(place.true)
    assert place.run("--skip-existing", up=False) == 3, "what is there can be used: run_all.sh goes on"
    assert place.run(up=False) == 1
    assert {name: data for name, data in miniature.files_of(place.true).items() if name in before} == before
    assert place.folder.is_symlink()


# --- Everything, under every command ---------------------------------------------------------------------------------

COMMANDS = [("--skip-existing",), (), ("--status",), ("--dry-run",), ("--verify",), ("--keep-archives",),
            ("--sample", "2"), ("--max-gb", "1"), ("--splits", "val"), ("--jobs", "1"), ("--local", "LOCAL"),
            ("--local", "SELF"), ("--sounds", "youtube"), ()]


def furnish(place: Place) -> None:
    """A folder as users have it: whole and changed lists, own data, links, archives, and names that look like ours."""
    folder, elsewhere, name = place.folder, place.elsewhere, place.name
    shutil.copytree(place.true, elsewhere / "copy")
    for each in LISTS[name][:1]:
        put(folder / each, changed((place.true / each).read_bytes()))
    for each in LISTS[name][1:2]:  # a link to a list that he keeps elsewhere
        put(elsewhere / "lists" / each, changed((place.true / each).read_bytes()))
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).symlink_to(elsewhere / "lists" / each)
    files = sorted(miniature.files_of(place.true))
    media = [each for each in files if not each.endswith((".csv", ".txt", ".json"))]
    for number, each in enumerate(media[::4]):  # some changed, some linked, some dangling
        path = folder / each
        if number % 3:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(elsewhere / "copy" / each if number % 3 == 1 else elsewhere / "gone")
        else:
            put(path, b"changed by the user")
    for item in place.source.items:
        for file in item.files:
            at = folder / "archives" / file.name if item.kind != "plain" else folder / item.into
            for suffix in (".part", ".part.json", ".lock", ".sha256", ".before_20200101_000000", ".old.tmp"):
                put(at.with_name(at.name + suffix), b"of the user: " + suffix.encode())
    whole, other = [item.files[0].name for item in place.source.items if item.kind != "plain"][:2]
    put(folder / "archives" / whole, place.served[whole])  # one that he fetched himself, and a half one
    put(folder / "archives" / other, place.served[other][:50])
    for each in ("LICENCE.txt", "notes.md", ".unpacking/mine/a.txt", f".unpacking/{whole}-x/a.txt", ".clips/mine/a.txt",
                 ".clips/17/a.txt", ".download.lock", "youtube.csv", ".contents/mine.txt", "train/own.flac",
                 ".downloaded.json.x.tmp", "archives/own.zip"):
        put(folder / each, b"of the user: " + each.encode())


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def belongings(place: Place) -> dict[str, tuple[str, bytes]]:
    """Path -> what is there: a link and where it leads, or the bytes of a file."""
    found: dict[str, tuple[str, bytes]] = {}
    for top in (place.folder, place.elsewhere):
        for root, folders, names in os.walk(top):
            for path in (Path(root, each) for each in [*folders, *names]):
                if path.is_symlink():
                    found[str(path)] = ("link", os.readlink(path).encode())
                elif path.is_file():
                    found[str(path)] = ("file", path.read_bytes())
    return found


def lost(before: dict[str, tuple[str, bytes]], after: dict[str, tuple[str, bytes]]) -> list[str]:
    """What is neither where it was nor beside it under a name that tells so."""
    aside = {(path.rpartition(".before_")[0], what) for path, what in after.items() if is_set_aside(Path(path).name)}
    return [path for path, what in before.items() if after.get(path) != what and (path, what) not in aside]


@pytest.mark.parametrize("state", ["up", "down", "cut"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_every_command_leaves_all_that_is_the_users(name: str, state: str, server: Loopback, tmp_path: Path) -> None:
    place = Place(name, tmp_path, server)
    furnish(place)
    before, marker = belongings(place), str(place.folder / inventory.MARKER)
    for words in COMMANDS:
        if words == ("--sounds", "youtube") and name != "audiocaps":
            continue
        if state == "cut":
            server.faults |= {f"/{name}/{file}": [f"cut:{min(len(data) // 2, CHUNK_BYTES)}", "cut:0", "503"]
                              for file, data in place.served.items()}
        local = {"LOCAL": str(place.elsewhere / "copy"), "SELF": str(place.folder)}
        here = belongings(place)
        code = place.run(*(local.get(word, word) for word in words), up=state != "down")
        assert code in (0, 1, 2, 3), words
        after = belongings(place)
        assert lost(before, after) == [], words
        if words[:1] in (("--status",), ("--dry-run",)):
            assert after == here, words
        if words == ("--verify",):
            assert {**after, marker: None} == {**here, marker: None}, "all but our notes"
        if words == ("--skip-existing",):
            lists = [str(place.folder / each) for each in LISTS[name]]
            assert {path: after[path] for path in lists if path in before}.items() <= here.items()


@pytest.mark.timed
@pytest.mark.parametrize("name", ["clotho", "audiocaps"])
def test_killed_before_any_change_of_a_name_nothing_is_lost(name: str, server: Loopback, tmp_path: Path,
                                                                     all_repetitions: bool) -> None:
    """SIGKILL before the first, the second, ... call that gives, takes or removes a name, all on the same folder."""
    place = Place(name, tmp_path, server)
    furnish(place)
    before = belongings(place)
    for deadly in range(1, 200, 1 if all_repetitions else 5):
        process = forked.context().Process(target=dies_at, args=(place.table, place.words(), deadly))
        process.start()
        process.join()
        assert lost(before, belongings(place)) == [], deadly
        if process.exitcode != -signal.SIGKILL:
            break
    assert process.exitcode == place.done and deadly > 10
    left = [path.name for path in place.folder.rglob("*") if path.name.startswith("process-")]
    assert left == [] and place.run() == place.done


def dies_at(table: dict[str, Source], words: list[str], deadly: int) -> None:
    tqdm.set_lock(threading.RLock())  # else it takes a semaphore of the system, which a killed process would leave
    calls = itertools.count(1)

    def counted(call: Callable[..., object], *given: Any, **more: Any) -> object:
        if next(calls) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **more)

    for name in ("replace", "link", "unlink"):
        setattr(os, name, functools.partial(counted, getattr(os, name)))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os._exit(download(*words, table=table))


def test_a_folder_behind_a_link_is_used_as_a_folder(server: Loopback, tmp_path: Path) -> None:
    """The set on another disk: what comes goes there."""
    place = Place("coco", tmp_path, server)
    place.elsewhere.mkdir()
    place.root.mkdir()
    place.folder.symlink_to(place.elsewhere)
    assert place.run() == 0
    assert miniature.files_of(place.elsewhere) == miniature.files_of(place.true)


def test_a_changed_list_in_a_linked_folder_of_the_set_is_left(server: Loopback, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """The repository with the captions, linked as audiocaps/dataset, and a list changed there: never without being
    asked, since it is no folder of the set."""
    place = Place("audiocaps", tmp_path, server)
    shutil.copytree(place.true / "dataset", place.elsewhere)
    own = changed((place.elsewhere / "train.csv").read_bytes())
    (place.elsewhere / "train.csv").write_bytes(own)
    place.folder.mkdir(parents=True)
    (place.folder / "dataset").symlink_to(place.elsewhere)
    assert place.run() == place.done
    assert (place.elsewhere / "train.csv").read_bytes() == own
    assert sorted(path.name for path in place.elsewhere.iterdir()) == ["test.csv", "train.csv", "val.csv"]
    assert "dataset/train.csv" in rows_told(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "link"), [("coco", "val2017"), ("clotho", "evaluation"), ("audiocaps", "test"),
                                            ("voxceleb", "voxceleb1"), ("voxceleb", "voxceleb1/wav")])
def test_a_linked_folder_that_lacks_files_is_told_before_anything_is_fetched(
        name: str, link: str, server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(name, tmp_path, server)
    put(place.elsewhere / "own.txt", b"of the user")
    (place.folder / link).parent.mkdir(parents=True)
    (place.folder / link).symlink_to(place.elsewhere)
    assert place.run("--max-gb", "1") == 2
    assert str(place.folder / link) in capsys.readouterr().err
    assert not server.requests and [path.name for path in place.elsewhere.iterdir()] == ["own.txt"]


def rows_told(output: str) -> str:
    """The details below the table at the end."""
    assert rows(output)
    return output.rpartition("data set ")[2]


def test_archives_that_came_by_us_go_and_those_of_the_user_stay(server: Loopback, tmp_path: Path) -> None:
    place = Place("coco", tmp_path, server)
    put(place.folder / "archives/val2017.zip", place.served["val2017.zip"])
    assert place.run() == 0
    assert [path.name for path in (place.folder / "archives").iterdir()] == ["val2017.zip"]
    assert "/coco/val2017.zip" not in dict(server.requests) and QUICK.failures == 1


def test_archives_that_were_to_be_kept_stay_for_good(server: Loopback, tmp_path: Path) -> None:
    place = Place("coco", tmp_path, server)
    assert place.run("--keep-archives") == 0
    kept = {name: (place.folder / "archives" / name).read_bytes() for name in place.served}
    assert kept == place.served
    for words in ((), ("--skip-existing",), ("--verify",)):
        assert place.run(*words) in (0, 3)  # a picture of noise cannot be opened
        assert {name: (place.folder / "archives" / name).read_bytes() for name in place.served} == kept


def test_links_of_an_earlier_copy_make_way_and_links_of_the_user_do_not(server: Loopback, tmp_path: Path) -> None:
    place = Place("voxceleb", tmp_path, server)
    first, second = tmp_path / "first", tmp_path / "second"
    for copy in (first, second):
        shutil.copytree(place.true / "voxceleb1/wav", copy)
    speakers = sorted(path.name for path in first.iterdir())
    wav = place.folder / "voxceleb1/wav"
    wav.mkdir(parents=True)
    (wav / speakers[0]).symlink_to(tmp_path / "of the user")
    for copy in (first, second, first):
        place.run("--local", str(copy))
        assert {name: (wav / name).readlink() for name in speakers} == {
            name: copy / name if name != speakers[0] else tmp_path / "of the user" for name in speakers}
