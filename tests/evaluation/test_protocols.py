"""Protocols: each sample encoded once, the right captions with the right samples, sets, subsets, trials, examples."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datasets import Data, Loader, load_data
from model import TriModalModel
from tests.refusals import assert_names, refused
from tests.small_runs import RECIPE, float64
from trimodal.config import Config, config_from_dict
from trimodal.evaluation import gallery, metrics, protocols, trials
from trimodal.evaluation.protocols import Setting
from trimodal.training.run import build_model

CPU = Setting(device=torch.device("cpu"))
PLAIN = Setting(device=torch.device("cpu"), concepts=False)
ROUNDING = torch.finfo(torch.float32).eps  # features are kept in float32, whatever they are computed in


def _config(tmp_path: Path, lines: list[dict] | None, **sections: dict) -> Config:
    sets = ["synthetic"]
    if lines is not None:
        (tmp_path / "own.jsonl").write_text("".join(json.dumps({"split": "test", **line}) + "\n" for line in lines))
        sets = ["manifest"]
    base: dict[str, dict] = {
        "data": {"datasets": sets, "manifest": str(tmp_path / "own.jsonl"), "workers": 0, "cache": False},
        "model": RECIPE["model"], "evaluation": {"batch_size": 5, "resamples": 20},
        "paths": {"data_root": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return config_from_dict(base)


def _model(config: Config, data: Data) -> TriModalModel:
    """Fresh, in float64: what then differs by more than ROUNDING differs."""
    with float64():
        return build_model(config, data, None)


def _picture(folder: Path, number: int) -> str:
    """One colour, which tells the number."""
    path = folder / f"{number}.png"
    Image.fromarray(np.full((40, 40, 3), (10 * number, 255 - 10 * number, 60), np.uint8)).save(path)
    return str(path)


def _sound(folder: Path, number: int, seconds: float = 0.5) -> str:
    path = folder / f"{number}.wav"
    t = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * t), 16_000)
    return str(path)


def test_what_can_be_scored_is_known_before(tmp_path: Path) -> None:
    shown = [{"image": _picture(tmp_path, n), "text": f"number {n}"} for n in range(3)]
    heard = [{"audio": _sound(tmp_path, n), "text": f"tone {n}"} for n in range(2)]
    train = [{"text": "words to train on", "split": "train"}, {"text": "more words", "split": "train"}]
    for lines, possible in (([], False), (shown[:1], False), ([shown[0], heard[0]], False), (shown[:2], True),
                            (heard, True), ([{"image": shown[n]["image"], "labels": "x"} for n in range(2)], True),
                            ([{"image": shown[n]["image"]} for n in range(2)], False)):
        data = load_data(_config(tmp_path, train + lines))
        assert protocols.can_score(data, "test") == possible, lines


class Oracle(torch.nn.Module):
    """A model that knows the colours of `_picture` and the captions that name them, and tells what it was given."""

    def __init__(self, numbers: dict[tuple[int, ...], int]):
        super().__init__()
        self.numbers, self.pictures_seen = numbers, 0

    def image_features(self, images):
        self.pictures_seen += len(images)
        return torch.eye(32)[(images[:, 0, 16, 16].float() / 10).round().long()]

    def text_features(self, ids, mask):
        return torch.eye(32)[[self.numbers[tuple(row[keep].tolist())] for row, keep in zip(ids, mask, strict=True)]]


def _captioned(tmp_path, count=12, most_captions=3):
    """Pictures with one to three captions each, an oracle for them, and the data."""
    captions = {n: [f"number {n} phrase {k}" for k in range(1 + n % most_captions)] for n in range(count)}
    config = _config(tmp_path, [{"image": _picture(tmp_path, n), "text": captions[n]} for n in range(count)])
    data = load_data(config, ["test"])
    numbers: dict[tuple[int, ...], int] = {}
    for n, texts in captions.items():
        ids, mask = data.tokenizer.encode(texts, 12)
        numbers |= {tuple(row[keep].tolist()): n for row, keep in zip(ids, mask, strict=True)}
    return config, data, Oracle(numbers)


def test_a_perfect_model_finds_everything_and_encodes_each_picture_once(tmp_path):
    config, data, oracle = _captioned(tmp_path)
    figures, encoded = protocols.evaluate_split(oracle, data, "test", config, PLAIN)
    assert oracle.pictures_seen == 12
    pair = figures["manifest"]["image-text"]
    assert pair["image_to_text_R@1"]["value"] == pair["text_to_image_R@1"]["value"] == 1.0
    assert pair["text_to_image_R@1"]["queries"] == 24 == pair["image_to_text_R@1"]["candidates"]
    assert figures["all"] == figures["manifest"]
    assert figures.keys() == {"all", "manifest"} and figures["manifest"].keys() == {"image-text"}
    assert encoded.facts == {"manifest": {"samples": 12, "of": 12, "broken": 0, "subset_seed": None, "nonfinite": {}}}


def test_a_model_that_is_wrong_about_one_picture(tmp_path):
    config, data, oracle = _captioned(tmp_path)
    two = [key for key, n in oracle.numbers.items() if n == 2]
    oracle.numbers |= dict.fromkeys(two, 5)
    pair = protocols.evaluate_split(oracle, data, "test", config, PLAIN)[0]["all"]["image-text"]
    assert pair["text_to_image_R@1"]["value"] == pytest.approx(21 / 24)
    assert pair["image_to_text_R@1"]["value"] == pytest.approx(10 / 12)  # 2 finds nothing, 5 finds three strangers too


def test_the_same_words_on_two_pictures_are_right_for_both(tmp_path):
    texts = ["a dog", "A dog. ", "a cat"]
    config = _config(tmp_path, [{"image": _picture(tmp_path, n), "text": text} for n, text in enumerate(texts)])
    data = load_data(config, ["test"])
    model = _model(config, data)
    pair = protocols.evaluate_split(model, data, "test", config, PLAIN)[0]["all"]["image-text"]
    assert pair["text_to_image_R@1"]["chance"] == pair["image_to_text_R@1"]["chance"] == pytest.approx(5 / 9)


def test_captions_of_each_language_are_also_scored_alone_on_the_same_pictures(tmp_path):
    """Together both are right answers; a picture without a caption in one of them is left out of all parts."""
    told = {(n, language): f"{word} {n}" for n in range(5) for word, language in (("number", "en"), ("item", "zh"))
            if (n, language) != (4, "zh")}
    config = _config(tmp_path, [{"image": _picture(tmp_path, n), "text": text, "language": language}
                                for (n, language), text in told.items()], data={"languages": ["en", "zh"]})
    data = load_data(config, ["test"])
    ids, mask = data.tokenizer.encode(list(told.values()), 12)
    oracle = Oracle({tuple(row[keep].tolist()): 0 if of == (1, "zh") else of[0]
                     for of, row, keep in zip(told, ids, mask, strict=True)})  # wrong about one in Chinese
    figures = protocols.evaluate_split(oracle, data, "test", config, PLAIN)[0]
    assert figures.keys() == {"all", "manifest", "manifest_en", "manifest_zh"}
    both, english, han = (figures[name]["image-text"] for name in ("manifest", "manifest_en", "manifest_zh"))
    assert [both["text_to_image_R@1"][key] for key in ("queries", "candidates")] == [9, 5]
    for one in (english, han):
        assert [one["text_to_image_R@1"][key] for key in ("queries", "candidates")] == [4, 4]
        assert one["image_to_text_R@1"]["chance"] == pytest.approx(1 / 4)
    assert english["text_to_image_R@1"]["value"] == 1.0 and han["text_to_image_R@1"]["value"] == 0.75
    assert both["image_to_text_R@1"]["chance"] == pytest.approx((4 * 2 / 9 + 1 / 9) / 5)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    config = _config(tmp_path_factory.mktemp("synthetic"), None,
                     data={"synthetic_images": 128, "synthetic_sounds": 128})
    data = load_data(config)
    return config, data, _model(config, data)


@pytest.fixture(scope="module")
def evaluated(synthetic):
    config, data, model = synthetic
    figures, encoded = protocols.evaluate_split(model.train(), data, "test", config, CPU)
    assert model.training  # as it was before
    model.eval()
    return figures, encoded


def test_figures_equal_those_of_samples_encoded_one_by_one(synthetic, evaluated):
    (_, data, model), (figures, encoded) = synthetic, evaluated
    split = data.splits["test"]
    rows = np.flatnonzero(split.table.has_audio)
    texts, owners, words = [], [], []
    with torch.no_grad():
        for place, row in enumerate(rows):
            for caption in split.table.captions_of(row):
                texts.append(model.text_features(*data.tokenizer.encode([caption], 12)).float())
                owners.append(place)
                words.append(hash(caption))
    sounds = encoded.items["audio"].features_NF
    assert encoded.items["audio"].rows_N.tolist() == rows.tolist()
    assert torch.allclose(encoded.items["text"].features_NF[-len(texts):], torch.cat(texts), rtol=0, atol=ROUNDING)
    expected = metrics.retrieval(sounds, torch.cat(texts), torch.tensor(owners), torch.tensor(words),
                                 names=("audio", "text"), options=metrics.Options(resamples=20))
    for name, figure in expected.items():
        assert figures["synthetic"]["audio-text"][name] == pytest.approx(figure), name


def test_an_untrained_model_says_what_chance_is_and_answers_concepts(synthetic, evaluated):
    (config, data, model), (figures, encoded) = synthetic, evaluated
    assert figures["synthetic"].keys() == {"image-text", "audio-text", "image-concepts", "audio-concepts"}
    answers = encoded.answers["image"]
    assert answers.logits_NK.shape == answers.concepts_NK.shape == (32, 60)
    batch, = Loader(data, "test", [(0, answers.rows_N[-3:])], config, inputs=[("image", "text")],
                    train=False, epoch=0)
    with torch.no_grad():
        expected = model(images=batch.images)["logits"].float()
    assert torch.allclose(answers.logits_NK[-3:], expected, rtol=ROUNDING, atol=ROUNDING)
    assert batch.concepts is not None and torch.equal(answers.concepts_NK[-3:], batch.concepts)
    figure = figures["synthetic"]["image-concepts"]["image_to_concepts_mAP"]
    assert 0 < figure["chance"] < 1 and figure["candidates"] == 32
    without = protocols.evaluate_split(model, data, "test", config, PLAIN)[0]
    assert without["synthetic"].keys() == {"image-text", "audio-text"}
    for name, figure in figures["synthetic"]["image-text"].items():
        assert without["synthetic"]["image-text"][name] == pytest.approx(figure), name


def test_a_limit_draws_the_same_part_of_every_set_and_kind_each_time(synthetic):
    config, data, model = synthetic
    rows = protocols.chosen_rows(data, "test", 10)
    again = protocols.chosen_rows(data, "test", 10)
    assert {kind: part.tolist() for kind, part in rows.items()} == {kind: part.tolist() for kind, part in again.items()}
    assert {kind: len(part) for kind, part in rows.items()} == {("image", "text"): 10, ("text", "audio"): 10}
    whole = protocols.chosen_rows(data, "test", None)
    assert sum(map(len, whole.values())) == len(data.tables["test"])
    encoded = protocols.encode_split(model, data, "test", config, Setting(device=CPU.device, limit=10, concepts=False))
    assert encoded.facts["synthetic"] | {"nonfinite": {}} == {
        "samples": 20, "of": len(data.tables["test"]), "broken": 0, "subset_seed": 0, "nonfinite": {}}


def test_features_that_are_not_finite_are_counted(synthetic, monkeypatch):
    config, data, model = synthetic
    monkeypatch.setattr(model, "text_features", lambda ids, mask: torch.full((len(ids), 8), torch.nan))
    figures, encoded = protocols.evaluate_split(model, data, "test", config, PLAIN)
    assert encoded.facts["synthetic"]["nonfinite"] == {"text": len(data.tables["test"].captions)}
    assert figures["all"]["image-text"]["image_to_text_R@10"]["value"] == 0.0


def test_image_and_audio_of_one_sample_pair_up(tmp_path):
    lines: list[dict] = [{"image": _picture(tmp_path, n), "audio": _sound(tmp_path, n), "text": f"both {n}"}
                         for n in range(6)]
    lines += [{"image": _picture(tmp_path, n), "text": f"picture {n}"} for n in range(6, 9)]
    lines += [{"audio": _sound(tmp_path, 30), "labels": ["hum"]}]
    config = _config(tmp_path, lines)
    data = load_data(config, ["test"], concepts=["hum", "noise"])
    figures, _ = protocols.evaluate_split(_model(config, data), data, "test", config, CPU)
    pairs = figures["manifest"]
    assert pairs["image-audio"]["image_to_audio_R@1"]["candidates"] == 6
    assert pairs["image-text"]["text_to_image_R@1"]["candidates"] == 9
    assert pairs["audio-text"]["text_to_audio_R@1"]["candidates"] == 6


def test_a_set_without_samples_in_the_split_is_told(tmp_path):
    lines: list[dict] = [{"image": _picture(tmp_path, n), "text": f"number {n}", "split": "train"} for n in range(4)]
    config = _config(tmp_path, lines, data={"datasets": ["manifest", "synthetic"], "synthetic_images": 128,
                                            "synthetic_sounds": 128})
    data = load_data(config, ["test"])
    encoded = protocols.encode_split(_model(config, data), data, "test", config, PLAIN)
    assert encoded.facts["synthetic"]["samples"] == 64
    assert encoded.facts["manifest"] == {"samples": 0, "of": 0, "broken": 0, "subset_seed": None, "nonfinite": {}}


def test_samples_that_give_no_figure_are_no_random_part(tmp_path):
    lines: list[dict] = [{"image": _picture(tmp_path, n), "text": f"number {n}"} for n in range(4)]
    config = _config(tmp_path, [*lines, {"text": "number 7"}])
    data = load_data(config, ["test"])
    encoded = protocols.encode_split(_model(config, data), data, "test", config, PLAIN)
    assert encoded.facts["manifest"] == {"samples": 4, "of": 5, "broken": 0, "subset_seed": None, "nonfinite": {}}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_a_broken_file_is_left_out_and_counted(tmp_path, size):
    """However it is batched, even alone: none of its neighbours stands in for it."""
    lines = [{"image": _picture(tmp_path, n), "text": f"number {n}"} for n in range(6)]
    (tmp_path / "3.png").write_bytes(b"no picture")
    config = _config(tmp_path, lines, data={"max_bad_pct": 50.0}, evaluation={"batch_size": size})
    data = load_data(config, ["test"])
    figures, encoded = protocols.evaluate_split(_model(config, data), data, "test", config, CPU)
    assert encoded.facts["manifest"]["broken"] == 1 and encoded.facts["manifest"]["samples"] == 6
    assert figures["manifest"]["image-text"]["text_to_image_R@1"]["candidates"] == 5
    assert encoded.items["image"].rows_N.tolist() == encoded.captions_C.tolist() == [0, 1, 2, 4, 5]
    without = load_data(_config(tmp_path, [*lines[:3], *lines[4:]]), ["test"])
    model = _model(config, data)
    expected, _ = protocols.evaluate_split(model, without, "test", config, CPU)
    again, _ = protocols.evaluate_split(model, data, "test", config, CPU)
    for name, figure in expected["all"]["image-text"].items():
        assert again["all"]["image-text"][name] == pytest.approx(figure), name


def test_stamps_stand_with_and_without_symbols(tmp_path):
    for n in range(40):
        folder = tmp_path / "data" / "stamps" / ("symbols" if n % 2 else "animals")
        folder.mkdir(parents=True, exist_ok=True)
        _picture(folder, n)
        (folder / f"{n}.txt").write_text(f"thing {n}\n")
    own = [{"image": _picture(tmp_path, n), "text": f"number {n}"} for n in range(4)]
    config = _config(tmp_path, own, data={"datasets": ["stamps", "manifest"]})
    data = load_data(config, ["test"])
    figures, _ = protocols.evaluate_split(_model(config, data), data, "test", config, CPU)
    stamps = data.tables["test"].sources.codes == data.tables["test"].sources.names.index("stamps")
    symbols = [data.tables["test"][i].labels == ("symbols",) for i in np.flatnonzero(stamps).tolist()]
    count = {name: pairs["image-text"]["text_to_image_R@1"]["candidates"] for name, pairs in figures.items()}
    assert count["stamps"] == stamps.sum() and 0 < sum(symbols) < len(symbols)
    assert count["stamps_without_symbols"] == len(symbols) - sum(symbols)
    assert count["all"] == count["stamps"] + count["manifest"]


class Small(Oracle):
    """An oracle whose device has no room for more than `most` pictures; `sizes` are those of all it was given."""

    def __init__(self, numbers: dict[tuple[int, ...], int], error: Exception, most: int = 100):
        super().__init__(numbers)
        self.error, self.most = error, most
        self.sizes: dict[str, list[int]] = {"image": [], "text": []}

    def image_features(self, images):
        self.sizes["image"].append(len(images))
        if len(images) > self.most:
            raise self.error
        return super().image_features(images)

    def text_features(self, ids, mask):
        self.sizes["text"].append(len(ids))
        return super().text_features(ids, mask)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_parts_from_there_on_and_changes_nothing(tmp_path, error):
    config, data, oracle = _captioned(tmp_path, 10, most_captions=1)
    small, told = Small(oracle.numbers, error, most=3), []
    setting = Setting(device=CPU.device, concepts=False, sizes={"image": 8, "text": 8},
                      less=lambda size, cause: told.append(size))
    encoded = protocols.encode_split(small, data, "test", config, setting)
    assert small.sizes["image"] == [5, 4, 2, 2, 1, 2, 2, 1], "in two batches of 5; it does not run out again"
    assert small.sizes["text"] == [2, 2, 1, 2, 2, 1] and told == [4, 2]
    untroubled = protocols.encode_split(oracle, data, "test", config, PLAIN)
    for name, items in untroubled.items.items():
        assert torch.equal(encoded.items[name].features_NF, items.features_NF)
    with refused("--device cpu"):
        protocols.encode_split(Small(oracle.numbers, error, most=0), data, "test", config, PLAIN)


def test_evaluation_encodes_as_many_at_a_time_as_its_plan_says(tmp_path):
    config, data, oracle = _captioned(tmp_path, 5, most_captions=1)
    small = Small(oracle.numbers, MemoryError())
    protocols.encode_split(small, data, "test", config, Setting(device=CPU.device, concepts=False, sizes={"image": 2}))
    assert small.sizes == {"image": [2, 2, 1], "text": [5]}


def test_long_sounds_are_encoded_in_smaller_parts_with_the_same_result(tmp_path):
    lines = [{"audio": _sound(tmp_path, n, seconds=25.0 if n == 2 else 0.5), "text": f"tone {n}"} for n in range(5)]
    config = _config(tmp_path, lines)
    data = load_data(config, ["test"])
    model = _model(config, data).eval()
    given = []
    model.audio.register_forward_hook(lambda module, args, out: given.append(tuple(args[0].shape[:2])))
    encoded = protocols.encode_split(model, data, "test", config, CPU)
    assert given == [(1, 64), (1, 64), (1, 2512), (1, 64), (1, 64)]  # a window each of 5 at a time; none is padded
    with torch.no_grad():
        alone = model.audio_features(torch.from_numpy(data.splits["test"].store.mel(0))[None]).float()
    assert torch.allclose(encoded.items["audio"].features_NF[0], alone[0], rtol=0, atol=ROUNDING)


def _vox(tmp_path, speakers=5, videos=3):
    for s in range(speakers):
        for v in range(videos):
            folder = tmp_path / "data" / "voxceleb" / "voxceleb1" / "wav" / f"id{10270 + s}" / f"video{v}"
            folder.mkdir(parents=True)
            _sound(folder, s + v).replace(".wav", "")
    return _config(tmp_path, None, data={"datasets": ["voxceleb"]}, evaluation={"batch_size": 16, "resamples": 20})


@pytest.mark.parametrize("place", ["voxceleb1/veri_test2.txt", "veri_test.txt", "meta/voxceleb1_test_v2.txt",
                                   "voxceleb1/metadata/list_test_hard.txt", "voxceleb2/list_test_all2.txt"])
def test_speakers_are_verified_on_the_trial_list(tmp_path, place):
    """Lists name files, as they were published: with .wav."""
    config = _vox(tmp_path)
    data = load_data(config, ["test"])
    keys = [data.tables["test"].keys[i] for i in range(len(data.tables["test"]))]
    names = [f"{key.removeprefix('vox1/')}.wav" for key in keys]
    assert len(keys) == 15 and all((tmp_path / "data/voxceleb/voxceleb1/wav" / name).is_file() for name in names)
    tried = [(a, b) for i, a in enumerate(names) for b in names[:i] if (len(a) + i) % 2]
    lines = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}" for a, b in tried]
    path = tmp_path / "data" / "voxceleb" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "1 id10270/gone/1.wav id10270/gone/2.wav", ""]))
    (tmp_path / "data/voxceleb/voxceleb1/list_test_hard2.txt").write_text("1 id10270/gone/1.wav id10270/gone/2.wav\n")
    model = _model(config, data)
    figures, encoded = protocols.evaluate_split(model, data, "test", config, CPU)
    figure = figures["voxceleb"]["speakers"]["EER"]
    assert figure["queries"] == len(tried)
    assert_names(encoded.facts["voxceleb"]["trials"], place, len(tried), len(tried) + 1)
    features = dict(zip(names, encoded.items["audio"].features_NF.double(), strict=True))
    scores = [float(features[a] @ features[b]) for a, b in tried]
    same = [a.split("/")[0] == b.split("/")[0] for a, b in tried]
    expected = metrics.verification(np.array(scores), np.array(same), np.array([(a[:7], b[:7]) for a, b in tried]))
    assert figure["value"] == pytest.approx(expected["EER"]["value"], abs=1e-9)


def test_a_trial_list_of_other_files_is_named(tmp_path):
    config = _vox(tmp_path, speakers=3, videos=2)
    (tmp_path / "data/voxceleb/voxceleb1/veri_test.txt").write_text("1 id10270/gone/1.wav id10270/gone/2.wav\n")
    data = load_data(config, ["test"])
    _, encoded = protocols.evaluate_split(_model(config, data), data, "test", config, CPU)
    assert_names(encoded.facts["voxceleb"]["trials"], "voxceleb1/veri_test.txt", 15, trials.SAMPLING_SEED)


def test_without_a_trial_list_all_pairs_are_tried_and_said(tmp_path):
    config = _vox(tmp_path, speakers=3, videos=12)
    data = load_data(config, ["test"])
    figures, encoded = protocols.evaluate_split(_model(config, data), data, "test", config, CPU)
    assert_names(encoded.facts["voxceleb"]["trials"], 435, 30, trials.SAMPLING_SEED)
    assert figures["voxceleb"]["speakers"]["EER"]["queries"] == 30 * 29 // 2  # 10 of the 12 of each speaker


def test_examples_show_the_best_answers_and_mark_the_right_one(tmp_path):
    config, data, oracle = _captioned(tmp_path)
    encoded = protocols.encode_split(oracle, data, "test", config, PLAIN)
    rows = gallery.examples(encoded, data, "image", queries=4)
    assert len(rows) == 4 and len({row["query"].split()[1] for row in rows}) == 4
    for row in rows:
        number = int(row["query"].split()[1])
        best = row["answers"][0]
        assert len(row["answers"]) == 5 and row["rank"] == 1 and row["candidates"] == 12
        assert best["right"] and best["picture"][0, 0].tolist() == [10 * number, 255 - 10 * number, 60]
        assert best["caption"] == f"number {number} phrase 0" and best["score"] == 1.0
        assert not any(answer["right"] for answer in row["answers"][1:])
    assert gallery.examples(encoded, data, "audio", queries=4) == []


def test_examples_ask_each_wording_once(tmp_path):
    config = _config(tmp_path, [{"image": _picture(tmp_path, n), "text": f"number {n // 2}"} for n in range(12)])
    data = load_data(config, ["test"])
    ids, mask = data.tokenizer.encode([f"number {n}" for n in range(6)], 12)
    oracle = Oracle({tuple(row[keep].tolist()): n for n, (row, keep) in enumerate(zip(ids, mask, strict=True))})
    encoded = protocols.encode_split(oracle, data, "test", config, PLAIN)
    rows = gallery.examples(encoded, data, "image", queries=12)
    assert sorted(row["query"] for row in rows) == [f"number {n}" for n in range(6)]


def test_examples_of_sounds_hold_log_mels(synthetic, evaluated):
    row = gallery.examples(evaluated[1], synthetic[1], "audio", queries=2)[0]
    picture = row["answers"][0]["picture"]
    assert picture.ndim == 2 and picture.shape[1] == 80 and picture.dtype == np.float16
    assert 1 <= row["rank"] <= row["candidates"] and row["source"] == "synthetic"


def test_folds_of_a_set_are_means_of_its_parts(synthetic, evaluated, monkeypatch):
    (config, data, _), (figures, encoded) = synthetic, evaluated
    count = int(data.tables["test"].has_image.sum())  # which come first in this set
    assert count % 4 == 0 and not any(name.startswith("synthetic_") for name in figures)
    monkeypatch.setitem(protocols.SETS, "synthetic", dataclasses.replace(protocols.SETS["synthetic"],
                                                                         folds=(4, count // 4)))
    found = protocols.score(encoded, data, config)[f"synthetic_{count // 4}"]["image-text"]
    options, parts = metrics.Options(resamples=0), []
    for fold in range(4):
        members = np.zeros(len(data.tables["test"]), bool)
        members[fold * count // 4:(fold + 1) * count // 4] = True
        parts.append(protocols._retrieval(encoded, data, ("image", "text"), members, options))
    for name, figure in found.items():
        assert figure["value"] == pytest.approx(np.mean([part[name]["value"] for part in parts]))
        assert figure["low"] is None
    whole = figures["synthetic"]["image-text"]["image_to_text_R@1"]
    assert found["image_to_text_R@1"]["candidates"] < whole["candidates"]
