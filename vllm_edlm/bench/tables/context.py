"""Throughput of one request by length of its context, AR and plugin."""

from vllm_edlm.bench.figures import NOTES, by_cell, row
from vllm_edlm.bench.load import Load
from vllm_edlm.bench.report import Plot, Table
from vllm_edlm.bench.rounds import AR, PLUGIN, Cell, alternate, running, start_up
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.tables.throughput import ar_and_plugin, fixed_schedule

CONTEXTS = (64, 512, 2048, 4096)
QUICK_CONTEXTS = (64, 128)
BLOCK = 16
TOKENS_PER_FORWARD = 4
OUTPUT = 64


def context(settings: Settings) -> Table:
    """AR and plugin, concurrency 1, the prompt as long as the context."""
    shape = settings.shape
    contexts = QUICK_CONTEXTS if settings.quick else CONTEXTS
    with running(ar_and_plugin(settings, shape)) as engines:
        samples = alternate(engines, [_group(length) for length in contexts], settings.rounds)
        notes = [*NOTES, start_up(engines)]
    return Table(
        name="context",
        title=f"Context length: {shape}, concurrency 1, block length {BLOCK}, "
        f"{TOKENS_PER_FORWARD} tokens per forward, output {OUTPUT}",
        rows=[row(group, shape, settings.rates) for group in by_cell(samples)],
        notes=notes,
        plot=Plot(x="context", y="time per output token (ms)", series=("engine",), log_x=True),
    )


def _group(length: int) -> list[Cell]:
    columns = {"context": length}
    options = fixed_schedule(BLOCK, TOKENS_PER_FORWARD)
    return [
        Cell(AR, columns, Load(1, 2, length, OUTPUT)),
        Cell(PLUGIN, columns, Load(1, 2, length, OUTPUT, options)),
    ]
