"""What the page shows of an evaluation: the best and the worst, similarities, the map, and what all of it weighs."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from datasets import Data, load_data
from tests.evaluation import reports
from tests.small_runs import RECIPE
from trimodal.config import Config, config_from_dict
from trimodal.evaluation import embedding_map, gallery, page, page_media
from trimodal.evaluation.page_media import Media
from trimodal.evaluation.protocols import Encoded, Items

COUNT = 12  # samples of each kind


def made(folder: Path, lines: list[dict[str, Any]], **report: Any) -> tuple[Data, Config]:
    folder.mkdir(exist_ok=True)
    (folder / "own.jsonl").write_text("".join(json.dumps({"split": "test", **line}) + "\n" for line in lines))
    config = config_from_dict({
        "data": {"datasets": ["manifest"], "manifest": str(folder / "own.jsonl"), "workers": 0, "cache": False},
        "model": RECIPE["model"], "evaluation": {"resamples": 0}, "report": report,
        "paths": {"data_root": str(folder / "data"), "output_dir": str(folder / "out")}})
    return load_data(config, ["test"]), config


def picture(folder: Path, number: int, noise: int = 0) -> str:
    path = folder / f"{number}.png"
    pixels = np.full((40, 60, 3), (10 * number, 255 - 10 * number, 60), np.uint8)
    if noise:
        pixels = np.random.default_rng(number).integers(0, 256, (noise, noise, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def sound(folder: Path, number: int, seconds: float = 0.5) -> str:
    path = folder / f"{number}.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(int(16_000 * seconds)) * (number + 1) / 30), 16_000)
    return str(path)


def encoded(data: Data, places: dict[str, Any]) -> Encoded:
    """Features by sample and modality: angles in a plane, so that cosines are known."""
    table, items = data.tables["test"], {}
    captions = np.arange(len(table.captions))
    owners = np.repeat(np.arange(len(table)), np.diff(table.caption_offsets))
    for name, angles in places.items():
        own = data.splits["test"]
        rows = owners if name == "text" else np.flatnonzero({"image": table.has_image, "audio": table.has_audio}[name])
        ids = {"text": own.caption_ids, "image": own.image_ids, "audio": own.audio_ids}[name]
        at = torch.tensor([angles[row] for row in rows], dtype=torch.float32)
        features: Tensor = torch.stack([at.cos(), at.sin()], 1)
        items[name] = Items(features, rows, ids if name == "text" else ids[rows])
    return Encoded("test", items, {}, captions, {"manifest": {}})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Config, Encoded]:
    """Pictures, captions and sounds of samples around a circle; the text of sample 3 lies opposite to its picture, that
    of sample 5 some places beside it."""
    folder = tmp_path_factory.mktemp("both")
    data, config = made(folder, [{"image": picture(folder, n), "audio": sound(folder, n), "text": f"number {n}",
                                  "labels": "even" if n % 2 == 0 else "odd"} for n in range(COUNT)])
    around = {n: 2 * np.pi * n / COUNT for n in range(COUNT)}
    moved = {3: around[3] + np.pi, 5: around[5] + 2.2 * around[1]}
    return data, config, encoded(data, {"image": around, "audio": around, "text": around | moved})


def test_the_best_and_the_worst_are_found(both: tuple[Data, Config, Encoded]) -> None:
    data, config, found = both
    shown, media = gallery.collect(found, data, config)
    rows = [row for row in shown["retrievals"] if row["direction"] == "text_to_image"]
    worst, second = (row for row in rows if row["kind"] == "worst")
    assert second["query"]["words"] == "number 5" and second["rank"] == 5
    assert worst["query"]["words"] == "number 3" and worst["rank"] == COUNT == worst["candidates"]
    assert [answer["rank"] for answer in worst["answers"]] == [1, 2, 3, COUNT]
    assert [answer["right"] for answer in worst["answers"]] == [False, False, False, True]
    assert worst["answers"][0]["words"] == "number 9" and worst["answers"][0]["score"] == pytest.approx(1)
    for row in rows:
        if row["kind"] == "best":
            assert row["rank"] == 1 and row["answers"][0]["words"] == row["query"]["words"]
            assert row["query"]["words"] not in ("number 3", "number 5")
    assert {row["kind"] for row in rows} == {"best", "worst", "random"}
    assert {row["direction"] for row in shown["retrievals"]} == {"text_to_image", "text_to_audio", "image_to_audio"}
    heard = next(row for row in shown["retrievals"] if row["direction"] == "image_to_audio")
    assert heard["query"]["picture"] in media and heard["answers"][0]["sound"] in media
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown, "plain data"


def test_pictures_and_sounds_are_what_the_files_hold(both: tuple[Data, Config, Encoded]) -> None:
    data, _, _ = both
    media = Media(data.splits["test"])
    key = media.picture(7)
    assert key is not None
    decoded = Image.open(io.BytesIO(base64.b64decode(media.uris[key].partition(",")[2])))
    assert decoded.format == "WEBP" and decoded.size == (56, 37), "as evaluation reads it"
    assert np.abs(np.asarray(decoded.convert("RGB"))[20, 28].astype(int) - (70, 185, 60)).max() < 8
    key = media.sound(7)
    assert key is not None
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(media.uris[key].partition(",")[2])))
    original, _ = soundfile.read(data.tables["test"].audio[7])
    assert rate == 16_000 and abs(len(wave) - len(original)) < 1_600
    spectra = [np.abs(np.fft.rfft(samples, 16_384)) for samples in (wave, original)]
    assert spectra[0].argmax() == pytest.approx(spectra[1].argmax(), abs=2), "the tone"
    assert wave.std() == pytest.approx(original.std(), rel=0.1)
    assert media.picture(7) == "image-7-176" and len(media.uris) == 2, "once"


def test_sounds_are_short_and_wav_where_mp3_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.sin(np.arange(20 * 16_000) / 10).astype(np.float32)
    for formats, kind, seconds in (({"MP3": ""}, "audio/mpeg", 6.0), ({"WAV": ""}, "audio/wav", 3.0)):
        monkeypatch.setattr(soundfile, "available_formats", lambda formats=formats: formats)
        uri = page_media._sound(wave)
        assert uri.startswith(f"data:{kind};base64,")
        told = soundfile.info(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert told.duration == pytest.approx(seconds, abs=0.1) and told.samplerate == 16_000


def test_similarities_are_counted_whole(both: tuple[Data, Config, Encoded]) -> None:
    data, _, found = both
    told = gallery.similarities(found, data, {})
    assert told.keys() == {"image-text", "audio-text", "image-audio"}
    assert sum(told["image-text"]["right"]) == COUNT and sum(told["image-text"]["wrong"]) == COUNT * (COUNT - 1)
    assert told["image-audio"]["separation"] == 1.0 and told["image-audio"]["right"][-1] == COUNT
    assert told["image-text"]["right"][0] == 1 and told["image-text"]["low"] == pytest.approx(-1)


def test_separation_is_the_area_under_the_roc_line() -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(3, 9, 40) / 10, rng.integers(0, 6, 60) / 10
    expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong])
    assert gallery._separation(right, wrong) == pytest.approx(expected)


def test_speaker_trials_show_the_clearest_and_the_errors(tmp_path: Path) -> None:
    data, config = made(tmp_path, [{"audio": sound(tmp_path, n), "speaker": f"id{n // 4}"} for n in range(8)])
    angles = {n: 1.5 * (n // 4) + 0.05 * n for n in range(8)} | {3: 1.4}  # a sound of the first as of the second
    shown, media = gallery.collect(encoded(data, {"audio": angles}), data, config)
    rows = [row for row in shown["retrievals"] if row["direction"] == "speakers"]
    pairs = [(row, row["answers"][0]) for row in rows]
    told = [(row["kind"], answer["right"], row["query"]["words"], answer["words"]) for row, answer in pairs]
    assert ("worst", True, "id0", "id0") in told and ("worst", False, "id0", "id1") in told
    assert pairs[0][1]["score"] == max(answer["score"] for _, answer in pairs if answer["right"])
    assert all(row["query"]["sound"] in media for row in rows)
    [histogram] = [one for pair, one in shown["similarities"].items() if pair.startswith("speakers")]
    assert sum(histogram["right"]) == 12 and sum(histogram["wrong"]) == 16
    assert {point["class"] for point in shown["map"]["points"]} == {"id0", "id1"}


def test_without_a_gallery_nothing_of_the_files_is_shown(both: tuple[Data, Config, Encoded]) -> None:
    data, config, found = both
    none = dataclasses.replace(config, report=dataclasses.replace(config.report, gallery_queries=0))
    shown, media = gallery.collect(found, data, none)
    assert media == {} and shown["retrievals"] == [] and len(shown["map"]["points"]) == 3 * COUNT


def test_features_that_are_not_finite_and_files_that_have_gone_end_nothing(tmp_path: Path) -> None:
    data, config = made(tmp_path, [{"image": picture(tmp_path, n), "text": f"number {n}"} for n in range(4)])
    found = encoded(data, {name: dict.fromkeys(range(4), 0.5) for name in ("image", "text")})
    found.items["image"].features_NF[2] = float("nan")
    (tmp_path / "1.png").unlink()
    shown, media = gallery.collect(found, data, config)
    assert json.dumps(shown, allow_nan=False)
    assert not [key for key in media if key.startswith("image-1-")] and len(media) == 6, "three, and their thumbnails"


def test_a_page_weighs_no_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, which no format makes small: what is looked at first has room, and the rest is left out."""
    lines = [{"image": picture(tmp_path, n, noise=200), "text": f"number {n}"} for n in range(30)]
    data, config = made(tmp_path, lines)
    at = {n: n / 10 for n in range(30)}
    found = encoded(data, {"image": at, "text": at})
    whole = gallery.collect(found, data, config)[1]
    most = sum(map(len, whole.values())) // 2
    monkeypatch.setattr(gallery, "MOST_BYTES", most)
    shown, media = gallery.collect(found, data, config)
    assert 0.8 * most < sum(map(len, media.values())) <= most < page_media.MOST_BYTES
    assert shown["retrievals"][0]["answers"][0]["picture"] in media
    points = shown["map"]["points"]
    assert {point["picture"] in media for point in points if point["modality"] == "image"} == {True, False}
    text = page.render(reports.composed(reports.run(**shown), []), media)
    assert len(text) < most + 300_000


