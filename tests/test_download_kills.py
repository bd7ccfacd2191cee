"""kill -9 at random moments of a download, in mid-transfer and in mid-unpacking, then again: nothing differs."""

from pathlib import Path

from tests.download_killing import killed_downloads, serve, state, undisturbed
from tests.loopback import Loopback


def test_killed_at_random_moments_then_run_again_is_as_an_undisturbed_one(tmp_path: Path) -> None:
    with Loopback() as server:
        server.slow_s = 0.02
        served = serve(tmp_path / "true", server, ("coco", "clotho"))
        whole = undisturbed(served, tmp_path / "whole")
        assert whole == state(tmp_path / "whole") and len(whole) > 200
        kills = list(killed_downloads(served, whole, tmp_path, 6, 3))
    assert kills[-1] == 6 == sum(served.moments.values())
