"""Where a step's time goes, AR and plugin, by concurrency."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from rich.progress import track

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.figures import roofline_fraction
from vllm_edlm.bench.load import Load
from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.bench.rounds import AR, PLUGIN, Cell, Sample, running
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.step_profile import USEFUL, Part, Profile, profile
from vllm_edlm.bench.tables.throughput import ar_and_plugin, fixed_schedule

CONCURRENCIES = (1, 8, 16)
QUICK_CONCURRENCIES = (1, 2)
LENGTH = 64
QUICK_LENGTH = 32
BLOCK = 16
TOKENS_PER_FORWARD = 4
OVERHEAD = "outside forward and row statistics (%)"

Profiles = Mapping[tuple[object, ...], Sequence[Profile]]
"""By the key of a cell, one a round."""

NOTES = [
    "Step: mean over the forwards of a load, prompts included, that is one step of the engine "
    "from scheduling to output. Figures are medians over rounds, which alternate between the "
    "engines; the ratio is that of the step times in each round, then the median.",
    "Shares of the step's time; none holds another. Row statistics: the choice of a token for "
    "each row of logits and how sure it is; of AR the whole sampler. Rest of sampler: reveal "
    "rule and emission. Rest of runner: the worker's inputs, attention metadata and outputs. "
    "Scheduler: its part before the forward and that after it. Rest: the engine around them.",
    f"Outside forward and row statistics: all but {', '.join(USEFUL)}.",
    "Fraction of roofline: the least time in which the machine's measured memory bandwidth and "
    "matrix rate allow the forwards that were run, over the measured time of the whole load.",
]


def step_time(settings: Settings) -> Table:
    """AR and plugin under a stopwatch."""
    length = QUICK_LENGTH if settings.quick else LENGTH
    concurrencies = QUICK_CONCURRENCIES if settings.quick else CONCURRENCIES
    groups = [(_cell(AR, n, length), _cell(PLUGIN, n, length)) for n in concurrencies]
    with running(ar_and_plugin(settings, settings.shape)) as engines:
        profiles = _measure(engines, groups, settings.rounds)
    return Table(
        name="step_time",
        title=f"A step's time: {settings.shape}, prompt {length}, output {length}, "
        f"block length {BLOCK}, {TOKENS_PER_FORWARD} tokens per forward",
        rows=[
            _row(cell, profiles[cell.key], profiles[ar.key], settings)
            for ar, plugin in groups
            for cell in (ar, plugin)
        ],
        notes=NOTES,
        plot=Plot(x="concurrency", y=OVERHEAD, series=("engine",), log_x=True),
    )


def _cell(engine: str, concurrency: int, length: int) -> Cell:
    options = fixed_schedule(BLOCK, TOKENS_PER_FORWARD) if engine == PLUGIN else {}
    load = Load(concurrency, max(2, concurrency), length, length, options)
    return Cell(engine, {"concurrency": concurrency}, load)


def _measure(
    engines: Mapping[str, Engine], groups: Sequence[Sequence[Cell]], rounds: int
) -> Profiles:
    """Profiles of each cell, one a round; a first round warms up."""
    profiles = defaultdict(list)
    for round_ in track(range(rounds + 1), "Measuring"):
        for cell in (cell for group in groups for cell in group):
            measured = engines[cell.engine].call(profile, cell.load)
            if round_ > 0:
                profiles[cell.key].append(measured)
    return profiles


def _row(cell: Cell, profiles: Sequence[Profile], ar: Sequence[Profile], settings: Settings) -> Row:
    overheads = [100 * measured.overhead for measured in profiles]
    pairs = list(zip(profiles, ar, strict=True))
    return {
        "engine": cell.engine,
        **cell.columns,
        "step (ms)": median(1e3 * measured.step_seconds for measured in profiles),
        "ratio to AR": median(own.step_seconds / base.step_seconds for own, base in pairs),
        **{f"{part} (%)": median(100 * p.share(part) for p in profiles) for part in Part},
        OVERHEAD: median(overheads),
        "min (%)": min(overheads),
        "max (%)": max(overheads),
        "fraction of roofline": median(
            roofline_fraction(Sample(cell, own.round, base.round), settings.shape, settings.rates)
            for own, base in pairs
        ),
    }
