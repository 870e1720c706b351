"""The OpenAI API of `vllm serve`: answers, streams, refusals."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import MAX_MODEL_LEN, NAME, RandomServer, random_tokenizer

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"
MESSAGES = [{"role": "user", "content": TEXT}]


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


def chat_ids() -> list[int]:
    return TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]


def assert_serving(server: RandomServer) -> None:
    expected = server.expected(TOKENIZER.encode(TEXT), 20)
    answer = server.client.completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=20)
    assert answer.choices[0].text == text_of(expected.token_ids)


def test_completion(server: RandomServer) -> None:
    expected = server.expected(TOKENIZER.encode(TEXT), 50, ignore_eos=True)
    answer = server.client.completions.create(
        model=NAME, prompt=TEXT, temperature=0, max_tokens=50, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == text_of(expected.token_ids)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 50


def test_chat(server: RandomServer) -> None:
    expected = server.expected(chat_ids(), 40)
    answer = server.client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content == text_of(expected.token_ids)
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(chat_ids())


@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-6])
@pytest.mark.parametrize("max_steps", [2, 8])
def test_request_options(server: RandomServer, threshold: float, max_steps: int) -> None:
    prompt_ids = TOKENIZER.encode(TEXT)
    expected = server.expected(prompt_ids, 33, threshold=threshold, max_steps=max_steps)
    xargs = {"diffusion_threshold": threshold, "diffusion_max_steps": max_steps}
    answer = server.client.completions.create(
        model=NAME,
        prompt=prompt_ids,
        max_tokens=33,
        temperature=0,
        extra_body={"vllm_xargs": xargs, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == expected.token_ids


def test_stop_string(server: RandomServer) -> None:
    text = text_of(server.expected(TOKENIZER.encode(TEXT), 50, ignore_eos=True).token_ids)
    answer = server.client.completions.create(
        model=NAME,
        prompt=TEXT,
        temperature=0,
        max_tokens=50,
        stop=text[10:12],
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].text == text[: text.index(text[10:12])]
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_completion_is_the_unstreamed_one(server: RandomServer) -> None:
    expected = server.expected(TOKENIZER.encode(TEXT), 60, ignore_eos=True)
    stream = server.client.completions.create(
        model=NAME,
        prompt=TEXT,
        temperature=0,
        max_tokens=60,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    deltas = [chunk.choices[0].text for chunk in stream]
    assert "".join(deltas) == text_of(expected.token_ids)
    assert len(deltas) > 1


def test_streamed_chat_is_the_unstreamed_one(server: RandomServer) -> None:
    request = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    whole = server.client.chat.completions.create(**request)
    chunks = list(server.client.chat.completions.create(**request, stream=True))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_metrics_count_denoise_steps(server: RandomServer) -> None:
    steps = "vllm:diffusion_num_denoising_steps_total"
    before = server.counter(steps)
    expected = server.expected(TOKENIZER.encode(TEXT), 45, ignore_eos=True)
    server.client.completions.create(
        model=NAME, prompt=TEXT, temperature=0, max_tokens=45, extra_body={"ignore_eos": True}
    )
    assert server.counter(steps) - before == sum(expected.denoise_steps)


BAD_OPTIONS = [
    ({"diffusion_threshold": 0}, ("diffusion_threshold", "(0, 1]", "0")),
    ({"diffusion_threshold": 1.5}, ("diffusion_threshold", "(0, 1]", "1.5")),
    ({"diffusion_threshold": "x"}, ("diffusion_threshold", "(0, 1]", "x")),
    ({"diffusion_threshold": math.nan}, ("diffusion_threshold", "(0, 1]", "nan")),
    ({"diffusion_max_steps": 0}, ("diffusion_max_steps", "1 to 8", "0")),
    ({"diffusion_max_steps": 9}, ("diffusion_max_steps", "1 to 8", "9")),
    ({"diffusion_max_steps": "all"}, ("diffusion_max_steps", "1 to 8", "all")),
    ({"diffusion_canvas_length": 9}, ("diffusion_canvas_length", "1 to 8", "9")),
    ({"diffusion_reveal": "magic"}, ("diffusion_reveal", "confidence", "prefix", "magic")),
    ({"diffusion_treshold": 0.5}, ("diffusion_treshold",)),
]
UNSUPPORTED: list[dict[str, Any]] = [
    {"prompt_logprobs": 1},
    {"prompt_logprobs": 1, "logprobs": 1, "echo": True},
    {"thinking_token_budget": 5},
]


@pytest.mark.parametrize(("xargs", "named"), BAD_OPTIONS)
def test_bad_option_is_a_400(
    server: RandomServer, xargs: dict[str, Any], named: tuple[str]
) -> None:
    response = server.post("/v1/completions", {"prompt": TEXT, "vllm_xargs": xargs})
    assert response.status_code == 400
    assert all(part in response.json()["error"]["message"] for part in named)
    assert_serving(server)


@pytest.mark.parametrize("option", UNSUPPORTED, ids=lambda option: next(iter(option)))
def test_unsupported_parameter_is_a_400(server: RandomServer, option: dict[str, Any]) -> None:
    response = server.post("/v1/completions", {"prompt": TEXT} | option)
    assert response.status_code == 400
    assert next(iter(option)) in response.json()["error"]["message"]
    assert_serving(server)


def test_prompt_longer_than_the_context_is_a_400(server: RandomServer) -> None:
    prompt = "a" * (MAX_MODEL_LEN + 1)
    response = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert response.status_code == 400
    assert str(MAX_MODEL_LEN) in response.json()["error"]["message"]
    assert_serving(server)


def test_others_never_notice_a_bad_request(server: RandomServer) -> None:
    """Good and bad requests in flight together."""
    prompts = [TEXT[:length] for length in (3, 8, 17, 30)]
    bodies = [{"prompt": prompt, "max_tokens": 40, "temperature": 0} for prompt in prompts]
    bad = {"prompt": TEXT, "vllm_xargs": {"diffusion_threshold": 2}}
    with ThreadPoolExecutor(8) as pool:
        sent = [
            pool.submit(server.post, "/v1/completions", body)
            for good in bodies
            for body in (good, bad)
        ]
    answers = [future.result() for future in sent]
    assert [answer.status_code for answer in answers] == [200, 400] * len(prompts)
    for prompt, answer in zip(prompts, answers[::2], strict=True):
        expected = server.expected(TOKENIZER.encode(prompt), 40)
        assert answer.json()["choices"][0]["text"] == text_of(expected.token_ids)
