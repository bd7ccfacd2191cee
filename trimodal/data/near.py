"""Near-equal pictures and sounds: what is re-encoded, resized or a little cropped, and so is no equal file.

    found = near_files(data.splits["test"], data.splits["train"], config)     # {"image": rows [pairs, 2], ...}

A print is a unit vector: of a picture its colours on a grid of 16 x 16, of a sound its loudest log-mels below 4 kHz on
a grid of 16 times and 14 bands, each less their mean. Two are near-equal from a cosine of NEAR on. benchmarks/near.py
measures what this finds and what it takes for equal; pictures of one colour and constant sounds have no print.

Shape suffixes: N, M prints, P values of one.
"""

import numpy as np
from PIL import Image
from tqdm import tqdm

from trimodal.config import Config
from trimodal.data import prepared
from trimodal.data.batches import Split
from trimodal.data.codecs import Kind
from trimodal.data.samples import BrokenSample
from trimodal.data.splits import file_key

NEAR = {"image": 0.98, "audio": 0.95}
GRID = {"image": (16, 16), "audio": (16, 14)}  # rows (times), columns (bands)
LOW_BANDS = 56  # of 80: to 4 kHz, which every codec keeps
LOUDEST = 6.0  # below the loudest, in natural logs of power (26 dB): what is weaker codecs make up
MOST_FILES = 200_000  # of both sides: some minutes, once
FLAT = 1e-3  # of the full range: the spread below which there is nothing to compare
_TILE = 2_048


def image_print(picture: np.ndarray) -> np.ndarray:
    """Print of uint8 [H, W, 3], float32 [768]; zeros where it is of one colour."""
    small = Image.fromarray(picture).resize(GRID["image"], Image.Resampling.BOX)
    return _unit(np.asarray(small, np.float32).ravel() / 255)


def sound_print(mel_TM: np.ndarray) -> np.ndarray:
    """Print of log-mels [T, 80], float32 [224]; zeros where they are constant."""
    rows, columns = GRID["audio"]
    low_TM = np.ascontiguousarray(mel_TM[:, :LOW_BANDS], np.float32)
    loud_TM = np.maximum(low_TM, low_TM.max() - LOUDEST)
    small = Image.fromarray(loud_TM).resize((columns, rows), Image.Resampling.BOX)
    return _unit(np.asarray(small).ravel() / LOUDEST)


def _unit(values_P: np.ndarray) -> np.ndarray:
    values_P = values_P - values_P.mean()
    return np.zeros_like(values_P) if values_P.std() < FLAT else values_P / np.linalg.norm(values_P)


def prints(split: Split, modality: str, config: Config, rows: np.ndarray) -> np.ndarray:
    """Prints of the files of some rows, float32 [N, P]; kept in the cache's folder. Zeros for a broken file."""
    table = split.table
    paths = table.images if modality == "image" else table.audio
    state = prepared.digest([f"near {modality} {GRID} {LOW_BANDS} {LOUDEST}",
                             *(f"{file_key(paths[row])} {table.start_s[row]} {table.duration_s[row]}"
                               for row in rows.tolist())])

    def read() -> dict[str, np.ndarray]:
        found = []
        for row in tqdm(rows.tolist(), desc=f"near-equal files, {modality}", unit="file", disable=None):
            try:
                found.append(image_print(split.store.image(row)) if modality == "image" else
                             sound_print(split.store.mel(row)))
            except BrokenSample:
                found.append(np.zeros(GRID[modality][0] * GRID[modality][1] * (3 if modality == "image" else 1)))
        return {"prints": np.array(found, np.float16)}

    return prepared.kept(config, f"near-{modality}", state, read)["prints"].astype(np.float32)


def nearest(prints_NP: np.ndarray, others_MP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest cosine of each print with one of the others, and which one; -1 and 0 where there is none."""
    best, which = np.full(len(prints_NP), -1.0, np.float32), np.zeros(len(prints_NP), np.int64)
    for start in range(0, len(others_MP), _TILE):
        cosines = prints_NP @ others_MP[start:start + _TILE].T
        place = cosines.argmax(1)
        value = cosines[np.arange(len(cosines)), place]
        which = np.where(value > best, place + start, which)
        best = np.maximum(best, value)
    return best, which


def near_files(of: Split, among: Split, config: Config) -> dict[str, np.ndarray]:
    """By modality: (row of `of`, row of `among`) of each file of `of` that is near-equal to one of `among`, int64
    [pairs, 2], as far as the cache holds them. Modalities of more than MOST_FILES files are left out."""
    found = {}
    for modality in ("image", "audio"):
        sides = [_cached(split, modality) for split in (of, among)]
        if all(map(len, sides)) and sum(map(len, sides)) <= MOST_FILES:
            own, others = prints(of, modality, config, sides[0]), prints(among, modality, config, sides[1])
            cosine_N, which_N = nearest(own, others)
            near = cosine_N >= NEAR[modality]
            found[modality] = np.stack([sides[0][near], sides[1][which_N[near]]], axis=1)
    return found


def _cached(split: Split, modality: str) -> np.ndarray:
    """Rows that stand for the different files of a split that the cache holds, int64, ascending."""
    kind: Kind = "image" if modality == "image" else "sound"
    if kind not in split.store.cached:
        return np.empty(0, np.int64)
    rows = np.flatnonzero(split.store.cached[kind][:, 0] >= 0)
    ids = split.image_ids if modality == "image" else split.audio_ids
    return np.sort(rows[np.unique(ids[rows], return_index=True)[1]])
