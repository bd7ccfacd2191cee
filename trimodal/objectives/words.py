"""Words: which words a sample's captions have, told from its image or its sound.

Shape suffixes: B samples, C captions, L text tokens, D width, V vocabulary, M words to tell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.masked import hidden_tokens
from trimodal.objectives.step import Step, first_keys

WORD_MASK_SHARE = 0.8  # of a caption's tokens, beside an image or a sound


class Words(Objective):
    """Classification of an image or a sound by the tokens of its captions, from the pooled tokens of its tower
    (SuperCLIP, arXiv:2512.14480): cross-entropy with the words of the sample's captions in the batch, each once, as
    target, in proportion to their inverse document frequency."""

    scope = "tower"

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        words = model.config.vocab_size
        self.heads = nn.ModuleDict({name: nn.Linear(getattr(model, name).dim, words) for name in self.towers})
        self.idf_V = torch.ones(words)  # on the host, where targets are made; of the data, so no checkpoint holds it

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name != "text")

    def prepare(self, data: Any) -> None:
        train = data.splits["train"]
        self.idf_V = inverse_document_frequency(train.token_ids, train.token_offsets, len(self.idf_V))

    def count(self, step: Step) -> float:
        """How many samples have a word to tell, in each of the towers."""
        batch = step.batch
        told_C = (self.idf_V[batch.input_ids] * batch.attention_mask).sum(1) > 0
        told_B = torch.zeros(len(batch.sample_ids), dtype=torch.int32).index_add_(0, batch.caption_owner, told_C.int())
        return float(step.read((told_B > 0).sum(), len(told_B))) * len(self.towers)

    def loss(self, step: Step, tower: str, rows: slice) -> SumAndParts:
        """Cross-entropy of the micro-batch `rows`, summed over its samples."""
        sample_M, word_M, share_M = map(step.to_device, self._targets(step, rows))
        with step.autocast():
            logits_BV = self.heads[tower](getattr(step.model, tower).pool(step.encode(tower, rows)))
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        surprise_M = logits_BV.logsumexp(1)[sample_M] - logits_BV[sample_M, word_M]
        loss = (share_M * surprise_M).sum()
        return loss, {f"words_{tower}": loss}

    def _targets(self, step: Step, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Sample (from the first of `rows`), word and share of the sample's target, of each token of the samples'
        captions; on the host. A share is 0 at padding, and where a word has come before."""
        batch, samples = step.batch, rows.stop - rows.start
        captions, per_sample = len(batch.caption_owner), -(-len(batch.caption_owner) // len(batch.sample_ids))
        is_own_C = (batch.caption_owner >= rows.start) & (batch.caption_owner < rows.stop)
        number = step.read(is_own_C.sum(), min(samples * per_sample, captions))
        own = torch.nonzero_static(is_own_C, size=number)[:, 0]
        ids_CL, sample_C = batch.input_ids[own], batch.caption_owner[own] - rows.start
        sample_M, word_M = sample_C[:, None].expand_as(ids_CL).flatten(), ids_CL.flatten()
        weight_M = self.idf_V[word_M] * batch.attention_mask[own].flatten()
        weight_M = weight_M * is_first(sample_M * len(self.idf_V) + word_M, weight_M > 0)
        total_B = torch.zeros(samples, dtype=weight_M.dtype).index_add_(0, sample_M, weight_M)
        return sample_M, word_M, weight_M / total_B.where(total_B > 0, 1.0)[sample_M]


def is_first(key_M: Tensor, counts_M: Tensor) -> Tensor:
    """Mask of the places, of those where `counts_M`, whose key has not come before; (M,)."""
    key_M = key_M.masked_fill(~counts_M, -1)
    sorted_M, order_M = key_M.sort(stable=True)
    is_new_M = F.pad(sorted_M[1:] != sorted_M[:-1], (1, 0), value=True)
    return torch.empty_like(is_new_M).scatter_(0, order_M, is_new_M) & counts_M


def inverse_document_frequency(token_ids: np.ndarray, token_offsets: np.ndarray, words: int) -> Tensor:
    """log((1 + captions) / (1 + captions with the word)) of each word, (V,); 0 for one that all captions have.

    `token_ids`: of all captions, one after another; those of caption c begin at `token_offsets[c]`.
    """
    captions = np.repeat(np.arange(len(token_offsets) - 1), np.diff(token_offsets))
    once = np.unique(captions * words + token_ids) % words
    return torch.from_numpy(np.log(len(token_offsets) / (1 + np.bincount(once, minlength=words)))).to(
        torch.get_default_dtype())


class MaskedWords(Objective):
    """Predict most of a caption's tokens through the fusion, from the image or sound beside it and the few tokens that
    are shown: of each sample the first caption that the batch holds."""

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        dim, rank = model.config.preset.dim, model.config.preset.word_rank
        self.head = nn.Sequential(nn.Linear(dim, rank), nn.LayerNorm(rank))

    @property
    def towers(self) -> tuple[str, ...]:
        """Of the captions it encodes its own version, with tokens hidden."""
        return tuple(name for name in self.inputs if name != "text")

    def count(self, step: Step) -> float:
        return float(self._hidden(step, first_keys(step.batch, self.inputs))[1])

    @staticmethod
    def _hidden(step: Step, captions: Tensor) -> tuple[Tensor, int]:
        """Mask of the tokens of some captions that are hidden, (B, L), and their number."""
        mask_BL, uniform_BL = step.batch.attention_mask[captions], step.batch.noise["text"][captions]
        hidden_BL = hidden_tokens(mask_BL, uniform_BL, WORD_MASK_SHARE)
        most = len(mask_BL) * (mask_BL.shape[1] - 2)  # [CLS] and [SEP] are always shown
        return hidden_BL, step.read(hidden_BL.sum(), most)

    def loss(self, step: Step, rows: slice) -> SumAndParts:
        """Cross-entropy of the hidden tokens of the samples `rows`, summed over them."""
        captions = first_keys(step.batch, self.inputs)[rows]
        hidden_BL, number = self._hidden(step, captions)
        indices_M2 = torch.nonzero_static(hidden_BL, size=number)
        sample_M, token_M = step.to_device(indices_M2).unbind(1)
        ids_BL = step.to_device(step.batch.input_ids[captions])
        shown_BL = ids_BL.masked_fill(step.to_device(hidden_BL), step.mask_id)
        with step.autocast():
            mask_BL = step.to_device(step.batch.attention_mask[captions])
            given = {"text": step.model.text(shown_BL, mask_BL, step.path_scales("text", captions)),
                     **{name: step.tokens(name, rows) for name in self.towers}}
            states_BLD = step.model.fusion.states(given, 1 + ids_BL.shape[1])[:, 1:]
            logits_MV = self.head(states_BLD[sample_M, token_M]) @ step.model.text.words.weight.T
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        loss = F.cross_entropy(logits_MV, ids_BL[sample_M, token_M], reduction="sum")
        return loss, {"masked_words": loss}
