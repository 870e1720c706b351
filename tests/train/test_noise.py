"""Noise against the reference figures, and its independence from batching."""

from __future__ import annotations

import pytest
import torch

from vllm_edlm.train.noise import (
    NOISE_KINDS,
    Corruption,
    NoiseKind,
    corrupt,
    draw,
    numbers_needed,
    position_noise,
    uniform_noise,
)


def sample_blocks(ratio: float, block_length: int, count: int = 40_000) -> Corruption:
    uniforms = draw(0, [0], 0, count * (block_length + 1)).view(count, block_length + 1)
    return position_noise(
        uniforms, torch.ones(count, block_length, dtype=torch.bool), block_length, ratio
    )


@pytest.mark.parametrize(
    ("ratio", "first", "middle", "last"),
    [(0.25, 0.37, 0.49, 0.66), (0.1, 0.26, 0.47, 0.85), (0.05, 0.19, 0.46, 0.94)],
)
def test_mean_masking_by_position(ratio: float, first: float, middle: float, last: float) -> None:
    mean = sample_blocks(ratio, 64).masked.float().mean(0)
    for position, expected in ((0, first), (32, middle), (63, last)):
        assert abs(mean[position].item() - expected) < 0.015, (position, mean[position])


def test_uniform_mean_is_one_half_everywhere() -> None:
    uniforms = draw(0, [0], 0, 40_000 * 65).view(40_000, 65)
    in_loss, document = torch.ones(40_000, 64, dtype=torch.bool), torch.zeros(40_000, 64).long()
    mean = uniform_noise(uniforms, in_loss, document).masked.float().mean(0)
    assert (mean - 0.5).abs().max() < 0.015


def test_uniform_noise_masks_documents_of_a_row_independently() -> None:
    """The share of masked tokens is the document's own ratio; the pad is never masked."""
    length = 6000
    document = torch.tensor([0] * 2000 + [1] * 2000 + [-1] * 2000).expand(20, -1)
    in_loss = document >= 0
    uniforms = draw(0, list(range(20)), 0, numbers_needed(length, 1000))
    noise = uniform_noise(uniforms, in_loss, document)
    shares = noise.masked.float().unflatten(1, (3, 2000)).mean(-1)
    ratios = noise.p_mask.unflatten(1, (3, 2000))
    assert (ratios == ratios[:, :, :1]).all()
    assert (shares[:, :2] - ratios[:, :2, 0]).abs().max() < 0.06
    assert (shares[:, 2] == 0).all()
    assert torch.corrcoef(ratios[:, :2, 0].T)[0, 1].abs() < 0.6


@pytest.mark.parametrize(("block_length", "share"), [(64, 0.006), (32, 0.015), (16, 0.03)])
def test_share_of_blocks_without_a_mask(block_length: int, share: float) -> None:
    empty = (sample_blocks(0.1, block_length).masked.sum(1) == 0).float().mean().item()
    assert abs(empty - share) < 0.004


def test_exactly_k_masks_in_every_block_also_the_short_last_one() -> None:
    lengths = [16, 16, 16, 5]
    uniforms = draw(3, list(range(200)), 0, numbers_needed(sum(lengths), 16))
    noise = position_noise(uniforms, torch.ones(200, sum(lengths), dtype=torch.bool), 16, 0.1)
    start = 0
    for length in lengths:
        block = slice(start, start + length)
        k = (noise.p_mask[:, start].double() * length).round()
        assert torch.equal(noise.masked[:, block].sum(1).double(), k)
        start += length


def test_positions_outside_the_loss_are_unmasked_after_the_choice() -> None:
    uniforms = draw(0, list(range(500)), 0, numbers_needed(16, 16))
    everywhere = position_noise(uniforms, torch.ones(500, 16, dtype=torch.bool), 16, 0.1)
    in_loss = torch.ones(500, 16, dtype=torch.bool)
    in_loss[:, :6] = False
    part = position_noise(uniforms, in_loss, 16, 0.1)
    assert torch.equal(part.masked, everywhere.masked & in_loss)
    assert torch.equal(part.p_mask, everywhere.p_mask)


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_depends_on_the_sample_not_on_its_batch(kind: NoiseKind) -> None:
    in_loss, document = torch.ones(3, 32, dtype=torch.bool), torch.tensor([[0] * 16 + [1] * 16] * 3)
    numbers = numbers_needed(32, 16)
    samples = [5, 900, 17]
    together = corrupt(kind, draw(1, samples, 0, numbers), in_loss, document, 16, 0.1)
    for row, sample in enumerate(samples):
        stream = draw(1, [sample], 0, numbers)
        alone = corrupt(kind, stream, in_loss[:1], document[:1], 16, 0.1)
        assert torch.equal(alone.masked[0], together.masked[row])
    streams = [draw(*key, numbers) for key in ((1, [5], 0), (1, [6], 0), (1, [5], 1), (2, [5], 0))]
    for number, stream in enumerate(streams[1:], start=1):
        assert not torch.equal(streams[0], stream), f"stream {number} is another"


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_half_life_ratio_must_be_positive(ratio: float) -> None:
    with pytest.raises(ValueError, match="half-life ratio"):
        position_noise(torch.rand(1, 17), torch.ones(1, 16, dtype=torch.bool), 16, ratio)
