"""Models of others: each one's own preprocessing and features, under our protocols, from folders that transformers
writes; offline."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import evaluate
import search
from datasets import Data, load_data
from model import open_model
from tests.refusals import assert_told, refused
from tests.search import things
from trimodal.config import Config, config_from_dict
from trimodal.data.audio import decode_audio
from trimodal.evaluation import metrics, peers, protocols
from trimodal.evaluation.micro_batches import Setting
from trimodal.inference import hub_models

WORDS = "a the red green blue picture tone of number one two three four five six seven loud".split()
CPU = Setting(device=torch.device("cpu"))
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tokenizer(folder: Path, length: int, first: int) -> int:
    """A tokenizer of WORDS whose ids begin at `first`, behind begin, padding and end; number of its words."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {word: n for n, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length).save_pretrained(folder)
    return len(words)


def _clip(folder: Path) -> None:
    vocabulary = _tokenizer(folder, 16, 4)
    text = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 0,
            "pad_token_id": 1}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
                           ).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def _siglip(folder: Path) -> None:
    vocabulary = _tokenizer(folder, 12, 4)
    text = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 12, "projection_size": 16}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def _clap(folder: Path) -> None:
    vocabulary = _tokenizer(folder, 16, 4)
    text = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 18}
    audio = {"spec_size": 64, "num_mel_bins": 16, "window_size": 4, "hidden_size": 32, "patch_embeds_hidden_size": 16,
             "depths": [1, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2, "enable_fusion": False}
    transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
                           ).save_pretrained(folder)
    transformers.ClapFeatureExtractor(feature_size=16, max_length_s=1, hop_length=200, sampling_rate=48_000,
                                      truncation="rand_trunc").save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {"clip": _clip, "siglip": _siglip, "clap": _clap}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small folder of each kind, of random weights."""
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, make in MAKERS.items():
        make(folders[name])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Data, list[dict[str, Any]]]:
    """Six pictures and four sounds with captions, the last sound of two and a half windows."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for n, colour in enumerate(("red", "green", "blue", "red", "green", "blue")):
        pixels = rng.integers(0, 255, (40 + 8 * n, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        lines.append({"image": str(folder / f"{n}.png"), "split": "test",
                      "text": [f"a {colour} picture", f"number {WORDS[9 + n]}"][:1 + n % 2]})
    for n in range(4):
        soundfile.write(folder / f"{n}.wav", rng.normal(0, 0.1, 16_000 * (5 if n == 3 else 1) // 2), 16_000)
        lines.append({"audio": str(folder / f"{n}.wav"), "text": f"a loud tone number {WORDS[9 + n]}", "split": "test"})
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_from_dict({"data": {"datasets": ["manifest"], "manifest": str(folder / "own.jsonl"), "workers": 0,
                                        "cache": False}, "evaluation": {"resamples": 0, "batch_size": 4},
                               "paths": {"data_root": str(folder / "data"), "output_dir": str(folder / "out")}})
    return config, load_data(config, ["test"], concepts=(), speakers=()), lines


def _features(kind: str, folder: Path, line: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of one sample and of its captions, straight from transformers, one by one."""
    model = getattr(transformers, hub_models.MODELS[kind]).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [line["text"]] if isinstance(line["text"], str) else line["text"]
    with torch.no_grad():
        if kind == "clap":
            whole = decode_audio(line["audio"], rate_hz=48_000)
            assert len(whole) == 3 * len(soundfile.read(line["audio"])[0])
            extract = transformers.ClapFeatureExtractor.from_pretrained(folder)
            parts = [whole[start:start + 48_000] for start in range(0, len(whole), 48_000)]
            media = torch.zeros(1, 8)
            for part in parts:
                frames = torch.from_numpy(np.array(extract(part, sampling_rate=48_000)["input_features"]))
                found = model.get_audio_features(input_features=frames, is_longer=torch.tensor([[False]]))
                media += len(part) * F.normalize(found.pooler_output)
            media = F.normalize(media)
        else:
            process = transformers.AutoImageProcessor.from_pretrained(folder)
            pixels = process(images=Image.open(line["image"]), return_tensors="pt")["pixel_values"]
            media = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        words = []
        for text in texts:
            if kind == "siglip":
                ids = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
                given = {"input_ids": ids}
            else:
                given = {name: value for name, value in tokenizer(text, return_tensors="pt").items()
                         if name in ("input_ids", "attention_mask")}
            words.append(F.normalize(model.get_text_features(**given).pooler_output, dim=-1))
    return media, torch.cat(words)


@pytest.mark.parametrize("kind", MAKERS)
def test_figures_are_those_of_the_library_sample_by_sample(hub: dict[str, Path], kind: str,
                                                           data: tuple[Config, Data, list[dict[str, Any]]]) -> None:
    config, loaded, lines = data
    model = hub_models.open_hub(f"hub:{hub[kind]}")
    encoded = peers.encode(model, loaded, "test", config, CPU)
    media = "audio" if kind == "clap" else "image"
    one_by_one = [_features(kind, hub[kind], line) for line in lines if media in line]
    features = torch.cat([one for one, _ in one_by_one]), torch.cat([several for _, several in one_by_one])
    assert encoded.items.keys() == {media, "text"}
    for name, expected in zip((media, "text"), features, strict=True):
        assert torch.allclose(encoded.items[name].features_NF, expected, atol=1e-5), name
    owners = torch.arange(len(one_by_one)).repeat_interleave(torch.tensor([len(t) for _, t in one_by_one]))
    figures = metrics.retrieval(*features, owners, names=(media, "text"), options=metrics.Options(resamples=0))
    found = protocols.score(encoded, loaded, config)["manifest"][f"{media}-text"]
    assert {name: found[f"{name}_per_caption"] for name in figures} == figures
    samples = sum(media in line for line in lines)
    assert encoded.facts["manifest"] == {"samples": samples, "of": 10, "broken": 0, "subset_seed": None,
                                         "nonfinite": {}}


@pytest.mark.parametrize("kind", MAKERS)
def test_one_object_for_use_gives_the_same_features(hub: dict[str, Path], kind: str,
                                                    data: tuple[Config, Data, list[dict[str, Any]]]) -> None:
    config, loaded, lines = data
    encoded = peers.encode(hub_models.open_hub(f"hub:{hub[kind]}"), loaded, "test", config, CPU)
    model, media = open_model(f"hub:{hub[kind]}", "cpu"), "audio" if kind == "clap" else "image"
    argument, other = ("audio", "images") if kind == "clap" else ("images", "audio")
    own = [line for line in lines if media in line]
    texts = [text for line in own for text in ([line["text"]] if isinstance(line["text"], str) else line["text"])]
    given: dict[str, Any] = {argument: [line[media] for line in own]}
    found = {media: model.encode(**given), "text": model.encode(texts=texts)}
    for name, features in found.items():
        torch.testing.assert_close(features, encoded.items[name].features_NF, rtol=0, atol=2e-6)
        assert features.shape[1] == model.embed_dim
    assert model.modalities == (media, "text") and model.description["kind"] == kind
    probabilities = model.classify(texts[:2], **given)
    assert probabilities.sum(1) == pytest.approx(1) and probabilities.shape == (len(own), 2)
    with pytest.warns(UserWarning, match="1 text cut"):
        model.encode(texts=["a red picture " * 9])
    with refused(other, media, "text"):
        model.encode(**{other: given[argument]})
    with refused("fuse", f"hub:{hub[kind]}"):
        model.fuse(texts=["a"])


def test_a_broken_file_costs_one_sample(hub: dict[str, Path], tmp_path: Path,
                                        data: tuple[Config, Data, list[dict[str, Any]]]) -> None:
    lines = [dict(line) for line in data[2] if "image" in line]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines[2]["image"] = str(tmp_path / "bad.png")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_from_dict({**data[0].to_dict(), "data": {**data[0].to_dict()["data"],
                                                            "manifest": str(tmp_path / "own.jsonl"), "max_bad_pct": 50,
                                                            "manifest_root": str(tmp_path.parent)}})
    loaded = load_data(config, ["test"], concepts=(), speakers=())
    encoded = peers.encode(hub_models.open_hub(f"hub:{hub['clip']}"), loaded, "test", config, CPU)
    assert encoded.facts["manifest"]["broken"] == 1 and encoded.facts["manifest"]["samples"] == 6
    assert encoded.items["image"].rows_N.tolist() == [0, 1, 3, 4, 5]


def test_evaluate_writes_a_report(hub: dict[str, Path], data: tuple[Config, Data, list[dict[str, Any]]],
                                  tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--datasets", "manifest", f"data.manifest={data[0].data.manifest}", "data.workers=0", "--device", "cpu",
             "--output-dir", str(tmp_path / "out"), "--data-root", str(tmp_path / "data"), "report.gallery_queries=1"]
    assert evaluate.main(["--checkpoint", f"hub:{hub['siglip']}", *given]) == 0
    (path,) = (tmp_path / "out" / "reports").glob("report_*.json")
    told = json.loads(path.read_text("utf-8"))
    assert told["checkpoint"] == told["model"]["size"] == f"hub:{hub['siglip']}" and told["model"]["parameters"] > 0
    assert told["config"].keys() == {"data", "evaluation", "report", "paths"} and len(told["gallery"]) == 1
    assert "image_to_text_R@1" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", f"hub:{hub['clip']}", *given, "evaluation.rerank=5"]) == 2
    assert_told(capsys.readouterr().err, "evaluation.rerank=5", str(hub["clip"]))


@pytest.mark.parametrize(("name", "reads", "other"), [("clip", "image", "audio"), ("clap", "audio", "image")])
def test_a_folder_is_searched_by_what_a_model_reads(hub: dict[str, Path], name: str, reads: str, other: str,
                                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    things.folder(tmp_path / "media")
    place, model = ["--index", str(tmp_path / "index"), "--device", "cpu"], f"hub:{hub[name]}"
    assert search.main(["index", str(tmp_path / "media"), "--checkpoint", model, *place]) == 0
    told = capsys.readouterr().out
    assert f"{2 if reads == 'image' else 4} {'sounds' if reads == 'image' else 'pictures'} that the model" in told
    assert search.main(["query", "a loud tone", "--json", *place]) == 0
    [(kind, hits)] = json.loads(capsys.readouterr().out).items()
    assert kind == reads and len(hits) == (5 if reads == "image" else 3)
    assert search.main(["query", "a", "--kind", other, *place]) == 2
    assert_told(capsys.readouterr().err, "--kind", other, tmp_path / "index")
    flag, file = ("--audio", "low.wav") if reads == "image" else ("--image", "red.png")
    assert search.main(["query", flag, str(tmp_path / "media" / file), *place]) == 2
    assert_told(capsys.readouterr().err, reads, "text")


def test_what_cannot_be_opened_takes_one_line(hub: dict[str, Path], tmp_path: Path) -> None:
    def copy(name: str, of: str = "clip") -> Path:
        return Path(shutil.copytree(hub[of], tmp_path / name))

    other = copy("other")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with refused(str(other), "bert", "clip", "siglip", "clap"):
        hub_models.open_hub(f"hub:{other}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with refused(str(empty), "config.json"):
        hub_models.open_hub(f"hub:{empty}")
    cut = copy("cut")
    os.truncate(cut / "model.safetensors", 1000)
    with refused(str(cut)):
        hub_models.open_hub(f"hub:{cut}")
    wordless = copy("wordless")
    for path in wordless.glob("token*"):
        path.unlink()
    with refused(str(wordless)):
        hub_models.open_hub(f"hub:{wordless}")
    pickled = copy("pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with refused(str(pickled)):
        hub_models.open_hub(f"hub:{pickled}")
