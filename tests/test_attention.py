"""Attention in chunks is plain attention: every output, every gradient, masks and empty rows included; and it does save
the memory that it is for."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import PAIRS
from tests.narrow import gradients, largest_difference, narrow_model, small_inputs, weighted_sum
from trimodal.blocks import KERNELS, Block, Blocks, ProductAttention, attend, use_kernel
from trimodal.config import MODALITIES
from trimodal.memory.tracker import tracing
from trimodal.training.planner import kernels_of

N = 7  # tokens


def naive_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """One query of one head at a time, over the valid keys alone; zeros where there is none."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    rows = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys, values = (k[b, h], v[b, h]) if valid is None else (k[b, h][valid[b]], v[b, h][valid[b]])
        weights = torch.softmax(keys @ q[b, h, i] / math.sqrt(q.shape[3]), 0)
        rows.append(weights @ values)
    return torch.stack(rows).view_as(out)


def masks_of(kind: str, batch: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    valid = torch.arange(keys) < torch.tensor([keys, 4, 1])[:batch, None]
    valid[1, 0] = False  # not only at the end
    if kind == "empty row":
        valid[2] = False
    return valid


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
@pytest.mark.parametrize("chunk", [1, 3, N, N + 5, "auto"])
def test_attention_is_exact(chunk: int | str, mask: str, grad: bool) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 2, n, 5, generator=g, dtype=torch.float64).requires_grad_() for n in (N, N + 2, N + 2))
    valid = masks_of(mask, 3, N + 2)
    upstream = torch.randn(3, 2, N, 5, generator=g, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        ours, plain = attend(q, k, v, valid, chunk), naive_attention(q, k, v, valid)
    assert float((ours - plain).detach().abs().max()) <= 1e-12
    if mask == "empty row":
        assert not ours[2].any()
    if grad:
        pairs = zip(torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(plain, (q, k, v), upstream),
                    strict=True)
        for ours_grad, plain_grad in pairs:
            assert float((ours_grad - plain_grad).abs().max()) <= 1e-12
            assert mask != "empty row" or not ours_grad[2].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
def test_attention_in_half_precision_is_rounded_once(mask: str, autocast: bool, kernel: str) -> None:
    """bfloat16 keeps 8 bits: results and gradients are within 1 % of those of the same inputs in float64."""
    g = torch.Generator().manual_seed(2)
    q, k, v = half = [torch.randn(3, 2, N, 5, generator=g).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in half]
    valid, upstream = masks_of(mask, 3, N), torch.randn(3, 2, N, 5, generator=g).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attend(q, k, v, valid, "auto", kernel)
    plain = naive_attention(exact[0], exact[1], exact[2], valid)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.double(), plain, rtol=0.01, atol=0.005)
    ours_grads = torch.autograd.grad(ours, half, upstream)
    for one, other in zip(ours_grads, torch.autograd.grad(plain, exact, upstream.double()), strict=True):
        assert one.dtype == torch.bfloat16 and torch.allclose(one.double(), other, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_attention_by_products_has_the_gradients_of_autograd(mask: str) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 2, n, 5, generator=g, dtype=torch.float64).requires_grad_() for n in (4, N, N))
    valid = masks_of(mask, 3, N)
    mask_B11K = None if valid is None else valid[:, None, None, :]
    assert torch.autograd.gradcheck(lambda q, k, v: ProductAttention.apply(q, k, v, mask_B11K), (q, k, v))
    assert torch.allclose(ProductAttention.apply(q, k, v, mask_B11K), naive_attention(q, k, v, valid), atol=1e-12)


@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["recompute", "kept"])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
def test_blocks_in_bfloat16_are_the_same_by_every_kernel(mask: str, use_checkpoint: bool) -> None:
    """Under autocast, with recompute and a frozen layer: gradients differ by rounding alone."""
    torch.manual_seed(3)
    blocks, x = Blocks(16, 2, 2, "auto", use_checkpoint), torch.randn(3, N, 16)
    blocks.blocks[0].qkv.requires_grad_(False)
    found = {}
    for kernel in KERNELS:
        use_kernel(blocks, kernel)
        blocks.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = blocks(x, masks_of(mask, 3, N))
        out.square().sum().backward()
        found[kernel] = torch.cat([p.grad.flatten() for p in blocks.parameters() if p.grad is not None])
    for kernel in KERNELS[1:]:
        assert float((found[kernel] - found["float32"]).norm() / found["float32"].norm()) < 0.02, kernel


