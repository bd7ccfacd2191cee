"""What is worked out of many samples is kept for later starts, and is never that of other data."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datasets
from datasets import Data, load_data
from tests import trees
from tests.data.test_batches import configured
from trimodal.data import batches, prepared
from trimodal.data.batches import Split
from trimodal.data.samples import SampleTable, Strings


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MANY", 1)


def read(folder: Path, *overrides: str) -> Data:
    return load_data(configured(folder, *overrides))


def arrays_of(data: Data) -> dict[str, Any]:
    """All of the splits that does not depend on when files were read."""
    found: dict[str, Any] = {}
    for name, split in data.splits.items():
        found |= {f"{name}.{key}": array for key, array in split.table.arrays().items()}
        found |= {f"{name}.{f.name}": value for f in fields(Split)
                  if isinstance(value := getattr(split, f.name), np.ndarray)}
    return found | {"concepts": np.array(data.concepts), "speakers": np.array(data.speakers)}


def assert_equal(one: Data, other: Data) -> None:
    first, second = arrays_of(one), arrays_of(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not np.array_equal(first[key], second[key])] == []
    assert [key for key in first if first[key].dtype != second[key].dtype] == []


def forbid(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
    def called(*given: Any) -> None:
        raise AssertionError("worked out again")

    for module, name in places:
        monkeypatch.setattr(module, name, called)


LIST = (datasets, "read_splits")
WORDS = ((batches, "concepts_of"), (batches, "may_mirror"), (datasets, "concept_names"))


def test_a_later_start_takes_what_was_kept_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    path = trees.manifest(tmp_path, 30)
    line = path.read_text("utf-8").splitlines()[1]
    path.write_text(path.read_text("utf-8") + line.replace("number 1", "once more"), "utf-8")  # which is told
    without = read(tmp_path, "data.cache=false")
    assert not (tmp_path / "data/cache/prepared").exists()
    caplog.clear()
    first, said = read(tmp_path), caplog.messages.copy()
    assert len(said) == 1
    caplog.clear()
    forbid(monkeypatch, LIST, *WORDS)
    second = read(tmp_path)
    assert caplog.messages == said
    assert_equal(first, without)
    assert_equal(second, without)


@pytest.mark.parametrize("what", ["list", "file", "gone", "damaged", "setting"])
def test_what_has_changed_is_read_anew(tmp_path: Path, what: str) -> None:
    path = trees.manifest(tmp_path, 30)
    read(tmp_path)
    overrides = ["data.max_bad_pct=50"]
    if what == "list":
        path.write_text(path.read_text("utf-8").replace("number 7", "the seventh"), "utf-8")
    elif what == "file":  # another picture under the same name, which equals a third one
        os.link(tmp_path / "pictures/ 0.png", tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "pictures/ 7.png")
    elif what == "gone":
        (tmp_path / "pictures/ 7.png").unlink()
    elif what == "damaged":
        for file in (tmp_path / "data/cache/prepared").iterdir():
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    else:
        overrides.append("model.context_length=8")
    assert_equal(read(tmp_path, *overrides), read(tmp_path, *overrides, "data.cache=false"))


def test_a_list_with_missing_files_is_read_at_each_start(tmp_path: Path) -> None:
    trees.manifest(tmp_path, 30)
    (tmp_path / "pictures/ 7.png").unlink()
    read(tmp_path, "data.max_bad_pct=50")
    assert not list((tmp_path / "data/cache/prepared").glob("manifest-*"))


def test_tables_and_strings_go_through_arrays(tmp_path: Path) -> None:
    texts = ["a", "", "ü\udcff", "a", "字"]
    strings = Strings.pack(texts)
    assert strings.tolist() == texts == [strings[i] for i in range(5)]
    codes, different = strings.distinct()
    assert codes.tolist() == [0, 1, 2, 0, 3] and different == ["a", "", "ü\udcff", "字"]
    assert Strings.pack([]).tolist() == [] and Strings.pack([]).distinct()[1] == []
    table = read(trees.manifest(tmp_path, 9).parent).tables["train"]
    again = SampleTable.from_arrays(table.arrays())
    assert again.digest() == table.digest()
    assert [again[i] for i in range(len(again))] == [table[i] for i in range(len(table))]


def test_digests_tell_types_shapes_and_borders_apart() -> None:
    one, two = np.array([1, 2], np.int32), np.array([[1, 2]], np.int32)
    found = {prepared.digest(parts) for parts in (
        [one], [two], [one.astype(np.int64)], ["12"], ["1", "2"], [json.dumps([1, 2])], [])}
    assert len(found) == 7
