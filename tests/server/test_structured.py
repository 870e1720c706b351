"""Structured output: always valid, several tokens per forward, as clients ask for it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import pytest
from openai import BadRequestError
from pydantic import BaseModel
from serving import NAME, RandomServer, Server, random_tokenizer, tiny_tokenizer

from examples.convert.word_problems import grade, problems
from examples.structured import ANSWER
from examples.structured import SCHEMA as ANSWER_SCHEMA

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"
MESSAGES = [{"role": "user", "content": TEXT}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 9, "maxLength": 20},
        "size": {"type": "integer", "minimum": 10, "maximum": 99},
        "kind": {"enum": ["small", "large"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "size", "kind", "flags"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
REGEX = r"[A-Z][a-z]{5,12} (has|had) [1-9][0-9]{0,2} (apples|pears)\."
GRAMMAR = 'root ::= term ((" + " | " - ") term){1,4}\nterm ::= [a-z]{1,6} | "(" [0-9]{2} ")"'
GRAMMAR_AS_REGEX = r"([a-z]{1,6}|\([0-9]{2}\))( [+-] ([a-z]{1,6}|\([0-9]{2}\))){1,4}"
CHOICES = ["yes, of course", "yes, perhaps", "no"]
HOT = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}]


def chat(server: Server, **options: Any) -> Any:
    """A chat about `MESSAGES`; `stream` included."""
    request = {"model": server.name, "messages": MESSAGES, "max_tokens": 120, "temperature": 0}
    return server.client.chat.completions.create(**request | options)


def complete(server: RandomServer, constraint: dict[str, Any], **options: Any) -> str:
    """Text of a completion that must end by itself, which only a finished grammar lets it."""
    body = {"structured_outputs": constraint}
    request = {"model": NAME, "prompt": TEXT, "max_tokens": 120, "temperature": 0} | options
    (choice,) = server.client.completions.create(**request, extra_body=body).choices
    assert choice.finish_reason == "stop"
    return choice.text


def tokens_per_forward(answer: Any) -> float:
    forwards = answer.metrics["speculative_decoding"]["num_spec_steps"]
    return answer.usage.completion_tokens / forwards


@pytest.mark.parametrize("options", HOT, ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", [TEXT, TEXT[:21], "a"])
def test_constraints_of_vllm(server: RandomServer, prompt: str, options: dict[str, Any]) -> None:
    options = options | {"prompt": prompt}
    assert re.fullmatch(REGEX, complete(server, {"regex": REGEX}, **options))
    assert complete(server, {"choice": CHOICES}, **options) in CHOICES
    assert re.fullmatch(GRAMMAR_AS_REGEX, complete(server, {"grammar": GRAMMAR}, **options))
    jsonschema.validate(json.loads(complete(server, {"json": SCHEMA}, **options)), SCHEMA)


@pytest.mark.parametrize("options", HOT, ids=["greedy", "sampled"])
def test_json_schema(server: RandomServer, options: dict[str, Any]) -> None:
    """The response format of OpenAI, whole and streamed."""
    (choice,) = chat(server, response_format=JSON_SCHEMA, **options).choices
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert choice.finish_reason == "stop"
    stream = chat(server, response_format=JSON_SCHEMA, **options, stream=True)
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(deltas) == choice.message.content


def test_json_object(server: RandomServer) -> None:
    """Any object; a bias makes the random model close what it has opened."""
    bias = {str(TOKENIZER.convert_tokens_to_ids(token)): 8 for token in '"}'}
    answer = chat(server, response_format={"type": "json_object"}, logit_bias=bias)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_json_schema_of_responses(server: RandomServer) -> None:
    form = {"type": "json_schema", "name": "thing", "schema": SCHEMA}
    request = {"model": NAME, "input": TEXT, "temperature": 0, "max_output_tokens": 120}
    whole = server.client.responses.create(**request, text={"format": form})
    jsonschema.validate(json.loads(whole.output_text), SCHEMA)
    events = server.client.responses.create(**request, text={"format": form}, stream=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


def test_parsed_into_a_class(server: RandomServer) -> None:
    """`parse` of the openai package, which sends a strict schema and reads it back."""

    class Thing(BaseModel):
        kind: Literal["small", "large"]
        heavy: bool

    answer = server.client.chat.completions.parse(
        model=NAME, messages=MESSAGES, temperature=0, max_tokens=120, response_format=Thing
    )
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_several_tokens_per_forward(server: RandomServer) -> None:
    """Where the grammar leaves room, a run of tokens that the model is sure of is kept."""
    body = {
        "structured_outputs": {"regex": '"[^"]{40}"'},
        "vllm_xargs": {"diffusion_threshold": 1e-6},
    }
    answer = chat(server, extra_body=body)
    assert re.fullmatch(r'"[^"]{40}"', answer.choices[0].message.content)
    assert tokens_per_forward(answer) > 2


def test_requests_beside_are_free(server: RandomServer) -> None:
    """Constrained and free requests share batches; each free one is what it is alone."""
    prompts = [TEXT[:length] for length in (5, 12, 26, 40)]

    def free(prompt: str) -> str:
        request = {"model": NAME, "prompt": prompt, "max_tokens": 60, "temperature": 0}
        return server.client.completions.create(**request).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        freed = [pool.submit(free, prompt) for prompt in prompts]
        bound = [pool.submit(complete, server, {"regex": REGEX}, prompt=p) for p in prompts]
    for prompt, future in zip(prompts, freed, strict=True):
        wanted = server.expected(TOKENIZER.encode(prompt), 60).token_ids
        assert future.result() == TOKENIZER.decode(wanted, skip_special_tokens=True)
    assert all(re.fullmatch(REGEX, future.result()) for future in bound)


def test_other_reveal_rules_are_a_400(server: RandomServer) -> None:
    body = {"structured_outputs": {"regex": "a"}, "vllm_xargs": {"diffusion_reveal": "factor"}}
    with pytest.raises(BadRequestError, match="diffusion_reveal"):
        chat(server, extra_body=body)


def test_impossible_grammar_is_a_400(server: RandomServer) -> None:
    with pytest.raises(BadRequestError):
        complete(server, {"grammar": "no grammar ::"})
    assert complete(server, {"choice": ["yes"]}) == "yes"


def ask(tiny_math: Server, question: str, **options: Any) -> Any:
    return chat(tiny_math, messages=[{"role": "user", "content": question}], **options)


def test_form_of_real_answers(tiny_math: Server) -> None:
    """A grammar that the model would keep to anyway changes neither answer nor forwards much."""
    body = {"structured_outputs": {"regex": ANSWER}}
    prefix = {"vllm_xargs": {"diffusion_reveal": "prefix"}}
    for problem in problems("heldout", 7, 5):
        bound = ask(tiny_math, problem.question, extra_body=body)
        free = ask(tiny_math, problem.question, extra_body=prefix)
        assert re.fullmatch(ANSWER, bound.choices[0].message.content)
        assert bound.choices[0].message.content == free.choices[0].message.content
        assert grade(bound.choices[0].message.content, problem.result)
        assert tokens_per_forward(bound) >= tokens_per_forward(free) > 2


def test_schema_on_a_real_model(tiny_math: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": ANSWER_SCHEMA}}
    for problem in problems("heldout", 7, 5):
        answer = ask(tiny_math, problem.question, response_format=form)
        jsonschema.validate(json.loads(answer.choices[0].message.content), ANSWER_SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_before_the_schema(tiny_math: Server, stream: bool) -> None:
    """Reasoning is free; what follows its end, in the same run of tokens or later, is not."""
    end, eos = tiny_tokenizer().convert_tokens_to_ids(["</think>", "<|im_end|>"])
    (problem,) = problems("heldout", 7, 1)
    # Reasoning ends where the answer would: the bias is enough to win there, and only there.
    request = {"logit_bias": {str(end): 12, str(eos): -100}, "stream": stream}
    body = {"chat_template_kwargs": {"enable_thinking": True}}
    body |= {"structured_outputs": {"choice": CHOICES}}
    answer = ask(tiny_math, problem.question, **request, extra_body=body)
    parts = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
    assert grade("".join(getattr(p, "reasoning", None) or "" for p in parts), problem.result)
    assert "".join(p.content or "" for p in parts) in CHOICES
