"""Masked pretraining: predict the hidden patches of images and audio, and the hidden tokens of captions.

Shape suffixes: B samples, C captions, K kept patches, N patches, D width, P values of a patch, L text tokens,
M hidden text tokens, R width of the token embedding table, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.objectives.base import Objective, SumAndParts
from trimodal.objectives.step import Step, kept_counts

TEXT_MASK_SHARE = 0.25  # of a caption's tokens


def patch_error(predicted_BNP: Tensor, target_BNP: Tensor, hidden_BN: Tensor) -> Tensor:
    """Sum over hidden patches of the mean squared error against the patch's own normalised values
    (arXiv:2111.06377)."""
    variance, mean = torch.var_mean(target_BNP, dim=-1, keepdim=True, correction=0)
    target_BNP = (target_BNP - mean) / (variance + 1e-3).sqrt()
    return ((predicted_BNP - target_BNP).square().mean(-1) * hidden_BN).sum()  # of float32 targets: float32


def hidden_tokens(mask_CL: Tensor, uniform_CL: Tensor, share: float = TEXT_MASK_SHARE) -> Tensor:
    """Mask of the text tokens to hide, bool (C, L): each but [CLS], [SEP] and padding with probability `share`.

    `mask_CL`: True at real tokens; `uniform_CL`: random numbers from 0 to 1, one for each token.
    """
    inner_CL = mask_CL & F.pad(mask_CL[:, 1:], (0, 1))  # a real token follows
    inner_CL[:, 0] = False
    return inner_CL & (uniform_CL < share)


class Masked(Objective):
    """Predict what is hidden: patches of images and audio (arXiv:2111.06377, arXiv:2207.06405; the encoder sees
    kept patches only), tokens of captions (arXiv:1810.04805, with the input embeddings as output layer)."""

    scope = "tower"

    def __init__(self, model: Any, inputs: Sequence[str], num_speakers: int):
        super().__init__(model, inputs, num_speakers)
        preset = model.config.preset
        self.heads = nn.ModuleDict({name: PatchDecoder(preset, getattr(model, name).patch_dim)
                                    for name in self.inputs if name != "text"})
        if "text" in self.inputs:
            self.heads["text"] = nn.Sequential(nn.Linear(preset.dim, preset.word_rank), nn.LayerNorm(preset.word_rank))

    def count(self, step: Step) -> float:
        return float(sum(self._hidden_count(step, name) for name in self.inputs))

    def _hidden_count(self, step: Step, name: str) -> int:
        if name == "text":
            mask_CL = step.batch.attention_mask
            return step.read(hidden_tokens(mask_CL, step.batch.noise["text"]).sum(), mask_CL.numel())
        counts_B = step.patch_counts(name, slice(None))
        hidden_B = counts_B - kept_counts(counts_B, step.keep.get(name, 1.0))
        return step.read(hidden_B.sum(), step.batch.noise[name].numel())

    def loss(self, step: Step, name: str, rows: slice) -> SumAndParts:
        loss = self._text_tokens(step, rows) if name == "text" else self._patches(step, name, rows)
        return loss, {f"masked_{name}": loss}

    def _patches(self, step: Step, name: str, rows: slice) -> Tensor:
        encoder = getattr(step.model, name)
        media = step.media(name, rows)
        lengths = [step.to_device(step.batch.audio_lengths[rows])] if name == "audio" else []
        kept, kept_valid = map(step.to_device, step.kept(name, rows))
        with step.autocast():
            tokens_BKD, _ = step.encode(name, rows, hide=True)
            target, valid = encoder.patches(media, *lengths)
            predicted, seen = self.heads[name](tokens_BKD, kept, kept_valid, encoder.positions(media), valid)
        hidden = ~seen if valid is None else ~seen & valid
        return patch_error(predicted, target, hidden)

    def _text_tokens(self, step: Step, rows: slice) -> Tensor:
        """Cross-entropy of predicting the hidden tokens of the captions `rows`, summed over them."""
        batch = step.batch
        mask_CL = batch.attention_mask[rows]
        hidden_CL = hidden_tokens(mask_CL, batch.noise["text"][rows])
        most = int(mask_CL.numel() * TEXT_MASK_SHARE * 1.5) + 1  # a draw is rarely above its mean by half
        indices_M2 = torch.nonzero_static(hidden_CL, size=step.read(hidden_CL.sum(), most))
        caption_M, token_M = step.to_device(indices_M2).unbind(1)
        ids_CL = step.to_device(batch.input_ids[rows])
        with step.autocast():
            shown_CL = ids_CL.masked_fill(step.to_device(hidden_CL), step.mask_id)
            states_CLD, _ = step.model.text(shown_CL, step.to_device(mask_CL), step.path_scales("text", rows))
            predicted_MR = self.heads["text"](states_CLD[caption_M, token_M])
            logits_MV = predicted_MR @ step.model.text.words.weight.T
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        return F.cross_entropy(logits_MV, ids_CL[caption_M, token_M], reduction="sum")


class PatchDecoder(nn.Module):
    """One transformer layer over kept tokens and mask tokens at their positions, then the patch's values."""

    def __init__(self, preset: Any, patch_dim: int):
        super().__init__()
        self.embed = nn.Linear(preset.dim, preset.dim)
        self.mask = nn.Parameter(torch.zeros(preset.dim))
        self.layer = nn.TransformerEncoderLayer(preset.dim, preset.num_heads, 4 * preset.dim, dropout=0.0,
                                                activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.out = nn.LayerNorm(preset.dim), nn.Linear(preset.dim, patch_dim)

    def forward(self, tokens_BKD: Tensor, kept_BK: Tensor, kept_valid_BK: Tensor, positions_ND: Tensor,
                valid_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predicted patches (B, N, P), and which patches the encoder saw (B, N)."""
        B, N, D = len(tokens_BKD), *positions_ND.shape
        slot_BK = kept_BK.masked_fill(~kept_valid_BK, N)  # padding lands in a slot that is cut off again
        embedded = self.embed(tokens_BKD)
        full = self.mask.to(embedded.dtype).expand(B, N + 1, D)
        full = full.scatter(1, slot_BK[:, :, None].expand(-1, -1, D), embedded)[:, :N] + positions_ND
        seen = torch.zeros(B, N + 1, dtype=torch.bool, device=full.device).scatter(1, slot_BK, True)[:, :N]
        padding = None if valid_BN is None else ~valid_BN
        return self.out(self.norm(self.layer(full, src_key_padding_mask=padding))), seen
