"""Sample tables give back what was packed, however they are cut and joined."""

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.project import ROOT
from trimodal.data.samples import Names, Sample, SampleTable, Strings, normalise_caption, ragged_take, stable_hash

SAMPLES = [
    Sample(key="1", source="coco", split="train", image="/d/1.jpg", captions=("A dog.", "狗在跑"),
           languages=("en", "zh"), labels=("dog", "cat")),
    Sample(key=" 2", source="clotho", split="train", audio="/d/ leading blank.wav", start_s=1.5, duration_s=2.25),
    Sample(key="3", source="voxceleb", split="val", image="/d/v.mp4", audio="/d/v.mp4", speaker="id1", captions=("x",)),
    Sample(key="4", source="coco", split="test", image="/d/\udcff.jpg", labels=("cat",)),
]


def test_pack_then_index_is_the_identity() -> None:
    table = SampleTable.pack(SAMPLES)
    assert [table[i] for i in range(len(table))] == SAMPLES
    assert table[-1] == SAMPLES[-1]
    with pytest.raises(IndexError):
        table[4]


def test_masks_and_counts() -> None:
    table = SampleTable.pack(SAMPLES)
    assert table.has_image.tolist() == [True, False, True, True]
    assert table.has_audio.tolist() == [False, True, True, False]
    assert table.has_text.tolist() == [True, False, True, False]
    assert table.caption_count.tolist() == [2, 0, 1, 0]


def test_blank_captions_are_dropped() -> None:
    table = SampleTable.pack([Sample(key="1", source="s", split="train", captions=("  ", "real", "\n\t"))])
    assert table[0].captions == ("real",)


def test_of_equal_captions_one_is_kept_and_their_number() -> None:
    """Without a change of the digest: training sees what it saw. However tables are cut and joined."""
    twice = [Sample(key="1", source="s", split="test", captions=("A dog.", "a cat", "a  dog", "A DOG!")),
             Sample(key="2", source="s", split="test", captions=("a dog",))]
    once = [Sample(key="1", source="s", split="test", captions=("A dog.", "a cat")), twice[1]]
    table = SampleTable.pack(twice)
    assert [table[i] for i in range(2)] == once and table.digest() == SampleTable.pack(once).digest()
    assert table.caption_times.tolist() == [3, 1, 1]
    assert table.select([1, 0]).caption_times.tolist() == [1, 3, 1]
    assert SampleTable.concat([table, SampleTable.pack(once)]).caption_times.tolist() == [3, 1, 1, 1, 1, 1]


def test_select_keeps_order_repeats_and_ragged_columns() -> None:
    table = SampleTable.pack(SAMPLES).select([3, 0, 0, 2])
    assert [table[i] for i in range(4)] == [SAMPLES[3], SAMPLES[0], SAMPLES[0], SAMPLES[2]]
    empty = table.select([])
    assert len(empty) == 0 and len(empty.captions) == 0


def test_concat_recodes_names() -> None:
    parts = [SampleTable.pack(SAMPLES[:1]), SampleTable.pack([]), SampleTable.pack(SAMPLES[1:])]
    joined = SampleTable.concat(parts)
    assert [joined[i] for i in range(4)] == SAMPLES
    assert len(SampleTable.concat([])) == 0


def test_digest_ignores_folders_and_nothing_else() -> None:
    table = SampleTable.pack(SAMPLES)
    moved = [dataclasses.replace(s, image=s.image.replace("/d/", "/elsewhere/"), audio=s.audio.replace("/d/", "/e/"))
             for s in SAMPLES]
    assert SampleTable.pack(moved).digest() == table.digest()
    assert SampleTable.concat([SampleTable.pack(SAMPLES[:2]), SampleTable.pack(SAMPLES[2:])]).digest() == table.digest()
    changes: dict[str, Any] = {
        "key": "9", "source": "z", "split": "train", "image": "/d/z.jpg", "audio": "/d/z.wav", "start_s": 9.0,
        "duration_s": 9.0, "captions": ("y",), "languages": ("en",), "labels": ("z",), "speaker": "id9"}
    assert set(changes) == {f.name for f in dataclasses.fields(Sample)}
    for name, value in changes.items():
        changed = [*SAMPLES[:2], dataclasses.replace(SAMPLES[2], **{name: value}), SAMPLES[3]]
        assert SampleTable.pack(changed).digest() != table.digest(), name


def test_captions_shifted_between_samples_change_the_digest() -> None:
    one = [Sample(key="1", source="s", split="train", captions=("a", "b")), Sample(key="2", source="s", split="train")]
    two = [Sample(key="1", source="s", split="train", captions=("a",)),
           Sample(key="2", source="s", split="train", captions=("b",))]
    assert SampleTable.pack(one).digest() != SampleTable.pack(two).digest()


def test_table_holds_arrays_only_and_pickles_small() -> None:
    text = "word " * 10
    table = SampleTable.pack(Sample(key=str(i), source="s", split="train", captions=(text,)) for i in range(5000))
    assert len(pickle.dumps(table, protocol=5)) < 5000 * 160
    assert all(isinstance(getattr(table, f.name), np.ndarray | Strings | Names) for f in dataclasses.fields(table))
    assert pickle.loads(pickle.dumps(table))[4999] == table[4999]


def test_with_split_renames_all() -> None:
    table = SampleTable.pack(SAMPLES).with_split("val")
    assert {table[i].split for i in range(4)} == {"val"}


@pytest.mark.parametrize(("text", "expected"), [
    ("  A Dog\n runs.", "a dog runs"), ("a dog runs !", "a dog runs"), ("3.5 dogs...", "3.5 dogs"),
    ("狗在跑。", "狗在跑"),
    ("St. Bernard", "st. bernard"), ("?", ""),
])
def test_normalise_caption(text: str, expected: str) -> None:
    assert normalise_caption(text) == expected


def test_stable_hash_is_63_bit_and_equal_in_another_process() -> None:
    texts = [str(i) for i in range(200)]
    values = [stable_hash(text) for text in texts]
    assert len(set(values)) == 200 and all(0 <= v < 2**63 for v in values) and max(values) > 2**62
    code = "from trimodal.data.samples import stable_hash; print(stable_hash('7'))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) == values[7]


def test_ragged_take_matches_a_loop() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 9, size=n) for n in rng.integers(0, 4, size=20)]
    flat = np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    chosen = rng.integers(0, 20, size=50)
    positions, taken = ragged_take(offsets, chosen)
    assert np.array_equal(flat[positions], np.concatenate([rows[i] for i in chosen]))
    assert np.array_equal(np.diff(taken), [len(rows[i]) for i in chosen])
