"""Tables on disk, and the facts at their head."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from vllm_edlm.bench import machine
from vllm_edlm.bench.machine import facts, measure_rates
from vllm_edlm.bench.report import Plot, Row, Table, write
from vllm_edlm.bench.roofline import Rates

ROWS: list[Row] = [
    {"engine": "AR", "concurrency": 1, "tokens/s": 12.3456, "ratio": None},
    {"engine": "AR", "concurrency": 8, "tokens/s": 1234.5, "ratio": None},
    {"engine": "plugin", "concurrency": 1, "tokens/s": 99.96, "ratio": 2.0},
    {"engine": "plugin", "concurrency": 8, "tokens/s": None, "ratio": 0.5},
]
PLOT = Plot("concurrency", "tokens/s", ("engine",), log_x=True)


def table(rows: list[Row] = ROWS, plot: Plot | None = PLOT) -> Table:
    return Table("speed", "How fast", rows, ["A note."], plot)


def test_json_holds_exact_figures(tmp_path: Path) -> None:
    write(table(), {"command": "edlm bench"}, tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text()) == {
        "title": "How fast",
        "facts": {"command": "edlm bench"},
        "rows": ROWS,
        "notes": ["A note."],
    }


def test_markdown(tmp_path: Path) -> None:
    write(table(), {"command": "edlm bench", "cores": 2}, tmp_path)
    assert (tmp_path / "speed.md").read_text() == (
        "# How fast\n\n- command: edlm bench\n- cores: 2\n\n"
        "| engine | concurrency | tokens/s | ratio |\n"
        "| --- | --- | --- | --- |\n"
        "| AR | 1 | 12.3 | - |\n"
        "| AR | 8 | 1234 | - |\n"
        "| plugin | 1 | 100 | 2 |\n"
        "| plugin | 8 | - | 0.5 |\n\n"
        "- A note.\n\n![How fast](speed.png)\n"
    )


@pytest.mark.parametrize("panels", [(), ("engine",)])
def test_the_plot_is_an_image(tmp_path: Path, panels: tuple[str, ...]) -> None:
    plot = Plot("concurrency", "tokens/s", ("engine",), panels)
    paths = write(table(plot=plot), {}, tmp_path / "new")
    assert [path.name for path in paths] == ["speed.json", "speed.md", "speed.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("from_zero", [True, False])
def test_where_the_vertical_axis_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_zero: bool
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    write(table(plot=replace(PLOT, from_zero=from_zero)), {}, tmp_path)
    (axes,) = figures[0].axes
    # The least figure of the table is 12.3.
    assert (axes.get_ylim()[0] == 0) == from_zero


def test_without_a_plot_there_is_no_image(tmp_path: Path) -> None:
    write(table(plot=None), {}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md"]
    assert "![" not in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([*ROWS, {"engine": "AR"}], "beside"),
        ([ROWS[0] | {"ratio": float("nan")}], "ratio is nan"),
    ],
)
def test_bad_rows_are_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(rows)


def test_a_plot_of_a_missing_column_is_refused() -> None:
    with pytest.raises(ValueError, match="'latency'"):
        table(plot=Plot("concurrency", "latency", ()))


def test_facts_name_command_machine_versions_and_commit() -> None:
    told = facts("edlm bench step_time")
    assert told["command"] == "edlm bench step_time"
    assert told["torch"] == torch.__version__
    assert {"CPU", "CPU cores", "memory (GiB)", "vllm", "vllm-edlm", "commit", "date"} <= set(told)


def test_facts_tell_neither_host_nor_path() -> None:
    text = " ".join(map(str, facts("edlm bench").values()))
    assert platform.node() not in text
    assert str(Path(machine.__file__).parents[2]) not in text


def test_rates_are_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(machine, "PRODUCT", (16, 64, 64))
    rates = measure_rates("cpu", "bfloat16")
    assert rates.bandwidth > 0
    assert rates.matmul > 0
    assert Rates(2e9, 3e9, "bfloat16").facts() == {
        "measured memory bandwidth (GB/s)": 2.0,
        "measured matrix rate, bfloat16 (GFLOP/s)": 3.0,
    }
