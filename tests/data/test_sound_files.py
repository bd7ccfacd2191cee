"""Where the links of a chained Ogg file lie, and which WAV files state too few samples: see test_tracks for their
sound."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests import trees
from tests.data.test_tracks import ogg, tones, wav_stating
from trimodal.data import sound_files


def links(path: Path) -> list[tuple[int, int]]:
    found, has_holes = sound_files.ogg_links(str(path))
    assert not has_holes
    return found


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_holes_of_an_ogg(tmp_path: Path, subtype: str) -> None:
    path, noise = tmp_path / "a.ogg", np.random.default_rng(0).normal(0, 0.1, 96_000)
    content = ogg(noise, 16_000, subtype)
    pages = [at for at in range(len(content)) if content.startswith(b"OggS\0", at)]
    last, middle = pages[-1], pages[len(pages) // 2]
    after = pages[len(pages) // 2 + 1]
    assert len(pages) > 4
    for whole in (content, content + b"TAG" + bytes(125), content[:-9], content[: last + 9]):
        path.write_bytes(whole)
        assert links(path) == []
    for damaged in (content[:middle] + content[after:], content[: middle + 40] + bytes(9) + content[middle + 49:],
                    content[:middle] + b"junk" + content[middle:]):
        path.write_bytes(damaged)
        assert sound_files.ogg_links(str(path))[1]


def test_parts_of_a_chained_ogg(tmp_path: Path) -> None:
    parts = [ogg(tones(1, 16_000), 16_000), ogg(tones(2, 44_100), 44_100), ogg(tones(1, 48_000), 48_000, "OPUS")]
    path = tmp_path / "a.ogg"
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    path.write_bytes(b"".join(parts))
    assert links(path) == list(itertools.pairwise(ends))
    path.write_bytes(parts[0] + b"junk" + parts[1])
    assert links(path) == [(0, ends[1] + 4), (ends[1] + 4, ends[2] + 4)]
    path.write_bytes(parts[1])
    assert links(path) == []


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_other_files_are_of_one_piece_and_state_all_their_samples(tmp_path: Path, name: str) -> None:
    path = str(trees.sound(tmp_path / name, trees.tone()))
    assert links(Path(path)) == [] and not sound_files.states_too_few_samples(path)
    assert sound_files.mended_au(path) == path


@pytest.mark.parametrize("stated_bytes", [0, 4096])
def test_a_header_that_states_too_little_is_noticed(tmp_path: Path, stated_bytes: int) -> None:
    assert sound_files.states_too_few_samples(str(wav_stating(tmp_path / "a.wav", tones(1, 16_000), stated_bytes)))
