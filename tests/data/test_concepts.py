"""Concepts: labels first, then words by frequency, and which of them a sample has."""

from tests.refusals import refused
from trimodal.data.concepts import concept_names, concepts_of
from trimodal.data.samples import Sample, SampleTable


def table(*rows: tuple[tuple[str, ...], tuple[str, ...]]) -> SampleTable:
    return SampleTable.pack(Sample(key=str(i), source="s", split="train", captions=captions, labels=labels)
                            for i, (captions, labels) in enumerate(rows))


TRAIN = table((("A dog runs.", "the dog and the ball", "dog dog dog"), ("Traffic Light",)),
              (("a dog on grass",), ()), (("two birds on grass",), ("apple", "Traffic Light")),
              (("an unusual word", "birds and grass"), ()))


def test_labels_come_first_and_words_by_the_samples_that_have_them() -> None:
    assert concept_names(TRAIN, 10) == ["apple", "traffic light", "grass", "birds", "dog"]  # 3, then 2 and 2 samples
    assert concept_names(TRAIN, 3) == ["apple", "traffic light", "grass"]


def test_words_of_chinese_are_its_short_runs_and_pairs_of_longer_ones() -> None:
    train = table((("一只红色的青蛙。", "a frog"), ()), (("青蛙和自行车",), ()), (("红色自行车", "a frog"), ()),
                  (("狗",), ()), (("两只狗在草地上",), ()))
    assert concept_names(train, 9) == ["frog", "狗", "红色", "自行", "行车", "青蛙"]  # 色自 stands once
    ids, offsets = concepts_of(train, ["狗", "行车", "frog"])
    assert [ids[offsets[i]:offsets[i + 1]].tolist() for i in range(5)] == [[2], [1], [1, 2], [0], [0]]


def test_more_labels_than_classes_are_an_error() -> None:
    assert concept_names(TRAIN, 2) == ["apple", "traffic light"]
    with refused("model.num_classes", 1, 2):
        concept_names(TRAIN, 1)


def test_a_word_that_is_also_a_label_is_one_concept() -> None:
    train = table((("a dog",), ("Dog",)), (("a dog and a cat",), ()), (("a cat",), ()))
    assert concept_names(train, 10) == ["dog", "cat"]
    ids, offsets = concepts_of(train, ["dog", "cat"])
    assert [ids[offsets[i]:offsets[i + 1]].tolist() for i in range(3)] == [[0], [0, 1], [1]]


def test_concepts_of_come_from_labels_and_from_every_caption() -> None:
    names = ["apple", "traffic light", "grass", "birds", "dog"]
    ids, offsets = concepts_of(TRAIN, names)
    assert [ids[offsets[i]:offsets[i + 1]].tolist() for i in range(4)] == [[1, 4], [2, 4], [0, 1, 2, 3], [2, 3]]
    unknown = table((("nothing of this",), ("else",)), ((), ()))
    assert concepts_of(unknown, names)[1].tolist() == [0, 0, 0]
