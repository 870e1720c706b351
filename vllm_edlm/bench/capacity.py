"""What a machine could serve: the roofline of requests of one shape, and the memory they need.

Nothing here is measured. Times are the least that bandwidth and arithmetic allow; a real engine
reaches a fraction of that, which differs by machine, engine and load. `capacity_page` shows which
fraction was measured where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from vllm_edlm.bench.roofline import Rates, Work, bytes_per_value, forward_work, least_seconds
from vllm_edlm.bench.shapes import Shape


@dataclass(frozen=True)
class Traffic:
    """Requests that are all alike, and how their tokens come about.

    Attributes:
        prompt: its tokens, none of them cached.
        output: tokens emitted.
        block_length: of a block-diffusion model; None: an AR model.
        tokens_per_forward: emitted tokens over denoise steps; 1 for an AR model.

    Raises:
        ValueError: a number below one, more tokens a forward than a block has or, without
            blocks, than one.
    """

    prompt: int
    output: int
    block_length: int | None = None
    tokens_per_forward: float = 1.0

    def __post_init__(self) -> None:
        block_length = self.block_length or 1
        if min(self.prompt, self.output, block_length) < 1:
            raise ValueError(f"{self}: prompt, output and block length are at least 1")
        if not 1 <= self.tokens_per_forward <= block_length:
            raise ValueError(
                f"{self.tokens_per_forward} tokens per forward: allowed are 1 to {block_length}"
            )


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: for readers.
        memory: bytes.
        rates: bandwidth and dense matrix rate at their peak.
    """

    name: str
    memory: float
    rates: Rates


H100 = Gpu("H100 SXM", 80e9, Rates(3.35e12, 989.4e12, "bfloat16"))
"""NVIDIA's data sheet: 80 GB, 3.35 TB/s, 1,979 TFLOP/s in bf16 with sparsity, half without."""

EIGHT_B = Shape(
    layers=36,
    hidden=4096,
    intermediate=12288,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151_936,
)
"""config.json of Efficient-DLM-8B, whose backbone is that of Qwen3-8B."""


def weight_bytes(shape: Shape) -> int:
    """Bytes of the weights: linear layers, embeddings and head; norms are not counted."""
    read = forward_work(shape, [1], [1], logits_rows=1).weight_bytes
    return read + bytes_per_value(shape) * shape.vocabulary * shape.hidden


def kv_bytes_per_token(shape: Shape) -> int:
    """Bytes of keys and values of one position, in all layers, in the weights' dtype."""
    return forward_work(shape, [1], [1], logits_rows=0).kv_bytes


def forwards(shape: Shape, traffic: Traffic) -> list[Work]:
    """Work of each forward of one request, as if it were alone.

    The prompt runs with the first denoise step; a complete block runs again with the first step
    of the next one, as the plugin's engine does it. Logits are computed for masked positions.
    """
    steps = ceil(traffic.output / traffic.tokens_per_forward)
    return [_forward(shape, traffic, step) for step in range(steps)]


def _forward(shape: Shape, traffic: Traffic, step: int) -> Work:
    known = int(step * traffic.tokens_per_forward)
    length = traffic.block_length
    if length is None:
        rows = 1 if step else traffic.prompt
        return forward_work(shape, [rows], [traffic.prompt + known], logits_rows=1, causal=True)
    start = known // length * length
    end = start + length
    not_final = traffic.prompt if step == 0 else length if _completes_block(traffic, step) else 0
    return forward_work(
        shape, [not_final + length], [traffic.prompt + end], logits_rows=end - known
    )


def _completes_block(traffic: Traffic, step: int) -> bool:
    """Whether the step before completed a block."""
    assert traffic.block_length is not None
    known, before = (int(s * traffic.tokens_per_forward) for s in (step, step - 1))
    return known // traffic.block_length > before // traffic.block_length


def together(works: Sequence[Work], requests: int, rates: Rates) -> float:
    """Least seconds for requests that start at once and go in step, as in the benchmarks."""
    return sum(least_seconds(_batch(work, requests), rates) for work in works)


def step_seconds(works: Sequence[Work], requests: int, rates: Rates) -> float:
    """Least mean seconds of a step that holds requests of all stages alike, as in a service."""
    return least_seconds(_batch(_mean(works), requests), rates)


def tokens_per_second(
    shape: Shape, traffic: Traffic, requests: int, rates: Rates, fraction: float = 1.0
) -> float:
    """Emitted tokens a second of so many requests at any time, prompts included.

    Args:
        fraction: of the roofline that the engine reaches.
    """
    works = forwards(shape, traffic)
    steps = len(works)
    return fraction * requests * traffic.output / (steps * step_seconds(works, requests, rates))


def requests_in_memory(
    shape: Shape, tokens: int, gpu: Gpu, utilisation: float, reserve: float
) -> int:
    """Requests whose KV fits beside the weights.

    Args:
        tokens: of a request at its end, prompt and output.
        utilisation: share of the memory that vLLM may use (`--gpu-memory-utilization`).
        reserve: bytes of that for activations, CUDA graphs and the like.
    """
    free = utilisation * gpu.memory - weight_bytes(shape) - reserve
    return max(0, int(free / (kv_bytes_per_token(shape) * tokens)))


def _batch(work: Work, requests: int) -> Work:
    """Weights are read once whatever the requests."""
    return Work(work.weight_bytes, requests * work.kv_bytes, requests * work.flops)


def _mean(works: Sequence[Work]) -> Work:
    count = len(works)
    kv, flops = sum(w.kv_bytes for w in works), sum(w.flops for w in works)
    return Work(works[0].weight_bytes, kv // count, flops // count)
