"""Checks of requests at admission, in place of vLLM's own for diffusion models.

vLLM refuses a fixed list of sampling parameters for every diffusion model, temperature 0
among them, and offers a model no hook to say otherwise. The two methods replaced here behave
as before for every other architecture. Upstream shape: patches/0002 and patches/0003.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_edlm import ARCHITECTURE
from vllm_edlm.options import check_request

_MARK = "_edlm_original"


def install_request_checks() -> None:
    """Replace the two checks in this process, once."""
    _replace(SamplingParams, "_validate_diffusion", _validate_diffusion)
    _replace(InputProcessor, "_validate_prompt_len", _validate_prompt_len)


def _replace(cls: type, name: str, check: Callable[..., Any]) -> None:
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return check(original, self, *args, **kwargs)

    setattr(replacement, _MARK, original)
    setattr(cls, name, replacement)


def _is_ours(model_config: ModelConfig) -> bool:
    return ARCHITECTURE in model_config.architectures


def _validate_diffusion(
    original: Callable[..., None], params: SamplingParams, model_config: ModelConfig
) -> None:
    """Check a request's parameters; `VLLMValidationError` becomes a 400 that names them."""
    if not _is_ours(model_config):
        return original(params, model_config)
    for name, used in unsupported_parameters(params).items():
        if used:
            raise VLLMValidationError(
                f"{name} is not supported yet for block-diffusion models, got "
                f"{getattr(params, name)!r}",
                parameter=name,
            )
    try:
        check_request(params.extra_args, model_config.hf_config.canvas_length)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from error


def unsupported_parameters(params: SamplingParams) -> dict[str, bool]:
    """Which parameters a request uses that the sampler does not implement, by name."""
    return {
        "temperature": params.temperature > 0,
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "repetition_penalty": params.repetition_penalty != 1,
        "min_tokens": params.min_tokens > 0,
        "logit_bias": bool(params.logit_bias),
        "bad_words": bool(params.bad_words),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "logprob_token_ids": bool(params.logprob_token_ids),
        "prompt_logprob_token_ids": params.prompt_logprob_token_ids is not None,
        "structured_outputs": params.structured_outputs is not None,
        "thinking_token_budget": params.thinking_token_budget is not None,
    }


def _validate_prompt_len(
    original: Callable[..., None], processor: InputProcessor, prompt_len: int, prompt_type: str
) -> None:
    """Refuse a bidirectional prompt that does not fit into one step."""
    original(processor, prompt_len, prompt_type)
    model_config = processor.model_config
    if not _is_ours(model_config) or model_config.hf_config.prompt_attention != "bidirectional":
        return
    scheduler = processor.scheduler_config
    budgets = {
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
    }
    name, budget = min(
        ((name, tokens) for name, tokens in budgets.items() if tokens is not None),
        key=lambda item: item[1],
    )
    if prompt_len > budget:
        raise VLLMValidationError(
            f"The prompt (length {prompt_len}) is longer than {name}={budget}; with "
            "prompt_attention 'bidirectional' a prompt must run in one step. Raise "
            f"{name} or serve with prompt_attention 'block_causal'."
        )
