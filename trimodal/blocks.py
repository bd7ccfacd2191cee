"""Transformer blocks: attention that is chunked or fused, recompute, and what encoders pass to each other.

Shape suffixes: B samples, N tokens, K keys, Q queries, D width, H heads, E head width (D = H * E), Z depth. `valid_BN`
is True where a token is real; None means that all are.
"""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

# of attention in bfloat16 on a CPU: the fused kernel inside casts to float32, the same without them, plain products
KERNELS = ("float32", "fused", "products")
PRODUCTS_KEYS = 6  # times the head width: up to so many keys probabilities take no more memory than q, k, v as float32
KERNELS_OF: ContextVar[str | None] = ContextVar("kernels_of", default=None)  # device planned for on fake CPU tensors


class Tokens(NamedTuple):
    """Output of an encoder: `tokens_BND` after the last norm, `valid_BN` or None."""

    tokens_BND: Tensor
    valid_BN: Tensor | None


def attend(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, valid_BK: Tensor | None, chunk: int | str,
           kernel: str = "float32") -> Tensor:
    """Softmax attention of every query over the valid keys; (B, H, Q, E).

    `chunk` "auto" takes a fused kernel where one accepts the mask; a number, or the lack of such a kernel, computes
    that many queries at a time and recomputes their scores in the backward pass: rows of softmax(QK^T)V are
    independent, so this is exact, and the peak falls from B*H*Q*K to B*H*chunk*K scores. `kernel`, of KERNELS, is how
    a CPU computes "auto" in bfloat16. A sample without any valid key gives zeros and no gradient.
    """
    if valid_BK is None:
        mask_B11K = None
    else:
        some_B = valid_BK.any(1)
        mask_B11K = (valid_BK | ~some_B[:, None])[:, None, None, :]  # no softmax over nothing
    if chunk == "auto" and has_fused_kernel(q_BHQE, k_BHKE, v_BHKE, mask_B11K):
        out_BHQE = _attend_at_once(q_BHQE, k_BHKE, v_BHKE, mask_B11K, kernel)
    else:
        size = 128 if chunk == "auto" else int(chunk)
        out_BHQE = torch.cat([_attend_chunk(q, k_BHKE, v_BHKE, mask_B11K) for q in q_BHQE.split(size, dim=2)], dim=2)
    return out_BHQE if valid_BK is None else out_BHQE * some_B[:, None, None, None]


def _attend_at_once(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B11K: Tensor | None, kernel: str) -> Tensor:
    if q_BHQE.dtype != torch.bfloat16 or (KERNELS_OF.get() or q_BHQE.device.type) != "cpu" or kernel == "fused":
        return F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, attn_mask=mask_B11K)
    if kernel == "products" and k_BHKE.shape[2] <= PRODUCTS_KEYS * k_BHKE.shape[3]:
        return ProductAttention.apply(q_BHQE, k_BHKE, v_BHKE, mask_B11K)
    with torch.autocast("cpu", enabled=False):
        out_BHQE = F.scaled_dot_product_attention(q_BHQE.float(), k_BHKE.float(), v_BHKE.float(), attn_mask=mask_B11K)
    return out_BHQE.to(torch.bfloat16)


