"""Bad requests beside a good one: each is told what is wrong, and the good one never notices."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checkpoints import EOS_ID, LETTERS, MASK_ID, VOCABULARY, VOCABULARY_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import NAME, RandomServer, post, random_tokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

Table = dict[str, list[Any]]

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD_BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": TEXT, "max_tokens": 4},
    CHAT: {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4},
}
# Long enough for any answer on a busy machine; none may take for ever.
TIMEOUT_SECONDS = 60
# A message is for reading.
MAX_MESSAGE_LENGTH = 10_000
MEGABYTE = 2**20
HUGE = 10**30
LONG_TEXT = "a" * 10 * MEGABYTE
OUT_OF_VOCABULARY = [-1], [VOCABULARY_SIZE], [HUGE]

NOT_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, "x", [1], {}]
NOT_POSITIVE = [*NOT_NUMBERS, -HUGE]
# Refused by name.
BAD_PARAMETERS: Table = {
    "temperature": [*NOT_POSITIVE, HUGE, -0.1, 2.1],
    "top_p": [*NOT_POSITIVE, HUGE, 0, -0.1, 1.1],
    "top_k": [*NOT_POSITIVE, HUGE, -2, 0.5],
    "min_p": [*NOT_POSITIVE, HUGE, -0.1, 1.1],
    "presence_penalty": [*NOT_POSITIVE, HUGE, -2.1, 2.1],
    "frequency_penalty": [*NOT_POSITIVE, HUGE, -2.1, 2.1],
    "repetition_penalty": [*NOT_POSITIVE, 0],
    "seed": [*NOT_POSITIVE, HUGE, 2**63, 0.5],
    "n": [*NOT_POSITIVE, HUGE, 0, -1, 10**6, 1.5],
    "max_tokens": [*NOT_POSITIVE, HUGE, -1, 1.5],
    "min_tokens": [*NOT_POSITIVE, HUGE, -1, 5, 1.5],
    "stop": [5, [5], [""], {}, ["a"] * 10_000],
    "stop_token_ids": [5, "x", ["x"], [1.5], *OUT_OF_VOCABULARY],
    "logit_bias": [5, "x", [1], {"x": 1}, {"-1": 1}, {str(VOCABULARY_SIZE): 1}, {"7": "x"}],
    "bad_words": [5, "x", [5], [""], ["ab" * 1000], [f"{i}" for i in range(1000)]],
    "allowed_token_ids": [5, "x", ["x"], [], *OUT_OF_VOCABULARY],
    "prompt_logprobs": [*NOT_POSITIVE, HUGE, -2, 1],
    "response_format": [5, "x", {}, {"type": "x"}, {"type": "json_schema"}],
    "stream": ["x", 5, []],
    "stream_options": [5, {"include_usage": True}],
    "kv_transfer_params": [5, {"x": 1}],
    "priority": [HUGE, "x"],
    "cache_salt": [5, "", "a" * 5000],
    "truncate_prompt_tokens": [-2, HUGE, "x"],
    "vllm_xargs": [5, "x", [1], {"x": None}, {"x": {"y": 1}}],
}
BAD_OPTIONS: Table = {
    "diffusion_threshold": [*NOT_NUMBERS, 0, -0.1, 1.1, "0.5"],
    "diffusion_max_steps": [*NOT_NUMBERS, 0, -1, 9, 1.5, "2"],
    "diffusion_canvas_length": [*NOT_NUMBERS, 0, -1, 9, 1.5, "2"],
    "diffusion_reveal": [*NOT_NUMBERS, "", "Confidence", 0, LONG_TEXT],
    "diffusion_treshold": [0.5],
}
# Refused in vLLM's own words.
BAD_CONTENTS: Table = {
    "model": ["another", 5],
    "structured_outputs": [
        *({}, {"regex": "["}, {"regex": 5}, {"json": "{"}, {"json": {"type": 5}}),
        *({"grammar": "no grammar ::"}, {"choice": []}, {"regex": "a", "choice": ["a"]}),
    ],
    "vllm_xargs": [{"": 1}, {LONG_TEXT: 1}, *({option: HUGE} for option in BAD_OPTIONS)],
}
BAD_PROMPTS: Table = {
    "prompt": [
        *(None, "", [], {}, 5, [1.5], [[]], [[[1]]], [None], *OUT_OF_VOCABULARY),
        *(LONG_TEXT, [7] * MEGABYTE, ["a"] * MEGABYTE),
    ],
    "logprobs": [*NOT_POSITIVE, HUGE, -2, 1025],
}
BAD_CHATS: Table = {
    "messages": [
        *(None, [], {}, "x", 5, [5], [{}], [{"role": "user", "content": 5}]),
        [{"role": "user", "content": LONG_TEXT}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "x"}]}],
    ],
    "logprobs": ["x", 5, []],
    "top_logprobs": [*NOT_POSITIVE, HUGE, -2, 1],
    "tools": [5, "x", [5], [{}], [{"type": "function", "function": {}}]],
    "tool_choice": ["x", 5, "required", {"type": "function", "function": {"name": "x"}}],
    "chat_template": [5, "{{"],
}
BAD_JSON = [
    *(b"", b"{", b"null", b"5", b"[]", b'"x"', b"\xff\xfe", b"\0" * 100, b"{'prompt': 'x'}"),
    *(b"[" * 100_000, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}",
    b'{"prompt": "x", "vllm_xargs": {"x": ' + b'{"x":' * 500 + b"1" + b"}" * 502,
]
EVERY_TOKEN = list(range(VOCABULARY_SIZE))
# What vLLM takes, though it may leave no token to choose, or logits that are no numbers.
EXTREMES: list[dict[str, Any]] = [
    {"allowed_token_ids": [MASK_ID]},
    {"allowed_token_ids": [EOS_ID], "min_tokens": 4},
    {"allowed_token_ids": [VOCABULARY.index("a")], "bad_words": ["a"]},
    {"bad_words": LETTERS[1:96]},
    {"bad_words": ["a" * 500, "ab" * 250]},
    {"stop_token_ids": EVERY_TOKEN[:100], "min_tokens": 4},
    {"logit_bias": dict.fromkeys(map(str, EVERY_TOKEN), math.nan)},
    {"logit_bias": dict.fromkeys(map(str, EVERY_TOKEN), -HUGE)},
    {"logit_bias": {str(MASK_ID): HUGE}},
    {"temperature": 1e-30, "top_k": 2**63 - 1},
    {"temperature": 2, "top_p": 1e-30, "min_p": 1, "top_k": VOCABULARY_SIZE, "seed": -(2**63)},
    {"repetition_penalty": 1e300},
    {"repetition_penalty": 1e-300, "presence_penalty": -2, "frequency_penalty": -2},
    {"stop": ["\0", "a" * 100_000]},
    {"n": 20, "temperature": 1},
    {"vllm_xargs": {"diffusion_threshold": 1e-300}},
    {"user": LONG_TEXT, "no_such_key": LONG_TEXT},
]


def good_stream(server: RandomServer) -> list[int]:
    stream = server.client.completions.create(
        model=NAME,
        prompt=TEXT,
        temperature=0,
        max_tokens=40,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return [token for chunk in stream for token in chunk.choices[0].token_ids]


@pytest.fixture(scope="module")
def expected(server: RandomServer) -> list[int]:
    """The tokens of the good request."""
    return server.expected(TOKENIZER.encode(TEXT), 40, ignore_eos=True).token_ids


def send(
    server: RandomServer, expected: list[int], path: str, bodies: list[Any]
) -> list[httpx.Response]:
    """Answers to `bodies`, while the good request streams what it should."""
    named = [body if isinstance(body, bytes) else {"model": NAME} | body for body in bodies]
    with (
        httpx.Client(base_url=server.address, timeout=TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        stream = pool.submit(good_stream, server)
        answers = list(pool.map(lambda body: post(client, path, body), named))
    assert stream.result() == expected
    return answers


def spoilt(path: str, table: Table) -> list[tuple[str, dict[str, Any]]]:
    """Good bodies, each with one bad value, and that value's key."""
    good = GOOD_BODIES[path]
    return [(key, good | {key: value}) for key, values in table.items() for value in values]