def plain_blocks(blocks: Blocks, x_BND: Tensor, valid_BN: Tensor | None, path_BZ: Tensor) -> Tensor:
    """What `blocks` says, with naive attention."""
    for i, block in enumerate(blocks.blocks):
        assert isinstance(block, Block)
        q, k, v = (part.unflatten(2, (block.num_heads, -1)).transpose(1, 2)
                   for part in block.qkv(block.norm1(x_BND)).chunk(3, dim=2))
        attended = naive_attention(q, k, v, valid_BN).transpose(1, 2).flatten(2)
        scale = path_BZ[:, i, None, None]
        x_BND = x_BND + scale * block.out(attended)
        x_BND = x_BND + scale * block.down(F.gelu(block.up(block.norm2(x_BND))))
    return blocks.norm(x_BND)


@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["recompute", "kept"])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
@pytest.mark.parametrize("chunk", [1, 3, N, N + 5, "auto"])
def test_blocks_are_exact(chunk: int | str, mask: str, use_checkpoint: bool) -> None:
    torch.manual_seed(3)
    plain = Blocks(16, 2, 2, "auto").double()
    ours = Blocks(16, 2, 2, chunk, use_checkpoint).double()
    ours.load_state_dict(plain.state_dict())
    x, upstream = torch.randn(2, 3, N, 16, dtype=torch.float64).unbind()
    valid, path_BZ = masks_of(mask, 3, N), torch.tensor([[1.0, 0.0], [1.0, 1.5], [1.0, 1.5]])
    results = []
    for blocks, run in ((ours, ours), (plain, functools.partial(plain_blocks, plain))):
        given = x.clone().requires_grad_()
        out = run(given, valid, path_BZ)
        out.backward(upstream)
        assert given.grad is not None
        results.append({"output": out, "input": given.grad, **gradients(blocks)})
    assert len(results[0]) == 2 + len(list(plain.parameters()))
    assert largest_difference(*results) <= 1e-12


@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["recompute", "kept"])
@pytest.mark.parametrize("mask", ["none", "padding", "empty row"])
@pytest.mark.parametrize("first", [1, 3])
def test_the_first_tokens_alone_are_those_of_all(first: int, mask: str, use_checkpoint: bool) -> None:
    """The last block leaves out what nobody reads; outputs and every gradient are those of computing all."""
    torch.manual_seed(3)
    blocks = Blocks(16, 2, 2, "auto", use_checkpoint).double()
    x, upstream = torch.randn(3, N, 16, dtype=torch.float64), torch.randn(3, first, 16, dtype=torch.float64)
    valid, path_BZ = masks_of(mask, 3, N), torch.tensor([[1.0, 0.0], [1.0, 1.5], [1.0, 1.5]])
    results = []
    for run in (lambda x: blocks(x, valid, path_BZ, first), lambda x: blocks(x, valid, path_BZ)[:, :first]):
        blocks.zero_grad()
        given = x.clone().requires_grad_()
        out = run(given)
        out.backward(upstream)
        assert given.grad is not None
        results.append({"output": out, "input": given.grad, **gradients(blocks)})
    assert largest_difference(*results) <= 1e-12


@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["recompute", "kept"])
def test_whole_model_in_chunks_is_exact(use_checkpoint: bool) -> None:
    results = []
    for chunk, flag in ((3, use_checkpoint), ("auto", False)):
        model = narrow_model(attention_chunk=chunk, use_checkpoint=flag)
        outputs = model(**small_inputs(set(MODALITIES)))
        weighted_sum(outputs).backward()
        results.append({**outputs, **gradients(model)})
    assert len(results[0]) == 5 + len(list(model.parameters())) - 2 * len(PAIRS)
    assert largest_difference(*results) <= 1e-10, "of gradients up to 700"


def peak_bytes(blocks_of: dict[str, object], tokens: int = 256) -> int:
    with tracing() as tracker:
        blocks = Blocks(64, 4, 4, **blocks_of)  # type: ignore[arg-type]
        blocks(torch.ones(2, tokens, 64, requires_grad=True), None).sum().backward()
    return tracker.usage().peak_bytes


def test_a_step_planned_for_a_gpu_does_not_take_the_casts_of_a_cpu() -> None:
    def peak(device: str) -> int:
        with kernels_of(device), tracing() as tracker, torch.no_grad():
            q, k, v = torch.zeros(3, 2, 4, 256, 16, dtype=torch.bfloat16).unbind()
            attend(q, k, v, None, "auto")
        return tracker.usage().peak_bytes

    assert peak("cuda") < 0.7 * peak("cpu")


def test_chunks_and_recompute_save_memory() -> None:
    whole = peak_bytes({"chunk": 256})
    scores = 2 * 4 * 256 * 256 * 4
    assert peak_bytes({"chunk": 16}) < whole - 2 * scores, "the scores of a chunk are freed before the next"
    kept, recomputed = (peak_bytes({"chunk": 16, "recompute_every": every}) for every in (0, 1))
    assert recomputed < 0.5 * kept, "of four blocks one is in memory"
