"""Engines shared by the tests of a session: each start-up costs tens of seconds."""

import math
from collections.abc import Iterator

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import KV_PAGE, MAX_MODEL_LEN, Engine, Served, small_environment


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    """Engines that a test starts by itself run in its process, as the shared ones do."""
    with small_environment():
        yield


@pytest.fixture(scope="session")
def compiled(checkpoint: CheckpointFactory) -> Engine:
    """vLLM's defaults: compiled, prefix caching. `encoder.*` weights, block-causal."""
    spec = CheckpointSpec(layout="encoder", prompt_attention="block_causal", seed=0)
    return Engine.start(checkpoint(spec), Served(spec.block_length, "block_causal"))


@pytest.fixture(scope="session")
def crowded(checkpoint: CheckpointFactory) -> Engine:
    """Eager; a token budget of four blocks and a bit, KV pages for the longest request alone.

    Plain weight names; the checkpoint leaves the prompt mode to the server's options.
    """
    spec = CheckpointSpec(layout="plain", prompt_attention=None, seed=1)
    return Engine.start(
        checkpoint(spec),
        Served(spec.block_length, "block_causal", 0.7, logprobs_mode="processed_logprobs"),
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        max_num_batched_tokens=4 * spec.block_length + 3,
        max_num_seqs=4,
        num_gpu_blocks_override=1 + math.ceil(MAX_MODEL_LEN / KV_PAGE),
        enable_prefix_caching=False,
        additional_config={"edlm": {"prompt_attention": "block_causal", "threshold": 0.7}},
    )


@pytest.fixture(scope="session")
def bidirectional(checkpoint: CheckpointFactory) -> Engine:
    """A checkpoint as released: no word about prompts, so they see themselves whole.

    Served with another block length than its own, no divisor of a KV page.
    """
    spec = CheckpointSpec(layout="encoder", prompt_attention=None, block_length=16, seed=4)
    return Engine.start(
        checkpoint(spec),
        Served(12, "bidirectional", max_steps=7, logprobs_mode="processed_logits"),
        enforce_eager=True,
        logprobs_mode="processed_logits",
        diffusion_config={"canvas_length": 12, "max_denoising_steps": 7},
    )
