"""The capacity page: measured steps beside the roofline, and what follows for an 8B on H100s."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_edlm.bench import capacity_text as text
from vllm_edlm.bench.capacity import (
    EIGHT_B,
    H100,
    Traffic,
    forwards,
    kv_bytes_per_token,
    requests_in_memory,
    step_seconds,
    together,
    tokens_per_second,
    weight_bytes,
)
from vllm_edlm.bench.report import Row, markdown_rows
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.shapes import Shape

ENGINES = ("AR", "plugin")
# Tokens of prompt and of output in the table `throughput`; output in `context`.
LENGTH = 64
CONTEXT_BLOCKS = (16, 4.0)

PROMPT, OUTPUT = 512, 256
BLOCK_LENGTH = 32
DECODERS = {"AR": Traffic(PROMPT, OUTPUT)} | {
    f"{tokens} tokens per forward": Traffic(PROMPT, OUTPUT, BLOCK_LENGTH, tokens)
    for tokens in (2.74, 3.27)
}
REQUESTS = (1, 4, 8, 16, 32, 64, 128, 256)
# So few that blocks of 32 are still almost free.
FEW = 8
GPUS = {"one H100": 1, "a node of 8": 8, "a cluster of 100 nodes": 800}
UTILISATION = 0.92
RESERVE = 4e9
SECONDS_PER_DAY = 86_400
# Tokens/s at batch 1 on an H100 in the paper's table (arXiv 2512.14067): Qwen3-8B, and the 8B at
# 3.27 tokens per forward. And of Qwen3-8B in a serving engine, as others measured it.
PAPER = {"AR": 42.5, "3.27 tokens per forward": 130.7}
SERVED_AR = 142.0


@dataclass(frozen=True)
class Step:
    """The mean step of a measured load.

    Attributes:
        cell: what was asked, for a row of a table.
        measured: seconds.
        least: seconds, by the roofline.
    """

    cell: Row
    measured: float
    least: float

    def row(self) -> Row:
        """For a table."""
        return self.cell | {
            "measured (ms)": 1e3 * self.measured,
            "least (ms)": 1e3 * self.least,
            "fraction of roofline": self.least / self.measured,
        }


@dataclass(frozen=True)
class Fit:
    """A step takes `overhead` seconds and `factor` times the roofline's least."""

    overhead: float
    factor: float

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "Fit":
        """The fit of least squared relative error."""
        measured, least = np.array([(step.measured, step.least) for step in steps]).T
        weighted = np.stack([1 / measured, least / measured], axis=1)
        overhead, factor = np.linalg.lstsq(weighted, np.ones(len(steps)))[0]
        return cls(float(overhead), float(factor))

    def seconds(self, step: Step) -> float:
        """Predicted time of a step."""
        return self.overhead + self.factor * step.least

    def errors(self, steps: Sequence[Step]) -> list[float]:
        """By which share of the prediction each measured step differs from it."""
        return [abs(step.measured / self.seconds(step) - 1) for step in steps]


def page(results: Path, fraction: float) -> str:
    """Markdown of the whole page.

    Args:
        results: folder that has the tables `throughput` and `context` as JSON.
        fraction: of the roofline that planned figures assume.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}: allowed is above 0, to 1")
    throughput, context = (
        json.loads((results / f"{name}.json").read_text()) for name in ("throughput", "context")
    )
    lines = [*_measured(throughput, context), *_computed(fraction)]
    return "\n".join(lines) + "\n"


def throughput_steps(table: dict[str, Any]) -> list[Step]:
    """The steps of AR and plugin in the table `throughput`."""
    names = ("engine", "block length", "tokens per forward", "concurrency")
    return [
        _step(
            {name: cell[name] for name in names},
            Traffic(LENGTH, LENGTH, cell["block length"], cell["tokens per forward"] or 1.0),
            cell["concurrency"],
            cell["tokens/s"],
            rates_of(table["facts"]),
        )
        for cell in table["rows"]
        if cell["engine"] in ENGINES
    ]


def context_steps(table: dict[str, Any]) -> list[Step]:
    """Those of the table `context`."""
    steps = []
    for cell in table["rows"]:
        blocks = (None, 1.0) if cell["engine"] == "AR" else CONTEXT_BLOCKS
        traffic = Traffic(cell["context"], LENGTH, *blocks)
        shown = {name: cell[name] for name in ("engine", "context")}
        steps.append(_step(shown, traffic, 1, cell["tokens/s"], rates_of(table["facts"])))
    return steps


def rates_of(facts: dict[str, Any]) -> Rates:
    """The machine's own, from the head of a table."""
    matmul = facts["measured matrix rate, bfloat16 (GFLOP/s)"]
    return Rates(facts["measured memory bandwidth (GB/s)"] * 1e9, matmul * 1e9, "bfloat16")


