"""Configuration of the engine for block diffusion: the two hooks that vLLM calls."""

import math
from typing import Any

from transformers import PretrainedConfig
from vllm.config import DiffusionConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_edlm.adaptive import DEFAULT_BUDGET
from vllm_edlm.compat import ray_executor
from vllm_edlm.compat.request_checks import install_request_checks
from vllm_edlm.compat.runner import use_model_runner_v2
from vllm_edlm.compat.stat_loggers import install_stat_logger
from vllm_edlm.family import normalise
from vllm_edlm.options import (
    CAUSAL_ATTENTIONS,
    PROMPT_ATTENTIONS,
    SERVER_OPTIONS,
    Options,
    check_choice,
    check_count,
    check_keys,
    check_mask_token_id,
    publish_options,
    resolve_rule,
)

logger = init_logger("vllm.edlm")

SCHEDULER = "vllm_edlm.scheduler.BlockDiffusionScheduler"
ASYNC_SCHEDULER = "vllm_edlm.async_scheduler.AsyncBlockDiffusionScheduler"
# Released checkpoints carry no word on either.
DEFAULT_RULE = "confidence"
DEFAULT_PROMPT_ATTENTION = "bidirectional"
# KV pages longer than this waste memory at the end of every request.
MAX_KV_PAGE = 256


def configure_model(model_config: ModelConfig) -> None:
    """Check the checkpoint's config.json and mark the model as a diffusion model.

    vLLM calls this while it builds `ModelConfig` (`VerifyAndUpdateConfig`). It takes a model
    for a diffusion model when its config has `canvas_length`.

    Raises:
        ValueError: config.json holds something that cannot be served, named in the message.
    """
    config = model_config.hf_config
    normalise(config)
    check_mask_token_id(getattr(config, "mask_token_id", None), config.vocab_size)
    if (dlm_type := getattr(config, "dlm_type", None)) is not None:
        # By itself "dream" says that tokens shift, not which block predicts a block's first one.
        named = ("dream",) if config.token_shift else ("llada",)
        check_choice("dlm_type in config.json", dlm_type, named)
    check_choice("prompt_attention in config.json", config.prompt_attention, PROMPT_ATTENTIONS)
    config.canvas_length = check_count(
        "block_size (the block length) in config.json", getattr(config, "block_size", None)
    )


def _prompt_attentions(config: PretrainedConfig) -> tuple[str, ...]:
    """Modes that a model may be served in; token-causal ones only if it was trained so."""
    if config.prompt_attention in CAUSAL_ATTENTIONS:
        return PROMPT_ATTENTIONS
    return tuple(mode for mode in PROMPT_ATTENTIONS if mode not in CAUSAL_ATTENTIONS)


def resolve_options(vllm_config: VllmConfig) -> Options:
    """Options of the served model: server options, then generation_config.json, then config.json.

    Raises:
        ValueError: an unknown key or a value out of range, named in the message.
    """
    hf_config = vllm_config.model_config.hf_config
    server = _server_options(vllm_config)
    generation = vllm_config.model_config.try_get_generation_config()
    diffusion = vllm_config.diffusion_config
    block_length = check_count(
        "canvas_length (the block length)",
        diffusion.canvas_length
        if diffusion is not None
        else generation.get("block_length", hf_config.block_size),
    )
    steps = diffusion.max_denoising_steps if diffusion is not None else None
    if steps is None:
        steps = generation.get("max_denoising_steps", block_length)
    rule, threshold = resolve_rule(
        server.get("reveal", generation.get("reveal", DEFAULT_RULE)),
        server.get("threshold", generation.get("threshold")),
    )
    attention = server.get("prompt_attention") or getattr(hf_config, "prompt_attention", None)
    return Options(
        block_length=block_length,
        max_steps=check_count("max_denoising_steps", steps, block_length),
        rule=rule,
        threshold=threshold,
        mask_token_id=hf_config.mask_token_id,
        prompt_attention=attention or DEFAULT_PROMPT_ATTENTION,
        token_shift=hf_config.token_shift,
        adaptive_canvas=_adaptive_canvas(server.get("adaptive_canvas", False)),
        # vLLM's own default would be async wherever it can be.
        async_scheduling=vllm_config.scheduler_config.async_scheduling is True,
    )


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


