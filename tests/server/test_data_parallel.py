"""Two engines behind one server: answers are the oracle's, whichever of them gives them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from oracle_model import OracleModel
from oracle_sampling import Sampling
from serving import NAME, RANDOM_FLAGS, RandomServer, random_tokenizer, serve

TOKENIZER = random_tokenizer()
TEXT = "Ann has 12 apples and eats 5. How many are left?"


@pytest.fixture(scope="module")
def servers(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RandomServer]:
    torch.set_num_threads(1)
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    path, folder = checkpoint(spec), tmp_path_factory.mktemp("data-parallel")
    TOKENIZER.save_pretrained(tokenizer := folder / "tokenizer")
    # By default there are as many API servers as engines: two more processes to start.
    layout = ("--data-parallel-size", "2", "--api-server-count", "1")
    flags = (*RANDOM_FLAGS, "--tokenizer", str(tokenizer), *layout)
    with serve(path, NAME, folder / "log", *flags) as address:
        yield RandomServer(address, NAME, Path(tokenizer), spec, OracleModel.load(path))


def engine_steps(server: RandomServer) -> dict[str, float]:
    """Steps of each engine, by its label in /metrics."""
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("vllm:edlm_engine_steps_total{")]
    return {line.split('engine="')[1][0]: float(line.split()[-1]) for line in counts}


def test_two_engines_share_the_requests(servers: RandomServer) -> None:
    texts = [TEXT[: 7 + 4 * i] for i in range(10)]
    seeds = [None if i % 2 else i for i in range(10)]

    def answer(text: str, seed: int | None) -> str:
        sampling = {"temperature": 0} if seed is None else {"temperature": 1.0, "seed": seed}
        completion = servers.client.completions.create(
            model=NAME, prompt=text, max_tokens=60, extra_body={"ignore_eos": True}, **sampling
        )
        return completion.choices[0].text

    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(answer, texts, seeds))
    for text, seed, got in zip(texts, seeds, answers, strict=True):
        sampling = Sampling() if seed is None else Sampling(temperature=1.0, seed=seed)
        expected = servers.expected(
            TOKENIZER.encode(text), 60, ignore_eos=True, sampling=sampling
        ).token_ids
        assert got == TOKENIZER.decode(expected, skip_special_tokens=True), (text, seed)
    steps = engine_steps(servers)
    assert set(steps) == {"0", "1"}
    assert all(count > 0 for count in steps.values()), steps
