"""Rounds alternate, and every cell is compared with its own group of its own round."""

from dataclasses import dataclass, field

import pytest

from vllm_edlm.bench.figures import by_cell, row
from vllm_edlm.bench.load import Forward, Load, Round, Trace
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.rounds import AR, PLUGIN, REFERENCE, Cell, alternate
from vllm_edlm.bench.shapes import Shape
from vllm_edlm.bench.tables import TABLES, maker
from vllm_edlm.bench.tables.throughput import fixed_schedule, plan

SHAPE = Shape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8, vocabulary=8)
# Arithmetic is for free, so a forward takes the time of reading its bytes.
RATES = Rates(bandwidth=1e12, matmul=1e18, matmul_dtype="bfloat16")


def served(seconds: float, tokens: int = 8, forwards: int = 2) -> Round:
    """One request whose tokens come half and half."""
    trace = Trace(0.0, denoise_steps=forwards)
    trace.take(range(tokens // 2), seconds / 2)
    trace.take(range(tokens // 2), seconds)
    return Round(seconds, (Forward((4,), (8,), 4),) * forwards, (trace,))


@dataclass
class Scripted:
    """Serves each load in the seconds that come next, and notes that it was asked."""

    name: str
    seconds: list[float]
    asked: list[tuple[str, Load]] = field(default_factory=list)

    def measure(self, load: Load) -> Round:
        self.asked.append((self.name, load))
        return served(self.seconds.pop(0))


def scripted(**seconds: list[float]) -> tuple[dict[str, Scripted], list[tuple[str, Load]]]:
    """Engines by name with one record of who was asked what."""
    asked: list[tuple[str, Load]] = []
    names = {"ar": AR, "plugin": PLUGIN, "reference": REFERENCE}
    return {names[k]: Scripted(names[k], s, asked) for k, s in seconds.items()}, asked


def group(concurrency: int) -> list[Cell]:
    load = Load(concurrency, 2 * concurrency, 4, 64)
    return [
        Cell(AR, {"block length": None, "concurrency": concurrency}, load),
        Cell(PLUGIN, {"block length": 8, "concurrency": concurrency}, load),
        Cell(PLUGIN, {"block length": 16, "concurrency": concurrency}, load),
        Cell(REFERENCE, {"block length": 16, "concurrency": concurrency}, load),
    ]


def test_ratios_are_those_of_a_round() -> None:
    """The machine is twice as slow in the second round, and no ratio shows it."""
    engines, asked = scripted(
        ar=[9.0, 4.0, 8.0], plugin=[9.0, 9.0, 2.0, 1.0, 4.0, 2.0], reference=[9.0, 3.0, 6.0]
    )
    samples = alternate(engines, [group(1)], rounds=2)
    warm_up, measured = asked[:4], asked[4:]
    assert [name for name, _ in measured] == [AR, PLUGIN, PLUGIN, REFERENCE] * 2
    assert {(load.num_requests, load.output_length) for _, load in warm_up} == {(1, 32)}
    assert {(load.num_requests, load.output_length) for _, load in measured} == {(2, 64)}
    rows = [row(cell, SHAPE, RATES) for cell in by_cell(samples)]
    assert [r["engine"] for r in rows] == [AR, PLUGIN, PLUGIN, REFERENCE]
    assert [r["ratio to AR"] for r in rows] == [1, 2, 4, pytest.approx(4 / 3)]
    assert [r["ratio to reference"] for r in rows] == [None, None, 3, 1]
    assert [r["decode ratio to AR"] for r in rows] == [1, 2, 4, pytest.approx(4 / 3)]
    assert (rows[1]["tokens/s min"], rows[1]["tokens/s"], rows[1]["tokens/s max"]) == (2, 3, 4)


def test_equal_cells_of_several_groups_are_one_row() -> None:
    engines, _ = scripted(ar=[1.0] * 3, plugin=[1.0, 1.0, 4.0, 8.0])
    ar, eight, sixteen, _ = group(1)
    samples = alternate(engines, [[ar, eight], [ar, sixteen]], rounds=1)
    assert [len(cell) for cell in by_cell(samples)] == [2, 1, 1]


def test_the_roofline_is_that_of_the_forwards_run() -> None:
    """Each of two forwards reads the weights and the KV of 8 positions, 2 bytes a number."""
    engines, _ = scripted(ar=[1.0, 2.0])
    (sample,) = alternate(engines, [group(1)[:1]], rounds=1)
    weights = 8 * 8 * 4 + 3 * 8 * 8 + 8 * 8
    kv = 2 * 8 * 8
    least = 2 * (2 * weights + 2 * kv) / 1e12
    figures = row([sample], SHAPE, RATES)
    assert figures["fraction of roofline"] == pytest.approx(least / 2.0)
    assert figures["forwards"] == 2
    assert figures["measured tokens per forward"] == 4


@pytest.mark.parametrize("pair", [(8, 1), (8, 8), (16, 4), (32, 8)])
def test_a_fixed_schedule_reveals_alike_in_every_step(pair: tuple[int, int]) -> None:
    options = fixed_schedule(*pair)
    assert options["diffusion_max_steps"] * pair[1] == options["diffusion_canvas_length"] == pair[0]
    assert options["diffusion_threshold"] == 1.0


def test_each_group_measures_ar_anew() -> None:
    pairs = [(8, 1), (16, 4), (16, 8), (32, 8)]
    groups = plan([AR, PLUGIN, REFERENCE], (1, 4), pairs, 64)
    assert [[cell.engine for cell in cells] for cells in groups] == [
        [AR, PLUGIN],
        [AR, PLUGIN, REFERENCE, PLUGIN],
        [AR, PLUGIN, REFERENCE],
        [AR, PLUGIN],
        [AR, PLUGIN, PLUGIN],
        [AR, PLUGIN],
    ]
    assert len({cell.key for cells in groups for cell in cells}) == 2 + 8 + 2
    assert [cells[0].load.num_requests for cells in groups] == [2, 2, 2, 4, 4, 4]


def test_every_table_has_a_maker() -> None:
    for name in TABLES:
        assert callable(maker(name))
    with pytest.raises(ValueError, match="no table 'speed'; there are throughput"):
        maker("speed")
