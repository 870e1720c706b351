"""Async scheduling: the same tokens, though a step is planned before the last one's outcome."""

import math
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import MASK_ID, CheckpointFactory, CheckpointSpec
from harness import KV_PAGE, MAX_MODEL_LEN, SMALL_ENGINE, Ask, Engine, Served, Visit, prompt
from hypothesis import given
from hypothesis import strategies as st
from oracle_reveal import RULES
from oracle_sampling import Sampling
from test_properties import BOUNDED, assert_all_exact, visits
from vllm import EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

NAMES = ["cached", "crowded", "whole_prompts"]


@pytest.fixture(scope="module")
def cached(checkpoint: CheckpointFactory) -> Engine:
    """Prefix caching, blocks on one grid."""
    spec = CheckpointSpec(layout="encoder", prompt_attention="block_causal", seed=0)
    served = Served(spec.block_length, "block_causal")
    return Engine.start(checkpoint(spec), served, enforce_eager=True, async_scheduling=True)


@pytest.fixture(scope="module")
def crowded(checkpoint: CheckpointFactory) -> Engine:
    """A token budget of four blocks and a bit, KV pages for the longest request alone."""
    spec = CheckpointSpec(layout="encoder", prompt_attention="block_causal", seed=0)
    return Engine.start(
        checkpoint(spec),
        Served(spec.block_length, "block_causal"),
        enforce_eager=True,
        async_scheduling=True,
        max_num_batched_tokens=4 * spec.block_length + 3,
        max_num_seqs=4,
        num_gpu_blocks_override=1 + math.ceil(MAX_MODEL_LEN / KV_PAGE),
    )


@pytest.fixture(scope="module")
def whole_prompts(checkpoint: CheckpointFactory) -> Engine:
    """Blocks of a length of their own that begin at the end of a bidirectional prompt."""
    spec = CheckpointSpec(layout="encoder", prompt_attention=None, block_length=16, seed=4)
    return Engine.start(
        checkpoint(spec),
        Served(12, "bidirectional", max_steps=7),
        enforce_eager=True,
        async_scheduling=True,
        num_gpu_blocks_override=12,
        diffusion_config={"canvas_length": 12, "max_denoising_steps": 7},
    )


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def test_a_step_is_planned_while_another_is_under_way(engine: Engine) -> None:
    assert engine.config.scheduler_config.async_scheduling
    assert engine.core.batch_queue_size == 2


@pytest.mark.parametrize("max_tokens", [1, 13, 60])
@pytest.mark.parametrize("threshold", [1.0, 0.6, 1e-6])
def test_a_block_costs_one_forward_more(engine: Engine, threshold: float, max_tokens: int) -> None:
    """A commit for each block but the last; instead of that, a step that came too late."""
    ask = Ask(prompt(19, seed=90), max_tokens=max_tokens, threshold=threshold)
    (expected,) = engine.assert_exact([ask])
    assert len(engine.forwards) == sum(steps + 1 for steps in expected.denoise_steps)


def test_every_step_in_generation_is_one_block_wide(engine: Engine) -> None:
    block = engine.served.block_length
    engine.assert_exact([Ask(prompt(2 * block, seed=91), max_tokens=4 * block)])
    first, *widths = [sum(step.num_tokens.values()) for step in engine.forwards]
    assert first == 3 * block
    assert set(widths) == {block}


@pytest.mark.parametrize("room", [1, 5, 21])
def test_last_block_is_shorter_at_the_end_of_the_context(cached: Engine, room: int) -> None:
    assert MAX_MODEL_LEN % cached.served.block_length
    ask = Ask(prompt(MAX_MODEL_LEN - room, seed=92), max_tokens=100)
    (expected,) = cached.assert_exact([ask])
    assert len(expected.token_ids) == room


def mixed(engine: Engine) -> list[Ask]:
    """Requests of all lengths, with all kinds of parameters; the last one stops early."""
    block = engine.served.block_length
    lengths = (1, block - 1, block, block + 1, 3 * block, 61, 90, 127)
    sampling = Sampling(
        temperature=0.9,
        seed=7,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        logit_bias=((70, 2.0),),
        min_tokens=3,
        bad_words=((80,), (81, 82)),
    )
    asks = [
        Ask(
            prompt(length, seed=100 + i),
            max_tokens=(9, 40, 17, 33, 24, 30, 48, 31)[i],
            threshold=None if i % 4 == 3 else (0.6, 1.0, 1e-6)[i % 4],
            max_steps=(None, 3, 1)[i % 3],
            ignore_eos=i % 2 == 0,
            sampling=replace(sampling, seed=i) if i in (1, 4, 6) else Sampling(),
            reveal=sorted(RULES)[i % len(RULES)] if i % 4 == 3 else None,
            canvas_length=(None, None, 3, None, 5)[i % 5],
        )
        for i, length in enumerate(lengths)
    ]
    stop = engine.expected(asks[5]).token_ids[9]
    return [*asks, replace(asks[5], stop_token_ids=(stop,))]


