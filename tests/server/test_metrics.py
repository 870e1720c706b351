"""What /metrics and each answer say about known requests: the oracle's figures, exactly."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from checkpoints import tokenizer
from oracle import OracleResult
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, RandomServer

IDS = tokenizer().encode("Ann has 12 apples and eats 5. Ben has 7 pears. Who has the most?")
Samples = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Ask:
    """One greedy request with the first `length` ids of `IDS` as its prompt."""

    length: int
    max_tokens: int
    threshold: float
    stop_token_ids: tuple[int, ...] = ()

    def expected(self, server: RandomServer, **changes: Any) -> OracleResult:
        options = {"threshold": self.threshold, "stop_token_ids": self.stop_token_ids}
        return server.expected(
            IDS[: self.length], self.max_tokens, ignore_eos=True, **(options | changes)
        )

    def send(self, server: RandomServer) -> dict[str, Any]:
        body = {
            "prompt": IDS[: self.length],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stop_token_ids": list(self.stop_token_ids),
            "vllm_xargs": {"diffusion_threshold": self.threshold},
        }
        response = server.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()


def read(server: RandomServer) -> Samples:
    """Every sample of the diffusion metrics, by name and by values of `kind` or `le`."""
    text = httpx.get(f"{server.address}/metrics").text
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels = sample.name, sample.labels
            if name.startswith(("vllm:diffusion_", "vllm:edlm_")) and not name.endswith("_created"):
                assert (labels["model_name"], labels["engine"]) == (NAME, "0")
                more = (value for label, value in labels.items() if label in ("kind", "le"))
                samples[name, *more] = sample.value
    return samples


def settled(server: RandomServer) -> Samples:
    """The samples of the idle server: a last report follows the last answer."""
    before: Samples = {}
    for _ in range(100):
        samples = read(server)
        if samples == before:
            return samples
        before = samples
        time.sleep(0.2)
    pytest.fail("the counters of an idle server go on growing")


def growth(server: RandomServer, asks: list[Ask]) -> Samples:
    """By how much each sample grows while `asks` are served at once."""
    before = settled(server)
    with ThreadPoolExecutor(len(asks)) as pool:
        list(pool.map(lambda ask: ask.send(server), asks))
    return {key: value - before.get(key, 0) for key, value in settled(server).items()}


def canvas_positions(server: RandomServer, ask: Ask, result: OracleResult) -> int:
    """Positions not known yet of the open block, summed over the denoise steps."""
    block_length, known, positions = server.spec.block_length, ask.length, 0
    for tokens in result.emitted:
        positions += block_length - known % block_length
        known += len(tokens)
    return positions


def expected_growth(server: RandomServer, asks: list[Ask]) -> Samples:
    """What the oracle expects of `asks`, but for engine steps, which requests share.

    Whatever a forward adds to the known run is committed, also behind a stop.
    """
    block_length = server.spec.block_length
    results = [ask.expected(server) for ask in asks]
    forwards = [sum(result.denoise_steps) for result in results]
    unstopped = [ask.expected(server, stop_token_ids=()) for ask in asks]
    runs = [full.emitted[:count] for full, count in zip(unstopped, forwards, strict=True)]
    reveals = [size for result in results for size in result.revealed]
    ratios = [
        len(result.token_ids) / count for result, count in zip(results, forwards, strict=True)
    ]
    positions = [canvas_positions(server, a, r) for a, r in zip(asks, results, strict=True)]
    expected: Samples = {
        ("vllm:diffusion_num_denoising_steps_total",): sum(forwards),
        ("vllm:diffusion_num_canvas_positions_total",): sum(positions),
        ("vllm:diffusion_num_committed_tokens_total",): sum(len(t) for run in runs for t in run),
        ("vllm:edlm_forwards_total", "prefill"): sum(ask.length >= block_length for ask in asks),
        ("vllm:edlm_forwards_total", "denoise"): sum(forwards),
        ("vllm:edlm_forwards_total", "commit"): sum(len(r.denoise_steps) - 1 for r in results),
        ("vllm:edlm_open_blocks",): 0,
    }
    bounds = {
        "vllm:edlm_reveal_size": (reveals, [1, 2, 4, 8]),
        "vllm:edlm_tokens_per_forward": (ratios, [1, 1.5, 2, 3, 4, 6, 8]),
    }
    for name, (values, buckets) in bounds.items():
        expected[f"{name}_count",] = len(values)
        expected[f"{name}_sum",] = pytest.approx(sum(values))
        for bound in [*map(float, buckets), float("inf")]:
            label = "+Inf" if bound == float("inf") else str(bound)
            expected[f"{name}_bucket", label] = sum(value <= bound for value in values)
    return expected


ASKS = [
    Ask(30, 42, 0.7),
    Ask(5, 35, 1.0),  # the prompt is shorter than a block
    Ask(64, 64, 1e-6),
    Ask(8, 24, 0.5),
]


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_one_request(server: RandomServer, ask: Ask) -> None:
    grown, expected = growth(server, [ask]), expected_growth(server, [ask])
    # A prompt runs with its first denoise step, a commit with the next block's.
    steps = expected["vllm:diffusion_num_denoising_steps_total",]
    assert grown == expected | {("vllm:edlm_engine_steps_total",): steps}


def test_requests_together(server: RandomServer) -> None:
    grown = growth(server, ASKS)
    steps = grown.pop(("vllm:edlm_engine_steps_total",))
    assert grown == expected_growth(server, ASKS)
    forwards = [sum(ask.expected(server).denoise_steps) for ask in ASKS]
    assert max(forwards) <= steps <= sum(forwards)


def test_a_stop_within_a_block(server: RandomServer) -> None:
    whole = Ask(30, 42, 1e-6)
    stop = whole.expected(server).token_ids[5]
    ask = Ask(30, 42, 1e-6, stop_token_ids=(stop,))
    grown, expected = growth(server, [ask]), expected_growth(server, [ask])
    committed = expected["vllm:diffusion_num_committed_tokens_total",]
    assert committed > len(ask.expected(server).token_ids), "the block's end is never emitted"
    grown.pop(("vllm:edlm_engine_steps_total",))
    assert grown == expected


def test_a_refused_request_counts_nothing(server: RandomServer) -> None:
    before = settled(server)
    body = {"prompt": "a", "vllm_xargs": {"diffusion_threshold": 2}}
    assert server.post("/v1/completions", body).status_code == 400
    assert settled(server) == before


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_an_answer_says_its_forwards(server: RandomServer, ask: Ask) -> None:
    metrics = ask.send(server)["metrics"]["speculative_decoding"]
    result = ask.expected(server)
    assert metrics["num_spec_steps"] == sum(result.denoise_steps)
    assert metrics["num_draft_tokens"] == canvas_positions(server, ask, result)
    emitted = [len(tokens) for tokens in result.emitted]
    histogram = [emitted.count(size) for size in range(server.spec.block_length + 1)]
    assert metrics["acceptance_histogram"] == histogram
