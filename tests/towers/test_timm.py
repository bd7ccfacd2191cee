"""Image towers of timm: its own small architectures with random weights, from files and folders, beside timm itself."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from tests.test_safety import as_pickle, as_torch_file, unsprung
from tests.towers.checks import check_protocol, close, with_statistics
from trimodal.data.images import fit_eval
from trimodal.errors import ConfigError
from trimodal.towers.base import ImageInput, PretrainedTower
from trimodal.towers.opening import open_tower

timm: Any = importlib.import_module("timm")
ALL = pytest.mark.parametrize("name", [
    "test_vit", "test_efficientnet", "test_resnet", "test_convnext", "test_mambaout", "mobilenetv4_conv_small_035"])


def model_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return with_statistics(timm.create_model(name, **options))


def weights_of(model: Any, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def standardised(tower: PretrainedTower, images: torch.Tensor) -> torch.Tensor:
    taken = tower.input
    assert isinstance(taken, ImageInput)
    return (images / 255 - torch.tensor(taken.mean)[:, None, None]) / torch.tensor(taken.std)[:, None, None]


@ALL
def test_it_is_timm_s_own_and_keeps_to_the_protocol(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    tower = open_tower(f"timm:{name}", "image", weights=weights_of(model, tmp_path))
    assert isinstance(tower.input, ImageInput)
    images = pictures(tower.input.size)
    with torch.no_grad():
        states = model.forward_features(standardised(tower, images))
        close(tower(images).pooled_BD, model.forward_head(states, pre_logits=True))
        tokens = states.flatten(2).mT if states.ndim == 4 else states[:, model.num_prefix_tokens:]
        if tokens.shape[2] == tower.dim:
            close(tower(images).tokens_BND, tokens)
    check_protocol(tower, images, weights=str(tmp_path / "weights.pth"))


def test_positions_are_those_of_another_size_where_it_is_asked_for(tmp_path: Path) -> None:
    model = model_of("test_vit")
    tower = open_tower("timm:test_vit", "image", weights=weights_of(model, tmp_path), size=96)
    resized = timm.create_model("test_vit", pretrained=True, num_classes=0, img_size=96,
                                pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}).eval()
    with torch.no_grad():
        close(tower(pictures(96)).pooled_BD, resized(standardised(tower, pictures(96))))
    check_protocol(tower, pictures(96), weights=str(tmp_path / "weights.pth"), size=96)
    file = weights_of(model_of("test_resnet"), tmp_path / "network")
    network = open_tower("timm:test_resnet", "image", weights=file, size=64)
    assert network(pictures(64)).tokens_BND.shape[1] == 4
    with refused("model.image_size", 97, "timm:test_vit", 160, error=ConfigError):
        open_tower("timm:test_vit", "image", weights=str(tmp_path / "weights.pth"), size=97)


@pytest.mark.parametrize("source", ["{}", "hub:{}"])
def test_a_folder_that_timm_wrote(source: str, tmp_path: Path) -> None:
    model = model_of("test_vit", num_classes=5, img_size=64)
    hub = importlib.import_module("timm.models").save_for_hf
    hub(model, tmp_path, model_args={"img_size": 64}, safe_serialization=True)
    tower = open_tower(source.format(tmp_path), "image", size=64)
    with torch.no_grad():
        states = model.forward_features(standardised(tower, pictures(64)))
        close(tower(pictures(64)).pooled_BD, model.forward_head(states, pre_logits=True))
    check_protocol(tower, pictures(64), size=64)


def test_dinov3_gives_its_class_token_and_siglip_is_squashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimodal.towers import from_timm

    assert from_timm._options(timm, "vit_small_patch16_dinov3.lvd1689m", None, "") == {"global_pool": "token"}
    siglip, clip = (open_tower(f"timm:vit_base_patch32_{name}", "image", load="never").input
                    for name in ("siglip_256.v2_webli", "clip_quickgelu_224.openai"))
    assert isinstance(siglip, ImageInput) and isinstance(clip, ImageInput)
    assert (siglip.size, siglip.fit, siglip.crop_pct, siglip.filter) == (256, "squash", 1.0, "bicubic")
    assert (clip.size, clip.fit, round(clip.mean[0], 3)) == (224, "crop", 0.481)


def test_pictures_are_prepared_as_timm_s_transform_does() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 9, 3)).repeat(40, 0).repeat(40, 1).astype(np.uint8)
    transform = timm.data.create_transform((3, 224, 224), crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0),
                                           std=(1, 1, 1))
    theirs = transform(Image.fromarray(picture)).permute(1, 2, 0).numpy() * 255
    ours = fit_eval(picture, 224, "crop", 0.875, "bicubic")
    assert np.abs(ours - theirs).mean() < 4  # sharp edges, shifted by less than a pixel


@pytest.mark.parametrize(("name", "named"), [
    ("timm:vit_base_patch32_clip_224.openai", "timm:vit_base_patch32_clip_quickgelu_224.openai"),
    ("timm:vit_base_patch32_clip_224.laion400m_e32", "timm:vit_base_patch32_clip_quickgelu_224.laion400m_e32"),
    ("timm:resnet5", "resnet50"), ("timm:resnet50.a1_in2k", "a1_in1k"), ("timm:timm/resnet50", "hub:timm/resnet50")])
def test_names_that_are_not_what_was_meant(name: str, named: str) -> None:
    with refused("model.image.tower", name, named, error=ConfigError):
        open_tower(name, "image")


def test_weights_that_are_not_whole_or_of_another_model(tmp_path: Path) -> None:
    model = model_of("test_efficientnet")  # with a classifier, beside which timm itself lets layers be missing
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.1.")}
    torch.save(state, tmp_path / "part.pth")
    for name, file in (("test_efficientnet", "part.pth"), ("test_vit", "part.pth")):
        with refused(f"timm:{name}", tmp_path / file):
            open_tower(f"timm:{name}", "image", weights=str(tmp_path / file))
    whole = Path(weights_of(model, tmp_path))
    whole.write_bytes(whole.read_bytes()[:-1000])
    with refused("timm:test_efficientnet", whole):
        open_tower("timm:test_efficientnet", "image", weights=str(whole))
    with refused("model.image.weights", tmp_path / "nowhere.pth", error=ConfigError):
        open_tower("timm:test_efficientnet", "image", weights=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("make", [as_pickle, as_torch_file])
def test_weights_run_no_code(make: Any, tmp_path: Path) -> None:
    marker = tmp_path / "SPRUNG"
    path = make(tmp_path / "weights.pth", marker)
    with unsprung(marker, "timm:test_vit", path):
        open_tower("timm:test_vit", "image", weights=str(path))
