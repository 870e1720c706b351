"""Options: what is accepted, and errors that name the option, the value and the range."""

import json
import math
import re
from types import SimpleNamespace

import pytest

from vllm_edlm.options import (
    REVEAL_RULES,
    Options,
    RequestOptions,
    block_length_of,
    check_mask_token_id,
    publish_options,
    request_options,
    served_options,
)

OPTIONS = Options(
    block_length=16,
    max_steps=8,
    rule="confidence",
    threshold=0.7,
    mask_token_id=3,
    prompt_attention="block_causal",
)


def refusal(**asked: object) -> str:
    with pytest.raises(ValueError, match="diffusion_") as error:
        request_options({f"diffusion_{key}": value for key, value in asked.items()}, OPTIONS)
    return str(error.value)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, math.nan, math.inf, "x", None, True, [0.5]])
def test_bad_threshold_is_named(value: object) -> None:
    message = refusal(threshold=value)
    assert "diffusion_threshold must be a number in (0, 1]" in message
    assert repr(value) in message


@pytest.mark.parametrize("key", ["max_steps", "canvas_length"])
@pytest.mark.parametrize("value", [0, -1, 17, 2.0, "3", None, True])
def test_bad_count_is_named(key: str, value: object) -> None:
    message = refusal(**{key: value})
    assert f"diffusion_{key} must be an integer from 1 to 16" in message
    assert repr(value) in message


@pytest.mark.parametrize("value", ["best", None, 3, ["prefix"]])
def test_bad_rule_is_named(value: object) -> None:
    message = refusal(reveal=value)
    assert f"diffusion_reveal must be one of {', '.join(REVEAL_RULES)}" in message
    assert repr(value) in message


def test_a_rule_without_threshold_takes_none() -> None:
    assert "must not be given with the reveal rule 'steps'" in refusal(reveal="steps", threshold=1)


def test_unknown_option_is_named() -> None:
    assert "unknown option 'diffusion_treshold'" in refusal(treshold=0.5)


@pytest.mark.parametrize("value", [-1, 100, None, "5", True])
def test_mask_token_outside_the_vocabulary(value: object) -> None:
    with pytest.raises(ValueError, match="mask_token_id must be a token id from 0 to 99"):
        check_mask_token_id(value, vocab_size=100)


def test_requests_override_the_server() -> None:
    assert request_options(None, OPTIONS) == RequestOptions(16, 8, "confidence", 0.7)
    wanted = {
        "diffusion_threshold": 1,
        "diffusion_max_steps": 16,
        "diffusion_canvas_length": 4,
        "diffusion_reveal": "margin",
    }
    assert request_options(wanted, OPTIONS) == RequestOptions(4, 16, "margin", 1.0)
    assert block_length_of(wanted, OPTIONS) == 4
    assert block_length_of(None, OPTIONS) == 16


def test_the_threshold_of_the_server_is_that_of_its_rule() -> None:
    assert request_options({"diffusion_reveal": "confidence"}, OPTIONS).threshold == 0.7
    assert request_options({"diffusion_reveal": "entropy"}, OPTIONS).threshold == 0.1


def test_constrained_requests_go_left_to_right() -> None:
    assert request_options(None, OPTIONS, constrained=True).rule == "prefix"
    with pytest.raises(ValueError, match=re.escape("must be 'prefix' with structured outputs")):
        request_options({"diffusion_reveal": "margin"}, OPTIONS, constrained=True)


def test_options_travel_as_json() -> None:
    config = SimpleNamespace()
    publish_options(OPTIONS, config)
    config.edlm_options = json.loads(json.dumps(config.edlm_options))
    assert served_options(config) == OPTIONS
