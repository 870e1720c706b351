"""Configuration of the engine for block diffusion: the two hooks that vLLM calls."""

import math

import vllm.envs as envs
from vllm.config import (
    CompilationConfig,
    CUDAGraphMode,
    DiffusionConfig,
    ModelConfig,
    VllmConfig,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_edlm.compat import ray_executor
from vllm_edlm.compat.request_checks import install_request_checks
from vllm_edlm.compat.runner import use_model_runner_v2
from vllm_edlm.compat.stat_loggers import install_stat_logger
from vllm_edlm.family import normalise
from vllm_edlm.options import (
    PROMPT_ATTENTIONS,
    Options,
    check_choice,
    check_count,
    check_mask_token_id,
    publish_options,
)
from vllm_edlm.server_options import resolve_options

logger = init_logger("vllm.edlm")

SCHEDULER = "vllm_edlm.scheduler.BlockDiffusionScheduler"
ASYNC_SCHEDULER = "vllm_edlm.async_scheduler.AsyncBlockDiffusionScheduler"
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
    if not current_platform.is_cpu():
        _leave_attention_out_of_graphs(vllm_config.compilation_config)
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
        "VLLM_COMPUTE_NANS_IN_LOGITS": envs.VLLM_COMPUTE_NANS_IN_LOGITS,
        "long_prefill_token_threshold with prompts that run whole (bidirectional)": (
            options.prompt_attention == "bidirectional"
            and scheduler.long_prefill_token_threshold > 0
        ),
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


def _leave_attention_out_of_graphs(compilation: CompilationConfig) -> None:
    """No full CUDA graphs, as the model state says too. It is asked late: backends would have sized
    buffers by then for a row of attention a request, and there are more."""
    mode = compilation.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        if mode is not None:
            logger.info("cudagraph_mode is PIECEWISE, not %s, for block diffusion.", mode.name)
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


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
