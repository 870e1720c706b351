"""The loss against the formula written out."""

from __future__ import annotations

import pytest
import torch

from vllm_edlm.train.loss import diffusion_loss


def test_loss_is_the_weighted_mean_over_masked_tokens() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 11), torch.randint(0, 11, (5,))
    p_mask = torch.tensor([0.1, 0.5, 0.5, 1.0, 0.25])
    expected = 0.0
    for row, target, p in zip(logits, targets, p_mask, strict=True):
        expected += -(row.softmax(-1)[target].log() / p).item()
    assert diffusion_loss(logits, targets, p_mask).item() == pytest.approx(expected / 5, rel=1e-5)


def test_loss_without_a_masked_token_is_zero_and_still_has_a_gradient() -> None:
    logits = torch.randn(0, 11, requires_grad=True)
    loss = diffusion_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
