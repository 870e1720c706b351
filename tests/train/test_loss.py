"""The loss against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vllm_edlm.train.loss import (
    LOGITS_BYTES,
    cross_entropies,
    divergences,
    in_slices,
    masked_loss,
    tokens_per_slice,
)


def test_loss_is_the_weighted_sum_over_the_step_per_masked_token() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 11), torch.randint(0, 11, (5,))
    p_mask = torch.tensor([0.1, 0.5, 0.5, 1.0, 0.25])
    expected = 0.0
    for row, target, p in zip(logits, targets, p_mask, strict=True):
        expected += -(row.softmax(-1)[target].log() / p).item()
    losses, count = cross_entropies(logits, targets), torch.tensor(8)
    assert masked_loss(losses, p_mask, count).item() == pytest.approx(expected / 8, rel=1e-5)
    halves = [masked_loss(losses[part], p_mask[part], count) for part in (slice(2), slice(2, 5))]
    assert sum(halves).item() == pytest.approx(expected / 8, rel=1e-5)


def test_a_step_without_a_masked_token_has_loss_zero_and_still_a_gradient() -> None:
    logits = torch.randn(0, 11, requires_grad=True)
    losses = cross_entropies(logits, torch.zeros(0, dtype=torch.long))
    loss = masked_loss(losses, torch.zeros(0), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_divergence_is_that_of_the_student_from_the_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 4, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergences(teacher, student), expected)
    assert divergences(teacher, teacher).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 10, 64])
def test_slices_change_neither_losses_nor_gradients(tokens: int) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 11), torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(0, 11, (10,))
    widths = []

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        widths.append(len(hidden))
        return cross_entropies(head(hidden), targets)

    results = []
    for size in (tokens, 10):
        result = in_slices(losses, size, hidden, targets)
        inputs = [hidden, *head.parameters()]
        results.append((result, torch.autograd.grad(result.square().sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])
    assert max(widths[:-1]) == min(tokens, 10), "no more logits than asked for at a time"


def test_a_slice_is_bounded_in_bytes() -> None:
    assert tokens_per_slice(151_936) * 151_936 * 4 <= LOGITS_BYTES
    assert tokens_per_slice(10**12) == 1