# ---- the map -----------------------------------------------------------------------------------------------------


def test_the_map_keeps_neighbours_together_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 32)) * 3
    features = np.repeat(centres, 12, 0) + rng.standard_normal((96, 32))
    layout = embedding_map.lay_out(features)
    assert layout.places_N2.shape == (96, 2) and layout.places_N2.min() >= 0 and layout.places_N2.max() <= 1
    assert np.array_equal(layout.places_N2, embedding_map.lay_out(features.copy()).places_N2)
    of = np.repeat(np.arange(8), 12)
    distances = np.linalg.norm(layout.places_N2[:, None] - layout.places_N2[None], axis=2) + np.eye(96) * 9
    assert (of[distances.argmin(1)] == of).mean() > 0.95
    assert layout.kept > layout.kept_pca > 10 / 95


def test_affinities_have_the_perplexity_that_was_asked_for() -> None:
    points = np.random.default_rng(0).standard_normal((100, 5))
    squared = ((points[:, None] - points[None]) ** 2).sum(2)
    joint = embedding_map._affinities(squared)
    assert joint.sum() == pytest.approx(1) and np.allclose(joint, joint.T) and (np.diag(joint) == 0).all()
    assert np.allclose(embedding_map._squared_distances(points), squared)


@pytest.mark.parametrize("features", [np.zeros((3, 4)), np.zeros((20, 4)), np.eye(3), np.ones((12, 1))])
def test_a_map_of_points_that_are_alike_or_few(features: np.ndarray) -> None:
    layout = embedding_map.lay_out(features)
    assert np.isfinite(layout.places_N2).all() and layout.places_N2.shape == (len(features), 2)


