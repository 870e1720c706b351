"""Two workers, by tensors or by layers: each answer is the oracle's, as with one process.

Such an engine is ended by its workers alone: the engine core's own shutdown would destroy this
process's parallel groups, and with them those of every other engine of the tests.
"""

import math
import os
import random
import signal
from collections.abc import Iterator

import pytest
import ray
from checkpoints import EOS_ID, MASK_ID, VOCABULARY, CheckpointFactory, CheckpointSpec
from given_blocks import AdaptiveEngine
from harness import KV_PAGE, MAX_MODEL_LEN, Ask, Engine, Served, Visit, prompt
from oracle import generate
from oracle_sampling import Sampling
from ray_nodes import two_raylets
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

SPEC = CheckpointSpec(layout="encoder", prompt_attention="block_causal", seed=0)
LAYOUTS = {"tensor": {"tensor_parallel_size": 2}, "pipeline": {"pipeline_parallel_size": 2}}
# Pages for the longest request alone, and a step for less than most prompts.
CROWDED = {
    "max_num_batched_tokens": 4 * SPEC.block_length + 3,
    "num_gpu_blocks_override": 1 + math.ceil(MAX_MODEL_LEN / KV_PAGE),
}
SEEDED = Sampling(
    temperature=1.2, seed=5, top_p=0.9, repetition_penalty=1.2, bad_words=((80,), (81, 82))
)


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> Iterator[Engine]:
    """Two processes on this machine."""
    engine = start(checkpoint, "mp", **LAYOUTS[request.param], **CROWDED)
    yield engine
    engine.core.model_executor.shutdown()


@pytest.fixture(scope="module")
def raylets() -> Iterator[None]:
    with two_raylets():
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def over_ray(
    request: pytest.FixtureRequest, raylets: None, checkpoint: CheckpointFactory
) -> Iterator[AdaptiveEngine]:
    """A worker on each raylet, block lengths that follow the load."""
    options = {"additional_config": {"edlm": {"adaptive_canvas": 16}}}
    engine = start(checkpoint, "ray", **LAYOUTS[request.param], **options)
    yield AdaptiveEngine(engine)
    engine.core.model_executor.shutdown()
    # Ray frees it when the process ends; the next engine needs its room.
    ray.util.remove_placement_group(engine.config.parallel_config.placement_group)


def start(checkpoint: CheckpointFactory, executor: str, **options: object) -> Engine:
    return Engine.start(
        checkpoint(SPEC),
        Served(SPEC.block_length, "block_causal"),
        enforce_eager=True,
        distributed_executor_backend=executor,
        **options,
    )


