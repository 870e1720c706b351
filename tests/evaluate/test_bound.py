"""The likelihood bound against sums over all masks, each token by the oracle's dense forward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import comb, sqrt

import pytest
import torch
from checkpoints import MASK_ID, CheckpointFactory, CheckpointSpec
from oracle import Blocks
from oracle_model import OracleModel

from vllm_edlm.evaluate.bound import Bound, draw_masks, text_row
from vllm_edlm.options import Options

B = 4
OPTIONS = Options(B, B, "confidence", 0.9, MASK_ID, "block_causal")
# (context, continuation) lengths: within a block, to its end, over several blocks.
LENGTHS = [(5, 3), (4, 2), (4, 4), (6, 7), (1, 10)]


@dataclass(frozen=True)
class Models:
    """The same weights in the bound's model and in the oracle's."""

    bound: Bound
    oracle: OracleModel
    options: Options

    def logprobs(self, tokens: Sequence[int], masked: Sequence[int]) -> dict[int, float]:
        """Log-probability of the tokens at `masked` positions, those behind the text masked."""
        length = -(-len(tokens) // B) * B
        inputs = torch.tensor([*tokens, *[MASK_ID] * (length - len(tokens))])
        inputs[list(masked)] = MASK_ID
        mask = Blocks(B, self.options.prompt_attention, len(tokens)).mask(length)
        logits = self.oracle.logits(inputs, mask).log_softmax(-1)
        if self.options.token_shift:
            logits = logits.roll(1, dims=0)
        return {position: logits[position, tokens[position]].item() for position in masked}

    def draws(self, tokens: Sequence[int], scored: range) -> list[list[tuple[float, float]]]:
        """For each block every set of masks: its probability, and what the estimate is for it."""
        return [list(self._block_draws(tokens, block)) for block in blocks_of(scored)]

    def _block_draws(self, tokens: Sequence[int], block: range) -> Iterator[tuple[float, float]]:
        before = tokens[: block.stop]
        n = len(block)
        for k in range(1, n + 1):
            for masked in combinations(block, k):
                value = n / k * sum(self.logprobs(before, masked).values())
                yield 1 / (n * comb(n, k)), value


def blocks_of(scored: range) -> list[range]:
    """The scored positions of each block."""
    borders = [scored.start, *(p for p in scored[1:] if p % B == 0), scored.stop]
    return [range(start, stop) for start, stop in pairwise(borders)]


def text(context: int, continuation: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(100 * context + continuation)
    tokens = torch.randint(5, 150, (context + continuation,), generator=generator).tolist()
    return tokens[:context], tokens[context:]


@pytest.fixture(scope="module", params=["encoder", "plain", "token shift", "causal_grid"])
def models(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> Models:
    layout = "plain" if request.param == "plain" else "encoder"
    options = replace(OPTIONS, token_shift=request.param == "token shift")
    if request.param == "causal_grid":
        options = replace(options, prompt_attention=request.param)
    path = checkpoint(CheckpointSpec(layout=layout, block_length=B, seed=3))
    bound = Bound.load(str(path), options, torch.float32, samples=32, seed=0)
    return Models(bound, OracleModel.load(path), options)


@pytest.mark.parametrize("context", [1, 3, 4, 6, 11])
def test_of_one_token_it_is_the_conditional(models: Models, context: int) -> None:
    tokens, (token,) = text(context, 1)
    value, is_greedy = models.bound.likelihood(tokens, [token])
    expected = models.logprobs([*tokens, token], [context])
    assert value == pytest.approx(expected[context], abs=1e-4)
    assert not is_greedy


@pytest.mark.parametrize(("context", "continuation"), LENGTHS)
def test_every_conditional_is_the_oracles(models: Models, context: int, continuation: int) -> None:
    """All masks of each block, the other blocks clean, in one forward."""
    tokens = text(context, continuation)
    row = text_row(*tokens, models.bound.objective)
    joined = [*tokens[0], *tokens[1]]
    masks = [
        set(masked)
        for block in blocks_of(range(context, context + continuation))
        for k in range(1, len(block) + 1)
        for masked in combinations(block, k)
    ]
    positions = range(row["tokens"].shape[1])
    masked = torch.tensor([[p in mask for p in positions] for mask in masks])
    found, _ = models.bound.conditionals(row, masked)
    expected = []
    for mask in masks:
        end = -(-(max(mask) + 1) // B) * B
        expected += models.logprobs(joined[:end], sorted(mask)).values()
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("context", "continuation"), LENGTHS)
def test_its_mean_is_the_sum_over_all_masks(
    models: Models, context: int, continuation: int
) -> None:
    tokens = text(context, continuation)
    joined = [*tokens[0], *tokens[1]]
    draws = models.draws(joined, range(context, len(joined)))
    means = [sum(p * value for p, value in block) for block in draws]
    variances = [
        sum(p * (value - mean) ** 2 for p, value in block)
        for block, mean in zip(draws, means, strict=True)
    ]
    samples = 1200
    bound = Bound(models.bound.causal_lm, models.options, samples, seed=1)
    error = bound.likelihood(*tokens)[0] - sum(means)
    # Samples are spread evenly over the numbers of masks, so they scatter less than this.
    assert abs(error) < 3 * sqrt(sum(variances) / samples)


def test_equal_seeds_give_equal_bounds(models: Models) -> None:
    tokens = text(5, 6)
    bounds = [Bound(models.bound.causal_lm, models.options, 4, seed) for seed in (1, 1, 2)]
    first, again, other = (bound.likelihood(*tokens)[0] for bound in bounds)
    assert first == again != other


def test_forwards_of_few_samples_add_up(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = text(6, 7)
    whole = models.bound.likelihood(*tokens)
    monkeypatch.setattr("vllm_edlm.evaluate.bound._SAMPLES_TOKENS", 40)
    assert models.bound.likelihood(*tokens) == (pytest.approx(whole[0], abs=1e-4), whole[1])


def test_what_the_model_would_write_is_greedy(models: Models) -> None:
    context, _ = text(7, 1)
    mask = Blocks(B, models.options.prompt_attention, 7).mask(8)
    logits = models.oracle.logits(torch.tensor([*context, MASK_ID]), mask)
    logits = logits[6 if models.options.token_shift else 7]
    logits[MASK_ID] = -torch.inf
    best = int(logits.argmax())
    assert models.bound.likelihood(context, [best])[1]


def test_nothing_is_certain(models: Models) -> None:
    assert models.bound.likelihood([5, 6], []) == (0.0, True)


SCORED = torch.tensor([0, 0, 0, 0] + [0, 1, 1, 1] + [1] * 4 + [1, 0, 0, 0]).bool()


def test_masks_are_of_scored_tokens_and_at_least_one_a_block() -> None:
    masked, ratio = draw_masks(SCORED, B, 12, seed=0)
    assert not (masked & ~SCORED).any()
    counts = masked.unflatten(1, (-1, B)).sum(-1)
    shares = counts[:, 1:] / torch.tensor([3, 4, 1])
    assert torch.equal(ratio.unflatten(1, (-1, B))[:, 1:], shares[..., None].expand(-1, -1, B))
    assert counts[:, 1:].min() == 1


def test_numbers_of_masks_are_uniform() -> None:
    masked, _ = draw_masks(SCORED, B, 12, seed=5)
    counts = masked.unflatten(1, (-1, B)).sum(-1)
    assert counts[:, 1].bincount().tolist() == [0, 4, 4, 4]
    assert counts[:, 2].bincount().tolist() == [0, 3, 3, 3, 3]


def test_positions_are_masked_equally_often() -> None:
    masked, _ = draw_masks(SCORED, B, 6000, seed=2)
    shares = masked.float().mean(0)
    assert shares[5:8].tolist() == pytest.approx([2 / 3] * 3, abs=0.03)
    assert shares[8:12].tolist() == pytest.approx([5 / 8] * 4, abs=0.03)
    assert shares[12] == 1


@pytest.mark.parametrize("prompt_attention", ["bidirectional", "causal"])
def test_models_that_see_prompts_otherwise_are_refused(prompt_attention: str) -> None:
    with pytest.raises(ValueError, match=f"'block_causal' or .* got '{prompt_attention}'"):
        Bound(None, replace(OPTIONS, prompt_attention=prompt_attention))


def test_without_samples_there_is_no_bound() -> None:
    with pytest.raises(ValueError, match="bound_samples must be at least 1, got 0"):
        Bound(None, OPTIONS, samples=0)
