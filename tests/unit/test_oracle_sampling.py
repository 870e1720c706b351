"""The oracle's sampling parameters and its noise against values computed by hand."""

import math
import struct
from collections import Counter

import pytest
import torch
from oracle_noise import gumbel, murmur3, uniform
from oracle_sampling import (
    Logprob,
    Sampling,
    banned_by_words,
    candidates,
    choose,
    completed,
    logprobs,
    nucleus,
    process,
)

INF = math.inf


def processed(raw: list[float], sampling: Sampling, position: int = 3) -> list[float]:
    """After the prompt [0, 1] and the output [1, masked, masked, 2]; ids 3 and 4 are stops."""
    sequence = [0, 1, 1, None, None, 2]
    return process(torch.tensor(raw).float(), position, sequence, 2, sampling, {3, 4}).tolist()


def test_defaults_change_nothing() -> None:
    assert processed([1, -2, 3, 4, 5], Sampling()) == [1, -2, 3, 4, 5]


def test_only_allowed_ids_remain() -> None:
    got = processed([1, -2, 3, 4, 5], Sampling(allowed_token_ids=(1, 4)))
    assert got == [-INF, -2, -INF, -INF, 5]


def test_bias_is_added_and_does_not_allow() -> None:
    sampling = Sampling(logit_bias=((0, 2.5), (1, -1), (2, 100)), allowed_token_ids=(0, 1))
    assert processed([1, -2, 3, 4, 5], sampling) == [3.5, -3, -INF, -INF, -INF]


def test_stops_are_banned_before_min_tokens() -> None:
    """Position 3 would be the second output token, position 4 the third."""
    sampling = Sampling(min_tokens=2)
    assert processed([1, -2, 3, 4, 5], sampling, position=3) == [1, -2, 3, -INF, -INF]
    assert processed([1, -2, 3, 4, 5], sampling, position=4) == [1, -2, 3, 4, 5]


def test_repetition_counts_the_prompt_and_both_sides() -> None:
    got = processed([1, -2, 3, 4, -5], Sampling(repetition_penalty=2))
    assert got == [0.5, -4, 1.5, 4, -5]


def test_frequency_and_presence_count_the_output_alone() -> None:
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    assert processed([1, -2, 3, 4, 5], sampling) == [1, -2.75, 2.25, 4, 5]
    sequence = [0, 1, 1, 1, None, 2]
    got = process(torch.tensor([1.0, 1, 1]), 4, sequence, 2, sampling, ())
    assert got.tolist() == [1, -0.25, 0.25]


def test_bias_comes_before_penalties() -> None:
    """A logit that the bias makes positive is divided, not multiplied."""
    sampling = Sampling(logit_bias=((1, 3),), repetition_penalty=2)
    assert processed([1, -2, 3, 4, 5], sampling)[1] == 0.5


def test_bad_words_of_one_token_and_of_several() -> None:
    output = [1, 1, None, None, 2]
    assert banned_by_words([[4]], output, 2) == {4}
    assert banned_by_words([[1, 1, 3]], output, 2) == {3}
    assert banned_by_words([[3, 2]], output, 3) == {3}  # ends at the right
    assert banned_by_words([[1, 3, 3, 2]], output, 2) == set()  # another place is open
    assert banned_by_words([[3, 2, 0]], output, 3) == set()  # ends behind the block
    assert banned_by_words([[0, 1, 1, 3]], output, 2) == set()  # begins before all
    assert banned_by_words([[3, 2], [1, 4]], [1, None, 2], 1) == {3, 4}
    assert banned_by_words([[1, 1]], [1, None, 2], 1) == {1}


def test_bad_words_are_sought_in_the_output_alone() -> None:
    assert processed([1, -2, 3, 4, 5], Sampling(bad_words=((1, 3),))) == [1, -2, 3, -INF, 5]
    assert processed([1, -2, 3, 4, 5], Sampling(bad_words=((1, 1, 3),))) == [1, -2, 3, 4, 5]


def test_a_completed_word_is_seen_at_each_of_its_positions() -> None:
    sequence = [0, 1, 2, 3]
    assert [completed([[1, 2]], sequence, i) for i in range(4)] == [False, True, True, False]


def filtered(logits: list[float], **parameters: float) -> list[float]:
    """Logits among which is chosen; id 0 is the mask token."""
    return candidates(torch.tensor(logits).float(), 0, Sampling(**parameters)).tolist()


