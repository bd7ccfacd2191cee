"""Event files when a run goes back: whose they are, and what the page of TensorBoard then shows."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_tracking import step_record, validation_record
from trimodal import checkpoint
from trimodal.training import outputs
from trimodal.training.tracking import Tracker


def test_files_among_event_files_that_show_nothing_stay_and_are_not_named(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path / "logs")
    tracker.step(step_record(2))
    tracker.close()
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch}, tmp_path / "checkpoints" / f"checkpoint_epoch_{epoch}.pt")
    other = tmp_path / outputs.BOARD / "events.out.tfevents.1.host.1.0"
    other.write_bytes(b"of another program")
    outputs.go_back(tmp_path, "checkpoint_epoch_1.pt", 1, 1)
    assert other.read_bytes() == b"of another program"
    assert capsys.readouterr().out == ""


@pytest.mark.timed
def test_the_page_of_tensorboard_shows_no_points_of_what_was_abandoned(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "logs")
    for step in (1, 2, 3, 4):
        tracker.step(step_record(step))
        checkpoint.save({"epoch": step}, tmp_path / "checkpoints" / f"checkpoint_epoch_{step}.pt")
    tracker.close()
    assert shown_steps(tmp_path) == {1, 2, 3, 4}
    assert outputs.go_back(tmp_path, "checkpoint_epoch_2.pt", 2, 2)
    again = Tracker(tmp_path / "logs", 2)
    again.validation(validation_record(3))  # of other tags than those that were abandoned
    again.close()
    assert shown_steps(tmp_path, "loss/") == {1, 2} and shown_steps(tmp_path, "validation/") == {3}


def shown_steps(folder: Path, begin: str = "") -> set[int]:
    """Of all points of curves on TensorBoard's page whose tags begin so."""
    port_file = folder.parent / "port.txt"
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / outputs.BOARD),
                               "--port", "0", "--host", "127.0.0.1"], stderr=port_file.open("w"),
                              stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while "http://" not in port_file.read_text():
            assert time.monotonic() < deadline and server.poll() is None, port_file.read_text()
            time.sleep(0.05)
        address = next(word for word in port_file.read_text().split() if word.startswith("http://"))
        found: dict[str, Any] = {}
        while not found.get("."):
            assert time.monotonic() < deadline
            found = answer(f"{address}data/plugin/scalars/tags")
            time.sleep(0.05)
        return {point[1] for tag in found["."] if tag.startswith(begin)
                for point in answer(f"{address}data/plugin/scalars/scalars?run=.&tag={tag}")}
    finally:
        server.terminate()
        server.wait()


def answer(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as reply:
        return json.loads(reply.read())
