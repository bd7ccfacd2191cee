"""--status and --dry-run as text and as JSON: the same numbers, one object on stdout and nothing else."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback import Loopback
from tests.refusals import assert_told
from tests.test_download import rows, run, tables


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The sets of the only line on stdout."""
    output = capsys.readouterr()
    assert output.err == "" and output.out.count("\n") == 1
    found: list[dict[str, Any]] = json.loads(output.out)["sets"]
    return found


@pytest.mark.parametrize("look", ["--status", "--dry-run"])
def test_json_says_what_the_text_says(server: Loopback, tmp_path: Path, look: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    table, flags = tables(tmp_path / "true", server, "coco", "clotho")
    words = ["--datasets", "coco", "clotho", "synthetic", "--data-root", str(tmp_path / "got"), *flags, look]
    assert run("--datasets", "clotho", "--data-root", str(tmp_path / "got"), *flags[2:], table=table) == 0
    capsys.readouterr()
    assert run(*words, table=table) == 0
    text = capsys.readouterr().out
    assert run(*words, "--json", table=table) == 0
    coco, clotho, synthetic = told(capsys)
    assert [one["name"] for one in (coco, clotho, synthetic)] == ["coco", "clotho", "synthetic"]
    served = {name: len(data) for name, data in server.files.items()}
    sizes = sum(size for name, size in served.items() if name.startswith("/coco/"))
    assert coco["bytes_to_fetch"] == sizes and clotho["bytes_to_fetch"] == synthetic["bytes_to_fetch"] == 0
    for one in [*coco.get("parts", coco.get("items", [])), *clotho.get("parts", clotho.get("items", []))]:
        assert re.search(rf"{re.escape(one['name'])}\b.*\b{one['state']}\b", text)
    assert f"{sizes / 1e6:.2f} MB" in text


def test_json_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--datasets", "coco", "--data-root", str(tmp_path / "data"), "--json") == 2
    assert_told(capsys.readouterr().err, "--json", "--status", "--dry-run")
    assert not (tmp_path / "data").exists()


def test_an_error_leaves_stdout_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--datasets", "coco", "--data-root", str(tmp_path), "--local", "/no/such", "--status", "--json") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert_told(output.err, "--local", "/no/such")


def test_archives_that_the_user_has_are_not_to_be_fetched(server: Loopback, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    table, flags = tables(tmp_path / "true", server, "coco")
    own = tmp_path / "a disk/zips"
    own.mkdir(parents=True)
    (own / "TRAIN2017.ZIP").write_bytes(server.files["/coco/train2017.zip"])
    words = ["--datasets", "coco", "--data-root", str(tmp_path / "got"), *flags, "--local", str(tmp_path / "a disk")]
    for look, key in (("--status", "parts"), ("--dry-run", "items")):
        assert run(*words, look, "--json", table=table) == 0
        (coco,) = told(capsys)
        assert {one["name"]: one["state"] for one in coco[key]}["train2017.zip"] == "in --local"
        assert coco["bytes_to_fetch"] == sum(len(data) for name, data in server.files.items()
                                             if not name.endswith("/train2017.zip"))
    assert run(*words, table=table) == 0
    assert "/coco/train2017.zip" not in {name for name, _ in server.requests}


# --- COCO that the user put there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
def test_a_tree_of_the_set_put_there_by_hand_is_not_fetched_again(
        server: Loopback, tmp_path: Path, linked: bool, capsys: pytest.CaptureFixture[str]) -> None:
    table, flags = tables(tmp_path / "true", server, "coco")
    own = tmp_path / ("disk/coco" if linked else "data/coco")
    shutil.copytree(tmp_path / "true/coco", own)
    (own / "annotations/dataset_coco.json").unlink()
    for part in ("train2017", "val2017"):
        (own / f"annotations/person_keypoints_{part}.json").unlink()
        (own / f"annotations/stuff_{part}.json").write_text("{}")
        (own / f"{part}/._000000000009.jpg").write_bytes(b"a shadow")
    if linked:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/coco").symlink_to(own, target_is_directory=True)
    karpathy = len(server.files["/coco/caption_datasets.zip"])
    words = ["--datasets", "coco", "--data-root", str(tmp_path / "data"), *flags]
    for look in (["--status"], ["--dry-run"], ["--dry-run", "--skip-existing"]):
        assert run(*words, *look, "--json", table=table) == 0
        assert told(capsys)[0]["bytes_to_fetch"] == karpathy
    assert not [path for path in own.iterdir() if path.name.startswith(".")], "looking leaves nothing"
    assert run(*words, "--skip-existing", table=table) == 0
    assert {name for name, _ in server.requests} == {"/coco/caption_datasets.zip"}
    assert run(*words, "--skip-existing", table=table) == 0
    assert rows(capsys.readouterr().out)["coco"][0] == "skipped"