def configure_engine(vllm_config: VllmConfig) -> None:
    """Set up diffusion config, scheduler, KV pages and runner (`VerifyAndUpdateConfig`).

    Raises:
        ValueError: an option that cannot be served, named in the message.
    """
    options = resolve_options(vllm_config)
    _refuse_unsupported(vllm_config, options)
    hf_config = vllm_config.model_config.hf_config
    hf_config.canvas_length = options.block_length
    publish_options(options, hf_config)
    vllm_config.diffusion_config = DiffusionConfig(
        canvas_length=options.block_length, max_denoising_steps=options.max_steps
    )
    vllm_config.scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if options.async_scheduling else SCHEDULER
    )
    vllm_config.scheduler_config.async_scheduling = options.async_scheduling
    vllm_config.attention_config.use_non_causal = True
    if options.blocks_follow_prompt:
        _switch_prefix_caching_off(vllm_config, options.prompt_attention)
    elif vllm_config.cache_config.enable_prefix_caching:
        _fit_kv_page(vllm_config, options.block_length)
    _default_to_greedy(vllm_config.model_config)
    install_request_checks()
    install_stat_logger()
    use_model_runner_v2(vllm_config)
    ray_executor.use_cpu_workers(vllm_config)


def _refuse_unsupported(vllm_config: VllmConfig, options: Options) -> None:
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    model = vllm_config.model_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors": vllm_config.kv_transfer_config is not None,
        "pipeline parallelism over the legacy Ray executor": (
            parallel.pipeline_parallel_size > 1 and ray_executor.is_legacy(vllm_config)
        ),
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "dual-batch overlap": parallel.enable_dbo,
        "a custom scheduler class": (
            scheduler.scheduler_cls not in (None, SCHEDULER, ASYNC_SCHEDULER)
        ),
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "fast prefill by KV sharing": vllm_config.cache_config.kv_sharing_fast_prefill,
        "prompt embeddings": model.enable_prompt_embeds,
        "pooling": model.runner_type == "pooling",
        "trace replay": model.enable_trace_replay,
        "a custom logits processor": bool(model.logits_processors),
    }
    for feature, wanted in refused.items():
        if wanted:
            raise ValueError(f"{feature} is not supported yet for block-diffusion models")
    _refuse_async(options, parallel.pipeline_parallel_size)
    _check_token_budgets(vllm_config, options.block_length)


def _refuse_async(options: Options, num_stages: int) -> None:
    """Refuse what lies differently in a step that commits a block and in one that denoises it:
    with async scheduling it is not known beforehand which of the two a step is. Nor is the
    count of steps known by which a block's length may still be chosen. And a pipeline's first
    stage has the last one's canvases only when its step is done."""
    refused = {
        "a model with token shift": options.token_shift,
        f"prompt_attention {options.prompt_attention!r}": options.has_causal_past,
        "adaptive_canvas": options.adaptive_canvas is not None,
        "pipeline parallelism": num_stages > 1,
    }
    for feature, wanted in refused.items():
        if options.async_scheduling and wanted:
            raise ValueError(f"async scheduling is not supported yet with {feature}")


def _check_token_budgets(vllm_config: VllmConfig, block_length: int) -> None:
    scheduler = vllm_config.scheduler_config
    budgets = {
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold or None,
    }
    for name, budget in budgets.items():
        if budget is not None and budget < 2 * block_length:
            raise ValueError(
                f"{name} must be at least {2 * block_length}, two blocks of {block_length} "
                f"positions (one step may hold a complete block and the open one), got {budget}"
            )


def _switch_prefix_caching_off(vllm_config: VllmConfig, prompt_attention: str) -> None:
    """KV pages do not end where blocks do if the blocks begin at the prompt's end, and a prompt
    that sees itself whole cannot be shared by its beginning, nor split."""
    whole = prompt_attention == "bidirectional"
    logger.info(
        "prompt_attention is %r: %sprefix caching is off. Models trained block-causally can be "
        "served with both chunked prefill and prefix caching by "
        '--additional-config \'{"edlm": {"prompt_attention": "block_causal"}}\'.',
        prompt_attention,
        "chunked prefill and " if whole else "",
    )
    vllm_config.cache_config.enable_prefix_caching = False


def _fit_kv_page(vllm_config: VllmConfig, block_length: int) -> None:
    """Make KV pages hold whole blocks, so that a full page is a final one; else do not share."""
    cache = vllm_config.cache_config
    if cache.user_specified_block_size:
        page = cache.block_size
    elif current_platform.is_cpu():
        page = 128 if 128 % block_length == 0 else math.lcm(32, block_length)
    else:
        page = math.lcm(16, block_length)
    if page % block_length or page > MAX_KV_PAGE:
        logger.info(
            "Prefix caching is off: KV pages of %d tokens cannot hold whole blocks of %d.",
            page,
            block_length,
        )
        cache.enable_prefix_caching = False
        return
    cache.block_size = page
    cache.user_specified_block_size = True


def _default_to_greedy(model_config: ModelConfig) -> None:
    """Take generation_config.json at its word: vLLM reads `temperature` alone."""
    override = model_config.override_generation_config
    generation = model_config.try_get_generation_config()
    named = {**generation, **override}
    if generation.get("do_sample") is False and named.get("temperature") is None:
        override["temperature"] = 0.0
        logger.info(
            "generation_config.json says do_sample: false; requests that name no temperature are "
            "decoded at temperature 0."
        )
