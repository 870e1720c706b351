"""Load-aware block lengths: any blocks that the load makes are decoded exactly."""

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from given_blocks import AdaptiveEngine
from harness import MAX_MODEL_LEN, Ask, Engine, Served, Visit, prompt
from oracle_sampling import Sampling

FULL_LENGTH, BUDGET = 16, 32


@pytest.fixture(scope="module", params=["block_causal", "bidirectional"])
def adaptive(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> AdaptiveEngine:
    spec = CheckpointSpec(block_length=FULL_LENGTH, prompt_attention=request.param, seed=6)
    engine = Engine.start(
        checkpoint(spec),
        Served(FULL_LENGTH, request.param),
        enforce_eager=True,
        additional_config={"edlm": {"adaptive_canvas": BUDGET}},
    )
    return AdaptiveEngine(engine)


def test_alone_blocks_have_their_full_length(adaptive: AdaptiveEngine) -> None:
    ask = Ask(prompt(45, seed=800), max_tokens=50)
    expected = adaptive.engine.expected(ask)
    adaptive.assert_exact([Visit(ask)])
    (output,) = adaptive.engine.generate([ask])
    assert list(output.outputs[0].token_ids) == expected.token_ids
    blocks = {
        "block_causal": [range(32, 48), range(48, 64), range(64, 80), range(80, 96)],
        "bidirectional": [range(45, 61), range(61, 77), range(77, 93), range(93, 109)],
    }
    assert adaptive.blocks[ask.prompt] == blocks[adaptive.engine.served.prompt_attention]


@pytest.mark.parametrize(("num_requests", "length"), [(3, 8), (8, 4)])
def test_together_blocks_are_shorter(
    adaptive: AdaptiveEngine, num_requests: int, length: int
) -> None:
    # Prompts that end at borders of every length.
    asks = [Ask(prompt(32, seed=810 + i), max_tokens=32) for i in range(num_requests)]
    adaptive.assert_exact([Visit(ask) for ask in asks])
    assert all(adaptive.lengths(ask)[0] == length for ask in asks)


@pytest.mark.parametrize(("max_steps", "length"), [(1, 16), (2, 8), (4, 4), (16, 4)])
def test_tokens_per_step_stay_as_asked(
    adaptive: AdaptiveEngine, max_steps: int, length: int
) -> None:
    asks = [
        Ask(prompt(32, seed=820 + i), max_tokens=48, threshold=1.0, max_steps=max_steps)
        for i in range(8)
    ]
    adaptive.assert_exact([Visit(ask) for ask in asks])
    assert adaptive.lengths(asks[0]) == [length] * (48 // length)
    denoises = [step for step in adaptive.engine.forwards if step.num_drafts]
    assert len(denoises) == 48 // 16 * max_steps


@pytest.mark.parametrize("seed", range(3))
def test_as_the_load_comes_and_goes(adaptive: AdaptiveEngine, seed: int) -> None:
    visits = [
        Visit(
            Ask(
                prompt(1 + (37 * i + 11 * seed) % 120, seed=830 + 20 * seed + i),
                max_tokens=10 + (29 * i) % 70,
                threshold=(0.3, 0.6, 0.9)[i % 3],
                max_steps=(None, 2, 5)[i % 3],
                sampling=Sampling(temperature=1.0, seed=i) if i % 4 == 1 else Sampling(),
            ),
            arrival=(5 * i) % 40,
        )
        for i in range(12)
    ]
    adaptive.assert_exact(visits)
    assert {len(b) for blocks in adaptive.blocks.values() for b in blocks} == {4, 8, 16}


def test_to_the_end_of_the_context(adaptive: AdaptiveEngine) -> None:
    visits = [
        Visit(Ask(prompt(MAX_MODEL_LEN - room, seed=860 + room), max_tokens=99), arrival=room)
        for room in (1, 2, 3, 7, 11, 18)
    ]
    adaptive.assert_exact(visits)
