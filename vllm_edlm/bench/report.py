"""A table of measurements as JSON, as Markdown and as a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any

Value = str | int | float | None
Row = dict[str, Value]
Facts = Mapping[str, str | int | float]

PANELS_PER_LINE = 2
PANEL_INCHES = (7.0, 4.5)
# Characters above a panel.
TITLE_WIDTH = 80


@dataclass(frozen=True)
class Plot:
    """Which columns of a table are drawn.

    Attributes:
        x: column of numbers along the horizontal axis.
        y: column of numbers along the vertical axis.
        series: columns whose values together name a line.
        panels: columns whose values together name a panel.
        log_x: horizontal axis in powers of two.
        from_zero: the vertical axis begins at zero.
    """

    x: str
    y: str
    series: tuple[str, ...]
    panels: tuple[str, ...] = ()
    log_x: bool = False
    from_zero: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column it needs."""
        return (self.x, self.y, *self.series, *self.panels)


@dataclass(frozen=True)
class Table:
    """Measurements and what they mean.

    Attributes:
        name: file stem of everything written.
        title: one line.
        rows: flat; all with the same keys, in print order; None where there is no figure.
        notes: sentences under the table.
        plot: what is drawn, if anything.

    Raises:
        ValueError: rows that differ in their keys, a figure that is not finite, a plot of a
            column that is not there.
    """

    name: str
    title: str
    rows: list[Row]
    notes: list[str]
    plot: Plot | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"table {self.name} has no rows")
        for row in self.rows:
            self._check(row)
        for column in self.plot.columns if self.plot else ():
            if column not in self.columns:
                raise ValueError(f"table {self.name} plots {column!r}, which no row has")

    @property
    def columns(self) -> list[str]:
        """Names in print order."""
        return list(self.rows[0])

    def _check(self, row: Row) -> None:
        if list(row) != self.columns:
            raise ValueError(f"table {self.name}: {list(row)} beside {self.columns}")
        for column, value in row.items():
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"table {self.name}: {column} is {value}")


def write(table: Table, facts: Facts, folder: Path) -> list[Path]:
    """Write `<name>.json`, `<name>.md` and, if the table has a plot, `<name>.png`.

    Args:
        table: what was measured.
        facts: command, machine, versions, commit, date: they head both files.
        folder: made if it does not exist.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table.name}.{kind}" for kind in ("json", "md")]
    paths[0].write_text(_json(table, facts))
    paths[1].write_text(markdown(table, facts))
    if table.plot:
        paths.append(folder / f"{table.name}.png")
        _draw(table, table.plot, paths[-1])
    return paths


def _json(table: Table, facts: Facts) -> str:
    content = {
        "title": table.title,
        "facts": dict(facts),
        "rows": table.rows,
        "notes": table.notes,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def markdown(table: Table, facts: Facts) -> str:
    """The table with its facts before it, its notes and its plot after it."""
    lines = [f"# {table.title}", ""]
    lines += [f"- {key}: {_cell(value)}" for key, value in facts.items()]
    lines += ["", *markdown_rows(table.rows), ""]
    lines += [f"- {note}" for note in table.notes]
    if table.plot:
        lines += ["", f"![{table.title}]({table.name}.png)"]
    return "\n".join(lines).rstrip() + "\n"


def markdown_rows(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table; all rows have the same keys, which head it."""
    columns = list(rows[0])
    lines = [_line(columns), _line(["---"] * len(columns))]
    return lines + [_line([_cell(value) for value in row.values()]) for row in rows]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Value) -> str:
    """Floats with three significant digits, or none behind the point from 100 on."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _draw(table: Table, plot: Plot, path: Path) -> None:
    # Only who draws needs matplotlib; a figure of its own class needs no display.
    from matplotlib.figure import Figure

    panels = list(_groups(table.rows, plot.panels))
    columns = min(PANELS_PER_LINE, len(panels))
    lines = ceil(len(panels) / columns)
    figure = Figure((PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines), layout="constrained")
    figure.suptitle(fill(table.title, TITLE_WIDTH * columns), fontsize="medium")
    for number, (name, rows) in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(lines, columns, number), name, rows, plot)
    figure.savefig(path, dpi=100)


def _draw_panel(axes: Any, name: str, rows: list[Row], plot: Plot) -> None:
    for label, line in _groups(rows, plot.series):
        points = [(row[plot.x], row[plot.y]) for row in line]
        drawn = [point for point in points if None not in point]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker="o", label=label)
    axes.set(title=name, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list({row[plot.x] for row in rows} - {None}))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.1)
    axes.autoscale_view()
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize="small")


def _groups(rows: list[Row], columns: tuple[str, ...]) -> Iterator[tuple[str, list[Row]]]:
    """Rows that agree in `columns`, under a name made of them, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_name(row, columns), []).append(row)
    yield from groups.items()


def _name(row: Row, columns: Sequence[str]) -> str:
    """Values of the columns; words speak for themselves, numbers need their column's name."""
    values = {column: row[column] for column in columns if row[column] is not None}
    return ", ".join(
        value if isinstance(value, str) else f"{column} {_cell(value)}"
        for column, value in values.items()
    )
