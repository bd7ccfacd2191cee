"""Text towers of transformers: random miniatures and their tokenizers, opened by name, beside the library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from tests.refusals import refused
from tests.towers.checks import TINY, check_padding, check_protocol, close, edit_json, made, transformers
from trimodal.towers.base import PretrainedTower, TextInput
from trimodal.towers.hub_texts import tokens_of
from trimodal.towers.opening import open_tower

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgh", "dog", "cat", "runs", ".", "a"]
WORDS = list(dict.fromkeys(WORDS))
SIZES = {**TINY, "vocab_size": len(WORDS), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", {**SIZES, "max_position_embeddings": 20}),
    "roberta": ("RobertaModel", "RobertaConfig", {**SIZES, "max_position_embeddings": 22}),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", {**SIZES, "max_position_embeddings": 22}),
    "mpnet": ("MPNetModel", "MPNetConfig", {**SIZES, "max_position_embeddings": 22}),
    "clip": ("CLIPTextModel", "CLIPTextConfig", {**SIZES, "max_position_embeddings": 20, "eos_token_id": 2}),
    "clip-new": ("CLIPTextModel", "CLIPTextConfig", {**SIZES, "max_position_embeddings": 20, "eos_token_id": 4}),
    "siglip": ("SiglipTextModel", "SiglipTextConfig", {**SIZES, "max_position_embeddings": 12})}
ALL = pytest.mark.parametrize("family", FAMILIES)
TEXTS = ["a dog runs.", "cat", "the DOG runs a dog runs a dog"]


def tokenizer(family: str) -> Any:
    """The library's fast tokenizer with the same special tokens, pads and lengths as the families' own."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    end = ("<mask>", 4) if family == "clip-new" else ("</s>", 2)
    template = "$A </s>" if family == "siglip" else f"<s> $A {end[0]}"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), end])
    pad = "</s>" if family == "siglip" else "<pad>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token=pad)


def saved(folder: Path, family: str) -> Any:
    model = made(FAMILIES[family][0], FAMILIES[family][1], spread=1.0, **FAMILIES[family][2])
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return model


def opened(folder: Path) -> PretrainedTower:
    return open_tower(f"hub:{folder}", "text")


def taken_by(tower: PretrainedTower) -> TextInput:
    assert isinstance(tower.input, TextInput)
    return tower.input


@ALL
def test_it_is_the_library_s_own_and_keeps_to_the_protocol(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    tower = opened(tmp_path)
    taken = taken_by(tower)
    longest = FAMILIES[family][2]["max_position_embeddings"] - 2 * (family in ("roberta", "xlm-roberta", "mpnet"))
    assert taken.max_length == longest
    ids, valid = tokens_of(taken, TEXTS)
    pads: dict[str, Any] = {"padding": "max_length"} if family == "siglip" else {"padding": True}
    texts = [text.lower() for text in TEXTS] if family == "siglip" else TEXTS
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        texts, max_length=longest, truncation=True, return_tensors="pt", **pads)
    assert ids.equal(theirs["input_ids"])
    mask = None if family == "siglip" else theirs["attention_mask"]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
        found = tower(ids, valid)
    close(found.tokens_BND, expected.last_hidden_state)
    if family in ("clip", "clip-new", "siglip"):
        close(found.pooled_BD, expected.pooler_output)
    else:
        assert mask is not None
        weight = mask[:, :, None].float()
        close(found.pooled_BD, (expected.last_hidden_state * weight).sum(1) / weight.sum(1))
    check_protocol(tower, ids, valid)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "siglip"])
def test_padding_does_not_leak(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    tower = opened(tmp_path)
    ids, valid = tokens_of(taken_by(tower), [TEXTS[0]])

    def encode(length: int) -> Any:
        more = length - ids.shape[1]
        padded = torch.nn.functional.pad(ids, (0, more), value=taken_by(tower).pad_id)
        return tower(padded, torch.nn.functional.pad(valid, (0, more), value=False))

    check_padding(encode, (ids.shape[1], 9, 18))


def test_siglip_is_given_all_its_positions_in_small_letters_and_without_marks(tmp_path: Path) -> None:
    saved(tmp_path, "siglip")
    taken = taken_by(opened(tmp_path))
    assert (taken.pad_to, taken.masked, taken.max_length) == (12, False, 12)
    ids, valid = tokens_of(taken, ["A Dog runs."])
    assert ids.shape == (1, 12) and valid.all()
    assert ids[0].tolist() == [WORDS.index(word) for word in ("a", "dog", "runs", ".")] + [2] * 8  # SigLIP 2's
    tower = opened(tmp_path)
    short = torch.cat([ids[:, :4], torch.zeros(1, 3, dtype=torch.int64)], dim=1)  # padded as a batch of other towers
    with torch.no_grad():
        assert tower(short, torch.arange(7)[None] < 4).pooled_BD.equal(tower(ids, valid).pooled_BD)
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    ids, _ = tokens_of(taken_by(opened(tmp_path)), ["  A [Dog],   runs?!"])
    assert ids[0].tolist() == [WORDS.index(word) for word in ("a", "dog", "runs")] + [2] * 9


def test_a_sentence_encoder_says_how_it_is_pooled_and_how_long_its_texts_are(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}), "utf-8")
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}', "utf-8")
    tower = opened(tmp_path)
    ids, valid = tokens_of(taken_by(tower), TEXTS)
    assert ids.shape == (3, 7)
    with torch.no_grad():
        found = tower(ids, valid)
    assert found.pooled_BD.equal(found.tokens_BND[:, 0])
    edit_json(pooling, pooling_mode_max_tokens=True)
    with refused("1_Pooling/config.json", "pooling_mode_max_tokens", f"hub:{tmp_path}"):
        opened(tmp_path)


def test_a_tokenizer_of_plain_vocabulary_files(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "##s"]
    made("BertModel", "BertConfig", **{**TINY, "vocab_size": len(words)}).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', "utf-8")
    ids, valid = tokens_of(taken_by(opened(tmp_path)), ["Dogs", "cat dog"])
    assert ids.tolist() == [[2, 5, 7, 3], [2, 6, 5, 3]] and valid.all()


def test_padding_and_cuts_that_a_tokenizer_carries_inside_are_taken_out(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4, pad_id=1, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    inside = json.loads(taken_by(opened(tmp_path)).tokenizer)
    assert inside["truncation"] is None and inside["padding"] is None


def test_a_tokenizer_that_is_missing_or_another_one_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with refused(f"hub:{tmp_path}", "tokenizer"):  # of which the library makes a tokenizer that knows no word
        opened(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with refused(f"hub:{tmp_path}", "tokenizer.json"):
        opened(tmp_path)
    more = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    more.save(str(tmp_path / "tokenizer.json"))
    with refused(f"hub:{tmp_path}", 50, len(WORDS)):
        opened(tmp_path)


def test_the_mean_is_of_float32_under_autocast(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    tower = opened(tmp_path)
    ids, valid = tokens_of(taken_by(tower), TEXTS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tower(ids, valid).pooled_BD.dtype == torch.float32
