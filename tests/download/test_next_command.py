"""The command that a download ends with works: each one that is printed is run, or opens the data as training does."""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import download_datasets
import run_training
from datasets import load_data
from tests import miniature, trees
from tests.loopback import Loopback
from tests.project import ROOT
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download.http import Policy
from trimodal.download.state import ENOUGH, trainable
from trimodal.sets import SOURCES
from trimodal.sets.base import Source
from trimodal.sets.lists import training_files
from trimodal.training.stage import active_tasks

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)
SMALL = ["model.size=nano", f"model.word_embeddings=file:{ROOT / 'tests/words.json'}", "model.vocab_size=1",
         "model.image_size=32", "model.context_length=12", "model.embed_dim=8", "data.workers=0",
         "data.audio_max_s=0.5"]
MAKERS: dict[str, Callable[[Path], tuple[Source, dict[str, bytes]]]] = {
    "coco": miniature.coco, "clotho": miniature.clotho, "voxceleb": miniature.voxceleb, "stamps": miniature.stamps,
    "audiocaps": lambda folder: miniature.audiocaps(folder, shards=True)}


class Sets:
    """Miniatures of all sets on a server, to be downloaded to `root`."""

    def __init__(self, folder: Path, server: Loopback) -> None:
        self.root, self.table, self.flags, self.output = folder / "my data", dict(SOURCES), [], ""
        for name, make in MAKERS.items():
            self.table[name], served = make(folder / "true")
            server.files |= {f"/{name}/{file}": data for file, data in served.items()}
            self.flags += [f"--base-url={name}={server.url(f'/{name}')}"]

    def get(self, name: str, *words: str) -> int:
        flags = [flag for flag in self.flags if flag.startswith(f"--base-url={name}=")]
        return self.run(["--datasets", name, "--data-root", str(self.root), *flags, *words])

    def run(self, words: list[str]) -> int:
        return download_datasets.main(words, table=self.table, policy=QUICK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Loopback, Sets]]:
    folder = tmp_path_factory.mktemp("sets")
    with Loopback() as server:
        yield folder, server, Sets(folder, server)


@pytest.fixture
def sets(made: tuple[Path, Loopback, Sets], tmp_path: Path) -> Sets:
    made[2].root = tmp_path / "my data"
    return made[2]


def next_words(output: str) -> list[str]:
    """The command of the table's only row."""
    row = output.rpartition("data set ")[2].splitlines()[1]
    return shlex.split(re.split(r" {2,}", row, maxsplit=2)[2])


