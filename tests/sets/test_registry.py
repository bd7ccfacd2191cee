"""The registry: settings meet the sets here, and nothing outside it knows a set by name."""

import ast
import itertools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests import trees
from tests.project import ROOT, product_files
from tests.refusals import assert_names, refused
from trimodal.config import Config, DataConfig, load_config
from trimodal.data.samples import SPLITS
from trimodal.errors import ConfigError
from trimodal.sets import SETS, check_settings, read_split, read_splits


def test_every_set_says_what_it_is() -> None:
    for name, data_set in SETS.items():
        assert data_set.name == name and data_set.splits and data_set.licence
        assert bool(data_set.source) != bool(data_set.note)


@pytest.mark.parametrize(("override", "named"), [
    ("data.datasets=[coco, clohto]", ["data.datasets", "clohto", "'clotho'"]),
    ("data.datasets=[flowers]", ["data.datasets", "flowers", *SETS]),
    ("data.datasets=[manifest]", ["data.manifest"]), ("data.fold=1", ["data.fold", "1", "stamps", "coco"])])
def test_a_mistake_in_the_settings_of_a_set_names_it(override: str, named: list[str]) -> None:
    with refused(*named, error=ConfigError):
        check_settings(load_config(None, [override]))


def test_settings_of_all_sets_together_are_good() -> None:
    config = load_config(None, [f"data.datasets=[{', '.join(SETS)}]", "data.manifest=list.csv"])
    assert check_settings(config) is config


def test_lists_that_several_splits_need_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, opened, load = trees.coco(tmp_path), [], json.load

    def counted(file: Any, **settings: Any) -> Any:
        opened.append(Path(file.name).relative_to(root).as_posix())
        return load(file, **settings)

    monkeypatch.setattr(json, "load", counted)
    config = load_config(None, [f"paths.data_root={json.dumps(str(tmp_path))}"])
    found = list(read_splits("coco", SPLITS, config))
    assert [split for split, _ in itertools.groupby(found, key=lambda sample: sample.split)] == list(SPLITS)
    assert sorted(opened) == ["annotations/dataset_coco.json", "annotations/instances_train2017.json",
                              "annotations/instances_val2017.json"]


# ---- names -------------------------------------------------------------------------------------------------------

SETTINGS = {f"data.{field.name}" for field in fields(DataConfig)}  # keys of config.yaml, which the user knows


WORDS = {"folder", "shards"}  # names of sets that are words of their own


def set_names(source: str) -> list[str]:
    """Identifiers and strings of `source` that hold the name of a set. Sentences and examples for people are none."""
    tree = ast.parse(source)
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words += [word for node in ast.walk(tree) for name in ("id", "attr", "arg", "name")
              if isinstance(word := getattr(node, name, None), str) and f"data.{word}" not in SETTINGS]
    named = re.compile(rf"(?<![a-z])({'|'.join(SETS.keys() - WORDS)})(?![a-z])", re.IGNORECASE)
    return [word for word in words if " " not in word and word not in SETTINGS and named.search(word)]


def test_a_set_without_captions_of_a_wanted_language_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with refused("data.languages", "zh", "synthetic", "en", error=ConfigError):
        check_settings(load_config(None, ["data.datasets=[stamps, synthetic]", "data.languages=[zh]"]))
    for names in ("[en]", "[en, zh]"):
        config = check_settings(load_config(None, ["data.datasets=[synthetic]", f"data.languages={names}"]))
        next(read_split("synthetic", "test", config))
    (line,) = [record.getMessage() for record in caplog.records]
    assert_names(line, "synthetic", "en", "zh", "data.languages")


def test_nothing_but_the_registry_knows_a_set_by_name() -> None:
    """The only exception is the default of `data.datasets`, with the other defaults."""
    found = {name: words for path in product_files() if "sets" not in path.relative_to(ROOT).parts
             if (words := set_names(path.read_text("utf-8"))) and (name := path.relative_to(ROOT).as_posix())}
    assert found == {"trimodal/config.py": list(Config().data.datasets)}


@pytest.mark.parametrize(("planted", "found"), [
    ("if source.name == 'voxceleb': pass", ["voxceleb"]), ("root / 'voxceleb1/wav'", ["voxceleb1/wav"]),
    ("STAMPS = 1", ["STAMPS"]),
    ("from trimodal.sets import coco", ["coco"]), ("'''A set such as coco.'''", []), ("x.coco_split", []),
    ("f'{root}/coco/x'", ["/coco/x"])])
def test_the_gate_of_names_can_fail(planted: str, found: list[str]) -> None:
    assert set_names(planted) == found
