"""Getting one set: from servers, the package tool, or what the user has; stopped and resumed; never by half."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import miniature, packing, trees
from tests.loopback import Loopback
from tests.refusals import assert_names
from trimodal.download.acquire import Outcome, acquire, open_job
from trimodal.download.http import Policy
from trimodal.download.selection import Options, Selection
from trimodal.files import locked
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import Count, File, Item, Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def options(folder: Path, server: Loopback | None = None, **settings: Any) -> Options:
    """Everything from the loopback server; without one, from nowhere."""
    url = server.url() if server else "http://127.0.0.1:9"
    bases = {name: f"{url}/{name}" for name in SOURCES}
    return Options(**{"data_root": folder / "data", "base_urls": bases, "policy": QUICK, **settings})


def serve(server: Loopback, pair: tuple[Source, dict[str, bytes]]) -> Source:
    source, served = pair
    server.files |= {f"/{source.name}/{name}": data for name, data in served.items()}
    return source


def run(source: Source, settings: Options) -> Outcome:
    return acquire(source, settings)


def small(server: Loopback, **files: bytes) -> Source:
    """A set of one zip with these files in the folder val2017."""
    members = {f"val2017/{name}": data for name, data in files.items()}
    source, served = miniature.shrink("coco", {"val2017.zip": members}, Path("/nonexistent"))
    item = replace(source.items[0], counts=(Count(folder="val2017", suffix="", number=len(files)),))
    return serve(server, (replace(source, items=(item,)), served))


# --- Again, and again after an interruption --------------------------------------------------------------------------


def test_second_run_asks_for_nothing(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"2")
    assert run(source, options(tmp_path, server)).state == "done"
    asked = len(server.requests)
    assert run(source, options(tmp_path, server)).state == "done"
    assert run(source, options(tmp_path, server, skip_existing=True)).state == "skipped"
    assert len(server.requests) == asked == 1


def test_what_is_gone_is_fetched_again(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"2")
    run(source, options(tmp_path, server))
    for skip_existing in (True, False):
        (tmp_path / "data/coco/val2017/a").unlink()
        assert run(source, options(tmp_path, server, skip_existing=skip_existing)).state == "done"
        assert (tmp_path / "data/coco/val2017/a").read_bytes() == b"1"


def test_only_the_thorough_look_sees_a_changed_file(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"2")
    run(source, options(tmp_path, server))
    (tmp_path / "data/coco/val2017/a").write_bytes(b"")
    assert run(source, options(tmp_path, server, skip_existing=True)).state == "skipped"
    assert run(source, options(tmp_path, server)).state == "done"
    assert (tmp_path / "data/coco/val2017/a").read_bytes() == b"1"


def test_a_plain_file_is_hashed_again(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.clotho(tmp_path / "true"))
    run(source, options(tmp_path, server))
    path = tmp_path / "data/clotho/clotho_captions_evaluation.csv"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + b"x")
    server.requests.clear()
    assert run(source, options(tmp_path, server)).state == "done"
    assert path.read_bytes() == right and [name for name, _ in server.requests] == [f"/clotho/{path.name}"]


def test_a_folder_without_marker_is_not_trusted(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"2", c=b"3")
    (tmp_path / "data/coco/val2017").mkdir(parents=True)
    (tmp_path / "data/coco/val2017/a").write_bytes(b"half")
    (tmp_path / "data/coco/val2017/own").write_bytes(b"own")
    outcome = run(source, options(tmp_path, server, skip_existing=True))
    assert outcome.state == "done"
    assert_names(outcome.detail, "val2017", 4, 3)
    found = {path.name: path.read_bytes() for path in (tmp_path / "data/coco/val2017").iterdir()}
    (aside,) = (name for name in found if name.startswith("a.before_"))
    assert found == {"a": b"1", "b": b"2", "c": b"3", "own": b"own", aside: b"half"}


def test_what_another_program_unpacked_is_taken_over(server: Loopback, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """If the number of files is right, none is empty, and all together they are not far too small."""
    source = small(server, a=b"1" * 99, b=b"2")
    folder = tmp_path / "data/coco/val2017"
    folder.mkdir(parents=True)
    for a, b in ((b"1" * 99, b""), (b"1", b"2")):
        (folder / "a").write_bytes(a)
        (folder / "b").write_bytes(b)
        assert run(source, options(tmp_path)).code == 1
    (folder / "a").write_bytes(b"1" * 99)
    capsys.readouterr()
    assert run(source, options(tmp_path)).state == "done"
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "val2017.zip" in line]
    assert_names(told, "coco", "val2017.zip", 2)
    marker = inventory.read_marker(tmp_path / "data/coco")
    assert marker["items"]["val2017.zip"] == {"sha256": [], "checked": [], "adopted": True, "files": 2,
                                              "bytes": 100}


def test_stopped_before_the_marker_was_written(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"")
    run(source, options(tmp_path, server))
    written = inventory.read_marker(tmp_path / "data/coco")
    (tmp_path / "data/coco" / inventory.MARKER).unlink()
    assert run(source, options(tmp_path, skip_existing=True)).state == "done"
    assert inventory.read_marker(tmp_path / "data/coco") == written


def test_what_a_killed_run_left_is_gone_in_the_end(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1", b=b"")
    run(source, options(tmp_path, server))
    folder = tmp_path / "data/coco"
    before = sorted(path.name for path in folder.iterdir())
    archive = f".unpacking/val2017.zip-{16 * 'a'}"
    for name in (".downloaded.json.123.tmp", "archives/val2017.zip.part", "archives/val2017.zip.part.json",
                 "archives/val2017.zip.lock", ".download.lock", f"{archive}/x", f"{archive}.writing"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert run(source, options(tmp_path, server)).state == "done"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_lock_of_a_list_that_a_killed_run_left_is_gone_in_the_end(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.clotho(tmp_path / "true"))
    run(source, options(tmp_path, server))
    item = next(item for item in source.items if item.kind == "plain")
    lock = tmp_path / "data/clotho" / f"{item.into}.lock"
    lock.touch()
    assert run(source, options(tmp_path, server)).state == "done" and not lock.exists()


def test_stopped_between_two_renames(server: Loopback, tmp_path: Path) -> None:
    """The list of contents is there, a part of the files is not: the item counts as missing."""
    source = small(server, a=b"1", b=b"")
    run(source, options(tmp_path, server))
    (tmp_path / "data/coco" / inventory.MARKER).unlink()
    (tmp_path / "data/coco/val2017/b").unlink()
    assert [item.name for item in open_job(source, options(tmp_path)).state.todo()] == ["val2017.zip"]
    assert run(source, options(tmp_path, server)).state == "done"
    assert (tmp_path / "data/coco/val2017/b").exists()


def test_an_item_that_is_whole_survives_the_failure_of_the_next(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.coco(tmp_path / "true"))
    train = server.files.pop("/coco/train2017.zip")
    outcome = run(source, options(tmp_path, server))
    assert (outcome.state, outcome.code) == ("failed", 1) and "train2017.zip" in outcome.detail
    marker = inventory.read_marker(tmp_path / "data/coco")
    assert len(marker["items"]) == 3 and not marker["complete"]
    server.requests.clear()
    server.files["/coco/train2017.zip"] = train
    assert run(source, options(tmp_path, server)).state == "done"
    assert [name for name, _ in server.requests] == ["/coco/train2017.zip"]


@pytest.mark.parametrize("keep", [True, False])
def test_archives_are_kept_or_not(server: Loopback, tmp_path: Path, keep: bool) -> None:
    source = small(server, a=b"1")
    run(source, options(tmp_path, server, keep_archives=keep))
    assert (tmp_path / "data/coco/archives/val2017.zip").exists() == keep
    assert (tmp_path / "data/coco/archives").exists() == keep and not (tmp_path / "data/coco/.unpacking").exists()
    if keep:
        shutil.rmtree(tmp_path / "data/coco/val2017")
        assert run(source, options(tmp_path)).state == "done"


def test_a_damaged_archive_of_right_digest_is_reported_in_one_line(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1")
    broken = server.files["/coco/val2017.zip"][:-30]
    server.files["/coco/val2017.zip"] = broken
    file = File(name="val2017.zip", urls=(("official", "http://x"),), size=len(broken))
    source = replace(source, items=(replace(source.items[0], files=(file,)),))
    outcome = run(source, options(tmp_path, server))
    assert outcome.code == 1
    assert_names(outcome.detail, "val2017.zip", "BadZipFile")


def test_fewer_files_than_published_are_not_all(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1")
    item = replace(source.items[0], counts=(Count(folder="val2017", suffix="", number=2),))
    outcome = run(replace(source, items=(item,)), options(tmp_path, server))
    assert (outcome.state, outcome.code) == ("partial", 1)
    assert_names(outcome.detail, "val2017", 1, 2)


# --- Checks beforehand -----------------------------------------------------------------------------------------------


def test_space_is_checked_before_anything_is_fetched(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1")
    source = replace(source, items=(replace(source.items[0], unpacked=10**18),))
    outcome = run(source, options(tmp_path, server))
    assert outcome.code == 2 and server.requests == []
    assert_names(outcome.detail, tmp_path / "data", "1,000,000,000.0 GB")


def test_peak_bytes_counts_an_archive_only_while_it_is_needed(tmp_path: Path) -> None:
    items = [Item(name=str(i), kind="zip", into="", unpacked=50, files=(File(name=str(i), urls=(), size=100),))
             for i in range(3)]
    one = Selection(SOURCES["coco"], options(tmp_path, jobs=1))
    assert one.peak_bytes(items) == 50 + 2 * 100 + 50  # the next one arrives while the second is unpacked
    keeping = Selection(SOURCES["coco"], options(tmp_path, jobs=1, keep_archives=True))
    assert keeping.peak_bytes(items) == 3 * 150


def test_two_downloads_of_a_set_exclude_each_other(server: Loopback, tmp_path: Path) -> None:
    source = small(server, a=b"1")
    (tmp_path / "data/coco").mkdir(parents=True)
    with locked(tmp_path / "data/coco/.download"):
        outcome = run(source, options(tmp_path, server))
    assert (outcome.state, outcome.code, server.requests) == ("failed", 2, [])
    assert_names(outcome.detail, tmp_path / "data/coco")
    assert run(source, options(tmp_path, server)).state == "done"


def test_a_missing_package_is_named_before_its_archive_is_fetched(server: Loopback, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    source = serve(server, miniature.clotho(tmp_path / "true"))
    monkeypatch.setitem(sys.modules, "py7zr", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = run(source, options(tmp_path, server))
    assert outcome.code == 2
    assert_names(outcome.detail, "pip install py7zr")
    assert not [name for name, _ in server.requests if name.endswith(".7z")]


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_voxceleb_without_key_is_told_what_to_do(tmp_path: Path) -> None:
    outcome = run(SOURCES["voxceleb"], options(tmp_path, base_urls={}))
    assert (outcome.state, outcome.code) == ("needs key", 2)
    assert_names(outcome.detail, "VOXCELEB_KEY", "https://cn01.mmai.io/keyreq/voxceleb", "--local")
    assert outcome.next_command.startswith("VOXCELEB_KEY=YOUR_KEY python download_datasets.py --datasets voxceleb")
    assert not (tmp_path / "data/voxceleb").exists()


def test_voxceleb_with_key(server: Loopback, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The key is sent to the server, and is in no output, file or outcome, whether it goes well or not."""
    source, served = miniature.voxceleb(tmp_path / "true")
    source = replace(source, items=tuple(replace(item, files=tuple(
        replace(file, urls=(("official", server.url(f"/{file.name}") + "?key={key}"),)) for file in item.files))
        for item in source.items))
    server.files |= {f"/{name}": data for name, data in served.items()}
    settings = options(tmp_path, base_urls={}, keys={source.needs_key: "s3cr3t"}, also={"voxceleb": ("vox2-aac",)})
    server.faults["/vox1_dev_wav_partac"] = ["page"]
    failed = run(source, settings)
    assert failed.code == 1
    assert_names(failed.detail, "vox1_dev_wav_partac", "VOXCELEB_KEY")
    done = run(source, settings)
    assert done.state == "done", done.detail
    output = capfd.readouterr()
    files = "".join(path.read_text("latin-1") for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert "s3cr3t" not in output.out + output.err + files + str(failed) + str(done)
    assert not list((tmp_path / "data/voxceleb").glob("archives/*"))


# --- The package tool and alternatives -------------------------------------------------------------------------------


def fake_apt(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An apt-get that runs `body`, with `package` set to what is asked for; it stands alone on PATH."""
    script = folder / "bin/apt-get"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\nassert sys.argv[1] == 'download'\n"
                      f"package = sys.argv[2]\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))


def stamps(folder: Path, server: Loopback | None = None) -> tuple[Source, dict[str, bytes]]:
    """The miniature stamps, the tarball from `server` instead of its real address."""
    source, served = miniature.stamps(folder / "true")
    deb, tarball = source.items
    url = server.url(f"/{tarball.name}") if server else "http://127.0.0.1:9/"
    if server:
        server.files[f"/{tarball.name}"] = served[tarball.name]
    tarball = replace(tarball, files=(replace(tarball.files[0], urls=(("official", url),)),))
    return replace(source, items=(deb, tarball)), served


def assert_stamps(folder: Path) -> None:
    expected = miniature.files_of(folder / "true/stamps")
    assert miniature.files_of(folder / "data/stamps") == {**expected, "COPYRIGHT": b"GPL-2"}
    assert "GPL-2" in (folder / "data/stamps/LICENCE.txt").read_text()


def test_stamps_by_the_package_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, served = stamps(tmp_path)
    deb = source.items[0].files[0]
    (tmp_path / "made.deb").write_bytes(served[deb.name])
    fake_apt(tmp_path, f"assert package == 'tuxpaint-stamps-default=2022.06.04-1'\n"
                       f"shutil.copy({str(tmp_path / 'made.deb')!r}, 'package.deb')", monkeypatch)
    outcome = run(source, options(tmp_path, base_urls={}))
    assert outcome.state == "done" and outcome.code == 0, outcome.detail
    assert_stamps(tmp_path)
    record = json.loads((tmp_path / "data/stamps/.downloaded.json").read_text())["items"][deb.name]
    assert record["checked"] == [f"sha256:{deb.sha256}"]
    assert record["files"] == len(miniature.files_of(tmp_path / "true/stamps")) + 1
    assert run(source, options(tmp_path, base_urls={}, skip_existing=True)).state == "skipped"


@pytest.mark.parametrize(("body", "named"), [
    ("sys.exit('E: Version 2022.06.04-1 for tuxpaint-stamps-default was not found')",
     "E: Version 2022.06.04-1 for tuxpaint-stamps-default was not found"),
    ("pathlib.Path('tuxpaint-stamps-default_2099.deb').write_bytes(b'!<arch>')", "7 bytes"),
    ("pass", "tuxpaint-stamps-default=2022.06.04-1"),
], ids=["fails", "another release", "brings nothing"])
def test_stamps_from_the_tarball_where_the_package_tool_fails(server: Loopback, tmp_path: Path, body: str, named: str,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = stamps(tmp_path, server)
    fake_apt(tmp_path, body, monkeypatch)
    outcome = run(source, options(tmp_path, base_urls={}))
    assert outcome.code == 0 and outcome.state == "done", outcome.detail
    assert_stamps(tmp_path)
    told = next(line for line in capsys.readouterr().out.splitlines() if "apt-get" in line)
    assert_names(told, named)


@pytest.mark.parametrize("fits", [False, True], ids=["another release", "the release"])
def test_a_package_of_the_user_is_kept(tmp_path: Path, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, served = stamps(tmp_path)
    deb = source.items[0].files[0].name
    own = tmp_path / "data/stamps/archives" / deb
    own.parent.mkdir(parents=True)
    own.write_bytes(b"of the user")
    (tmp_path / "made.deb").write_bytes(served[deb] if fits else b"!<arch>")
    fake_apt(tmp_path, f"shutil.copy({str(tmp_path / 'made.deb')!r}, 'package.deb')", monkeypatch)
    assert run(source, options(tmp_path, base_urls={})).code == (0 if fits else 1)
    (kept,) = own.parent.iterdir()
    assert kept.read_bytes() == b"of the user" and (kept == own) is not fits


def test_stamps_from_nowhere_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = stamps(tmp_path)
    monkeypatch.setenv("PATH", "")
    outcome = run(source, options(tmp_path, base_urls={}))
    assert outcome.code == 1
    assert_names(outcome.detail, "apt-get", "127.0.0.1:9", "--local")


@pytest.mark.parametrize("number", [0, 1])
def test_stamps_from_a_local_file(tmp_path: Path, number: int) -> None:
    source, served = stamps(tmp_path)
    local = tmp_path / "renamed"
    local.write_bytes(served[source.items[number].name])
    outcome = run(source, options(tmp_path, base_urls={}, local={"stamps": local}))
    assert outcome.state == "done", outcome.detail
    assert_stamps(tmp_path)
    assert local.exists()


def test_another_release_of_the_stamps_is_refused(tmp_path: Path) -> None:
    source, _ = stamps(tmp_path)
    local = tmp_path / "tuxpaint-stamps-default_2031.deb"
    local.write_bytes(packing.deb_of({"./usr/share/tuxpaint/stamps/a.png": b""}))
    outcome = run(source, options(tmp_path, base_urls={}, local={"stamps": local}))
    assert outcome.code == 2 and not (tmp_path / "data/stamps/a.png").exists()
    assert_names(outcome.detail, local, source.items[0].files[0].sha256)


# --- What the user has -----------------------------------------------------------------------------------------------


def test_archives_of_the_user_are_used_and_kept(tmp_path: Path) -> None:
    """One folder down, one of the multi-part archives put together already."""
    source, served = miniature.voxceleb(tmp_path / "true")
    own = tmp_path / "own/vox1"
    own.mkdir(parents=True)
    parts = [data for name, data in sorted(served.items()) if name.startswith("vox1_dev_wav_part")]
    assert len(parts) == 4
    (own / "vox1_dev_wav.zip").write_bytes(b"".join(parts))
    for name in ("vox1_test_wav.zip", "vox1_meta.csv", "iden_split.txt", "veri_test2.txt"):
        (own / name).write_bytes(served[name])
    before = miniature.files_of(tmp_path / "own")
    outcome = run(source, options(tmp_path, base_urls={}, local={"voxceleb": tmp_path / "own"}))
    assert (outcome.state, outcome.code) == ("done", 0), outcome.detail
    assert miniature.files_of(tmp_path / "own") == before
    assert miniature.files_of(tmp_path / "data/voxceleb", "voxceleb1/wav") == miniature.files_of(
        tmp_path / "true/voxceleb", "voxceleb1/wav")


def test_one_archive_of_the_user_stands_for_itself_only(server: Loopback, tmp_path: Path) -> None:
    source, served = miniature.coco(tmp_path / "true")
    serve(server, (source, served))
    local = tmp_path / "val2017.zip"
    local.write_bytes(served[local.name])
    outcome = run(source, options(tmp_path, server, local={"coco": local}))
    assert outcome.state == "done", outcome.detail
    assert f"/coco/{local.name}" not in {name for name, _ in server.requests} and local.exists()


def test_a_damaged_archive_of_the_user_is_named(tmp_path: Path) -> None:
    source, _ = miniature.voxceleb(tmp_path / "true")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/vox1_test_wav.zip").write_bytes(b"PK")
    outcome = run(source, options(tmp_path, local={"voxceleb": tmp_path / "own"}))
    assert outcome.code == 2
    assert_names(outcome.detail, tmp_path / "own/vox1_test_wav.zip", 2)


def test_recordings_of_the_user_are_linked_and_the_lists_fetched(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.voxceleb(tmp_path / "true"))
    wav = tmp_path / "true/voxceleb/voxceleb1/wav"
    settings = options(tmp_path, server, local={"voxceleb": wav.rename(tmp_path / "own")})
    outcome = run(source, settings)
    assert (outcome.state, outcome.code) == ("done", 0), outcome.detail
    assert (tmp_path / "data/voxceleb/voxceleb1/wav/id10001").is_symlink()
    for skip_existing, state in ((True, "skipped"), (False, "done")):  # no --local, no key, no need of them
        assert run(source, options(tmp_path, server, skip_existing=skip_existing)).state == state
    assert not [name for name, _ in server.requests if "_wav" in name]


def test_recordings_of_the_user_are_of_use_without_the_lists(tmp_path: Path) -> None:
    source, _ = miniature.voxceleb(tmp_path / "true")
    local = tmp_path / "true/voxceleb/voxceleb1/wav"
    outcome = run(source, options(tmp_path, local={"voxceleb": local}))
    assert (outcome.state, outcome.code) == ("partial", 3)
    assert_names(outcome.detail, "vox1_meta.csv", "iden_split.txt", "veri_test2.txt")


def test_a_local_folder_without_the_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    outcome = run(SOURCES["voxceleb"], options(tmp_path, local={"voxceleb": tmp_path / "own"}))
    assert outcome.code == 2
    assert_names(outcome.detail, "--local", tmp_path / "own")


def test_sounds_of_the_user_for_audiocaps(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.audiocaps(tmp_path / "true"))
    outcome = run(source, options(tmp_path, server, local={"audiocaps": tmp_path / "true/audiocaps"}))
    there = {split: sum(bool(name) for *_, name in clips) for split, clips in trees.AUDIOCAPS.items()}
    assert (outcome.state, outcome.code) == ("partial", 3)
    assert inventory.read_marker(tmp_path / "data/audiocaps")["counts"] == there
    assert run(source, options(tmp_path, server, skip_existing=True)).state == "skipped"


def test_sounds_from_shards_come(server: Loopback, tmp_path: Path) -> None:
    source = serve(server, miniature.audiocaps(tmp_path / "true", shards=True))
    outcome = run(source, options(tmp_path, server))
    assert (outcome.state, outcome.code) == ("partial", 3), outcome.detail
    for split in ("train", "val", "test"):
        clips = {f"{video}_{start}" for video, start, _ in trees.AUDIOCAPS[split]}
        for path in (tmp_path / "data/audiocaps" / split).iterdir():
            assert path.stem in clips
            assert path.read_bytes() == (tmp_path / "true/audiocaps" / split / path.name).read_bytes()


def test_a_list_of_unexpected_length_is_mentioned(server: Loopback, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    source, served = miniature.audiocaps(tmp_path / "true")
    items = tuple(replace(item, files=(replace(item.files[0], size=0, sha256=""),)) for item in source.items
                  if item.name == "dataset2.0/train.csv")
    outcome = run(serve(server, (replace(source, items=items, partly=()), served)), options(tmp_path, server))
    assert outcome.code == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "91,256" in line]
    assert_names(told, "dataset2.0/train.csv", 16)


def test_nothing_is_written_where_writing_is_not_possible(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/coco").write_text("a file")
    outcome = run(small(server, a=b"1"), options(tmp_path, server))
    assert outcome.code == 2
    assert_names(outcome.detail, tmp_path / "data/coco")