def opens(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that training asks of the data before its first step, for every stage."""
    assert words[:2] == ["python", "run_training.py"]
    monkeypatch.chdir(ROOT)
    config = run_training.configuration(run_training.parse([*words[2:], *SMALL]))
    data = load_data(config)
    for row in config.stages:
        assert active_tasks(row, data)[0]


@pytest.mark.parametrize(("name", "words"), [
    ("coco", []), ("clotho", []), ("stamps", []), ("voxceleb", []), ("voxceleb", ["--also", "voxceleb:vox2-aac"]),
    ("audiocaps", []), ("clotho", ["--splits", "train"]), ("clotho", ["--sample", "5"]), ("coco", ["--sample", "5"]),
    ("voxceleb", ["--splits", "train", "val"]), ("audiocaps", ["--splits", "train"])], ids=str)
def test_a_set_is_trained_on_as_it_is_told(sets: Sets, name: str, words: list[str], monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert sets.get(name, *words) in (0, 3)
    opens(next_words(capsys.readouterr().out), monkeypatch)


@pytest.mark.parametrize(("name", "words"), [
    *((name, ["--splits", "test"]) for name in ("clotho", "voxceleb", "audiocaps")),
    *((name, ["--sample", "1"]) for name in ("clotho", "coco", "audiocaps", "stamps")),
    *((name, ["--max-gb", "0.000001"]) for name in ("clotho", "coco", "voxceleb", "audiocaps"))], ids=str)
def test_what_is_too_little_to_train_on_is_completed_first(
        sets: Sets, name: str, words: list[str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert sets.get(name, *words) in (0, 3)
    more = next_words(capsys.readouterr().out)
    assert more[:4] == ["python", "download_datasets.py", "--datasets", name] and not {*words} & {*more}
    assert sets.run(more[2:]) in (0, 3)
    opens(next_words(capsys.readouterr().out), monkeypatch)


def test_looking_at_all_bytes_ends_with_the_same_command(sets: Sets, capsys: pytest.CaptureFixture[str]) -> None:
    for words, script in (["--splits", "test"], "download_datasets.py"), (["--splits", "train"], "run_training.py"):
        sets.get("clotho", *words)
        told = next_words(capsys.readouterr().out)
        assert sets.get("clotho", *words, "--verify") == 0
        assert next_words(capsys.readouterr().out) == told and told[1] == script


@pytest.mark.parametrize("name", ["clotho", "voxceleb"])
def test_the_printed_command_trains(sets: Sets, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """The real script, on one epoch of the miniature: report and all."""
    assert sets.get(name) == 0
    words = next_words(capsys.readouterr().out)
    monkeypatch.chdir(ROOT)
    quick = ["--output-dir", str(tmp_path / "out"), "--device", "cpu", "--epochs", "3", "memory.micro_batch=16",
             "training.batch_size=16", "training.gradient_accumulation_steps=1", "training.use_amp=false",
             "evaluation.resamples=0", "report.gallery_queries=0"]
    assert run_training.main([*words[2:], *quick, *SMALL]) == 0
    assert list((tmp_path / "out/reports").glob("report_*.json"))


def test_pictures_count_as_the_reader_takes_them(tmp_path: Path) -> None:
    """By Karpathy's list, whose sides lie in both folders; without it by that of train2017."""
    root = trees.coco(tmp_path)
    config = config_from_dict({"paths": {"data_root": str(tmp_path)}})
    read = {Path(sample.image).name for sample in all_sets.read_split("coco", "train", config)}
    assert set(training_files(SOURCES["coco"], root) or ()) == read and len(read) >= ENOUGH
    for path in (root / "train2017").iterdir():
        path.unlink()
    (root / "annotations/dataset_coco.json").unlink()
    assert not trainable(SOURCES["coco"], root)


def test_speakers_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    root = trees.voxceleb(tmp_path, vox2=False)
    for listed in (True, False):
        names = list(training_files(SOURCES["voxceleb"], root) or ())
        assert {name.split("/")[0] for name in names} == {"id10001", "id10002"} and len(names) == (3 if listed else 9)
        (root / "voxceleb1/iden_split.txt").unlink(missing_ok=True)
    wav = root / "voxceleb1/wav"
    (wav / "id10001").rename(wav / "id10271")
    (wav / "id10002").rename(wav / "id10272")
    assert not trainable(SOURCES["voxceleb"], root)


def test_every_set_is_known() -> None:
    assert all(source.training_files or source.lists for source in SOURCES.values())
    assert all((ROOT / source.recipe).is_file() for source in SOURCES.values() if source.recipe)


def test_a_new_set_ends_with_the_command_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of which no list is known."""
    source, served = miniature.shrink("coco", {"val2017.zip": {"val2017/1.txt": b"a file"}}, tmp_path)
    new = replace(source, name="new", required=(), lists=None, training_files=None)
    with Loopback() as server:
        server.files |= {f"/{name}": data for name, data in served.items()}
        words = ["--datasets", "new", "--data-root", str(tmp_path / "data"), "--base-url", f"new={server.url()}"]
        for more in [], ["--skip-existing"], ["--verify"]:
            assert download_datasets.main([*words, *more], table={"new": new},
                                          policy=QUICK) == 0
            assert next_words(capsys.readouterr().out)[:4] == ["python", "run_training.py", "--datasets", "new"]
