"""`vllm serve --async-scheduling`: scheduler and runner in two processes, one step apart."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from oracle_model import OracleModel
from serving import NAME, RANDOM_FLAGS, RandomServer, random_tokenizer, serve
from test_metrics import ASKS, IDS, expected_growth, growth

FORMAT = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}


@pytest.fixture(scope="module")
def async_server(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RandomServer]:
    torch.set_num_threads(1)
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    path, folder = checkpoint(spec), tmp_path_factory.mktemp("async")
    random_tokenizer().save_pretrained(tokenizer := folder / "tokenizer")
    flags = (*RANDOM_FLAGS, "--tokenizer", str(tokenizer), "--async-scheduling")
    with serve(path, NAME, folder / "log", *flags) as address:
        yield RandomServer(address, NAME, tokenizer, spec, OracleModel.load(path))


@pytest.mark.parametrize("number", [1, len(ASKS)])
def test_what_requests_cost(async_server: RandomServer, number: int) -> None:
    """Forwards are those of the oracle, each commit one by itself, and a last one in vain."""
    asks = ASKS[:number]
    grown, expected = growth(async_server, asks), expected_growth(async_server, asks)
    steps = grown.pop(("vllm:edlm_engine_steps_total",))
    forwards = [
        sum(steps + 1 for steps in ask.expected(async_server).denoise_steps) for ask in asks
    ]
    assert max(forwards) <= steps <= sum(forwards)
    without_reveals = {key: n for key, n in expected.items() if "reveal_size" not in key[0]}
    assert {key: n for key, n in grown.items() if "reveal_size" not in key[0]} == without_reveals


@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_tokens(async_server: RandomServer, threshold: float) -> None:
    expected = async_server.expected(IDS, 60, threshold=threshold, ignore_eos=True)
    body = {
        "prompt": IDS,
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"diffusion_threshold": threshold},
    }
    (choice,) = async_server.post("/v1/completions", body).json()["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "named"), [({"logprobs": 1}, "logprobs"), ({"response_format": FORMAT}, "structured")]
)
def test_refusals_name_the_mode(
    async_server: RandomServer, body: dict[str, Any], named: str
) -> None:
    response = async_server.post("/v1/completions", {"prompt": "a"} | body)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert named in message
    assert "async scheduling" in message
