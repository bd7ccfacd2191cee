"""kill -9 at random moments of a download, in mid-transfer and in mid-unpacking, then again: nothing differs."""

from pathlib import Path

import pytest

from tests.download_killing import killed_downloads, serve, state, undisturbed
from tests.loopback import Loopback

pytestmark = pytest.mark.timed


def test_killed_at_random_moments_then_run_again_is_as_an_undisturbed_one(tmp_path: Path,
                                                                          all_repetitions: bool) -> None:
    number, sets = (12, ("coco", "clotho")) if all_repetitions else (3, ("coco",))
    with Loopback() as server:
        server.slow_s = 0.02
        served = serve(tmp_path / "true", server, sets)
        whole = undisturbed(served, tmp_path / "whole")
        assert whole == state(tmp_path / "whole") and len(whole) > 100
        kills = list(killed_downloads(served, whole, tmp_path, number, 3))
    assert kills[-1] == number == sum(served.moments.values())
