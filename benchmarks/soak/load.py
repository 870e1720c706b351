"""Load on a server: requests alone, a closed loop, and an open loop beyond its capacity."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.soak.client import Answer, Client, Record, Way
from benchmarks.soak.traffic import Request, bad_request

# Of all requests.
BAD_SHARE = 0.03
LEAVING_SHARE = 0.1
STREAMED_SHARE = 0.5
# Events after which a client leaves, at most.
LAST_EVENT = 6


@dataclass(frozen=True)
class Case:
    """A request with its right answer: that of the request alone, or None for a 400."""

    request: Request
    expected: Answer | None


async def alone(client: Client, requests: Sequence[Request]) -> list[Case]:
    """Answer requests one after another: nothing else is in the batch."""
    return [Case(request, await client.ask(request)) for request in requests]


def traffic(cases: Sequence[Case], rng: random.Random) -> Iterator[tuple[Case, Way]]:
    """Requests for ever: those of `cases`, bad ones, and how each is sent."""
    while True:
        if rng.random() < BAD_SHARE:
            yield Case(bad_request(rng), None), Way()
        elif rng.random() < LEAVING_SHARE:
            yield rng.choice(cases), Way(True, rng.randint(1, LAST_EVENT))
        else:
            yield rng.choice(cases), Way(rng.random() < STREAMED_SHARE)


async def closed_loop(
    client: Client, mix: Iterator[tuple[Case, Way]], concurrency: int, seconds: float
) -> list[Record]:
    """Keep so many requests running for so long; those that ended within it."""
    records: list[Record] = []

    async def one_after_another() -> None:
        for case, way in mix:
            records.append(await client.judge(case.request, case.expected, way))

    clients = [asyncio.create_task(one_after_another()) for _ in range(concurrency)]
    done, _ = await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    for task in done:
        task.result()
    return records


async def open_loop(
    client: Client, mix: Iterator[tuple[Case, Way]], rate: float, seconds: float, seed: int
) -> list[Record]:
    """Send requests at `rate` a second, whatever becomes of them; all end before it returns."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.judge(case.request, case.expected, way))
            async for case, way in _arrivals(mix, rate, seconds, random.Random(seed))
        ]
    return [task.result() for task in tasks]


async def _arrivals(
    mix: Iterator[tuple[Case, Way]], rate: float, seconds: float, rng: random.Random
) -> AsyncIterator[tuple[Case, Way]]:
    """Requests of a Poisson process, each at its time."""
    clock = asyncio.get_running_loop().time
    begin, due = clock(), 0.0
    for sent in mix:
        due += rng.expovariate(rate)
        if due > seconds:
            return
        await asyncio.sleep(max(0.0, begin + due - clock()))
        yield sent
