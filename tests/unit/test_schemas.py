"""Manifests by Kubernetes' own schemas, and the dashboard's queries by a PromQL parser."""

import json
from pathlib import Path

import kubernetes_validate
import promql_parser
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "examples/deploy"
# Releases some years apart.
VERSIONS = ["1.29", "1.37"]
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes/vllm-edlm.yaml").read_text()))
PANELS = json.loads((DEPLOY / "grafana/vllm-edlm.json").read_text())["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_valid(manifest: dict[str, object], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_is_seen() -> None:
    manifest = MANIFESTS[0] | {"spec": MANIFESTS[0]["spec"] | {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_promql(query: str) -> None:
    for variable, value in {"$__rate_interval": "5m", "$model": "x"}.items():
        query = query.replace(variable, value)
    promql_parser.parse(query)


def test_a_broken_query_is_seen() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum(rate(x[5m])")
