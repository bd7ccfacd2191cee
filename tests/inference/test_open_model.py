"""One object for use: features are those of evaluation, whatever form inputs have; mistakes are told in a line."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from model import load_model, open_model
from tests.refusals import refused
from tests.small_runs import SmallRuns
from tests.tiny_towers import SIDE, by_name
from tests.towers.test_hub_sounds import saved
from trimodal.checkpoint import save
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES, config_from_dict
from trimodal.data import codecs
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image
from trimodal.evaluation import protocols
from trimodal.evaluation.micro_batches import Setting
from trimodal.inference import checkpoint_model
from trimodal.inference.open_model import OpenModel
from trimodal.training import evaluations
from trimodal.training.run import aligned_modalities, description

OWN, TOWERS = "own", "towers"  # a pretrained tower of each modality
PRETRAINED = (f"model.image_size={SIDE}", *(f"model.{name}.tower=./tiny_{name}" for name in ("image", "text")),
          *(f"stages.{name}.trainable=['(?!(image|text|audio)\\\\.tower).*']"
            for name in ("pretrain", "align", "finetune")),
          "stages.pretrain.tasks=[{inputs: [image, text], objectives: {contrastive: 1}}]",
          "stages.pretrain.image_keep=1", "stages.align.audio_keep=1", "stages.align.drop_path=0")
TEXTS = ("a red circle", "two blue squares " * 9, "a", "green", "a blue square and a tone", "low tone", "a high tone")


class Made(NamedTuple):
    folder: Path  # of the run
    model: OpenModel
    expected: dict[str, torch.Tensor]  # features of evaluation, by modality
    images: list[str]
    audio: list[str]


def write_media(folder: Path) -> tuple[list[str], list[str]]:
    """Pictures that the cache keeps with and without loss, one of them turned by its EXIF; sounds of 0.2 to 25 s."""
    rng = np.random.default_rng(0)
    images = [str(folder / name) for name in ("a.jpg", "b.png", "c.jpg", "d.png")]
    turned = Image.Exif()
    turned[274] = 6  # by a quarter
    for path, shape in zip(images, ((300, 400), (40, 36), (500, 90), (64, 64)), strict=True):
        Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(path, exif=turned if "c.jpg" in path else b"")
    audio = [str(folder / f"{n}.wav") for n in range(3)]
    for path, seconds, rate_hz in zip(audio, (0.2, 25.0, 3.3), (16_000, 16_000, 44_100), strict=True):
        soundfile.write(path, rng.normal(0, 0.1, round(seconds * rate_hz)), rate_hz)
    return images, audio


def of(name: str, elements: Any) -> dict[str, Any]:
    """An argument by its name."""
    return {name: elements}


@pytest.fixture(scope="module", params=[OWN, TOWERS])
def made(request: pytest.FixtureRequest, small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """An untrained model's checkpoint, opened, and the features that evaluate.py has of files with captions."""
    folder = tmp_path_factory.mktemp(request.param)
    images, audio = write_media(folder)
    media = [{"image": path} for path in images] + [{"audio": path} for path in audio]
    lines = [{**one, "text": text, "split": "test"} for one, text in zip(media, TEXTS, strict=True)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = ["data.datasets=[synthetic,manifest]", f"data.manifest={folder / 'own.jsonl'}", "data.audio_max_s=2"]
    pretrained: tuple[str, ...] = ()
    if request.param == TOWERS:
        saved(folder / "ast", "ast")
        pretrained = (*PRETRAINED, f"model.audio.tower=hub:{folder / 'ast'}")
    with by_name(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "EXACT_BYTES", 500)  # the cache then keeps some as JPEG, as it does photographs
        run = small.open(folder / "run", *overrides, *pretrained)
        path = folder / "run" / "checkpoints" / "best_model.pt"
        save({**description(run), "stage": "align", "epoch": 1, "loss": 1.0,
              "model_state_dict": run.model.state_dict()}, path)
        yield Made(folder / "run", open_model(folder / "run", "cpu"), _evaluated(path), images, audio)


def _evaluated(path: Path, amp: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Features of the test split, by modality, as evaluate.py encodes it."""
    model, state = load_model(path)
    config = replace(config_from_dict(state["config"], ["data.datasets=[manifest]"]), model=model.config)
    data = evaluations.with_frozen(evaluations.read_data(config, "test", state, model), model, config, fill=True)
    encoded = protocols.encode_split(model, data, "test", config, Setting(device=torch.device("cpu"), amp=amp))
    assert encoded.items["text"].rows_N.tolist() == list(range(len(TEXTS)))
    return {name: items.features_NF for name, items in encoded.items.items()}


def test_features_of_files_are_those_of_evaluation(made: Made) -> None:
    with pytest.warns(UserWarning, match=r"1 text cut .* texts\[1\]"):
        found = {"image": made.model.encode(images=made.images), "audio": made.model.encode(audio=made.audio),
                 "text": made.model.encode(texts=TEXTS)}
    for name, features in found.items():
        assert features.dtype == torch.float32 and features.norm(dim=1) == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(features, made.expected[name], rtol=0, atol=2e-6)
        assert (features - features[0]).abs().max() > 1e-3, "the features of different items differ"


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_evaluation(made: Made, precision: torch.dtype) -> None:
    half = open_model(made.folder, "cpu", str(precision).removeprefix("torch."))
    found, exact = half.encode(audio=made.audio), made.expected["audio"]
    assert found.dtype == torch.float32 and 1e-6 < (found - exact).abs().max() < 0.05
    torch.testing.assert_close(found, _evaluated(made.folder / "checkpoints" / "best_model.pt", precision)["audio"],
                               rtol=0, atol=2e-2 if precision == torch.bfloat16 else 2e-3)


def test_many_are_encoded_as_each_alone_and_stay_in_order(made: Made) -> None:
    texts = [f"{'a red square ' * (n % 4)}{word}" for n, word in enumerate(("low", "a", "tone", "high", "blue") * 3)]
    for name, items in (("texts", texts), ("images", made.images * 3), ("audio", made.audio * 2)):
        alone = torch.cat([made.model.encode(**of(name, one)) for one in items])
        for batch_size in (1, 4, 100):
            together = made.model.encode(**of(name, iter(items)), batch_size=batch_size)
            torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def test_none_or_one_in_place_of_a_list(made: Made) -> None:
    for name in ("images", "texts", "audio"):
        assert made.model.encode(**of(name, [])).shape == (0, made.model.embed_dim)
        assert made.model.encode(**of(name, iter(()))).dtype == torch.float32
    assert made.model.encode(texts="a").shape == made.model.encode(images=Path(made.images[0])).shape == (1, 8)
    assert torch.equal(made.model.encode(images=Image.open(made.images[0])), made.model.encode(images=made.images[:1]))


def test_fused_features_are_those_of_the_model(made: Made) -> None:
    model, _ = load_model(made.folder / "checkpoints" / "best_model.pt")
    reader = made.model._model
    with torch.inference_mode():
        for n in range(3):
            picture = reader.read_image(decode_image(made.images[n])).value
            ids, mask = reader.tokenizer.encode([TEXTS[n]], 12)
            mel, length = reader.read_sound(decode_audio(made.audio[n], rate_hz=reader.rate_hz)).value
            image = torch.from_numpy(picture).permute(2, 0, 1)[None]
            one: dict[str, Any] = {"images": made.images[n], "texts": TEXTS[n], "audio": made.audio[n]}
            every = {"images": image, "input_ids": ids, "attention_mask": mask, "audio": torch.from_numpy(mel)[None],
                     "audio_lengths": torch.tensor([length])}
            torch.testing.assert_close(made.model.fuse(**one), model(**every)["fused_features"], rtol=0, atol=2e-6)
            torch.testing.assert_close(made.model.fuse(images=made.images[n]), model(images=image)["fused_features"],
                                       rtol=0, atol=2e-6)
    lists: dict[str, Any] = {"images": made.images[:3], "texts": TEXTS[:3], "audio": made.audio}
    alone = torch.cat([made.model.fuse(**{name: values[n] for name, values in lists.items()}) for n in range(3)])
    torch.testing.assert_close(made.model.fuse(**lists), alone, rtol=0, atol=2e-6)
    with refused("images", "texts"):
        made.model.fuse(images=made.images, texts=TEXTS)


def test_cosines_and_probabilities(made: Made) -> None:
    model = made.model
    sounds, words = model.encode(audio=made.audio), model.encode(texts=["low", "a tone", "high"])
    assert torch.equal(model.compare(4 * sounds, words), model.compare(sounds, words))
    assert model.compare(sounds, words) == pytest.approx(sounds @ words.T, abs=1e-6)
    several = (words[1] + words[2]) / (words[1] + words[2]).norm()
    expected = (sounds @ torch.stack([words[0], several]).T / 0.07).softmax(1)
    assert model.classify(["low", ("a tone", "high")], audio=made.audio) == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_read_is_named_and_left_out_on_request(made: Made, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images, told = [made.images[0], str(tmp_path / "bad.png"), "gone.jpg", made.images[1]], dict[int, str]()
    with refused("images[1]", tmp_path / "bad.png"):
        made.model.encode(images=images)
    found = made.model.encode(images=images, on_broken=told.__setitem__)
    assert list(told) == [1, 2] and "bad.png" in told[1] and "gone.jpg" in told[2]
    assert found.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(found[[0, 3]], made.model.encode(images=made.images[:2]))
    assert made.model.compare(found, found[:1]).isnan()[:, 0].tolist() == [False, True, True, False]
    assert made.model.encode(images="gone.jpg", on_broken=told.__setitem__).isnan().all()


@pytest.mark.parametrize(("given", "named"), [
    ({}, ("images", "texts", "audio")), ({"images": [], "texts": []}, ("images", "texts", "fuse")),
    ({"images": 3}, ("images", "int")), ({"texts": b"a"}, ("texts", "bytes")), ({"audio": {"a": 1}}, ("audio", "dict")),
    ({"texts": ["a", None]}, ("texts[1]", "NoneType")), ({"images": [None]}, ("images[0]", "NoneType")),
    ({"audio": [(np.zeros(9), "16000")]}, ("audio[0]", "tuple")), ({"audio": [np.zeros(9)]}, ("audio[0]", "ndarray")),
    ({"texts": "a", "batch_size": 0}, ("batch_size", "0")), ({"texts": "a", "batch_size": "8"}, ("batch_size", "8")),
    ({"texts": ["a", "\ud83d"]}, ("texts[1]", r"\ud83d"))])
def test_wrong_arguments_take_one_line(made: Made, given: dict[str, Any], named: tuple[str, ...]) -> None:
    with refused(*named):
        made.model.encode(**given)


def test_wrong_features_and_prompts_take_one_line(made: Made) -> None:
    with refused("compare", "b", "[7]"):
        made.model.compare(torch.zeros(2, 8), torch.zeros(7))
    wrong: list[Any] = ["a", [], ["a", []], None, [3]]
    for prompts in wrong:
        with refused("classify", "prompts"):
            made.model.classify(prompts, images=[])


def test_the_bar_is_quiet_where_nobody_looks(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.model.encode(images=made.images)
    assert capsys.readouterr() == ("", "")
    made.model.encode(images=iter(made.images), progress=True)
    assert "4" in capsys.readouterr().err


def test_a_long_list_is_read_as_it_is_encoded(made: Made) -> None:
    """However many elements there are, only a few are read ahead of those that are encoded."""
    read, encoded = 0, 0

    def waves() -> Iterator[tuple[np.ndarray, int]]:
        nonlocal read
        for n in range(60):
            read += 1
            assert read - encoded < 30
            yield np.random.default_rng(n).normal(0, 0.1, 16_000 * (1 + 10 * (n % 3))), 16_000

    work = made.model._model.features

    def counted(modality: str, values: list[Any]) -> torch.Tensor:
        nonlocal encoded
        encoded += len(values)
        return work(modality, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.model._model, "features", counted)
        assert made.model.encode(audio=waves(), batch_size=8).shape == (60, 8)
    assert encoded == read == 60


def test_a_long_sound_is_encoded_some_windows_at_a_time(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    if "audio" in made.model._model.inputs:
        pytest.skip("pretrained towers read all windows of a sound at once")
    monkeypatch.setattr(checkpoint_model, "WINDOWS_AT_ONCE", 1)
    lengths: list[int] = []
    tower = made.model._model.model.audio
    hook = tower.register_forward_hook(lambda _, given, found: lengths.append(given[0].shape[1]))
    found = made.model.encode(audio=made.audio[1])
    hook.remove()
    torch.testing.assert_close(found, made.expected["audio"][1:2], rtol=0, atol=2e-6)
    assert len(lengths) == 3 and max(lengths) == AUDIO_WINDOW_FRAMES


def test_threads_may_share_a_model(made: Made) -> None:
    texts = [["a red square"], ["low tone", "a"] * 40]
    expected = [made.model.encode(texts=one) for one in texts]
    with ThreadPoolExecutor(4) as pool:
        for n, found in enumerate(pool.map(lambda n: made.model.encode(texts=texts[n % 2]), range(40))):
            torch.testing.assert_close(found, expected[n % 2], rtol=0, atol=2e-6)


def test_what_a_model_says_of_itself(made: Made) -> None:
    assert made.model.modalities == ("image", "text", "audio") and made.model.embed_dim == 8
    assert made.model.digest == open_model(made.folder / "checkpoints" / "best_model.pt", "cpu").digest
    assert json.loads(json.dumps(made.model.description)) == made.model.description
    assert made.model.description["datasets"] == ["synthetic", "manifest"]


def test_a_modality_that_training_has_not_compared_is_not_read(small: SmallRuns, tmp_path: Path) -> None:
    pairs = "[{inputs: [image, text], objectives: {contrastive: 1}}]"
    run = small.open(tmp_path / "run", *(
        f"stages.{name}.tasks={pairs}" for name in ("pretrain", "align", "finetune")), "stages.align.audio_keep=1")
    path = tmp_path / "run" / "checkpoints" / "best_model.pt"
    state = {**description(run), "stage": "align", "epoch": 1, "loss": 1.0, "model_state_dict": run.model.state_dict()}
    save(state, path)
    model = open_model(path, "cpu")
    assert model.modalities == ("image", "text") and model.encode(texts="a").shape == (1, 8)
    with refused("audio", "image", "text"):
        model.encode(audio=[])
    assert aligned_modalities(run.config, run.data, {"modalities": ["audio", "text"]}) == MODALITIES
    assert aligned_modalities(run.config, run.data, {"of": "a release that kept none"}) == MODALITIES
