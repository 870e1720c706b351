"""The CPU twins that draw tokens: temperature, min-p and Gumbel noise.

Each reference takes the arguments of its kernel and goes token by token, in Python's own
integers and float64, as the Triton source says.
"""

import math

import numpy as np
import pytest
import torch

from tests.unit.kernel_comparison import assert_same, install_twins
from vllm_edlm.compat.cpu_kernels import gumbel, logits

SEEDS = range(10)
ROWS, SLOTS, VOCABULARY, GROUP = 7, 4, 70, 16
WORD = 2**32 - 1
HARD_SEEDS = torch.tensor([0, -5, 2**62 + 3, -(2**63)])


@pytest.fixture(scope="module")
def installed() -> None:
    install_twins()


def draw_logits(rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[ROWS, VOCABULARY] rows of a wider tensor, with some tokens banned already."""
    wide = torch.tensor(3 * rng.standard_normal((ROWS, VOCABULARY + 5)), dtype=dtype)
    wide[torch.tensor(rng.random(wide.shape) < 0.1)] = -torch.inf
    return wide[:, :VOCABULARY]


def draw_slots(rng: np.random.Generator) -> torch.Tensor:
    return torch.tensor(rng.integers(0, SLOTS, ROWS), dtype=torch.int32)


def divide(scores, _1, slots, temperatures, vocab_size, **_):
    for row, slot in enumerate(slots.tolist()):
        t = temperatures[slot]
        if t not in (0.0, 1.0):
            for i in range(vocab_size):
                scores[row, i] = scores[row, i].float() / t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_temperature(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    temperatures = torch.tensor(rng.choice([0.0, 1.0, 0.3, 1.7], SLOTS), dtype=torch.float32)
    args = (draw_logits(rng, dtype), VOCABULARY + 5, draw_slots(rng), temperatures, VOCABULARY)
    assert_same(logits.temperature, divide, *args, BLOCK_SIZE=8192)


def ban_unlikely(scores, _1, slots, min_ps, vocab_size, **_):
    for row, slot in enumerate(slots.tolist()):
        if min_ps[slot] == 0:
            continue
        floor = scores[row].max().float() + min_ps[slot].log()
        for i in range(vocab_size):
            if scores[row, i].float() < floor:
                scores[row, i] = -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_min_p(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    min_ps = torch.tensor(rng.choice([0.0, 0.02, 0.4, 1.0], SLOTS), dtype=torch.float32)
    args = (draw_logits(rng, dtype), VOCABULARY + 5, draw_slots(rng), min_ps, VOCABULARY)
    assert_same(logits.min_p, ban_unlikely, *args, BLOCK_SIZE=1024)


def rotl(word: int, left: int) -> int:
    return ((word << left) | (word >> (32 - left))) & WORD


def murmur3(seed: int, pos: int, token: int, domain: int = 0) -> int:
    h = domain
    for key in (seed & WORD, (seed >> 32) & WORD, pos & WORD, token):
        key = rotl(key * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        h = (rotl(h ^ key, 13) * 5 + 0xE6546B64) & WORD
    h ^= 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B & WORD
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & WORD
    return h ^ (h >> 16)


def noise32(seed: int, pos: int, token: int) -> float:
    u = float(np.float32((murmur3(seed, pos, token) + 0.5) / 2**32))
    if u < 0.25:
        return -math.log(sum(u**degree / degree for degree in range(1, 9)))
    return -math.log(-math.log(max(1 - u, 2**-24)))


def noise64(seed: int, pos: int, token: int) -> float:
    high = murmur3(seed, pos, token, 0x9E3779B9)
    bits = (high << 32 | murmur3(seed, pos, token)) >> 11
    return -math.log(-math.log((bits + 0.5) / 2**53))


def sample(
    winners, _1, values, _2, *rest, BLOCK_SIZE, IS_DRAFTING, APPLY_TEMPERATURE, USE_FP64, **_
):
    scores, _3, slots, seeds, pos, temperature, vocab_size = rest[6:]
    noise = noise64 if USE_FP64 else noise32
    for row, slot in enumerate(slots.tolist()):
        t = float(temperature[slot]) if slot >= 0 else 0.0
        place = int(pos[row]) + (2**30 if IS_DRAFTING else 0)
        for group in range(winners.shape[1]):
            best = -1, -math.inf
            for i in range(group * BLOCK_SIZE, min((group + 1) * BLOCK_SIZE, vocab_size)):
                value = float(scores[row, i])
                if t != 0:
                    value = value / t if APPLY_TEMPERATURE else value
                    value += noise(int(seeds[slot]), place, i)
                best = (i, value) if value > best[1] or best[0] < 0 else best
            winners[row, group], values[row, group] = best


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fp64", [False, True])
@pytest.mark.parametrize("few", [False, True], ids=["dense", "filtered"])
@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel_sample(
    seed: int, few: bool, fp64: bool, scaled: bool, drafting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gumbel, "TILE_ENTRIES", 3 * GROUP)  # tiles within rows, and a ragged last
    rng = np.random.default_rng(seed)
    scores = draw_logits(rng)
    if few:
        scores[torch.tensor(rng.random(scores.shape) < 0.9)] = -torch.inf
    slots = torch.tensor(rng.integers(-1, SLOTS, ROWS), dtype=torch.int32)
    groups = -(-VOCABULARY // GROUP)
    value_type = torch.float64 if fp64 else torch.float32
    args = (
        *(torch.full((ROWS, groups), 99), groups),
        *(torch.full((ROWS, groups), 99, dtype=value_type), groups),
        *(None, 0, 0, None, None, 0),
        *(scores, VOCABULARY + 5, slots, HARD_SEEDS),
        torch.tensor(rng.integers(0, 2**33, ROWS)),
        *(torch.tensor([0.0, 0.5, 1.0, 1.3]), VOCABULARY),
    )
    assert_same(
        gumbel.gumbel_sample,
        sample,
        *args,
        tolerance=1e-5,
        BLOCK_SIZE=GROUP,
        IS_DRAFTING=drafting,
        APPLY_TEMPERATURE=scaled,
        USE_FP64=fp64,
        PER_TOKEN_COL=False,
    )


def test_noise_at_the_ends_of_the_uniform() -> None:
    bits = np.array([0, 1, 2**30 - 1, 2**30, 2**32 - 1], np.uint32)
    u = gumbel._uniform32(bits)
    assert u.tolist() == [float(np.float32((int(b) + 0.5) / 2**32)) for b in bits]
    assert np.isfinite(np.log(-gumbel._log1p_neg(u))).all()
    full = np.array([2**32 - 1], np.uint32)
    assert gumbel._uniform64(full, full).tolist() == [1 - 2**-53]


def test_a_draft_logits_cache_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="speculative_config"):
        gumbel.gumbel_sample(*[torch.zeros(1)] * 17)


@pytest.mark.usefixtures("installed")
def test_runner_draws_follow_the_distribution() -> None:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    draws = 20_000
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = probabilities.sqrt().log().expand(draws, -1)  # temperature 0.5 squares them again
    args = (rows, torch.zeros(draws, dtype=torch.int32), torch.tensor([0.5]), torch.tensor([7]))
    for fp64 in (False, True):
        tokens = gumbel_sample(*args, torch.arange(draws), True, False, use_fp64=fp64)
        frequencies = torch.bincount(tokens, minlength=5) / draws
        assert (frequencies - probabilities).abs().max() < 0.015  # four standard deviations
        assert frequencies[4] == 0


@pytest.mark.usefixtures("installed")
def test_runner_draws_depend_on_seed_position_and_token_only() -> None:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.standard_normal((ROWS, 2500)), dtype=torch.float32)
    slots, positions = draw_slots(rng), torch.arange(ROWS)
    temperature = torch.tensor([1.0, 0.7, 1.0, 2.0])

    def tokens(order: list[int]) -> list[int]:
        args = (rows[order], slots[order], temperature, HARD_SEEDS, positions[order])
        return gumbel_sample(*args, True, False).tolist()

    together = tokens(list(range(ROWS)))
    assert [tokens([row])[0] for row in range(ROWS)] == together
    assert tokens(list(range(ROWS))[::-1]) == together[::-1]
    greedy = gumbel_sample(rows, slots, torch.zeros(SLOTS), HARD_SEEDS, positions, True, False)
    assert torch.equal(greedy, rows.argmax(-1))
    assert greedy.tolist() != together


@pytest.mark.usefixtures("installed")
def test_runner_sampling_states() -> None:
    """Temperature and min-p from sampling parameters to logits, through the runner's state."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.states import SamplingStates

    states = SamplingStates(SLOTS, 3)
    states.add_request(2, SamplingParams(temperature=0.5, min_p=0.1, seed=11))
    states.add_request(0, SamplingParams(temperature=0.0))
    states.apply_staged_writes()
    rows, slots = torch.tensor([[2.0, 1.0, 0.5], [2.0, 1.0, 0.5]]), np.array([2, 0])
    states.apply_temperature(rows, torch.from_numpy(slots), slots)
    states.apply_min_p(rows, torch.from_numpy(slots), slots)
    # exp(2 - 4) is above 0.1, exp(1 - 4) is not.
    assert rows.tolist() == [[4.0, 2.0, -math.inf], [2.0, 1.0, 0.5]]
    assert states.seeds.gpu[2] == 11
