"""Image towers of the library transformers.

Shape suffixes: B samples, N patches, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from trimodal.errors import UserError
from trimodal.towers.base import Encoded, ImageInput, PretrainedTower, Source, input_of
from trimodal.towers.hub import HubTower, Kind, config_of, described, kind_of, load, read_json, rebuild

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Image(NamedTuple):
    """What is particular to the towers of one `model_type`."""

    kind: Kind
    default: ImageInput  # where the folder has no preprocessor_config.json
    pooled: bool  # whether `pooler_output` is the trained feature; else it is the last state of the first token
    interpolates: bool  # whether it has to be asked for positions of another size than the one it was trained with


CLIP = Image(Kind("CLIPVisionModel", "CLIPVisionConfig", "encoder.layers"),
             ImageInput(224, CLIP_MEAN, CLIP_STD, "crop", 1.0, "bicubic"), True, True)
SIGLIP = Image(Kind("SiglipVisionModel", "SiglipVisionConfig", "encoder.layers"),
               ImageInput(224, HALF, HALF, "squash", 1.0, "bicubic"), True, True)
DINO = ImageInput(224, IMAGENET_MEAN, IMAGENET_STD, "crop", 224 / 256, "bicubic")
KINDS = {
    "clip": CLIP, "clip_vision_model": CLIP, "siglip": SIGLIP, "siglip_vision_model": SIGLIP,
    "dinov2": Image(Kind("Dinov2Model", "Dinov2Config", "encoder.layer", may_lack=("embeddings.mask_token",)),
                    DINO, True, False),
    "dinov2_with_registers": Image(
        Kind("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "encoder.layer",
             may_lack=("embeddings.mask_token",)), DINO, True, False),
    "dinov3_vit": Image(Kind("DINOv3ViTModel", "DINOv3ViTConfig", "model.layer", may_lack=("embeddings.mask_token",)),
                        ImageInput(224, IMAGENET_MEAN, IMAGENET_STD, "squash", 1.0, "bilinear"), True, False),
    # its pooler is trained for the classes of its file, and missing from most
    "vit": Image(Kind("ViTModel", "ViTConfig", "layers", options={"add_pooling_layer": False}),
                 ImageInput(224, HALF, HALF, "squash", 1.0, "bilinear"), False, True)}


class HubImageTower(HubTower):
    modality = "image"

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        self.of = KINDS[description["kind"]]
        super().__init__(description, self.of.kind, model, int(model.config.hidden_size))
        taken, config = input_of(description), model.config
        assert isinstance(taken, ImageInput)
        patches = taken.size // config.patch_size
        if taken.size % config.patch_size:
            raise UserError(f"model.image_size: {taken.size} is no multiple of the {config.patch_size} pixels of a "
                            f"patch of {self.source}; take {max(1, patches) * config.patch_size}")
        self.num_patches = patches**2
        self.options = {"interpolate_pos_encoding": True} if (
            self.of.interpolates and taken.size != config.image_size) else {}
        if description["kind"] == "dinov3_vit":
            _forget_coordinates()

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        found = self.model(pixel_values=self.standardised(inputs), **self.options)
        states_BND = found.last_hidden_state
        pooled_BD = found.pooler_output if self.of.pooled else states_BND[:, 0]
        return Encoded(states_BND[:, states_BND.shape[1] - self.num_patches:], None, pooled_BD)


def _forget_coordinates() -> None:
    """Let DINOv3 compute the places of its patches each time: the library keeps them for all that follows in the
    process, fake tensors of a plan among them."""
    from transformers.models.dinov3_vit import modeling_dinov3_vit as module

    kept = module.get_patches_center_coordinates
    module.get_patches_center_coordinates = getattr(kept, "__wrapped__", kept)


def find_in(folder: Path, source: str, where: str, size: int | None) -> Source:
    """The image tower of a local folder; `where` begins the messages of errors."""
    model_type = kind_of(folder, {name: one.kind for name, one in KINDS.items()}, "images", where)
    of = KINDS[model_type]
    taken = _input(read_json(folder, "preprocessor_config.json", where), of.default, where)
    taken = ImageInput(**{**vars(taken), "size": size or taken.size})
    config = config_of(folder, of.kind, where)
    description = described("hub_image", "image", source, folder, taken, model_type, config)
    return Source(description, lambda: HubImageTower(description, load(folder, of.kind, config, where)))


def build(description: Mapping[str, Any]) -> PretrainedTower:
    return HubImageTower(description, rebuild(KINDS[description["kind"]].kind, description["config"]))


def _input(stated: Mapping[str, Any], default: ImageInput, where: str) -> ImageInput:
    """The input that a preprocessor_config.json states; what it leaves out is as in `default`."""
    if not stated:
        return default
    resized = stated.get("size", {})
    if isinstance(resized, int):  # of old files: of the shorter side where the middle is cut out
        is_short = stated.get("do_center_crop", default.fit == "crop")
        resized = {"shortest_edge": resized} if is_short else {"height": resized, "width": resized}
    crop = stated.get("crop_size", {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    is_cropped = stated.get("do_center_crop", "shortest_edge" in resized or (default.fit == "crop" and not resized))
    short = int(resized.get("shortest_edge", resized.get("height", round(default.size / default.crop_pct))))
    size = int(crop.get("height", default.size)) if is_cropped else short
    filter_number = stated.get("resample", {"bilinear": 2, "bicubic": 3}[default.filter])
    problem = (f"pictures of {resized or crop}, no squares" if _is_oblong(resized) or _is_oblong(crop) else
               f"the filter {filter_number}" if filter_number not in FILTERS else
               f"a scale of {stated['rescale_factor']}"
               if abs(stated.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6 else "")
    if problem:
        raise UserError(f"{where}: its preprocessor_config.json states {problem}, which is not done here")
    is_standardised = stated.get("do_normalize", True)
    mean = tuple(stated.get("image_mean", default.mean)) if is_standardised else (0.0, 0.0, 0.0)
    std = tuple(stated.get("image_std", default.std)) if is_standardised else (1.0, 1.0, 1.0)
    return ImageInput(size, mean, std, "crop" if is_cropped else "squash", size / short if is_cropped else 1.0,
                      FILTERS[filter_number])  # type: ignore[arg-type]


def _is_oblong(sides: Mapping[str, Any]) -> bool:
    return sides.get("height") != sides.get("width")
