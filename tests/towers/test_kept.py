"""What is kept of a tower's output: its pooled feature, all tokens or averages of them."""

import pytest
import torch
import torch.nn.functional as F

from tests.refusals import refused
from trimodal.towers.base import Encoded
from trimodal.towers.kept import kept_tokens


def encoded(N: int, *counts: int) -> Encoded:
    g = torch.Generator().manual_seed(0)
    valid = None if not counts else torch.arange(N) < torch.tensor(counts)[:, None]
    B = len(counts) or 2
    return Encoded(torch.randn(B, N, 5, generator=g), valid, torch.randn(B, 5, generator=g))


def test_the_pooled_feature_comes_first_and_alone() -> None:
    given = encoded(9, 9, 4)
    tokens, valid = kept_tokens(given, 0, is_grid=False)
    assert torch.equal(tokens[:, 0], given.pooled_BD) and tokens.shape[1] == 1 and valid is None
    tokens, valid = kept_tokens(given, "all", is_grid=False)
    assert torch.equal(tokens, torch.cat([given.pooled_BD[:, None], given.tokens_BND], 1))
    assert valid is not None and valid.sum(1).tolist() == [10, 5]


@pytest.mark.parametrize(("side", "cells"), [(7, 1), (7, 2), (7, 3), (7, 7), (8, 4)])
def test_a_grid_is_averaged_as_adaptive_pooling_does(side: int, cells: int) -> None:
    given = encoded(side * side)
    tokens, valid = kept_tokens(given, cells * cells, is_grid=True)
    grid = given.tokens_BND.mT.unflatten(2, (side, side))
    torch.testing.assert_close(tokens[:, 1:], F.adaptive_avg_pool2d(grid, cells).flatten(2).mT)
    assert valid is None


def test_a_row_is_averaged_over_its_real_tokens() -> None:
    given = encoded(9, 9, 5, 2)
    tokens, valid = kept_tokens(given, 3, is_grid=False)
    x = given.tokens_BND
    assert valid is not None and valid.tolist() == [[True] * 4, [True] * 4, [True] * 3 + [False]]
    torch.testing.assert_close(tokens[0, 1:], x[0].view(3, 3, 5).mean(1))
    torch.testing.assert_close(tokens[1, 1:], torch.stack([x[1, :2].mean(0), x[1, 2:4].mean(0), x[1, 4]]))
    assert torch.equal(tokens[2, 1:3], x[2, :2])


def test_more_averages_than_a_map_has_tokens() -> None:
    with refused("model.image.keep_tokens", "64", "49", "all"):
        kept_tokens(encoded(49), 64, is_grid=True)
