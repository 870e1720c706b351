"""The reveal rules: tokens and forwards are the oracle's, and no two rules do the same."""

from dataclasses import replace

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import Ask, Engine, Served, prompt
from oracle import OracleResult
from oracle_reveal import RULES
from oracle_sampling import Sampling

THRESHOLDS = {"confidence": 0.4, "margin": 0.3, "entropy": 1.0, "factor": 0.6, "prefix": 0.3}
FREE = Ask(prompt(27, seed=203), max_tokens=40, threshold=None)


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def assert_costs(engine: Engine, asks: list[Ask]) -> list[OracleResult]:
    """Exact tokens, at exactly the oracle's number of denoise steps."""
    expected = engine.assert_exact(asks)
    denoised = sum(len(step.num_drafts) for step in engine.forwards)
    assert denoised == sum(sum(oracle.denoise_steps) for oracle in expected)
    return expected


@pytest.mark.parametrize("rule", RULES)
def test_rule_with_its_own_threshold(engine: Engine, rule: str) -> None:
    assert_costs(engine, [replace(FREE, reveal=rule)])


@pytest.mark.parametrize("rule", THRESHOLDS)
def test_rule_with_a_threshold(engine: Engine, rule: str) -> None:
    ask = replace(FREE, reveal=rule, threshold=THRESHOLDS[rule])
    (expected,) = assert_costs(engine, [ask])
    default = engine.expected(replace(ask, threshold=None))
    assert expected.revealed != default.revealed
    assert max(expected.revealed) > 1


@pytest.mark.parametrize("max_steps", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rule_within_few_steps(engine: Engine, rule: str, max_steps: int) -> None:
    (expected,) = assert_costs(engine, [replace(FREE, reveal=rule, max_steps=max_steps)])
    assert max(expected.denoise_steps) <= max_steps


def test_steps_are_as_many_as_asked_for(engine: Engine) -> None:
    ask = replace(FREE, prompt=prompt(24, seed=301), reveal="steps", max_steps=3)
    (expected,) = assert_costs(engine, [ask])
    assert set(expected.denoise_steps[:-1]) == {3}


@pytest.mark.parametrize("seed", [None, 5])
def test_all_rules_at_once(engine: Engine, seed: int | None) -> None:
    sampling = Sampling(temperature=0.0 if seed is None else 1.2, seed=seed)
    asks = [
        replace(FREE, reveal=rule, threshold=THRESHOLDS.get(rule), sampling=sampling)
        for rule in RULES
    ]
    expected = assert_costs(engine, asks)
    assert len({tuple(oracle.revealed) for oracle in expected}) == len(RULES)


def test_rules_survive_preemption(crowded: Engine) -> None:
    asks = [
        Ask(prompt(40 + i, seed=310 + i), 60, THRESHOLDS.get(rule), reveal=rule)
        for i, rule in enumerate(RULES)
    ]
    assert_costs(crowded, asks)
    assert sum(len(step.preempted) for step in crowded.forwards) > 1


def test_the_servers_rule_and_threshold_are_defaults(checkpoint: CheckpointFactory) -> None:
    """The server's threshold belongs to its rule: other rules keep their own."""
    spec = CheckpointSpec(seed=5)
    served = Served(spec.block_length, "block_causal", threshold=0.35, reveal="margin")
    engine = Engine.start(
        checkpoint(spec),
        served,
        enforce_eager=True,
        additional_config={"edlm": {"reveal": "margin", "threshold": 0.35}},
    )
    asks = [FREE, replace(FREE, reveal="confidence"), replace(FREE, threshold=0.8)]
    first, *others = assert_costs(engine, asks)
    assert all(first.revealed != other.revealed for other in others)
    by_wrong_default = engine.expected(replace(asks[1], threshold=0.35))
    assert others[0].revealed != by_wrong_default.revealed
