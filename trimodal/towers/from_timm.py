"""Image towers of the library timm, by their names there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimodal.errors import UserError, similar
from trimodal.towers import packages
from trimodal.towers.base import Encoded, ImageInput, PretrainedTower, describe, input_of, sealed


class TimmTower(PretrainedTower):
    """A model of timm without its classifier: `model` is timm's own."""

    modality, family = "image", "timm"

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        import timm.models

        layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
        super().__init__(description, int(model.head_hidden_size), max(layers.values()), _blocks(model))
        self.model, self._layers = model, layers
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        found = self.model.forward_features(self.standardised(inputs))
        pooled_BD = self.model.forward_head(found, pre_logits=True)
        tokens_BND = found.flatten(2).mT if found.ndim == 4 else found[:, self.prefix:]
        return Encoded(tokens_BND, None, pooled_BD)

    def layer_of(self, parameter_name: str) -> int:
        return self._layers[parameter_name.removeprefix("model.")]


def open_named(name: str, source: str, weights: str, size: int | None) -> PretrainedTower:
    """The model `name` of timm, with the weights of its name, of a package or of a file."""
    import timm
    from timm.data import resolve_data_config

    if not timm.is_model(name):
        raise UserError(f"model.image.tower: {source}: timm has no such model. {similar(name, timm.list_models())}")
    model = timm.create_model(name, num_classes=0)
    found = resolve_data_config({}, model=model)
    taken = ImageInput(size or found["input_size"][-1], found["mean"], found["std"], "crop", found["crop_pct"],
                       found["interpolation"])
    package = packages.WEIGHTS[weights.removeprefix("package:")]
    taken = ImageInput(taken.size, package.mean, package.std, "crop", taken.crop_pct, taken.filter)
    tower = TimmTower(describe("timm", "image", source, package.licence, taken, name=name, options={}), model)
    _load_in_order(model, packages.file_of(weights.removeprefix("package:"), package.suffix))
    return sealed(tower)


def build(description: Mapping[str, Any]) -> PretrainedTower:
    import timm

    input_of(description)
    return TimmTower(description, timm.create_model(description["name"], num_classes=0, **description["options"]))


def _load_in_order(model: nn.Module, path: Path) -> None:
    """Load a file of the same architecture in another code's names, whose order is the same."""
    from timm.models import load_checkpoint

    load_checkpoint(model, str(path), remap=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or of a convolutional network, those of all its stages one after another."""
    stages: Any = next((getattr(model, name) for name in ("blocks", "stages", "layers") if hasattr(model, name)), [])
    inner = [getattr(stage, "blocks", stage) for stage in stages]
    return [block for one in inner for block in (one if isinstance(one, nn.Sequential | nn.ModuleList) else [one])]
