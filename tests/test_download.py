"""The command: from an empty folder to sets that the readers read, and one clear line for all that goes wrong."""

import json
import pickle
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import download_datasets
from tests import miniature
from tests.data.test_cache import wait_for
from tests.loopback import Loopback
from tests.project import ROOT
from tests.refusals import assert_names, assert_told
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download.http import Policy
from trimodal.sets import ALL, SOURCES
from trimodal.sets.base import Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)
MAKERS: dict[str, Callable[[Path], tuple[Source, dict[str, bytes]]]] = {
    "coco": miniature.coco, "clotho": miniature.clotho, "audiocaps": miniature.audiocaps,
    "voxceleb": miniature.voxceleb, "stamps": miniature.stamps}


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VOXCELEB_KEY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def tables(folder: Path, server: Loopback, *names: str) -> tuple[dict[str, Source], list[str]]:
    """Miniatures of these sets, served, and the flags that lead to them."""
    table, flags = dict(SOURCES), []
    for name in names:
        table[name], served = MAKERS[name](folder)
        server.files |= {f"/{name}/{file}": data for file, data in served.items()}
        flags += ["--base-url", f"{name}={server.url(f'/{name}')}"]
    return table, flags


def run(*words: str, table: dict[str, Source] | None = None) -> int:
    try:
        return download_datasets.main(words, table=table or SOURCES, policy=QUICK)
    except SystemExit as end:  # of the arguments
        return int(end.code or 0)


def rows(output: str) -> dict[str, tuple[str, str]]:
    """name -> (state, next command) of the table at the very end."""
    lines = output.rpartition("data set ")[2].splitlines()[1:]
    return {name: (state, command) for name, state, command in
            (re.split(r" {2,}", line, maxsplit=2) for line in lines if not line.startswith(" "))}


# --- From nothing to sets that are read ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "also", "data"), [
    ("coco", (), {}), ("coco", (), {"coco_split": "2017"}), ("clotho", (), {}), ("stamps", (), {}),
    ("voxceleb", ("--also", "voxceleb:vox2-aac"), {})])
def test_what_arrives_is_what_the_readers_read(server: Loopback, tmp_path: Path, name: str, also: tuple[str, ...],
                                               data: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of every split is the same as in the tree that the archives were made from."""
    monkeypatch.setenv("PATH", "")  # no system tools: the stamps come by --base-url, 7z by py7zr
    table, flags = tables(tmp_path / "true", server, name)
    assert run("--datasets", name, "--data-root", str(tmp_path / "got"), *flags, *also, table=table) == 0

    def samples(root: Path) -> list[tuple[object, ...]]:
        config = config_from_dict({"paths": {"data_root": str(root)}, "data": data})
        return [(s.key, s.split, s.captions, s.labels, s.speaker, *(Path(path).read_bytes() for path in
                                                                   (s.image, s.audio) if path))
                for split in ("train", "val", "test") for s in all_sets.read_split(name, split, config)]

    assert len(samples(tmp_path / "true")) > 5
    assert samples(tmp_path / "got") == samples(tmp_path / "true")


def test_sounds_of_audiocaps_that_the_user_has_are_read(server: Loopback, tmp_path: Path) -> None:
    table, flags = tables(tmp_path / "true", server, "audiocaps")
    assert run("--datasets", "audiocaps", "--data-root", str(tmp_path / "got"), *flags,
               "--local", str(tmp_path / "true/audiocaps"), table=table) == 3, "usable, and some clips are gone"
    for version in (1, 2):
        keys = []
        for root in ("true", "got"):
            config = config_from_dict({"paths": {"data_root": str(tmp_path / root)},
                                       "data": {"audiocaps_version": version}})
            keys.append([(s.key, s.captions, Path(s.audio).read_bytes()) for split in ("train", "val", "test")
                         for s in all_sets.read_split("audiocaps", split, config)])
        assert keys[0] == keys[1] and len(keys[0]) > 5


def test_all_goes_on_past_a_set_that_fails_and_ends_with_a_table(server: Loopback, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    table, flags = tables(tmp_path / "true", server, "coco", "clotho", "audiocaps")
    absent = server.files.pop("/clotho/clotho_audio_evaluation.7z")
    root = str(tmp_path / "my data")
    local = ["--local", f"audiocaps={tmp_path / 'true/audiocaps'}"]
    assert run("--datasets", "all", "synthetic", "--data-root", root, *flags, *local, table=table) == 1
    output = capsys.readouterr()
    table_rows = rows(output.out)
    assert {name: state for name, (state, _) in table_rows.items()} == {
        "coco": "done", "clotho": "failed", "audiocaps": "partial", "voxceleb": "needs key", "synthetic": "done"}
    clotho, voxceleb = (line for line in output.err.splitlines() if line.startswith("error: "))
    assert_names(clotho, "clotho", "clotho_audio_evaluation.7z")
    assert_names(voxceleb, "voxceleb", "VOXCELEB_KEY")
    assert table_rows["coco"][1] == f"python run_training.py --datasets coco --data-root '{root}'"

    server.files["/clotho/clotho_audio_evaluation.7z"] = absent
    words = shlex.split(table_rows["clotho"][1])  # the command that it names is the one that helps
    assert words[:2] == ["python", "download_datasets.py"]
    assert run(*words[2:], table=table) == 0


def test_skip_existing_and_a_second_run_ask_for_nothing(server: Loopback, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    table, flags = tables(tmp_path / "true", server, "coco", "clotho")
    words = ["--datasets", "coco", "clotho", "--data-root", str(tmp_path / "got"), *flags]
    assert run(*words, table=table) == 0
    server.requests.clear()
    assert run(*words, table=table) == 0
    assert {state for state, _ in rows(capsys.readouterr().out).values()} == {"done"}
    assert run(*words, "--skip-existing", table=table) == 0
    assert {state for state, _ in rows(capsys.readouterr().out).values()} == {"skipped"}
    assert server.requests == []


# --- Killed and run again --------------------------------------------------------------------------------------------

RUNNER = """
import pickle, sys, download_datasets
with open(sys.argv[1], "rb") as file:
    table = pickle.load(file)
sys.exit(download_datasets.main(sys.argv[2:], table=table))
"""

# For n = 1, 1 + STEP, ...: a child that dies before its n-th rename, then one that does not; prints what is there then.
KILLER = """
import itertools, json, os, pathlib, pickle, requests, shutil, signal, sys, tqdm, download_datasets
with open(sys.argv[1], "rb") as file:
    table = pickle.load(file)
replace, folder = os.replace, pathlib.Path(sys.argv[5]) / "coco"
os.fsync = lambda file: None  # the disk is not what dies here

def child(deadly):
    calls, members = itertools.count(1), itertools.count()
    def counted(*names):
        one_of_many = ".unpacking" in str(names[1]) and next(members) % 16  # a file of an archive
        if not one_of_many and next(calls) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*names)
    os.replace = counted
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(download_datasets.main(sys.argv[2:], table=table))

