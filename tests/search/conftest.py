"""One small index and its model for the tests of the search page."""

import pytest

from tests.search import things
from tests.search.serving import write_media
from trimodal.inference.open_model import OpenModel
from trimodal.search.build import build_index
from trimodal.search.index import Index


@pytest.fixture(scope="session")
def model() -> OpenModel:
    return things.model()


@pytest.fixture(scope="session")
def index(model: OpenModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    place = tmp_path_factory.mktemp("search")
    write_media(place / "my media")
    assert build_index(place / "my media", place / "index", model, str(things.CHECKPOINT)).skipped == []
    return Index.open(place / "index")