def complaint(answer: httpx.Response) -> str:
    """What a refusal says, with the parameter it names."""
    assert 400 <= answer.status_code < 500, answer.text[:MAX_MESSAGE_LENGTH]
    error = answer.json()["error"]
    assert 0 < len(error["message"]) <= MAX_MESSAGE_LENGTH
    assert "Traceback" not in error["message"]
    return f"{error['message']} ({error['param']})"


paths = pytest.mark.parametrize("path", GOOD_BODIES)


@paths
def test_bad_parameter_is_named(server: RandomServer, expected: list[int], path: str) -> None:
    keys, bodies = zip(*spoilt(path, BAD_PARAMETERS), strict=True)
    for key, answer in zip(keys, send(server, expected, path, bodies), strict=True):
        assert key in complaint(answer)


@paths
def test_bad_option_is_named(server: RandomServer, expected: list[int], path: str) -> None:
    cases = [(key, value) for key, values in BAD_OPTIONS.items() for value in values]
    bodies = [GOOD_BODIES[path] | {"vllm_xargs": {key: value}} for key, value in cases]
    for (key, _), answer in zip(cases, send(server, expected, path, bodies), strict=True):
        assert key in complaint(answer)


@paths
def test_bad_content_is_refused(server: RandomServer, expected: list[int], path: str) -> None:
    table = BAD_CONTENTS | (BAD_PROMPTS if path == COMPLETIONS else BAD_CHATS)
    for answer in send(server, expected, path, [body for _, body in spoilt(path, table)]):
        assert complaint(answer)


