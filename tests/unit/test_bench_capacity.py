"""The cost model against the measured tables, and the capacity page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vllm.v1.kv_cache_interface import FullAttentionSpec

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
from vllm_edlm.bench.capacity_page import (
    FEW,
    Fit,
    Step,
    context_steps,
    limit,
    most_requests,
    page,
    rounded,
    throughput_steps,
)
from vllm_edlm.bench.roofline import Rates, forward_work
from vllm_edlm.bench.shapes import TINY, Shape
from vllm_edlm.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
THROUGHPUT, CONTEXT = (
    json.loads((RESULTS / f"{name}.json").read_text()) for name in ("throughput", "context")
)
ENGINES = ("AR", "plugin")


def test_forwards_are_those_that_the_engine_ran() -> None:
    """The table's fraction is of the forwards that were recorded in the engine, one by one."""
    recorded = [r["fraction of roofline"] for r in THROUGHPUT["rows"] if r["engine"] in ENGINES]
    steps = throughput_steps(THROUGHPUT)
    assert len(steps) == len(recorded) >= 50
    assert [step.least / step.measured for step in steps] == pytest.approx(recorded)


def test_forwards_after_prompts_that_run_in_one_step() -> None:
    short = [row for row in CONTEXT["rows"] if row["context"] <= 512]
    steps = context_steps(CONTEXT | {"rows": short})
    recorded = [row["fraction of roofline"] for row in short]
    assert [step.least / step.measured for step in steps] == pytest.approx(recorded)


def test_measured_steps_are_near_the_prediction() -> None:
    steps = throughput_steps(THROUGHPUT)
    errors = Fit.of(steps).errors(steps)
    assert sum(errors) / len(errors) < 0.15


def test_a_fit_finds_what_made_the_steps() -> None:
    steps = [Step({}, measured=3 + 2 * least, least=least) for least in (1.0, 10.0, 100.0)]
    fit = Fit.of(steps)
    assert (fit.overhead, fit.factor) == pytest.approx((3, 2))
    assert fit.errors(steps) == pytest.approx([0, 0, 0])
    assert Fit(0, 1).errors(steps) == pytest.approx([4, 1.3, 1.03])


def test_each_forward_of_blocks() -> None:
    """Prompt 6, output 8, blocks of 4, 2 tokens a forward: rows, end of KV, masked positions."""
    expected = [(6 + 4, 10, 4), (4, 10, 2), (4 + 4, 14, 4), (4, 14, 2)]
    assert forwards(TINY, Traffic(6, 8, 4, 2.0)) == [
        forward_work(TINY, [rows], [end], logits_rows=masked) for rows, end, masked in expected
    ]


def test_each_forward_of_an_ar_model() -> None:
    expected = [([6], [6]), ([1], [7]), ([1], [8])]
    assert forwards(TINY, Traffic(6, 3)) == [
        forward_work(TINY, rows, ends, logits_rows=1, causal=True) for rows, ends in expected
    ]


def test_requests_in_step_wait_for_the_slower_side_in_each_forward() -> None:
    works = forwards(TINY, Traffic(64, 8, 4, 2.0))
    rates = Rates(1e9, 1e10, "bfloat16")
    assert together(works, 1, rates) >= len(works) * step_seconds(works, 1, rates)
    free_arithmetic = replace(rates, matmul=1e30)
    mean = sum(w.weight_bytes + 3 * w.kv_bytes for w in works) / len(works) / 1e9
    assert step_seconds(works, 3, free_arithmetic) == pytest.approx(mean)


def test_tokens_per_second_count_each_request() -> None:
    traffic, rates = Traffic(64, 8, 4, 2.0), Rates(1e9, 1e30, "bfloat16")
    step = step_seconds(forwards(TINY, traffic), 5, rates)
    assert tokens_per_second(TINY, traffic, 5, rates) == pytest.approx(5 * 2 / step)
    half = tokens_per_second(TINY, traffic, 5, rates, fraction=0.5)
    assert half == pytest.approx(5 / step)


@pytest.mark.parametrize("shape", [Shape(), EIGHT_B, TINY], ids=["0.5B", "8B", "tiny"])
def test_kv_is_what_vllm_allocates(shape: Shape) -> None:
    pages = FullAttentionSpec(
        block_size=16,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_dim,
        dtype=torch.bfloat16,
    )
    assert kv_bytes_per_token(shape) == shape.layers * pages.page_size_bytes / 16


def test_weights_are_those_of_the_8b() -> None:
    """Its norms, that are not counted: two a layer and one more of 4,096, two a layer of 128."""
    norms = 2 * (36 * (2 * 4096 + 2 * 128) + 4096)
    assert weight_bytes(EIGHT_B) + norms == 16_381_470_720, "bytes of the released Qwen3-8B"


def test_requests_in_memory_share_what_weights_leave() -> None:
    free = 0.9 * H100.memory - weight_bytes(EIGHT_B)
    one = kv_bytes_per_token(EIGHT_B) * 100
    assert requests_in_memory(EIGHT_B, 100, H100, 0.9, 0) == free // one
    assert requests_in_memory(EIGHT_B, 100, H100, 0.9, free - one) == 1
    assert requests_in_memory(EIGHT_B, 100, H100, 0.1, 0) == 0


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        ((0, 1), "at least 1"),
        ((1, 1, 4, 5.0), "5.0 tokens per forward: allowed are 1 to 4"),
        ((1, 1, None, 2.0), "allowed are 1 to 1"),
        ((1, 1, 4, 0.5), "0.5 tokens per forward"),
    ],
)
def test_impossible_traffic_is_an_error(traffic: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Traffic(*traffic)


def test_what_the_page_says_of_its_figures_holds() -> None:
    blocks = "3.27 tokens per forward"
    assert limit(blocks, FEW) > 0.99 * limit(blocks, most_requests()), "arithmetic is full"
    assert limit(blocks, FEW // 2) < 0.6 * limit(blocks, FEW)
    for decoder in (blocks, "2.74 tokens per forward"):
        assert limit(decoder, 16) > limit("AR", 16)
        assert limit(decoder, 32) < limit("AR", 32)
    assert rounded(1_234_567.8) == "1,230,000"


def test_the_committed_page_is_made_of_the_committed_tables() -> None:
    assert (ROOT / "benchmarks/capacity.md").read_text() == page(RESULTS, 0.5), (
        "run `edlm capacity`"
    )


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    output = tmp_path / "new/page.md"
    arguments = ["capacity", "--results", str(RESULTS), "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--fraction", "0.25"])
    assert result.exit_code == 0, result.output
    assert output.read_text() == page(RESULTS, 0.25)
    assert "*Planned* is 0.25 of it" in output.read_text()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--fraction", "1.5", "fraction 1.5: allowed"), ("--results", "nowhere", "throughput.json")],
)
def test_the_command_names_what_is_wrong(
    option: str, value: str, message: str, tmp_path: Path
) -> None:
    output = tmp_path / "page.md"
    arguments = ["capacity", "--results", str(RESULTS), "--output", str(output), option, value]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not output.exists()
