"""Block lengths of requests: the answers of a server with that block length, side by side."""

from dataclasses import replace

import pytest
from harness import KV_PAGE, MAX_MODEL_LEN, Ask, Engine, prompt
from oracle_sampling import Sampling


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("canvas_length", [1, 3, 4, 7])
def test_own_block_length(engine: Engine, canvas_length: int) -> None:
    ask = Ask(prompt(45, seed=400), max_tokens=41, threshold=0.3, canvas_length=canvas_length)
    (expected,) = engine.assert_exact([ask])
    assert expected.token_ids != engine.expected(replace(ask, canvas_length=None)).token_ids
    denoises = [step for step in engine.forwards if step.num_drafts]
    assert len(denoises) == sum(expected.denoise_steps)
    assert max(drafts for step in denoises for drafts in step.num_drafts.values()) <= canvas_length


def test_the_served_block_length_by_name(engine: Engine) -> None:
    ask = Ask(prompt(45, seed=401), canvas_length=engine.served.block_length)
    named, unnamed = engine.assert_exact([ask, replace(ask, canvas_length=None)])
    assert named.token_ids == unnamed.token_ids


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33])
def test_prompts_around_own_borders(engine: Engine, length: int) -> None:
    engine.assert_exact([Ask(prompt(length, seed=402), threshold=0.3, canvas_length=4)])


@pytest.mark.parametrize("max_steps", [1, 2])
def test_steps_within_own_blocks(engine: Engine, max_steps: int) -> None:
    ask = Ask(prompt(30, seed=403), threshold=1.0, max_steps=max_steps, canvas_length=4)
    (expected,) = engine.assert_exact([ask])
    assert max(expected.denoise_steps) == max_steps


@pytest.mark.parametrize("room", [1, 5, 11])
def test_last_block_is_shorter_at_the_end_of_the_context(engine: Engine, room: int) -> None:
    ask = Ask(prompt(MAX_MODEL_LEN - room, seed=404), max_tokens=100, canvas_length=3)
    (expected,) = engine.assert_exact([ask])
    assert len(expected.token_ids) == room


def test_noise_is_keyed_by_own_block_length(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    engine.assert_exact(
        [Ask(prompt(30, seed=405), sampling=sampling, canvas_length=b) for b in (3, 4, 8)]
    )


def mixed(seed: int) -> list[Ask]:
    """One prompt's beginnings, under every block length at once."""
    return [
        Ask(
            prompt(30 + 5 * i, seed=seed),
            max_tokens=20 + 3 * i,
            threshold=(0.6, 0.2)[i % 2],
            canvas_length=canvas_length,
        )
        for i, canvas_length in enumerate((1, 2, 3, 4, 5, 7, 8, None))
    ]


@pytest.mark.parametrize("name", ["compiled", "crowded", "bidirectional"])
def test_all_block_lengths_at_once(request: pytest.FixtureRequest, name: str) -> None:
    engine = request.getfixturevalue(name)
    engine.assert_exact(mixed(seed=406))
    engine.assert_exact([*reversed(mixed(seed=406))])


def test_chunked_and_preempted(crowded: Engine) -> None:
    asks = [
        Ask(prompt(50 + 9 * i, seed=410 + i), 60, threshold, canvas_length=canvas_length)
        for i, (threshold, canvas_length) in enumerate([(1.0, 3), (0.3, 4), (1.0, 5), (0.3, None)])
    ]
    crowded.assert_exact(asks)
    assert sum(len(step.preempted) for step in crowded.forwards) > 1


def cached(engine: Engine, ask: Ask) -> int:
    """Serve `ask` exactly; prompt tokens found in the cache."""
    expected = engine.expected(ask)
    (output,) = engine.generate([ask])
    engine.assert_answer(ask, output.outputs[0], expected)
    return output.num_cached_tokens or 0


def test_keys_and_values_are_shared_within_a_block_length(compiled: Engine) -> None:
    """They depend on the block length, for a position sees its whole block."""
    ask = Ask(prompt(3 * KV_PAGE + 5, seed=420))
    shorter = replace(ask, canvas_length=4)
    shortest = replace(ask, canvas_length=2)
    found = [cached(compiled, a) for a in (ask, shorter, shorter, shortest, ask, shortest)]
    assert found == [0, 0, 3 * KV_PAGE, 0, 3 * KV_PAGE, 3 * KV_PAGE]


def test_the_served_block_length_by_name_shares_with_the_unnamed(compiled: Engine) -> None:
    ask = Ask(prompt(2 * KV_PAGE + 5, seed=421))
    named = replace(ask, canvas_length=compiled.served.block_length)
    assert [cached(compiled, a) for a in (ask, named)] == [0, 2 * KV_PAGE]


@pytest.mark.parametrize("canvas_length", [3, 5, 7])
def test_blocks_that_straddle_pages(compiled: Engine, canvas_length: int) -> None:
    """A full page then ends inside a block, whose rest its keys and values depend on."""
    beginning = prompt(2 * KV_PAGE, seed=422 + canvas_length)
    for i in range(3):
        ask = Ask(beginning + prompt(40, seed=430 + i), canvas_length=canvas_length)
        for _ in range(2):
            cached(compiled, ask)


def test_answers_are_reused_in_the_next_turn(compiled: Engine) -> None:
    first = Ask(prompt(KV_PAGE + 8, seed=440), max_tokens=3 * KV_PAGE, canvas_length=4)
    turn = first.prompt + tuple(compiled.expected(first).token_ids) + prompt(9, seed=441)
    assert cached(compiled, first) == 0
    assert cached(compiled, Ask(turn, canvas_length=4)) >= 3 * KV_PAGE
    assert cached(compiled, Ask(turn)) == 0