def test_mixed_requests(engine: Engine) -> None:
    """More requests than slots: slots are reused, by requests in another order."""
    asks = mixed(engine)
    expected = engine.assert_exact([*asks, *reversed(asks)])
    assert {oracle.finish_reason for oracle in expected} == {"stop", "length"}


def preemptions(engine: Engine) -> int:
    return sum(len(step.preempted) for step in engine.forwards)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_preempted_request_takes_up_its_block(crowded: Engine, temperature: float) -> None:
    """Four requests that outgrow the pages; what a step under way revealed is not lost."""
    sampling = Sampling(temperature=temperature, seed=3)
    asks = [
        Ask(prompt(30 + i, seed=110 + i), 90, threshold=0.8, sampling=sampling) for i in range(4)
    ]
    crowded.assert_exact(asks)
    assert preemptions(crowded) > 0


@BOUNDED
@given(mix=st.lists(visits(), min_size=6, max_size=10), name=st.sampled_from(NAMES))
def test_mixes_over_time(request: pytest.FixtureRequest, mix: list[Visit], name: str) -> None:
    """Arrivals, aborts, preemptions: whatever is under way when they happen."""
    plain = [replace(visit, ask=replace(visit.ask, logprobs=None)) for visit in mix]
    assert_all_exact(request.getfixturevalue(name), plain)


def test_cached_pages_are_final(cached: Engine) -> None:
    """An answer is found in the cache up to its last page whose blocks are all committed."""
    first = Ask(prompt(KV_PAGE + 8, seed=120), max_tokens=3 * KV_PAGE)
    answer = tuple(cached.assert_exact([first])[0].token_ids)
    turn = Ask(first.prompt + answer + prompt(9, seed=121))
    (output,) = cached.generate([turn])
    assert list(output.outputs[0].token_ids) == cached.expected(turn).token_ids
    assert output.num_cached_tokens >= 3 * KV_PAGE


def test_running_requests_survive_a_reset_of_the_cache(cached: Engine) -> None:
    """They are preempted, and the outcome of the step under way is thrown away."""
    asks = [Ask(prompt(20 + i, seed=130 + i), 40, threshold=0.6) for i in range(3)]
    llm, answers, steps = cached.llm.llm_engine, {}, 0
    for i, ask in enumerate(asks):
        llm.add_request(f"{i}", {"prompt_token_ids": list(ask.prompt)}, ask.sampling_params())
    while llm.has_unfinished_requests():
        answers |= {output.request_id: output.outputs[0] for output in llm.step()}
        steps += 1
        if steps % 3 == 0:
            assert llm.reset_prefix_cache(reset_running_requests=True)
    for i, ask in enumerate(asks):
        cached.assert_answer(ask, answers[f"{i}"], cached.expected(ask))


NOT_ASYNC = {
    "logprobs": {"logprobs": 2},
    "logprob_token_ids": {"logprob_token_ids": [7, 8]},
    "structured_outputs": {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
}


@pytest.mark.parametrize("name", NOT_ASYNC)
def test_what_needs_the_last_outcome_is_refused(cached: Engine, name: str) -> None:
    params = SamplingParams(temperature=0, **NOT_ASYNC[name])
    with pytest.raises(VLLMValidationError, match=f"{name}.*async scheduling") as refusal:
        cached.llm.generate({"prompt_token_ids": [7, 8]}, params, use_tqdm=False)
    assert refusal.value.parameter == name
    cached.assert_exact([Ask(prompt(20, seed=140))])


@pytest.mark.parametrize(
    ("architecture", "named"),
    [("Fast_dLLM_QwenForCausalLM", "token shift"), ("NemotronLabsDiffusionModel", "causal")],
)
def test_models_whose_commits_lie_differently_are_refused(
    checkpoint: CheckpointFactory, architecture: str, named: str
) -> None:
    spec = CheckpointSpec(architecture, prompt_attention=None)
    options: dict[str, Any] = SMALL_ENGINE | {"hf_overrides": {"mask_token_id": MASK_ID}}
    args = EngineArgs(model=str(checkpoint(spec)), async_scheduling=True, **options)
    with pytest.raises(ValueError, match=f"async scheduling.*{named}"):
        args.create_engine_config()


def test_a_causal_past_on_the_grid_is_refused(checkpoint: CheckpointFactory) -> None:
    spec = CheckpointSpec(prompt_attention="causal_grid")
    args = EngineArgs(model=str(checkpoint(spec)), async_scheduling=True, **SMALL_ENGINE)
    with pytest.raises(ValueError, match=r"async scheduling.*'causal_grid'"):
        args.create_engine_config()


def test_a_block_length_that_follows_the_load_is_refused(checkpoint: CheckpointFactory) -> None:
    options: dict[str, Any] = SMALL_ENGINE | {"async_scheduling": True}
    args = EngineArgs(
        model=str(checkpoint(CheckpointSpec())),
        additional_config={"edlm": {"adaptive_canvas": True}},
        **options,
    )
    with pytest.raises(ValueError, match=r"async scheduling.*adaptive_canvas"):
        args.create_engine_config()
