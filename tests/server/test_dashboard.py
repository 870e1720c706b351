"""The Grafana dashboard asks for what /metrics shows, in the way that suits each metric."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import RandomServer

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "examples/deploy/grafana/vllm-edlm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target["expr"]) for panel in PANELS for target in panel["targets"]]
VARIABLES = DASHBOARD["templating"]["list"]
METRIC = re.compile(r"(?P<name>vllm:\w+)(?:\{(?P<labels>[^}]*)\})?(?P<range>\[[^]]*\])?")
# What Prometheus itself adds to a sample.
ADDED = {"instance"}


def enclosing(query: str, position: int) -> list[str]:
    """Functions and aggregations around a position, the innermost first."""
    names, depth = [], 0
    for i in range(position - 1, -1, -1):
        depth += (query[i] == ")") - (query[i] == "(")
        if depth < 0:
            depth = 0
            if name := re.search(r"(\w+)(?: by \([^)]*\))? ?$", query[:i]):
                names.append(name[1])
    return names


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("sum(rate(x[5m]))", ["rate", "sum"]),
        ("max by (a, b) (x)", ["max"]),
        ("sum(y) / sum(rate(x[5m]))", ["rate", "sum"]),
        ("f(0.5, sum by (le) (rate(x[5m])))", ["rate", "sum", "f"]),
    ],
)
def test_what_encloses_a_metric(query: str, names: list[str]) -> None:
    assert enclosing(query, query.index("x[" if "x[" in query else "x)")) == names


@pytest.fixture(scope="module")
def exposed(server: RandomServer) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of each sample on /metrics."""
    families = text_string_to_metric_families(httpx.get(f"{server.address}/metrics").text)
    return {
        sample.name: (family.type, set(sample.labels))
        for family in families
        for sample in family.samples
    }


def check(panel: dict[str, Any], query: str, use: re.Match[str], kind: str) -> None:
    """One metric in a query stands where one of its kind may."""
    around, of = enclosing(query, use.start()), f"{panel['title']}: {use['name']}"
    if kind == "gauge":
        assert not {"rate", "increase", "histogram_quantile"} & set(around), of
        assert use["range"] is None, of
        return
    # What only grows says something by its growth alone; across restarts and replicas too.
    assert around[:2] in (["rate", "sum"], ["increase", "sum"]), of
    assert use["range"] == "[$__rate_interval]", of
    if use["name"].endswith("_bucket"):
        assert "sum by (le) (" in query, of
        heatmap = panel["type"] == "heatmap" and panel["targets"][0]["format"] == "heatmap"
        assert heatmap or around[2:] == ["histogram_quantile"], of


@pytest.mark.parametrize(("panel", "query"), QUERIES)
def test_every_query_fits_what_is_exposed(
    panel: dict[str, Any], query: str, exposed: dict[str, tuple[str, set[str]]]
) -> None:
    uses = list(METRIC.finditer(query))
    assert uses
    for use in uses:
        assert use["name"] in exposed, f"{panel['title']}: {use['name']} is not on /metrics"
        kind, labels = exposed[use["name"]]
        assert 'model_name=~"$model"' in use["labels"], query
        wanted = set(re.findall(r"(\w+)=", use["labels"]))
        wanted |= {x.strip() for by in re.findall(r" by \(([^)]*)\)", query) for x in by.split(",")}
        assert wanted <= labels | ADDED, query
        check(panel, query, use, kind)


def test_all_metrics_of_the_readme_are_shown() -> None:
    names = re.findall(r"^\| `(vllm:\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(names) == 8
    for name in names:
        assert any(name in query for _, query in QUERIES), name


def test_the_dashboard_can_be_imported_anywhere() -> None:
    source, model = VARIABLES
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert model["name"] == "model"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert used == {"datasource", "model"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap() -> None:
    areas = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(area["x"] + area["w"] <= 24 for area in areas)
    for a, b in combinations(areas, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (a, b)