for deadly in itertools.count(1):
    shutil.rmtree(folder, ignore_errors=True)
    for turn in (deadly, 0):
        pid = os.fork() or child(turn)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL if turn else 0), status
        if turn and not status:
            sys.exit()  # fewer renames than that
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    print(json.dumps(sorted(str(name) for name in names if str(name)[0] != "." and str(name) != "LICENCE.txt")))
"""


@pytest.mark.timed
def test_killed_in_mid_transfer_then_run_again(server: Loopback, tmp_path: Path) -> None:
    table, flags = tables(tmp_path / "true", server, "coco")
    size = len(server.files["/coco/train2017.zip"])
    server.faults["/coco/train2017.zip"] = [f"stall:{size // 2}"]
    process, words = start(table, tmp_path, flags)
    part = tmp_path / "got/coco/archives/train2017.zip.part"
    try:
        wait_for(lambda: (part.exists() and part.stat().st_size) or process.poll() is not None)
    finally:
        process.kill()
    process.communicate()
    kept = part.stat().st_size
    assert run(*words, table=table) == 0
    assert_undisturbed(tmp_path)
    assert server.ranges("/coco/train2017.zip") == ["", f"bytes={kept}-"] and kept > 0


@pytest.mark.timed
def test_killed_before_any_rename_then_run_again(server: Loopback, tmp_path: Path) -> None:
    """Whatever is made durable becomes so by a rename: SIGKILL before the first, the second, and so on to the last."""
    table, flags = tables(tmp_path / "true", server, "coco")
    process, _ = start(table, tmp_path, flags, runner=KILLER)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    trees = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    expected = sorted(miniature.files_of(tmp_path / "true/coco"))
    assert len(trees) > 15 and all(tree == expected for tree in trees)
    assert_undisturbed(tmp_path)  # the last one, bytes and all


def start(table: dict[str, Source], folder: Path, flags: list[str],
          runner: str = "") -> tuple["subprocess.Popen[str]", list[str]]:
    """The command for COCO in a process of its own, with this table."""
    with (folder / "table").open("wb") as file:
        pickle.dump(table, file)
    words = ["--datasets", "coco", "--data-root", str(folder / "got"), *flags]
    command = [sys.executable, "-c", runner or RUNNER, str(folder / "table"), *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE), words


def assert_undisturbed(folder: Path) -> None:
    assert miniature.files_of(folder / "got/coco") == miniature.files_of(folder / "true/coco")
    assert sorted(path.name for path in (folder / "got/coco").iterdir()) == [
        ".contents", ".downloaded.json", "LICENCE.txt", "annotations", "train2017", "val2017"]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Processes started in the background ignore SIGINT, and so would those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timed
@pytest.mark.usefixtures("_interruptible")
def test_interrupted_by_the_user(server: Loopback, tmp_path: Path) -> None:
    table, flags = tables(tmp_path / "true", server, "coco")
    server.faults["/coco/train2017.zip"] = ["stall:1000"]
    process, _ = start(table, tmp_path, flags)
    try:
        wait_for(lambda: "/coco/train2017.zip" in dict(server.requests) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize(("flags", "is_kept"), [([], True), (["--status"], False), (["--verify"], False)])
def test_a_look_that_is_interrupted_says_nothing_of_transfers(
        flags: list[str], is_kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    for name in ("_get", "_show"):
        monkeypatch.setattr(download_datasets, name, interrupted)
    assert run("--datasets", "stamps", *flags) == 130
    assert ("kept" in capsys.readouterr().err) == is_kept


# --- Without a download ----------------------------------------------------------------------------------------------


def test_sets_without_a_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--datasets", "synthetic", "manifest", "--data-root", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert {name: state for name, (state, _) in rows(output).items()} == {"synthetic": "done", "manifest": "done"}
    assert "data.manifest" in output


def test_dry_run_names_all_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXCELEB_KEY", "s3cr3t")
    root = tmp_path / "data"
    names = [name for name in SOURCES if name not in ALL]
    assert run("--datasets", "all", *names, "synthetic", "--data-root", str(root), "--dry-run") == 0
    output = capsys.readouterr().out
    assert not root.exists() and "s3cr3t" not in output
    for text in ("train2017.zip: 19.34 GB", "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
                 "test-00000-of-00041.parquet", "key=***&file=vox1_dev_wav_partad",
                 "apt:tuxpaint-stamps-default=2022.06.04-1", "GPL-2"):
        assert text in output
    assert "test-00001-of-00041.parquet" not in output, "one shard stands for all of its folder"
    plans = re.split(r"^(?=\w+: )", output, flags=re.MULTILINE)[1:]
    sizes = {plan.partition(":")[0]: len(re.findall(r"[\d.,]+ [GM]B", plan.splitlines()[-1])) for plan in plans}
    assert sizes == {**dict.fromkeys(SOURCES, 3), "synthetic": 0}, "to fetch, needed and free"


@pytest.mark.parametrize(("words", "named"), [
    (["--datasets", "cocoo"], ("--datasets", "cocoo", "'coco'")),
    (["--datasets", "imagenet"], ("--datasets", "imagenet", "all", *SOURCES, "synthetic", "manifest")),
    ([], ("--datasets",)), (["--dataset", "coco"], ("--datasets",)),
    (["--datasets", "coco", "--nonsense"], ("--nonsense",)),
    (["--datasets", "coco", "--mirror", "h"], ("--mirror", "h")),
    (["--datasets", "coco", "--base-url", "clotho=http://x"], ("--base-url", "clotho=http://x", "NAME", "coco")),
    *((["--datasets", "coco", "--base-url", f"coco={url}"], ("--base-url", f"coco={url}"))
      for url in ("ftp://x", "http://[bad", "http://x:99999", "http:///x")),
    (["--datasets", "coco", "--sample", "5.5"], ("--sample", "5.5")),
    (["--datasets", "coco", "clotho", "--local", "/tmp"], ("--local", "/tmp", "NAME=/tmp")),
    (["--datasets", "voxceleb", "--local", "/no/such"], ("--local", "voxceleb=/no/such")),
    (["--datasets", "coco", "--also", "coco:2041"], ("--also", "coco:2041", "'coco:2017'")),
    (["--datasets", "stamps", "--local", __file__], ("stamps", __file__, SOURCES["stamps"].items[0].files[0].sha256)),
    (["--datasets", "voxceleb"], ("voxceleb", "VOXCELEB_KEY", "https://cn01.mmai.io/keyreq/voxceleb")),
])
def test_mistakes_of_the_user_are_one_line_and_2(tmp_path: Path, words: list[str], named: tuple[str, ...],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--data-root", str(tmp_path)) == 2
    assert_told(capsys.readouterr().err, *named)


def test_a_folder_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--datasets", "coco", "--data-root", "") == 2
    assert_told(capsys.readouterr().err, "--data-root")


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("--datasets", "coco", "--data-root", str(tmp_path / "file/data")) == 2
    assert_told(capsys.readouterr().err, "--data-root", tmp_path / "file/data")


def test_a_disk_that_fails_while_one_looks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    def fail(work: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "list.csv"))

    monkeypatch.setattr("trimodal.download.acquire.look", fail)
    assert run("--datasets", "coco", "--data-root", str(tmp_path), "--status") == 2
    assert_told(capsys.readouterr().err, tmp_path / "list.csv", "Permission denied")


def test_key_comes_from_the_environment_only(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = tables(tmp_path / "true", server, "voxceleb")
    monkeypatch.setenv("VOXCELEB_KEY", "k")
    monkeypatch.setenv("http_proxy", server.url())
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing gets out
    monkeypatch.setenv("no_proxy", "")
    assert run("--datasets", "voxceleb", "--data-root", str(tmp_path / "got"), table=table) == 1


def test_help_is_complete_and_needs_nothing_heavy() -> None:
    code = ("import sys, download_datasets\n"
            "try:\n    download_datasets.main(['--help'])\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'requests', 'tqdm', 'py7zr', 'pyarrow'} & set(sys.modules)))")
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    for flag in ("--datasets", "--data-root", "--skip-existing", "--dry-run", "--mirror", "--base-url", "--local",
                 "--also", "--keep-archives", "--insecure-tls"):
        assert re.search(rf"^ +{flag}\b", output, re.MULTILINE)
