"""Re-ranking: the first candidates of each query are ordered anew by the matching head (arXiv:2107.07651).

Features look at each side of a pair alone; the head reads the fusion of the tokens of both. That is too slow for all
pairs, so it scores the first `evaluation.rerank` candidates of a query.

The score is the head's logit plus the contrastive logit (similarity times the learnt scale). The head learns to tell
right pairs from wrong ones that were drawn with probability softmax(contrastive logit): its logit estimates how much
likelier a pair is among the right ones than among those, and the sum how likely it is among the right ones.
benchmarks/README.md has the figures of both, on validation data.

Shape suffix: P pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets import Data, Loader
from trimodal.blocks import Tokens
from trimodal.config import Config
from trimodal.data.batches import Batch, pad_captions
from trimodal.errors import UserError
from trimodal.evaluation.metrics import Rerank
from trimodal.evaluation.micro_batches import Setting, encode, inputs_of, windows_of
from trimodal.objectives.step import join, pick

Heads = Mapping[str, Mapping[str, Tensor]]  # "matching_head" of a checkpoint: weight (1, D) and bias (1) by pair


def heads_of(state: Mapping[str, Any], config: Config, where: str) -> Heads:
    """The matching heads in the checkpoint `state`, from the file `where`.

    Raises:
        UserError: there are none, and `evaluation.rerank` asks for them.
    """
    heads: Heads = state.get("matching_head") or {}
    if config.evaluation.rerank and not heads:
        raise UserError(f"evaluation.rerank={config.evaluation.rerank}: {where} has no matching head; take the "
                        "best_model.pt of a run whose last stage trains the objective matching, or set it to 0")
    return heads


class PairScores:
    """Scores of pairs of a picture or a sound and a caption, each computed once."""

    def __init__(self, model: Any, heads: Heads, data: Data, split: str, config: Config, setting: Setting):
        self.model, self.heads, self.data, self.split, self.config = model, heads, data, split, config
        self.setting, self.contrastive_weight = setting, 1.0
        self.micro_batches = setting.micro_batches(config.evaluation.batch_size)
        self.known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by modality: keys, ascending, and their logits

    def rerank(self, modality: str, rows_N: np.ndarray, captions_C: np.ndarray) -> Rerank | None:
        """How to order the candidates of retrieval between samples, given by their rows of the split's table, and
        captions, by theirs of its captions; None without a head for this pair."""
        if f"{modality}_text" not in self.heads:
            return None
        scale = self.contrastive_weight * self.model.logit_scale[f"{modality}_text"].detach().exp()

        def score(samples_P: Tensor, columns_P: Tensor, similarity_P: Tensor) -> Tensor:
            logits_P = self.logits(modality, rows_N[samples_P.cpu().numpy()], captions_C[columns_P.cpu().numpy()])
            return torch.from_numpy(logits_P).to(similarity_P) + scale.to(similarity_P) * similarity_P

        return Rerank(self.config.evaluation.rerank, score)

    def logits(self, modality: str, rows_P: np.ndarray, captions_P: np.ndarray) -> np.ndarray:
        """The head's logits, float32 [P]; NaN where the file can no longer be read."""
        keys_P = rows_P * len(self.data.tables[self.split].captions) + captions_P
        known, values = self.known.get(modality, (np.empty(0, np.int64), np.empty(0, np.float32)))
        if len(new := np.setdiff1d(keys_P, known)):
            keys = np.concatenate([known, new])
            values = np.concatenate([values, self._compute(modality, new)])
            order = np.argsort(keys, kind="stable")
            known, values = self.known[modality] = keys[order], values[order]
        return values[np.searchsorted(known, keys_P)]

    def _compute(self, modality: str, keys: np.ndarray) -> np.ndarray:
        """Logits of pairs, given by ascending keys: the files are read in order, each once."""
        rows, captions = np.divmod(keys, len(self.data.tables[self.split].captions))
        files, size = np.unique(rows), self.config.evaluation.batch_size
        jobs = [(0, part) for part in np.array_split(files, -(-len(files) // size))]
        logits = np.full(len(keys), np.nan, np.float32)
        was_training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(keys), desc=f"re-ranking {modality} and text", unit="pair", disable=None) as bar:
                for batch in Loader(self.data, self.split, jobs, self.config, inputs=[(modality,)], train=False,
                                    epoch=0):
                    pairs = np.flatnonzero(np.isin(rows, batch.sample_ids.numpy()))
                    places = np.searchsorted(batch.sample_ids.numpy(), rows[pairs])
                    logits[pairs] = self._of_batch(modality, batch, places, captions[pairs])
                    bar.update(len(pairs))
        finally:
            self.model.train(was_training)
        return logits

    @torch.inference_mode()
    def _of_batch(self, modality: str, batch: Batch, places_P: np.ndarray, captions_P: np.ndarray) -> np.ndarray:
        """Logits of pairs of the batch's samples, by their places in it, and captions."""
        inputs, windows = inputs_of(batch, modality), windows_of(self.model, batch, modality)
        device = self.setting.device
        tokens = join(self.micro_batches.of(
            (modality,), len(inputs[0]), weight=windows,
            work=lambda rows: encode(self.model, batch, modality, [x[rows].to(device) for x in inputs])))
        parts = self.micro_batches.of(
            (modality, "text"), len(places_P), weight=windows,
            work=lambda part: self._of_pairs(modality, tokens, places_P[part], captions_P[part]))
        return torch.cat(parts).float().cpu().numpy()

    def _of_pairs(self, modality: str, tokens: Tokens, places_P: np.ndarray, captions_P: np.ndarray) -> Tensor:
        device, split, head = self.setting.device, self.data.splits[self.split], self.heads[f"{modality}_text"]
        ids_PL, mask_PL = (torch.from_numpy(array).to(device) for array in pad_captions(split, captions_P))
        media = pick(tokens, torch.from_numpy(places_P).to(device))
        fused_PD = self.model.fuse({modality: media, "text": self.model.text(ids_PL, mask_PL)})[0]
        with torch.autocast(device.type, enabled=False):
            return torch.nn.functional.linear(fused_PD, *(head[name].to(fused_PD) for name in ("weight", "bias")))[:, 0]
