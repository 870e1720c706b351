"""Options of block-diffusion decoding: names, ranges and defaults.

The names are a contract with clients. A value out of range raises `ValueError` with the
option's name, the value and what is allowed; the caller decides whether that is a start-up
error or a 400.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_edlm.reveal import RULES

# Models that are trained as AR models at the same time see what is known token-causally.
CAUSAL_ATTENTIONS = ("causal", "causal_grid")
PROMPT_ATTENTIONS = ("block_causal", "bidirectional", *CAUSAL_ATTENTIONS)
REVEAL_RULES = tuple(RULES)
SERVER_OPTIONS = ("prompt_attention", "threshold", "reveal", "adaptive_canvas")
REQUEST_OPTIONS = (
    "diffusion_threshold",
    "diffusion_max_steps",
    "diffusion_canvas_length",
    "diffusion_reveal",
)
# The grammar is asked about the next token only: a constrained request goes left to right.
CONSTRAINED_RULE = "prefix"


@dataclass(frozen=True)
class Options:
    """Resolved options of one served model.

    Attributes:
        block_length: B, positions denoised together.
        max_steps: S, denoise steps per block at most, 1..B.
        rule: name of the reveal rule of requests that name none.
        threshold: parameter of that rule, in (0, 1].
        mask_token_id: token id that stands for a masked position.
        prompt_attention: "block_causal": blocks lie on one grid from position 0;
            "bidirectional": the prompt is one block that sees itself whole, and generated
            blocks start at its end; "causal": everything before the open block is
            token-causal, and generated blocks start at the prompt's end; "causal_grid": the
            same with blocks on one grid from position 0.
        token_shift: the logits of a position predict the next one.
        adaptive_canvas: open positions that all requests together should not exceed, for which
            blocks are shortened; None to keep every block's length.
        async_scheduling: a step is planned before the outcome of the last one is known.
    """

    block_length: int
    max_steps: int
    rule: str
    threshold: float
    mask_token_id: int
    prompt_attention: str
    token_shift: bool = False
    adaptive_canvas: int | None = None
    async_scheduling: bool = False

    @property
    def blocks_follow_prompt(self) -> bool:
        """Whether the grid of blocks starts at the prompt's end instead of position 0."""
        return self.prompt_attention in ("bidirectional", "causal")

    @property
    def has_causal_past(self) -> bool:
        """Whether positions outside the open block attend token-causally."""
        return self.prompt_attention in CAUSAL_ATTENTIONS


def publish_options(options: Options, hf_config: Any) -> None:
    """Write what is served to the model's configuration, which vLLM hands everywhere."""
    # vLLM writes this configuration as JSON.
    hf_config.edlm_options = asdict(options)


def served_options(hf_config: Any) -> Options:
    """Options of the served model, from its configuration."""
    return Options(**hf_config.edlm_options)


@dataclass(frozen=True)
class RequestOptions:
    """Resolved options of one request; see `Options`."""

    block_length: int
    max_steps: int
    rule: str
    threshold: float


def shown(value: Any) -> str:
    """`value` as a message shows it: as Python writes it, but of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_keys(options: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse keys of `options` that are not in `allowed`."""
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"{where}: unknown option {shown(key)}; known are {', '.join(allowed)}"
            )


def check_threshold(name: str, value: Any) -> float:
    """Return `value` as a rule's threshold in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {shown(value)}")
    return float(value)


def check_count(name: str, value: Any, at_most: int | None = None) -> int:
    """Return `value` as an integer from 1 to `at_most`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < 1 or (at_most is not None and value > at_most):
        allowed = f"from 1 to {at_most}" if at_most is not None else "of at least 1"
        raise ValueError(f"{name} must be an integer {allowed}, got {shown(value)}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def check_mask_token_id(value: Any, vocab_size: int) -> int:
    """Return `value` as a token id inside a vocabulary of `vocab_size` entries."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id must be a token id from 0 to {vocab_size - 1} "
            f"(config.json: vocab_size {vocab_size}), got {shown(value)}"
        )
    return value


def resolve_rule(rule: str, threshold: Any, prefix: str = "") -> tuple[str, float]:
    """A rule and its threshold, the rule's default where `threshold` is None.

    Args:
        prefix: what stands before the two options' names, for error messages.

    Raises:
        ValueError: an unknown rule, a threshold out of range or for a rule that takes none.
    """
    default = RULES[check_choice(f"{prefix}reveal", rule, REVEAL_RULES)].default
    if threshold is None:
        return rule, default if default is not None else 1.0
    if default is None:
        raise ValueError(
            f"{prefix}threshold must not be given with the reveal rule {rule!r}, which takes "
            f"none, got {shown(threshold)}"
        )
    return rule, check_threshold(f"{prefix}threshold", threshold)


def request_options(
    extra_args: Mapping[str, Any] | None, options: Options, constrained: bool = False
) -> RequestOptions:
    """Options of one request from its `SamplingParams.extra_args` (over HTTP: `vllm_xargs`).

    Args:
        constrained: a grammar constrains the request's output.

    Raises:
        ValueError: an unknown option or a value out of range, named in the message.
    """
    asked = extra_args or {}
    check_keys(asked, REQUEST_OPTIONS, "extra_args / vllm_xargs")
    rule, threshold = _request_rule(asked, options, constrained)
    count = {
        name: check_count(name, asked.get(name, default), options.block_length)
        for name, default in (
            ("diffusion_canvas_length", options.block_length),
            ("diffusion_max_steps", options.max_steps),
        )
    }
    return RequestOptions(
        count["diffusion_canvas_length"], count["diffusion_max_steps"], rule, threshold
    )


def _request_rule(
    asked: Mapping[str, Any], options: Options, constrained: bool
) -> tuple[str, float]:
    default_rule = CONSTRAINED_RULE if constrained else options.rule
    rule = asked.get("diffusion_reveal", default_rule)
    if constrained and rule != CONSTRAINED_RULE:
        raise ValueError(
            f"diffusion_reveal must be {CONSTRAINED_RULE!r} with structured outputs, "
            f"got {shown(rule)}"
        )
    if "diffusion_threshold" in asked:
        check_threshold("diffusion_threshold", asked["diffusion_threshold"])
    elif rule == options.rule:
        return rule, options.threshold
    return resolve_rule(rule, asked.get("diffusion_threshold"), "diffusion_")


def block_length_of(extra_args: Mapping[str, Any] | None, options: Options) -> int:
    """Block length of a request that has been admitted."""
    return int((extra_args or {}).get("diffusion_canvas_length", options.block_length))


def max_steps_of(extra_args: Mapping[str, Any] | None, options: Options) -> int:
    """Denoise steps per block, at most, of a request that has been admitted."""
    return int((extra_args or {}).get("diffusion_max_steps", options.max_steps))
