"""The generated set: captions name what is shown, and held-out combinations are held out."""

import itertools

import pytest

from trimodal.data.generated import IMAGE_ATTRIBUTES, SOUND_ATTRIBUTES, attributes
from trimodal.sets import synthetic


@pytest.mark.parametrize(("images", "sounds", "held"), [(1800, 384, 64), (128, 128, 32), (256, 256, 64)])
def test_splits_share_no_combination_and_every_word_is_in_train(images: int, sounds: int, held: int) -> None:
    splits = {name: synthetic.read(name, images, sounds) for name in ("train", "val", "test")}
    assert [len(splits[name]) for name in ("val", "test")] == [2 * held, 2 * held]
    assert len(splits["train"]) == images + sounds - 4 * held
    paths = [(s.image, s.audio) for split in splits.values() for s in split]
    assert len(set(paths)) == images + sounds
    captions = [text for split in splits.values() for s in split for text in s.captions]
    assert len(set(captions)) == 2 * (images + sounds)
    trained = {word for sample in splits["train"] for text in sample.captions for word in text.split()}
    assert {word for text in captions for word in text.split()} == trained
    for sample, split in ((s, name) for name, members in splits.items() for s in members):
        assert sample.split == split and sample.source == "synthetic" and bool(sample.image) != bool(sample.audio)


def test_held_out_combinations_do_not_depend_on_how_many_are_in_use() -> None:
    everything = set(synthetic.held_out_split("test", 1800, 1800))
    assert set(synthetic.held_out_split("test", 300, 1800)) == everything


@pytest.mark.parametrize(("captions", "kinds", "total"), [
    (synthetic.image_captions, IMAGE_ATTRIBUTES, 1800), (synthetic.sound_captions, SOUND_ATTRIBUTES, 384)])
def test_both_captions_name_every_attribute(captions, kinds, total) -> None:
    for combination in range(total):
        for text in captions(combination):
            words = f" {text} "
            for value, values in zip(attributes(combination, kinds), kinds, strict=True):
                assert f" {value} " in words, (text, value)
                assert not any(f" {other} " in words for other in values if other != value and other not in value
                               and other not in itertools.chain(*(set(k) - set(values) for k in kinds))), text
