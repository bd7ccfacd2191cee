"""Where the parts of a chained Ogg file lie, and which headers of WAV files are mended: see test_tracks for their
sound."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import sound_files
from tests import trees
from tests.test_tracks import ogg, tones, wav_stating


def test_parts_of_a_chained_ogg(tmp_path: Path) -> None:
    parts = [ogg(tones(1, 16_000), 16_000), ogg(tones(2, 44_100), 44_100), ogg(tones(1, 48_000), 48_000, "OPUS")]
    path = tmp_path / "a.ogg"
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    path.write_bytes(b"".join(parts))
    assert sound_files.links(str(path)) == list(itertools.pairwise(ends))
    path.write_bytes(parts[0] + b"junk" + parts[1])
    assert sound_files.links(str(path)) == [(0, ends[1] + 4), (ends[1] + 4, ends[2] + 4)]
    path.write_bytes(parts[1])
    assert sound_files.links(str(path)) == []


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_other_files_are_of_one_piece_and_not_mended(tmp_path: Path, name: str) -> None:
    path = str(trees.sound(tmp_path / name, trees.tone()))
    assert sound_files.links(path) == [] and sound_files.mended(path) == path


def test_a_header_that_states_too_little_is_mended(tmp_path: Path) -> None:
    path = wav_stating(tmp_path / "a.wav", tones(1, 16_000), 0)
    mended = sound_files.mended(str(path))
    assert not isinstance(mended, str) and mended.read()[44:] == path.read_bytes()[44:]
