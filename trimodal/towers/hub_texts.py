"""Text towers of the library transformers, with the tokenizers of their own files.

Sentence encoders and masked-word models are pooled by the mean over the real tokens, [CLS] and [SEP] with them, or by
[CLS] where a sentence encoder's folder says so; CLIP by its end token, SigLIP by its head at the last position.

Shape suffixes: B samples, N or L tokens, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimodal.blocks import masked_mean
from trimodal.errors import UserError
from trimodal.towers.base import Encoded, PretrainedTower, Source, TextInput, input_of
from trimodal.towers.hub import (
    HubTower,
    Kind,
    config_of,
    described,
    kind_of,
    load,
    quiet,
    read_json,
    reason_of,
    rebuild,
)

WITHOUT_POOLER = {"add_pooling_layer": False}
PUNCTUATION = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~]"  # Python's string.punctuation


class Text(NamedTuple):
    """What is particular to the towers of one `model_type`."""

    kind: Kind
    pooled: str  # "mean" over real tokens, or "output": pooler_output
    offset: int = 0  # positions that the table spends before the first token
    pad_to: bool = False  # trained with all texts padded to the longest length, and to read the padding


CLIP = Text(Kind("CLIPTextModel", "CLIPTextConfig", "encoder.layers"), "output")
SIGLIP = Text(Kind("SiglipTextModel", "SiglipTextConfig", "encoder.layers"), "output", pad_to=True)
KINDS = {
    "bert": Text(Kind("BertModel", "BertConfig", "encoder.layer", options=WITHOUT_POOLER), "mean"),
    "roberta": Text(Kind("RobertaModel", "RobertaConfig", "encoder.layer", options=WITHOUT_POOLER), "mean", 2),
    "xlm-roberta": Text(Kind("XLMRobertaModel", "XLMRobertaConfig", "encoder.layer", options=WITHOUT_POOLER),
                        "mean", 2),
    "mpnet": Text(Kind("MPNetModel", "MPNetConfig", "encoder.layer", options=WITHOUT_POOLER, attention="eager"),
                  "mean", 2),
    "clip": CLIP, "clip_text_model": CLIP, "siglip": SIGLIP, "siglip_text_model": SIGLIP}


class HubTextTower(HubTower):
    modality = "text"

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        self.of, self.pooling = KINDS[description["kind"]], description["pooling"]
        super().__init__(description, self.of.kind, model, int(model.config.hidden_size))

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        taken = self.input
        assert isinstance(taken, TextInput)
        if valid is not None:  # whatever a batch is padded with
            inputs = inputs.where(valid, taken.pad_id)
        if taken.pad_to:
            inputs = F.pad(inputs, (0, max(0, taken.pad_to - inputs.shape[1])), value=taken.pad_id)
        if not taken.masked:
            valid = None
        found = self.model(input_ids=inputs, attention_mask=None if valid is None else valid.long())
        tokens_BND = found.last_hidden_state
        if self.pooling == "output":
            return Encoded(tokens_BND, valid, found.pooler_output)
        return Encoded(tokens_BND, valid,
                       tokens_BND[:, 0] if self.pooling == "first" else masked_mean(tokens_BND, valid))


def find_in(folder: Path, source: str, where: str) -> Source:
    """The text tower of a local folder; `where` begins the messages of errors."""
    model_type = kind_of(folder, {name: one.kind for name, one in KINDS.items()}, "texts", where)
    of = KINDS[model_type]
    config = config_of(folder, of.kind, where)
    taken = _input(folder, of, config, where)
    description = described("hub_text", "text", source, folder, taken, model_type, config)
    description["pooling"] = _pooling(folder, of, where)
    return Source(description, lambda: HubTextTower(description, load(folder, of.kind, config, where)))


def build(description: Mapping[str, Any]) -> PretrainedTower:
    input_of(description)
    return HubTextTower(description, rebuild(KINDS[description["kind"]].kind, description["config"]))


def _pooling(folder: Path, of: Text, where: str) -> str:
    """The rule of the family, or what a sentence encoder's folder says: "mean", "first" or "output"."""
    stated = read_json(folder, "1_Pooling/config.json", where)
    chosen = [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    if of.pooled == "output" or not chosen:
        return of.pooled
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    if len(chosen) > 1 or chosen[0] not in known:
        raise UserError(f"{where}: its 1_Pooling/config.json asks for {', '.join(chosen)}, which is not done here; "
                        f"known: {', '.join(known)}")
    return known[chosen[0]]


# ---- tokenizers --------------------------------------------------------------------------------------------------


def _input(folder: Path, of: Text, config: Any, where: str) -> TextInput:
    stated = read_json(folder, "tokenizer_config.json", where)
    text, pad_id = _tokenizer(folder, of, config, stated, where)
    longest = int(config.max_position_embeddings) - of.offset
    for length in (read_json(folder, "sentence_bert_config.json", where).get("max_seq_length"),
                   stated.get("model_max_length")):
        longest = min(longest, int(length)) if isinstance(length, int) and length > 0 else longest
    return TextInput(text, longest, longest if of.pad_to else None, pad_id, masked=not of.pad_to)


def _tokenizer(folder: Path, of: Text, config: Any, stated: Mapping[str, Any], where: str) -> tuple[str, int]:
    """The tokenizer.json's text of a folder and its id of padding.

    Raises:
        UserError: the folder has no tokenizer, or one of more words than the tower has.
    """
    import tokenizers
    import transformers

    try:
        if (folder / "tokenizer.json").is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            with quiet():
                backend = transformers.AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True).backend_tokenizer
    except Exception as error:  # the packages raise plain Exception
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{where}: {folder} holds no tokenizer that can be read ({reason_of(error)}); a tokenizer.json "
                        "belongs there") from None
    backend.no_truncation()
    backend.no_padding()
    words = backend.get_vocab_size(with_added_tokens=True)
    if words > config.vocab_size or words < min(config.vocab_size, 1000) / 2:  # libraries make one of 5 out of nothing
        raise UserError(f"{where}: the tokenizer in {folder} has {words} words, the model {config.vocab_size}; its "
                        "tokenizer's files are missing or those of another model")
    if of.pad_to:
        _as_siglip(backend, stated)
    return backend.to_str(), _pad_id(backend, config, stated, where)