def several(seed: int, **options: object) -> list[Ask]:
    """Eight requests: lengths around blocks, thresholds, ends; greedy and seeded."""
    block = SPEC.block_length
    lengths = (1, block - 1, block, block + 1, 3 * block, 61, 90, 127)
    return [
        Ask(
            prompt(length, seed=900 + i),
            max_tokens=(9, 40, 17, 33, 24, 1, 48, 31)[(i + seed) % 8],
            threshold=(0.6, 1.0, 1e-6, 0.3)[(i + seed) % 4],
            max_steps=(None, 3, 1)[(i + seed) % 3],
            ignore_eos=i % 2 == 0,
            sampling=(Sampling(), SEEDED, Sampling(temperature=0.7, seed=i))[(i + seed) % 3],
            **options,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_several_requests_at_once(engine: Engine, seed: int) -> None:
    engine.assert_exact(several(seed))
    assert max(len(step.num_tokens) for step in engine.forwards) > 2
    assert any(step.preempted for step in engine.steps)


@pytest.mark.parametrize("room", [1, 2, 20])
def test_few_tokens_take_several_steps(engine: Engine, room: int) -> None:
    """The first step of a request that wants one token need not be its last."""
    asks = [Ask(prompt(9 + i, seed=910 + i), max_tokens=room, threshold=1.0) for i in range(3)]
    expected = engine.assert_exact(asks)
    assert all(oracle.denoise_steps[0] > 1 for oracle in expected)


def test_a_long_prompt_runs_in_chunks(engine: Engine) -> None:
    """Some steps have no masked position, so no row of logits."""
    engine.assert_exact([Ask(prompt(127, seed=920))])
    assert [bool(step.num_drafts) for step in engine.forwards[:4]] == [False, False, False, True]


def test_a_prompt_is_found_in_the_cache(engine: Engine) -> None:
    ask = Ask(prompt(3 * KV_PAGE + 9, seed=930), sampling=SEEDED)
    engine.assert_exact([ask])
    engine.assert_exact([ask])
    (computed,) = engine.forwards[0].num_tokens.values()
    # Not so in the first run, whose steps are shorter than the prompt.
    assert engine.forwards[0].num_drafts
    assert computed < len(ask.prompt)


def test_block_lengths_and_logprobs_of_requests(engine: Engine) -> None:
    block_lengths = (None, 3, 8, 5)
    engine.assert_exact(
        [
            Ask(prompt(20 + i, seed=940 + i), canvas_length=length, logprobs=2, reveal=rule)
            for i, length in enumerate(block_lengths)
            for rule in ("margin", "prefix")
        ]
    )


def test_requests_come_and_are_aborted(engine: Engine) -> None:
    """A slot that a request has left under way serves the next one."""
    rng = random.Random(3)
    visits = [
        Visit(ask, rng.randrange(20), 12 if i % 3 == 0 else None)
        for i, ask in enumerate(several(1) + several(2))
    ]
    for visit, got in zip(visits, engine.serve_over_time(visits), strict=True):
        expected = engine.expected(visit.ask)
        if got is not None and got.finish_reason is not None:
            engine.assert_answer(visit.ask, got, expected)
        else:
            assert visit.abort is not None
            begun = list(got.token_ids) if got is not None else []
            assert begun == expected.token_ids[: len(begun)]


def test_what_a_grammar_cuts_is_masked_again(engine: Engine) -> None:
    """The scheduler takes fewer tokens than were emitted; every worker must follow it."""
    letters = "abcdefghijklm"
    ids, length = [VOCABULARY.index(letter) for letter in letters], 21
    ask = Ask(prompt(29, seed=950), max_tokens=40, reveal="prefix", ignore_eos=False)
    expected = generate(
        engine.oracle,
        ask.prompt,
        block_length=SPEC.block_length,
        mask_token_id=MASK_ID,
        prompt_attention="block_causal",
        max_tokens=ask.max_tokens,
        max_model_len=MAX_MODEL_LEN,
        rule="prefix",
        threshold=ask.threshold,
        max_steps=SPEC.block_length,
        eos_token_id=EOS_ID,
        grammar=lambda emitted: ids if len(emitted) < length else [EOS_ID],
    )
    params = ask.sampling_params()
    params.structured_outputs = StructuredOutputsParams(regex=f"[{letters}]{{{length}}}")
    (got,) = engine.llm.generate({"prompt_token_ids": list(ask.prompt)}, params, use_tqdm=False)
    engine.assert_answer(ask, got.outputs[0], expected)
    assert len(expected.token_ids) == length + 1


def test_a_dead_worker_fails_the_engine(engine: Engine) -> None:
    """Last of all: no request waits for ever for a worker that was killed."""
    executor = engine.core.model_executor
    assert type(executor) is MultiprocExecutor
    os.kill(executor.workers[1].proc.pid, signal.SIGKILL)
    with pytest.raises((RuntimeError, AssertionError)):
        engine.generate([Ask(prompt(9))])
    with pytest.raises(AssertionError, match="died in an earlier step"):
        engine.generate([Ask(prompt(9))])


def test_each_raylet_has_a_worker(over_ray: AdaptiveEngine) -> None:
    executor = over_ray.engine.core.model_executor
    assert isinstance(executor, RayExecutorV2)
    nodes = [worker.node_id for worker in executor.ray_worker_handles]
    assert len(nodes) == len({*nodes}) == len(ray.nodes()) == 2


def test_requests_alone_over_ray(over_ray: AdaptiveEngine) -> None:
    for ask in several(0)[2:7]:
        over_ray.engine.assert_exact([ask])


def test_several_requests_over_ray(over_ray: AdaptiveEngine) -> None:
    """Blocks are halved under load, in every worker."""
    visits = [Visit(ask, arrival=3 * i) for i, ask in enumerate(several(0))]
    over_ray.assert_exact(visits)
    assert {len(b) for blocks in over_ray.blocks.values() for b in blocks} == {4, 8}
