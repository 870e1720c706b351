"""Block-diagonal attentions against the mask that they make up, and merged against dense SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.decoders import ROWS, assert_equals_dense, tiny_model
from tests.train.grids import LAYOUTS, joint_grid
from vllm_edlm.train.attention import attention_inputs, segments, xformers
from vllm_edlm.train.masks import Grid, Pattern, dense_mask


def as_mask(part: segments.Segments) -> Tensor:
    """What one block-diagonal attention allows, [Q, K]."""
    blocks = [
        torch.ones(q, k).tril() if part.causal else torch.ones(q, k)
        for q, k in zip(part.query_lengths, part.key_lengths, strict=True)
    ]
    return torch.block_diag(*blocks).bool()


def scattered(grid: Grid, masks: list[tuple[segments.Segments, Tensor]]) -> Tensor:
    """How often the masks [Q, K] together allow each pair of the M tokens, [M, M]."""
    total = torch.zeros(grid.copy.numel(), grid.copy.numel(), dtype=torch.int64)
    for part, mask in masks:
        total[part.queries[:, None], part.keys] += mask
    return total


def flat_mask(grid: Grid) -> Tensor:
    return torch.block_diag(*dense_mask(grid)[:, 0])


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
@pytest.mark.parametrize("block_length", [1, 4, 64])
def test_segments_hold_every_allowed_pair_once(
    pattern: Pattern, causal: bool, copies: int, block_length: int
) -> None:
    grid = joint_grid(ROWS, block_length, pattern, causal, copies)
    parts = segments.segments(grid)
    covered = scattered(grid, [(part, as_mask(part)) for part in parts])
    assert torch.equal(covered, flat_mask(grid).long())


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
def test_xformers_biases_equal_the_mask(pattern: Pattern, causal: bool, copies: int) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    grid = joint_grid(ROWS, 4, pattern, causal, copies)
    masks = []
    for part, bias in attention_inputs(xformers.NAME, grid)["parts"]:
        masks.append((part, bias.materialize((len(part.queries), len(part.keys))) == 0))
    assert torch.equal(scattered(grid, masks), flat_mask(grid).long())


def scores(q: Tensor, k: Tensor, part: segments.Segments, scale: float) -> Tensor:
    products = torch.einsum("qhd,khd->qhk", q, k) * scale
    return products.masked_fill(~as_mask(part)[:, None], -torch.inf)


def forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, part: xformers.Part, scale: float
) -> tuple[Tensor, Tensor]:
    masked = scores(q, k, part.segments, scale)
    return torch.einsum("qhk,khd->qhd", masked.softmax(-1), v), masked.logsumexp(-1)


def backward_kernel(
    whole: Any, q: Tensor, k: Tensor, v: Tensor, part: xformers.Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The flash backward pass: probabilities from the given log-sum-exp, as the kernels do it."""
    p = (scores(q, k, part.segments, scale) - whole.lse[..., None]).exp()
    of_p = torch.einsum("qhd,khd->qhk", whole.grad, v)
    of_scores = p * (of_p - (whole.grad * whole.output).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("qhk,khd->qhd", of_scores, k),
        torch.einsum("qhk,qhd->khd", of_scores, q),
        torch.einsum("qhk,qhd->khd", p, whole.grad),
    )


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
def test_merged_parts_equal_dense(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, causal: bool, copies: int
) -> None:
    monkeypatch.setattr(xformers, "bias", lambda part: None)
    monkeypatch.setattr(xformers, "_forward", forward_kernel)
    monkeypatch.setattr(xformers, "_backward", backward_kernel)
    grid = joint_grid(ROWS, 4, pattern, causal, copies)
    assert_equals_dense(tiny_model(), xformers.NAME, grid)
