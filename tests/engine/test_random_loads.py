"""Random loads on engines short of everything: pages, slots and token budget."""

import random

import pytest
from checkpoints import MASK_ID, CheckpointFactory, CheckpointSpec
from harness import KV_PAGE, Ask, Engine, Served, prompt

# Least that holds a request of the longest context, and a little more.
PAGES = 10
QWEN3, FAST_DLLM = "EfficientDLM", "Fast_dLLM_QwenForCausalLM"
NEMOTRON = "NemotronLabsDiffusionModel"
SHIFTED = {"hf_overrides": {"token_shift": True, "dlm_type": "dream"}}
CASES = {
    "cached": (QWEN3, "block_causal", 8, {"max_num_batched_tokens": 64, "max_num_seqs": 4}),
    "whole page": (QWEN3, "block_causal", KV_PAGE, {"max_num_batched_tokens": 100}),
    "two slots": (QWEN3, "block_causal", 5, {"max_num_batched_tokens": 11, "max_num_seqs": 2}),
    "whole prompts": (QWEN3, "bidirectional", 4, {"max_num_batched_tokens": 70}),
    "token shift": (FAST_DLLM, "block_causal", 8, {"max_num_batched_tokens": 40}),
    "shifted whole prompts": (
        QWEN3,
        "bidirectional",
        4,
        {"max_num_batched_tokens": 73, **SHIFTED},
    ),
    "causal": (NEMOTRON, "causal", 8, {"max_num_batched_tokens": 40}),
    "causal grid": (QWEN3, "causal_grid", 8, {"max_num_batched_tokens": 40}),
}


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> Engine:
    architecture, mode, block_length, options = CASES[request.param]
    spec = CheckpointSpec(architecture, prompt_attention=mode, block_length=block_length, seed=8)
    options = {
        "enforce_eager": True,
        "num_gpu_blocks_override": PAGES,
        # Some releases name neither in their config.json.
        "hf_overrides": {"mask_token_id": MASK_ID},
        "diffusion_config": {"canvas_length": block_length},
        **options,
    }
    token_shift = architecture == FAST_DLLM or "token_shift" in options["hf_overrides"]
    served = Served(block_length, mode, token_shift=token_shift)
    return Engine.start(checkpoint(spec), served, **options)


def random_ask(rng: random.Random, block_length: int) -> Ask:
    """Few seeds, so that prompts often share their beginning."""
    lengths = (1, block_length, block_length + 1, KV_PAGE, 2 * KV_PAGE, rng.randint(1, 69))
    return Ask(
        prompt(rng.choice(lengths), seed=rng.randint(0, 2)),
        max_tokens=rng.choice((rng.randint(1, 20), rng.randint(60, 150))),
        threshold=rng.choice((1.0, 0.6, 0.3, 1e-6, None)),
        max_steps=rng.choice((None, None, 1, min(3, block_length))),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=tuple(rng.sample(range(5, 150), rng.choice((0, 0, 6)))),
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_load(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    asks = [random_ask(rng, engine.served.block_length) for _ in range(rng.randint(4, 10))]
    expected = engine.assert_exact(asks)
    denoised = sum(len(step.num_drafts) for step in engine.forwards)
    assert denoised == sum(sum(oracle.denoise_steps) for oracle in expected)


def computed_at_starts(engine: Engine, request: str) -> list[int]:
    """Known tokens that a request's first forward ran, and each forward after a preemption."""
    computed, waits = [], True
    for step in engine.forwards:
        waits |= request in step.preempted
        if waits and request in step.num_tokens:
            computed.append(step.num_tokens[request] - step.num_drafts.get(request, 0))
            waits = False
    return computed


def test_preempted_requests_find_their_pages_in_the_cache(checkpoint: CheckpointFactory) -> None:
    """Some resume with less to compute than their prompt was, though they know more by then."""
    spec = CheckpointSpec(seed=9)
    served = Served(spec.block_length, "block_causal")
    options = {"enforce_eager": True, "num_gpu_blocks_override": PAGES}
    engine = Engine.start(checkpoint(spec), served, **options)
    asks = [Ask(prompt(66 + i, seed=100 + i), max_tokens=80, threshold=1.0) for i in range(4)]
    engine.assert_exact(asks)
    preempted = {request for step in engine.forwards for request in step.preempted}
    runs = [computed_at_starts(engine, request) for request in preempted]
    assert any(0 < resumed < first for first, *again in runs for resumed in again)
