"""Options of block-diffusion decoding: names, ranges and defaults. Pure Python.

The names are a contract with clients. A value out of range raises `ValueError` with the
option's name, the value and what is allowed; the caller decides whether that is a start-up
error or a 400.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_THRESHOLD = 0.9
PROMPT_ATTENTIONS = ("block_causal", "bidirectional")
REVEAL_RULES = ("confidence",)
SERVER_OPTIONS = ("prompt_attention", "threshold", "reveal")
REQUEST_OPTIONS = ("diffusion_threshold", "diffusion_max_steps")


@dataclass(frozen=True)
class Options:
    """Resolved options of one served model.

    Attributes:
        block_length: B, positions denoised together.
        max_steps: S, denoise steps per block at most, 1..B.
        threshold: confidence that reveals a position, in (0, 1].
        mask_token_id: token id that stands for a masked position.
        bidirectional_prompt: the prompt is one block that sees itself whole and generated
            blocks start at its end; otherwise blocks lie on one grid from position 0.
    """

    block_length: int
    max_steps: int
    threshold: float
    mask_token_id: int
    bidirectional_prompt: bool


def check_keys(options: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse keys of `options` that are not in `allowed`."""
    for key in options:
        if key not in allowed:
            raise ValueError(f"{where}: unknown option {key!r}; known are {', '.join(allowed)}")


def check_threshold(name: str, value: Any) -> float:
    """Return `value` as a confidence threshold in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    return float(value)


def check_count(name: str, value: Any, at_most: int | None = None) -> int:
    """Return `value` as an integer from 1 to `at_most`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < 1 or (at_most is not None and value > at_most):
        allowed = f"from 1 to {at_most}" if at_most is not None else "of at least 1"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_mask_token_id(value: Any, vocab_size: int) -> int:
    """Return `value` as a token id inside a vocabulary of `vocab_size` entries."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id must be a token id from 0 to {vocab_size - 1} "
            f"(config.json: vocab_size {vocab_size}), got {value!r}"
        )
    return value


def check_request(extra_args: Mapping[str, Any] | None, block_length: int) -> None:
    """Check one request's `SamplingParams.extra_args` (over HTTP: `vllm_xargs`)."""
    extra_args = extra_args or {}
    check_keys(extra_args, REQUEST_OPTIONS, "extra_args / vllm_xargs")
    if "diffusion_threshold" in extra_args:
        check_threshold("diffusion_threshold", extra_args["diffusion_threshold"])
    if "diffusion_max_steps" in extra_args:
        check_count("diffusion_max_steps", extra_args["diffusion_max_steps"], block_length)


def request_options(extra_args: Mapping[str, Any] | None, options: Options) -> tuple[float, int]:
    """Threshold and denoise steps per block of a request that passed `check_request`."""
    extra_args = extra_args or {}
    threshold = float(extra_args.get("diffusion_threshold", options.threshold))
    return threshold, int(extra_args.get("diffusion_max_steps", options.max_steps))
