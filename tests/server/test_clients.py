"""The `openai` package against `vllm serve`: sync, async, streamed, all three APIs."""

import asyncio
from itertools import accumulate, chain
from typing import Any

import httpx
import pytest
import vllm
from openai import BadRequestError
from oracle import OracleResult
from serving import MAX_MODEL_LEN, NAME, RandomServer, Server, random_tokenizer

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"
TEXT_IDS = TOKENIZER.encode(TEXT)
MESSAGES = [{"role": "user", "content": TEXT}]
WITH_USAGE = {"include_usage": True, "continuous_usage_stats": True}


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


def complete(server: Server, **options: Any) -> Any:
    """A greedy completion of `TEXT`; options that only vLLM has go into the body as they are."""
    body = {"ignore_eos": True, "return_token_ids": True} | options.pop("extra_body", {})
    request = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 50} | options
    return server.client.completions.create(**request, extra_body=body)


@pytest.fixture(scope="module")
def expected(server: RandomServer) -> OracleResult:
    """What `complete` must yield."""
    return server.expected(TEXT_IDS, 50, ignore_eos=True)


def test_async_clients_share_the_server(server: RandomServer) -> None:
    prompts = [TEXT[:length] for length in (3, 8, 17, 20, 30, 41)]

    async def ask_all() -> list[str]:
        async with server.async_client as client:
            asked = [
                client.completions.create(model=NAME, prompt=p, max_tokens=30, temperature=0)
                for p in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    wanted = [text_of(server.expected(TOKENIZER.encode(p), 30).token_ids) for p in prompts]
    assert asyncio.run(ask_all()) == wanted


def test_async_stream(server: RandomServer, expected: OracleResult) -> None:
    async def ask() -> str:
        async with server.async_client as client:
            request = {"model": NAME, "prompt": TEXT, "max_tokens": 50, "temperature": 0}
            body = {"ignore_eos": True}
            stream = await client.completions.create(**request, stream=True, extra_body=body)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == text_of(expected.token_ids)


def test_deltas_are_the_newly_known_runs(server: RandomServer, expected: OracleResult) -> None:
    """A slow client may get several runs at once, but never a part of one."""
    chunks = list(complete(server, stream=True))
    deltas = [chunk.choices[0].token_ids or [] for chunk in chunks]
    assert list(chain(*deltas)) == expected.token_ids
    ends = set(accumulate(len(run) for run in expected.emitted))
    assert set(accumulate(len(delta) for delta in deltas if delta)) <= ends
    assert max(len(delta) for delta in deltas) > 1
    assert [text_of(delta) for delta in deltas] == [chunk.choices[0].text for chunk in chunks]


def test_usage_counts_the_tokens_streamed_so_far(server: RandomServer) -> None:
    *chunks, last = complete(server, stream=True, stream_options=WITH_USAGE)
    so_far = accumulate(len(chunk.choices[0].token_ids or []) for chunk in chunks)
    assert [chunk.usage.completion_tokens for chunk in chunks] == list(so_far)
    assert last.choices == []
    assert last.usage.completion_tokens == 50
    assert last.usage.prompt_tokens == len(TEXT_IDS)
    assert last.usage.total_tokens == 50 + len(TEXT_IDS)


def test_stream_without_options_has_no_usage(server: RandomServer) -> None:
    assert all(chunk.usage is None for chunk in complete(server, stream=True))


def test_forwards_are_told_with_the_usage(server: RandomServer, expected: OracleResult) -> None:
    whole = complete(server)
    *_, last = complete(server, stream=True, stream_options={"include_usage": True})
    for answer in (whole, last):
        told = answer.metrics["speculative_decoding"]["num_spec_steps"]
        assert told == sum(expected.denoise_steps)


def test_chat_usage_streamed(server: RandomServer) -> None:
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = server.client.chat.completions.create(**request)
    stream = server.client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    assert list(stream)[-1].usage == whole.usage


def test_responses(server: RandomServer) -> None:
    """The responses API gives the chat's answer, whole and in events."""
    request = {"model": NAME, "max_output_tokens": 40, "temperature": 0}
    chat = server.client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=40, temperature=0
    )
    whole = server.client.responses.create(**request, input=TEXT)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    events = list(server.client.responses.create(**request, input=MESSAGES, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert 1 < len(deltas) < whole.usage.output_tokens
    assert events[-1].response.status == whole.status
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_echo(server: RandomServer, expected: OracleResult) -> None:
    """The prompt's text comes first; vLLM leaves it out beside token ids."""
    text, body = text_of(expected.token_ids), {"return_token_ids": False}
    assert complete(server, echo=True, extra_body=body).choices[0].text == TEXT + text
    assert complete(server, echo=True, max_tokens=0, extra_body=body).choices[0].text == TEXT
    stream = complete(server, echo=True, stream=True, extra_body=body)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT + text


def test_several_prompts(server: RandomServer, expected: OracleResult) -> None:
    """Each prompt has its own choice, whole and streamed."""
    other = TEXT[:20]
    alone = server.expected(TOKENIZER.encode(other), 50, ignore_eos=True)
    wanted = {0: expected.token_ids, 1: alone.token_ids}
    answer = complete(server, prompt=[TEXT, other])
    assert {choice.index: choice.token_ids for choice in answer.choices} == wanted
    assert answer.usage.completion_tokens == 2 * 50
    assert streamed(complete(server, prompt=[TEXT, other], stream=True)) == wanted


def streamed(stream: Any) -> dict[int, list[int]]:
    """Token ids of each choice of a stream."""
    token_ids: dict[int, list[int]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            token_ids.setdefault(choice.index, []).extend(choice.token_ids or [])
    return token_ids


def test_suffix_is_refused_and_best_of_unknown(
    server: RandomServer, expected: OracleResult
) -> None:
    """As vLLM has it for models without infilling, and for every model."""
    with pytest.raises(BadRequestError, match="suffix is only supported"):
        complete(server, suffix="?")
    assert complete(server, best_of=2).choices[0].token_ids == expected.token_ids


def border(expected: OracleResult) -> int:
    """Output position at which a block begins, such that the characters about it are new."""
    text = text_of(expected.token_ids)
    first = -len(TEXT_IDS) % 8
    return next(i for i in range(first, 50, 8) if i and text.index(text[i - 1 : i + 1]) == i - 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_a_block_border(
    server: RandomServer, expected: OracleResult, include: bool, stream: bool
) -> None:
    text, at = text_of(expected.token_ids), border(expected)
    answer = complete(
        server,
        stop=["?never?", text[at - 1 : at + 1]],
        stream=stream,
        extra_body={"include_stop_str_in_output": include},
    )
    chunks = list(answer) if stream else [answer]
    got = "".join(chunk.choices[0].text for chunk in chunks)
    assert got == text[: at + 1 if include else at - 1]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == text[at - 1 : at + 1]


def test_stop_token_id(server: RandomServer, expected: OracleResult) -> None:
    """A stop token inside a block ends the answer; what was revealed after it is not sent."""
    at = next(i for i, token in enumerate(expected.token_ids) if i > 9 and (i + 1) % 8)
    stop = expected.token_ids[at]
    first = expected.token_ids.index(stop)
    answer = complete(server, extra_body={"stop_token_ids": [stop]})
    assert answer.choices[0].token_ids == expected.token_ids[: first + 1]
    assert answer.choices[0].text == text_of(expected.token_ids[:first])
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)
    assert answer.usage.completion_tokens == first + 1


def test_tokenize_and_detokenize(server: RandomServer) -> None:
    """Of a prompt and of a chat; the endpoints lie beside /v1."""
    told = server.post("/tokenize", {"prompt": TEXT}).json()
    assert (told["tokens"], told["max_model_len"]) == (TEXT_IDS, MAX_MODEL_LEN)
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    template = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert chat == template["input_ids"]
    assert server.post("/detokenize", {"tokens": TEXT_IDS}).json()["prompt"] == TEXT


def test_models_health_version(server: RandomServer) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.max_model_len) == (NAME, MAX_MODEL_LEN)
    assert httpx.get(f"{server.address}/health").status_code == 200
    assert httpx.get(f"{server.address}/version").json() == {"version": vllm.__version__}
    assert httpx.get(f"{server.address}/ping").status_code == 200


def test_metrics_tell_of_requests_and_diffusion(server: RandomServer) -> None:
    names = ["vllm:generation_tokens_total", "vllm:diffusion_num_committed_tokens_total"]
    before = [server.counter(name) for name in names]
    complete(server)
    generated, committed = (
        server.counter(name) - old for name, old in zip(names, before, strict=True)
    )
    assert generated == 50
    assert committed >= 50
