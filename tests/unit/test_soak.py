"""What the soak calls right, wrong and leaking. The load itself: tests/server/test_load.py."""

from types import SimpleNamespace

import pytest
from openai import APIConnectionError, APIError, APIStatusError

from benchmarks.soak.client import FAULTS, Answer, Choice, Outcome, Record, Way, refusal, verdict
from benchmarks.soak.findings import Findings
from benchmarks.soak.server import API_SERVER, MIB, Sample
from benchmarks.soak.traffic import KINDS, Limits, requests

LIMITS = Limits(block_length=16, context=512)
WHOLE: Answer = {0: Choice([7, 8, 9], "abc", "length")}
BEGUN: Answer = {0: Choice([7, 8], "ab")}


@pytest.mark.parametrize(
    ("answer", "way", "expected"),
    [
        (WHOLE, Way(), Outcome.RIGHT),
        (WHOLE, Way(stream=True, leave_after=5), Outcome.RIGHT),
        (BEGUN, Way(stream=True, leave_after=2), Outcome.LEFT),
        ({}, Way(stream=True, leave_after=1), Outcome.LEFT),
        (BEGUN, Way(stream=True), Outcome.WRONG),
        ({0: Choice([7, 8, 9], "abc", "stop")}, Way(), Outcome.WRONG),
        ({0: Choice([7, 8, 9], "abd", "length")}, Way(), Outcome.WRONG),
        ({0: Choice([8], "a")}, Way(stream=True, leave_after=2), Outcome.WRONG),
        ({0: Choice([7], "b")}, Way(stream=True, leave_after=2), Outcome.WRONG),
        (WHOLE | {1: Choice([7])}, Way(), Outcome.WRONG),
    ],
)
def test_answers(answer: Answer, way: Way, expected: Outcome) -> None:
    assert verdict(answer, WHOLE, way) == expected


def test_a_bad_request_must_not_be_answered() -> None:
    assert verdict(WHOLE, None, Way()) == Outcome.WRONG


def status(code: int) -> APIStatusError:
    response = SimpleNamespace(status_code=code, request=None, headers={})
    return APIStatusError("", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "of_good", "of_bad"),
    [
        (status(503), Outcome.REFUSED, Outcome.REFUSED),
        (status(400), Outcome.FAILED, Outcome.RIGHT),
        (status(500), Outcome.FAILED, Outcome.FAILED),
        (APIConnectionError(request=None), Outcome.FAILED, Outcome.FAILED),
        (APIError("broken off", None, body=None), Outcome.FAILED, Outcome.FAILED),
        (APIError("broken off", None, body={"code": 500}), Outcome.FAILED, Outcome.FAILED),
        (APIError("full", None, body={"code": 503}), Outcome.REFUSED, Outcome.REFUSED),
    ],
)
def test_errors(error: APIError, of_good: Outcome, of_bad: Outcome) -> None:
    assert refusal(error, WHOLE) == of_good
    assert refusal(error, None) == of_bad


def findings(outcomes: list[Outcome], late: float, until_free: float = 0.1) -> Findings:
    """Of a run with these outcomes, whose memory grows from 100 MiB to `late` MiB at half time."""
    sizes = [10 * MIB] * 10 + [100 * MIB] * 40 + [int(late * MIB)] * 50
    return Findings(
        capacity=1.0,
        cases=1,
        records=[Record("plain", outcome, 1.0) for outcome in outcomes],
        samples=[Sample(float(i), {API_SERVER: size}) for i, size in enumerate(sizes)],
        preemptions=0,
        until_free=[0.1, until_free],
    )


def test_growth_after_the_warm_up() -> None:
    assert findings([Outcome.RIGHT], late=101).faults() == []
    (fault,) = findings([Outcome.RIGHT], late=103).faults()
    assert fault == "memory of API server grew by 3.00%"


def test_kv_is_free_within_a_second() -> None:
    assert findings([Outcome.RIGHT], late=100, until_free=0.9).faults() == []
    (fault,) = findings([Outcome.RIGHT], late=100, until_free=1.2).faults()
    assert fault == "KV of a client that left was free after 1.20 s only"


def test_every_fault_is_told() -> None:
    fine = [Outcome.RIGHT, Outcome.LEFT, Outcome.REFUSED]
    assert findings(fine, late=100).faults() == []
    found = findings([*fine, *FAULTS, Outcome.STUCK], late=100)
    assert found.faults() == ["1 requests wrong", "1 requests failed", "2 requests stuck"]
    row = found.outcomes().rows[-1]
    assert (row["kind"], row["sent"], row["right"], row["stuck"]) == ("all", 7, 1, 2)


def test_requests_are_those_of_their_seed() -> None:
    first, again, other = (requests(seed, 70, LIMITS) for seed in (1, 1, 2))
    assert first == again != other
    assert {request.kind for request in first} == {*KINDS}
