"""Speaker trials: which pairs of utterances are compared, from a published list or drawn from what is there.

    pairs_T2, about = listed_trials(keys, names, audio_ids, folder, SETS[name].trials)  # indices into keys; a sentence

Shape suffix: T trials.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trimodal.errors import UserError
from trimodal.sets.base import Trials

SAMPLING_SEED = 0  # never the training seed, so that runs compare
SPEAKER_UTTERANCES = 300  # of at most UTTERANCES_EACH a speaker, where there is no trial list: up to 44,850 pairs
UTTERANCES_EACH = 10


def read_trials(path: Path) -> list[tuple[bool, str, str]]:
    """Lines `1 id10270/x6uYqmx31kE/00001.wav id10270/8jEAjG6SegY/00008.wav` of a trial list; 1 = one speaker.

    Raises:
        UserError: a line that is none, with its number.
    """
    trials = []
    for number, line in enumerate(path.read_text("utf-8", "backslashreplace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or words[0] not in ("0", "1"):
            raise UserError(f"{path}, line {number}: expected '1 FILE FILE' or '0 FILE FILE', got {line[:80]!r}; "
                            "download the list again")
        trials.append((words[0] == "1", words[1], words[2]))
    return trials


def listed_trials(keys: Sequence[str], names: np.ndarray, ids: np.ndarray, root: Path,
                  published: Trials) -> tuple[np.ndarray, str]:
    """Speaker trials from the first published list below `root` that names a pair of these N utterances; `own_trials`
    where there is no such list.

    Args:
        keys: keys of the N utterances. names: of their speakers. ids: int64, equal for equal files and stretches.

    Returns:
        int64 (T, 2), indices into `keys`; a sentence that says which list it is.

    Raises:
        UserError: a line of a list is damaged, or contradicts the speakers of its two utterances.
    """
    index = {key: n for n, key in enumerate(keys)}
    empty = []
    for path in (root / name for name in published.lists):
        if not path.is_file():
            continue
        trials, name = read_trials(path), path.relative_to(root).as_posix()
        pairs = []
        for same, one, other in trials:
            first, second = index.get(published.key(one)), index.get(published.key(other))
            if first is not None and second is not None:
                if same != (names[first] == names[second]):
                    raise UserError(f"{path}: says {int(same)} of {one} and {other}, which are of {names[first]} and "
                                    f"{names[second]}; download the list again")
                pairs.append((first, second))
        if pairs:
            return np.array(pairs, np.int64), (
                f"{name}: {len(pairs)} of its {len(trials)} trials have both files among those evaluated")
        empty.append(name)
    return own_trials(names, ids, f"no trial of {', '.join(empty)} has both files here" if empty else "no trial list")


def own_trials(names: np.ndarray, ids: np.ndarray, why: str) -> tuple[np.ndarray, str]:
    """All pairs among at most SPEAKER_UTTERANCES utterances, at most UTTERANCES_EACH of a speaker, chosen at random by
    a fixed seed; a sentence on them, which begins with `why`. Of equal files only the first counts, as a file paired
    with itself is no trial."""
    order = np.random.default_rng(SAMPLING_SEED).permutation(len(names))
    order = order[np.isin(order, np.unique(ids, return_index=True)[1])]
    by_speaker: dict[str, list[int]] = {}
    for index in order.tolist():
        own = by_speaker.setdefault(str(names[index]), [])
        if len(own) < UTTERANCES_EACH:
            own.append(index)
    chosen = np.array([index for own in by_speaker.values() for index in own][:SPEAKER_UTTERANCES], np.int64)
    first, second = np.triu_indices(len(chosen), k=1)
    return np.stack([chosen[first], chosen[second]], axis=1), (
        f"{why}: all {len(first)} pairs of {len(chosen)} utterances drawn by seed {SAMPLING_SEED}")