def _as_siglip(backend: Any, stated: Mapping[str, Any]) -> None:
    """Prepare texts as SigLIP was trained: small letters; the first one (of T5's words) without punctuation as well."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Lowercase()]
    if stated.get("tokenizer_class", "").startswith(("SiglipTokenizer", "T5Tokenizer")):
        steps += [normalizers.Replace(Regex(PUNCTUATION), ""), normalizers.Replace(Regex("\\s+"), " "),
                  normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])


def _pad_id(backend: Any, config: Any, stated: Mapping[str, Any], where: str) -> int:
    found = stated.get("pad_token")
    found = found.get("content") if isinstance(found, dict) else found
    for token in (found, "[PAD]", "<pad>"):
        if isinstance(token, str) and (number := backend.token_to_id(token)) is not None:
            return int(number)
    if isinstance(config.pad_token_id, int):
        return int(config.pad_token_id)
    raise UserError(f"{where}: its tokenizer has no token for padding, and neither tokenizer_config.json nor "
                    "config.json names one (pad_token)")


def tokens_of(taken: TextInput, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L] of texts and which of them are real, as `taken` states."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(taken.tokenizer)
    backend.enable_truncation(taken.max_length)
    rows = [row.ids for row in backend.encode_batch(texts)]
    length = taken.pad_to or max(map(len, rows), default=0)
    ids_BL = torch.tensor([row + [taken.pad_id] * (length - len(row)) for row in rows], dtype=torch.int64)
    if not taken.masked:
        return ids_BL, torch.ones_like(ids_BL, dtype=torch.bool)
    return ids_BL, torch.tensor([[i < len(row) for i in range(length)] for row in rows], dtype=torch.bool)


