"""Memory-efficient attention of xformers, an optional extra, with its block-diagonal biases.

The attentions over disjoint keys that `segments` names are merged by their log-sum-exp, as in ring
attention. Gappy biases would let blocks share keys in one attention, but have no backward kernel,
and merged partial attentions need each part's backward pass run with the whole's output and
log-sum-exp.

The kernels run on CUDA alone, in bf16 and fp16. They were not run here: tests hold the biases
against the mask, and the merging against dense attention with kernels written in torch.

Shape legend: M tokens of all rows, Q queries and K keys of one part, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv

from vllm_edlm.train.attention.segments import Segments, segments
from vllm_edlm.train.masks import Grid

NAME = "edlm_xformers"


class Part(NamedTuple):
    """One block-diagonal attention and the bias (an xformers object) that says so."""

    segments: Segments
    bias: Any


def inputs(grid: Grid) -> dict[str, Any]:
    """The parts of the attention; needs xformers."""
    return {"parts": [Part(part, bias(part)) for part in segments(grid)]}


def bias(part: Segments) -> Any:
    """The `BlockDiagonalMask`, or its causal kind, over queries [Q] and keys [K]."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    kind = BlockDiagonalCausalMask if part.causal else BlockDiagonalMask
    return kind.from_seqlens(part.query_lengths, part.key_lengths, device=part.queries.device)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    parts: list[Part] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` [N, H, T, D], `key`, `value` [N, G, T, D].

    Returns [N, T, H, D]. Raises ValueError without parts, or with dropout.
    """
    if parts is None:
        raise ValueError(f"attn_implementation {NAME!r} needs the keywords of attention_inputs()")
    if dropout:
        raise ValueError(f"attention 'xformers' has no dropout; attention_dropout is {dropout}")
    groups = query.shape[1] // key.shape[1]
    # Under autocast, norms and rotary embeddings give fp32; the value has the type to compute in.
    q, k, v = (
        x.to(value.dtype).transpose(1, 2).flatten(0, 1)
        for x in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    output: Tensor = _Merged.apply(q, k, v, parts, scaling)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


class _Whole(NamedTuple):
    """What the queries of one part got from all parts, and its gradient."""

    grad: Tensor  # [Q, H, D]
    output: Tensor  # [Q, H, D]
    lse: Tensor  # [Q, H]


class _Merged(torch.autograd.Function):
    """Attention [M, H, D] over all parts' keys; the parts' keys are disjoint for every query."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], scale: float | None
    ) -> Tensor:
        output = torch.zeros_like(q, dtype=torch.float32)
        lse = output.new_full(q.shape[:2], -torch.inf)
        for part in parts:
            queries, keys = part.segments.queries, part.segments.keys
            more, more_lse = _forward(q[queries], k[keys], v[keys], part, scale)
            both = torch.logaddexp(lse[queries], more_lse)
            kept, added = (lse[queries] - both).exp(), (more_lse - both).exp()
            output[queries] = output[queries] * kept[..., None] + more * added[..., None]
            lse[queries] = both
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for part in ctx.parts:
            queries, keys = part.segments.queries, part.segments.keys
            whole = _Whole(grad[queries], output[queries], lse[queries])
            of_q, of_k, of_v = _backward(whole, q[queries], k[keys], v[keys], part, ctx.scale)
            dq[queries] += of_q
            dk[keys] += of_k
            dv[keys] += of_v
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output [Q, H, D] and log-sum-exp [Q, H] of one part."""
    from xformers import ops

    # The flash kernels, and no other, keep the log-sum-exp of all segments in one row, [1, H, Q].
    kernel, _ = ops.MemoryEfficientAttentionFlashAttentionOp
    output, lse = ops.memory_efficient_attention_forward_requires_grad(
        q[None], k[None], v[None], part.bias, scale=scale, op=kernel
    )
    return output[0], lse[0].T


def _backward(
    whole: _Whole, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One part's share of the gradients of q, k and v."""
    from xformers import ops

    _, kernel = ops.MemoryEfficientAttentionFlashAttentionOp
    known = (whole.grad, whole.output, whole.lse.T.contiguous(), q, k, v)
    dq, dk, dv = ops.memory_efficient_attention_backward(
        *(x[None] for x in known), part.bias, scale=scale, op=kernel
    )
    return dq[0], dk[0], dv[0]
