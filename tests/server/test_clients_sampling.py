"""Sampling parameters and log-probabilities as clients of the OpenAI API send and get them."""

from typing import Any

import pytest
from oracle import OracleResult
from serving import NAME, RandomServer, random_tokenizer

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"
TEXT_IDS = TOKENIZER.encode(TEXT)
MESSAGES = [{"role": "user", "content": TEXT}]
NUM_TOKENS = 40


def complete(server: RandomServer, **options: Any) -> Any:
    """A completion of `TEXT`, greedy unless told otherwise."""
    body = {"ignore_eos": True, "return_token_ids": True} | options.pop("extra_body", {})
    request = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": NUM_TOKENS}
    return server.client.completions.create(**request | options, extra_body=body)


def ids(answer: Any) -> list[list[int]]:
    return [choice.token_ids for choice in answer.choices]


@pytest.fixture(scope="module")
def expected(server: RandomServer) -> OracleResult:
    return server.expected(TEXT_IDS, NUM_TOKENS, ignore_eos=True)


def test_logprobs_of_a_completion(server: RandomServer, expected: OracleResult) -> None:
    """Of each token, from the step that revealed it: its own and the three largest."""
    choice = complete(server, logprobs=3).choices[0]
    assert choice.token_ids == expected.token_ids
    texts = TOKENIZER.convert_ids_to_tokens(expected.token_ids)
    assert choice.logprobs.tokens == texts
    assert choice.logprobs.text_offset == [sum(map(len, texts[:i])) for i in range(NUM_TOKENS)]
    for i, top in enumerate(choice.logprobs.top_logprobs):
        wanted = expected.raw_logits[i].log_softmax(-1)
        own = wanted[expected.token_ids[i]].item()
        assert choice.logprobs.token_logprobs[i] == pytest.approx(own, abs=1e-3)
        largest = wanted.topk(3)
        names = TOKENIZER.convert_ids_to_tokens(largest.indices.tolist())
        assert set(top) == {*names, texts[i]}
        assert [top[name] for name in names] == pytest.approx(largest.values.tolist(), abs=1e-3)


def test_logprobs_of_a_chat(server: RandomServer) -> None:
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    choice = server.client.chat.completions.create(
        **request, logprobs=True, top_logprobs=2
    ).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 2
        first, second = (top.logprob for top in entry.top_logprobs)
        assert first >= max(second, entry.logprob)
    alone = server.client.chat.completions.create(**request, logprobs=True).choices[0]
    assert [e.logprob for e in alone.logprobs.content] == [e.logprob for e in content]


def test_streamed_logprobs_are_the_unstreamed_ones(server: RandomServer) -> None:
    """Several tokens in a delta bring several log-probabilities."""
    whole = complete(server, logprobs=2).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in complete(server, logprobs=2, stream=True)]
    parts = [part for part in parts if part is not None]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part, name)]
        assert joined == getattr(whole, name), name
    assert max(len(part.tokens) for part in parts) > 1


def test_seeds_repeat_alone_and_in_company(server: RandomServer) -> None:
    hot = {"temperature": 1.0, "seed": 5}
    first = ids(complete(server, **hot))
    together = ids(complete(server, prompt=[TEXT[:9], TEXT, TEXT[:30]], **hot))
    assert [together[1]] == first
    assert ids(complete(server, temperature=1.0, seed=6)) != first
    assert ids(complete(server)) != first


def test_several_choices(server: RandomServer) -> None:
    """Each has a seed of its own, vLLM's: the request's and its index; streamed or not."""
    answer = complete(server, temperature=1.0, seed=5, n=3)
    alone = [ids(complete(server, temperature=1.0, seed=5 + i))[0] for i in range(3)]
    assert {choice.index: choice.token_ids for choice in answer.choices} == dict(enumerate(alone))
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert answer.usage.completion_tokens == 3 * NUM_TOKENS
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in complete(server, temperature=1.0, seed=5, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.token_ids or []
    assert streamed == dict(enumerate(alone))


def test_no_temperature_means_sampling(server: RandomServer) -> None:
    """As for any model whose checkpoint names none: temperature 1."""
    answer = complete(server, temperature=None, seed=5)
    assert ids(answer) == ids(complete(server, temperature=1.0, seed=5))


def test_min_tokens_hold_back_stop_tokens(server: RandomServer, expected: OracleResult) -> None:
    stop = expected.token_ids[3]
    body = {"stop_token_ids": [stop]}
    assert len(ids(complete(server, extra_body=body))[0]) <= 4
    (tokens,) = ids(complete(server, extra_body=body | {"min_tokens": 13}))
    assert len(tokens) >= 13
    assert stop not in tokens[:13]


def test_biases_and_bans(server: RandomServer, expected: OracleResult) -> None:
    seven, eight = TOKENIZER.convert_tokens_to_ids(["7", "8"])
    biased = complete(server, logit_bias={str(seven): 100})
    assert ids(biased) == [[seven] * NUM_TOKENS]
    (allowed,) = ids(complete(server, extra_body={"allowed_token_ids": [seven, eight]}))
    assert set(allowed) <= {seven, eight}
    frequent = max(expected.token_ids, key=expected.token_ids.count)
    word = TOKENIZER.convert_ids_to_tokens(frequent)
    (banned,) = ids(complete(server, extra_body={"bad_words": [word]}))
    assert frequent not in banned


def test_penalties_make_for_more_different_tokens(
    server: RandomServer, expected: OracleResult
) -> None:
    plain = len(set(expected.token_ids))
    for name in ("presence_penalty", "frequency_penalty"):
        assert len(set(ids(complete(server, **{name: 2.0}))[0])) > plain
    (tokens,) = ids(complete(server, extra_body={"repetition_penalty": 2.0}))
    assert len(set(tokens)) > plain


@pytest.mark.parametrize(
    "options",
    [{"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1.0}}],
    ids=["top_k", "top_p", "min_p"],
)
def test_filters_leave_the_likeliest(
    server: RandomServer, expected: OracleResult, options: dict[str, Any]
) -> None:
    (tokens,) = ids(complete(server, temperature=1.0, seed=5, **options))
    assert tokens == expected.token_ids
