"""Mixed traffic: requests whose answers are fixed, and requests that must be refused.

Nothing here depends on the model but for its block length and its context. Prompts are word
problems; every choice comes from a seed.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.convert.word_problems import Problem, problems
from examples.structured import ANSWER, SCHEMA

CHAT, COMPLETION = "chat", "completion"
RULES = ("confidence", "margin", "entropy", "factor", "prefix", "steps")
THRESHOLDS = (1.0, 0.9, 0.7, 0.5)
MAX_TOKENS = (8, 24, 48, 96)
# Of a long prompt: more than any context here holds, vLLM keeps its end.
EXAMPLES = 12

Body = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        block_length: longest canvas that a request may ask for.
        context: tokens of a prompt with its answer.
    """

    block_length: int
    context: int


@dataclass(frozen=True)
class Request:
    """One request, without how it is sent.

    Attributes:
        kind: a key of `KINDS`, or `BAD`.
        api: `CHAT` or `COMPLETION`.
        body: JSON of the request, but for the model's name and `stream`.
    """

    kind: str
    api: str
    body: Mapping[str, Any]

    @property
    def is_bad(self) -> bool:
        """Whether a 400 is its right answer."""
        return self.kind == BAD


@dataclass(frozen=True)
class Draw:
    """What the body of a request is made from."""

    rng: random.Random
    limits: Limits
    problem: Problem
    max_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", self.rng.choice(MAX_TOKENS))


def requests(seed: int, count: int, limits: Limits) -> list[Request]:
    """So many requests, each kind in turn, good ones alone."""
    rng = random.Random(seed)
    return [
        _request(list(KINDS)[i % len(KINDS)], Draw(rng, limits, problem))
        for i, problem in enumerate(problems("heldout", seed, count))
    ]


def _request(kind: str, draw: Draw) -> Request:
    api = draw.rng.choice((CHAT, COMPLETION))
    body = {"temperature": 0, "max_tokens": draw.max_tokens, "return_token_ids": True}
    changes = KINDS[kind](draw)
    prompt = changes.pop("prompt", draw.problem.question)
    return Request(kind, api, body | _asked(api, prompt) | changes)


def _asked(api: str, prompt: str) -> Body:
    if api == CHAT:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _plain(_draw: Draw) -> Body:
    return {}


def _options(draw: Draw) -> Body:
    """Rule, threshold, steps and block length, each as served by default or not."""
    rng, longest = draw.rng, draw.limits.block_length
    length = rng.choice((None, 1, longest // 4, longest // 2, longest))
    rule = rng.choice((None, *RULES))
    options = {
        "diffusion_reveal": rule,
        "diffusion_threshold": None if rule == "steps" else rng.choice((None, *THRESHOLDS)),
        "diffusion_max_steps": rng.choice((None, 1, (length or longest) // 2 or 1)),
        "diffusion_canvas_length": length,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return {"vllm_xargs": given, "ignore_eos": rng.random() < 0.5}


def _long_prompt(draw: Draw) -> Body:
    shown = problems("train", draw.rng.randrange(4), EXAMPLES)
    text = "\n".join(f"{example.question}\n{example.answer}" for example in shown)
    room = draw.limits.context - draw.max_tokens
    return {"prompt": f"{text}\n{draw.problem.question}", "truncate_prompt_tokens": room}


def _parameters(draw: Draw) -> Body:
    """Greedy, with what else changes logits or ends an answer."""
    rng = draw.rng
    every = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "logit_bias": {"20": 2, "30": -2},
        "bad_words": ["has", "had", "gets"],
        "min_tokens": 8,
        "stop": ["####", "left"],
    }
    return {name: every[name] for name in rng.sample(sorted(every), rng.randint(1, 4))}


def _structured(draw: Draw) -> Body:
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    constraints: list[Body] = [
        {"structured_outputs": {"regex": ANSWER}},
        {"structured_outputs": {"choice": ["one", "two", "more than two"]}},
        {"response_format": schema},
    ]
    return draw.rng.choice(constraints)


def _seeded(draw: Draw) -> Body:
    rng = draw.rng
    more = rng.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}))
    return {"temperature": rng.choice((0.5, 1.0)), "seed": rng.randrange(2**31), **more}


def _several(draw: Draw) -> Body:
    return _seeded(draw) | {"n": 2}


KINDS: dict[str, Callable[[Draw], Body]] = {
    "plain": _plain,
    "diffusion options": _options,
    "long prompt": _long_prompt,
    "other parameters": _parameters,
    "structured output": _structured,
    "seeded sampling": _seeded,
    "two seeded answers": _several,
}
SAMPLED = ("seeded sampling", "two seeded answers")
BAD = "bad request"
_TOO_LONG = {"prompt": "How many? " * 1000}
_BAD_BODIES: Sequence[Body] = (
    *({"vllm_xargs": {"diffusion_threshold": value}} for value in (0, 2, "high")),
    *({"vllm_xargs": {"diffusion_canvas_length": value}} for value in (0, 10**6)),
    *({"vllm_xargs": {"diffusion_reveal": "none"}}, {"vllm_xargs": {"diffusion_tresh": 1}}),
    *({"temperature": -1}, {"max_tokens": -1}, {"prompt_logprobs": 1}, _TOO_LONG),
    {"structured_outputs": {"regex": "["}},
)


def bad_request(rng: random.Random) -> Request:
    """A request whose right answer is a 400."""
    body = {"prompt": "How many?", "max_tokens": 8}
    return Request(BAD, COMPLETION, body | rng.choice(_BAD_BODIES))