def _step(cell: Row, traffic: Traffic, requests: int, tokens_per_s: float, rates: Rates) -> Step:
    works = forwards(Shape(), traffic)
    # Each of the load's forwards gives every request so many tokens in the mean.
    measured = requests * traffic.tokens_per_forward / tokens_per_s
    return Step(cell, measured, together(works, requests, rates) / len(works))


def _measured(throughput: dict[str, Any], context: dict[str, Any]) -> Iterator[str]:
    facts, steps = throughput["facts"], throughput_steps(throughput)
    rates, fit = rates_of(facts), Fit.of(steps)
    errors = fit.errors(steps)
    yield text.MEASURED.format(
        shape=Shape(),
        **_sizes(Shape()),
        cpu=facts["CPU"],
        cores=facts["CPU cores"],
        bandwidth=rates.bandwidth / 1e9,
        matmul=rates.matmul / 1e9,
        commit=facts["commit"],
        command=facts["command"],
        overhead=1e3 * fit.overhead,
        factor=fit.factor,
        cells=len(steps),
        error=sum(errors) / len(errors),
        worst=max(errors),
    )
    yield from markdown_rows([_with_prediction(step, fit) for step in steps])
    yield text.CONTEXT
    yield from markdown_rows([step.row() for step in context_steps(context)])


def _with_prediction(step: Step, fit: Fit) -> Row:
    return step.row() | {"predicted (ms)": 1e3 * fit.seconds(step)}


def _computed(fraction: float) -> Iterator[str]:
    yield text.COMPUTED.format(
        **_sizes(EIGHT_B),
        gpu=H100.name,
        memory=H100.memory / 1e9,
        bandwidth=H100.rates.bandwidth / 1e12,
        matmul=H100.rates.matmul / 1e12,
        prompt=PROMPT,
        output=OUTPUT,
        fraction=fraction,
        paper_ar=PAPER["AR"],
        paper_blocks=PAPER["3.27 tokens per forward"],
        paper_ar_share=PAPER["AR"] / limit("AR", 1),
        served_ar=SERVED_AR,
        served_ar_share=SERVED_AR / limit("AR", 1),
        paper_blocks_share=PAPER["3.27 tokens per forward"] / limit("3.27 tokens per forward", 1),
        utilisation=UTILISATION,
        reserve=RESERVE / 1e9,
        most=most_requests(),
    )
    yield from markdown_rows([_one_gpu(n) for n in (*REQUESTS, most_requests())])
    yield text.SCALE.format(few=FEW)
    yield from markdown_rows(list(_by_scale(fraction)))


def _sizes(shape: Shape) -> dict[str, float]:
    return {"weights": weight_bytes(shape) / 1e9, "kv": kv_bytes_per_token(shape) / 1024}


def most_requests() -> int:
    """Requests whose KV one H100 holds."""
    return requests_in_memory(EIGHT_B, PROMPT + OUTPUT, H100, UTILISATION, RESERVE)


def limit(decoder: str, requests: int) -> float:
    """Tokens/s of the 8B on one H100 by the roofline."""
    return tokens_per_second(EIGHT_B, DECODERS[decoder], requests, H100.rates)


def _one_gpu(requests: int) -> Row:
    limits = {decoder: limit(decoder, requests) for decoder in DECODERS}
    *_, (blocks, most) = limits.items()
    step = step_seconds(forwards(EIGHT_B, DECODERS[blocks]), requests, H100.rates)
    row: Row = {"requests": requests}
    row |= {decoder: rounded(tokens) for decoder, tokens in limits.items()}
    return row | {"its step (ms)": 1e3 * step, "its ratio to AR": most / limits["AR"]}


def _by_scale(fraction: float) -> Iterator[Row]:
    for scale, gpus in GPUS.items():
        for requests in (FEW, most_requests()):
            for decoder in DECODERS:
                tokens = gpus * limit(decoder, requests)
                planned = fraction * tokens
                yield {
                    "scale": scale,
                    "requests at once": f"{gpus * requests:,}",
                    "decoder": decoder,
                    "tokens/s, limit": rounded(tokens),
                    "tokens/s, planned": rounded(planned),
                    "of each request, planned": planned / (gpus * requests),
                    "requests a day, planned": rounded(planned * SECONDS_PER_DAY / OUTPUT),
                }


def rounded(figure: float) -> str:
    """Three significant digits, as it is read: 1,230,000."""
    return f"{float(f'{figure:.3g}'):,.0f}"
