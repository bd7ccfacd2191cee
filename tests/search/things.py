"""What tests of the search look through: a small model of an earlier run, and a folder of pictures, sounds and a
video."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from model import open_model
from tests import trees
from tests.project import ROOT
from trimodal.config import PRESETS

CHECKPOINT = ROOT / "tests" / "old_run" / "run" / "checkpoints" / "best_model.pt"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Within, `tiny` is as small as it was when that run was written."""
    with mock.patch.dict(PRESETS, tiny=PRESETS["nano"]):
        yield


@functools.cache
def model() -> Any:
    with small():
        return open_model(CHECKPOINT, "cpu")


def folder(place: Path) -> Path:
    """Four pictures, two sounds, a video with both tracks, and a file of another kind."""
    (place / "sub" / "deeper").mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        trees.picture(place / ("sub" if number % 2 else ".") / f"{name}.png", colour)
    trees.sound(place / "low.wav", trees.tone(0.6, hz=200))
    trees.sound(place / "sub" / "deeper" / "high.flac", trees.tone(1.2, hz=3000))
    trees.video(place / "film.mp4", [(10 * n, 200, 30) for n in range(20)], trees.tone(0.8, hz=700))
    (place / "notes.txt").write_text("nothing to search", "utf-8")
    return place
