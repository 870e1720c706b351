"""Tool calls and reasoning through vLLM's parsers, which get several tokens in one delta.

Neither model knows how to call a tool. A call that is demanded is written under a grammar; for
the others a grammar of one choice makes the model say the text that a capable model would.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest
from serving import REASONING_TAGS, TOOL_TAGS, RandomServer, Server
from transformers import AutoTokenizer

TAGS = REASONING_TAGS + TOOL_TAGS
MESSAGES = [{"role": "user", "content": "3 + 4?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "minLength": 5, "maxLength": 20},
    },
    "required": ["a", "note"],
    "additionalProperties": False,
}


def tool(name: str, strict: bool) -> dict[str, Any]:
    function = {"name": name, "parameters": PARAMETERS, "strict": strict}
    return {"type": "function", "function": function}


STRICT = [tool(name, strict=True) for name in ("add", "find")]
# Beside the grammar of one choice, vLLM would allow calls of strict tools.
LOOSE = [tool(name, strict=False) for name in ("add", "find")]
NAMED = {"type": "function", "function": {"name": "find"}}
HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
FIRST, SECOND = {"a": 3, "note": "3 < 4"}, {"a": 4, "note": '{"b"}'}
CALLS = HERMES.format("add", json.dumps(FIRST)) + HERMES.format("find", json.dumps(SECOND))
CODER = (
    "<tool_call>\n<function={}>\n<parameter=a>\n{}\n</parameter>\n"
    "<parameter=note>\n{}\n</parameter>\n</function>\n</tool_call>"
)


@dataclass
class Said:
    """What a message says, or the deltas of a stream together."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and arguments of each tool call."""
    finish_reason: str | None = None

    @property
    def arguments(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(text)) for name, text in self.calls]

    def add(self, part: Any) -> None:
        """Take in a delta, or a whole message."""
        self.content += part.content or ""
        self.reasoning += getattr(part, "reasoning", None) or ""
        for position, call in enumerate(part.tool_calls or []):
            index = getattr(call, "index", position)
            if index == len(self.calls):
                assert call.id, "a call begins with its id"
                self.calls.append(("", ""))
            name, text = self.calls[index]
            function = call.function
            self.calls[index] = name + (function.name or ""), text + (function.arguments or "")


def said(server: Server, stream: bool, **options: Any) -> Said:
    """The answer to `MESSAGES` with tools at hand."""
    request = {"model": server.name, "messages": MESSAGES, "tools": LOOSE, "max_tokens": 210}
    request |= {"temperature": 0, "stream": stream} | options
    answer = server.client.chat.completions.create(**request)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    whole = Said()
    for choice in choices:
        whole.add(choice.delta if stream else choice.message)
        whole.finish_reason = choice.finish_reason or whole.finish_reason
    return whole


def forced(text: str, interval: int = 1, thinking: bool = False) -> dict[str, Any]:
    """A body that makes the model say `text`; deltas hold `interval` tokens at least."""
    return {
        "structured_outputs": {"choice": [text]},
        "stream_interval": interval,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }


def bias(server: Server) -> dict[str, float]:
    """What a capable model would prefer: a tag's own token, and no needless whitespace."""
    fast = AutoTokenizer.from_pretrained(server.tokenizer_path)
    tags = {token: 50 for tag, token in fast.get_vocab().items() if tag in TAGS}
    spaces = {token: -50 for token in range(len(fast)) if fast.decode([token]).isspace()}
    return {str(token): amount for token, amount in (tags | spaces).items()}


