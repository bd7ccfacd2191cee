"""Speaker trials: lists read line by line, whom they compare, and pairs of our own."""

from pathlib import Path

import numpy as np
import pytest

from tests.refusals import assert_names, refused
from trimodal.evaluation import trials
from trimodal.sets.voxceleb import TRIALS

KEYS = ["vox1/id1/a/1", "vox1/id1/b/1", "vox1/id2/a/1", "vox1/id2/b/1"]
NAMES = np.array(["id1", "id1", "id2", "id2"])
OTHERS = np.arange(4)  # ids of four files


def listed(root: Path, *lines: str) -> tuple[list[list[int]], str]:
    (root / "veri_test2.txt").write_text("\n".join(lines))
    pairs_T2, about = trials.listed_trials(KEYS, NAMES, OTHERS, root, TRIALS)
    return pairs_T2.tolist(), about


def test_a_damaged_trial_list_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "veri_test.txt"
    for content in (b"1 a b\n\n0 c\n", b"1 a b\n\n\xff\xfe a b\n"):
        path.write_bytes(content)
        with refused("veri_test.txt", "line 3", "1 FILE FILE"):
            trials.read_trials(path)
    path.write_text("1 a b\r\n0 c d\r\n")
    assert trials.read_trials(path) == [(True, "a", "b"), (False, "c", "d")]


def test_trials_of_which_a_file_is_not_there_are_left_out_and_counted(tmp_path: Path) -> None:
    pairs, about = listed(tmp_path, "1 id1/a/1.wav id1/b/1.wav", "0 id2/a/1.wav id1/a/1.wav",
                          "0 id2/a/1.wav id3/a/1.wav")
    assert pairs == [[0, 1], [2, 0]]
    assert_names(about, "veri_test2.txt", 2, 3)


@pytest.mark.parametrize("line", ["0 id1/a/1.wav id1/b/1.wav", "1 id1/a/1.wav id2/b/1.wav"])
def test_a_list_that_contradicts_the_speakers_is_refused(tmp_path: Path, line: str) -> None:
    with refused("veri_test2.txt", *line.split()):
        listed(tmp_path, "1 id2/a/1.wav id2/b/1.wav", line)


def test_of_equal_files_one_is_tried() -> None:
    """A file against itself is no trial: its cosine is 1 whatever the model."""
    pairs_T2, about = trials.own_trials(NAMES, np.array([7, 7, 8, 9]), "no trial list")
    assert sorted(sorted(pair) for pair in pairs_T2.tolist()) == [[0, 2], [0, 3], [2, 3]]
    assert_names(about, 3)
