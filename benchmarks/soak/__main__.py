"""Serve tiny-math and send it mixed requests at twice the rate that it can bear.

Usage: python -m benchmarks.soak [--minutes M] [--output DIR]
"""

import argparse
import asyncio
import random
import shlex
import sys
from pathlib import Path

from benchmarks.soak.client import FAULTS, Client, connect
from benchmarks.soak.findings import Findings
from benchmarks.soak.leaving import idle, seconds_until_free
from benchmarks.soak.load import alone, closed_loop, open_loop, traffic
from benchmarks.soak.server import MAX_SEQS, NAME, PREEMPTIONS, Server, Watch, metrics, served
from benchmarks.soak.traffic import Limits, requests
from vllm_edlm.bench.machine import facts
from vllm_edlm.bench.report import write

RESULTS = Path(__file__).parents[1] / "results"
LIMITS = Limits(block_length=16, context=512)
CASES = 280
SEED = 6
OVERLOAD = 2
CAPACITY_SECONDS = 60.0
SAMPLES = 180
LEAVES = 10


async def soak(server: Server, minutes: float) -> Findings:
    """Measure the capacity, then exceed it for so long, and leave the server idle."""
    async with connect(server.address) as api:
        client = Client(api, NAME)
        report(f"{CASES} requests alone ...")
        cases = await alone(client, requests(SEED, CASES, LIMITS))
        mix = traffic(cases, random.Random(SEED))
        report(f"capacity, {CAPACITY_SECONDS:.0f} s ...")
        done = await closed_loop(client, mix, MAX_SEQS, CAPACITY_SECONDS)
        capacity = len(done) / CAPACITY_SECONDS
        report(f"{OVERLOAD} times {capacity:.1f} requests/s for {minutes:g} minutes ...")
        before, seconds = await metrics(server.address), minutes * 60
        async with Watch(server, seconds / SAMPLES) as watch:
            records = await open_loop(client, mix, OVERLOAD * capacity, seconds, SEED)
        await idle(server.address)
        after = await metrics(server.address)
        return Findings(
            capacity=capacity,
            cases=CASES,
            records=records,
            samples=watch.samples,
            preemptions=after[PREEMPTIONS] - before[PREEMPTIONS],
            until_free=[await seconds_until_free(client, server.address) for _ in range(LEAVES)],
        )


def report(line: str) -> None:
    """Say how far it is."""
    print(line, flush=True)


def main() -> int:
    """Soak, write the tables; a status other than 0 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]])
    head = facts(command)
    with served() as server:
        findings = asyncio.run(soak(server, args.minutes))
    for table in (findings.outcomes(), findings.memory()):
        for path in write(table, {**head, **findings.facts()}, args.output):
            report(str(path))
    for record in findings.records:
        if record.outcome in FAULTS:
            report(f"{record.outcome}: {record.kind}: {record.detail}")
    faults = findings.faults()
    report("\n".join(faults) or "nothing wrong, failed, stuck or leaking")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
