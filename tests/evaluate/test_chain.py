"""The left-to-right chain over any model of the next token."""

import math
from collections.abc import Sequence

import pytest
from vllm import SamplingParams

from vllm_edlm.evaluate.chain import Next, Pair, Query, chain_likelihoods

VOCABULARY = 300


def logprob(text: Sequence[int], token: int) -> float:
    """A made-up model, which depends on all of a text."""
    return -math.log(2 + (sum((i + 1) * t for i, t in enumerate(text)) + 7 * token) % 11)


def greedy(text: Sequence[int]) -> int:
    return max(range(VOCABULARY), key=lambda token: logprob(text, token))


def answers(queries: list[Query]) -> list[Next]:
    return [Next(greedy(q.text), {t: logprob(q.text, t) for t in q.tokens}) for q in queries]


def expected(context: Sequence[int], continuation: Sequence[int]) -> float:
    return sum(logprob([*context, *continuation[:i]], t) for i, t in enumerate(continuation))


def test_factors_add_up() -> None:
    pairs: list[Pair] = [([1, 2, 3], [4, 5, 6]), ([9], [1]), ([1, 2], [3, 4, 9])]
    found = chain_likelihoods(pairs, answers)
    assert [value for value, _ in found] == pytest.approx([expected(*pair) for pair in pairs])


def test_greedy_is_every_token_the_likeliest() -> None:
    context = [5, 6]
    path = list(context)
    for _ in range(3):
        path.append(greedy(path))
    wrong_at_the_end = [*path[2:4], (path[4] + 1) % VOCABULARY]
    found = chain_likelihoods([(context, path[2:]), (context, wrong_at_the_end)], answers)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_shared_beginnings_are_asked_once() -> None:
    asked: list[Query] = []

    def recorded(queries: list[Query]) -> list[Next]:
        asked.extend(queries)
        return answers(queries)

    chain_likelihoods([([1], [2, 3]), ([1], [2, 4]), ([1], [5])], recorded)
    assert asked == [Query((1,), (2, 5)), Query((1, 2), (3, 4))]


def test_many_continuations_of_one_text() -> None:
    pairs: list[Pair] = [([1, 2], [token]) for token in range(VOCABULARY)]
    found = chain_likelihoods(pairs, answers)
    assert [value for value, _ in found] == pytest.approx([expected(*pair) for pair in pairs])
    assert sum(is_greedy for _, is_greedy in found) == 1


def test_a_query_asks_for_one_token_left_to_right() -> None:
    params = Query((1, 2), (7, 9)).params()
    assert isinstance(params, SamplingParams)
    assert (params.max_tokens, params.temperature) == (1, 0)
    assert params.logprob_token_ids == [7, 9]
    assert params.extra_args == {"diffusion_reveal": "prefix"}


def test_an_empty_continuation_is_certain() -> None:
    assert chain_likelihoods([([1, 2], [])], answers) == [(0, True)]
