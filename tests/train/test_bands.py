"""Mean losses by masking ratio and by position in the block, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_edlm.train.bands import LossBands


def expected(loss: Tensor, p_mask: Tensor, position: Tensor, digits: int) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for value, ratio, place in zip(loss.tolist(), p_mask.tolist(), position.tolist(), strict=True):
        groups.setdefault(f"loss/position_{str(place).zfill(digits)}", []).append(value)
        for low in (0.0, 0.25, 0.5, 0.75):
            if low <= ratio < low + 0.25 or (ratio == 1 and low == 0.75):
                groups.setdefault(f"loss/mask_{low:.2f}-{low + 0.25:.2f}", []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()}


@pytest.mark.parametrize(("block_length", "digits"), [(1, 1), (4, 1), (10, 1), (11, 2), (16, 2)])
def test_means_are_those_of_a_plain_loop(block_length: int, digits: int) -> None:
    generator = torch.Generator().manual_seed(block_length)
    loss = torch.rand(200, generator=generator) * 5
    p_mask = torch.rand(200, generator=generator)
    p_mask[:6] = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.001, 0.2499])
    position = torch.randint(block_length, (200,), generator=generator)
    bands = LossBands(block_length, "cpu")
    for part in (slice(0, 50), slice(50, 50), slice(50, 200)):
        bands.update(loss[part], p_mask[part], position[part])
    assert bands.read() == pytest.approx(expected(loss, p_mask, position, digits))


def test_reading_starts_anew_and_leaves_out_empty_bands() -> None:
    bands = LossBands(16, "cpu")
    assert bands.read() == {}
    bands.update(torch.tensor([3.0]), torch.tensor([0.3]), torch.tensor([15]))
    assert bands.read() == {"loss/mask_0.25-0.50": 3.0, "loss/position_15": 3.0}
    assert bands.read() == {}


def test_processes_are_summed_before_the_mean() -> None:
    """The other process saw three times as many tokens, of loss 5."""
    bands = LossBands(8, "cpu")
    bands.update(torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([0]))

    def with_the_other(totals: Tensor) -> Tensor:
        other = (totals[1:] > 0) * torch.tensor([[15.0], [3.0]])
        return totals + other

    assert bands.read(with_the_other) == {"loss/mask_0.00-0.25": 4.0, "loss/position_0": 4.0}


def test_the_graph_is_not_kept() -> None:
    bands = LossBands(4, "cpu")
    loss = torch.ones(2, requires_grad=True) * 2
    bands.update(loss, torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert not bands._totals.requires_grad
