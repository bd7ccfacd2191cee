"""What all tests share: compute threads, which process they run in, and prepared data for small runs.

    bash tests/run.sh --all      # also the repetitions: more random kills, more damaged inputs, all sizes' plans
"""

import os

import pytest

# Two busy processes with two compute threads each starve one another, and more so if waiting threads spin. libgomp
# reads both as torch is loaded; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.small_runs import SmallRuns, close_opened

TIMED = "timed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="with all repetitions (random kills, fuzz, planner sizes)")


def pytest_itemcollected(item: pytest.Item) -> None:
    """A file's tests go to one process, since they share its fixtures; those marked `timed` go to the same one. Here
    and not when all are collected: pytest-xdist has read the groups by then."""
    timed = item.get_closest_marker(TIMED) is not None
    item.add_marker(pytest.mark.xdist_group(TIMED if timed else item.path.name))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Repetitions are left out unless all are asked for. The `timed` tests go first, as together they take longest."""
    if not config.getoption("--all"):
        left_out = {item for item in items if item.get_closest_marker("repetition") is not None}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker(TIMED) is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that pytest-xdist does not see would be silent: files in pieces, timed tests beside one another."""
    in_groups = getattr(session.config.option, "loadgroup", False)  # set in the processes of pytest-xdist alone
    if in_groups and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not see the groups of tests: see pytest in requirements-dev.txt")


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
