"""Other architectures: as if the plugin were not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import prompt
from oracle_model import OracleModel, causal_mask

TESTS = Path(__file__).parents[1]
STOCK = CheckpointSpec(architecture="Qwen3ForCausalLM", layout="plain", seed=3)


def serve(*checkpoints: Path, **environment: str) -> dict[str, Any]:
    """Result of `serve_stock.py` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "engine" / "serve_stock.py"), *map(str, checkpoints)],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_plugin(checkpoint: CheckpointFactory) -> dict[str, Any]:
    return serve(checkpoint(STOCK), VLLM_PLUGINS="")


def test_without_the_plugin_means_without(without_plugin: dict[str, Any]) -> None:
    assert not without_plugin["plugin"]


@torch.inference_mode()
def test_greedy_tokens_are_the_causal_ones(
    checkpoint: CheckpointFactory, without_plugin: dict[str, Any]
) -> None:
    oracle, tokens = OracleModel.load(checkpoint(STOCK)), list(prompt(40))
    for _ in range(20):
        logits = oracle.logits(torch.tensor(tokens), causal_mask(len(tokens)))
        tokens.append(int(logits[-1].argmax()))
    assert without_plugin["tokens"][0] == tokens[40:]


def test_same_tokens_runner_and_scheduler_with_the_plugin(
    checkpoint: CheckpointFactory, without_plugin: dict[str, Any]
) -> None:
    with_plugin = serve(checkpoint(STOCK), checkpoint(CheckpointSpec()))
    assert with_plugin == without_plugin | {"plugin": True}
