"""Options of a batch's rows: every one reaches vLLM, and no value of one ends a job."""

import math
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from examples.batch.sampling import DEFAULTS, MAX_INT, OPTIONS, Number, sampling_of

README = Path(__file__).parents[2] / "README.md"
NUMBERS = {name: check for name, check in OPTIONS.items() if isinstance(check, Number)}
EXAMPLES = {
    "stop": "end",
    "stop_token_ids": [2, 3],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "bad_words": ["no", "never"],
    "allowed_token_ids": [4],
    "skip_special_tokens": False,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_vllm(name: str) -> None:
    value = NUMBERS[name].least + 1 if name in NUMBERS else EXAMPLES[name]
    params = SamplingParams(**sampling_of({**DEFAULTS, "temperature": 1, name: value}))
    assert getattr(params, name) == ([value] if name == "stop" else value)


@pytest.mark.parametrize("name", [name for name in NUMBERS if NUMBERS[name].kind is float])
def test_ranges_are_those_of_vllm(name: str) -> None:
    number = NUMBERS[name]
    for value in (number.least, number.most):
        if value == number.least and number.is_open:
            with pytest.raises(ValueError, match=name):
                number(name, value)
        else:
            SamplingParams(**{name: number(name, value)})


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, math.nan, "1", True, None, [1]])
@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers(name: str, value: Any) -> None:
    number = NUMBERS[name]
    with pytest.raises(ValueError, match=rf"{name} must be .* in [\[(]-?\d") as error:
        number(name, value)
    assert f"{number.least}, {number.most}], got {repr(value)[:100]}" in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token_ids": [1, 10**400]}, r"stop_token_ids\[1\] must be an integer in \[0, "),
        ({"allowed_token_ids": [-1]}, r"allowed_token_ids\[0\] must be .* got -1"),
        ({"allowed_token_ids": 10**400}, "allowed_token_ids must be a list of token ids, got 1000"),
        ({"stop": 10**400}, "stop must be a text or a list of texts, got 1000"),
        ({"bad_words": ["a", 1]}, r"bad_words\[1\] must be a text, got 1"),
        ({"stop": "\ud800"}, r"stop\[0\] must be valid Unicode"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"seed": MAX_INT + 1}, r"seed must be an integer in .* got 9223372036854775808"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling_of(options)


def test_readme_lists_the_options() -> None:
    _, text = README.read_text().split("### Ray Data")
    assert [name for name in OPTIONS if f"`{name}`" not in text] == []
