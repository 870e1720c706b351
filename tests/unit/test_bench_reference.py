"""The plain transformers loop against the oracle."""

import math

import pytest
import torch
from checkpoints import EOS_ID, MASK_ID, VOCABULARY_SIZE, CheckpointFactory, CheckpointSpec
from oracle import OracleResult, generate
from oracle_model import OracleModel

from vllm_edlm.bench.load import Load
from vllm_edlm.bench.reference import Reference, reveal

B = 8
OUTPUT_LENGTH = 22
LENGTHS = (5, 16, 1)
PROMPTS = [
    torch.randint(5, VOCABULARY_SIZE - 1, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in LENGTHS
]
FIXED = {"diffusion_threshold": 1.0, "diffusion_max_steps": 3}


def load(ignore_eos: bool = True, **options: float) -> Load:
    return Load(
        concurrency=2,
        num_requests=len(PROMPTS),
        prompt_length=0,
        output_length=OUTPUT_LENGTH,
        options=options,
        prompts=PROMPTS,
        ignore_eos=ignore_eos,
    )


def oracle(model: OracleModel, prompt: list[int], load: Load) -> OracleResult:
    options = load.options
    return generate(
        model,
        prompt,
        block_length=options.get("diffusion_canvas_length", B),
        mask_token_id=MASK_ID,
        prompt_attention="bidirectional",
        max_tokens=OUTPUT_LENGTH,
        max_model_len=1000,
        threshold=options.get("diffusion_threshold"),
        max_steps=options.get("diffusion_max_steps"),
        eos_token_id=EOS_ID,
        ignore_eos=load.ignore_eos,
    )


@pytest.mark.parametrize("layout", ["plain", "encoder"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"diffusion_threshold": 0.3},
        FIXED,
        {"diffusion_threshold": 0.5, "diffusion_canvas_length": 4, "diffusion_max_steps": 2},
    ],
)
def test_tokens_are_the_oracles(
    checkpoint: CheckpointFactory, layout: str, options: dict[str, float]
) -> None:
    path = checkpoint(CheckpointSpec(layout=layout))
    asked = load(**options)
    result = Reference.load(path).measure(asked)
    for prompt, trace in zip(PROMPTS, result.traces, strict=True):
        expected = oracle(OracleModel.load(path), prompt, asked)
        assert trace.tokens == expected.token_ids
        # The oracle stops as soon as it has enough tokens, the loop completes its block.
        assert sum(expected.denoise_steps[:-1]) < trace.denoise_steps
        assert sum(expected.denoise_steps) <= trace.denoise_steps


def test_eos_ends_a_request(checkpoint: CheckpointFactory) -> None:
    reference = Reference.load(checkpoint(CheckpointSpec()))
    free = reference.measure(load(**FIXED)).traces
    # A token that the model does write takes the place of EOS.
    eos = free[0].tokens[10]
    reference.model.config.eos_token_id = eos
    ended = reference.measure(load(ignore_eos=False, **FIXED)).traces
    assert [trace.tokens for trace in ended] == [
        trace.tokens[: trace.tokens.index(eos) + 1] if eos in trace.tokens else trace.tokens
        for trace in free
    ]


def test_forwards_are_prefill_denoise_steps_and_one_commit_a_block(
    checkpoint: CheckpointFactory,
) -> None:
    path = checkpoint(CheckpointSpec(config_overrides={"torch_dtype": "bfloat16"}))
    reference = Reference.random(path)
    assert reference.model.dtype is torch.bfloat16
    result = reference.measure(load(**FIXED))
    blocks = math.ceil(OUTPUT_LENGTH / B)
    for trace in result.traces:
        assert trace.denoise_steps == blocks * 3
        assert len(trace.times) == blocks
    assert len(result.forwards) == len(PROMPTS) * (1 + blocks * (3 + 1))
    prefill, denoise, *_, commit = result.forwards[: 1 + 3 + 1]
    assert (prefill.rows, prefill.kv_lengths, prefill.logits_rows) == ((5,), (5,), 0)
    assert (denoise.rows, denoise.kv_lengths, denoise.logits_rows) == ((B,), (5 + B,), B)
    assert (commit.rows, commit.kv_lengths, commit.logits_rows) == ((B,), (5 + B,), 0)


def test_requests_arrive_as_in_a_closed_loop(checkpoint: CheckpointFactory) -> None:
    first, second, third = Reference.random(checkpoint(CheckpointSpec())).measure(load()).traces
    assert first.start == second.start
    assert third.start == first.times[-1]


def test_reveal() -> None:
    mask = 3
    canvas = torch.tensor([mask, 1, mask, mask])
    probability = torch.tensor(
        [[0.1, 0.2, 0.6, 0.1], [0.9, 0.0, 0.0, 0.1], [0.3, 0.2, 0.1, 0.4], [0.8, 0.1, 0.1, 0.0]]
    )
    logits = probability.log()
    assert reveal(canvas, logits, mask, 0.5, 4).tolist() == [2, 1, mask, 0]
    assert reveal(canvas, logits, mask, 0.9, 4).tolist() == [mask, 1, mask, 0]
    assert reveal(canvas, logits, mask, 0.9, 2).tolist() == [2, 1, mask, 0]
    assert reveal(canvas, logits, mask, 0.9, 1).tolist() == [2, 1, 0, 0]
