"""What a server serves with: its own options, then the checkpoint's, then the defaults."""

from typing import Any

from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_edlm.adaptive import DEFAULT_BUDGET
from vllm_edlm.options import (
    CAUSAL_ATTENTIONS,
    PROMPT_ATTENTIONS,
    SERVER_OPTIONS,
    Options,
    check_choice,
    check_count,
    check_keys,
    resolve_rule,
)

# Released checkpoints carry no word on either.
DEFAULT_RULE = "confidence"
DEFAULT_PROMPT_ATTENTION = "bidirectional"


def resolve_options(vllm_config: VllmConfig) -> Options:
    """Options of the served model: server options, then generation_config.json, then config.json.

    Raises:
        ValueError: an unknown key or a value out of range, named in the message.
    """
    hf_config = vllm_config.model_config.hf_config
    server = _server_options(vllm_config)
    generation = vllm_config.model_config.try_get_generation_config()
    block_length, max_steps = _canvas(vllm_config, generation)
    rule, threshold = _rule(server, generation)
    attention = server.get("prompt_attention") or getattr(hf_config, "prompt_attention", None)
    return Options(
        block_length=block_length,
        max_steps=max_steps,
        rule=rule,
        threshold=threshold,
        mask_token_id=hf_config.mask_token_id,
        prompt_attention=attention or DEFAULT_PROMPT_ATTENTION,
        token_shift=hf_config.token_shift,
        adaptive_canvas=_adaptive_canvas(server.get("adaptive_canvas", False)),
        # vLLM's own default would be async wherever it can be.
        async_scheduling=vllm_config.scheduler_config.async_scheduling is True,
    )


def _canvas(vllm_config: VllmConfig, generation: dict[str, Any]) -> tuple[int, int]:
    """Block length and denoise steps; a checkpoint's steps are for its own block length alone."""
    diffusion = vllm_config.diffusion_config
    own = generation.get("block_length", vllm_config.model_config.hf_config.block_size)
    asked = diffusion.canvas_length if diffusion is not None else None
    block_length = check_count("canvas_length (the block length)", own if asked is None else asked)
    steps = diffusion.max_denoising_steps if diffusion is not None else None
    if steps is None:
        steps = generation.get("max_denoising_steps") if block_length == own else None
    if steps is None:
        steps = block_length
    return block_length, check_count("max_denoising_steps", steps, block_length)


def _rule(server: dict[str, Any], generation: dict[str, Any]) -> tuple[str, float]:
    """The default rule and its threshold; a checkpoint's threshold is for its own rule alone."""
    own = generation.get("reveal", DEFAULT_RULE)
    rule = server.get("reveal", own)
    of_checkpoint = generation.get("threshold") if rule == own else None
    return resolve_rule(rule, server.get("threshold", of_checkpoint))


def _adaptive_canvas(value: Any) -> int | None:
    """Budget of open positions: of the platform for true, none for false, else a number."""
    if isinstance(value, bool):
        default = DEFAULT_BUDGET["cpu" if current_platform.is_cpu() else "other"]
        return default if value else None
    try:
        return check_count("edlm.adaptive_canvas", value)
    except ValueError as error:
        raise ValueError(f"{error}; or true or false") from None


def _server_options(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    server = additional.get("edlm", {}) if isinstance(additional, dict) else {}
    if not isinstance(server, dict):
        raise ValueError(f"additional_config: edlm must be an object, got {server!r}")
    check_keys(server, SERVER_OPTIONS, "additional_config: edlm")
    if "prompt_attention" in server:
        allowed = _prompt_attentions(vllm_config.model_config.hf_config)
        check_choice("edlm.prompt_attention", server["prompt_attention"], allowed)
    if "threshold" in server or "reveal" in server:
        resolve_rule(server.get("reveal", DEFAULT_RULE), server.get("threshold"), "edlm.")
    return server


def _prompt_attentions(config: PretrainedConfig) -> tuple[str, ...]:
    """Modes that a model may be served in; token-causal ones only if it was trained so."""
    if config.prompt_attention in CAUSAL_ATTENTIONS:
        return PROMPT_ATTENTIONS
    return tuple(mode for mode in PROMPT_ATTENTIONS if mode not in CAUSAL_ATTENTIONS)
