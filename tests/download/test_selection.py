"""What was asked for: splits, a bound of bytes, addresses, and the command that asks for it again."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from download_datasets import parse
from trimodal.download.http import Policy
from trimodal.download.selection import Options, Selection, fetch_bytes, read_options
from trimodal.sets import SOURCES
from trimodal.sets.base import Item


def select(name: str, **settings: Any) -> Selection:
    return Selection(SOURCES[name], Options(**{"data_root": Path("data"), **settings}))


def names(items: list[Item]) -> set[str]:
    return {item.name for item in items}


def test_splits_leave_the_other_archives_out_and_never_a_list() -> None:
    clotho = names(select("clotho", splits=("test",)).items)
    assert {name for name in clotho if name.endswith(".7z")} == {"clotho_audio_evaluation.7z"}
    assert {name for name in clotho if name.endswith(".csv")} == {
        name for name in names(select("clotho").items) if name.endswith(".csv")}
    assert {item.into for item in select("audiocaps", splits=("val", "test")).items if item.kind == "parquet"} == {
        "val", "test"}
    assert "vox1_dev_wav.zip" not in names(select("voxceleb", splits=("test",)).items)
    assert "vox1_dev_wav.zip" in names(select("voxceleb", splits=("val",)).items)
    assert select("coco", splits=("val",)).items == select("coco").items, "each side lies in both archives"


@pytest.mark.parametrize(("name", "gb"), [("coco", 0.3), ("coco", 5), ("audiocaps", 1), ("audiocaps", 100),
                                          ("clotho", 2)])
def test_a_bound_of_bytes_holds_and_leaves_nothing_out_that_fits(name: str, gb: float) -> None:
    found, everything = select(name, max_gb=gb), select(name)
    assert fetch_bytes(found.items) <= gb * 1e9
    assert names(found.items) | names(found.left_out) == names(everything.items)
    room = gb * 1e9 - fetch_bytes(found.items)
    assert all(fetch_bytes([item]) > room for item in found.left_out)
    assert found.limited == bool(found.left_out) and not everything.limited


def test_a_bound_takes_shards_of_each_split_in_turn() -> None:
    shards = [item for item in select("audiocaps", max_gb=3).items if item.kind == "parquet"]
    each = [sum(item.into == split for item in shards) for split in ("train", "val", "test")]
    assert min(each) >= 10 and max(each) - min(each) <= 1


def test_sounds_from_youtube_need_no_shards() -> None:
    assert {item.kind for item in select("audiocaps", sounds="youtube").items} == {"plain"}


def test_the_command_asks_for_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "cookies.txt").touch()
    words = ["--datasets", "audiocaps", "--data-root", str(tmp_path / "my data"), "--mirror", "hf", "--base-url",
             "audiocaps=http://127.0.0.1:9/x", "--local", str(tmp_path / "own"), "--splits", "val", "test", "--max-gb",
             "1.5", "--sample", "20", "--jobs", "2", "--sounds", "youtube", "--cookies", str(tmp_path / "cookies.txt"),
             "--keep-archives", "--skip-existing", "--insecure-tls"]
    _, options = read_options(parse(words), SOURCES, Policy())
    again = shlex.split(Selection(SOURCES["audiocaps"], options).command())
    assert again[:2] == ["python", "download_datasets.py"]
    _, same = read_options(parse(again[2:]), SOURCES, options.policy)
    assert same == options


def test_several_files_at_a_time_but_of_a_host_that_counts() -> None:
    assert (select("coco").jobs, select("clotho").jobs, select("clotho", jobs=3).jobs) == (4, 1, 3)


# --- Addresses and keys ----------------------------------------------------------------------------------------------


def hosts(name: str, file: str, **settings: Any) -> list[str]:
    work = select(name, **settings)
    (found,) = [each for item in work.source.items for each in item.files if each.name == file]
    return [url.split("/")[2] for url in work.addresses(found)]


@pytest.mark.parametrize(("mirror", "expected"), [
    ("auto", ["images.cocodataset.org", "s3.amazonaws.com", "huggingface.co", "www.modelscope.cn"]),
    ("official", ["images.cocodataset.org", "s3.amazonaws.com"]), ("hf", ["huggingface.co"]),
    ("hf-mirror", ["hf-mirror.com"]), ("modelscope", ["www.modelscope.cn"])])
def test_mirrors(mirror: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hosts("coco", "val2017.zip", mirror=mirror) == expected


def test_a_file_that_a_mirror_lacks_comes_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hosts("clotho", "clotho_audio_evaluation.7z", mirror="modelscope") == ["zenodo.org"] * 2
    assert hosts("audiocaps", "test-00000-of-00041.parquet", mirror="official") == ["huggingface.co"]


def test_the_hub_follows_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid/")
    assert hosts("coco", "val2017.zip", mirror="hf") == ["hub.invalid"]


def test_base_url_is_the_only_address() -> None:
    work = select("audiocaps", base_urls={"audiocaps": "http://127.0.0.1:9/a"})
    assert work.addresses(work.items[0].files[0]) == ("http://127.0.0.1:9/a/dataset/train.csv",)


def test_the_key_goes_to_its_server_only_and_a_third_party_is_asked_only_when_named() -> None:
    keys = {"VOXCELEB_KEY": "k/1"}
    assert hosts("voxceleb", "vox1_test_wav.zip") == []
    assert hosts("voxceleb", "vox1_test_wav.zip", mirror="hf-mirror") == ["hf-mirror.com"]
    work = select("voxceleb", keys=keys)
    file = next(item for item in work.items if item.name == "vox1_test_wav.zip").files[0]
    assert work.addresses(file) == ("https://cn01.mmai.io/download/voxceleb?key=k%2F1&file=vox1_test_wav.zip",)
    assert work.addresses(file, hide_key=True)[0].split("?")[1] == "key=***&file=vox1_test_wav.zip"
    assert hosts("voxceleb", "veri_test2.txt", keys=keys) == ["www.robots.ox.ac.uk"]
