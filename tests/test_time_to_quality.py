"""The grid of the comparison: which point is next, what the aim is, and which point came there first."""

import math
from pathlib import Path

import pytest

from benchmarks import time_to_quality as quality
from benchmarks.time_to_quality import GRID, LONGER, Point


def point(batch: int, rate: str, recalls: list[float], dropout: str = "0", passes: int = 8) -> Point:
    clock = [10.0 * (1 + epoch) for epoch in range(len(recalls))]
    return Point(batch, rate, dropout, passes, recalls, clock, clock)


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "FOUND", tmp_path / "found.json")


def test_the_grid_goes_on_where_it_was_stopped_and_ends_with_the_best_point_longer() -> None:
    passes = quality.CASES["synthetic"].passes
    for number, (batch, rate) in enumerate(GRID):
        assert quality.next_point("synthetic") == (batch, rate, "0", passes)
        quality.keep_point("synthetic", point(batch, rate, [0.1, 0.9 if number == 2 else 0.5], passes=passes))
    batch, rate = GRID[2]
    assert quality.next_point("synthetic") == (batch, rate, "0.5", passes)
    quality.keep_point("synthetic", point(batch, rate, [0.95], "0.5", passes))
    assert quality.next_point("synthetic") == (batch, rate, "0.5", LONGER * passes)
    quality.keep_point("synthetic", point(batch, rate, [0.7], "0.5", LONGER * passes))
    assert quality.next_point("synthetic") is None
    assert quality.next_point("stamps") is not None


def test_the_aim_is_of_the_best_validation_of_any_point_and_time_runs_to_the_first_that_reaches_it() -> None:
    with pytest.raises(RuntimeError, match="grid stamps"):
        quality.aim_of("stamps")
    late, early, never = point(64, "1e-3", [0.1, 0.5, 0.8]), point(64, "2e-3", [0.77, 0.2]), point(256, "1e-3", [0.1])
    for one in (late, early, never):
        quality.keep_point("stamps", one)
    assert quality.found_points("stamps") == [late, early, never]
    assert quality.aim_of("stamps") == pytest.approx(0.95 * 0.8)
    assert [one.cpu_s_to(0.76) for one in (late, early, never)] == [30.0, 10.0, math.inf]