def test_what_belongs_together_is_together_though_modalities_lie_apart(both: tuple[Data, Config, Encoded]) -> None:
    data, _, found = both
    features = torch.nn.functional.normalize(torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(0)))
    items = {name: dataclasses.replace(found.items[name], features_NF=features + shift)
             for name, shift in (("image", 0.0), ("text", 3.0))}
    told = gallery.embedding_map(dataclasses.replace(found, items=items), data, Media(data.splits["test"]))
    assert told is not None
    places = {(point["modality"], point["sample"]): (point["x"], point["y"]) for point in told["points"]}
    away = [[np.hypot(*np.subtract(places["image", n], places["text", m])) for m in range(COUNT)] for n in range(COUNT)]
    assert sum(int(np.argmin(row)) == n for n, row in enumerate(away)) >= 10


def test_the_points_of_the_map(both: tuple[Data, Config, Encoded]) -> None:
    data, _, found = both
    told = gallery.embedding_map(found, data, Media(data.splits["test"]))
    assert told is not None and told["of"] == len(told["points"]) == 3 * COUNT
    for point in told["points"]:
        number = int(point["words"].split()[1])
        assert point["sample"] == number and point["class"] == ("even" if number % 2 == 0 else "odd")
        assert (point["picture"] is None) == (point["modality"] != "image")
