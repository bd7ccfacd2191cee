"""The encoder of a modality whose tower is pretrained: what the tower gives once, and what of ours is trained over it.

Shape suffixes: B samples, N tokens beside the pooled one, L token ids, D width, Z depth of the adapter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.blocks import Blocks, Tokens, apply_layer, at_least_float32
from trimodal.config import ModelConfig
from trimodal.inputs import check_frames, check_ids, check_images
from trimodal.towers.base import ImageInput, PretrainedTower, SoundInput, TextInput
from trimodal.towers.kept import kept_tokens


class PretrainedEncoder(nn.Module):
    """A pretrained tower, and blocks of ours (`adapter_depth`) over what it makes of a sample.

    The first token is the tower's pooled feature, always valid; `keep_tokens` others follow, valid ones first.
    `tower_tokens` is all that a frozen tower has to do once, `adapt` what is left to be trained.
    """

    def __init__(self, tower: PretrainedTower, config: ModelConfig):
        super().__init__()
        row, width = config.tower(tower.modality), config.preset.dim
        self.tower, self.keep_tokens, self.depth = tower, row.keep_tokens, row.adapter_depth
        self.dim, self.vocab_size = width if self.depth else tower.dim, config.vocab_size
        if self.depth:
            self.bridge = nn.Linear(tower.dim, width)
            self.adapter = Blocks(width, config.preset.num_heads, self.depth, config.attention_chunk)

    def set_recompute(self, every: int) -> None:
        self.tower.set_recompute(every)
        if self.depth:
            self.adapter.recompute_every = every

    def check(self, inputs: Tensor, valid: Tensor | None = None) -> None:
        taken = self.tower.input
        if isinstance(taken, ImageInput):
            check_images(inputs, taken.size)
        elif isinstance(taken, SoundInput):
            check_frames(inputs, valid, taken.num_bins)
        else:
            check_ids(inputs, valid, self.vocab_size, taken.max_length)

    def tower_tokens(self, inputs: Tensor, valid: Tensor | None = None) -> Tokens:
        """The pooled feature and `keep_tokens` tokens, (B, 1 + N, tower.dim), in at least float32; a frozen tower
        builds no graph. `inputs` and `valid` as `PretrainedTower.forward` takes them."""
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        if isinstance(self.tower.input, TextInput) and valid is not None:
            valid = valid.bool()
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            encoded = self.tower(inputs, valid)
            return Tokens(*kept_tokens(encoded, self.keep_tokens, is_grid=self.tower.modality == "image"))

    def adapt(self, tokens: Tokens, path_BZ: Tensor | None = None, dropout_BD: Tensor | None = None) -> Tokens:
        """What the projection and the fusion read, (B, 1 + N, dim), of the tower's tokens.

        Each token is brought to mean 0 and variance 1, since towers differ in scale; its features are multiplied by
        `dropout_BD`, 0 where they are dropped, (B, tower.dim).
        """
        tokens_BND, valid_BN = at_least_float32(tokens.tokens_BND), tokens.valid_BN
        with torch.autocast(tokens_BND.device.type, enabled=False):
            tokens_BND = F.layer_norm(tokens_BND, tokens_BND.shape[2:])
            if dropout_BD is not None:
                tokens_BND = tokens_BND * dropout_BD[:, None].to(tokens_BND.dtype)
        if not self.depth:
            return Tokens(tokens_BND, valid_BN)
        return Tokens(self.adapter(apply_layer(self.bridge, tokens_BND), valid_BN, path_BZ), valid_BN)

    def forward(self, inputs: Tensor, valid: Tensor | None = None, path_BZ: Tensor | None = None,
                dropout_BD: Tensor | None = None) -> Tokens:
        return self.adapt(self.tower_tokens(inputs, valid), path_BZ, dropout_BD)

    def pool(self, encoded: Tokens) -> Tensor:
        """The first token, (B, D), in at least float32."""
        return at_least_float32(encoded.tokens_BND[:, 0])
