"""No request reaches another's text, seed or parameters, nor keeps another from its own."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from checkpoints import EOS_ID, LETTERS, VOCABULARY, VOCABULARY_SIZE
from oracle_sampling import Sampling
from serving import MAX_MODEL_LEN, NAME, RandomServer, random_tokenizer

TEXT = "Ann has 12 apples and eats 5. Ben has 7 pears. Who has the most of them all?"
IDS = random_tokenizer().encode(TEXT)
# As many as the server runs at once.
SLOTS = 8
HITS = "vllm:prefix_cache_hits_total"
QUERIES = "vllm:prefix_cache_queries_total"
# More than a KV page.
LONG_PROMPT = (IDS * 4)[:200]

# Everything that leaves a mark in a slot.
LOUD: dict[str, Any] = {
    "temperature": 1.5,
    "seed": 9,
    "top_k": 5,
    "top_p": 0.8,
    "min_p": 0.1,
    "repetition_penalty": 1.9,
    "frequency_penalty": 1.0,
    "presence_penalty": 1.0,
    "logit_bias": {str(VOCABULARY.index("q")): 9.0},
    "allowed_token_ids": list(range(60, 150)),
    "min_tokens": 9,
    "bad_words": ["b", "ab"],
    "vllm_xargs": {"diffusion_reveal": "prefix", "diffusion_canvas_length": 3},
}


def body(**changes: Any) -> dict[str, Any]:
    plain = {
        "prompt": IDS,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return plain | changes


def answer(server: RandomServer, **changes: Any) -> list[int]:
    """The tokens of one request."""
    response = server.post("/v1/completions", body(**changes))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["token_ids"]


def answers(server: RandomServer, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens of requests that are sent at once."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda changes: answer(server, **changes), requests))


def leave(server: RandomServer, prompt: list[int], **changes: Any) -> None:
    """Read the first event of a long stream, and go."""
    request = {"model": NAME, "prompt": prompt, "max_tokens": 150, "stream": True}
    more = {"ignore_eos": True} | changes
    with server.client.completions.create(**request, extra_body=more) as events:
        next(iter(events))


@pytest.mark.parametrize("leaving", [False, True])
def test_a_slot_forgets_who_had_it(server: RandomServer, leaving: bool) -> None:
    """As many requests with every parameter as there are slots, then as many without any."""
    prompts = [IDS[i:] for i in range(SLOTS)]
    expected = [server.expected(prompt, 40, ignore_eos=True).token_ids for prompt in prompts]
    for _ in range(2):
        with ThreadPoolExecutor(SLOTS) as pool:
            visit = leave if leaving else answer
            list(pool.map(lambda prompt, v=visit: v(server, **LOUD | {"prompt": prompt}), prompts))
        assert answers(server, [{"prompt": prompt} for prompt in prompts]) == expected


def cached_tokens(server: RandomServer, expected: list[int], **changes: Any) -> float:
    """Tokens of `LONG_PROMPT` that a request finds in the cache; its answer is the right one."""
    hits, queries = server.counter(HITS), server.counter(QUERIES)
    assert answer(server, prompt=LONG_PROMPT, **changes) == expected
    deadline = time.monotonic() + 60
    while server.counter(QUERIES) < queries + len(LONG_PROMPT):
        assert time.monotonic() < deadline, "the metrics do not tell of the request"
        time.sleep(0.05)
    return server.counter(HITS) - hits


def test_a_salt_keeps_prefixes_apart(server: RandomServer) -> None:
    """Of one prompt, who knows another salt, or none, finds nothing."""
    expected = server.expected(LONG_PROMPT, 40, ignore_eos=True).token_ids
    assert cached_tokens(server, expected, cache_salt="first") == 0
    page = cached_tokens(server, expected, cache_salt="first")
    assert page > 0
    assert cached_tokens(server, expected, cache_salt="second") == 0
    assert cached_tokens(server, expected) == 0
    for salt in ("first", "second", None):
        changes = {} if salt is None else {"cache_salt": salt}
        assert cached_tokens(server, expected, **changes) == page


def test_seeds_of_neighbours(server: RandomServer) -> None:
    """A seeded answer is the same beside equal seeds, other seeds and none."""
    hot = {"temperature": 1.0}
    expected = {
        seed: server.expected(
            IDS, 40, ignore_eos=True, sampling=Sampling(temperature=1.0, seed=seed)
        ).token_ids
        for seed in (1, 2)
    }
    assert expected[1] != expected[2]
    neighbours: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {}, {"seed": 1}, {}, {"seed": 2}]
    for _ in range(3):
        got = answers(server, [hot | changes for changes in neighbours])
        for changes, token_ids in zip(neighbours, got, strict=True):
            if "seed" in changes:
                assert token_ids == expected[changes["seed"]]


EVERY_TOKEN = {str(token): (-1) ** token * 100.0 for token in range(VOCABULARY_SIZE)}
DEEP: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
for _ in range(30):
    DEEP = {"type": "object", "properties": {"x": DEEP}, "required": ["x"]}
# What costs a server most, as far as it takes it. Options first: they bound a block's steps.
HEAVY: list[dict[str, Any]] = [
    *(
        {"vllm_xargs": {"diffusion_canvas_length": length, "diffusion_threshold": threshold}}
        for length in (1, 8)
        for threshold in (1e-300, 1.0)
    ),
    *({"vllm_xargs": {"diffusion_max_steps": s, "diffusion_threshold": 1.0}} for s in (1, 7, 8)),
    {"logit_bias": EVERY_TOKEN},
    {"bad_words": [a + b for a in LETTERS[33:44] for b in LETTERS[33:44]]},
    {"bad_words": ["ab" * 60] * 8},
    {"allowed_token_ids": list(range(5, VOCABULARY_SIZE - 1)), "min_tokens": 100},
    {"stop_token_ids": list(range(EOS_ID + 1, 100)), "min_tokens": 100},
    {"stop": ["a" * 10_000, *(letter * 5_000 for letter in "bcd")]},
    {"structured_outputs": {"regex": "(a?){60}(b|c|d){1,300}e{0,300}[a-z ]{200}"}},
    {"structured_outputs": {"regex": "((((a|b)*c)*d)*e)*[^x]{1,100}"}},
    {"structured_outputs": {"choice": [f"{i}" * (1 + i % 50) for i in range(1000)]}},
    {"structured_outputs": {"json": DEEP}},
    {"temperature": 2.0, "top_k": 1, "top_p": 1e-9, "min_p": 1.0, "seed": 0},
    {"repetition_penalty": 1e-30, "presence_penalty": -2.0, "frequency_penalty": -2.0},
]


def forwards(server: RandomServer, changes: dict[str, Any]) -> tuple[int, int]:
    """Forwards and tokens of one long request."""
    response = server.post("/v1/completions", body(max_tokens=100, **changes))
    assert response.status_code == 200, (changes, response.text)
    told = response.json()
    count = told["metrics"]["speculative_decoding"]["num_spec_steps"]
    return count, told["usage"]["completion_tokens"]


def most_forwards(server: RandomServer, changes: dict[str, Any], tokens: int) -> int:
    """Of a request's blocks, each with the steps that it may take."""
    options = changes.get("vllm_xargs", {})
    length = options.get("diffusion_canvas_length", server.spec.block_length)
    steps = min(length, options.get("diffusion_max_steps", length))
    return math.ceil((len(IDS) % length + tokens) / length) * steps


def test_heavy_requests_hold_nobody_up(server: RandomServer) -> None:
    """All at once, more than the server runs: each ends in bounded work, plain ones unchanged."""
    assert len(IDS) + 100 < MAX_MODEL_LEN
    prompts = [IDS[i:] for i in range(4)]
    expected = [server.expected(prompt, 40, ignore_eos=True).token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(HEAVY)) as pool:
        heavy = [pool.submit(forwards, server, changes) for changes in HEAVY]
        are_done = False
        while not are_done:  # once at least, and once after the last of them
            are_done = all(request.done() for request in heavy)
            assert answers(server, [{"prompt": prompt} for prompt in prompts]) == expected
    for changes, request in zip(HEAVY, heavy, strict=True):
        spent, tokens = request.result()
        assert 0 < spent <= most_forwards(server, changes, tokens), changes
