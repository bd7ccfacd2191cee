"""Image towers of transformers: random miniatures, saved by the library, opened by name, beside the library itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from tests.towers.checks import GRID, TINY, check_protocol, close, edit_json, made, transformers
from trimodal.data.images import fit_eval
from trimodal.towers.base import ImageInput, PretrainedTower
from trimodal.towers.opening import open_tower

NO_MLP = {key: value for key, value in GRID.items() if key != "intermediate_size"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", GRID),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", GRID),
    "dinov2": ("Dinov2Model", "Dinov2Config", NO_MLP),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", NO_MLP),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**GRID, "num_register_tokens": 4}),
    "vit": ("ViTModel", "ViTConfig", {**GRID, "hidden_dropout_prob": 0.5})}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "vit": 1}
PROCESSOR = {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
             "resample": 3}
ALL = pytest.mark.parametrize("family", FAMILIES)


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def saved(folder: Path, family: str) -> Any:
    model = made(FAMILIES[family][0], FAMILIES[family][1], **FAMILIES[family][2])
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), "utf-8")
    return model


def opened(folder: Path, size: int | None = None) -> PretrainedTower:
    return open_tower(f"hub:{folder}", "image", size=size)


@ALL
def test_it_is_the_library_s_own_and_keeps_to_the_protocol(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    tower = opened(tmp_path)
    assert tower.input == ImageInput(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "squash", 1.0, "bicubic")
    mean, std = (torch.tensor(PROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = model((pixels() / 255 - mean) / std)
        found = tower(pixels())
    close(found.tokens_BND, expected.last_hidden_state[:, PREFIX[family]:])
    pooled = expected.last_hidden_state[:, 0] if family == "vit" else expected.pooler_output
    close(found.pooled_BD, pooled)
    check_protocol(tower, pixels())


@ALL
def test_other_sizes_are_asked_for_by_name(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    tower = opened(tmp_path, size=48)
    with torch.no_grad():
        assert tower(pixels(48)).tokens_BND.shape == (2, 36, 32)
    with refused("model.image_size", 44, 40, f"hub:{tmp_path}", 8):
        opened(tmp_path, size=44)


@pytest.mark.parametrize("whole", ["CLIP", "Siglip"])
def test_the_part_of_a_whole_checkpoint(whole: str, tmp_path: Path) -> None:
    model = made(f"{whole}Model", f"{whole}Config", vision_config=GRID, text_config={**TINY, "vocab_size": 50})
    model.save_pretrained(tmp_path)
    tower = opened(tmp_path, size=32)
    mean, std = (getattr(tower, name)[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.vision_model((pixels() / 255 - mean) / std)
        close(tower(pixels()).pooled_BD, expected.pooler_output)
    assert sum(value.numel() for value in tower.parameters()) == sum(
        value.numel() for value in model.vision_model.parameters())


def test_a_half_precision_file_is_raised_to_float32(tmp_path: Path) -> None:
    made("CLIPVisionModel", "CLIPVisionConfig", **GRID).half().save_pretrained(tmp_path)
    assert {value.dtype for value in opened(tmp_path, size=32).parameters()} == {torch.float32}


def test_a_plan_and_real_pictures_of_dinov3_do_not_meet(tmp_path: Path) -> None:
    """The library keeps the places of patches for the whole process, fake ones of a plan among them."""
    saved(tmp_path, "dinov3_vit")
    tower = opened(tmp_path)
    check_protocol(tower, pixels())  # plans between real passes
    with torch.no_grad():
        assert tower(pixels()).pooled_BD.isfinite().all()


PROCESSORS = [
    ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3},
     ImageInput(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "crop", 0.8, "bicubic")),
    ({"size": {"height": 32, "width": 32}, "resample": 2, "do_normalize": False},
     ImageInput(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "squash", 1.0, "bilinear")),
    ({"size": 32}, ImageInput(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", 1.0, "bilinear"))]


@pytest.mark.parametrize(("stated", "expected"), PROCESSORS)
def test_pictures_are_prepared_as_the_folder_says(stated: dict[str, Any], expected: ImageInput, tmp_path: Path) -> None:
    saved(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated), "utf-8")
    taken = opened(tmp_path).input
    assert taken == expected
    picture = np.random.default_rng(0).integers(0, 256, (12, 9, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    processor = transformers.ViTImageProcessorPil(**{"do_center_crop": False, **stated, "do_rescale": False,
                                                     "do_normalize": False})
    theirs = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = fit_eval(picture, taken.size, taken.fit, taken.crop_pct, taken.filter)
    within = 1 if taken.fit == "squash" else 24  # one resampling for two: shifted by less than a pixel
    assert np.abs(ours.astype(int) - theirs).mean() <= within


def test_what_is_not_done_here_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "vit")
    for changes, named in (({"size": {"height": 32, "width": 16}}, "preprocessor_config.json"),
                           ({"resample": 1}, "preprocessor_config.json"), ({"rescale_factor": 1.0}, 1.0)):
        edit_json(tmp_path / "preprocessor_config.json", **{**PROCESSOR, **changes})
        with refused(f"hub:{tmp_path}", named):
            opened(tmp_path)
    edit_json(tmp_path / "config.json", model_type="siglip2")
    with refused(f"hub:{tmp_path}", "siglip2", "siglip"):
        opened(tmp_path)