class ProductAttention(torch.autograd.Function):
    """Attention by plain products: scores in at least float32, since rounding moves large ones most; all others in the
    type given. It keeps the probabilities, in that type, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B11K: Tensor | None) -> Tensor:
        with torch.autocast(q_BHQE.device.type, enabled=False):
            q_BHQE, k_BHKE, v_BHKE = (x.contiguous() for x in (q_BHQE, k_BHKE, v_BHKE))  # else by each product
            q = at_least_float32(q_BHQE) * q_BHQE.shape[-1] ** -0.5
            scores_BHQK = q @ at_least_float32(k_BHKE).mT
            if mask_B11K is not None:
                scores_BHQK.masked_fill_(~mask_B11K, float("-inf"))
            p_BHQK = scores_BHQK.softmax(-1).to(v_BHKE.dtype)
            ctx.save_for_backward(q_BHQE, k_BHKE, v_BHKE, p_BHQK)
            return p_BHQK @ v_BHKE

    @staticmethod
    def backward(ctx: Any, upstream_BHQE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHQE, k_BHKE, v_BHKE, p_BHQK = ctx.saved_tensors
        with torch.autocast(q_BHQE.device.type, enabled=False):
            upstream_BHQE = upstream_BHQE.contiguous()
            upstream_BHQK = upstream_BHQE @ v_BHKE.mT
            scores_BHQK = torch.ops.aten._softmax_backward_data(upstream_BHQK, p_BHQK, -1, p_BHQK.dtype)
            scores_BHQK *= q_BHQE.shape[-1] ** -0.5
            return scores_BHQK @ k_BHKE, scores_BHQK.mT @ q_BHQE, p_BHQK.mT @ upstream_BHQE, None


def _attend_chunk(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B11K: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():  # without the recompute autograd would keep the scores of every chunk
        return recompute(_plain_attention, q_BHQE, k_BHKE, v_BHKE, mask_B11K, use_reentrant=False,
                         preserve_rng_state=False)
    return _plain_attention(q_BHQE, k_BHKE, v_BHKE, mask_B11K)


def _plain_attention(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B11K: Tensor | None) -> Tensor:
    scores_BHQK = q_BHQE @ k_BHKE.transpose(-2, -1) * q_BHQE.shape[-1] ** -0.5
    if mask_B11K is not None:
        scores_BHQK = scores_BHQK.masked_fill(~mask_B11K, float("-inf"))
    return scores_BHQK.softmax(-1).to(v_BHKE.dtype) @ v_BHKE


def has_fused_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """True where SDPA has a kernel that never holds the Q x K scores for these inputs."""
    if q.device.type == "cpu":
        return True  # flash attention for float and double, masks included
    if q.device.type != "cuda":
        return False
    cuda = torch.backends.cuda
    expanded = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    params = cuda.SDPAParams(q, k, v, expanded, 0.0, False, False)
    return cuda.can_use_flash_attention(params) or cuda.can_use_efficient_attention(params)


class Block(nn.Module):
    """Pre-norm transformer block (arXiv:2010.11929) whose residual branches are scaled by `path_B` (drop-path)."""

    def __init__(self, dim: int, num_heads: int, chunk: int | str):
        super().__init__()
        self.num_heads, self.chunk, self.kernel = num_heads, chunk, KERNELS[0]
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None, path_B: Tensor | None,
                first: int | None = None) -> Tensor:
        """States after the block; with `first` only those of so many first tokens, which attend to all; (B, Q, D)."""
        attended_BQD = self._attention(self.norm1(x_BND), valid_BN, first)
        x_BQD = _add_branch(x_BND[:, :first], attended_BQD, path_B)
        return _add_branch(x_BQD, self.down(F.gelu(self.up(self.norm2(x_BQD)))), path_B)

    def _attention(self, x_BND: Tensor, valid_BN: Tensor | None, first: int | None) -> Tensor:
        D, heads = x_BND.shape[2], (self.num_heads, -1)
        if first is None:
            q, k, v = self.qkv(x_BND).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, E)
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (p.split((D, 2 * D)) for p in self.qkv.parameters())
            q = F.linear(x_BND[:, :first], q_weight, q_bias).unflatten(2, heads).transpose(1, 2)
            k, v = F.linear(x_BND, kv_weight, kv_bias).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, valid_BN, self.chunk, self.kernel).transpose(1, 2).flatten(2))


def _add_branch(x_BND: Tensor, branch_BND: Tensor, path_B: Tensor | None) -> Tensor:
    """A residual stream after a branch, which `path_B` scales in each sample; None: by 1."""
    return x_BND + (branch_BND if path_B is None else path_B[:, None, None].to(x_BND.dtype) * branch_BND)


def use_kernel(model: nn.Module, kernel: str) -> None:
    """Let every block of `model` compute its attention by this one of KERNELS where there is a choice."""
    for block in model.modules():
        if isinstance(block, Block):
            block.kernel = kernel


class Blocks(nn.Module):
    """A stack of blocks and the last norm; `path_BZ` holds each sample's drop-path scale at each block.

    `recompute_every` n computes the activations of every n-th block again in the backward pass (1: of all, 0: of none):
    less memory, and up to one forward pass more.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, chunk: int | str, recompute_every: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, chunk) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.recompute_every = recompute_every

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None, path_BZ: Tensor | None = None,
                first: int | None = None) -> Tensor:
        """States of all tokens, or of so many `first` ones: the last block computes those alone."""
        for i, block in enumerate(self.blocks):
            path_B = None if path_BZ is None else path_BZ[:, i]
            wanted = first if i == len(self.blocks) - 1 else None
            if self.recompute_every and i % self.recompute_every == 0 and torch.is_grad_enabled():
                x_BND = recompute(block, x_BND, valid_BN, path_B, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, valid_BN, path_B, wanted)
        return self.norm(x_BND)


def masked_mean(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Mean over the valid tokens, in at least float32; zeros where there is none. (B, D)"""
    x_BND = at_least_float32(x_BND)
    if valid_BN is None:
        return x_BND.mean(1)
    weight_BN1 = valid_BN[:, :, None].to(x_BND.dtype)
    return (x_BND * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Run `layer` in the dtype of its parameters, which may be half precision; the result is at least float32."""
    return at_least_float32(layer(x.to(next(layer.parameters()).dtype)))
