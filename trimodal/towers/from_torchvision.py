"""Image towers of the library torchvision, with the weights of its own lists or a file of them.

Tokens are the cells of the map that a model averages before its classifier, or the patches of a ViT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimodal.errors import ConfigError, UserError, similar
from trimodal.towers import packages
from trimodal.towers.base import Encoded, ImageInput, PretrainedTower, Source, describe, input_of
from trimodal.towers.hub import is_offline, reason_of, torch_file


class TorchvisionTower(PretrainedTower):
    """A model of torchvision whose last layer gives the classifier's input instead of classes."""

    modality = "image"

    def __init__(self, description: Mapping[str, Any], model: nn.Module, dim: int) -> None:
        blocks = _blocks(model)
        super().__init__(description, dim, len(blocks), blocks)
        self.model = model
        number = {id(value): i + 1 for i, block in enumerate(blocks) for value in block.parameters()}
        first = next(i for i, value in enumerate(model.parameters()) if id(value) in number)
        self._layers = {name: number.get(id(value), 0 if i < first else self.depth)
                        for i, (name, value) in enumerate(model.named_parameters())}

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        seen = list[Tensor]()
        place = getattr(self.model, "avgpool", None) or self.model.encoder
        hook = place.register_forward_hook(  # type: ignore[union-attr]
            lambda module, given, output: seen.append(output if module is getattr(self.model, "encoder", None)
                                                      else given[0]))
        try:
            pooled_BD = self.model(self.standardised(inputs))
        finally:
            hook.remove()
        return Encoded(seen[0][:, 1:] if seen[0].ndim == 3 else seen[0].flatten(2).mT, None, pooled_BD)

    def layer_of(self, parameter_name: str) -> int:
        return self._layers[parameter_name.removeprefix("model.")]


def find_named(name: str, source: str, weights: str, size: int | None) -> Source:
    """The model `name` of torchvision, or `NAME.WEIGHTS` with others of its weights than the default ones."""
    from torchvision import models

    where = f"model.image.tower: {source}"
    name, _, tag = name.partition(".")
    if name not in models.list_models(module=models):
        raise ConfigError(f"{where}: torchvision has no classifier {name!r}. "
                          f"{similar(name, models.list_models(module=models))}")
    listed = models.get_model_weights(name)
    if tag and tag not in listed.__members__:
        raise ConfigError(f"{where}: torchvision has no weights {tag!r} of {name}. {similar(tag, listed.__members__)}")
    chosen: Any = listed[tag] if tag else listed.DEFAULT
    trained = chosen.transforms()
    crop, short = int(trained.crop_size[0]), int(trained.resize_size[0])
    taken = ImageInput(size or crop, tuple(trained.mean), tuple(trained.std), "crop", crop / short,
                       trained.interpolation.value)
    options = {"image_size": size} if size and name.startswith("vit_") else {}
    description = describe("torchvision", "image", source, "unknown", taken, name=name, options=options)
    path = packages.weights_file(weights)

    def load() -> PretrainedTower:
        model = models.get_model(name, weights=None, **options)
        state = _state(chosen, path, f"{where}, weights: {weights}")
        try:
            if state.get("heads.head.weight") is not None and "image_size" in options:
                state = models.vision_transformer.interpolate_embeddings(size, model.patch_size, state)
            model.load_state_dict(state)
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            raise UserError(f"{where}: the weights are not those of this model, or not complete ({reason_of(error)})"
                            ) from None
        return _tower(description, model)

    return Source(description, load, path is not None or torch_file(chosen.url).is_file())


def build(description: Mapping[str, Any]) -> PretrainedTower:
    from torchvision import models

    input_of(description)
    with torch.device("cpu"):  # some read values while they build
        model = models.get_model(description["name"], weights=None, **description["options"])
    return _tower(description, model.to(torch.get_default_device()))


def _tower(description: Mapping[str, Any], model: nn.Module) -> TorchvisionTower:
    """Take the last layer off, where what is left gives a map and the mean of it."""
    head = next((name for name in ("fc", "heads", "classifier", "head") if hasattr(model, name)), "")
    last = getattr(model, head, None)
    holder, key = (last, [*dict(last.named_children())][-1]) if isinstance(last, nn.Sequential) else (model, head)
    linear = getattr(holder, key, None)
    linears = [one for one in last.modules() if isinstance(one, nn.Linear)] if isinstance(last, nn.Module) else []
    if len(linears) != 1 or linears[0] is not linear or not (hasattr(model, "avgpool") or hasattr(model, "encoder")):
        raise ConfigError(f"model.image.tower: {description['source']}: torchvision's {description['name']} does not "
                          "classify by the mean of a map; take a model of timm")
    setattr(holder, key, nn.Identity())
    return TorchvisionTower(description, model, linears[0].in_features)


def _state(chosen: Any, path: Path | None, where: str) -> dict[str, Any]:
    """The state dict of a file, None: of torchvision's own address; nothing in it is executed."""
    try:
        if path is None:
            if is_offline() and not torch_file(chosen.url).is_file():
                raise ValueError(f"HF_HUB_OFFLINE is set, and {torch_file(chosen.url)} is not there")
            return chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # files and servers may provoke any
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{where}: cannot be loaded ({reason_of(error)}); name a file of them, or auto") from None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT, or the parts of a convolutional network, those of all its stages one after another."""
    if hasattr(model, "encoder"):
        return list(model.encoder.layers)  # type: ignore[arg-type,union-attr]
    found: Any = getattr(model, "trunk_output", None) or getattr(model, "features", None)
    stages = [getattr(model, f"layer{i}") for i in range(1, 5)] if found is None else list(found.children())
    stages = stages[1:] if found is getattr(model, "features", 0) else stages  # the first is the stem
    # A class of its own, such as a convolution with norm and activation in place, is one block.
    return [block for stage in stages for block in (stage if type(stage) is nn.Sequential else [stage])]
