"""Options: what is accepted, and errors that name the option, the value and the range."""

import math
import re

import pytest

from vllm_edlm.options import Options, check_mask_token_id, check_request, request_options

OPTIONS = Options(
    block_length=16, max_steps=8, threshold=0.7, mask_token_id=3, bidirectional_prompt=False
)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, math.nan, math.inf, "x", None, True, [0.5]])
def test_bad_threshold_is_named(value: object) -> None:
    with pytest.raises(
        ValueError, match=re.escape("diffusion_threshold must be a number in (0, 1]")
    ) as error:
        check_request({"diffusion_threshold": value}, block_length=16)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 17, 2.0, "3", None, True])
def test_bad_max_steps_is_named(value: object) -> None:
    with pytest.raises(
        ValueError, match="diffusion_max_steps must be an integer from 1 to 16"
    ) as error:
        check_request({"diffusion_max_steps": value}, block_length=16)
    assert repr(value) in str(error.value)


def test_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="unknown option 'diffusion_treshold'"):
        check_request({"diffusion_treshold": 0.5}, block_length=16)


@pytest.mark.parametrize("value", [-1, 100, None, "5", True])
def test_mask_token_outside_the_vocabulary(value: object) -> None:
    with pytest.raises(ValueError, match="mask_token_id must be a token id from 0 to 99"):
        check_mask_token_id(value, vocab_size=100)


def test_requests_override_the_server() -> None:
    assert request_options(None, OPTIONS) == (0.7, 8)
    wanted = {"diffusion_threshold": 1, "diffusion_max_steps": 16}
    check_request(wanted, block_length=16)
    assert request_options(wanted, OPTIONS) == (1.0, 16)
