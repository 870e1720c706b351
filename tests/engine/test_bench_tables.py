"""`edlm bench` from end to end on a tiny shape. Times are whatever they are."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_edlm.bench.rounds import AR, PLUGIN
from vllm_edlm.bench.tables.context import OUTPUT, QUICK_CONTEXTS, TOKENS_PER_FORWARD
from vllm_edlm.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results")
    options = ["--quick", "--rounds", "1", "--warm-start", "--output", str(output)]
    answer = CliRunner().invoke(app, ["bench", "context", *options])
    assert answer.exit_code == 0, answer.output
    return output


def test_the_tables_stand_with_their_circumstances(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        f"context.{kind}" for kind in ("json", "md", "png")
    }
    report = json.loads((folder / "context.json").read_text())
    assert report["facts"]["command"] == "edlm bench context --rounds 1 --quick --warm-start"
    text = (folder / "context.md").read_text()
    assert all(f"- {fact}: " in text for fact in report["facts"])
    assert "Start-up" in text


def test_tokens_and_forwards_are_exact(folder: Path) -> None:
    rows = json.loads((folder / "context.json").read_text())["rows"]
    expected = [(engine, context) for context in QUICK_CONTEXTS for engine in (AR, PLUGIN)]
    assert [(row["engine"], row["context"]) for row in rows] == expected
    for row in rows:
        per_forward = {AR: 1, PLUGIN: TOKENS_PER_FORWARD}[row["engine"]]
        assert row["measured tokens per forward"] == per_forward
        # Two requests, one after another: the prompts' forwards are those of the first tokens.
        assert row["forwards"] == 2 * OUTPUT / per_forward
        assert row["tokens/s"] > 0
        assert 0 < row["fraction of roofline"] < 1
        assert [key for key, value in row.items() if value is None] == ["ratio to reference"]
