"""The harness finds the model `edlm`, and hears of bad options before an engine starts."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from lm_eval.api.registry import Registry, get_model
from typer.testing import CliRunner

from vllm_edlm.cli import app
from vllm_edlm.evaluate.harness import BlockDiffusionHarness

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(checkpoint: CheckpointFactory) -> str:
    return str(checkpoint(CheckpointSpec(block_length=8)))


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("lm_eval.models.vllm_causallms.LLM", refuse)


def test_it_is_registered() -> None:
    assert get_model("edlm") is BlockDiffusionHarness


def test_the_entry_point_is_the_model() -> None:
    """As versions of the harness that look for entry points resolve it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registry: Registry[type] = Registry("models")
    for name, target in project["entry-points"]["lm_eval.models"].items():
        registry.register(name, target=target)
    assert registry.get("edlm") is BlockDiffusionHarness


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"diffusion_threshold must be a number in \(0, 1\], got 1.5"),
        ({"reveal": "best"}, "diffusion_reveal must be one of"),
        ({"max_steps": 9}, "diffusion_max_steps must be an integer from 1 to 8, got 9"),
        ({"block_length": 4, "max_steps": 5}, "diffusion_max_steps .* from 1 to 4, got 5"),
        ({"block_length": "x"}, "block length must be an integer of at least 1, got 'x'"),
        ({"likelihood": "exact"}, "likelihood must be one of chain, bound, got 'exact'"),
        ({"bound_samples": 0}, "bound_samples must be an integer of at least 1, got 0"),
        ({"prompt_attention": "both"}, "prompt_attention must be one of .*, got 'both'"),
    ],
)
def test_bad_options(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockDiffusionHarness(model, **options)


def test_another_model(model: str, tmp_path: Path) -> None:
    config = json.loads(Path(model, "config.json").read_text())
    stock = config | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(stock))
    with pytest.raises(ValueError, match="is not a block-diffusion model"):
        BlockDiffusionHarness(str(tmp_path))


def test_its_command_says_what_is_wrong(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = ["run", "--model", "edlm", "--model_args", f"pretrained={model},threshold=1.5"]
    result = CliRunner().invoke(app, ["eval", "harness", *words, "--tasks", "arc_easy"])
    assert result.exit_code == 1
    assert "diffusion_threshold must be a number in (0, 1], got 1.5" in result.stderr


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, None),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
    ],
)
def test_generation_is_greedy_unless_a_task_samples(
    given: dict[str, Any], temperature: float | None
) -> None:
    options, until, max_tokens = BlockDiffusionHarness.modify_gen_kwargs(
        {"until": ["\n"], "max_gen_toks": 9} | given, eos="</s>"
    )
    assert options.get("temperature") == temperature
    assert (until, max_tokens) == (["\n", "</s>"], 9)
