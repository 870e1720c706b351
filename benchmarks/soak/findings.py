"""What a soak found: tables, facts, and whether all is as it must be."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from benchmarks.soak.client import FAULTS, Outcome, Record
from benchmarks.soak.server import MAX_QUEUED, MAX_SEQS, MIB, Sample
from vllm_edlm.bench.report import Facts, Plot, Row, Table

# Of the time under load: before the first comparison of memory, and of each comparison.
WARM_UP_SHARE = 1 / 3
COMPARED_SHARE = 0.1
MOST_GROWTH = 0.02
MOST_SECONDS_UNTIL_FREE = 1.0
TITLE = "tiny-math in fp32 under twice the load that it can bear"


@dataclass(frozen=True)
class Findings:
    """Everything one run measured.

    Attributes:
        capacity: answers a second of a closed loop.
        cases: distinct requests whose answers are known.
        records: one for each request of the open loop.
        samples: memory from the loop's begin to its end.
        preemptions: during the loop.
        until_free: seconds until the KV of clients that left was free.
    """

    capacity: float
    cases: int
    records: Sequence[Record]
    samples: Sequence[Sample]
    preemptions: float
    until_free: Sequence[float]

    def faults(self) -> list[str]:
        """What must not be; empty if all is well."""
        counts = Counter(record.outcome for record in self.records)
        faults = [f"{counts[outcome]} requests {outcome}" for outcome in FAULTS if counts[outcome]]
        growth = self.growth()
        faults += [
            f"memory of {name} grew by {share:.2%}"
            for name, share in growth.items()
            if share > MOST_GROWTH
        ]
        if (longest := max(self.until_free)) > MOST_SECONDS_UNTIL_FREE:
            faults.append(f"KV of a client that left was free after {longest:.2f} s only")
        return faults

    def growth(self) -> dict[str, float]:
        """By which share each process grew, from after the warm-up to the end."""
        end = self.samples[-1].seconds
        early = self._memory(WARM_UP_SHARE * end, (WARM_UP_SHARE + COMPARED_SHARE) * end)
        late = self._memory((1 - COMPARED_SHARE) * end, end)
        return {name: late[name] / early[name] - 1 for name in late}

    def _memory(self, begin: float, end: float) -> dict[str, float]:
        """Mean resident bytes of each process over a time."""
        samples = [sample.bytes for sample in self.samples if begin <= sample.seconds <= end]
        return {name: mean(sample[name] for sample in samples) for name in samples[-1]}

    def facts(self) -> Facts:
        """Figures of the whole run, for the heads of both tables."""
        answered = sum(record.outcome == Outcome.RIGHT for record in self.records)
        seconds = self.samples[-1].seconds
        growth = {f"memory growth, {n} (%)": 100 * share for n, share in self.growth().items()}
        return {
            "load (minutes)": seconds / 60,
            "capacity, closed loop (requests/s)": self.capacity,
            "sent, open loop (requests/s)": len(self.records) / seconds,
            "answered (requests/s)": answered / seconds,
            "preemptions": int(self.preemptions),
            **growth,
            "KV free after a client left the idle server, median (s)": median(self.until_free),
            "KV free after a client left the idle server, most (s)": max(self.until_free),
        }

    def outcomes(self) -> Table:
        """What came of each kind of request."""
        kinds = sorted({record.kind for record in self.records})
        rows = [self._row(kind, [r for r in self.records if r.kind == kind]) for kind in kinds]
        return Table("soak", TITLE, [*rows, self._row("all", self.records)], self._notes())

    def _row(self, kind: str, records: Sequence[Record]) -> Row:
        counts = Counter(record.outcome for record in records)
        seconds = sorted(r.seconds for r in records if r.outcome == Outcome.RIGHT)
        return {
            "kind": kind,
            "sent": len(records),
            **{str(outcome): counts[outcome] for outcome in Outcome},
            "median seconds": median(seconds) if seconds else None,
            "99th percentile": seconds[int(0.99 * len(seconds))] if seconds else None,
        }

    def _notes(self) -> list[str]:
        return [
            f"{self.cases} distinct requests were first answered alone, one after another. Right: "
            "tokens, text and reason to finish, streamed or not, are those of the same request "
            "alone; of a bad request, a 400. Left: the client closed a stream in mid-answer, which "
            "was the beginning of the right one.",
            f"The server runs {MAX_SEQS} requests at once and keeps {MAX_QUEUED} "
            "(`--max-num-queued-reqs`); vLLM refuses what comes beyond with 503, a stream by an "
            "event of that code. Failed: any other error. Stuck: no end within five minutes.",
            "Capacity is measured before the load; requests then come at twice that rate, at "
            "random times (Poisson), whatever becomes of earlier ones.",
            "Memory growth compares a tenth of the time, after a warm-up of a third, with the last "
            "tenth. The plot shows all of it.",
            "The engine has one thread. Rates and times move with whatever else the machine does; "
            "where it leaves too little for the client, requests are sent later than planned.",
        ]

    def memory(self) -> Table:
        """Resident memory over time."""
        rows: list[Row] = [
            {"minute": sample.seconds / 60, "process": name, "resident (MiB)": size / MIB}
            for sample in self.samples
            for name, size in sample.bytes.items()
        ]
        plot = Plot("minute", "resident (MiB)", ("process",))
        return Table("soak_memory", f"Memory of {TITLE}", rows, [], plot)
