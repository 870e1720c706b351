"""What a block costs: d denoise steps are d forwards, the prompt's and the commits' included."""

import pytest
from harness import Ask, Engine, prompt


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("threshold", [1.0, 0.6, 1e-6])
@pytest.mark.parametrize("length", [1, 16, 45])
def test_a_block_costs_its_denoise_steps(engine: Engine, threshold: float, length: int) -> None:
    ask = Ask(
        prompt(length, seed=70), max_tokens=5 * engine.served.block_length, threshold=threshold
    )
    (expected,) = engine.assert_exact([ask])
    denoises = [step for step in engine.forwards if step.num_drafts]
    assert len(denoises) == sum(expected.denoise_steps)
    assert len(engine.forwards) == len(denoises)  # the prompt's is the first denoise step's


def test_commits_ride_on_the_next_block(engine: Engine) -> None:
    """Every generated block but the last is run once more, in the next block's first step."""
    block = engine.served.block_length
    ask = Ask(prompt(2 * block, seed=71), max_tokens=4 * block, threshold=1e-6)
    engine.assert_exact([ask])
    widths = [sum(step.num_tokens.values()) for step in engine.forwards]
    assert widths == [3 * block, 2 * block, 2 * block, 2 * block]


def test_a_stop_abandons_the_block(engine: Engine) -> None:
    """The stop token stands before the block's end: what is masked behind it is not run."""
    whole = engine.expected(Ask(prompt(30, seed=72), max_tokens=60, threshold=1.0))
    for stop in whole.token_ids[5:25]:
        ask = Ask(prompt(30, seed=72), max_tokens=60, threshold=1.0, stop_token_ids=(stop,))
        (expected,) = engine.assert_exact([ask])
        assert len([s for s in engine.forwards if s.num_drafts]) == sum(expected.denoise_steps)
        if expected.masked[-1] > expected.revealed[-1]:
            return
    pytest.fail("no stop token came before the end of its block")


@pytest.mark.parametrize(
    ("length", "beginning"),
    [(40, [(32, 0), (16, 8)]), (32, [(32, 0), (8, 8)]), (24, [(32, 8)]), (70, [(32, 0)] * 2)],
)
def test_a_prompts_end_runs_beside_the_open_block_if_both_fit(
    crowded: Engine, length: int, beginning: list[tuple[int, int]]
) -> None:
    """The budget is 35 tokens: whole blocks of a prompt, then what is left of it."""
    assert crowded.config.scheduler_config.max_num_batched_tokens == 35
    crowded.assert_exact([Ask(prompt(length, seed=73))])
    runs = [
        (sum(step.num_tokens.values()), sum(step.num_drafts.values())) for step in crowded.forwards
    ]
    assert runs[: len(beginning)] == beginning
    assert all(drafts for _, drafts in runs[2:])