@paths
def test_bad_json_is_refused(server: RandomServer, expected: list[int], path: str) -> None:
    for answer in send(server, expected, path, BAD_JSON):
        assert answer.status_code == 400
        assert 0 < len(answer.text) <= MAX_MESSAGE_LENGTH


@paths
def test_extremes_are_answered(server: RandomServer, expected: list[int], path: str) -> None:
    bodies = [GOOD_BODIES[path] | extreme for extreme in EXTREMES]
    for extreme, answer in zip(EXTREMES, send(server, expected, path, bodies), strict=True):
        assert answer.status_code in (200, 400), (str(extreme)[:200], answer.text[:1000])
        assert answer.json()


def anything(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with some of vLLM's fields and the plugin's options replaced by any JSON."""
    # vLLM answers 500 to a few integers that 64 bits do not hold.
    numbers = st.integers(-3, 3) | st.sampled_from([2**31, 2**53 + 1, -(2**63), 2**63, 2**64 - 1])
    plain = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=5)
    values = st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    )
    model = CompletionRequest if path == COMPLETIONS else ChatCompletionRequest
    # Nor is vLLM ready for `structured_outputs` that are no object.
    fields = [name for name in model.model_fields if name != "structured_outputs"]
    changes = st.dictionaries(st.sampled_from(fields), values, max_size=2)
    options = st.dictionaries(st.sampled_from([*BAD_OPTIONS]), plain, max_size=2)
    good = GOOD_BODIES[path]
    return st.builds(lambda xargs, other: good | {"vllm_xargs": xargs} | other, options, changes)


@paths
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_anything_is_answered(
    server: RandomServer, expected: list[int], path: str, data: st.DataObject
) -> None:
    bodies = data.draw(st.lists(anything(path), min_size=4, max_size=8))
    for body, answer in zip(bodies, send(server, expected, path, bodies), strict=True):
        # A stream has begun with 200 when something goes wrong.
        assert "InternalServerError" not in answer.text, body
        assert answer.status_code == 200 or complaint(answer), body
