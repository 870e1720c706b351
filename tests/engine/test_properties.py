"""Any mix of requests, arrivals, aborts and preemptions: each answer is the oracle's."""

from functools import partial

import pytest
from harness import Ask, Engine, Visit, prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import OracleResult
from oracle_model import OracleModel
from oracle_reveal import RULES
from oracle_rounding import RoundedModel, assert_possible
from oracle_sampling import Sampling
from vllm import CompletionOutput

# Left to chance are the requests, not the examples: a failure must come back.
BOUNDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    suppress_health_check=list(HealthCheck),
)
LETTERS = st.integers(6, 149)


def often(default: object, values: st.SearchStrategy) -> st.SearchStrategy:
    """The default in half of the cases, so that parameters come alone and in company."""
    return st.just(default) | values


# Nothing that makes the model ever surer of one token: where probabilities round to one, the
# order of positions is that of rounding errors.
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.4, 1.0, 1.8]),
    seed=st.integers(0, 2**63 - 1),
    top_k=often(0, st.integers(1, 50)),
    top_p=often(1.0, st.floats(0.1, 1.0)),
    min_p=often(0.0, st.floats(0.0, 0.5)),
    repetition_penalty=often(1.0, st.floats(0.9, 2.0)),
    frequency_penalty=often(0.0, st.floats(-0.1, 2.0)),
    presence_penalty=often(0.0, st.floats(-1.0, 2.0)),
    logit_bias=often((), st.dictionaries(LETTERS, st.floats(-9, 4)).map(lambda d: (*d.items(),))),
    allowed_token_ids=often((), st.sets(LETTERS, min_size=20, max_size=60).map(tuple)),
    min_tokens=often(0, st.integers(1, 5)),
    bad_words=often(
        (), st.lists(st.lists(LETTERS, min_size=1, max_size=3).map(tuple), max_size=12).map(tuple)
    ),
)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    """Prompts of few seeds, so that they share beginnings."""
    canvas_length = draw(often(None, st.integers(1, 8)))
    rule = draw(often(None, st.sampled_from(sorted(RULES))))
    return Ask(
        prompt(draw(st.integers(1, 80)), seed=draw(st.integers(500, 502))),
        max_tokens=draw(st.integers(5, 60)),
        threshold=None if rule == "steps" else draw(often(None, st.floats(0.05, 1.0))),
        max_steps=draw(often(None, st.integers(1, canvas_length or 8))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(often((), st.sets(LETTERS, max_size=6)))),
        sampling=draw(samplings),
        reveal=rule,
        canvas_length=canvas_length,
        logprobs=draw(often(None, st.integers(0, 5))),
    )


@st.composite
def visits(draw: st.DrawFn) -> Visit:
    """Half of them come at once; a third are aborted, some before they came to run."""
    arrival = draw(often(0, st.integers(0, 40)))
    abort = draw(st.none() | st.none() | st.integers(1, 30).map(lambda steps: arrival + steps))
    return Visit(draw(asks()), arrival, abort)


def assert_exact(
    engine: Engine, visit: Visit, got: CompletionOutput | None, expected: OracleResult
) -> None:
    """What was not cut off is the oracle's answer; what was cut off is its beginning."""
    if got is not None and got.finish_reason is not None:
        engine.assert_answer(visit.ask, got, expected)
    else:
        assert visit.abort is not None, "a request that nobody aborted did not finish"
        begun = list(got.token_ids) if got is not None else []
        assert begun == expected.token_ids[: len(begun)]
        assert len(begun) < len(expected.token_ids)


def assert_all_exact(engine: Engine, mix: list[Visit]) -> None:
    """Every answer is the oracle's; where rounding decides, one that it gives with other errors."""
    for visit, got in zip(mix, engine.serve_over_time(mix), strict=True):
        assert_possible(
            partial(assert_exact, engine, visit, got),
            partial(_expected, engine, visit.ask),
            engine.oracle,
        )


def _expected(engine: Engine, ask: Ask, model: OracleModel | RoundedModel) -> OracleResult:
    return engine.expected(ask, model=model)


@BOUNDED
@given(mix=st.lists(visits(), min_size=6, max_size=10))
def test_crowded_mixes(crowded: Engine, mix: list[Visit]) -> None:
    """Four slots and pages for one long request: slots are reused, requests preempted."""
    assert_all_exact(crowded, mix)


@BOUNDED
@given(mix=st.lists(visits(), min_size=6, max_size=10))
def test_cached_mixes(compiled: Engine, mix: list[Visit]) -> None:
    """Beginnings of prompts are found in the cache, where the block lengths are equal."""
    assert_all_exact(compiled, mix)


@BOUNDED
@given(mix=st.lists(visits(), min_size=6, max_size=10))
def test_whole_prompt_mixes(bidirectional: Engine, mix: list[Visit]) -> None:
    assert_all_exact(bidirectional, mix)


@pytest.mark.parametrize("name", ["crowded", "compiled", "bidirectional"])
def test_a_slot_forgets_its_last_request(request: pytest.FixtureRequest, name: str) -> None:
    """After requests with every parameter, as many plain ones in their slots; and so again."""
    engine = request.getfixturevalue(name)
    slots = engine.config.scheduler_config.max_num_seqs
    loud = Sampling(
        temperature=1.5,
        seed=9,
        top_k=5,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.9,
        frequency_penalty=1.0,
        presence_penalty=1.0,
        logit_bias=((70, 9.0),),
        allowed_token_ids=tuple(range(60, 90)),
        min_tokens=9,
        bad_words=((80,), (81, 82)),
    )
    plain = [Ask(prompt(20 + i, seed=510), threshold=None) for i in range(slots)]
    parameters = [
        Ask(ask.prompt, sampling=loud, reveal="prefix", canvas_length=3, max_steps=2, logprobs=2)
        for ask in plain
    ]
    for asks_ in (parameters, plain, parameters, plain):
        engine.assert_exact(asks_)
