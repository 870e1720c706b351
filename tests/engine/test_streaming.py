"""Emission: after every step the new part of the known run, at once."""

from dataclasses import replace

import pytest
from harness import Ask, Engine, prompt
from vllm.sampling_params import RequestOutputKind


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def streamed(engine: Engine, ask: Ask) -> list[list[int]]:
    """Token ids that each step of the engine emitted, empty lists left out."""
    params = ask.sampling_params()
    params.output_kind = RequestOutputKind.DELTA
    core = engine.llm.llm_engine
    core.add_request("streamed", {"prompt_token_ids": list(ask.prompt)}, params)
    runs = []
    while core.has_unfinished_requests():
        runs += [list(output.outputs[0].token_ids) for output in core.step()]
    return [run for run in runs if run]


@pytest.mark.parametrize("threshold", [1.0, 0.6, 1e-6])
def test_each_step_emits_the_new_known_run(engine: Engine, threshold: float) -> None:
    ask = Ask(prompt(21, seed=90), max_tokens=37, threshold=threshold)
    expected = [run for run in engine.expected(ask).emitted if run]
    assert len(expected) > 3
    assert streamed(engine, ask) == expected


def inner_token(runs: list[list[int]]) -> int:
    """A token that first occurs inside a run of several, not at its end."""
    seen: set[int] = set()
    for run in runs:
        for token in run[:-1]:
            if token not in seen and seen:
                return token
            seen.add(token)
        seen.add(run[-1])
    raise AssertionError("choose another prompt")


def test_nothing_is_emitted_behind_a_stop(engine: Engine) -> None:
    ask = Ask(prompt(21, seed=90), max_tokens=37, threshold=1e-6)
    whole = [run for run in engine.expected(ask).emitted if run]
    stop = inner_token(whole)
    runs = streamed(engine, replace(ask, stop_token_ids=(stop,)))
    *before, cut = whole[: len(runs)]
    assert runs == [*before, cut[: cut.index(stop) + 1]]
    assert runs[-1] != cut
