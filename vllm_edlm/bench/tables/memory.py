"""Peak memory over idle, by concurrency, block length and vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.progress import track

from vllm_edlm.bench.load import Load
from vllm_edlm.bench.memory_use import Peak, idle_bytes, peak
from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.bench.roofline import bytes_per_value
from vllm_edlm.bench.rounds import AR, PLUGIN
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.shapes import Shape
from vllm_edlm.bench.tables.throughput import fixed_schedule

CONCURRENCIES = (1, 16, 64)
QUICK_CONCURRENCIES = (1, 4)
VOCABULARIES = (32_000, 151_936)
QUICK_VOCABULARIES = (512, 1024)
BLOCK_LENGTHS = (None, 16, 32)
LENGTH = 64
QUICK_LENGTH = 32
TOKENS_PER_FORWARD = 4
# All requests of the largest load run at once.
KV_BYTES = 3 * 2**30
QUICK_KV_BYTES = 2**26
MIB = 2**20

NOTES = [
    "Extra peak: most memory that the engine's process held while it served the load, over what "
    "it held after start-up, idle, its KV cache resident as a whole: so KV is not in it. On a "
    "CPU resident memory, on a GPU what torch has allocated.",
    "Each engine is a process of its own that serves the loads in order; what an earlier load "
    "left behind counts as extra in the later ones. Start-up runs a dummy batch of its own.",
    "Logits: those of the step with most rows, in the model's dtype: the least that a step "
    "needs which holds all of them at once.",
    "All requests start together, so that all positions of their blocks are masked at once. "
    "The vocabulary is that of the row.",
]


@dataclass(frozen=True)
class _Measured:
    """One engine under one load; bytes."""

    shape: Shape
    block_length: int | None
    concurrency: int
    idle: int
    peak: Peak

    @property
    def extra(self) -> int:
        return self.peak.bytes - self.idle

    @property
    def logits(self) -> int:
        rows = max(forward.logits_rows for forward in self.peak.round.forwards)
        return rows * self.shape.vocabulary * bytes_per_value(self.shape)


def memory(settings: Settings) -> Table:
    """AR and plugin, one engine at a time."""
    vocabularies = QUICK_VOCABULARIES if settings.quick else VOCABULARIES
    length = QUICK_LENGTH if settings.quick else LENGTH
    measured = [
        load
        for vocabulary in vocabularies
        for block_length in track(BLOCK_LENGTHS, f"Vocabulary {vocabulary}")
        for load in _measure(
            settings, replace(settings.shape, vocabulary=vocabulary), block_length, length
        )
    ]
    return Table(
        name="memory",
        title=f"Memory over idle: {settings.shape}, prompt {length}, output {length}, "
        f"{TOKENS_PER_FORWARD} tokens per forward",
        rows=[_row(load, measured) for load in measured],
        notes=NOTES,
        plot=Plot(
            x="concurrency",
            y="extra peak (MiB)",
            series=("engine", "block length"),
            panels=("vocabulary",),
            log_x=True,
        ),
    )


def _measure(
    settings: Settings, shape: Shape, block_length: int | None, length: int
) -> Iterator[_Measured]:
    """Every load of one engine, in ascending order."""
    kv_bytes = QUICK_KV_BYTES if settings.quick else KV_BYTES
    concurrencies = QUICK_CONCURRENCIES if settings.quick else CONCURRENCIES
    options = fixed_schedule(block_length, TOKENS_PER_FORWARD) if block_length else {}
    with settings.start(shape, block_length, kv_cache_memory_bytes=kv_bytes) as engine:
        idle = engine.call(idle_bytes)
        for concurrency in concurrencies:
            load = Load(concurrency, concurrency, length, length, options)
            yield _Measured(shape, block_length, concurrency, idle, engine.call(peak, load))


def _row(load: _Measured, measured: list[_Measured]) -> Row:
    ar = next(
        other.extra
        for other in measured
        if other.block_length is None
        and (other.shape, other.concurrency) == (load.shape, load.concurrency)
    )
    return {
        "engine": AR if load.block_length is None else PLUGIN,
        "block length": load.block_length,
        "vocabulary": load.shape.vocabulary,
        "concurrency": load.concurrency,
        "idle (MiB)": load.idle / MIB,
        "extra peak (MiB)": load.extra / MIB,
        "logits (MiB)": load.logits / MIB,
        "ratio to AR": load.extra / ar if ar > 0 else None,
    }
