"""Checks of requests at admission, in place of vLLM's own for diffusion models.

vLLM refuses a fixed list of sampling parameters for every diffusion model, temperature 0
among them, and structured outputs, and offers a model no hook to say otherwise. The methods
replaced here behave as before for every other architecture. Upstream shape: patches/0002,
patches/0003 and patches/0011.
"""

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import vllm.envs as envs
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_edlm.compat.replacement import replace_method
from vllm_edlm.family import architecture_of
from vllm_edlm.options import Options, request_options, served_options, shown

# Kept on the device for every position of every request's open block.
MAX_LOGPROBS = 1024
# What a request may only ask for where a step is planned after the last one's outcome.
NOT_ASYNC = ("logprobs", "logprob_token_ids", "structured_outputs")
# What goes to the engine is written with integers of 64 bits; the runner keeps a request's last
# position, its prompt and max_tokens, in 32.
MAX_INT = 2**63 - 1
MAX_POSITION = 2**31 - 1


def install_request_checks() -> None:
    """Replace the checks in this process, once."""
    replace_method(SamplingParams, "_validate_diffusion", _validate_diffusion)
    replace_method(SamplingParams, "_validate_structured_outputs", _validate_structured_outputs)
    replace_method(SamplingParams, "update_from_tokenizer", _update_from_tokenizer)
    replace_method(InputProcessor, "_validate_prompt_len", _validate_prompt_len)
    replace_method(InputProcessor, "process_inputs", _process_inputs)


def _is_ours(model_config: ModelConfig) -> bool:
    return architecture_of(model_config) is not None


def _validate_diffusion(
    original: Callable[..., None], params: SamplingParams, model_config: ModelConfig
) -> None:
    """Check a request's parameters; `VLLMValidationError` becomes a 400 that names them."""
    if not _is_ours(model_config):
        return original(params, model_config)
    options = served_options(model_config.hf_config)
    for name, used in unsupported_parameters(params, options).items():
        if used:
            mode = " with async scheduling" if name in NOT_ASYNC else ""
            raise VLLMValidationError(
                f"{name} is not supported for block-diffusion models{mode}, got "
                f"{shown(getattr(params, name))}",
                parameter=name,
            )
    for name, (size, limit) in sizes(params, model_config).items():
        if size > limit:
            raise VLLMValidationError(
                f"{name} must be at most {limit} for block-diffusion models, got {size}",
                parameter=name.split()[-1],
            )
    constrained = params.structured_outputs is not None
    try:
        request_options(params.extra_args, options, constrained)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from error


def unsupported_parameters(params: SamplingParams, options: Options) -> dict[str, bool]:
    """Which parameters a request uses that have no meaning for a canvas, or none for one that
    is ahead of the scheduler, by name."""
    return {
        "prompt_logprobs": params.prompt_logprobs is not None,
        "prompt_logprob_token_ids": params.prompt_logprob_token_ids is not None,
        "thinking_token_budget": params.thinking_token_budget is not None,
    } | {name: options.async_scheduling and getattr(params, name) is not None for name in NOT_ASYNC}


def sizes(params: SamplingParams, model_config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Sizes that the runner's buffers limit, with the limits; it would fail on larger ones."""
    # Not for the front end at large: these modules belong to the runner.
    from vllm.v1.worker.gpu.sample import logit_bias as limits

    num_stops = len(params.all_stop_token_ids) + 1 if params.min_tokens else 0
    return {
        "the number of allowed_token_ids": (
            len(params.allowed_token_ids or ()),
            limits.MAX_NUM_ALLOWED_TOKEN_IDS,
        ),
        "the number of tokens in logit_bias": (
            len(params.logit_bias or ()),
            limits.MAX_NUM_LOGIT_BIAS_TOKENS,
        ),
        "with min_tokens, the number of stop_token_ids": (num_stops, limits.MAX_NUM_STOP_TOKEN_IDS),
        "min_tokens": (params.min_tokens, model_config.max_model_len),
        "max_tokens": (params.max_tokens or 0, MAX_POSITION - model_config.max_model_len),
        "logprobs": (_num_logprobs(params, model_config), MAX_LOGPROBS),
        "the magnitude of seed": (abs(params.seed or 0), MAX_INT),
        "top_k": (params.top_k, MAX_INT),
        "stream_interval": (params.stream_interval or 0, MAX_INT),
        "the sizes of repetition_detection": (
            max((0, *astuple(params.repetition_detection)))
            if params.repetition_detection is not None
            else 0,
            MAX_INT,
        ),
    }


def _num_logprobs(params: SamplingParams, model_config: ModelConfig) -> int:
    """Of every token; -1 stands for the whole vocabulary."""
    asked = params.logprobs or 0
    return model_config.get_vocab_size() if asked == -1 else asked


class _LikeAutoregressive:
    """A `ModelConfig` as vLLM's checks of grammars want it: not that of a diffusion model."""

    is_diffusion = False

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_config, name)


def _validate_structured_outputs(
    original: Callable[..., None],
    params: SamplingParams,
    model_config: ModelConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Check a grammar as for any other model."""
    config = _LikeAutoregressive(model_config) if _is_ours(model_config) else model_config
    original(params, config, *args, **kwargs)


def _update_from_tokenizer(
    original: Callable[..., None], params: SamplingParams, tokenizer: Any
) -> None:
    """Tokenize bad words, and refuse more tokens than a step should look for."""
    original(params, tokenizer)
    limit = envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    num_tokens = sum(map(len, params.bad_words_token_ids or ()))
    if num_tokens > limit:
        raise VLLMValidationError(
            f"bad_words must be at most {limit} tokens in all, got {num_tokens}",
            parameter="bad_words",
        )


def _process_inputs(
    original: Callable[..., EngineCoreRequest],
    processor: InputProcessor,
    *args: Any,
    resumable: bool = False,
    **kwargs: Any,
) -> EngineCoreRequest:
    """Refuse a prompt that goes on after tokens were generated: the KV of the block that these end
    in is not final."""
    if resumable and _is_ours(processor.model_config):
        raise VLLMValidationError("Input streaming is not supported for block-diffusion models.")
    return original(processor, *args, resumable=resumable, **kwargs)


def _validate_prompt_len(
    original: Callable[..., None], processor: InputProcessor, prompt_len: int, prompt_type: str
) -> None:
    """Refuse a bidirectional prompt that does not fit into one step.

    Under token shift its last position predicts the first one of the block behind it, so the
    step has to hold that block as well.
    """
    original(processor, prompt_len, prompt_type)
    model_config = processor.model_config
    if not _is_ours(model_config):
        return
    options = served_options(model_config.hf_config)
    if options.prompt_attention != "bidirectional":
        return
    first_block = options.block_length if options.token_shift else 0
    needed = min(prompt_len + first_block, model_config.max_model_len)
    scheduler = processor.scheduler_config
    budgets = {
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
    }
    name, budget = min(
        ((name, tokens) for name, tokens in budgets.items() if tokens is not None),
        key=lambda item: item[1],
    )
    if needed > budget:
        together = " together with its first block" if options.token_shift else ""
        raise VLLMValidationError(
            f"The prompt (length {prompt_len}) must run in one step{together}, {needed} tokens, "
            f"with prompt_attention 'bidirectional', but {name}={budget}. Raise {name} or serve "
            "with prompt_attention 'block_causal'."
        )
