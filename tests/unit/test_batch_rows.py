"""What a row of a batch asks for, and which rows are refused."""

from typing import Any

import pytest

from examples.batch.rows import Result, check_names, is_read, request_of
from examples.batch.sampling import DEFAULTS

CHAT = [{"role": "user", "content": "hi"}]


def test_row_over_defaults() -> None:
    row = {"prompt": "a", "temperature": 1, "seed": None, "diffusion_threshold": 0.5, "note": "x"}
    request = request_of(row, DEFAULTS | {"seed": 3, "diffusion_max_steps": 2})
    assert (request.prompt, request.messages) == ("a", None)
    assert request.sampling == {
        "max_tokens": 512,
        "temperature": 1.0,
        "seed": 3,
        "extra_args": {"diffusion_threshold": 0.5, "diffusion_max_steps": 2},
    }


def test_chat() -> None:
    request = request_of({"messages": CHAT, "prompt": None}, DEFAULTS)
    assert (request.prompt, request.messages) == (None, CHAT)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({}, "neither"),
        ({"prompt": None}, "neither"),
        ({"prompt": "a", "messages": CHAT}, "both"),
        ({"prompt": 5}, "prompt must be a text, got 5"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [*CHAT, {"role": "user"}]}, r"messages\[1\] must be an object"),
        ({"messages": [CHAT[0] | {"tools": 1}]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content must be"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"prompt": "a", "n": 1}, r"n is not supported .* max_tokens, .*diffusion_\*"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs is not supported"),
    ],
)
def test_bad_row(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        request_of(row, DEFAULTS)


def test_names_of_results() -> None:
    assert Result(answer="a", tokens=1).named("my_")["my_answer"] == "a"
    with pytest.raises(ValueError, match=r"'answer'.*--prefix"):
        check_names(["prompt", "answer"], "")
    check_names(["prompt", "answer"], "my_")


def test_keys_that_are_read() -> None:
    assert all(map(is_read, ("prompt", "messages", "stop", "diffusion_x", "logprobs")))
    assert not any(map(is_read, ("id", "max_token", "role")))
