"""The least time in which a machine could run a forward: bytes and operations over its rates.

Counted are the weights of all linear layers and of the head, read once a forward, and the KV
that attention reads; the operations of the same. Norms, embeddings and activations are not
counted, so the time is a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_edlm.bench.shapes import Shape


@dataclass(frozen=True)
class Rates:
    """What the machine can do at best.

    Attributes:
        bandwidth: memory bandwidth, bytes/s.
        matmul: rate of matrix products, flop/s.
        matmul_dtype: of their operands.
    """

    bandwidth: float
    matmul: float
    matmul_dtype: str

    def facts(self) -> dict[str, str | int | float]:
        """For the head of a table."""
        return {
            "measured memory bandwidth (GB/s)": self.bandwidth / 1e9,
            f"measured matrix rate, {self.matmul_dtype} (GFLOP/s)": self.matmul / 1e9,
        }


@dataclass(frozen=True)
class Work:
    """What one forward must do.

    Attributes:
        weight_bytes: weights read.
        kv_bytes: keys and values read.
        flops: operations; a multiplication with an addition is two.
    """

    weight_bytes: int
    kv_bytes: int
    flops: int


def forward_work(
    shape: Shape,
    rows: Sequence[int],
    kv_lengths: Sequence[int],
    logits_rows: int,
    *,
    causal: bool = False,
) -> Work:
    """Work of one forward over a batch.

    Args:
        shape: the model.
        rows: query rows of each attention sequence.
        kv_lengths: keys that each attention sequence reads, its own rows among them.
        logits_rows: rows that the head is applied to.
        causal: a row sees the keys up to its own alone; else all of its sequence.

    Raises:
        ValueError: `rows` and `kv_lengths` differ in length.
    """
    pairs = _pairs(rows, kv_lengths, causal)
    head = shape.vocabulary * shape.hidden
    linear = shape.layers * _layer_parameters(shape)
    itemsize = bytes_per_value(shape)
    return Work(
        weight_bytes=itemsize * (linear + (head if logits_rows else 0)),
        kv_bytes=itemsize * shape.layers * 2 * shape.kv_heads * shape.head_dim * sum(kv_lengths),
        flops=2 * (sum(rows) * linear + logits_rows * head)
        # A score and its share of the output: two products of a head's size each.
        + 4 * shape.layers * shape.heads * shape.head_dim * pairs,
    )


def bytes_per_value(shape: Shape) -> int:
    """Of weights, KV and logits."""
    return getattr(torch, shape.dtype).itemsize


def least_seconds(work: Work, rates: Rates) -> float:
    """Time of the slower of memory and arithmetic, both at their measured best."""
    memory = (work.weight_bytes + work.kv_bytes) / rates.bandwidth
    return max(memory, work.flops / rates.matmul)


def _layer_parameters(shape: Shape) -> int:
    """Weights of the linear layers of one decoder layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * queries + 2 * keys
    return shape.hidden * (attention + 3 * shape.intermediate)


def _pairs(rows: Sequence[int], kv_lengths: Sequence[int], causal: bool) -> int:
    """Pairs of a query row with a key that it sees."""
    return sum(
        length * keys - (length * (length - 1) // 2 if causal else 0)
        for length, keys in zip(rows, kv_lengths, strict=True)
    )
