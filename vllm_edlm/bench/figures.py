"""From samples to the rows of a table.

A ratio is taken within a round, and the median over rounds is reported.
"""

from collections.abc import Iterable, Sequence
from statistics import median

from vllm_edlm.bench.load import Round
from vllm_edlm.bench.report import Row
from vllm_edlm.bench.roofline import Rates, forward_work, least_seconds
from vllm_edlm.bench.rounds import AR, Sample
from vllm_edlm.bench.shapes import Shape

NOTES = [
    "Figures are medians over rounds, which alternate between the engines; ratios are taken in "
    "each round, then their median. tokens/s counts the time of prompts too.",
    "Tokens per forward: emitted tokens over denoise forwards, counted for each request by "
    "itself; of an AR model 1, by definition. Forwards: of the whole load, prompts included.",
    "Time to first token counts from the request's arrival. Inter-token latency: time between "
    "two outputs of a request, each of one token or more. Time per output token: between the "
    "first output and the last one, for each token that came after the first output; the decode "
    "ratio compares it with that of AR.",
    "Fraction of roofline: the least time in which the machine's measured memory bandwidth and "
    "matrix rate allow the forwards that were run, over the measured time of the whole load.",
]


def by_cell(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples that belong to one figure, in order of first appearance."""
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.cell.key, []).append(sample)
    return list(groups.values())


def row(samples: Sequence[Sample], shape: Shape, rates: Rates) -> Row:
    """The row of one cell's samples."""
    cell = samples[0].cell
    rounds = [sample.round for sample in samples]
    speeds = [round_.tokens_per_second for round_ in rounds]
    return {
        "engine": cell.engine,
        **cell.columns,
        "measured tokens per forward": round(median(r.tokens_per_forward for r in rounds), 3),
        "forwards": median(len(r.forwards) for r in rounds),
        "tokens/s": median(speeds),
        "tokens/s min": min(speeds),
        "tokens/s max": max(speeds),
        "ratio to AR": _median(s.round.tokens_per_second / s.ar.tokens_per_second for s in samples),
        "ratio to reference": _median(
            s.round.tokens_per_second / s.reference.tokens_per_second
            for s in samples
            if s.reference is not None
        ),
        "decode ratio to AR": _median(
            ratio for s in samples if (ratio := _decode_ratio(s)) is not None
        ),
        "time to first token (ms)": _milliseconds(r.time_to_first_token for r in rounds),
        "inter-token latency (ms)": _milliseconds(r.inter_token for r in rounds),
        "time per output token (ms)": _milliseconds(r.time_per_output_token for r in rounds),
        "fraction of roofline": median(roofline_fraction(s, shape, rates) for s in samples),
    }


def roofline_fraction(sample: Sample, shape: Shape, rates: Rates) -> float:
    """Least possible time of a sample's forwards over the time that the load took."""
    causal = sample.cell.engine == AR
    least = sum(
        least_seconds(
            forward_work(shape, f.rows, f.kv_lengths, f.logits_rows, causal=causal), rates
        )
        for f in sample.round.forwards
    )
    return least / sample.round.seconds


def _decode_ratio(sample: Sample) -> float | None:
    own, ar = _per_token(sample.round), _per_token(sample.ar)
    return None if own is None or ar is None else ar / own


def _per_token(round_: Round) -> float | None:
    return _median(round_.time_per_output_token)


def _milliseconds(rounds: Iterable[Sequence[float]]) -> float | None:
    """Median over the requests of a round, then over rounds; seconds in, milliseconds out."""
    seconds = _median(median(values) for values in rounds if values)
    return None if seconds is None else 1e3 * seconds


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return median(values) if values else None