def test_the_mask_token_is_never_a_candidate() -> None:
    assert filtered([9, 1, 2]) == [-INF, 1, 2]
    assert filtered([9, 1, 2], temperature=2) == [-INF, 0.5, 1]


def test_greedy_requests_have_no_filters() -> None:
    assert filtered([9, 1, 2, 3], temperature=0, top_k=1, top_p=0.1, min_p=1) == [-INF, 1, 2, 3]


def test_top_k_keeps_ties() -> None:
    assert filtered([9, 1, 3, 2, 2], temperature=1, top_k=2) == [-INF, -INF, 3, 2, 2]
    assert filtered([9, 1, 3], temperature=1, top_k=7) == [-INF, 1, 3]


def test_min_p_is_relative_to_the_likeliest_after_temperature() -> None:
    """Of probabilities 8 : 4 : 1, at temperature 1/2 64 : 16 : 1."""
    logits = [9, *map(math.log, (8, 4, 1))]
    assert [x > -INF for x in filtered(logits, temperature=1, min_p=0.4)] == [0, 1, 1, 0]
    assert [x > -INF for x in filtered(logits, temperature=0.5, min_p=0.4)] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [0, 1, 0]), (0.6, [0, 1, 1]), (0.85, [1, 1, 1]), (1, [1, 1, 1])]
)
def test_nucleus_of_two_five_three_tenths(top_p: float, kept: list[int]) -> None:
    logits = nucleus(torch.tensor([0.2, 0.5, 0.3]).log(), top_p)
    assert logits.isfinite().int().tolist() == kept


def test_top_k_comes_before_top_p() -> None:
    """Of .4 .3 .3 the nucleus of .5 holds two; of the best alone it holds one."""
    logits = [9, *torch.tensor([0.4, 0.3, 0.25]).log().tolist()]
    got = filtered(logits, temperature=1, top_k=2, top_p=0.55)
    assert [x > -INF for x in got] == [0, 1, 0, 0]  # 4/7 exceeds .55, .42 does not


def test_greedy_choice_is_the_lowest_of_the_likeliest() -> None:
    assert choose(torch.tensor([1.0, 3, 3]), temperature=0, seed=None, counter=0) == 1


@pytest.mark.parametrize(("seed", "expected"), [(b"", 0x00000000), (b"test", 0xBA6BD213)])
def test_hash_of_published_vectors(seed: bytes, expected: int) -> None:
    assert murmur3(word for (word,) in struct.iter_unpack("<I", seed)) == expected


def test_noise_depends_on_each_of_its_keys() -> None:
    keys = [(1, 2, 3), (0, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (-1, 2, 3)]
    assert len({gumbel(*key) for key in keys}) == len(keys)
    assert uniform(2**32 - 1, 2, 3) != uniform(-1, 2, 3)  # the sign is a part of the seed


def test_noise_is_as_the_kernel_computes_it() -> None:
    """In fp32, by the kernel's series below 1/4 and its clamped logarithm above."""
    keys = [
        (seed, counter, token) for seed in (7, -9) for counter in (0, 99) for token in range(99)
    ]
    u = torch.tensor([uniform(*key) for key in keys])
    series = -sum(u**n / n for n in range(1, 9))
    log1p = torch.where(u < 0.25, series, (1 - u).clamp(min=2**-24).log())
    expected = -(-log1p).log()
    torch.testing.assert_close(torch.tensor([gumbel(*key) for key in keys]), expected)


def test_sampled_frequencies_are_the_probabilities() -> None:
    probability = torch.tensor([0.1, 0.2, 0.0, 0.7])
    draws = Counter(choose(probability.log(), 1.0, 5, counter) for counter in range(4000))
    for token, share in enumerate(probability.tolist()):
        assert draws[token] / 4000 == pytest.approx(share, abs=0.03)
    assert draws[2] == 0


def test_noise_has_the_mean_of_a_gumbel_distribution() -> None:
    values = torch.tensor([gumbel(3, counter, 11) for counter in range(4000)])
    assert values.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert values.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.06)


def test_logprobs_and_ranks_by_hand() -> None:
    scores = torch.tensor([1.0, 2, 4, 1]).div(8).log()
    got = logprobs(scores, token=0, top=2)
    expected = {0: (1 / 8, 4), 2: (1 / 2, 1), 1: (1 / 4, 2)}  # ids 0 and 3 tie: the worse rank
    assert got == {
        token: Logprob(pytest.approx(math.log(share)), rank)
        for token, (share, rank) in expected.items()
    }
    assert logprobs(scores, token=2, top=0).keys() == {2}
