"""Half a minute of mixed traffic beyond capacity; `python -m benchmarks.soak` is the long run."""

import asyncio
import random

from serving import MAX_MODEL_LEN, NAME, RandomServer

from benchmarks.soak.client import FAULTS, Client, Outcome, Record, connect
from benchmarks.soak.leaving import idle
from benchmarks.soak.load import alone, closed_loop, open_loop, traffic
from benchmarks.soak.traffic import BAD, KINDS, Limits, requests

CASES = 6 * len(KINDS)
CONCURRENCY = 8
SECONDS = 8
SEED = 1


async def overloaded(server: RandomServer) -> list[Record]:
    """Requests alone, as many at once as the server runs, then twice as many as it can bear."""
    limits = Limits(server.spec.block_length, MAX_MODEL_LEN)
    async with connect(server.address) as api:
        client = Client(api, NAME)
        mix = traffic(await alone(client, requests(SEED, CASES, limits)), random.Random(SEED))
        within = await closed_loop(client, mix, CONCURRENCY, SECONDS)
        rate = 2 * len(within) / SECONDS
        beyond = await open_loop(client, mix, rate, SECONDS, SEED)
        await idle(server.address)
        return within + beyond


def test_every_answer_is_that_of_the_request_alone(server: RandomServer) -> None:
    """This server has no limit to its queue, so it refuses nothing; clients leave in mid-stream."""
    records = asyncio.run(overloaded(server))
    assert [record for record in records if record.outcome in FAULTS] == []
    assert {record.outcome for record in records} == {Outcome.RIGHT, Outcome.LEFT}
    assert {record.kind for record in records} == {*KINDS, BAD}
