"""Which options the engine ends up with, read from vLLM's own configuration."""

from typing import Any

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import SMALL_ENGINE
from vllm import EngineArgs
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig

from vllm_edlm.config import _leave_attention_out_of_graphs
from vllm_edlm.options import served_options


def configured(checkpoint: CheckpointFactory, spec: CheckpointSpec, **options: Any) -> VllmConfig:
    args = EngineArgs(model=str(checkpoint(spec)), **(SMALL_ENGINE | options))
    return args.create_engine_config()


@pytest.mark.parametrize("block_length", [8, 12, 24, 32, 48])
@pytest.mark.parametrize("page", [None, 32])
def test_shared_kv_pages_hold_whole_blocks(
    checkpoint: CheckpointFactory, block_length: int, page: int | None
) -> None:
    spec = CheckpointSpec(block_length=block_length)
    cache = configured(checkpoint, spec, block_size=page).cache_config
    fits = cache.block_size % block_length == 0
    assert cache.enable_prefix_caching == fits
    if page is not None:
        assert cache.block_size == page
    elif block_length != 48:
        assert fits


@pytest.mark.parametrize(
    ("in_checkpoint", "in_server", "follows_prompt"),
    [
        (None, None, True),
        ("bidirectional", None, True),
        ("block_causal", None, False),
        ("block_causal", "bidirectional", True),
        ("bidirectional", "block_causal", False),
        ("causal_grid", None, False),
        ("causal_grid", "causal", True),
    ],
)
def test_prompt_mode_of_server_before_checkpoint(
    checkpoint: CheckpointFactory,
    in_checkpoint: str | None,
    in_server: str | None,
    follows_prompt: bool,
) -> None:
    """KV pages are shared where blocks lie on the grid that pages lie on."""
    options = {} if in_server is None else {"edlm": {"prompt_attention": in_server}}
    spec = CheckpointSpec(prompt_attention=in_checkpoint)
    config = configured(checkpoint, spec, additional_config=options)
    assert config.cache_config.enable_prefix_caching != follows_prompt


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        (None, (8, 8)),
        ({"canvas_length": 4}, (4, 4)),
        ({"canvas_length": 8, "max_denoising_steps": 3}, (8, 3)),
        ({"max_denoising_steps": 3}, (8, 3)),
    ],
)
def test_block_length_and_steps_of_server_before_checkpoint(
    checkpoint: CheckpointFactory, diffusion: dict[str, int] | None, expected: tuple[int, int]
) -> None:
    config = configured(checkpoint, CheckpointSpec(), diffusion_config=diffusion).diffusion_config
    assert (config.canvas_length, config.max_denoising_steps) == expected


@pytest.mark.parametrize(
    ("generation", "diffusion", "expected"),
    [
        ({"block_length": 4}, None, (4, 4)),
        ({"max_denoising_steps": 5}, None, (8, 5)),
        ({"max_denoising_steps": 5}, {"max_denoising_steps": 3}, (8, 3)),
        ({"block_length": 4, "max_denoising_steps": 2}, {"canvas_length": 8}, (8, 8)),
        ({"max_denoising_steps": 6}, {"canvas_length": 4}, (4, 4)),
    ],
)
def test_block_length_and_steps_of_generation_config(
    checkpoint: CheckpointFactory,
    generation: dict[str, object],
    diffusion: dict[str, int] | None,
    expected: tuple[int, int],
) -> None:
    """The server's go first; the checkpoint's steps are for its own block length."""
    spec = CheckpointSpec(generation=generation)
    config = configured(checkpoint, spec, diffusion_config=diffusion).diffusion_config
    assert (config.canvas_length, config.max_denoising_steps) == expected


@pytest.mark.parametrize(
    ("generation", "server", "expected"),
    [
        ({}, {}, ("confidence", 0.9)),
        ({"reveal": "entropy", "threshold": 0.3}, {}, ("entropy", 0.3)),
        ({"threshold": 0.7}, {}, ("confidence", 0.7)),
        ({"reveal": "margin"}, {"threshold": 0.4}, ("margin", 0.4)),
        ({"threshold": 0.7}, {"reveal": "entropy"}, ("entropy", 0.1)),
        ({"threshold": 0.7}, {"reveal": "steps"}, ("steps", 1.0)),
        ({"reveal": "steps"}, {"reveal": "confidence"}, ("confidence", 0.9)),
    ],
)
def test_rule_and_threshold_of_generation_config(
    checkpoint: CheckpointFactory,
    generation: dict[str, object],
    server: dict[str, object],
    expected: tuple[str, float],
) -> None:
    """The server's go first; the checkpoint's threshold is for its own rule."""
    spec = CheckpointSpec(generation=generation)
    config = configured(checkpoint, spec, additional_config={"edlm": server})
    options = served_options(config.model_config.hf_config)
    assert (options.rule, options.threshold) == expected


@pytest.mark.parametrize("mode", [None, *CUDAGraphMode])
def test_attention_is_in_no_cuda_graph(mode: CUDAGraphMode | None) -> None:
    compilation = CompilationConfig(cudagraph_mode=mode)
    _leave_attention_out_of_graphs(compilation)
    none = mode == CUDAGraphMode.NONE
    assert compilation.cudagraph_mode == (CUDAGraphMode.NONE if none else CUDAGraphMode.PIECEWISE)


def test_no_remote_code(checkpoint: CheckpointFactory) -> None:
    """The checkpoint names code of its own (`auto_map`), which is neither there nor needed."""
    config = configured(checkpoint, CheckpointSpec())
    assert not config.model_config.trust_remote_code
    assert config.use_v2_model_runner
