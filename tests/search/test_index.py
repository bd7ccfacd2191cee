"""The index: what it finds is what float64 finds, and its file is read as it was written."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.refusals import refused
from trimodal.search.index import FILE, Entry, Index, ModelName, nearest, write_index

MODEL = ModelName("best_model.pt", "ab" * 32, 48, ("image", "text", "audio"))


def entry(kind: str, path: str) -> Entry:
    duration_s = 2.5 if kind == "audio" else 0.0
    return Entry(kind, path, "00" * 32, 0.0, duration_s, 10, 1_700_000_000_000_000_000)  # type: ignore[arg-type]


def vectors(count: int, seed: int = 0, width: int = 48) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def written(place: Path, images: torch.Tensor, sounds: torch.Tensor, names: str = "{}.jpg") -> Index:
    entries = [entry("image", names.format(n)) for n in range(len(images))]
    entries += [entry("audio", f"{n}.wav") for n in range(len(sounds))]
    place.mkdir()
    write_index(place, place.parent, MODEL, entries, torch.cat([images, sounds]).numpy())
    return Index.open(place)


def by_float64(features_NF: torch.Tensor, query_F: torch.Tensor, top: int) -> list[int]:
    scores = [float(np.dot(row, query_F.double().numpy())) for row in features_NF.double().numpy()]
    return sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:top]


@pytest.mark.parametrize("top", [1, 10, 5000])
def test_search_is_brute_force_in_float64(top: int) -> None:
    features = vectors(3000)
    for seed in range(20):
        query = vectors(1, seed=100 + seed)[0]
        found = nearest(features, query, top)
        assert [row for row, _, _ in found] == by_float64(features, query, top)
        for row, score, _ in found[:10]:
            assert score == pytest.approx(float(features[row].double() @ query.double()), abs=1e-14)


def test_what_float32_cannot_tell_apart_is_in_the_order_of_float64() -> None:
    """2,000 vectors in a ball of 1e-7 around one: their cosines in float32 are a handful of values."""
    centre = vectors(1)[0]
    features = F.normalize(centre + 1e-7 * torch.randn(2000, 48, generator=torch.Generator().manual_seed(1)), dim=1)
    in_float32 = torch.argsort(features @ centre, descending=True, stable=True)[:50].tolist()
    expected = by_float64(features, centre, 50)
    assert in_float32 != expected, "or this test shows nothing"
    assert [row for row, _, _ in nearest(features, centre, 50)] == expected


def test_equal_ones_are_in_their_order() -> None:
    features = vectors(7).repeat(1001, 1)
    query = vectors(1, seed=9)[0]
    best = int((features[:7] @ query).argmax())
    assert [row for row, _, _ in nearest(features, query, 900)] == [best + 7 * n for n in range(900)]


def test_scores_say_how_far_they_stand_out() -> None:
    query = vectors(1)[0]
    features = torch.cat([vectors(999, seed=3), query[None]])
    scores = (features.double() @ query.double())
    [(row, score, deviations)] = nearest(features, query, 1)
    assert (row, round(score, 6)) == (999, 1.0)
    assert deviations == pytest.approx(float((1.0 - scores.mean()) / scores.std(correction=0)), rel=1e-5)
    assert nearest(query[None], query, 3)[0][2] == 0.0, "one entry stands out of nothing"


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    images, sounds = vectors(5000), vectors(3, seed=2)
    index = written(tmp_path / "index", images, sounds, names="ä \udcff\n{}.jpg")
    assert torch.equal(index.features("image"), images) and torch.equal(index.features("audio"), sounds)
    assert index.model == MODEL and index.folder == tmp_path
    assert [e.path for e in index.entries][4999:5001] == ["ä \udcff\n4999.jpg", "0.wav"]
    assert index.by_kind["audio"][2] == entry("audio", "2.wav")
    hit = index.search(sounds[1], "audio", top=1)[0]
    assert hit.entry.path == "1.wav" and hit.score == pytest.approx(1.0)
    assert index.search(images[0], "image", 0) == []


def test_the_file_is_safetensors_to_others(tmp_path: Path) -> None:
    import safetensors.numpy

    images = vectors(5)
    written(tmp_path / "index", images, vectors(0))
    found = safetensors.numpy.load_file(tmp_path / "index" / FILE)
    np.testing.assert_array_equal(found["image"], images.numpy())
    assert found["audio"].shape == (0, 48)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path / "none", "search.py"):
        Index.open(tmp_path / "none")
    written(tmp_path / "index", vectors(5), vectors(2))
    path = tmp_path / "index" / FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], b"PK" + whole[2:], whole.replace(b'"F32"', b'"I32"')):
        path.write_bytes(damaged)
        with refused(path):
            Index.open(tmp_path / "index")
    path.write_bytes(whole.replace(b'schema\\": 1', b'schema\\": 9'))
    with refused(path, 9):
        Index.open(tmp_path / "index")
