"""Mean losses by masking ratio and by position in the block, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_edlm.train.bands import LossBands


def expected(loss: Tensor, p_mask: Tensor, position: Tensor, block_length: int) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for value, ratio, place in zip(loss.tolist(), p_mask.tolist(), position.tolist(), strict=True):
        for axis, share in (("mask", ratio), ("position", place / block_length)):
            for low in (0.0, 0.25, 0.5, 0.75):
                if low <= share < low + 0.25 or (share == 1 and low == 0.75):
                    groups.setdefault(f"loss/{axis}_{low:.2f}-{low + 0.25:.2f}", []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()}


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 6, 16])
def test_means_are_those_of_a_plain_loop(block_length: int) -> None:
    generator = torch.Generator().manual_seed(block_length)
    loss = torch.rand(200, generator=generator) * 5
    p_mask = torch.rand(200, generator=generator)
    p_mask[:6] = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.001, 0.2499])
    position = torch.randint(block_length, (200,), generator=generator)
    bands = LossBands("cpu")
    for part in (slice(0, 50), slice(50, 50), slice(50, 200)):
        bands.update(loss[part], p_mask[part], position[part], block_length)
    assert bands.read() == pytest.approx(expected(loss, p_mask, position, block_length))


def test_reading_starts_anew_and_leaves_out_empty_bands() -> None:
    bands = LossBands("cpu")
    assert bands.read() == {}
    bands.update(torch.tensor([3.0]), torch.tensor([0.3]), torch.tensor([15]), 16)
    assert bands.read() == {"loss/mask_0.25-0.50": 3.0, "loss/position_0.75-1.00": 3.0}
    assert bands.read() == {}


def test_block_lengths_may_change_between_updates() -> None:
    bands = LossBands("cpu")
    bands.update(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([3]), 4)
    bands.update(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([3]), 16)
    assert bands.read() == {
        "loss/mask_0.75-1.00": 1.5,
        "loss/position_0.00-0.25": 2.0,
        "loss/position_0.75-1.00": 1.0,
    }


def test_processes_are_summed_before_the_mean() -> None:
    """The other process saw three times as many tokens, of loss 5."""
    bands = LossBands("cpu")
    bands.update(torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([0]), 8)

    def with_the_other(totals: Tensor) -> Tensor:
        other = (totals[1:] > 0) * torch.tensor([[15.0], [3.0]])
        return totals + other

    assert bands.read(with_the_other) == {"loss/mask_0.00-0.25": 4.0, "loss/position_0.00-0.25": 4}


def test_the_graph_is_not_kept() -> None:
    bands = LossBands("cpu")
    loss = torch.ones(2, requires_grad=True) * 2
    bands.update(loss, torch.ones(2), torch.zeros(2, dtype=torch.long), 4)
    assert not bands._totals.requires_grad
