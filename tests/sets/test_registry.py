"""The registry: settings meet the sets here, and nothing outside it knows a set by name."""

import pytest

from tests.refusals import refused
from trimodal.config import load_config
from trimodal.errors import ConfigError
from trimodal.sets import SETS, check_settings


def test_every_set_says_what_it_is() -> None:
    for name, data_set in SETS.items():
        assert data_set.name == name and data_set.splits and data_set.licence
        assert bool(data_set.source) != bool(data_set.note)


@pytest.mark.parametrize(("override", "named"), [
    ("data.datasets=[coco, clohto]", ["data.datasets", "clohto", "'clotho'"]),
    ("data.datasets=[flowers]", ["data.datasets", "flowers", *SETS]),
    ("data.datasets=[manifest]", ["data.manifest"])])
def test_a_mistake_in_the_settings_of_a_set_names_it(override: str, named: list[str]) -> None:
    with refused(*named, error=ConfigError):
        check_settings(load_config(None, [override]))


def test_settings_of_all_sets_together_are_good() -> None:
    config = load_config(None, [f"data.datasets=[{', '.join(SETS)}]", "data.manifest=list.csv"])
    assert check_settings(config) is config
