"""What all tests share: compute threads, what stands between them, and one finished run to look at.

    bash tests/run.sh --all      # also the repetitions: more random kills, more damaged inputs, all sizes' plans
"""

import os
from pathlib import Path

import pytest

# Two busy processes with two compute threads each starve one another, and more so if waiting threads spin. libgomp
# reads both as torch is loaded; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.small_runs import SmallRuns, close_opened

TIMED = "timed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="with all repetitions (random kills, fuzz, planner sizes)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests go to one process, since they share its fixtures; those marked `timed` all go to the same one, and
    first, as together they take longest."""
    for item in items:
        timed = item.get_closest_marker(TIMED) is not None
        item.add_marker(pytest.mark.xdist_group(TIMED if timed else item.path.name))
        if item.get_closest_marker("repetition") is not None and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="a repetition: bash tests/run.sh --all runs it"))
    items.sort(key=lambda item: item.get_closest_marker(TIMED) is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """A hook and no fixture: a fixture of all tests ends after their folders have gone."""
    close_opened()


@pytest.fixture(scope="session")
def all_repetitions(pytestconfig: pytest.Config) -> bool:
    """Whether `bash tests/run.sh --all` asks for every repetition."""
    return bool(pytestconfig.getoption("--all"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need no file to survive a power cut, but for those marked `durable`, which say that it would."""
    if request.node.get_closest_marker("durable") is None:
        monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    """Small runs of all tests: their drawn data are prepared once, and their plans are kept."""
    return SmallRuns(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def finished(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of three epochs, a stage each. To look at: copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    small.train(folder)
    return folder
