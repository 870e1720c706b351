"""Time to first token by length of the prompt, AR and plugin."""

from statistics import median

from vllm_edlm.bench.figures import by_cell, roofline_fraction
from vllm_edlm.bench.load import Load, Round
from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.rounds import AR, PLUGIN, Cell, Sample, alternate, running, start_up
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.shapes import Shape
from vllm_edlm.bench.tables.throughput import ar_and_plugin, fixed_schedule

PROMPTS = (256, 1024, 4096)
QUICK_PROMPTS = (64, 128)
BLOCK = 16
NOTES = [
    "One request at a time, of one output token; prompts are random, prefix caching is off. "
    "Medians over requests, then over rounds, which alternate between the engines; the ratio is "
    "that of the plugin's time to AR's in each round, then the median.",
    f"The plugin's first token comes out of the first denoise step of its block of {BLOCK}, all "
    "of which that step reveals: its time is that of prompt and denoise step together.",
    "Forwards: of one request. Fraction of roofline: see the throughput table.",
]


def prefill(settings: Settings) -> Table:
    """AR and plugin, one output token."""
    shape = settings.shape
    prompts = QUICK_PROMPTS if settings.quick else PROMPTS
    with running(ar_and_plugin(settings, shape)) as engines:
        samples = alternate(engines, [_group(length) for length in prompts], settings.rounds)
        notes = [*NOTES, start_up(engines)]
    return Table(
        name="prefill",
        title=f"Prefill: {shape}, output 1",
        rows=[_row(group, shape, settings.rates) for group in by_cell(samples)],
        notes=notes,
        plot=Plot(x="prompt tokens", y="time to first token (ms)", series=("engine",), log_x=True),
    )


def _group(length: int) -> list[Cell]:
    columns = {"prompt tokens": length}
    options = fixed_schedule(BLOCK, BLOCK)
    return [
        Cell(AR, columns, Load(1, 2, length, 1)),
        Cell(PLUGIN, columns, Load(1, 2, length, 1, options)),
    ]


def _row(samples: list[Sample], shape: Shape, rates: Rates) -> Row:
    first = [_time_to_first_token(sample.round) for sample in samples]
    ratios = [
        _time_to_first_token(sample.round) / _time_to_first_token(sample.ar) for sample in samples
    ]
    last = samples[-1]
    return {
        "engine": last.cell.engine,
        **last.cell.columns,
        "forwards": len(last.round.forwards) / len(last.round.traces),
        "time to first token (ms)": median(first),
        "time to first token min (ms)": min(first),
        "time to first token max (ms)": max(first),
        "ratio to AR": median(ratios),
        "fraction of roofline": median(
            roofline_fraction(sample, shape, rates) for sample in samples
        ),
    }


def _time_to_first_token(round_: Round) -> float:
    """Median over the requests, milliseconds."""
    return 1e3 * median(round_.time_to_first_token)