@pytest.fixture(params=["hermes", "qwen3_coder"])
def any_server(request: pytest.FixtureRequest) -> Server:
    """Each of the servers, by its parser of tool calls."""
    return request.getfixturevalue({"hermes": "server", "qwen3_coder": "tiny_math"}[request.param])


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_demanded_call(any_server: Server, choice: Any) -> None:
    """Its arguments fit the tool's parameters, and the stream tells the same call."""
    options = {"tools": STRICT, "tool_choice": choice, "parallel_tool_calls": False}
    options["logit_bias"] = bias(any_server)
    whole, streamed = (said(any_server, stream, **options) for stream in (False, True))
    ((name, arguments),) = whole.arguments
    assert name == "find" if choice is NAMED else name in ("add", "find")
    jsonschema.validate(arguments, PARAMETERS)
    assert streamed.arguments == whole.arguments
    assert streamed.finish_reason == whole.finish_reason


def test_sampled_calls_fit_as_well(server: RandomServer) -> None:
    for seed in range(4):
        options = {"tools": STRICT, "tool_choice": NAMED, "temperature": 1.0, "seed": seed}
        options["logit_bias"] = bias(server)
        ((_, arguments),) = said(server, False, **options).arguments
        jsonschema.validate(arguments, PARAMETERS)


@pytest.mark.parametrize("interval", [1, 2, 7, 300])
@pytest.mark.parametrize("before", ["", "Let me add: "])
def test_call_of_the_models_own(server: RandomServer, before: str, interval: int) -> None:
    """tool_choice auto: two calls after some text, cut into deltas anywhere."""
    body = forced(before + CALLS, interval)
    whole, streamed = (said(server, s, tool_choice="auto", extra_body=body) for s in (False, True))
    assert whole.arguments == [("add", FIRST), ("find", SECOND)]
    assert whole.content == before
    assert whole.finish_reason == "tool_calls"
    assert streamed == whole


@pytest.mark.parametrize("interval", [1, 2, 7, 300])
def test_call_written_as_code(tiny_math: Server, interval: int) -> None:
    """The same with the parser of a larger model, whose tags are tokens."""
    text = CODER.format("add", 3, "3 < 4") + "\n" + CODER.format("find", 4, "other")
    options = {"tool_choice": "auto", "logit_bias": bias(tiny_math)}
    body = forced("So: " + text, interval)
    whole, streamed = (said(tiny_math, s, **options, extra_body=body) for s in (False, True))
    assert whole.arguments == [("add", FIRST), ("find", {"a": 4, "note": "other"})]
    assert whole.content.strip() == "So:"
    assert streamed.arguments == whole.arguments
    assert streamed.content.strip() == whole.content.strip()


def test_no_tool_is_called_unasked(server: RandomServer) -> None:
    """tool_choice none leaves the text as it is."""
    whole = said(server, False, tool_choice="none", extra_body=forced(CALLS))
    assert (whole.content, whole.calls) == (CALLS, [])


@pytest.mark.parametrize("interval", [1, 3, 300])
@pytest.mark.parametrize("calls", ["", CALLS])
def test_reasoning_then_answer(server: RandomServer, calls: str, interval: int) -> None:
    """Reasoning, text and calls come apart wherever the deltas are cut."""
    text = "<think>3 + 4.</think>Seven. " + calls
    body = forced(text, interval, thinking=True)
    options = {"logit_bias": bias(server), "extra_body": body}
    whole, streamed = (said(server, stream, **options) for stream in (False, True))
    assert whole.reasoning == "3 + 4."
    assert whole.content == "Seven. "
    assert whole.arguments == ([("add", FIRST), ("find", SECOND)] if calls else [])
    assert streamed == whole


def test_reasoning_and_call_over_responses(server: RandomServer) -> None:
    """The responses API has an item for each."""
    request: dict[str, Any] = {"model": server.name, "input": MESSAGES, "temperature": 0}
    request |= {"max_output_tokens": 210, "extra_body": {"logit_bias": bias(server)}}
    function = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
    request |= {"tools": [function], "tool_choice": {"type": "function", "name": "add"}}
    whole = server.client.responses.create(**request)
    (call,) = [item for item in whole.output if item.type == "function_call"]
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    events = list(server.client.responses.create(**request, stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == json.loads(call.arguments)
