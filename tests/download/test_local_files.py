"""Archives and lists that the user has, named by --local: read where they lie, copied whole or not at all."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import miniature, trees
from tests.data.test_cache import FORK
from tests.download.test_acquire import options, run
from trimodal.download.selection import Options
from trimodal.sets.base import Source

LIST = "clotho_captions_development.csv"


def own(folder: Path, place: str) -> tuple[Source, dict[str, bytes], Path]:
    """The miniature Clotho, and the folder with all its files, `folder`/`place`."""
    source, served = miniature.clotho(folder / "true")
    (folder / place).mkdir(parents=True)
    for name, data in served.items():
        (folder / place / name).write_bytes(data)
    return source, served, folder / place


def die_half_way(source: Source, settings: Options) -> int:
    """The exit code of a process that copies what the user has, and dies when a half of a list is written."""
    def half(source: Any, target: Any, *rest: Any) -> None:
        to = target if hasattr(target, "write") else open(target, "wb")
        data = source.read() if hasattr(source, "read") else Path(source).read_bytes()
        to.write(data[:len(data) // 2])
        to.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def copy() -> None:
        shutil.copyfile = shutil.copyfileobj = half  # type: ignore[assignment]
        run(source, settings)

    process = FORK.Process(target=copy)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.timed
def test_a_list_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    source, served, local = own(tmp_path, "own")
    settings = options(tmp_path, local={"clotho": local})
    folder = tmp_path / "data/clotho"
    assert die_half_way(source, settings) == -signal.SIGKILL
    assert not list(folder.glob("*.csv")), "none yet"
    assert run(source, settings).state == "done"
    (folder / LIST).write_bytes(b"damaged")
    assert die_half_way(source, settings) == -signal.SIGKILL
    assert (folder / LIST).read_bytes() == b"damaged", "the old one"
    assert run(source, settings).state == "done"
    assert (folder / LIST).read_bytes() == served[LIST] and not list(folder.glob("*.tmp"))


def test_the_folder_of_the_set_itself_may_be_named(tmp_path: Path) -> None:
    source, served, folder = own(tmp_path, "data/clotho")
    for named in (folder, folder / ".." / "clotho"):
        outcome = run(source, options(tmp_path, local={"clotho": named}))
        assert outcome.state == "done", outcome.detail
        assert {name: (folder / name).read_bytes() for name in served} == served, "archives of the user are kept"
        shutil.rmtree(folder / "development")
    assert miniature.files_of(folder, "evaluation") == miniature.files_of(tmp_path / "true/clotho", "evaluation")


def test_a_list_that_is_a_link_to_the_users_is_there_already(tmp_path: Path) -> None:
    source, served, local = own(tmp_path, "own")
    (tmp_path / "data/clotho").mkdir(parents=True)
    (tmp_path / "data/clotho" / LIST).symlink_to(local / LIST)
    outcome = run(source, options(tmp_path, local={"clotho": local}))
    assert outcome.state == "done", outcome.detail
    assert (tmp_path / "data/clotho" / LIST).read_bytes() == (local / LIST).read_bytes() == served[LIST]


def test_a_damaged_list_in_the_folder_of_the_set_is_asked_of_the_server(tmp_path: Path) -> None:
    source, _, folder = own(tmp_path, "data/clotho")
    (folder / LIST).write_bytes(b"damaged")
    outcome = run(source, options(tmp_path, local={"clotho": folder}))
    assert outcome.code == 1 and LIST in outcome.detail, outcome.detail


def test_sounds_of_the_second_version_of_audiocaps_are_linked(tmp_path: Path) -> None:
    source, served = miniature.with_another_clip(tmp_path / "true", "newclip0001", 30)
    for name, data in served.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_bytes(data)
    trees.sound(tmp_path / "own/Ynewclip0001.wav", trees.tone(0.5))
    outcome = run(source, options(tmp_path, local={"audiocaps": tmp_path / "own"}))
    assert (outcome.state, outcome.code) == ("partial", 3)
    assert (tmp_path / "data/audiocaps/train/newclip0001_30.wav").is_symlink()
    assert "dataset2.0" not in outcome.detail, "nothing is missing of what that list alone names"
