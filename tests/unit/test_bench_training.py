"""The table of training speed on a tiny shape. Times are whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_edlm.bench.environment import Environment, physical_cores
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.shapes import TINY
from vllm_edlm.bench.tables import training as table
from vllm_edlm.bench.tables.training import AR, CONVERSION, MIB, Job, Run, Training, training

JOB = Job("tiny", TINY, row_length=32, rows=2)


def test_ratios_are_those_of_a_round() -> None:
    """The machine is twice as slow in the second round, and no ratio shows it."""
    ar = [Run(400.0, 30 * MIB), Run(200.0, 30 * MIB)]
    own = [Run(200.0, 50 * MIB), Run(100.0, 60 * MIB)]
    row = table._row(JOB, CONVERSION, own, ar, idle=20 * MIB)
    assert row["ratio to AR"] == 0.5
    speeds = [row[f"data tokens/s{which}"] for which in ("", " min", " max")]
    assert speeds == [150, 100, 200]
    assert row["extra peak (MiB)"] == 40


def test_both_see_the_same_tokens() -> None:
    conversion = next(iter(table._rows(JOB)))
    fine_tuning = next(iter(table._CausalRows(table._rows(JOB))))
    assert torch.equal(conversion["tokens"], fine_tuning["input_ids"])
    assert torch.equal(fine_tuning["input_ids"], fine_tuning["labels"])
    assert conversion["in_loss"].all()
    assert conversion["document_ids"].eq(0).all(), "a row is one document, without pad"


@pytest.mark.parametrize("kind", [AR, CONVERSION])
def test_a_run_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "STEPS", 1)
    trained = Training(JOB, kind, tmp_path)
    before = [p.clone() for p in trained._causal_lm.parameters()]
    result = trained.run()
    assert result.tokens_per_second > 0
    assert result.peak > trained.idle > 0
    after = list(trained._causal_lm.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_table_has_both_trainers(tmp_path: Path) -> None:
    environment = Environment(cores=physical_cores()[:1], openmp=None)
    settings = Settings(environment, tmp_path, Rates(1, 1, ""), quick=True, rounds=1)
    rows = training(settings).rows
    assert [row["training"] for row in rows] == [AR, CONVERSION]
    assert rows[0]["ratio to AR"] == 1
    assert rows[1]["ratio to AR"] == rows[1]["data tokens/s"] / rows[0]["data tokens/s"]
    assert all(row["extra peak (MiB)"] > 0 for row in rows)
