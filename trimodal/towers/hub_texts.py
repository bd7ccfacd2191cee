"""Text towers of the library transformers: BERT-like encoders of words, read by the mean over their real tokens."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimodal.towers.base import Encoded, PretrainedTower, TextInput, describe, sealed


class HubTextTower(PretrainedTower):
    modality, family = "text", "hub_text"

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        blocks = list(model.encoder.layer)
        super().__init__(description, int(model.config.hidden_size), len(blocks), blocks)
        self.model = model

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        tokens_BND = self.model(inputs, attention_mask=None if valid is None else valid.long()).last_hidden_state
        values = tokens_BND.float() if tokens_BND.dtype in (torch.float16, torch.bfloat16) else tokens_BND
        if valid is None:
            return Encoded(tokens_BND, None, values.mean(1))
        weight_BN1 = valid[:, :, None].to(values.dtype)
        return Encoded(tokens_BND, valid, (values * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1))

    def layer_of(self, parameter_name: str) -> int:
        found = re.match(r"model\.encoder\.layer\.(\d+)\.", parameter_name)
        return int(found[1]) + 1 if found else 0 if ".embeddings." in parameter_name else self.depth


def open_folder(folder: Path, source: str, licence: str) -> PretrainedTower:
    import transformers

    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    taken = TextInput(tokenizer.backend_tokenizer.to_str(), 256, None, tokenizer.pad_token_id, True)
    config = model.config.to_dict()
    return sealed(HubTextTower(describe("hub_text", "text", source, licence, taken, kind="BertModel", config=config),
                               model))


def build(description: Mapping[str, Any]) -> PretrainedTower:
    import transformers

    config = transformers.BertConfig(**description["config"])
    return HubTextTower(description, transformers.BertModel(config, add_pooling_layer=False))
