"""What the command of `examples.ray_serve` refuses before it starts anything."""

import pytest
import ray
from typer.testing import CliRunner

from examples.ray_serve import cli


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-replicas", "3", "--max-replicas", "2"), "at least min_replicas, 3, got 2"),
        (("--accelerator-type", "H100"), "for accelerator=gpu alone, got 'H100'"),
        (("--accelerator", "gpu", "--accelerator-type", "x"), "Unsupported accelerator type: x"),
        (("--engine-args", "[1]"), "engine_args: Input should be a valid dictionary, got"),
        (("--engine-args", '{"blocks": 1}'), "Unknown engine argument: blocks"),
        (("--cpus", "0"), "cpus: Input should be greater than or equal to 1, got 0"),
        (("--port", "0"), "Invalid value for '--port'"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    """Said before anything is started."""
    done = CliRunner().invoke(cli, list(options))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not ray.is_initialized()


def test_api_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's routes would ignore it."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    done = CliRunner().invoke(cli, [])
    assert done.exit_code == 2
    assert "VLLM_API_KEY is set" in done.stderr
