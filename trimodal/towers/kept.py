"""What is kept of a tower's output for the model: its pooled feature, and some tokens or averages of them.

Shape suffixes: B samples, N tokens, K kept tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimodal.blocks import at_least_float32
from trimodal.errors import UserError
from trimodal.towers.base import Encoded


def kept_tokens(encoded: Encoded, keep: int | str, *, is_grid: bool) -> tuple[Tensor, Tensor | None]:
    """The pooled feature, then `keep` tokens, "all" or so many averages, (B, 1 + K, D) in at least float32; and which
    are real: (B, 1 + K) with real ones first, or None.

    Averages are over equal parts of a square grid, or of the row of a sample's real tokens, which stand first; a sample
    with fewer tokens than averages keeps its tokens.
    """
    tokens_BND, valid_BN, pooled_BD = encoded
    pooled_B1D = at_least_float32(pooled_BD)[:, None]
    if keep == 0:
        return pooled_B1D, None
    kept_BKD, valid_BK = at_least_float32(tokens_BND), valid_BN
    if keep != "all":
        with torch.autocast(tokens_BND.device.type, enabled=False):
            kept_BKD, valid_BK = (_grid_means(kept_BKD, int(keep)), None) if is_grid else _row_means(
                kept_BKD, valid_BN, int(keep))
    valid_BK = None if valid_BK is None else F.pad(valid_BK, (1, 0), value=True)
    return torch.cat([pooled_B1D, kept_BKD.to(pooled_B1D.dtype)], dim=1), valid_BK


def _grid_means(tokens_BND: Tensor, keep: int) -> Tensor:
    """Means of the cells of a grid, row by row, as adaptive pooling cuts them; a product, since it is deterministic on
    every device."""
    side, cells = math.isqrt(tokens_BND.shape[1]), math.isqrt(keep)
    if side * side != tokens_BND.shape[1] or cells > side:
        raise UserError(f"model.image.keep_tokens: {keep} averages cannot be taken of a map of "
                        f"{tokens_BND.shape[1]} tokens; write a smaller square number, or 'all'")
    of_axis = torch.zeros(cells, side)
    for cell in range(cells):
        first, end = cell * side // cells, -(-(cell + 1) * side // cells)
        of_axis[cell, first:end] = 1 / (end - first)
    weight_KN = torch.kron(of_axis, of_axis).to(tokens_BND.device, tokens_BND.dtype)
    return weight_KN @ tokens_BND


def _row_means(tokens_BND: Tensor, valid_BN: Tensor | None, keep: int) -> tuple[Tensor, Tensor]:
    B, N, _ = tokens_BND.shape
    place_N = torch.arange(N, device=tokens_BND.device)
    valid_BN = place_N.expand(B, N) < N if valid_BN is None else valid_BN
    count_B1 = valid_BN.sum(1, keepdim=True)
    part_BN = torch.where(count_B1 > keep, place_N * keep // count_B1.clamp(min=1), place_N)
    part_K1 = torch.arange(keep, device=tokens_BND.device)[:, None]
    weight_BKN = ((part_BN[:, None] == part_K1) & valid_BN[:, None]).to(tokens_BND.dtype)
    weight_BKN = weight_BKN / weight_BKN.sum(2, keepdim=True).clamp(min=1)
    return weight_BKN @ tokens_BND, part_K1[:, 0] < count_B1
